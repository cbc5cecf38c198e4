"""How far updates differ where all are valid, and by how much each side breaks its definition where they are not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks._plots import new_figure, save_svg

FLOOR = 1e-17
"""Where zero stands on a logarithmic axis."""
MARKS = "os^Dv"


def agreement(axes: Any, rows: list[Mapping[str, Any]]) -> None:
    """The largest relative difference of the updates, by method and number of tasks."""
    names = [f"{row['method']}, {row['peer']}" for row in rows]
    tasks = list(dict.fromkeys(k for row in rows for k in row["difference"]))
    for mark, k in zip(MARKS, tasks, strict=False):
        points = [
            (max(row["difference"][k], FLOOR), place)
            for place, row in enumerate(rows)
            if k in row["difference"]
        ]
        style = {"color": "black", "markerfacecolor": "0.75", "linestyle": "none"}
        axes.plot(*zip(*points, strict=True), marker=mark, label=f"K = {k}", **style)
    axes.set_yticks(range(len(rows)), names)
    axes.set(
        xlabel=f"relative difference of the updates\n(at the left end: {FLOOR:.0e} or less)",
        title="where all are valid",
    )
    axes.legend(fontsize=8, loc="best")


def traps(axes: Any, rows: list[Mapping[str, Any]]) -> None:
    """By how much the demand of each trap is broken; at the right end stands what failed altogether."""
    failed = 10.0
    for who, label, style in (
        ("theirs", "peer", {"marker": "s", "color": "black", "markerfacecolor": "white"}),
        ("ours", "agsurgery", {"marker": "o", "color": "#d62728", "markersize": 4}),
    ):
        points, lost = [], []
        for place, row in enumerate(rows):
            if row[who]["missing"] is not None:
                continue
            broken = row[who]["broken_by"]
            (lost if broken is None else points).append(
                (failed if broken is None else max(broken, FLOOR), place)
            )
        if points:
            axes.plot(*zip(*points, strict=True), linestyle="none", label=label, **style)
        if lost:
            cross = {"marker": "X", "color": style["color"], "markersize": 7}
            name = f"{label}: raises or not finite"
            axes.plot(*zip(*lost, strict=True), linestyle="none", label=name, **cross)
    axes.set_yticks(range(len(rows)), [f"{row['peer']}: {row['title']}" for row in rows])
    axes.set(
        xlabel=f"definition broken by (a cosine, or a relative difference)\n(at the left end: {FLOOR:.0e} or less)",
        title="where they are not",
    )
    axes.legend(fontsize=8, loc="lower center")


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Two panels of dots on logarithmic axes."""
    parts = [
        (agreement, [row for row in result["agreement"] if row["difference"]]),
        (traps, result["traps"]),
    ]
    parts = [(put, rows) for put, rows in parts if rows]
    if not parts:
        return
    figure = new_figure(7.2 * len(parts), 1.6 + 0.19 * max(len(rows) for _, rows in parts))
    panels = figure.subplots(1, len(parts), squeeze=False)[0]
    for axes, (put, rows) in zip(panels, parts, strict=True):
        axes.set_xscale("log")
        put(axes, rows)
        axes.set_ylim(len(rows), -1)
        axes.tick_params(axis="y", labelsize=7)
        axes.grid(axis="y", color="0.9")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    save_svg(figure, path)
