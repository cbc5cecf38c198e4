"""Peak memory of a step over that of the plain sum, against the number of tasks and of parameters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks._plots import new_figure, save_svg

STYLES: dict[str, dict[str, Any]] = {
    "AGS": {"color": "#d62728", "marker": "o", "linewidth": 2.5, "markersize": 7},
    "AGS, rows in bfloat16": {"color": "#d62728", "marker": "v", "linestyle": "--"},
    "AGS, accumulate": {"color": "#d62728", "marker": "D", "linestyle": ":"},
    "AGS, lean": {"color": "#d62728", "marker": "^", "linestyle": "-."},
    "AGS at the features": {"color": "#e8a0a0", "marker": "P", "linestyle": "-"},
    "torchjd PCGrad": {"color": "black", "marker": "s", "markerfacecolor": "white"},
    "torchjd PCGrad, one by one": {
        "color": "black",
        "marker": "s",
        "markerfacecolor": "white",
        "linestyle": "--",
    },
    "pytorch_optimizer PCGrad": {
        "color": "black",
        "marker": "X",
        "linestyle": ":",
    },
}
"""Of the arms that are shown; the others lie on one of them."""


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Two panels: the transformer by K, the MLP by its parameters."""
    figure = new_figure(10, 4)
    by_tasks, by_size = figure.subplots(1, 2, sharey=True)
    for axes, family, key in (
        (by_tasks, "transformer", "tasks"),
        (by_size, "mlp", "parameters"),
    ):
        cases = [case for name, case in result["cases"].items() if name.startswith(family)]
        cases.sort(key=lambda case: case[key])
        for name, style in STYLES.items():
            points = [
                (case[key], case["arms"][name]["over_plain"])
                for case in cases
                if case["arms"].get(name, {}).get("over_plain") is not None
            ]
            if points:
                axes.plot(*zip(*points, strict=True), label=name, **style)
        axes.set_xscale("log", base=2 if key == "tasks" else 10)
        axes.set_yscale("log", base=2)
        axes.axhline(1, color="0.6", linewidth=1)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_title(cases[0]["title"].rsplit(", K", 1)[0] if key == "tasks" else "4-layer MLP")
        axes.spines[["top", "right"]].set_visible(False)
        ticks = [case[key] for case in cases]
        axes.set_xticks(ticks, [f"{x:g}" if x < 1000 else f"{x:.1e}" for x in ticks])
        axes.minorticks_off()
    by_tasks.set(xlabel="tasks K", ylabel="peak memory over the plain step")
    by_size.set(xlabel="parameters n")
    figure.legend(*by_tasks.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    save_svg(figure, path)
