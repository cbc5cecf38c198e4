"""From the rows of a sweep to means, intervals and paired differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from .metrics import BAG_METRICS, RANKINGS, RETRIEVAL_METRICS, SEEDLESS, interval

__all__ = ["measured", "summarise", "sweep_table", "sweep_text"]

_CHANCE = ("bag_f1_all_positive", *(f"{name}_random" for name in RETRIEVAL_METRICS))


def measured() -> list[str]:
    """Names of all columns that have a mean and an interval."""
    return [*BAG_METRICS, *(f"{name}_{r}" for r in RANKINGS for name in RETRIEVAL_METRICS)]


def sweep_table(
    rows: Sequence[dict[str, Any]], arms: Sequence[str], rates: Sequence[float]
) -> pd.DataFrame:
    """One line per arm, witness rate, draw, MIL seed and split, in the order of the grid.

    Args:
        rows: Rows of `evaluate.measure_arm`, with draw, rate, collapsed and weak.
        arms: Arms in the order in which they are shown.
        rates: Witness rates asked for, in the order in which they are shown.
    """
    first = ["arm", "rate", "draw", "seed", "split", "collapsed", "weak"]
    table = pd.DataFrame(list(rows))
    table = table[[*first, *(name for name in table if name not in first)]]
    places = {
        "arm": {arm: i for i, arm in enumerate(arms)},
        "rate": {rate: i for i, rate in enumerate(rates)},
        "split": {"train": 0, "val": 1, "test": 2},
    }
    numbers = [column for column in table if column not in first]
    table[numbers] = table[numbers].astype(float)  # None is a figure that does not exist
    ordered: pd.DataFrame = table.sort_values(
        ["rate", "arm", "draw", "seed", "split"],
        key=lambda column: column.map(places[column.name]) if column.name in places else column,
        ignore_index=True,
    )
    return ordered


def summarise(table: pd.DataFrame, facts: dict[str, Any]) -> dict[str, Any]:
    """Means with 95 % t-intervals per arm and witness rate, and differences from the reference arm.

    The repetitions of an interval are the draws: seeds of the MIL training share bags and encoder, so they are averaged
    within a draw first. With one draw the interval is over its seeds, and `over` says so.
    Differences are paired: an arm and the reference have the same bags in a draw.

    Returns:
        `facts`, and `cells`: a list with arm, rate, draws, seeds, over, collapsed (number of draws), weak, `metrics`
        and `differences` (name to mean, low, high, n), for test bags; and `chance` and `default_ranking` by rate.
    """
    test, val = (table[table["split"] == split] for split in ("test", "val"))
    test = test if len(test) else val  # no test bags were asked for
    names = measured()
    result: dict[str, Any] = {"facts": facts, "interval": 0.95, "cells": [], "chance": {}}
    for rate, of_rate in test.groupby("rate", sort=False):
        chance = of_rate[[*_CHANCE, "witness_rate", "bags", "searched_bags", "capped_bags"]].mean()
        result["chance"][f"{rate:g}"] = {name: _number(v) for name, v in chance.items()} | {
            "bag_auroc": 0.5,
            "bag_balanced_accuracy": 0.5,
        }
        reference = _by_draw(of_rate[of_rate["arm"] == facts["reference"]], names)
        for arm, mine in of_rate.groupby("arm", sort=False):
            values = _by_draw(mine, names)
            draws = mine.groupby("draw").first()
            differences = {}
            if arm != facts["reference"] and len(reference):
                both = values.index.intersection(reference.index)
                pairs = values.loc[both] - reference.loc[both]
                differences = {name: interval(pairs[name].tolist()) for name in names}
            result["cells"].append(
                {
                    "arm": arm,
                    "rate": float(rate),  # type: ignore[arg-type]  # a group's key
                    "draws": len(values),
                    "seeds": int(mine["seed"].nunique()),
                    "over": "draws" if len(values) > 1 else "seeds",
                    "collapsed": int(draws["collapsed"].sum()),
                    "weak": int(draws["weak"].sum()),
                    "metrics": {name: _spread(mine, values, name) for name in names},
                    "differences": differences,
                }
            )
    result["default_ranking"] = _default_ranking(val if len(val) else test)
    return result


def _by_draw(rows: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """Means over the seeds, a row per draw."""
    found: pd.DataFrame = rows.groupby("draw")[list(names)].mean()
    return found


def _spread(mine: pd.DataFrame, by_draw: pd.DataFrame, name: str) -> dict[str, Any]:
    if len(by_draw) > 1:
        return interval(by_draw[name].tolist())
    # Where the seed plays no part, its rows are one repetition.
    return interval(mine[name].tolist()[: 1 if name.endswith(SEEDLESS) else None])


def _default_ranking(val: pd.DataFrame) -> str:
    """The ranking to show first: best mean average precision on validation bags, never on test bags."""
    means = {key: val[f"average_precision_{key}"].mean() for key in RANKINGS}
    known = {key: mean for key, mean in means.items() if not math.isnan(mean)}
    return max(known, key=known.__getitem__) if known else "instance_score"


def _number(value: Any) -> float | None:
    return None if np.isnan(value) else float(value)


def sweep_text(summary: dict[str, Any]) -> str:
    """A table for the terminal: one line per witness rate and arm."""
    names = ["bag_f1", "bag_auroc", *(f"average_precision_{key}" for key in RANKINGS)]
    lines = [["rate", "arm", "bag F1", "bag AUROC", *(f"AP {key}" for key in RANKINGS), ""]]
    for rate, chance in summary["chance"].items():
        random = chance["average_precision_random"]
        level = [chance["bag_f1_all_positive"], 0.5, *[random] * len(RANKINGS)]
        lines.append([f"{100 * float(rate):g} %", "chance", *map(_plain, level), ""])
        for cell in summary["cells"]:
            if f"{cell['rate']:g}" == rate:
                collapsed = f"COLLAPSED {cell['collapsed']}/{cell['draws']}"
                texts = [_text(cell["metrics"][name]) for name in names]
                lines.append(["", cell["arm"], *texts, collapsed if cell["collapsed"] else ""])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = [
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    over = sorted({f"{cell[cell['over']]} {cell['over']}" for cell in summary["cells"]})
    return "\n".join([*rows, f"± is half a 95 % t-interval over {' or '.join(over)}."])


def _plain(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _text(figure: dict[str, Any]) -> str:
    if figure["mean"] is None or figure["low"] is None:
        return _plain(figure["mean"])
    return f"{figure['mean']:.3f} ± {figure['mean'] - figure['low']:.3f}"
