"""Adam and SGD for many networks at once: those of `torch.optim` have one learning rate for a whole tensor."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Optimizer(Protocol):
    """Moves R networks, with a learning rate each, by `(R, n)` updates."""

    def step(self, parameters: Tensor, gradient: Tensor, factor: float) -> None:
        """One step with the rates times `factor`, in place."""


class Adam:
    """Adam for R runs."""

    def __init__(self, parameters: Tensor, rates: Tensor) -> None:
        self.rates = rates.unsqueeze(1)
        self.mean, self.square = torch.zeros_like(parameters), torch.zeros_like(parameters)
        self.steps = 0

    def step(self, parameters: Tensor, gradient: Tensor, factor: float) -> None:
        """One step with the rates times `factor`, in place."""
        self.steps += 1
        self.mean.lerp_(gradient, 1 - 0.9)
        self.square.mul_(0.999).addcmul_(gradient, gradient, value=1 - 0.999)
        size = (self.square / (1 - 0.999**self.steps)).sqrt_().add_(1e-8)
        parameters.sub_(factor * self.rates / (1 - 0.9**self.steps) * self.mean / size)


class SGD:
    """SGD with a momentum of 0.9 for R runs."""

    def __init__(self, parameters: Tensor, rates: Tensor) -> None:
        self.rates = rates.unsqueeze(1)
        self.velocity = torch.zeros_like(parameters)

    def step(self, parameters: Tensor, gradient: Tensor, factor: float) -> None:
        """One step with the rates times `factor`, in place."""
        self.velocity.mul_(0.9).add_(gradient)
        parameters.sub_(factor * self.rates * self.velocity)
