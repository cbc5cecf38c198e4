"""Slide labels from bags of embedded cells: attention MIL, trained once per arm and seed.

Four scores rank the cells of a bag. None of them sees the label of a cell.

- `attention`: the weight of the cell in the bag's embedding (Ilse et al. 2018, eq. 9). High
  attention means "decides about the bag", which need not mean "abnormal": nothing in the loss
  prevents a network from attending to normal cells.
- `instance_score`: the logit of a bag that holds this cell only. Oriented, as the classifier is.
- `slide_label`: a linear discriminant in which every train cell has the label of its slide
  (`single.py`). The same for all seeds.
- `distance`: how far the cell lies from the train cells of slide-negative bags, which are all
  normal. Needs no network, and is the same for all seeds.

A curriculum starts from the models of another run, as a rule one with a higher witness rate (`start`). That only means
something if both runs embedded their cells with the same encoder, so this is checked. What is frozen at first is named
by its part of the network (`freeze`), and is bit for bit what it was until it is released.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from .attention import GatedAttention, NormalCells
from .devices import pick_device
from .embeddings import Bag, bag_path, fingerprints, read_bags
from .errors import UserError
from .files import replacing
from .metrics import choose_threshold
from .prototypes import PrototypeAttention, Terms, first_prototypes
from .results import find_arms, read_fingerprint
from .single import SlideLabels

__all__ = ["MilConfig", "mil", "train_mil"]

RECIPE = 2
"""Raised whenever the training changes, so that a result of an older version is made anew."""


Part = Literal["prototypes", "embed", "attention", "classifier"]
"""A part of the network that can be frozen."""

Aggregator = GatedAttention | PrototypeAttention

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
    aggregator: Literal["abmil", "pamil"] = "abmil"
    """abmil: gated attention (Ilse et al., 2018). pamil: attention to prototypes (Liu et al., 2024), as in the paper,
    without the errors of its published code."""
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
    prototypes: int = 10
    """pamil: number of prototypes. The original PAMIL: 10; the paper's number is not known."""
    prototype_init: Literal["kmeans", "normal"] = "kmeans"
    """pamil: first prototypes, centres of train cells or noise. The published code: noise, at another scale."""
    terms: Terms = field(default_factory=Terms)
    """pamil: terms added to the loss."""
    start: Path | None = None
    """Run folder whose models (same arm and seed) are the first weights, for a curriculum from a higher witness rate.
    Its cells must have been embedded by the same encoder. The paper: the model of the next higher rate."""
    freeze: tuple[Part, ...] = ()
    """Parts that do not change in the first epochs. The paper: prototypes and embed, after a start."""
    freeze_epochs: int = 5
    """Number of these epochs. The paper: 5."""
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
        source = fingerprints(bag_path(config.out / "embed" / arm, bags[0].name))[1]
        start = _read_start(config, arm, source)
        fingerprint = _fingerprint(config, bags, start)
        folders = {seed: config.out / "mil" / arm / f"seed{seed}" for seed in config.seeds}
        wanted = {seed: to for seed, to in folders.items() if not _is_current(to, fingerprint)}
        if not wanted:
            continue
        _check_bags(bags, arm)
        ready = _Prepared(bags, config, source)
        for seed, folder in tqdm(wanted.items(), desc=f"mil {arm}", unit="seed", disable=None):
            _run_seed(config, ready, seed, folder, fingerprint, start.get(seed))
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
        "aggregator": (config.aggregator in ("abmil", "pamil"), "abmil or pamil"),
        "prototypes": (config.prototypes >= 1, "at least 1"),
        "prototype_init": (config.prototype_init in ("kmeans", "normal"), "kmeans or normal"),
        "terms": (
            min(asdict(config.terms).values()) >= 0 and config.terms.instances >= 1,
            "weights of 0 or more, and instances at least 1",
        ),
        "freeze_epochs": (config.freeze_epochs >= 0, "0 or more"),
        "freeze": ({*config.freeze} <= {*get_args(Part)}, f"some of {', '.join(get_args(Part))}"),
    }
    for name, (holds, text) in rules.items():
        if not holds:
            raise UserError(f"`{name}` must be {text}. Got {getattr(config, name)}. Change it.")
    if config.aggregator == "abmil" and "prototypes" in config.freeze:
        raise UserError("`freeze` names prototypes, which only the aggregator pamil has.")
    learnt = ("prototypes",) if config.prototype_init == "kmeans" else ()
    random = [part for part in config.freeze if part not in learnt]
    if config.start is None and random:
        raise UserError(
            f"`freeze` must not hold random weights fixed. Without `start`, {', '.join(random)} would be. "
            "Give a start, or leave it out."
        )


def _read_start(config: MilConfig, arm: str, source: str) -> dict[int, dict[str, Any]]:
    """Content of the model of each seed from which the training shall start; empty without a start."""
    if config.start is None:
        return {}
    found: dict[int, dict[str, Any]] = {}
    for seed in config.seeds:
        path = config.start / "mil" / arm / f"seed{seed}" / "model.pt"
        if not path.is_file():
            raise UserError(
                f"`start` must hold a model of arm {arm!r} and seed {seed}. There is no {path}. "
                "Run the mil step there first, with the same arms and seeds."
            )
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            other = {key: content[key] for key in ("source", "aggregator", "fingerprint", "state")}
        except Exception as error:  # unpickling raises nearly anything
            raise UserError(
                f"{path} must be a model of the mil step. It could not be read: {error!r}. "
                "Run the mil step there again."
            ) from error
        if other["aggregator"] != config.aggregator:
            raise UserError(
                f"{path} must be of aggregator {config.aggregator}. It is {other['aggregator']}."
            )
        if not source or other["source"] != source:
            raise UserError(
                f"`start` must have embedded its cells with the same encoder: the axes of two encoders have nothing to "
                f"do with each other. That of {path} is another one. Copy its pretrain/{arm} into this run before the "
                "embed step, or use `sweep --curriculum`."
            )
        found[seed] = other
    if len({content["fingerprint"] for content in found.values()}) > 1:
        raise UserError(
            f"All seeds in {config.start} must come from one training. Run mil there again."
        )
    return found


def _fingerprint(config: MilConfig, bags: Sequence[Bag], start: dict[int, dict[str, Any]]) -> str:
    """Hash of all that decides about the result: settings, content of the bags, and where it started."""
    settings = asdict(config)
    settings["started_from"] = sorted({content["fingerprint"] for content in start.values()})
    for name in ("out", "arms", "seeds", "device", "start"):  # these choose what to do, not how
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

    def __init__(self, bags: Sequence[Bag], config: MilConfig, source: str) -> None:
        self.source = source
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
        self.slides = SlideLabels(bags, scaled)
        self.sides = [self.slides.score(x) for x in scaled]
        self.scaled_train = np.concatenate(
            [x for x, bag in zip(scaled, bags, strict=True) if bag.split == "train"]
        )
        self.device = torch.device(pick_device(config.device))
        self.mean, self.std = torch.tensor(mean).float(), torch.tensor(std).float()
        self.bags = list(bags)
        self.tensors = [torch.from_numpy(bag.features).to(self.device) for bag in bags]

    def of(self, split: str) -> tuple[list[Tensor], list[int]]:
        """Features and labels of the bags of a split."""
        at = [i for i, bag in enumerate(self.bags) if bag.split == split]
        return [self.tensors[i] for i in at], [self.bags[i].label for i in at]


def _run_seed(
    config: MilConfig,
    ready: _Prepared,
    seed: int,
    folder: Path,
    fingerprint: str,
    start: dict[str, Any] | None,
) -> None:
    model = _build(config, ready, seed, start)
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
        "source": ready.source,
        "aggregator": config.aggregator,
        "state": {name: value.cpu() for name, value in model.state_dict().items()},
        "hidden": config.hidden,
        "threshold": threshold,
        "epoch": int(log["epoch"][log["val_loss"].idxmin()]),
        "slide_weights": torch.from_numpy(ready.slides.weights),
        "slide_bias": ready.slides.bias,
        "normal_centre": torch.from_numpy(ready.normal.centre),
    }
    if ready.normal.precision is not None:
        content["normal_precision"] = torch.from_numpy(ready.normal.precision)
    with replacing(folder / "model.pt") as part:
        torch.save(content, part)


def _build(
    config: MilConfig, ready: _Prepared, seed: int, start: dict[str, Any] | None
) -> Aggregator:
    """The network with its first weights: from the seed, or from another model.

    A start brings the standardisation of its own run with it: its weights were trained on that.
    """
    model: Aggregator
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if config.aggregator == "abmil":
            model = GatedAttention(ready.mean, ready.std, config.hidden, config.dropout)
        else:
            first = (
                first_prototypes(ready.scaled_train, config.prototypes, seed)
                if config.prototype_init == "kmeans"
                else torch.randn(config.prototypes, len(ready.mean))
            )
            model = PrototypeAttention(
                ready.mean, ready.std, first, config.hidden, config.dropout, config.terms
            )
    if start is not None:
        try:
            model.load_state_dict(start["state"])
        except RuntimeError as error:
            raise UserError(
                f"`start` must hold models of the same shape. It does not: {error}. Use its settings of mil."
            ) from error
    return model


def train_mil(
    model: Aggregator,
    train: tuple[list[Tensor], list[int]],
    val: tuple[list[Tensor], list[int]],
    config: MilConfig,
    seed: int,
) -> pd.DataFrame:
    """Train in place, leave the weights of the best epoch in the model, and return a row per epoch.

    Best is the lowest validation loss, the earliest epoch among equals; after a start, epoch 0 (the start as it came)
    takes part. The loss and not the AUROC
    decides: with a handful of bags the AUROC takes few values, and most epochs tie. Training
    accuracy plays no part.

    Args:
        model: Network with its first weights.
        train: Features (n_i, d) and labels of the train bags.
        val: Features and labels of the validation bags.
        config: Learning rate, decay, epochs, patience, and what is frozen.
        seed: Seed of dropout and order. The state of global generators is left as it was.

    Returns:
        Columns epoch, train_loss (NaN in epoch 0), val_loss, val_auroc.
    """
    device = next(model.parameters()).device
    rows: list[dict[str, float]] = []
    best, best_state, best_epoch = math.inf, {}, 0
    if config.start is not None:
        best, auroc = _validate(model, val)
        rows.append({"epoch": 0, "train_loss": math.nan, "val_loss": best, "val_auroc": auroc})
        best_state = {k: v.clone() for k, v in model.state_dict().items()}
        best = math.inf if math.isnan(best) else best
    frozen = [p for part in config.freeze for p in model.parts[part]]
    # `fork_rng` restores the CPU's generator and that of the current CUDA device afterwards.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.lr, weight_decay=config.weight_decay
        )
        targets = torch.tensor(train[1], dtype=torch.float32, device=device)
        for epoch in range(1, config.epochs + 1):
            for parameter in frozen:  # without a gradient AdamW leaves it alone, decay included
                parameter.requires_grad_(epoch > config.freeze_epochs)
            model.train()
            losses = []
            for i in torch.randperm(len(train[0])).tolist():
                loss = model.loss(train[0][i], targets[i])
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
    for parameter in frozen:
        parameter.requires_grad_(True)
    model.load_state_dict(best_state)
    log: pd.DataFrame = pd.DataFrame(rows)
    return log


def _validate(model: Aggregator, val: tuple[list[Tensor], list[int]]) -> tuple[float, float]:
    logits = torch.tensor([logit for logit, _, _ in _score(model, val[0])])
    loss = F.binary_cross_entropy_with_logits(logits, torch.tensor(val[1], dtype=logits.dtype))
    if not bool(torch.isfinite(logits).all()):
        return math.nan, math.nan
    return float(loss), float(roc_auc_score(val[1], logits.numpy()))


def _score(model: Aggregator, bags: Sequence[Tensor]) -> list[tuple[float, Tensor, Tensor]]:
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
                "slide_label": side,
                "distance": distance,
            }
        )
        for bag, (_, weights, alone), side, distance in zip(
            ready.bags, scored, ready.sides, ready.distances, strict=True
        )
    ]
    table: pd.DataFrame = pd.concat(parts, ignore_index=True)
    return table
