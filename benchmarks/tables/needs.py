"""What a step of the pretraining needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks._markdown import table

CASES = {
    ("sum", "shared"): "plain sum, shared statistics",
    ("ags", "shared"): "AGS, shared (one forward pass; each loss goes back through all of it)",
    ("ags", "views"): "AGS, of each view (`--paper`: each loss goes back through its own side)",
}
SPEEDS = ("10", "100")


def tables(result: Mapping[str, Any]) -> dict[str, str]:
    """A row for each case."""
    rows = [
        [
            CASES[row["arm"], row["statistics"]],
            f"{row['step_flop'] / 1e12:.2f}",
            f"{row['activation_bytes'] / 1e9:.1f} GB",
            *(f"{row['hours'][speed]:.1f}" for speed in SPEEDS),
        ]
        for row in result["rows"]
    ]
    hours = [f"hours at {speed} TFLOP/s" for speed in SPEEDS]
    return {"": table(["arm", "TFLOP a step", "activations, fp32", *hours], rows)}
