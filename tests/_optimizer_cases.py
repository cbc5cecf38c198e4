"""What the tests of the optimizer wrapper share: base optimizers, a model with four conflicting tasks, training."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from agsurgery import GradientSurgery

Make = Callable[[Iterable[Tensor]], Optimizer]

BASES: dict[str, Make] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01),
    "adamw_fused": lambda params: torch.optim.AdamW(params, lr=0.01, fused=True),
    "rmsprop": lambda params: torch.optim.RMSprop(params, lr=0.01),
    "adagrad": lambda params: torch.optim.Adagrad(params, lr=0.05),
}
every_base = pytest.mark.parametrize("base", BASES)


class FourTasks(nn.Module):
    """A trunk under four heads that want different things from the same features."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.trunk = nn.Linear(5, 6)
            self.heads = nn.ModuleList(nn.Linear(6, 1) for _ in range(4))
        self.double()

    def forward(self, x: Tensor) -> list[Tensor]:
        features = torch.tanh(self.trunk(x))
        return [head(features).squeeze(1) for head in self.heads]


def losses(model: FourTasks, batch: int = 0, tasks: int = 4) -> list[Tensor]:
    """Losses of the first `tasks` tasks on batch number `batch`."""
    generator = torch.Generator().manual_seed(1000 + batch)
    x = torch.randn(8, 5, generator=generator, dtype=torch.float64)
    targets = torch.randn(4, 8, generator=generator, dtype=torch.float64)
    outputs = model(x)[:tasks]
    return [
        (output - 3 * target).square().mean()
        for output, target in zip(outputs, targets, strict=False)
    ]


def train(model: FourTasks, optimizer: Optimizer, batches: Iterable[int]) -> None:
    """Ordinary steps: with surgery on a wrapper, on the plain sum of the losses otherwise."""
    for batch in batches:
        optimizer.zero_grad()
        if hasattr(optimizer, "backward"):
            optimizer.backward(losses(model, batch))
        else:
            torch.stack(losses(model, batch)).sum().backward()
        optimizer.step()


def step_with_given_gradients(model: nn.Module, optimizer: Optimizer, seed: int) -> None:
    """One step without surgery, on random gradients: shows what the optimizer's own state does."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    optimizer.step()


def make(
    base: str | Make, method: Any = "pcgrad", seed: int = 0, **options: Any
) -> tuple[FourTasks, GradientSurgery]:
    """A fresh model and a wrapped optimizer on it."""
    model = FourTasks(seed)
    build = BASES[base] if isinstance(base, str) else base
    return model, GradientSurgery(build(model.parameters()), method, **options)


def values(model: nn.Module) -> list[Tensor]:
    """Copies of all parameters."""
    return [parameter.detach().clone() for parameter in model.parameters()]


def same(one: Iterable[Tensor], other: Iterable[Tensor]) -> bool:
    """Whether all pairs of tensors are equal to the last bit."""
    return all(torch.equal(a, b) for a, b in zip(list(one), list(other), strict=True))
