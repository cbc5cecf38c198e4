"""Figures of a `ConflictMonitor`. The only file of the package that needs matplotlib, the extra `plot`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # an extra, imported when something is drawn
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from agsurgery.monitor import ConflictMonitor

POINTS = 50
"""Of a curve, at most: each then is the mean over many steps."""

LINES = 10
"""Pairs and tasks drawn as lines: more cannot be told apart."""

ANNOTATED = 8
"""Tasks up to which the matrix has numbers."""


def plot_monitor(monitor: ConflictMonitor) -> Figure:
    """Four panels: conflicts, cosines and weights over the steps, and the cosines task by task.

    Raises:
        ImportError: matplotlib is not installed.
        RuntimeError: the monitor has seen no step.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "Plots need matplotlib, which is not installed. Install the extra: `pip install agsurgery[plot]`, or "
            "`pip install matplotlib`."
        ) from error
    rows, total = monitor.rows(POINTS), monitor.to_dict()
    if not rows:
        raise RuntimeError(
            "A plot needs at least one step. Call `monitor.update(report)` after each."
        )
    # Not pyplot: it would keep the figure, and choose a window system.
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    (top_left, top_right), (low_left, low_right) = figure.subplots(2, 2)
    shares = {
        "any pair conflicts": "conflict",
        "sum raises a loss": "sum_raises",
        "update raises a loss": "update_raises",
    }
    _lines(top_left, rows, shares)
    top_left.set(title="Share of the steps", ylim=(-0.03, 1.03), xlabel="step")

    pairs = {
        f"{other} - {task}": f"cosine/{task}/{other}"
        for i, task in enumerate(monitor.tasks)
        for other in monitor.tasks[:i]
        if f"cosine/{task}/{other}" in total
    }
    worst = sorted(pairs, key=lambda label: total[pairs[label]])[:LINES]
    _lines(top_right, rows, {label: pairs[label] for label in worst})
    top_right.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    top_right.set(
        title=_of("Cosine of two gradients", len(pairs)), xlabel="step", ylim=(-1.05, 1.05)
    )

    weights = {task: f"weight/{task}" for task in monitor.tasks[:LINES]}
    _lines(low_left, rows, weights)
    low_left.set(title=_of("Weight of a task", len(monitor.tasks)), xlabel="step")

    _matrix(low_right, monitor.tasks, total)
    return figure


def _of(title: str, count: int) -> str:
    return title if count <= LINES else f"{title} ({LINES} of {count})"


def _lines(axes: Axes, rows: list[dict[str, float]], labels: dict[str, str]) -> None:
    marker = "o" if len(rows) == 1 else None
    drawn = False
    for label, key in labels.items():
        points = [(row["steps"], row[key]) for row in rows if key in row]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker=marker, linewidth=1.4)
            drawn = True
    if drawn:
        axes.legend(fontsize="small", framealpha=0.7, edgecolor="none")
    axes.spines[["top", "right"]].set_visible(False)


def _matrix(axes: Axes, tasks: tuple[str, ...], total: dict[str, float]) -> None:
    """Mean cosines as colours, with the share of steps in conflict written in."""

    def at(name: str, i: int, j: int) -> float | None:
        return total.get(f"{name}/{tasks[max(i, j)]}/{tasks[min(i, j)]}")

    size = len(tasks)
    cosines = [[at("cosine", i, j) for j in range(size)] for i in range(size)]
    values: Any = [[float("nan") if c is None else c for c in row] for row in cosines]
    image = axes.imshow(values, vmin=-1, vmax=1, cmap="RdBu")
    axes.figure.colorbar(image, ax=axes, shrink=0.8)
    short = [t if len(t) <= 14 else f"{t[:6]}…{t[-7:]}" for t in tasks]  # both ends may tell
    step = -(-size // 20)  # labels that fit
    axes.set_xticks(range(0, size, step), short[::step], rotation=45, ha="right")
    axes.set_yticks(range(0, size, step), short[::step])
    axes.set_title("Mean cosine, and share of steps in conflict")
    if size > ANNOTATED:
        axes.set_title("Mean cosine")
        return
    for i in range(size):
        for j in range(size):
            cosine, conflict = cosines[i][j], at("conflict", i, j)
            if cosine is not None and conflict is not None:
                colour = "white" if abs(cosine) > 0.6 else "black"
                text = f"{cosine:+.2f}\n{conflict:.0%}"
                axes.text(j, i, text, ha="center", va="center", color=colour, fontsize="small")
