"""Peak memory of a step over that of the plain sum, by arm and network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks._markdown import number, table

CASES = {
    "transformer_2": "transformer, K = 2",
    "transformer_16": "the same, K = 16",
    "deep_16": "12 layers, K = 16",
    "mlp_1024": "4 x 1024 MLP, K = 4",
}
ARMS = (
    "AGS",
    "AGS, rows in bfloat16",
    "AGS, lean",
    "AGS at the features",
    "torchjd PCGrad",
    "pytorch_optimizer PCGrad",
)
"""Those that are shown; the file has more."""


def tables(result: Mapping[str, Any]) -> dict[str, str]:
    """A row for each arm, a column for each network."""
    arms = [result["cases"][case]["arms"] for case in CASES]
    rows = [[arm, *(number(found[arm]["over_plain"], ".2f") for found in arms)] for arm in ARMS]
    return {"": table(["peak memory / plain step", *CASES.values()], rows)}
