"""How well slides are told apart and abnormal cells are found, against chance, over seeds.

Each positive bag is a search: its cells are ranked, and a reader looks at the first K. All figures
of a ranking are expectations over the order of cells with equal scores. A collapsed encoder gives
equal scores, and must not profit from the order in which cells happen to be stored.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.stats import t as student
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, roc_auc_score

from .errors import UserError
from .manifest import replacing
from .mil import find_arms, read_fingerprint

__all__ = [
    "BAG_METRICS",
    "RANKINGS",
    "RETRIEVAL_METRICS",
    "EvaluateConfig",
    "bag_metrics",
    "evaluate",
    "interval",
    "read_result",
    "read_status",
    "retrieval",
    "seed_folders",
]

RANKINGS = ("attention", "instance_score", "distance")
"""Scores that order the cells of a bag, the most suspicious first."""

RETRIEVAL_METRICS = (
    "recall_at_k",
    "precision_at_k",
    "r_precision",
    "average_precision",
    "enrichment",
    "first_positive",
)
BAG_METRICS = ("bag_f1", "bag_auroc", "bag_balanced_accuracy", "bag_accuracy")

_SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class EvaluateConfig:
    """What is measured."""

    out: Path
    """Run folder; reads OUT/mil/ARM/seedK, writes OUT/evaluate."""
    arms: tuple[str, ...] = ()
    """Pretraining arms to compare. Empty: all that have results."""
    top_k: int | None = None
    """Cells of a bag that a reader looks at. None: as many as the bag has abnormal cells."""


def retrieval(scores: ArrayLike, labels: ArrayLike, top_k: int | None = None) -> dict[str, float]:
    """Figures of merit of one ranked bag with n cells, m of them abnormal.

    - recall_at_k: share of the m abnormal cells among the first K = min(top_k, n).
    - precision_at_k: share of abnormal cells among the first K.
    - r_precision: the same at K = m, where recall and precision are equal.
    - average_precision: mean precision at the ranks of the abnormal cells.
    - enrichment: precision_at_k over the witness rate m/n; 1 is chance.
    - first_positive: rank of the first abnormal cell, from 1.

    Args:
        scores: Score of each cell, (n,), high is suspicious. Equal scores count as a random order,
            and the result is the expectation over it: constant scores give the exact chance level.
        labels: 1 abnormal, 0 normal, (n,), both present or all 1.
        top_k: Cells looked at. None: m.

    Raises:
        ValueError: If shapes differ, a score is NaN, a label is unknown, or no cell is abnormal.

    Example:
        >>> found = retrieval([0.9, 0.8, 0.7, 0.1], [1, 0, 1, 0])
        >>> round(found["average_precision"], 4), found["r_precision"], found["first_positive"]
        (0.8333, 0.5, 1.0)
        >>> retrieval([0, 0, 0, 0, 0], [1, 1, 0, 0, 0])["first_positive"]  # (n + 1) / (m + 1)
        2.0
    """
    score, label = np.asarray(scores, float), np.asarray(labels)
    _check_ranking(score, label, top_k)
    total, positives = len(score), int(label.sum())
    # Groups of equal scores in descending order: size, positives, and both before the group.
    _, group, size = np.unique(-score, return_inverse=True, return_counts=True)
    hits = np.bincount(group, label, len(size))
    before, hits_before = np.cumsum(size) - size, np.cumsum(hits) - hits

    def found(k: int) -> float:
        return float((hits * np.clip(k - before, 0, size) / size).sum())

    k = positives if top_k is None else min(top_k, total)
    first = int(np.argmax(hits > 0))
    # At place j of a group of g cells with p positives, a cell is positive with probability p/g,
    # and then (j-1)(p-1)/(g-1) of the cells before it in the group are expected to be.
    rank = np.arange(1, total + 1)
    g, p, s, h = (np.repeat(x, size) for x in (size, hits, before, hits_before))
    at_rank = p / g * (h + 1 + (rank - s - 1) * (p - 1) / np.maximum(g - 1, 1)) / rank
    return {
        "recall_at_k": found(k) / positives,
        "precision_at_k": found(k) / k,
        "r_precision": found(positives) / positives,
        "average_precision": float(at_rank.sum()) / positives,
        "enrichment": found(k) / k * total / positives,
        "first_positive": float(before[first] + (size[first] + 1) / (hits[first] + 1)),
    }


def _check_ranking(score: np.ndarray, label: np.ndarray, top_k: int | None) -> None:
    if score.ndim != 1 or score.shape != label.shape:
        raise ValueError(
            f"`scores` and `labels` must be (n,). Got {score.shape} and {label.shape}. "
            "Pass one bag."
        )
    if np.isnan(score).any():
        raise ValueError(f"`scores` must be numbers. {int(np.isnan(score).sum())} are NaN.")
    if not np.isin(label, (0, 1)).all() or not label.any():
        raise ValueError("`labels` must be 0 or 1 with at least one 1. Leave out other bags.")
    if top_k is not None and top_k < 1:
        raise ValueError(f"`top_k` must be at least 1 or None. Got {top_k}.")


def bag_metrics(
    labels: ArrayLike, probabilities: ArrayLike, threshold: ArrayLike
) -> dict[str, float]:
    """F1, AUROC, balanced accuracy and accuracy of calling bags positive from the threshold on.

    `bag_f1_all_positive` is the F1 of calling every bag positive, which a useful classifier must
    beat. AUROC and balanced accuracy are NaN if there are bags of one label only.

    Example:
        >>> bag_metrics([0, 0, 1, 1], [0.2, 0.6, 0.7, 0.9], 0.5)["bag_accuracy"]
        0.75
    """
    truth, probability = np.asarray(labels), np.asarray(probabilities, float)
    called = (probability >= np.asarray(threshold, float)).astype(int)
    both = len(np.unique(truth)) == 2
    share = float(truth.mean())
    balanced = float(balanced_accuracy_score(truth, called)) if both else math.nan
    return {
        "bag_f1": float(f1_score(truth, called, zero_division=0)),
        "bag_auroc": float(roc_auc_score(truth, probability)) if both else math.nan,
        "bag_balanced_accuracy": balanced,
        "bag_accuracy": float(accuracy_score(truth, called)),
        "bag_f1_all_positive": 2 * share / (1 + share),
    }


def interval(values: Sequence[float], level: float = 0.95) -> dict[str, float | int | None]:
    """Mean and t-interval of independent repetitions, NaN left out; no interval below two values.

    Example:
        >>> interval([1.0, 2.0, 3.0])["mean"], round(interval([1.0, 2.0, 3.0])["high"], 3)
        (2.0, 4.484)
    """
    known = np.asarray([value for value in values if not math.isnan(value)])
    if not len(known):
        return {"mean": None, "low": None, "high": None, "n": 0}
    mean = float(known.mean())
    if len(known) == 1:
        return {"mean": mean, "low": None, "high": None, "n": 1}
    error = float(known.std(ddof=1)) / math.sqrt(len(known))
    half = float(student.ppf((1 + level) / 2, len(known) - 1)) * error
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": len(known)}


def evaluate(config: EvaluateConfig) -> Path:
    """Measure every arm and seed, print a table, and return OUT/evaluate/summary.json.

    Raises:
        UserError: If results are missing, damaged, or were not made from the same bags.
    """
    if config.top_k is not None and config.top_k < 1:
        raise UserError(f"`top_k` must be at least 1. Got {config.top_k}. Leave it out for K = m.")
    arms = find_arms(config.out / "mil", config.arms, "seed*/model.pt", "mil")
    rows: list[dict[str, Any]] = []
    bags_of: dict[str, pd.DataFrame] = {}
    for arm in arms:
        for seed, folder in seed_folders(config.out, arm):
            bags, instances = read_result(folder)
            bags_of[f"{arm}, seed {seed}"] = bags[["bag", "split", "label"]]
            for split in [name for name in _SPLITS if name in set(bags["split"])]:
                parts = [frame[frame["split"] == split] for frame in (bags, instances)]
                row = _measure(parts[0], parts[1], config.top_k)
                rows.append({"arm": arm, "seed": seed, "split": split, **row})
    _check_same_bags(bags_of)
    table = pd.DataFrame(rows)
    summary = _summarise(config, arms, table)
    folder = config.out / "evaluate"
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "metrics.csv") as part:
        table.to_csv(part, index=False, float_format="%.9g")
    with replacing(folder / "summary.json") as part:
        text = json.dumps(summary, indent=2, allow_nan=False)
        part.write_text(text + "\n", encoding="utf-8")
    print(_text(summary))
    return folder / "summary.json"


def seed_folders(out: Path, arm: str) -> list[tuple[int, Path]]:
    """Seed and folder of each finished training of an arm, all made from the same input."""
    folders = [path.parent for path in (out / "mil" / arm).glob("seed*/model.pt")]
    found = sorted((int(path.name[4:]), path) for path in folders if path.name[4:].isdecimal())
    if len({read_fingerprint(path) for _, path in found}) > 1:
        raise UserError(
            f"All seeds of arm {arm!r} must come from the same embeddings and settings. Found "
            f"several in {out / 'mil' / arm}. Run the mil step for all of them, or delete old ones."
        )
    return found


def read_result(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The tables bags.csv and instances.csv of one training, checked.

    Raises:
        UserError: If a file is missing or damaged, or a score is NaN.
    """
    numbers = ("probability", "threshold", *RANKINGS)
    text = dict.fromkeys(("bag", "split", "path", "class_name"), str)
    frames = []
    for name, columns in (("bags.csv", numbers[:2]), ("instances.csv", RANKINGS)):
        try:
            frame = pd.read_csv(
                folder / name,
                dtype=text,
                keep_default_na=False,
                na_values={column: ["", "nan"] for column in columns},
            )
            values = frame[list(columns)].to_numpy(float)
            frame["label"].astype(int)
        except (OSError, KeyError, ValueError) as error:
            raise UserError(
                f"{folder / name} must be a table of the mil step. It could not be read: {error}. "
                "Delete the folder and run the mil step again."
            ) from error
        if not np.isfinite(values).all():
            raise UserError(
                f"All scores in {folder / name} must be finite. Found NaN or infinity. "
                "Delete the folder and run the mil step again."
            )
        frames.append(frame)
    return frames[0], frames[1]


def read_status(out: Path, arm: str) -> dict[str, Any] | None:
    """What the pretrain step says about an arm; None where it left no status.json.

    Raises:
        UserError: If the file is damaged: a collapse must not go unnoticed.
    """
    path = out / "pretrain" / arm / "status.json"
    if not path.exists():
        return None
    try:
        status = json.loads(path.read_text(encoding="utf-8"))
        bool(status["collapsed"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} must say whether pretraining collapsed. It could not be read: {error!r}. "
            "Run the pretrain step again."
        ) from error
    found: dict[str, Any] = status
    return found


def _check_same_bags(bags_of: dict[str, pd.DataFrame]) -> None:
    """Arms can be compared on the same bags only."""
    keys = {
        name: frozenset(frame.itertuples(index=False, name=None)) for name, frame in bags_of.items()
    }
    first = next(iter(keys))
    for name, key in keys.items():
        if key != keys[first]:
            raise UserError(
                f"All arms and seeds must have the same bags. {name} and {first} differ in "
                f"{len(key ^ keys[first])}. Run the embed and mil steps again for both."
            )


def _measure(bags: pd.DataFrame, instances: pd.DataFrame, top_k: int | None) -> dict[str, float]:
    """One row of figures for the bags of one split."""
    row: dict[str, float] = {"bags": len(bags), "positive_bags": int((bags["label"] == 1).sum())}
    searches = [
        cells
        for _, cells in instances[instances["label"] == 1].groupby("bag", sort=False)
        if (cells["instance_label"] >= 0).all() and (cells["instance_label"] == 1).any()
    ]
    truth = [cells["instance_label"].to_numpy() for cells in searches]
    row["searched_bags"] = len(searches)  # positive bags in which every cell has a known label
    row["witness_rate"] = float(np.mean([labels.mean() for labels in truth])) if truth else math.nan
    row |= bag_metrics(bags["label"], bags["probability"], bags["threshold"])
    for ranking in (*RANKINGS, "random"):
        found = [
            retrieval(
                np.zeros(len(labels)) if ranking == "random" else cells[ranking], labels, top_k
            )
            for cells, labels in zip(searches, truth, strict=True)
        ]
        for name in RETRIEVAL_METRICS:
            values = [figures[name] for figures in found]
            row[f"{name}_{ranking}"] = float(np.mean(values)) if values else math.nan
    return row


def _summarise(config: EvaluateConfig, arms: Sequence[str], table: pd.DataFrame) -> dict[str, Any]:
    measured = [*BAG_METRICS, *(f"{name}_{r}" for r in RANKINGS for name in RETRIEVAL_METRICS)]
    constant = ["bags", "positive_bags", "searched_bags", "witness_rate", "bag_f1_all_positive"]
    constant += [f"{name}_random" for name in RETRIEVAL_METRICS]
    splits = [name for name in _SPLITS if name in set(table["split"])]
    result: dict[str, Any] = {"top_k": config.top_k, "interval": 0.95, "arms": {}}
    # These depend on the bags alone: any row of a split tells.
    firsts = {split: table[table["split"] == split].iloc[0] for split in splits}
    result["splits"] = {
        split: {name: _number(row[name]) for name in constant} for split, row in firsts.items()
    }
    for arm in arms:
        status = read_status(config.out, arm)
        mine = table[table["arm"] == arm]
        result["arms"][arm] = {
            "collapsed": bool(status["collapsed"]) if status else None,
            "reason": str(status.get("reason", "")) if status else "",
            "status": _finite(status),
            "metrics": {
                split: _intervals(mine[mine["split"] == split], measured) for split in splits
            },
        }
    result["default_ranking"] = _default_ranking(result)
    return result


def _intervals(rows: pd.DataFrame, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Mean and interval of each column. The distance ignores the seed: its rows are one repetition."""
    return {
        name: interval(rows[name].tolist()[: 1 if name.endswith("_distance") else None])
        for name in names
    }


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _finite(value: Any) -> Any:
    """The same JSON value with NaN and infinity, which JSON cannot say, as text."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _default_ranking(summary: dict[str, Any]) -> str:
    """The ranking to show first: best average precision on validation bags, never on test bags."""
    means: dict[str, float] = {}
    for ranking in RANKINGS:
        values = [
            arm["metrics"].get("val", {}).get(f"average_precision_{ranking}", {}).get("mean")
            for arm in summary["arms"].values()
            if not arm["collapsed"]
        ]
        known = [value for value in values if value is not None]
        if known:
            means[ranking] = float(np.mean(known))
    return max(means, key=means.__getitem__) if means else "instance_score"


def _text(summary: dict[str, Any]) -> str:
    """A table for the terminal: test figures by arm, collapsed arms marked."""
    split = "test" if "test" in summary["splits"] else next(reversed(summary["splits"]))
    names = ["bag_f1", "bag_auroc", *(f"average_precision_{ranking}" for ranking in RANKINGS)]
    heads = ["bag F1", "bag AUROC", *(f"AP {ranking}" for ranking in RANKINGS)]
    chance = summary["splits"][split]
    random = chance["average_precision_random"]
    rows = [[split, *heads], ["chance", *map(_cell, [chance["bag_f1_all_positive"], 0.5])]]
    rows[1] += [_cell(random)] * len(RANKINGS)
    for name, arm in summary["arms"].items():
        figures = [arm["metrics"][split][metric] for metric in names]
        rows.append([name + (" COLLAPSED" if arm["collapsed"] else ""), *map(_spread, figures)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    collapsed = [
        f"COLLAPSED: {name}. {arm['reason']} Its figures do not describe a trained encoder."
        for name, arm in summary["arms"].items()
        if arm["collapsed"]
    ]
    return "\n".join([*lines, *collapsed])


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _spread(figure: dict[str, Any]) -> str:
    if figure["low"] is None:
        return _cell(figure["mean"])
    return f"{figure['mean']:.3f} ± {figure['mean'] - figure['low']:.3f}"
