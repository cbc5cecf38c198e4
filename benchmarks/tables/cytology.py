"""Slides called and cells found, by witness rate and arm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks._markdown import NOTHING, table
from benchmarks.figures.cytology import NAMES
from examples.slam_ags_cytology.metrics import interval

METRICS = {
    "bag_f1": "bag F1",
    "bag_auroc": "bag AUROC",
    "average_precision_attention": "AP, attention",
    "average_precision_instance_score": "AP, cell score",
    "average_precision_slide_label": "AP, slide label",
    "average_precision_distance": "AP, distance",
}
CHANCE = {"bag_f1": "bag_f1_all_positive", "bag_auroc": "bag_auroc"}


def tables(result: Mapping[str, Any]) -> dict[str, str]:
    """Those of the means, `differences` from the reference, and those of AGS from the plain sum, paired by draw."""
    reference = _name(result["facts"]["reference"])
    header = ["witness rate", f"arm − {reference}", *METRICS.values()]
    return {
        **tables_of_means(result),
        "differences": table(header, _differences(result)),
        "AGS - sum": table(
            ["witness rate", "draws", *METRICS.values()], _paired(result, "ags", "sum")
        ),
    }


def tables_of_means(result: Mapping[str, Any]) -> dict[str, str]:
    """Means over draws, and half their 95 % interval."""
    return {"": table(["witness rate", "arm", "draws", *METRICS.values()], _means(result))}


def _means(result: Mapping[str, Any]) -> list[list[str]]:
    lines = []
    for rate, rows in _by_rate(result).items():
        chance = result["chance"][f"{rate:g}"]
        levels = [f"{chance[CHANCE.get(m, 'average_precision_random')]:.3f}" for m in METRICS]
        lines.append([f"{100 * rate:g} %", "chance", "", *levels])
        for row in rows:
            figures = [_mean(row["metrics"][metric], row["over"]) for metric in METRICS]
            lines.append(["", _name(row["arm"]), str(row["draws"]), *figures])
    return lines


def _differences(result: Mapping[str, Any]) -> list[list[str]]:
    lines = []
    for rate, rows in _by_rate(result).items():
        others = [row for row in rows if row["differences"]]
        for i, row in enumerate(others):
            figures = [_difference(row["differences"].get(metric)) for metric in METRICS]
            label = "" if i else f"{100 * rate:g} %"
            lines.append([label, _name(row["arm"]), *figures])
    return lines


def _paired(result: Mapping[str, Any], arm: str, other: str) -> list[list[str]]:
    """A line for each rate at which both arms are there, over the draws that both have."""
    lines = []
    for rate, rows in _by_rate(result).items():
        by_draw = {row["arm"]: row["by_draw"] for row in rows}
        mine, theirs = (by_draw.get(name, {}) for name in (arm, other))
        both = [draw for draw in mine if draw in theirs]
        if both:
            figures = [
                _difference(interval([mine[draw][m] - theirs[draw][m] for draw in both]))
                for m in METRICS
            ]
            lines.append([f"{100 * rate:g} %", str(len(both)), *figures])
    return lines


def _name(arm: str) -> str:
    return NAMES.get(arm, f"`{arm}`")


def _by_rate(result: Mapping[str, Any]) -> dict[float, list[dict[str, Any]]]:
    found: dict[float, list[dict[str, Any]]] = {}
    for row in result["rows"]:
        found.setdefault(row["rate"], []).append(row)
    return found


def _mean(found: Mapping[str, Any], over: str) -> str:
    """Without an interval where there is a single draw: that over its seeds says nothing about other draws."""
    if found["mean"] is None:
        return NOTHING
    mean = f"{found['mean']:.3f}"
    if found["low"] is None or over != "draws":
        return mean
    return f"{mean} ± {found['mean'] - found['low']:.3f}"


def _difference(found: Mapping[str, Any] | None) -> str:
    """With a star where the interval leaves out 0."""
    if not found or found["mean"] is None:
        return NOTHING
    mean = f"{found['mean']:+.3f}"
    if found["low"] is None:
        return mean
    star = "" if found["low"] <= 0 <= found["high"] else "*"
    return f"{mean} ± {found['mean'] - found['low']:.3f}{star}"
