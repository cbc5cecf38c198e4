"""Means over a few seeds with their uncertainty, and which differences are beyond chance."""

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


def p_value(differences: Sequence[float]) -> float:
    """Of Student's t test, that paired differences have mean zero; 1 where all are zero."""
    interval = Interval.of(differences)
    reach = interval.high - interval.mean
    if reach == 0:
        return 1.0 if interval.mean == 0 else 0.0
    freedom = len(differences) - 1
    statistic = interval.mean / reach * float(stats.t.ppf(0.975, freedom))
    return float(2 * stats.t.sf(abs(statistic), freedom))


def holm(p_values: dict[str, float]) -> dict[str, float]:
    """Adjusted p-values, by name: below 0.05 all are right at once with 95 % confidence (Holm, 1979)."""
    adjusted, running = {}, 0.0
    ordered = sorted(p_values, key=p_values.__getitem__)
    for place, name in enumerate(ordered):
        running = max(running, min(1.0, (len(ordered) - place) * p_values[name]))
        adjusted[name] = running
    return adjusted
