"""Where the methods end, on the landscape and on quadratics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks._markdown import method, number, table

DISTANCES = ("to_pareto", "to_sum", "to_predicted")


def tables(result: Mapping[str, Any]) -> dict[str, str]:
    """A row for each method: starts that reach the Pareto set, largest distances on quadratics of both scales."""
    rows, scales = [], {}
    for name, found in result["methods"].items():
        reached, starts = found["landscape"]["reached"], len(found["landscape"]["distance"])
        scales = found["quadratics"]
        ends = [" / ".join(distance(end[to]) for to in DISTANCES) for end in scales.values()]
        rows.append([method(name), f"{reached} of {starts}", *ends])
    names = [f"quadratics {scale.replace(':', ' : ')}" for scale in scales]
    return {"": table(["method", "starts that reach the Pareto set", *names], rows)}


def distance(value: float | None) -> str:
    """Small ones by their power of ten."""
    return number(value, ".0e" if value is not None and value < 0.01 else ".2f")
