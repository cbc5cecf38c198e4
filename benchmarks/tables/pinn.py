"""Errors of physics-informed networks, by method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks._markdown import interval, method, number, table

COLUMNS = {
    "error": "relative error",
    "over_sum": "over the plain sum",
    "over_weighted_sum": "over the weighted sum",
}


def tables(result: Mapping[str, Any]) -> dict[str, str]:
    """One for each problem, with a row for each method."""
    return {key: of_problem(problem) for key, problem in result["problems"].items()}


def of_problem(problem: Mapping[str, Any]) -> str:
    """Chosen trial, geometric means with intervals, and the share of steps that raise a loss."""
    rows = []
    for name, found in problem["methods"].items():
        ratios = (interval(found.get(key), ".2g", between=" to ") for key in COLUMNS)
        raised = number(found["seen"]["update_raises"], ".0%")
        rows.append([method(name), trial(found["chosen"]), *ratios, raised])
    names = ["learning rate, weight", *COLUMNS.values(), "steps that raise a loss"]
    return table([problem["title"], *names], rows)


def trial(chosen: Mapping[str, float]) -> str:
    """Learning rate, and the weight where it is not 1."""
    weight = "" if chosen["weight"] == 1 else f", {chosen['weight']:g}"
    return f"{chosen['rate']:g}{weight}"
