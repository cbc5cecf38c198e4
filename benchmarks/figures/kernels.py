"""Time of the two passes over the rows, beside a copy of as many bytes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks._plots import new_figure, save_svg

MARKS = "os^Dv"


def draw(result: Mapping[str, Any], path: Path) -> None:
    """One panel for each pass: time over that of the copy, against K; full marks float32, hollow ones bfloat16."""
    cases = list(result["cases"].values())
    sizes = sorted({case["columns"] for case in cases})
    figure = new_figure(9, 3.6)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (kernel, title) in zip(
        panels, (("gramian", "Gramian"), ("combine", "combination")), strict=True
    ):
        for mark, columns in zip(MARKS, sizes, strict=False):
            for dtype, line in (("float32", "-"), ("bfloat16", "--")):
                found = [c for c in cases if c["columns"] == columns and c["dtype"] == dtype]
                axes.errorbar(
                    [case["tasks"] for case in found],
                    [case["speed"][kernel]["time_over_copy"]["median"] for case in found],
                    color="black" if dtype == "float32" else "0.5",
                    linestyle=line,
                    marker=mark,
                    markerfacecolor=None if dtype == "float32" else "white",
                    label=f"n = {columns:.0e}, {dtype}",
                )
        axes.axhline(1, color="0.7", linewidth=1)
        tasks = sorted({case["tasks"] for case in cases})
        axes.set_xscale("log", base=2)
        axes.set_xticks(tasks, [str(k) for k in tasks])
        axes.set(title=title, xlabel="tasks K")
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("time over that of a copy")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    save_svg(figure, path)
