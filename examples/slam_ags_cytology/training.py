"""One pretraining: what happens in a step, in an epoch, and when it is interrupted."""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from agsurgery import GradientSurgery, SurgeryReport

from . import views
from .arms import objectives, reconcile
from .balance import CappedShare
from .distributed import World, average_statistics, surgery_options
from .errors import UserError
from .files import replacing
from .indicators import spread, verdict
from .networks import Pretrained
from .objectives import TASKS
from .pretrain_config import PretrainConfig
from .store import CellStore

FORMAT = 2
"""Of a checkpoint and of the log in it; raised whenever a training of the version before could not be continued."""


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
        world: World | None = None,
    ) -> None:
        self.config, self.model, self.store = config, model, store
        self.sides, self.steps = sides, steps
        self.world = World() if world is None else world
        self.device = next(model.parameters()).device
        self.augment = _views(config)
        self.objectives = objectives(config.arm, config).to(self.device)
        groups = [
            [*model.encoder.parameters()],
            [*model.projector.parameters(), *self.objectives.parameters()],
        ]
        base = torch.optim.SGD(
            [{"params": group} for group in groups],
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
        share = None if config.similarity_share == "progress" else config.similarity_share
        self.method = reconcile(config.arm, share, config.max_scale)
        self.optimizer = GradientSurgery(
            base,
            self.method,
            granularity={"part": "group"}.get(config.granularity, config.granularity),
            **surgery_options(self.world),
        )
        # Disabled, it hands everything through. The usual first scale, 65536, would overflow and skip the first step.
        self.scaler = torch.amp.GradScaler(
            self.device.type, init_scale=1024.0, enabled=config.precision == "fp16"
        )
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._factor)
        self.log: list[dict[str, float]] = []
        self.done = 0
        self.seconds = 0.0

    def _factor(self, step: int) -> float:
        """Learning rate at a step, relative to its peak."""
        config = self.config
        if config.schedule == "epochs":
            step //= self.steps
            total, warm = config.epochs, max(1, round(config.warmup * config.epochs))
            rise = 0.1 + 0.9 * step / warm
        else:
            total = self.steps * config.epochs
            warm = max(1, round(config.warmup * total))
            rise = (step + 1) / warm
        if step < warm:
            return rise
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))

    def run(self, folder: Path) -> dict[str, Any]:
        """Train from the last checkpoint, if there is one, to the end; return the status."""
        config = self.config
        first = self._restore(folder / "checkpoint.pt")
        self.model.train()
        board = _Board(folder / "tensorboard", self.done, config.tensorboard and self.world.leads)
        bar = tqdm(
            total=config.epochs * self.steps,
            initial=first * self.steps,
            desc=f"pretrain {config.arm}",
            unit="step",
            disable=None if self.world.leads else True,  # None: not into a log file
        )
        with bar, board:
            for epoch in range(first, config.epochs):
                begin = time.monotonic()
                for batch in self._epoch(epoch):
                    row = self._step(epoch, batch)
                    if row is not None:
                        board.write(row)
                        shown = row[f"loss_{self.objectives.judged}"]
                        bar.set_postfix_str(f"{self.objectives.judged} {shown:.2f}", refresh=False)
                    bar.update()
                self.seconds += time.monotonic() - begin
                average_statistics(self.model, self.world)
                if self.world.leads:
                    self._save(folder, epoch + 1)
                    if bar.disable:
                        self._say(epoch + 1, first)
        return self._status()

    def _status(self) -> dict[str, Any]:
        reference, last = self._chance(), self.log[-1]
        return {
            **asdict(verdict(self.log, reference, f"loss_{self.objectives.judged}")),
            "chance": reference,
            **{f"final_{task}": last[f"loss_{task}"] for task in TASKS},
            "effective_rank": last["effective_rank"],
            "std": last["std"],
            "conflict_rate": self._mean("conflict"),
            "mean_cosine": self._mean("cosine"),
            "mean_scale": self._mean("scale"),
            "steps": self.done,
            "seconds": round(self.seconds, 1),
        }

    def _mean(self, column: str) -> float:
        """Over the whole training; NaN where an arm has no such column."""
        return sum(row[column] for row in self.log) / len(self.log)

    def _chance(self) -> float:
        """The loss of a network to which all patches look alike."""
        batches = self.steps * self.world.size
        positives, negatives = (len(side.rows) / batches for side in self.sides)
        return self.objectives.chance(positives, negatives)

    def _say(self, done: int, first: int) -> None:
        """Progress for a log file: about ten lines in all."""
        epochs = self.config.epochs
        if done % max(1, epochs // 10) and done != epochs:
            return
        left = self.seconds / done * (epochs - done) / 60
        judged = self.objectives.judged
        value = self.log[-1][f"loss_{judged}"]
        print(
            f"pretrain {self.config.arm}: epoch {done} of {epochs}, {judged} loss {value:.2f}, "
            f"about {left:.1f} minutes left",
            flush=True,
        )

    def _epoch(self, epoch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Pixels of the batches of an epoch, those of positive slides and those of negative ones.

        They depend on seed and epoch alone, so that a resumed run sees the same. A thread reads the next batch
        while this one is computed on.
        """
        # The views are drawn from torch's generator.
        torch.manual_seed(view_seed(self.config.seed, epoch, self.world.rank))
        generator = np.random.default_rng((self.config.seed, epoch))
        positive, negative = (side.batches(self.steps, generator) for side in self.sides)
        pairs = zip(positive, negative, strict=True)
        batches = [tuple(self.world.part(rows) for rows in pair) for pair in pairs]
        with ThreadPoolExecutor(1) as reader:
            waiting = reader.submit(self._read, batches[0])
            for following in [*batches[1:], None]:
                pixels = waiting.result()
                if following is not None:
                    waiting = reader.submit(self._read, following)
                yield pixels

    def _read(self, batch: tuple[np.ndarray, ...]) -> tuple[np.ndarray, np.ndarray]:
        positive, negative = (self.store.images[rows] for rows in batch)
        return positive, negative

    def _step(self, epoch: int, batch: tuple[np.ndarray, np.ndarray]) -> dict[str, float] | None:
        """One step; its row of the log, if it is due."""
        config = self.config
        losses, outputs = self._losses(batch)
        self._set_balance(losses)
        self.optimizer.zero_grad()
        report = self.optimizer.backward(losses, scaler=self.scaler)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        lr = self.scheduler.get_last_lr()[0]
        self.scheduler.step()
        step = self.done
        self.done += 1
        if step % config.log_every and self.done < self.steps * config.epochs:
            return None
        row = {"step": step, "epoch": epoch, "lr": lr, **_describe(report)}
        alive = spread(outputs)
        row |= {"std": alive.std, "effective_rank": alive.effective_rank}
        self.log.append(row)
        return row

    def _set_balance(self, losses: dict[str, Tensor]) -> None:
        """Say how long the similarity gradient may be in this step."""
        if not isinstance(self.method, CappedShare):
            return
        config = self.config
        total = self.steps * config.epochs
        self.method.active = self.done >= config.similarity_start * total
        if config.similarity_share == "progress":
            fallen = 1 - losses["contrastive"].detach() / self._chance()
            self.method.share = fallen.clamp(min=0)

    def _losses(self, batch: tuple[np.ndarray, np.ndarray]) -> tuple[dict[str, Tensor], Tensor]:
        """The losses by task, and the projector outputs whose spread is watched."""
        config = self.config
        positive, negative = (
            self._two_views(pixels, negative=bool(side)) for side, pixels in enumerate(batch)
        )
        dtype = torch.float16 if config.precision == "fp16" else torch.bfloat16
        with torch.autocast(self.device.type, dtype, enabled=config.precision != "fp32"):
            rows = self.objectives.outputs(self.model, positive, negative)
        return self.objectives.losses(*rows), self.objectives.watched(*rows)

    def _two_views(self, pixels: np.ndarray, *, negative: bool) -> tuple[Tensor, Tensor]:
        first, second = self.augment.pair(views.to_float(pixels, self.device), negative=negative)
        return first, second

    def _save(self, folder: Path, epochs_done: int) -> None:
        state = {
            "format": FORMAT,
            "epochs_done": epochs_done,
            "model": self.model.state_dict(),
            "objectives": self.objectives.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "method": self.method.state_dict() if isinstance(self.method, CappedShare) else {},
            "scaler": self.scaler.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "log": self.log,
            "done": self.done,
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
        if state.get("format") != FORMAT:
            raise UserError(
                f"{path} must be a checkpoint of this version (format {FORMAT}). It is of another. Delete "
                f"{path.parent} to train again, or finish with the version that began."
            )
        self.model.load_state_dict(state["model"])
        self.objectives.load_state_dict(state["objectives"])
        self.optimizer.load_state_dict(state["optimizer"])
        if isinstance(self.method, CappedShare):
            self.method.load_state_dict(state["method"])
        self.scaler.load_state_dict(state["scaler"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.log, self.done, self.seconds = state["log"], state["done"], state["seconds"]
        if self.world.leads:
            print(f"Continuing after epoch {state['epochs_done']} of {self.config.epochs}.")
        return int(state["epochs_done"])


def view_seed(seed: int, epoch: int, rank: int) -> int:
    """Seed of the views of an epoch; every process draws its own, the first those of a single process."""
    if rank == 0:
        return 1_000_003 * seed + epoch
    return int(np.random.SeedSequence((seed, epoch, rank)).generate_state(1, np.uint32)[0])


def _views(config: PretrainConfig) -> nn.Module:
    if config.augmentation == "paper":
        return views.PublishedViews(config.crop, jitter=config.jitter, hue=config.stain)
    return views.RandomViews(config.crop, jitter=config.jitter, stain=config.stain)


class _Board:
    """The log as TensorBoard reads it; does nothing where it is not wanted."""

    def __init__(self, folder: Path, first: int, wanted: bool) -> None:
        self.writer: Any = None
        if wanted:
            from torch.utils.tensorboard import SummaryWriter

            # Steps after the checkpoint that a killed run wrote are hidden.
            self.writer = SummaryWriter(str(folder), purge_step=first)

    def __enter__(self) -> _Board:
        return self

    def __exit__(self, *_: object) -> None:
        if self.writer is not None:
            self.writer.close()

    def write(self, row: dict[str, float]) -> None:
        """All finite columns of a row but its position."""
        if self.writer is None:
            return
        for name, value in row.items():
            if name not in ("step", "epoch") and math.isfinite(value):
                self.writer.add_scalar(name, value, int(row["step"]))


def _describe(report: SurgeryReport) -> dict[str, float]:
    """The columns of the log that the surgery report answers; NaN for a task that an arm does not have."""
    values = report.to_dict()
    missing = math.nan
    several = len(report.tasks) > 1  # a single task shares nothing, and has no Gramian
    cosine = next((values[name] for name in values if name.startswith("cosine/")), missing)
    scales = [value for name, value in values.items() if name.split("/")[0] == "scale"]
    row = {f"loss_{task}": values.get(f"loss/{task}", missing) for task in TASKS}
    row |= {
        "cosine": cosine,
        "conflict": float(cosine < 0) if cosine == cosine else missing,
        "scale": sum(scales) / len(scales),
    }
    for what in ("norm", "weight"):
        for task in TASKS:
            row[f"{what}_{task}"] = values.get(f"{what}/{task}", missing) if several else missing
    return row
