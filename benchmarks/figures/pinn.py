"""The error of every run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks._plots import runs_of_problems, save_svg


def draw(result: Mapping[str, Any], path: Path) -> None:
    """One dot for each run, a bar for each geometric mean."""
    figure, panels = runs_of_problems(result["problems"], "errors", "error", (5.2, 3.6))
    for axes in panels:
        axes.set_yscale("log")
        axes.set(ylabel="relative L2 error")
    save_svg(figure, path)
