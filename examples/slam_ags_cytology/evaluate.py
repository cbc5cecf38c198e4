"""How well slides are told apart and abnormal cells are found, against chance, over seeds.

Each positive bag is a search: its cells are ranked, and a reader looks at the first K.
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

from .errors import UserError
from .files import replacing, write_text
from .manifest import SPLITS
from .metrics import (
    BAG_METRICS,
    RANKINGS,
    RETRIEVAL_METRICS,
    SEEDLESS,
    bag_metrics,
    interval,
    retrieval,
)
from .results import find_arms, read_result, read_status, seed_folders

__all__ = ["EvaluateConfig", "check_top_k", "evaluate", "measure_arm"]


@dataclass(frozen=True)
class EvaluateConfig:
    """Measure how well slides were called and cells were found: OUT/evaluate."""

    out: Path
    """Run folder; reads OUT/mil/ARM/seedK, writes OUT/evaluate."""
    arms: tuple[str, ...] = ()
    """Pretraining arms to compare. Empty: all that have results."""
    top_k: int = 400
    """Cells of a bag that a reader looks at, at most the whole bag. The paper: 400. Precision at K = number of
    abnormal cells is always given as well (r_precision)."""


def evaluate(config: EvaluateConfig) -> Path:
    """Measure every arm and seed, print a table, and return OUT/evaluate/summary.json.

    Raises:
        UserError: If results are missing, damaged, or were not made from the same bags.
    """
    check_top_k(config.top_k)
    arms = find_arms(config.out / "mil", config.arms, "seed*/model.pt", "mil")
    rows: list[dict[str, Any]] = []
    bags_of: dict[str, pd.DataFrame] = {}
    for arm in arms:
        for seed, folder in seed_folders(config.out, arm):
            bags, instances = read_result(folder)
            bags_of[f"{arm}, seed {seed}"] = bags[["bag", "split", "label"]]
            rows += _of_seed(arm, seed, bags, instances, config.top_k)
    _check_same_bags(bags_of)
    table = pd.DataFrame(rows)
    summary = _summarise(config, arms, table)
    folder = config.out / "evaluate"
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "metrics.csv") as part:
        table.to_csv(part, index=False, float_format="%.9g")
    write_text(folder / "summary.json", json.dumps(summary, indent=2, allow_nan=False) + "\n")
    print(_text(summary))
    return folder / "summary.json"


def check_top_k(top_k: int) -> None:
    """Refuse to look at no cell."""
    if top_k < 1:
        raise UserError(f"`top_k` must be at least 1. Got {top_k}. The paper looks at 400.")


def measure_arm(
    out: Path, arm: str, seeds: Sequence[int], top_k: int = EvaluateConfig.top_k
) -> list[dict[str, Any]]:
    """A row of figures for each seed and split of one arm of the run folder `out`."""
    rows = []
    for seed in seeds:
        bags, instances = read_result(out / "mil" / arm / f"seed{seed}")
        rows += _of_seed(arm, seed, bags, instances, top_k)
    return rows


def _of_seed(
    arm: str, seed: int, bags: pd.DataFrame, instances: pd.DataFrame, top_k: int
) -> list[dict[str, Any]]:
    rows = []
    for split in [name for name in SPLITS if name in set(bags["split"])]:
        parts = [frame[frame["split"] == split] for frame in (bags, instances)]
        row = _measure(parts[0], parts[1], top_k)
        rows.append({"arm": arm, "seed": seed, "split": split, **row})
    return rows


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


def _measure(bags: pd.DataFrame, instances: pd.DataFrame, top_k: int) -> dict[str, float]:
    """One row of figures for the bags of one split."""
    row: dict[str, float] = {"bags": len(bags), "positive_bags": int((bags["label"] == 1).sum())}
    searches = [
        cells
        for _, cells in instances[instances["label"] == 1].groupby("bag", sort=False)
        if (cells["instance_label"] >= 0).all() and (cells["instance_label"] == 1).any()
    ]
    truth = [cells["instance_label"].to_numpy() for cells in searches]
    row["searched_bags"] = len(searches)  # positive bags in which every cell has a known label
    row["capped_bags"] = sum(len(labels) < top_k for labels in truth)  # K is the whole bag
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
    constant = ["bags", "positive_bags", "searched_bags", "capped_bags", "witness_rate"]
    constant += ["bag_f1_all_positive"]
    constant += [f"{name}_random" for name in RETRIEVAL_METRICS]
    splits = [name for name in SPLITS if name in set(table["split"])]
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
    """Mean and interval of each column. Where the seed plays no part, its rows are one repetition."""
    return {
        name: interval(rows[name].tolist()[: 1 if name.endswith(SEEDLESS) else None])
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
        f"COLLAPSED: {name}: {arm['reason'].rstrip('.')}. Its figures do not describe a trained encoder."
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
