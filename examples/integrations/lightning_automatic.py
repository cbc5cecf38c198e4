"""Lightning, automatic optimisation: Lightning clips, accumulates, steps and clears; only `backward` is replaced.

    python -m examples.integrations.lightning_automatic

Needs lightning. Lightning does not tell which micro-batch of `accumulate_grad_batches` is the last one, so the wrapper
is told to keep the gradients of each task from one to the next.
"""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from agsurgery import AGS, GradientSurgery, unwrap
from examples.integrations.two_tasks import TwoTasks, dataset


class Automatic(L.LightningModule):
    """Two losses; the training step hands Lightning their sum, for its bookkeeping."""

    def __init__(self) -> None:
        super().__init__()
        self.model = TwoTasks()
        self.losses: dict[str, Tensor] = {}

    def configure_optimizers(self) -> Any:
        """The wrapper is an optimizer like any other, also for schedulers."""
        optimizer = GradientSurgery(
            torch.optim.AdamW(self.model.parameters(), lr=0.01), AGS(), accumulation="tasks"
        )
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]

    def training_step(self, batch: Any, index: int) -> Tensor:
        """Keep the losses for `backward`."""
        self.losses = self.model(*batch)
        return torch.stack(list(self.losses.values())).sum()

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """In place of `loss.backward()`."""
        parts = self.trainer.accumulate_grad_batches
        losses = {name: part / parts for name, part in self.losses.items()}
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)  # of 16-mixed
        report = unwrap(self.optimizers()).backward(losses, scaler=scaler)
        self.log("conflict", report.conflict.float())


def train(epochs: int = 3, batch: int = 16, **options: Any) -> L.Trainer:
    """Train, and return the trainer with the module in it."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    settings = {"accelerator": "cpu", "enable_checkpointing": False} | quiet | options
    resume = settings.pop("ckpt_path", None)
    trainer = L.Trainer(max_epochs=epochs, gradient_clip_val=1.0, **settings)
    trainer.fit(Automatic(), DataLoader(dataset(), batch_size=batch), ckpt_path=resume)
    return trainer


if __name__ == "__main__":
    metrics = train(epochs=20).callback_metrics
    print(f"conflict in the last step: {bool(metrics['conflict'])}")
