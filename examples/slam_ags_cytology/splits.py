"""Divide things into training, validation and test, in the same way on every machine."""

from collections.abc import Mapping

import numpy as np

from .files import text_digest
from .manifest import SPLITS

__all__ = ["apportion", "divide"]


def divide(
    strata: Mapping[str, str], fractions: tuple[float, float, float], seed: int
) -> dict[str, str]:
    """A split for every unit, in the wanted proportions inside every stratum.

    Units are ordered by a hash of seed and name, not by a generator: no listing order can matter.
    """
    members: dict[str, list[str]] = {}
    for unit, stratum in strata.items():
        members.setdefault(stratum, []).append(unit)
    splits: dict[str, str] = {}
    for units in members.values():
        units.sort(key=lambda unit: text_digest(f"{seed}/{unit}"))
        counts = apportion(len(units), fractions)
        labels = [split for split, count in zip(SPLITS, counts, strict=True) for _ in range(count)]
        splits.update(zip(units, labels, strict=True))
    return splits


def apportion(total: int, fractions: tuple[float, float, float]) -> tuple[int, int, int]:
    """Whole numbers near the fractions that add up to `total`, none of them 0 if that is possible.

    With too few for all, training comes first, then test, then validation.
    """
    first = [index for index in (0, 2, 1) if fractions[index] > 0][:total]
    counts = [int(index in first) for index in range(3)]
    for _ in range(total - len(first)):
        lag = [fractions[index] * total - counts[index] for index in range(3)]
        counts[int(np.argmax(lag))] += 1
    return counts[0], counts[1], counts[2]
