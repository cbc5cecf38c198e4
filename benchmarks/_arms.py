"""Ways to make a training step on several losses: the plain sum, this package, and its peers."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from agsurgery import AGS, GradientSurgery
from benchmarks._cases import MultiTask, Problem

LR, MOMENTUM = 1e-3, 0.9  # small, so that the losses do not run to zero while the clock runs
PLAIN, FLOOR, OURS = "plain sum", "K passes", "AGS"
SURROGATE = "AGS at the features"


class Arm(NamedTuple):
    """A model of its own with its optimizer, and the pass that fills `.grad` (forward and backward)."""

    model: MultiTask
    optimizer: torch.optim.Optimizer
    fill: Callable[[], None]

    def step(self) -> None:
        """One whole training step."""
        self.optimizer.zero_grad()
        self.fill()
        self.optimizer.step()


ArmMaker = Callable[[Problem], Arm]


class NotNeeded(Exception):
    """This arm has nothing to do on this case."""


def _sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)


def plain_sum(problem: Problem) -> Arm:
    """The step everybody knows: one backward pass of the sum of the losses."""
    model = copy.deepcopy(problem.model)

    def fill() -> None:
        torch.stack(problem.forward(model).losses).sum().backward()  # type: ignore[no-untyped-call]

    return Arm(model, _sgd(model), fill)


def k_passes(problem: Problem) -> Arm:
    """One backward pass per loss, the gradients summed: no surgery, no copies."""
    model = copy.deepcopy(problem.model)

    def fill() -> None:
        losses, features = problem.forward(model)
        for task, loss in enumerate(losses):
            reached = model.reached(task)
            keep = features is not None and task + 1 < len(losses)
            gradients = torch.autograd.grad(loss, reached, retain_graph=keep)
            sums: list[Tensor] = []
            terms: list[Tensor] = []
            for parameter, gradient in zip(reached, gradients, strict=True):
                if parameter.grad is None:
                    parameter.grad = gradient
                else:
                    sums.append(parameter.grad)
                    terms.append(gradient)
            if sums:
                torch._foreach_add_(sums, terms)

    return Arm(model, _sgd(model), fill)


def ags(
    problem: Problem,
    *,
    through_features: bool = False,
    level: Literal["parameters", "features"] = "parameters",
    **options: Any,
) -> Arm:
    """AGS of this package.

    Args:
        problem: the model and its forward pass.
        through_features: name the features to `backward`.
        level: see `agsurgery.backward`.
        options: of `GradientSurgery`.

    Raises:
        NotNeeded: there are no features.
    """
    if through_features and not len(problem.model.heads):
        raise NotNeeded("the losses share no features")
    model = copy.deepcopy(problem.model)
    optimizer = GradientSurgery(_sgd(model), AGS(), **options)

    def fill() -> None:
        losses, features = problem.forward(model)
        optimizer.backward(losses, features=features if through_features else None, level=level)

    return Arm(model, optimizer, fill)


def torchjd(problem: Problem, aggregator: str, chunk: int | None = None) -> Arm:
    """An aggregator of torchjd, by `mtl_backward` where there are heads and `backward` where there are none.

    Args:
        problem: the model and its forward pass.
        aggregator: name of a class of `torchjd.aggregation`.
        chunk: losses differentiated at a time; None, the default of torchjd: all at once, by vmap.

    Raises:
        ImportError: torchjd, or a package the aggregator needs, is not installed.
    """
    autojac: Any = importlib.import_module("torchjd.autojac")
    combine = getattr(importlib.import_module("torchjd.aggregation"), aggregator)()
    model = copy.deepcopy(problem.model)
    trunk = list(model.trunk.parameters())

    def fill() -> None:
        losses, features = problem.forward(model)
        if features is None:
            autojac.backward(losses, parallel_chunk_size=chunk)
        else:
            autojac.mtl_backward(losses, features=features, parallel_chunk_size=chunk)
        autojac.jac_to_grad(trunk, combine)

    return Arm(model, _sgd(model), fill)


def pytorch_optimizer(problem: Problem) -> Arm:
    """PCGrad of pytorch_optimizer, which treats trunk and heads alike.

    Raises:
        ImportError: pytorch_optimizer is not installed.
    """
    library: Any = importlib.import_module("pytorch_optimizer")
    model = copy.deepcopy(problem.model)
    optimizer = library.PCGrad(_sgd(model), reduction="sum")

    def fill() -> None:
        optimizer.pc_backward(problem.forward(model).losses)

    return Arm(model, optimizer, fill)


ARMS: dict[str, ArmMaker] = {
    PLAIN: plain_sum,
    FLOOR: k_passes,
    OURS: ags,
    "AGS, two stages": partial(ags, through_features=True),
    "AGS, lean": partial(ags, engine="lean"),
    "AGS, reweight": partial(ags, engine="reweight"),
    "AGS, accumulate": partial(ags, engine="accumulate"),
    "AGS, rows in bfloat16": partial(ags, buffer_dtype=torch.bfloat16),
    "AGS, every 10 steps": partial(ags, every=10),
    SURROGATE: partial(ags, through_features=True, level="features"),
    "torchjd PCGrad": partial(torchjd, aggregator="PCGrad"),
    "torchjd PCGrad, one by one": partial(torchjd, aggregator="PCGrad", chunk=1),
    "torchjd UPGrad": partial(torchjd, aggregator="UPGrad"),
    "pytorch_optimizer PCGrad": pytorch_optimizer,
}


LOOSER = (SURROGATE, "AGS, rows in bfloat16")
"""Arms of ours whose update need not be as long as the plain sum: it is restored at the features, or rounded."""


def check_gradients(name: str, arm: Arm, reference: Arm) -> None:
    """Make sure that what will be timed does its work: run both arms' pass and compare.

    Every parameter must have a finite gradient. K passes must give the plain sum; AGS must give the heads their plain
    gradients and the trunk a gradient as long as the plain one.

    Args:
        name: of `arm`, as in `ARMS`.
        arm: has not made a step yet.
        reference: the plain sum, likewise.

    Raises:
        RuntimeError: it does not.
    """
    for each in (arm, reference):
        each.optimizer.zero_grad()
        each.fill()
    for key, parameter in arm.model.named_parameters():
        if parameter.grad is None or not bool(parameter.grad.isfinite().all()):
            raise RuntimeError(f"{name}: the gradient of `{key}` must be finite. It is not.")

    def same(first: nn.Module, second: nn.Module) -> bool:
        a, b = _flat_gradient(first), _flat_gradient(second)
        return bool((a - b).norm() <= 1e-3 * b.norm())  # float32, in other orders of summation

    def as_long(first: nn.Module, second: nn.Module) -> bool:
        a, b = _flat_gradient(first).norm(), _flat_gradient(second).norm()
        return bool((a - b).abs() <= 1e-3 * b)

    trunk, heads = arm.model.trunk, arm.model.heads
    right = True
    if name == FLOOR:
        right = same(trunk, reference.model.trunk) and same(heads, reference.model.heads)
    if name.startswith(OURS) and name not in LOOSER:
        right = as_long(trunk, reference.model.trunk) and same(heads, reference.model.heads)
    if not right:
        raise RuntimeError(f"{name}: gradients must agree with the plain sum. They do not.")


def _flat_gradient(module: nn.Module) -> Tensor:
    gradients = [p.grad.double().flatten() for p in module.parameters() if p.grad is not None]
    return torch.cat(gradients) if gradients else torch.zeros(1)
