"""Time of a step with AGS by tasks and parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks._markdown import NOTHING, number, table


def tables(result: Mapping[str, Any]) -> dict[str, str]:
    """A row for each number of tasks, a column for each number of parameters: over K passes (over the plain sum)."""
    cells = {
        (cell["tasks"], cell["parameters"]): (
            f"{number(cell['over_passes'], '.2f')} ({number(cell['over_plain'], '.1f')})"
        )
        for cell in result["cells"]
    }
    tasks, sizes = (sorted({key[place] for key in cells}) for place in (0, 1))
    header = ["K", *(f"n = {n:.0e}".replace("e+0", "e") for n in sizes)]
    rows = [[str(k), *(cells.get((k, n), NOTHING) for n in sizes)] for k in tasks]
    return {"": table(header, rows)}
