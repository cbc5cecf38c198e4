"""Hugging Face Trainer: a subclass with its own `training_step`; all else is the Trainer.

    python -m examples.integrations.hf_trainer

Needs transformers and accelerate. A small BERT, built here from its configuration, learns to tell how many words of a
kind a sentence has, and whether it begins with one.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import BertConfig, BertModel, Trainer, TrainingArguments

from agsurgery import AGS, GradientSurgery, unwrap


class Sentences(Dataset[dict[str, Tensor]]):
    """Random words; two targets for each sentence."""

    def __init__(self, count: int = 32) -> None:
        generator = torch.Generator().manual_seed(0)
        self.words = torch.randint(0, 50, (count, 6), generator=generator)

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        words = self.words[index]
        low = (words < 25).float()
        return {"input_ids": words, "count": low.sum(), "first": low[0]}


class TwoTasks(nn.Module):
    """BERT under two heads; the forward pass returns the losses by task name."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            hidden_dropout_prob=0.0,  # so that micro-batches can be compared with whole batches
            attention_probs_dropout_prob=0.0,
        )
        self.bert = BertModel(config, add_pooling_layer=False)
        self.count, self.first = nn.Linear(16, 1), nn.Linear(16, 1)

    def forward(self, input_ids: Tensor, count: Tensor, first: Tensor) -> dict[str, Tensor]:
        """Mean losses over the sentences."""
        features = self.bert(input_ids).last_hidden_state[:, 0]
        return {
            "count": (self.count(features).squeeze(1) - count).square().mean(),
            "first": nn.functional.binary_cross_entropy_with_logits(
                self.first(features).squeeze(1), first
            ),
        }


class SurgeryTrainer(Trainer):
    """A Trainer of models that return several losses."""

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """In place of `self.accelerator.backward(loss)`."""
        model.train()
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            losses = model(**inputs)
        parts = self.current_gradient_accumulation_steps
        losses = {name: loss / parts for name, loss in losses.items()}
        unwrap(self.optimizer).backward(
            losses, scaler=self.accelerator.scaler, combine=self.accelerator.sync_gradients
        )
        return torch.stack(list(losses.values())).sum().detach()


def trainer(folder: Path, batch: int = 8, **options: Any) -> SurgeryTrainer:
    """A trainer with the wrapper as its optimizer. The Trainer makes the scheduler."""
    settings = {
        "max_steps": 8,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
        "max_grad_norm": 1.0,
    }
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=batch, **(settings | options)
    )
    model = TwoTasks()
    optimizer = GradientSurgery(torch.optim.AdamW(model.parameters(), lr=1e-3), AGS())
    return SurgeryTrainer(model, arguments, train_dataset=Sentences(), optimizers=(optimizer, None))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        result = trainer(Path(temporary), max_steps=100).train()
    print(f"mean of the summed losses: {result.training_loss:.3f}")
