"""Slide labels from bags of embedded cells: gated attention, trained once per arm and seed.

Three scores rank the cells of a bag. None of them sees the label of a cell.

- `attention`: the weight of the cell in the bag's embedding (Ilse et al. 2018, eq. 9). High
  attention means "decides about the bag", which need not mean "abnormal": nothing in the loss
  prevents a network from attending to normal cells.
- `instance_score`: the logit of a bag that holds this cell only. Oriented, as the classifier is.
- `distance`: how far the cell lies from the train cells of slide-negative bags, which are all
  normal. Needs no network, and is the same for all seeds.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from .attention import GatedAttention, NormalCells
from .devices import pick_device
from .embeddings import Bag, read_bags
from .errors import UserError
from .files import replacing
from .metrics import choose_threshold
from .results import find_arms, read_fingerprint

__all__ = ["MilConfig", "mil", "train_mil"]

RECIPE = 1
"""Raised whenever the training changes, so that a result of an older version is made anew."""


FEWEST_TO_CHOOSE = 5
"""Validation bags of each label below which a threshold chosen on them would be chance: then it is 0.5."""


@dataclass(frozen=True)
class MilConfig:
    """Train attention MIL on the embedded bags: OUT/mil."""

    out: Path
    """Run folder; reads OUT/embed/ARM, writes OUT/mil/ARM/seedK."""
    arms: tuple[str, ...] = ()
    """Pretraining arms to use. Empty: all that have embeddings."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of initial weights, dropout and the order of the bags, one training each."""
    hidden: int = 128
    """Width of the layer that attention and classifier share."""
    dropout: float = 0.25
    """Share of hidden units that are silenced in training."""
    lr: float = 5e-4
    """Learning rate of AdamW, one bag per step."""
    weight_decay: float = 1e-2
    """Weight decay of AdamW."""
    epochs: int = 100
    """Passes over the train bags, at most."""
    patience: int = 25
    """Stop after so many epochs without a lower validation loss."""
    distance: Literal["mahalanobis", "euclidean"] = "mahalanobis"
    """Distance to the normal cells: scaled by their covariance (Ledoit-Wolf), or plain."""
    device: str = "auto"
    """cpu, cuda or auto, which takes cuda if there is one."""


def mil(config: MilConfig) -> Path:
    """Train one classifier per arm and seed, and return the folder OUT/mil.

    What is complete and was made from the same embeddings with the same settings is kept.

    Raises:
        UserError: If a setting is out of range, or a split has not got bags of both labels.
    """
    _check(config)
    arms = find_arms(config.out / "embed", config.arms, "*.h5", "embed")
    for arm in arms:
        bags = read_bags(config.out / "embed" / arm)
        fingerprint = _fingerprint(config, bags)
        folders = {seed: config.out / "mil" / arm / f"seed{seed}" for seed in config.seeds}
        wanted = {seed: to for seed, to in folders.items() if not _is_current(to, fingerprint)}
        if not wanted:
            continue
        _check_bags(bags, arm)
        ready = _Prepared(bags, config)
        for seed, folder in tqdm(wanted.items(), desc=f"mil {arm}", unit="seed", disable=None):
            _run_seed(config, ready, seed, folder, fingerprint)
    return config.out / "mil"


def _check_bags(bags: Sequence[Bag], arm: str) -> None:
    """Refuse bags that cannot train, or choose, a classifier."""
    for split, use in (("train", "to learn from"), ("val", "to choose the epoch and threshold on")):
        labels = sorted({bag.label for bag in bags if bag.split == split})
        if labels != [0, 1]:
            found = f"labels {labels}" if labels else "no bags"
            raise UserError(
                f"The {split} split of arm {arm!r} must have bags of label 0 and of label 1 {use}. "
                f"Found {found}. Put bags of both labels into it in the manifest."
            )


def _check(config: MilConfig) -> None:
    rules = {
        "hidden": (config.hidden >= 2, "at least 2"),
        "dropout": (0 <= config.dropout < 1, "at least 0 and below 1"),
        "lr": (0 < config.lr < math.inf, "positive"),
        "weight_decay": (0 <= config.weight_decay < math.inf, "0 or more"),
        "epochs": (config.epochs >= 1, "at least 1"),
        "patience": (config.patience >= 1, "at least 1"),
        "seeds": (len(config.seeds) > 0 and min(config.seeds) >= 0, "one or more numbers from 0"),
        "distance": (config.distance in ("mahalanobis", "euclidean"), "mahalanobis or euclidean"),
    }
    for name, (holds, text) in rules.items():
        if not holds:
            raise UserError(f"`{name}` must be {text}. Got {getattr(config, name)}. Change it.")


def _fingerprint(config: MilConfig, bags: Sequence[Bag]) -> str:
    """Hash of all that decides about the result: settings and content of the bags."""
    settings = asdict(config)
    for name in ("out", "arms", "seeds", "device"):  # these choose what to do, not how
        del settings[name]
    digest = hashlib.sha256(json.dumps({**settings, "recipe": RECIPE}, sort_keys=True).encode())
    for bag in bags:
        digest.update(json.dumps([bag.name, bag.label, bag.split, bag.features.shape]).encode())
        digest.update(json.dumps([list(bag.paths), list(bag.class_name)]).encode())
        digest.update(bag.instance_label.tobytes())
        digest.update(np.ascontiguousarray(bag.features).tobytes())
    return digest.hexdigest()


def _is_current(folder: Path, fingerprint: str) -> bool:
    """Whether a training finished here from the same input; the model is written last."""
    files = [folder / name for name in ("log.csv", "bags.csv", "instances.csv")]
    return all(path.exists() for path in files) and read_fingerprint(folder) == fingerprint


class _Prepared:
    """What all seeds of an arm share: tensors, statistics of train cells, distances to normal."""

    def __init__(self, bags: Sequence[Bag], config: MilConfig) -> None:
        train = np.concatenate([bag.features for bag in bags if bag.split == "train"]).astype(float)
        mean, std = train.mean(0), train.std(0)
        # Rounding of constant features in float32 is no signal, and must not be scaled up to one.
        std[std <= 1e-6 * np.abs(mean)] = 0.0
        scale = np.where(std > 0, std, 1.0)
        scaled = [(bag.features - mean) / scale for bag in bags]
        negative = [i for i, bag in enumerate(bags) if bag.split == "train" and not bag.label]
        normal = np.concatenate([scaled[i] for i in negative])
        self.normal = NormalCells(normal, config.distance)
        self.distances = [self.normal.distance(x) for x in scaled]
        self.device = torch.device(pick_device(config.device))
        self.mean, self.std = torch.tensor(mean).float(), torch.tensor(std).float()
        self.bags = list(bags)
        self.tensors = [torch.from_numpy(bag.features).to(self.device) for bag in bags]

    def of(self, split: str) -> tuple[list[Tensor], list[int]]:
        """Features and labels of the bags of a split."""
        at = [i for i, bag in enumerate(self.bags) if bag.split == split]
        return [self.tensors[i] for i in at], [self.bags[i].label for i in at]


def _run_seed(
    config: MilConfig, ready: _Prepared, seed: int, folder: Path, fingerprint: str
) -> None:
    model = GatedAttention(ready.mean, ready.std, config.hidden, config.dropout)
    log = train_mil(model.to(ready.device), ready.of("train"), ready.of("val"), config, seed)
    scored = _score(model, ready.tensors)
    probabilities = torch.tensor([logit for logit, _, _ in scored]).double().sigmoid().tolist()
    chosen = [i for i, bag in enumerate(ready.bags) if bag.split == "val"]
    labels = [ready.bags[i].label for i in chosen]
    enough = min(labels.count(0), labels.count(1)) >= FEWEST_TO_CHOOSE
    threshold = choose_threshold(labels, [probabilities[i] for i in chosen]) if enough else 0.5
    bags = pd.DataFrame(
        {
            "bag": [bag.name for bag in ready.bags],
            "split": [bag.split for bag in ready.bags],
            "label": [bag.label for bag in ready.bags],
            "probability": probabilities,
            "threshold": threshold,
        }
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.pt").unlink(missing_ok=True)  # it vouches for the tables beside it
    frames = {"log.csv": log, "bags.csv": bags, "instances.csv": _instances(ready, scored)}
    for name, frame in frames.items():
        with replacing(folder / name) as part:
            frame.to_csv(part, index=False, float_format="%.9g")
    content: dict[str, Any] = {
        "fingerprint": fingerprint,
        "state": {name: value.cpu() for name, value in model.state_dict().items()},
        "hidden": config.hidden,
        "threshold": threshold,
        "epoch": int(log["val_loss"].argmin()) + 1,
        "normal_centre": torch.from_numpy(ready.normal.centre),
    }
    if ready.normal.precision is not None:
        content["normal_precision"] = torch.from_numpy(ready.normal.precision)
    with replacing(folder / "model.pt") as part:
        torch.save(content, part)


def train_mil(
    model: GatedAttention,
    train: tuple[list[Tensor], list[int]],
    val: tuple[list[Tensor], list[int]],
    config: MilConfig,
    seed: int,
) -> pd.DataFrame:
    """Train in place, leave the weights of the best epoch in the model, and return a row per epoch.

    Best is the lowest validation loss, the earliest epoch among equals. The loss and not the AUROC
    decides: with a handful of bags the AUROC takes few values, and most epochs tie. Training
    accuracy plays no part.

    Args:
        model: Network with fresh or earlier weights; fresh ones are drawn here from the seed.
        train: Features (n_i, d) and labels of the train bags.
        val: Features and labels of the validation bags.
        config: Learning rate, decay, epochs and patience.
        seed: Seed of weights, dropout and order. The state of global generators is left as it was.

    Returns:
        Columns epoch, train_loss, val_loss, val_auroc.
    """
    device = next(model.parameters()).device
    rows: list[dict[str, float]] = []
    best, best_state = math.inf, {}
    # `fork_rng` restores the CPU's generator and that of the current CUDA device afterwards.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.lr, weight_decay=config.weight_decay
        )
        targets = torch.tensor(train[1], dtype=torch.float32, device=device)
        for epoch in range(1, config.epochs + 1):
            model.train()
            losses = []
            for i in torch.randperm(len(train[0])).tolist():
                loss = F.binary_cross_entropy_with_logits(model(train[0][i])[0], targets[i])
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]  # torch gives it no types
                optimizer.step()
                losses.append(loss.detach())
            val_loss, val_auroc = _validate(model, val)
            mean = float(torch.stack(losses).mean())
            row = {"epoch": epoch, "train_loss": mean, "val_loss": val_loss, "val_auroc": val_auroc}
            rows.append(row)
            if val_loss < best:  # strictly: the earliest among equals stays; a NaN never wins
                best, best_state = val_loss, {k: v.clone() for k, v in model.state_dict().items()}
                best_epoch = epoch
            elif not best_state or epoch - best_epoch >= config.patience:
                break
    if not best_state:
        raise UserError(
            "The validation loss must be finite. It was not, from the first epoch on. Lower `lr`."
        )
    model.load_state_dict(best_state)
    log: pd.DataFrame = pd.DataFrame(rows)
    return log


def _validate(model: GatedAttention, val: tuple[list[Tensor], list[int]]) -> tuple[float, float]:
    logits = torch.tensor([logit for logit, _, _ in _score(model, val[0])])
    loss = F.binary_cross_entropy_with_logits(logits, torch.tensor(val[1], dtype=logits.dtype))
    if not bool(torch.isfinite(logits).all()):
        return math.nan, math.nan
    return float(loss), float(roc_auc_score(val[1], logits.numpy()))


def _score(model: GatedAttention, bags: Sequence[Tensor]) -> list[tuple[float, Tensor, Tensor]]:
    """Logit, attention and scores of single cells of each bag, without dropout."""
    model.eval()
    with torch.no_grad():
        outputs = [model(features) for features in bags]
    return [(float(logit), weights.cpu(), alone.cpu()) for logit, weights, alone in outputs]


def _instances(ready: _Prepared, scored: list[tuple[float, Tensor, Tensor]]) -> pd.DataFrame:
    parts = [
        pd.DataFrame(
            {
                "bag": bag.name,
                "split": bag.split,
                "label": bag.label,
                "path": bag.paths,
                "instance_label": bag.instance_label,
                "class_name": bag.class_name,
                "attention": weights.numpy(),
                "instance_score": alone.numpy(),
                "distance": distance,
            }
        )
        for bag, (_, weights, alone), distance in zip(
            ready.bags, scored, ready.distances, strict=True
        )
    ]
    table: pd.DataFrame = pd.concat(parts, ignore_index=True)
    return table
