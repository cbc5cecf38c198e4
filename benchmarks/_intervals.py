"""Means over a few seeds, with their uncertainty."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats


@dataclass(frozen=True)
class Interval:
    """A mean, and the interval in which it lies with 95 % confidence, by Student's t."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """Of independent `values`, two or more."""
        count = len(values)
        mean = math.fsum(values) / count
        spread = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (count - 1))
        reach = float(stats.t.ppf(0.975, count - 1)) * spread / math.sqrt(count)
        return cls(mean, mean - reach, mean + reach)

    @classmethod
    def geometric(cls, values: Sequence[float]) -> Interval:
        """Of positive `values`: of their logarithms, and back."""
        logs = cls.of([math.log(value) for value in values])
        return cls(math.exp(logs.mean), math.exp(logs.low), math.exp(logs.high))

    def to_dict(self) -> dict[str, float]:
        """Numbers for a JSON file, to four digits."""
        return {
            "mean": float(f"{self.mean:.4g}"),
            "low": float(f"{self.low:.4g}"),
            "high": float(f"{self.high:.4g}"),
        }
