"""One pretraining: what happens in a step, in an epoch, and when it is interrupted."""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from agsurgery import AGS, CAGrad, GradientSurgery, PCGrad, Sum, SurgeryReport

from . import views
from .balance import CappedShare
from .files import replacing
from .indicators import spread, verdict
from .losses import chance, contrastive_loss, similarity_loss
from .networks import Pretrained
from .pretrain_config import PretrainConfig
from .store import CellStore


@dataclass(frozen=True)
class Side:
    """Rows of the cell store that belong to the training bags of one label."""

    rows: np.ndarray

    def batches(self, parts: int, generator: np.random.Generator) -> list[np.ndarray]:
        """All cells in random order, divided as evenly as possible: each is seen exactly once."""
        return np.array_split(generator.permutation(self.rows), parts)


class Training:
    """One pretraining: model, optimizer, schedule and log, saved and restored at epoch ends."""

    def __init__(
        self,
        config: PretrainConfig,
        model: Pretrained,
        store: CellStore,
        sides: list[Side],
        steps: int,
    ) -> None:
        self.config, self.model, self.store = config, model, store
        self.sides, self.steps = sides, steps
        self.device = next(model.parameters()).device
        self.augment = views.RandomViews(config.crop, jitter=config.jitter, stain=config.stain)
        base = torch.optim.SGD(
            model.parameters(),
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
        self.balance = _balance(config)
        self.optimizer = GradientSurgery(base, Sum() if config.arm == "simclr" else self.balance)
        total, warm = steps * config.epochs, max(1, round(config.warmup * steps * config.epochs))

        def factor(step: int) -> float:
            if step < warm:
                return (step + 1) / warm
            return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))

        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)
        self.log: list[dict[str, float]] = []
        self.seconds = 0.0

    def run(self, folder: Path) -> dict[str, Any]:
        """Train from the last checkpoint, if there is one, to the end; return the status."""
        config = self.config
        first = self._restore(folder / "checkpoint.pt")
        self.model.train()
        bar = tqdm(
            total=config.epochs * self.steps,
            initial=first * self.steps,
            desc=f"pretrain {config.arm}",
            unit="step",
            disable=None,  # not into a log file
        )
        with bar:
            for epoch in range(first, config.epochs):
                begin = time.monotonic()
                for batch in self._epoch(epoch):
                    row = self._step(epoch, batch)
                    bar.set_postfix_str(f"contrastive {row['loss_contrastive']:.2f}", refresh=False)
                    bar.update()
                self.seconds += time.monotonic() - begin
                self._save(folder, epoch + 1)
        reference = chance(round(self._contrastive_patches()))
        last = self.log[-1]
        return {
            **asdict(verdict(self.log, reference)),
            "chance": reference,
            "final_contrastive": last["loss_contrastive"],
            "final_similarity": last["loss_similarity"],
            "effective_rank": last["effective_rank"],
            "std": last["std"],
            "steps": len(self.log),
            "seconds": round(self.seconds, 1),
        }

    def _contrastive_patches(self) -> float:
        sides = self.sides if self.config.arm == "simclr" else self.sides[:1]
        return sum(len(side.rows) for side in sides) / self.steps

    def _epoch(self, epoch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Batches of an epoch; they depend on seed and epoch alone, so that a resumed run sees the same."""
        # The views are drawn from torch's generator.
        torch.manual_seed(1_000_003 * self.config.seed + epoch)
        generator = np.random.default_rng((self.config.seed, epoch))
        positive, negative = (side.batches(self.steps, generator) for side in self.sides)
        yield from zip(positive, negative, strict=True)

    def _step(self, epoch: int, batch: tuple[np.ndarray, np.ndarray]) -> dict[str, float]:
        self.balance.active = (
            len(self.log) >= self.config.similarity_start * self.steps * self.config.epochs
        )
        losses, outputs = self._losses(batch)
        self.optimizer.zero_grad()
        report = self.optimizer.backward(losses)
        self.optimizer.step()
        lr = self.scheduler.get_last_lr()[0]
        self.scheduler.step()
        row = {"step": len(self.log), "epoch": epoch, "lr": lr, **_describe(report)}
        alive = spread(outputs)
        row |= {"std": alive.std, "effective_rank": alive.effective_rank}
        self.log.append(row)
        return row

    def _losses(self, batch: tuple[np.ndarray, np.ndarray]) -> tuple[dict[str, Tensor], Tensor]:
        """The losses by task, and the projector outputs of the patches that are contrasted."""
        config = self.config
        positive, negative = (self._two_views(rows) for rows in batch)
        if config.arm == "simclr":
            outputs = self.model(torch.cat((positive[0], negative[0], positive[1], negative[1])))
            return {"contrastive": contrastive_loss(*outputs.chunk(2), config.temperature)}, outputs
        if config.statistics == "shared":
            outputs = self.model(torch.cat((*positive, *negative)))
            of_positive, of_negative = outputs.split((2 * len(batch[0]), 2 * len(batch[1])))
        else:
            of_positive, of_negative = (
                self.model(torch.cat(positive)),
                self.model(torch.cat(negative)),
            )
        losses = {
            "contrastive": contrastive_loss(*of_positive.chunk(2), config.temperature),
            "similarity": similarity_loss(of_negative, config.similarity_temperature),
        }
        return losses, of_positive

    def _two_views(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        images = views.to_float(self.store.images[rows]).to(self.device)
        return self.augment(images), self.augment(images)

    def _save(self, folder: Path, epochs_done: int) -> None:
        state = {
            "epochs_done": epochs_done,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "log": self.log,
            "seconds": self.seconds,
        }
        with replacing(folder / "checkpoint.pt") as temporary:
            torch.save(state, temporary)
        with (
            replacing(folder / "log.csv") as temporary,
            temporary.open("w", newline="", encoding="utf-8") as file,
        ):
            writer = csv.DictWriter(file, list(self.log[0]))
            writer.writeheader()
            writer.writerows(self.log)

    def _restore(self, path: Path) -> int:
        """Number of epochs done; 0 without a checkpoint."""
        if not path.is_file():
            return 0
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.log, self.seconds = state["log"], state["seconds"]
        print(f"Continuing after epoch {state['epochs_done']} of {self.config.epochs}.")
        return int(state["epochs_done"])


def _balance(config: PretrainConfig) -> CappedShare:
    methods = {"ags": AGS(), "pcgrad": PCGrad(), "cagrad": CAGrad(), "sum": Sum()}
    share = math.inf if config.similarity_share is None else config.similarity_share
    return CappedShare(methods.get(config.arm, Sum()), share)


def _describe(report: SurgeryReport) -> dict[str, float]:
    """The columns of the log that the surgery report answers; NaN for a task that an arm does not have."""
    values = report.to_dict()
    missing = math.nan
    cosine = values.get("cosine/similarity/contrastive", missing)
    several = len(report.tasks) > 1  # a single task shares nothing, and has no Gramian
    return {
        "loss_contrastive": values["loss/contrastive"],
        "loss_similarity": values.get("loss/similarity", missing),
        "cosine": cosine,
        "conflict": float(cosine < 0) if cosine == cosine else missing,
        "scale": values["scale"],
        "norm_contrastive": values["norm/contrastive"] if several else missing,
        "norm_similarity": values.get("norm/similarity", missing),
    }
