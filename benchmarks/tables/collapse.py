"""How each setting of the cytology example ends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks._markdown import bold, number, table

COLUMNS = (
    "setting",
    "contrastive loss (chance)",
    "effective rank",
    "similarity / contrastive gradient",
    "cosine",
    "AP by distance",
    "collapsed",
)


def tables(result: Mapping[str, Any]) -> dict[str, str]:
    """A row for each setting; what a setting does not have stays empty."""
    rows = []
    for found in result["rows"]:
        loss, chance, rank, ratio, cosine = (
            number(found[key], ".2f") if key in found else ""
            for key in ("contrastive", "chance", "effective_rank", "norm_ratio", "cosine")
        )
        precision = number(found["average_precision"], ".3f")
        collapsed = bold("yes") if found["collapsed"] else "no"
        loss = f"{loss} ({chance})" if loss else ""
        rows.append([found["setting"], loss, rank, ratio, cosine, precision, collapsed])
    return {"": table(COLUMNS, rows)}
