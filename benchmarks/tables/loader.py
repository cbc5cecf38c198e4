"""Images that the loaders make and the networks take, per second of one core."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks._markdown import number, table

NETWORKS = ("small encoder at 56", "ResNet-18 at 224")
ARMS = {
    "our loader": "our loader: rows of the store, views of the whole batch at once",
    "our loader, views of the paper": "our loader, views of the paper",
    "published way": "published way: Pillow and torchvision, image by image, each time",
    "network": "network, forward and backward",
    "network, channels outermost": "network with channels outermost (`--no-channels-last`)",
}


def tables(result: Mapping[str, Any]) -> dict[str, str]:
    """A row for each loader and network, a column for each size of picture."""
    loaders = [result["loaders"][network] for network in NETWORKS]
    rows = [
        [words, *(number(arms[arm]["images_per_cpu_second"]["median"], ",.0f") for arms in loaders)]
        for arm, words in ARMS.items()
    ]
    return {"": table(["images/s of one core", *NETWORKS], rows)}
