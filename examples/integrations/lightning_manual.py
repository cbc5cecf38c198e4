"""Lightning, manual optimisation: your loop, Lightning's precision, devices, logging and checkpoints.

    python -m examples.integrations.lightning_manual

Needs lightning. `self.optimizers()` is Lightning's proxy; `unwrap` finds the wrapper inside, for its `backward`. What
comes after is as ever: clip, step, clear.
"""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

from agsurgery import AGS, GradientSurgery, unwrap
from examples.integrations.two_tasks import TwoTasks, dataset


class Manual(L.LightningModule):
    """Two losses, one step of surgery for every `accumulate` batches."""

    def __init__(self, accumulate: int = 1) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model = TwoTasks()
        self.accumulate = accumulate

    def configure_optimizers(self) -> Any:
        """The wrapper is an optimizer like any other, also for schedulers."""
        optimizer = GradientSurgery(torch.optim.AdamW(self.model.parameters(), lr=0.01), AGS())
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]

    def training_step(self, batch: Any, index: int) -> None:
        """In place of `self.manual_backward(sum(losses))`."""
        losses = {name: loss / self.accumulate for name, loss in self.model(*batch).items()}
        optimizer = self.optimizers()
        last = (index + 1) % self.accumulate == 0
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)  # of 16-mixed
        report = unwrap(optimizer).backward(losses, scaler=scaler, combine=last)
        if report is None:
            return
        self.log("conflict", report.conflict.float())
        # Lightning unscales inside `step`: until then, gradients are as long as the scale makes them.
        longest = 1.0 if scaler is None else scaler.get_scale()
        self.clip_gradients(optimizer, gradient_clip_val=longest, gradient_clip_algorithm="norm")
        optimizer.step()
        optimizer.zero_grad()

    def on_train_epoch_end(self) -> None:
        """Schedulers are stepped by hand too."""
        self.lr_schedulers().step()


def train(epochs: int = 3, accumulate: int = 1, batch: int = 16, **options: Any) -> L.Trainer:
    """Train, and return the trainer with the module in it."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    settings = {"accelerator": "cpu", "enable_checkpointing": False} | quiet | options
    resume = settings.pop("ckpt_path", None)
    trainer = L.Trainer(max_epochs=epochs, **settings)
    trainer.fit(Manual(accumulate), DataLoader(dataset(), batch_size=batch), ckpt_path=resume)
    return trainer


if __name__ == "__main__":
    metrics = train(epochs=20).callback_metrics
    print(f"conflict in the last step: {bool(metrics['conflict'])}")
