"""Wrappers of an optimizer to be held to the promises of `contract_matrix`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from agsurgery import GradientSurgery
from examples.torchvision_import import import_torchvision

Wrap = Callable[[Optimizer], Any]
"""From a base optimizer to what is around it."""


def _projected(parameters: list[Tensor], objectives: Iterable[Tensor]) -> None:
    """PCGrad as everybody writes it: explicit vectors, one after the other, summed into `.grad`."""
    rows = []
    for objective in objectives:
        found = torch.autograd.grad(
            objective, parameters, retain_graph=True, materialize_grads=True
        )
        rows.append(torch.cat([gradient.flatten() for gradient in found]))
    total = torch.zeros_like(rows[0])
    for i, row in enumerate(rows):
        projected = row.clone()
        for j, other in enumerate(rows):
            inner = projected @ other
            if i != j and inner < 0:
                projected -= inner / (other @ other) * other
        total += projected
    sizes = [parameter.numel() for parameter in parameters]
    for parameter, part in zip(parameters, total.split(sizes), strict=True):
        parameter.grad = part.view_as(parameter)


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


class PlainObject:
    """The usual wrapper of a repository: an object that keeps what it needs of the optimizer."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups

    def backward(self, objectives: Iterable[Tensor]) -> None:
        """Combined gradients into `.grad`."""
        _projected(_parameters(self.optimizer), objectives)

    def zero_grad(self) -> None:
        """As the optimizer does."""
        self.optimizer.zero_grad()

    def step(self) -> None:
        """As the optimizer does."""
        self.optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """That of the optimizer."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Into the optimizer."""
        self.optimizer.load_state_dict(state_dict)


class WithPcBackward:
    """The most copied interface: `pc_backward`, `step`, `zero_grad`, and the optimizer as a property."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optim = optimizer

    @property
    def optimizer(self) -> Optimizer:
        """What is inside."""
        return self._optim

    def zero_grad(self) -> None:
        """Clear the gradients."""
        return self._optim.zero_grad(set_to_none=True)

    def step(self) -> None:
        """Step on what `pc_backward` left."""
        return self._optim.step()

    def pc_backward(self, objectives: Iterable[Tensor]) -> None:
        """Combined gradients into `.grad`."""
        _projected(_parameters(self._optim), objectives)


class Proxy:
    """Forwards every name that it does not have."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    def backward(self, objectives: Iterable[Tensor]) -> None:
        """Combined gradients into `.grad`."""
        _projected(_parameters(self.optimizer), objectives)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.optimizer, name)


class Subclass(Optimizer):
    """An optimizer by inheritance, made from the groups of another (as SAM is usually written)."""

    def __init__(self, base_optimizer: Optimizer) -> None:
        super().__init__(base_optimizer.param_groups, base_optimizer.defaults)
        self.base_optimizer = base_optimizer

    def backward(self, objectives: Iterable[Tensor]) -> None:
        """Combined gradients into `.grad`."""
        _projected(_parameters(self), objectives)

    def step(self, closure: Any = None) -> Any:
        """As the base does."""
        return self.base_optimizer.step(closure)


class _Strategy:
    """What Lightning's strategies do in a step, without a trainer."""

    def optimizer_step(self, optimizer: Optimizer, closure: Any, **kwargs: Any) -> Any:
        return optimizer.step(closure=closure, **kwargs)


_STRATEGY = _Strategy()  # Lightning holds it by a weak reference


def _ready() -> None:
    """Lightning and timm import torchvision where it is installed."""
    if find_spec("torchvision") is not None:
        import_torchvision()


def _lookahead(module: str) -> Wrap:
    _ready()
    kind = import_module(module).Lookahead
    # So long a period that its steps here are those of its base.
    return lambda base: kind(base, alpha=0.5, k=1000)


def _po_pcgrad() -> Wrap:
    kind = import_module("pytorch_optimizer").PCGrad
    return lambda base: kind(base)


def _accelerate() -> Wrap:
    accelerate = import_module("accelerate")
    optimizer = import_module("accelerate.optimizer").AcceleratedOptimizer
    accelerate.Accelerator(cpu=True)  # sets the state that its optimizers look at
    return lambda base: optimizer(base)


def _lightning() -> Wrap:
    _ready()
    kind = import_module("lightning.pytorch.core.optimizer").LightningOptimizer
    return lambda base: kind._to_lightning_optimizer(base, _STRATEGY)


def _around(outer: Callable[[], Wrap], inner: Callable[[], Wrap]) -> Callable[[], Wrap]:
    def make() -> Wrap:
        around, inside = outer(), inner()
        return lambda base: around(inside(base))

    return make


def _ours() -> Wrap:
    return lambda base: GradientSurgery(base)


SUBJECTS: dict[str, Callable[[], Wrap]] = {
    "bare AdamW": lambda: lambda base: base,
    "GradientSurgery": _ours,
    "plain object": lambda: PlainObject,
    "with `pc_backward`": lambda: WithPcBackward,
    "`__getattr__` proxy": lambda: Proxy,
    "subclass": lambda: Subclass,
    "pytorch_optimizer PCGrad": _po_pcgrad,
    "pytorch_optimizer Lookahead": lambda: _lookahead("pytorch_optimizer"),
    "timm Lookahead": lambda: _lookahead("timm.optim"),
    "Accelerate": _accelerate,
    "Lightning": _lightning,
    "Accelerate(GradientSurgery)": _around(_accelerate, _ours),
    "Lightning(GradientSurgery)": _around(_lightning, _ours),
    "GradientSurgery(timm Lookahead)": _around(_ours, lambda: _lookahead("timm.optim")),
}
