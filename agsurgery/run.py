"""What is found on the way through one step."""

from __future__ import annotations

import torch
from torch import Tensor

from agsurgery.kernels import solver_dtype
from agsurgery.methods import Solution
from agsurgery.passes import Step
from agsurgery.report import SurgeryReport


class Run:
    """Gramian and weights as they become known, and the report made of them.

    Args:
        step: the losses; None where gradients came task by task.
        losses: `(K,)` values, NaN where nobody saw them.
        tasks: K names, if there is no `step`.
        loss_scale: of a `GradScaler`, if there is no `step`.
    """

    def __init__(
        self,
        step: Step | None,
        losses: Tensor,
        tasks: tuple[str, ...] = (),
        loss_scale: Tensor | None = None,
    ) -> None:
        self._step = step
        self.losses = losses
        self.tasks = tasks if step is None else step.tasks
        self._loss_scale = loss_scale if step is None else step.loss_scale
        self.gramian: Tensor | None = None
        self.solution: Solution | None = None
        self.outbox = None if step is None else step.outbox

    @property
    def step(self) -> Step:
        """The losses."""
        assert self._step is not None
        return self._step

    def unknown(self) -> Tensor:
        """The Gramian of gradients that nobody computed."""
        shape = (len(self.tasks), len(self.tasks))
        device = self.losses.device
        return torch.full(shape, torch.nan, dtype=solver_dtype(device), device=device)

    def report(self, blocks: tuple[str, ...] | None) -> SurgeryReport:
        """The report, with the loss scale divided out; `blocks`: names, None without."""
        assert self.gramian is not None
        assert self.solution is not None
        gramian = self.gramian
        if self._loss_scale is not None:
            gramian = gramian / self._loss_scale.to(gramian).square()
        weights, scale = self.solution
        return SurgeryReport(self.tasks, self.losses, gramian, weights, scale, blocks)
