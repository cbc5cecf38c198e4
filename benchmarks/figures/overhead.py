"""Parts of a step on small models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks._plots import new_figure, save_svg

WHOLE = ("AGS", "K passes")
SHADES = ("#d62728", "#f0b0b0", "0.4", "0.8")
HATCHES = ("", "//", "", "..")


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Bars, one group for each part, the whole steps at the top and the parts by size below."""
    cases = result["microseconds"]
    first = next(iter(cases.values()))
    parts = sorted((name for name in first if name not in WHOLE), key=lambda name: -first[name])
    names = [*WHOLE, *parts]
    figure = new_figure(7, 0.8 + 0.34 * len(names))
    axes = figure.subplots()
    height = 0.8 / len(cases)
    for number, (case, found) in enumerate(cases.items()):
        places = [place + (number - (len(cases) - 1) / 2) * height for place in range(len(names))]
        bars = axes.barh(
            places,
            [found[name] for name in names],
            height,
            color=SHADES[number % 4],
            hatch=HATCHES[number % 4],
            edgecolor="black",
            linewidth=0.5,
            label=case.replace("toy_", "toy model, heads: "),
        )
        axes.bar_label(bars, fmt="%.0f", padding=2, fontsize=7)
    axes.set_yticks(
        range(len(names)), [f"whole step, {n}" if n in WHOLE else f"part: {n}" for n in names]
    )
    axes.invert_yaxis()
    axes.set(xlabel="microseconds, median over the steps")
    axes.legend(loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    save_svg(figure, path)
