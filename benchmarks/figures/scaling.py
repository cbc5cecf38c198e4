"""Time of a step with AGS against parameters, tasks and processes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks._plots import new_figure, save_svg


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Time against n, against K and against processes, on logarithmic axes; lines are the model."""
    figure = new_figure(13, 4.2)
    by_size, by_tasks, by_ranks = figure.subplots(1, 3)
    cells = result["cells"]
    for axes, along, other, label in (
        (by_size, "parameters", "tasks", "K = {:,}"),
        (by_tasks, "tasks", "parameters", "n = {:.0e}"),
    ):
        for number, value in enumerate(sorted({c[other] for c in cells})):
            line = sorted((c for c in cells if c[other] == value), key=lambda c: c[along])
            x = [c[along] for c in line]
            style = {"color": f"C{number}"}
            axes.loglog(x, [c["AGS"]["model_ms"] for c in line], "-", linewidth=1, **style)
            for c in line:
                filled = {} if c["part"] == "fit" else {"markerfacecolor": "white"}
                axes.loglog(c[along], c["AGS"]["ms"], "o", markersize=5, **style, **filled)
            axes.plot([], [], "o-", label=label.format(value), **style)
        axes.set(xlabel="parameters n" if along == "parameters" else "tasks K")
        axes.legend(fontsize=7)
    by_size.set(ylabel="ms per step with AGS", title="full: fitted; hollow: held out")
    by_tasks.set(title="line: model")
    by_tasks.set_xticks(sorted({c["tasks"] for c in cells}))
    by_tasks.xaxis.set_major_formatter("{x:.0f}")
    by_tasks.minorticks_off()
    rows = [r for r in result["ranks"] if r["exchange"] == "all_reduce"]
    for number, key in enumerate(sorted({(r["parameters"], r["tasks"]) for r in rows})):
        line = [r for r in rows if (r["parameters"], r["tasks"]) == key]
        x, y = [r["ranks"] for r in line], [r["cpu_ms"]["median"] for r in line]
        label = f"n = {key[0]:.0e}, K = {key[1]}"
        by_ranks.loglog(x, y, "o", color=f"C{number}", label=label)
        model = [r.get("model_cpu_ms", r["cpu_ms"]["median"]) for r in line]
        by_ranks.loglog(x, model, "-", linewidth=1, color=f"C{number}")
    by_ranks.set(xlabel="processes", title="processor time of one process, all-reduce")
    by_ranks.set_xticks(sorted({r["ranks"] for r in rows}))
    by_ranks.xaxis.set_major_formatter("{x:.0f}")
    by_ranks.minorticks_off()
    by_ranks.legend(fontsize=7)
    save_svg(figure, path)
