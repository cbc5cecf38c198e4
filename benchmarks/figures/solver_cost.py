"""Time of a call of every method against the number of tasks, ours and that of TorchJD."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks._plots import in_order, new_figure, save_svg


def both(cells: Mapping[str, float | None], text: str) -> str:
    """Ours, and that of the peer where there is one."""
    ours, peer = cells["ours"], cells.get("peer")
    told = "–" if ours is None else format(ours, text)
    return told if peer is None else f"{told} / {format(peer, text)}"


def subtitle(found: Mapping[str, Any]) -> str:
    """Error and share of inputs with a task opposed, the worst of all inputs."""
    shares = list(found["conflicts"].values())
    worst = {
        who: max((cell[who] for cell in shares if cell.get(who) is not None), default=None)
        for who in ("ours", "peer")
    }
    error = both(found["error"], ".0e") if found["error"] else "not known"
    return f"error {error}\nopposes {both(worst, '.0%')}"


def draw(result: Mapping[str, Any], path: Path) -> None:
    """One panel for each method; under its name the error and how often it opposes a task, ours / TorchJD's."""
    methods = in_order(result["methods"])
    columns = min(4, len(methods))
    rows = -(-len(methods) // columns)
    figure = new_figure(2.6 * columns, 2.5 * rows + 0.5)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    for axes, (name, found) in zip(panels, methods.items(), strict=False):
        for who, label, style in (
            ("ours_us", "agsurgery", {"color": "#d62728", "marker": "o"}),
            (
                "peer_us",
                "TorchJD",
                {"color": "black", "marker": "s", "linestyle": "--", "markerfacecolor": "white"},
            ),
        ):
            points = [
                (int(k), cell[who]["median"]) for k, cell in found["time"].items() if who in cell
            ]
            if points:
                axes.loglog(*zip(*points, strict=True), label=label, **style)
        axes.set_title(f"{name}\n{subtitle(found)}", fontsize=8)
        ticks = [int(k) for k in found["time"]]
        axes.set_xticks(ticks, [str(k) for k in ticks])
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="0.92")
    for axes in panels[len(methods) :]:
        axes.set_visible(False)
    for axes in panels[:: columns or 1]:
        axes.set_ylabel("µs of a call")
    for axes in panels[-columns:]:
        axes.set_xlabel("tasks K")
    handles: dict[str, Any] = {}
    for axes in panels:
        handles |= {line.get_label(): line for line in axes.get_lines()}
    figure.supxlabel(
        "error: largest distance of unit vectors; opposes: share of inputs in which a task is opposed; ours / TorchJD",
        fontsize=9,
    )
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=2, fontsize=9)
    save_svg(figure, path)
