"""Pretrain an encoder from slide labels: similarity on negative slides, contrast on positive ones.

Differences from the published script, each of which changed the result there: every patch is seen once per
epoch; both views are augmented; losses have graphs of their own, so no graph is kept; the run is seeded,
logged, resumable, and says so when it collapsed. See the README beside this file for the choice of defaults.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from agsurgery import AGS, CAGrad, GradientSurgery, PCGrad, Sum, SurgeryReport

from . import views
from .balance import CappedShare
from .errors import UserError
from .files import replacing
from .indicators import spread, verdict
from .losses import chance, contrastive_loss, similarity_loss
from .manifest import read_manifest
from .networks import Pretrained, save_encoder
from .rules import check_copies
from .store import CellStore, open_store

ARMS = ("random", "simclr", "sum", "ags", "pcgrad", "cagrad")


@dataclass(frozen=True)
class PretrainConfig:
    """Train the encoder of one arm into OUT/pretrain/ARM."""

    out: Path
    """Run folder, with the manifest of the bags step."""
    arm: str = "ags"
    """How the two objectives are reconciled: ags, pcgrad, cagrad, sum; or simclr (contrast on all patches,
    labels unused), or random (an encoder that is not trained)."""
    encoder: Literal["small", "resnet18"] = "small"
    """resnet18 as in the paper, or a small one for the CPU."""
    patch: int = 64
    """Side to which cells are resized, in pixels. The paper: 250, with resnet18."""
    crop: int = 56
    """Side of the random crop that the encoder sees. The paper: 224."""
    epochs: int = 12
    """Passes over all training cells. The paper: 150 (of which each saw a small part of the cells)."""
    batch: int = 96
    """Patches per step from both sides together, in proportion to their numbers; two views each. The paper: 256."""
    lr: float = 0.1
    """Peak learning rate of SGD. The paper: 0.001."""
    momentum: float = 0.9
    """Momentum of SGD. The paper: 0.9."""
    weight_decay: float = 1e-4
    """Weight decay of SGD. The paper: 1e-4."""
    warmup: float = 0.1
    """Share of the steps in which the learning rate rises linearly; then a cosine. The paper: 10 of 150 epochs."""
    temperature: float = 0.2
    """Of the contrastive loss. The paper: 0.07."""
    similarity_temperature: float = 0.07
    """Divides the similarity loss, 1 - mean cosine. The paper: 0.07. Without effect while the next limit binds."""
    similarity_share: float | None = 0.1
    """Greatest length of the similarity gradient relative to the contrastive one, before surgery; None: no limit.
    The paper: none; that collapses."""
    similarity_start: float = 0.33
    """Share of the steps after which the similarity objective is switched on. The paper: 0."""
    hidden: int = 128
    """Width of the projector. The paper: 512."""
    outputs: int = 64
    """Outputs of the projector. The paper: 512."""
    projector_batch_norm: bool = False
    """BatchNorm inside the projector. The paper: no."""
    statistics: Literal["separate", "shared"] = "shared"
    """BatchNorm statistics of positive and negative patches: of each side, or of one joint batch. The paper:
    separate."""
    jitter: float = 0.4
    """Range of brightness, contrast and saturation around 1. The paper: 0.1."""
    stain: float = 0.1
    """Range of a factor for each colour channel around 1. The paper: a hue shift of 0.1."""
    seed: int = 0
    """Seed of the initial weights, the order of the cells and the views."""
    device: str = "cpu"
    """Device of torch, such as cuda."""


@dataclass(frozen=True)
class _Side:
    """Rows of the cell store that belong to the training bags of one label."""

    rows: np.ndarray

    def batches(self, parts: int, generator: np.random.Generator) -> list[np.ndarray]:
        """All cells in random order, divided as evenly as possible: each is seen exactly once."""
        return np.array_split(generator.permutation(self.rows), parts)


def pretrain(config: PretrainConfig) -> Path:
    """Train, or continue, or keep the finished encoder of one arm.

    Returns:
        Path of `OUT/pretrain/ARM/encoder.pt`. Beside it: `log.csv`, `status.json`, `config.json`.

    Raises:
        UserError: a setting or the data do not allow it; the folder holds a run made with other settings.
    """
    _check(config)
    frame = read_manifest(config.out / "manifest.csv")
    folder = config.out / "pretrain" / config.arm
    target = folder / "encoder.pt"
    settings = _settings(config)
    if _finished(folder, settings):
        print(f"{target}: kept, it was made with the same settings.")
        return target
    store = open_store(frame["path"], config.patch, config.out)
    check_copies(frame, store.copies)
    train = frame[frame["split"] == "train"]
    sides = [
        _Side(np.unique(store.rows(train.loc[train["label"] == label, "path"]))) for label in (1, 0)
    ]
    steps = round(sum(len(side.rows) for side in sides) / config.batch)
    if steps < 1 or min(len(side.rows) for side in sides) < 2 * steps:
        raise UserError(
            "Every batch must hold at least 2 patches of each side. Found "
            f"{len(sides[0].rows)} training cells in positive bags and {len(sides[1].rows)} in negative ones for "
            f"batches of {config.batch}. Draw more bags, or change batch."
        )
    torch.manual_seed(config.seed)
    model = Pretrained(
        config.encoder, config.hidden, config.outputs, batch_norm=config.projector_batch_norm
    ).to(config.device)
    _set_statistics(model, store, np.concatenate([side.rows for side in sides]))
    _claim(folder, settings)
    training = _Training(config, model, store, sides, steps)
    untrained = {"collapsed": False, "weak": False, "reason": "", "steps": 0}
    status = untrained if config.arm == "random" else training.run(folder)
    save_encoder(model, target, arm=config.arm, crop=config.crop, patch=config.patch)
    _write_json(
        folder / "status.json", {key: _finite_or_none(value) for key, value in status.items()}
    )
    (folder / "checkpoint.pt").unlink(missing_ok=True)
    if status["reason"]:
        ending = "COLLAPSED" if status["collapsed"] else "ended weak"
        print(f"WARNING: pretraining {config.arm} {ending}: {status['reason']}.")
    return target


class _Training:
    """One pretraining: model, optimizer, schedule and log, saved and restored at epoch ends."""

    def __init__(
        self,
        config: PretrainConfig,
        model: Pretrained,
        store: CellStore,
        sides: list[_Side],
        steps: int,
    ) -> None:
        self.config, self.model, self.store, self.sides, self.steps = (
            config,
            model,
            store,
            sides,
            steps,
        )
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
        torch.manual_seed(
            1_000_003 * self.config.seed + epoch
        )  # the views are drawn from torch's generator
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
        images = views.to_float(self.store.images[rows]).to(self.config.device)
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
        state = torch.load(path, map_location=self.config.device, weights_only=True)
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


def _set_statistics(
    model: Pretrained, store: CellStore, rows: np.ndarray, most: int = 2000
) -> None:
    """Colour mean and spread of training cells (a regular subset of fewer than twice `most`)."""
    chosen = np.sort(rows)[:: max(1, len(rows) // most)]
    pixels = views.to_float(store.images[chosen])
    model.encoder.mean.copy_(pixels.mean((0, 2, 3)).view(3, 1, 1))
    model.encoder.std.copy_(pixels.std((0, 2, 3)).clamp(min=1e-3).view(3, 1, 1))


def _check(config: PretrainConfig) -> None:
    if config.arm not in ARMS:
        raise UserError(f"arm must be one of {', '.join(ARMS)}. Got {config.arm!r}.")
    if not 8 <= config.crop <= config.patch:
        raise UserError(f"crop must be between 8 and patch ({config.patch}). Got {config.crop}.")
    if config.similarity_share is not None and not config.similarity_share > 0:
        raise UserError(
            f"similarity_share must be positive, or None. Got {config.similarity_share}."
        )
    if not 0 <= config.similarity_start < 1:
        raise UserError(
            f"similarity_start must be at least 0 and below 1. Got {config.similarity_start}."
        )
    for name in (
        "epochs",
        "batch",
        "lr",
        "temperature",
        "similarity_temperature",
        "hidden",
        "outputs",
    ):
        if not getattr(config, name) > 0:
            raise UserError(f"{name} must be positive. Got {getattr(config, name)}.")
    if not 0 <= config.warmup < 1:
        raise UserError(
            f"warmup must be a share of the steps, at least 0 and below 1. Got {config.warmup}."
        )
    if not 0 <= config.momentum < 1:
        raise UserError(f"momentum must be at least 0 and below 1. Got {config.momentum}.")
    if not config.weight_decay >= 0:
        raise UserError(f"weight_decay must not be negative. Got {config.weight_decay}.")
    for name in ("jitter", "stain"):
        if not 0 <= getattr(config, name) <= 1:
            raise UserError(
                f"{name} must be a range around 1, between 0 and 1. Got {getattr(config, name)}."
            )
    if not 0 <= config.seed < 2**32:
        raise UserError(
            f"seed must be at least 0 and below 2**32. Got {config.seed}. Use 0, 1, 2, ..."
        )
    try:
        torch.empty(0, device=config.device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"device must be available to torch. Got {config.device!r}: {error}"
        ) from error


def _settings(config: PretrainConfig) -> dict[str, Any]:
    """All that decides about the result: the configuration without its folder, and the manifest."""
    settings = asdict(config)
    settings.pop("out")
    settings["manifest"] = hashlib.sha256((config.out / "manifest.csv").read_bytes()).hexdigest()
    return settings


def _finished(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether the folder holds the result of these very settings; it must not hold that of others."""
    note = folder / "config.json"
    if not note.is_file():
        return False
    found = json.loads(note.read_text(encoding="utf-8"))
    changed = sorted(key for key in settings if found.get(key) != settings[key])
    if changed:
        raise UserError(
            f"{folder} must belong to a run with the same settings. It differs in {', '.join(changed)}. "
            "Choose another out, or delete that folder to train again."
        )
    return (folder / "encoder.pt").is_file() and (folder / "status.json").is_file()


def _claim(folder: Path, settings: dict[str, Any]) -> None:
    """Record what the folder is for. Only once nothing is left to refuse: else a corrected setting would differ."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", settings)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _finite_or_none(value: Any) -> Any:
    """JSON has no NaN: null stands for the loss of a task that an arm lacks, and for a diverged training."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
