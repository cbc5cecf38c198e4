"""What every run lost against networks with one task."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks._plots import runs_of_problems, save_svg


def draw(result: Mapping[str, Any], path: Path) -> None:
    """The delta_m of every run as a dot, with the mean as a bar."""
    size = (7.5, 4.2)
    figure, panels = runs_of_problems(result["problems"], "delta_m_by_seed", "delta_m", size)
    for axes in panels:
        axes.axhline(0, color="0.6", linewidth=1)
        # Single methods that fail must not hide the differences between the others.
        axes.set_yscale("symlog", linthresh=10)
        axes.set(ylabel="delta_m in %, lower is better")
    save_svg(figure, path)
