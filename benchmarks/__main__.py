"""Figures and tables of all stored results, made anew: nothing is measured.

python -m benchmarks

draws the figures of `benchmarks/results`, and writes into the documents what their tables show of these results.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks._cli import RESULTS, Draw
from benchmarks._documents import DOCUMENTS, ROOT, rendered, rewrite
from benchmarks.figures import (
    against_peers,
    cytology,
    kernels,
    landscape,
    multitask,
    overhead,
    peak_memory,
    pinn,
    reuse,
    scaling,
    solver_cost,
    step_cost,
)

FIGURES: dict[str, Draw] = {
    "step_cost": step_cost.draw,
    "peak_memory": peak_memory.draw,
    "kernels": kernels.draw,
    "solver_cost": solver_cost.draw,
    "against_peers": against_peers.draw,
    "overhead": overhead.draw,
    "reuse": reuse.draw,
    "scaling": scaling.draw,
    "landscape": landscape.draw,
    "pinn": pinn.draw,
    "multitask": multitask.draw,
    "cytology": cytology.draw,
}
"""By the first part of the name of the file."""


def redraw(folder: Path, out: Path) -> list[Path]:
    """Draw every result in `folder` that has a figure into `out`.

    Returns:
        The figures.
    """
    drawn = []
    for path in sorted(folder.glob("*.json")):
        known = [name for name in FIGURES if path.stem.startswith(name)]
        if known:
            drawn.append(out / f"{path.stem}.svg")
            FIGURES[max(known, key=len)](json.loads(path.read_text(encoding="utf-8")), drawn[-1])
    return drawn


def main(arguments: Sequence[str] | None = None) -> None:
    """Redraw the figures and rewrite the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.parse_args(arguments)
    for path in redraw(RESULTS, RESULTS):
        print(path.name)
    for path in rewrite(DOCUMENTS, rendered(RESULTS)):
        print(f"{path.relative_to(ROOT)}: tables have changed")


if __name__ == "__main__":
    main(sys.argv[1:])
