"""What is saved and what is lost when weights serve n steps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks._plots import new_figure, save_svg


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Three panels against n: backward passes, tasks opposed, loss at the end."""
    rows = {int(n): row for n, row in result["rows"].items()}
    steps = list(rows)
    figure = new_figure(10, 3.2)
    passes, opposed, loss = figure.subplots(1, 3)
    style = {"color": "black", "marker": "o"}
    passes.plot(steps, [row["passes"] for row in rows.values()], **style)
    passes.set(ylabel="backward passes of a step", ylim=(0, None))
    opposed.plot(steps, [100 * row["opposed"] for row in rows.values()], **style)
    opposed.set(ylabel="tasks that the update opposes, %", ylim=(0, None))
    spread = [row["final_over_fresh_sd"] for row in rows.values()]
    means = [row["final_over_fresh"] for row in rows.values()]
    loss.errorbar(steps, means, yerr=spread, capsize=3, **style)
    loss.axhline(1, color="0.6", linewidth=1)
    loss.set(ylabel="final loss over that of n = 1\n(bars: standard deviation over seeds)")
    for axes in (passes, opposed, loss):
        axes.set_xscale("log")
        axes.set_xticks(steps, [str(n) for n in steps])
        axes.minorticks_off()
        axes.set_xlabel("steps n that weights serve")
        axes.spines[["top", "right"]].set_visible(False)
    save_svg(figure, path)
