"""Figures that are the same file for the same numbers."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

T = TypeVar("T")

COLOURS = {
    "AGS": "#d62728",
    "PCGrad": "#1f77b4",
    "CAGrad": "#2ca02c",
    "Sum": "#000000",
}
"""Of the methods that lead every table; the others take what is left, by `colour`."""

OTHERS = ("#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf", "#ff7f0e")


def in_order(methods: Mapping[str, T]) -> dict[str, T]:
    """The same, with the methods that lead every table first."""
    first = [name for name in COLOURS if name in methods]
    return {name: methods[name] for name in [*first, *(n for n in methods if n not in first)]}


def colour(method: str, methods: list[str]) -> str:
    """Colour of a method, the same in every figure that shows the same methods."""
    if method in COLOURS:
        return COLOURS[method]
    rest = [name for name in methods if name not in COLOURS]
    return OTHERS[rest.index(method) % len(OTHERS)]


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, that belongs to no window."""
    return Figure(figsize=(width, height), layout="constrained")


def dots(axes: Axes, runs: Mapping[str, Sequence[float]], means: Mapping[str, float]) -> None:
    """One dot for each run of a method, and a bar for the mean."""
    names = list(runs)
    for place, (name, values) in enumerate(runs.items()):
        shade, mean = colour(name, names), means[name]
        axes.plot([place] * len(values), values, "o", color=shade, alpha=0.5, markersize=5)
        axes.plot([place - 0.3, place + 0.3], [mean, mean], "-", color=shade, linewidth=2.5)
    axes.set_xticks(range(len(names)), names, rotation=50, ha="right")
    axes.spines[["top", "right"]].set_visible(False)


def runs_of_problems(
    problems: Mapping[str, Any], runs: str, mean: str, size: tuple[float, float]
) -> tuple[Figure, list[Axes]]:
    """A panel for each problem, with the runs of each of its methods.

    Args:
        problems: as in the JSON files, each with a title and methods.
        runs: where a method has its numbers, one for each seed.
        mean: where it has their mean, with an interval.
        size: of a panel, in inches.
    """
    figure = new_figure(size[0] * len(problems), size[1])
    panels = list(figure.subplots(1, len(problems), squeeze=False)[0])
    for axes, problem in zip(panels, problems.values(), strict=True):
        methods = problem["methods"].items()
        means = {name: method[mean]["mean"] for name, method in methods}
        dots(axes, {name: method[runs] for name, method in methods}, means)
        axes.set(title=problem["title"])
    return figure, panels


def save_svg(figure: Figure, path: Path) -> None:
    """Write a figure whole or not at all, without a date, with names that do not change from run to run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with matplotlib.rc_context({"svg.hashsalt": "agsurgery", "svg.fonttype": "none"}):
        figure.savefig(temporary, format="svg", metadata={"Date": None})
    os.replace(temporary, path)
