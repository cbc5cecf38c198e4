"""Metrics of every method on multi-task problems, beside both sums and networks with one task."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from benchmarks._markdown import interval, method, number, table

LEVEL = 0.05
RIVALS = {"over_sum": "− Sum", "over_weighted_sum": "− weighted sum"}


def tables(result: Mapping[str, Any]) -> dict[str, str]:
    """One for each problem: metrics of the tasks, delta_m, and its differences to both sums."""
    return {key: with_metrics(problem) for key, problem in result["problems"].items()}


def tables_with_rates(result: Mapping[str, Any]) -> dict[str, str]:
    """The same with the learning rate that was chosen in place of the metrics."""
    return {key: with_rates(problem) for key, problem in result["problems"].items()}


def with_metrics(problem: Mapping[str, Any]) -> str:
    """Of one problem; networks with one task come first."""
    alone = [found["metric"] for found in problem["single"].values()]
    metrics = [number(value, ".3f") for value in [*alone, statistics.fmean(alone)]]
    rows = [["one network each", *metrics, "0", *("" for _ in RIVALS)]]
    for name, found in problem["methods"].items():
        means = [found["metrics"][task]["mean"] for task in problem["single"]]
        metrics = [number(value, ".3f") for value in [*means, found["mean"]["mean"]]]
        rows.append([method(name), *metrics, *changes(found)])
    return table(["method", *problem["single"], "mean", "delta_m %", *RIVALS.values()], rows)


def with_rates(problem: Mapping[str, Any]) -> str:
    """Of one problem."""
    rows = [
        [method(name), trial(found["chosen"]), *changes(found)]
        for name, found in problem["methods"].items()
    ]
    return table(["method", "rate", "delta_m %", *RIVALS.values()], rows)


def changes(found: Mapping[str, Any]) -> list[str]:
    """delta_m of a method and its difference to both sums, starred where it stands after correction."""
    differences = [found.get(key) for key in RIVALS]
    stars = ["*" if d is not None and d["p_adjusted"] < LEVEL else "" for d in differences]
    cells = [interval(d, ".1f") + star for d, star in zip(differences, stars, strict=True)]
    return [interval(found["delta_m"], ".1f"), *cells]


def trial(chosen: Mapping[str, Any]) -> str:
    """Learning rate, and the weights where they are not equal."""
    weights = chosen["weights"]
    return f"{chosen['rate']:g}" + (f", {' : '.join(f'{w:g}' for w in weights)}" if weights else "")
