"""The model of scaling beside what was measured: which cells it is fitted to, and how far off it is on the others."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks._measure import Spread
from benchmarks._ranks import RankCell
from benchmarks._scaling_cells import ARMS, needed_bytes
from benchmarks._scaling_model import OF_PASSES, OF_SURGERY, Array, Fit, exchanged, fit_exchange

LIMIT = 6e9  # bytes of a cell; larger ones are skipped
EXCHANGES = ("all_reduce", "reduce_scatter")
GIVEN = "AGS, passes as measured"
"""What surgery adds is predicted, the time of the backward passes is known: how they use the caches is their affair."""


def part_of(tasks: int, parameters: int, all_tasks: Sequence[int], sizes: Sequence[int]) -> str:
    """Which cells are fitted: every second one of the grid, and none of the largest network."""
    if parameters not in sizes:
        return "beyond"
    even = (all_tasks.index(tasks) + sizes.index(parameters)) % 2 == 0
    return "fit" if even else "between"


def fit_cells(cells: list[dict[str, Any]], solver: dict[int, float]) -> dict[str, Any]:
    """Fit both models on their cells, and write what they predict into all cells.

    Returns:
        Coefficients in seconds, and relative errors by part and arm.
    """
    chosen = [c for c in cells if c["part"] == "fit"]
    tasks, sizes = [c["tasks"] for c in chosen], [c["parameters"] for c in chosen]

    def measured(arm: str) -> Array:
        return np.array([1e-3 * c[arm]["ms"] for c in chosen])

    passes = Fit.of(OF_PASSES, tasks, sizes, measured("K passes"))
    rest = measured("AGS") - np.array([solver[k] for k in tasks])
    surgery = Fit.of(OF_SURGERY, tasks, sizes, np.maximum(rest, 1e-9))
    for c in cells:
        point = (c["tasks"], c["parameters"])
        c["K passes"]["model_ms"] = float(f"{1e3 * passes.predict(*point):.5g}")
        total = surgery.predict(*point) + solver[c["tasks"]]
        c["AGS"]["model_ms"] = float(f"{1e3 * total:.5g}")
    relative = {
        arm: {i: c[arm]["model_ms"] / c[arm]["ms"] - 1 for i, c in enumerate(cells)}
        for arm in ARMS[1:]
    }
    relative[GIVEN] = {
        i: (c["K passes"]["ms"] + c["AGS"]["model_ms"] - c["K passes"]["model_ms"]) / c["AGS"]["ms"]
        - 1
        for i, c in enumerate(cells)
    }
    errors = {
        name: {
            part: _errors([e for i, e in found.items() if cells[i]["part"] == part])
            for part in ("fit", "between", "beyond")
        }
        for name, found in relative.items()
    }
    return {"K passes": _seconds(passes), "AGS": _seconds(surgery), "errors": errors}


def _seconds(fit: Fit) -> dict[str, float]:
    """Coefficients, to four digits."""
    return {name: float(f"{value:.4g}") for name, value in fit.coefficients.items()}


def _errors(relative: Sequence[float]) -> dict[str, float] | None:
    """Median and largest size; None where there is no cell."""
    if not relative:
        return None
    sizes = [abs(error) for error in relative]
    return {
        "median": round(statistics.median(sizes), 3),
        "largest": round(max(sizes), 3),
        "cells": len(sizes),
    }


def rank_cells(
    ranks: Sequence[int], tasks: Sequence[int], sizes: Sequence[int]
) -> tuple[list[RankCell], list[str]]:
    """Cells that fit in memory, all processes together, and what was skipped."""
    cells: list[RankCell] = []
    skipped = []
    for w in ranks:
        for k in tasks:
            for n in sizes:
                if w * needed_bytes(k, n) > LIMIT:
                    skipped.append(f"{w} processes, K = {k}, n = {n:.0e}: more than {LIMIT:.0e} B")
                    continue
                for exchange in EXCHANGES[: 2 if w > 1 else 1]:
                    cells.append(RankCell(ranks=w, tasks=k, parameters=n, exchange=exchange))
    return cells, skipped


def rank_rows(cells: Sequence[RankCell], results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each cell."""
    rows: list[dict[str, Any]] = []
    alone: dict[tuple[int, int], float] = {}
    for cell, result in zip(cells, results, strict=True):
        cpu = [1e3 * second for process in result["cpu"] for second in process]
        wall = [1e3 * second for process in result["wall"] for second in process]
        row: dict[str, Any] = {
            **cell,
            "parameters": result["size"][0],
            "cpu_ms": Spread.of(cpu).to_dict(),
            "wall_ms": Spread.of(wall).to_dict(),
            "bytes": round(result["bytes"][0]),
            "messages": result["messages"][0],
        }
        key = (row["tasks"], row["parameters"])
        if cell["ranks"] == 1:
            alone[key] = row["cpu_ms"]["median"]
        else:
            formula = exchanged(*key, cell["ranks"], cell["exchange"])
            row["bytes_over_formula"] = round(row["bytes"] / formula, 4)
            row["added_cpu_ms"] = round(row["cpu_ms"]["median"] - alone[key], 4)
            row["alone_cpu_ms"] = alone[key]
        rows.append(row)
    return rows


def fit_ranks(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The model of the exchange with its errors; writes what it predicts into the rows.

    A ring of W processes passes W - 1 messages on where two processes exchange one.
    """

    def cost(r: dict[str, Any]) -> tuple[float, float]:
        return r["messages"] * (r["ranks"] - 1), r["bytes"]

    model: dict[str, Any] = {}
    for exchange in EXCHANGES:
        several = [r for r in rows if r["ranks"] > 1 and r["exchange"] == exchange]
        fitted = [r for r in several if r["ranks"] == 2]
        rates = fit_exchange(
            [cost(r)[0] for r in fitted],
            [cost(r)[1] for r in fitted],
            np.array([1e-3 * r["added_cpu_ms"] for r in fitted]),
            np.array([1e-3 * r["cpu_ms"]["median"] for r in fitted]),
        )
        for r in several:
            added = 1e3 * float(rates @ np.array(cost(r)))
            r["model_cpu_ms"] = round(r["alone_cpu_ms"] + added, 4)
        model[exchange] = {
            "seconds_per_message": float(f"{rates[0]:.3g}"),
            "seconds_per_byte": float(f"{rates[1]:.3g}"),
            "errors": {
                str(w): _errors(
                    [
                        r["model_cpu_ms"] / r["cpu_ms"]["median"] - 1
                        for r in several
                        if r["ranks"] == w
                    ]
                )
                for w in sorted({r["ranks"] for r in several})
            },
        }
    return model
