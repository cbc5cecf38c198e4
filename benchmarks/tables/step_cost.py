"""Time of a step over that of the plain sum, by network and arm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks._markdown import bold, number, table

CASES = {
    "resnet18": "ResNet-18, 2 disjoint losses",
    "mlp_2": "4 x 1024 MLP, 2 heads",
    "mlp_8": "4 x 1024 MLP, 8 heads",
    "conv_40": "conv trunk, 40 heads",
    "transformer_4": "transformer, 4 heads",
    "toy_2": "toy MLP, 2 heads",
    "toy_8": "toy MLP, 8 heads",
}
ARMS = {
    "K passes": "K backward passes, no surgery",
    "AGS": "**AGS**",
    "AGS, lean": '`engine="lean"`',
    "torchjd PCGrad": "torchjd PCGrad",
    "torchjd PCGrad, one by one": "torchjd PCGrad, one by one",
    "torchjd UPGrad": "torchjd UPGrad",
    "pytorch_optimizer PCGrad": "pytorch_optimizer PCGrad",
}
"""Those that are shown; the file has more."""


def tables(result: Mapping[str, Any]) -> dict[str, str]:
    """A row for each network, a column for each arm."""
    rows = []
    for case, words in CASES.items():
        arms = result["cases"][case]["arms"]
        found = {arm: number(arms[arm]["over_plain"]["median"], ".2f") for arm in ARMS}
        found["AGS"] = bold(found["AGS"])
        rows.append([words, *found.values()])
    return {"": table(["", *ARMS.values()], rows)}
