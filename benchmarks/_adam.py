"""Adam for many networks at once."""

from __future__ import annotations

import torch
from torch import Tensor


class Adam:
    """Adam for R runs with a learning rate each: `torch.optim.Adam` has one for a whole tensor."""

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
