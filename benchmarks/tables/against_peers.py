"""How far updates differ where all are valid, and by how much each side breaks a demand where they are not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks._markdown import NOTHING, number, plain, table


def tables(result: Mapping[str, Any]) -> dict[str, str]:
    """`agreement`: a row for each method and peer; `traps`: a row for each."""
    agreement = result["agreement"]
    tasks = list(dict.fromkeys(k for row in agreement for k in row["difference"]))
    differences = [
        [
            row["method"],
            row["peer"],
            *(number(row["difference"].get(k), ".0e") for k in tasks),
        ]
        for row in agreement
    ]
    traps = [
        [
            row["peer"],
            row["title"],
            plain(row["demands"]),
            verdict(row["ours"]),
            verdict(row["theirs"]),
        ]
        for row in result["traps"]
    ]
    return {
        "agreement": table(["method", "peer", *(f"K = {k}" for k in tasks)], differences),
        "traps": table(["peer", "trap", "demand", "ours", "theirs"], traps),
    }


def verdict(found: Mapping[str, Any]) -> str:
    """What a side did with a demand."""
    if found["missing"] is not None:
        return NOTHING
    if found["error"] is not None:
        return "raises"
    if found["not_finite"]:
        return "NaN"
    return "kept" if found["satisfied"] else number(found["broken_by"], ".2g")
