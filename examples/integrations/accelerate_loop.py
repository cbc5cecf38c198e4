"""Accelerate: prepare, accumulate, clip, save and load, with surgery in place of `accelerator.backward`.

    python -m examples.integrations.accelerate_loop

Needs accelerate. `accelerator.sync_gradients` says which micro-batch is the last of a step. `accelerator.backward`
takes one loss, so `unwrap` finds the wrapper inside the prepared optimizer, for its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from agsurgery import AGS, GradientSurgery, unwrap
from examples.integrations.two_tasks import TwoTasks, dataset


class Loop:
    """A model with its optimizer, scheduler and data, as prepared."""

    def __init__(self, accumulate: int = 1, batch: int = 16, **options: Any) -> None:
        self.accelerator = Accelerator(gradient_accumulation_steps=accumulate, **options)
        model = TwoTasks()
        optimizer = GradientSurgery(torch.optim.AdamW(model.parameters(), lr=0.01), AGS())
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
        loader = DataLoader(dataset(), batch_size=batch)
        self.model, self.optimizer, self.scheduler, self.loader = self.accelerator.prepare(
            model, optimizer, scheduler, loader
        )

    def epoch(self) -> float:
        """One pass over the data; returns the share of steps in which the gradients conflicted."""
        accelerator, conflicts = self.accelerator, []
        for batch in self.loader:
            with accelerator.accumulate(self.model):
                parts = accelerator.gradient_accumulation_steps
                losses = {name: loss / parts for name, loss in self.model(*batch).items()}
                report = unwrap(self.optimizer).backward(
                    losses, scaler=accelerator.scaler, combine=accelerator.sync_gradients
                )
                if report is not None:
                    accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
                    conflicts.append(report.conflict)
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
        return torch.stack(conflicts).float().mean().item()

    def save(self, folder: Path) -> None:
        """Model, optimizer, method, scheduler and random numbers."""
        self.accelerator.save_state(str(folder))

    def load(self, folder: Path) -> None:
        """Go on from there."""
        self.accelerator.load_state(str(folder))


if __name__ == "__main__":
    loop = Loop(accumulate=2, cpu=True)
    shares = [loop.epoch() for _ in range(20)]
    print(f"gradients conflicted in {shares[-1]:.0%} of the last steps")
