"""How does the cost of a step with AGS grow with tasks, parameters and processes, and does a simple model predict it?

The model: K backward passes, a K n + b K^2 n for the rows of gradients (copied, multiplied, combined), the solver for
K tasks, and overhead for each step and each task. The solver is timed alone; the rest is fitted on half of the cells
and compared with the other half ("between"), and with a network ten times as large as any of the fit ("beyond").
For several processes: seconds for each message and byte, fitted on two processes and compared with four, and the
bytes that leave a process beside the formula of docs/distributed.md.

Seconds are processor time (on a GPU: by the clock), which other work on the machine touches less than the clock; both
are stored. Plain summed step, K passes without surgery, and AGS take turns on one network.

    python -m benchmarks.scaling
    python -m benchmarks.scaling --refit benchmarks/results/scaling.json --network 4e11 --out other.json

The second predicts for another machine from stored measurements.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks._cli import finish, new_parser, parse, provenance, threads
from benchmarks._measure import environment
from benchmarks._ranks import measure_ranks
from benchmarks._scaling_cells import ARMS, measure_cell, needed_bytes, operations, solver_seconds
from benchmarks._scaling_fits import (
    GIVEN,
    LIMIT,
    fit_cells,
    fit_ranks,
    part_of,
    rank_cells,
    rank_rows,
)
from benchmarks._scaling_model import Machine, Operations, assumptions, predict_step
from benchmarks.figures import scaling as figure

PACKAGES = ("torch", "numpy", "scipy", "matplotlib")
TASKS = (2, 4, 8, 16, 32, 64)
SIZES = (10_000, 100_000, 1_000_000, 10_000_000)
BEYOND = 100_000_000
RANKS = (1, 2, 4)
RANK_TASKS = (2, 8)
RANK_SIZES = (100_000, 1_000_000, 4_000_000)
ROUNDS, RANK_ROUNDS, BLOCK_SECONDS = 5, 7, 0.04
PREDICTED_TASKS, PREDICTED_SIZES, PREDICTED_RANKS = (2, 8, 32), (10**8, 10**9), (1, 8, 64)


# -- report -------------------------------------------------------------------------------------------


def cell_line(cell: dict[str, Any]) -> str:
    """One line of the first table, as it is measured."""
    times = "  ".join(f"{cell[arm]['ms']:>10.3f}" for arm in ARMS)
    return (
        f"  {cell['tasks']:>3} {cell['parameters']:>11,}  {times}  {cell['over_plain']:>7.2f}"
        f"  {cell['over_passes']:>7.2f}  {cell['part']}"
    )


HEADER = f"  {'K':>3} {'n':>11}  {'plain ms':>10}  {'K passes':>10}  {'AGS':>10}  {'/ plain':>7}  {'/ K p.':>7}"


def rank_line(row: dict[str, Any]) -> str:
    """One line of the second table."""
    model = f"{row['model_cpu_ms']:>9.2f}" if "model_cpu_ms" in row else f"{'-':>9}"
    formula = f"{row['bytes_over_formula']:.3f}" if "bytes_over_formula" in row else "-"
    return (
        f"  {row['ranks']:>2} {row['tasks']:>3} {row['parameters']:>10,}  {row['exchange']:<14}"
        f" {row['cpu_ms']['median']:>9.2f} {model} {row['wall_ms']['median']:>9.2f}"
        f" {row['bytes']:>12,} {formula:>7}"
    )


def answer(result: dict[str, Any]) -> str:
    """The result in one sentence."""
    cells, errors = result["cells"], result["model"]["errors"]["AGS"]
    largest = max(cells, key=lambda c: c["parameters"] * c["tasks"])
    over = [c["over_passes"] for c in cells]
    sentence = (
        f"Answer: AGS costs {min(over):.2f} to {max(over):.2f} times K backward passes "
        f"({largest['over_passes']:.2f} at K = {largest['tasks']}, n = {largest['parameters']:.0e})"
    )
    given = result["model"]["errors"][GIVEN]
    if errors["between"] is not None:
        sentence += (
            f"; the model is off by {errors['between']['median']:.0%} in the median between its cells "
            f"(largest {errors['between']['largest']:.0%})"
        )
    if errors["beyond"] is not None:
        sentence += (
            f" and {errors['beyond']['median']:.0%} beyond them, {given['beyond']['median']:.0%} where the passes "
            "are known"
        )
    ranks = [r for r in result["ranks"] if "bytes_over_formula" in r]
    if ranks:
        ratios = [r["bytes_over_formula"] for r in ranks]
        sentence += f"; a process sends {min(ratios):.2f} to {max(ratios):.2f} times the bytes of the formula"
        most = max(r["ranks"] for r in ranks)
        found = [m["errors"].get(str(most)) for m in result["exchange_model"].values()]
        if most > 2 and all(found):
            sentence += (
                f"; its processor time at {most} processes, from 2, is off by "
                f"{max(f['median'] for f in found):.0%} in the median"
            )
    return sentence + "."


def prediction_lines(predictions: list[dict[str, Any]]) -> list[str]:
    """The table of what was not measured."""
    names = ("forward", "backward", "rows", "exchange", "operations")
    lines = [
        f"  {'K':>3} {'n':>6} {'processes':>9} "
        + " ".join(f"{name:>10}" for name in names)
        + f" {'ms':>9} {'/ plain':>8}"
    ]
    for p in predictions:
        parts = " ".join(f"{p['milliseconds'][name]:>10.2f}" for name in names)
        lines.append(
            f"  {p['tasks']:>3} {p['parameters']:>6.0e} {p['ranks']:>9} {parts} {p['total_ms']:>9.1f}"
            f" {p['over_plain']:>8.2f}"
        )
    return lines


# -- running ------------------------------------------------------------------------------------------


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All that is measured or counted, as it goes into the JSON file."""
    device, rounds = torch.device(options.device), options.rounds
    tasks, sizes, beyond = TASKS, SIZES, (BEYOND,)
    rank_grid: tuple[Sequence[int], Sequence[int], Sequence[int]] = (RANKS, RANK_TASKS, RANK_SIZES)
    rank_rounds, block = RANK_ROUNDS, BLOCK_SECONDS
    if options.quick:
        tasks, sizes, beyond = (2, 4, 8), (2_500, 10_000, 40_000), (90_000,)
        rank_grid, rounds, rank_rounds, block = ((1, 2), (2,), (16_384,)), 1, 1, 0.001
    record = provenance(options, PACKAGES, __doc__)
    cells, skipped = [], []
    print(HEADER, flush=True)
    for n in (*sizes, *beyond):
        for k in tasks:
            if needed_bytes(k, n) > LIMIT:
                skipped.append(f"K = {k}, n = {n:.0e}: more than {LIMIT:.0e} B")
                continue
            cell = measure_cell(k, n, device, rounds, block)
            cell["part"] = part_of(k, n, tasks, sizes)
            cells.append(cell)
            print(cell_line(cell), flush=True)
    solver = solver_seconds(tasks, device, rounds, block)
    chosen, too_large = rank_cells(*rank_grid)
    print(f"Processes: {len(chosen)} cells", flush=True)
    return {
        "rounds": rounds,
        **record,
        "cells": cells,
        "solver_ms": {str(k): float(f"{1e3 * s:.4g}") for k, s in solver.items()},
        "ranks": rank_rows(chosen, measure_ranks(chosen, rank_rounds)),
        "skipped": [*skipped, *too_large],
        "added_operations": {str(k): operations(k)._asdict() for k in PREDICTED_TASKS},
    }


def read(path: Path) -> dict[str, Any]:
    """What was measured before."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def conclude(measured: dict[str, Any], machine: Machine) -> dict[str, Any]:
    """Measurements with the models fitted to them, the predictions and the answer."""
    solver = {int(k): 1e-3 * ms for k, ms in measured["solver_ms"].items()}
    counted = {int(k): Operations(**v) for k, v in measured["added_operations"].items()}
    result = {
        **measured,
        "model_commit": environment(torch.device("cpu"), ())["commit"],
        "model": fit_cells(measured["cells"], solver),
        "exchange_model": fit_ranks(measured["ranks"]),
        "predicted": {
            "assumed": assumptions(machine),
            "steps": [
                predict_step(machine, k, n, w, operations)
                for n in PREDICTED_SIZES
                for k, operations in counted.items()
                for w in PREDICTED_RANKS
            ],
        },
    }
    return {**result, "answer": answer(result)}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark with command line arguments; returns what the JSON file holds."""
    parser = new_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="samples per arm")
    parser.add_argument("--refit", type=Path, help="take the measurements from this JSON file")
    for name, unit in (
        ("flops", "operations/s of the passes"),
        ("memory", "bytes/s of the memory"),
        ("network", "bytes/s that leave each process"),
    ):
        default = getattr(Machine(), name)
        text = f"{unit}, for the prediction (default: {default:g})"
        parser.add_argument(f"--{name}", type=float, default=default, help=text)
    options = parse(parser, arguments, rounds=1)
    if min(options.flops, options.memory, options.network) <= 0:
        parser.error("--flops, --memory and --network must be positive.")
    machine = replace(
        Machine(), flops=options.flops, memory=options.memory, network=options.network
    )
    with threads():
        measured = measure(options) if options.refit is None else read(options.refit)
    result = conclude(measured, machine)
    print(
        f"  {'W':>2} {'K':>3} {'n':>10}  {'exchange':<14} {'cpu ms':>9} {'model':>9} {'wall':>9}"
        f" {'bytes':>12} {'/ docs':>7}"
    )
    print("\n".join(rank_line(row) for row in result["ranks"]))
    for name in ("K passes", "AGS"):
        print(f"Seconds per unit, {name}:", result["model"][name])
    print("Off by:", result["model"]["errors"])
    print("Exchange:", result["exchange_model"])
    print("\n".join(f"Skipped: {reason}" for reason in result["skipped"]))
    print(f"Predicted, not measured, ms on a machine with {assumptions(machine)}:")
    print("\n".join(prediction_lines(result["predicted"]["steps"])))
    return finish(options, "scaling", result, figure.draw)


if __name__ == "__main__":
    main()
