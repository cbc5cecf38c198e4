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

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import agsurgery
from agsurgery import AGS, GradientSurgery
from benchmarks._cli import new_parser, parse, result_path
from benchmarks._measure import Sample, Spread, Step, environment, interleaved, write_json
from benchmarks._plots import new_figure, save_svg
from benchmarks._ranks import LAYERS, RATE, Network, RankCell, measure_ranks
from benchmarks._scaling_model import (
    OF_PASSES,
    OF_SURGERY,
    Array,
    Fit,
    Machine,
    Operations,
    assumptions,
    exchanged,
    fit_exchange,
    predict_step,
)

PACKAGES = ("torch", "numpy", "scipy", "matplotlib")
TASKS = (2, 4, 8, 16, 32, 64)
SIZES = (10_000, 100_000, 1_000_000, 10_000_000)
BEYOND = 100_000_000
RANKS = (1, 2, 4)
RANK_TASKS = (2, 8)
RANK_SIZES = (100_000, 1_000_000, 4_000_000)
EXCHANGES = ("all_reduce", "reduce_scatter")
LIMIT = 6e9
ROUNDS, RANK_ROUNDS, BLOCK_SECONDS = 5, 7, 0.04
ARMS = ("plain sum", "K passes", "AGS")
GIVEN = "AGS, passes as measured"
"""What surgery adds is predicted, the time of the backward passes is known: how they use the caches is their affair."""
PREDICTED_TASKS, PREDICTED_SIZES, PREDICTED_RANKS = (2, 8, 32), (10**8, 10**9), (1, 8, 64)


def needed_bytes(tasks: int, parameters: int) -> int:
    """Live tensors of a step: weights, `.grad`, the gradient of one pass, the update, and K rows, in float32."""
    return 4 * parameters * (tasks + 4)


# -- one cell ---------------------------------------------------------------------------------------


def steps_of(network: Network) -> dict[str, Step]:
    """The three arms, on one network: the learning rate is too small to matter."""
    parameters = list(network.layers.parameters())
    plain = torch.optim.SGD(parameters, lr=RATE)
    surgery = GradientSurgery(torch.optim.SGD(parameters, lr=RATE), AGS())

    def sum_step() -> None:
        plain.zero_grad()
        torch.stack(network.losses()).sum().backward()  # type: ignore[no-untyped-call]
        plain.step()

    def passes_step() -> None:
        plain.zero_grad()
        losses = network.losses()
        for task, loss in enumerate(losses):
            loss.backward(retain_graph=task + 1 < len(losses))  # type: ignore[no-untyped-call]
        plain.step()

    def surgery_step() -> None:
        surgery.zero_grad()
        surgery.backward(network.losses())
        surgery.step()

    return dict(zip(ARMS, (sum_step, passes_step, surgery_step), strict=True))


def _wait(device: torch.device) -> Callable[[], None]:
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


def measure_cell(
    tasks: int, parameters: int, device: torch.device, rounds: int, block: float
) -> dict[str, Any]:
    """Milliseconds of the three arms."""
    network = Network(tasks, parameters, device)
    samples = interleaved(
        steps_of(network), rounds=rounds, block_seconds=block, warmup=1, synchronise=_wait(device)
    )
    return {
        "tasks": tasks,
        "parameters": network.size,
        **{name: _times(found, device) for name, found in samples.items()},
        "over_plain": _ratio(samples, ARMS[0], device),
        "over_passes": _ratio(samples, ARMS[1], device),
    }


def _seconds(sample: Sample, device: torch.device) -> float:
    """The better witness: processor time, unless the work is done elsewhere."""
    return sample.wall if device.type == "cuda" else sample.cpu


def _times(samples: list[Sample], device: torch.device) -> dict[str, Any]:
    return {
        "ms": float(f"{1e3 * statistics.median(_seconds(s, device) for s in samples):.5g}"),
        "wall_ms": Spread.of([1e3 * s.wall for s in samples]).to_dict(),
        "cpu_ms": Spread.of([1e3 * s.cpu for s in samples]).to_dict(),
    }


def _ratio(samples: dict[str, list[Sample]], to: str, device: torch.device) -> float:
    pairs = zip(samples["AGS"], samples[to], strict=True)
    return round(statistics.median(_seconds(a, device) / _seconds(b, device) for a, b in pairs), 3)


def solver_seconds(
    tasks: Sequence[int], device: torch.device, rounds: int, block: float
) -> dict[int, float]:
    """Median seconds of AGS on a K x K Gramian, for each K."""
    method, steps = AGS(), {}
    for k in tasks:
        rows = torch.randn(k, 4 * k, generator=torch.Generator().manual_seed(k)).double()
        gramian = (rows @ rows.T).to(device)
        steps[str(k)] = lambda gramian=gramian: (method(gramian), None)[1]
    samples = interleaved(
        steps, rounds=rounds, block_seconds=block, warmup=2, synchronise=_wait(device)
    )
    return {int(k): statistics.median(_seconds(s, device) for s in v) for k, v in samples.items()}


class _Counter(TorchDispatchMode):
    """Operations that do work: views are free."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def operations(tasks: int) -> Operations:
    """Operations that AGS adds to K bare backward passes, from networks of two depths."""

    def added(layers: int) -> int:
        network = Network(tasks, 16 * layers, torch.device("cpu"), layers=layers)
        parameters = list(network.layers.parameters())
        surgery = steps_of(network)["AGS"]

        def bare() -> None:
            for loss in (losses := network.losses()):
                torch.autograd.grad(loss, parameters, retain_graph=loss is not losses[-1])

        counts = []
        for step in (surgery, bare):
            step()
            with _Counter() as counter:
                step()
            counts.append(counter.count)
        return counts[0] - counts[1]

    shallow, deep = added(LAYERS), added(2 * LAYERS)
    per_tensor = (deep - shallow) / LAYERS
    return Operations(shallow - per_tensor * LAYERS, per_tensor)


# -- the model beside the measurements ----------------------------------------------------------------


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
    digits = lambda fit: {k: float(f"{v:.4g}") for k, v in fit.coefficients.items()}  # noqa: E731
    return {"K passes": digits(passes), "AGS": digits(surgery), "errors": errors}


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


def draw(result: dict[str, Any], path: Path) -> None:
    """Time against n, against K and against processes, on logarithmic axes; lines are the model."""
    figure = new_figure(13, 4.2)
    by_size, by_tasks, by_ranks = figure.subplots(1, 3)
    cells = result["cells"]
    for axes, along, other, label in (
        (by_size, "parameters", "tasks", "K = {:,}"),
        (by_tasks, "tasks", "parameters", "n = {:.0e}"),
    ):
        for number, value in enumerate(sorted({c[other] for c in cells})):
            line = sorted((c for c in cells if c[other] == value), key=lambda c: c[along])
            x = [c[along] for c in line]
            style = {"color": f"C{number}"}
            axes.loglog(x, [c["AGS"]["model_ms"] for c in line], "-", linewidth=1, **style)
            for c in line:
                filled = {} if c["part"] == "fit" else {"markerfacecolor": "white"}
                axes.loglog(c[along], c["AGS"]["ms"], "o", markersize=5, **style, **filled)
            axes.plot([], [], "o-", label=label.format(value), **style)
        axes.set(xlabel="parameters n" if along == "parameters" else "tasks K")
        axes.legend(fontsize=7)
    by_size.set(ylabel="ms per step with AGS", title="full: fitted; hollow: held out")
    by_tasks.set(title="line: model")
    by_tasks.set_xticks(sorted({c["tasks"] for c in cells}))
    by_tasks.xaxis.set_major_formatter("{x:.0f}")
    by_tasks.minorticks_off()
    rows = [r for r in result["ranks"] if r["exchange"] == EXCHANGES[0]]
    for number, key in enumerate(sorted({(r["parameters"], r["tasks"]) for r in rows})):
        line = [r for r in rows if (r["parameters"], r["tasks"]) == key]
        x, y = [r["ranks"] for r in line], [r["cpu_ms"]["median"] for r in line]
        label = f"n = {key[0]:.0e}, K = {key[1]}"
        by_ranks.loglog(x, y, "o", color=f"C{number}", label=label)
        model = [r.get("model_cpu_ms", r["cpu_ms"]["median"]) for r in line]
        by_ranks.loglog(x, model, "-", linewidth=1, color=f"C{number}")
    by_ranks.set(xlabel="processes", title="processor time of one process, all-reduce")
    by_ranks.set_xticks(sorted({r["ranks"] for r in rows}))
    by_ranks.xaxis.set_major_formatter("{x:.0f}")
    by_ranks.minorticks_off()
    by_ranks.legend(fontsize=7)
    save_svg(figure, path)


# -- running ------------------------------------------------------------------------------------------


def measure(device: torch.device, rounds: int, quick: bool) -> dict[str, Any]:
    """All that is measured or counted, as it goes into the JSON file."""
    tasks, sizes, beyond = TASKS, SIZES, (BEYOND,)
    rank_grid: tuple[Sequence[int], Sequence[int], Sequence[int]] = (RANKS, RANK_TASKS, RANK_SIZES)
    rank_rounds, block = RANK_ROUNDS, BLOCK_SECONDS
    if quick:
        tasks, sizes, beyond = (2, 4, 8), (2_500, 10_000, 40_000), (90_000,)
        rank_grid, rounds, rank_rounds, block = ((1, 2), (2,), (16_384,)), 1, 1, 0.001
    record = environment(device, PACKAGES)
    record["versions"]["agsurgery"] = agsurgery.__version__
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
        "device": str(device),
        "rounds": rounds,
        **record,
        "cells": cells,
        "solver_ms": {str(k): float(f"{1e3 * s:.4g}") for k, s in solver.items()},
        "ranks": rank_rows(chosen, measure_ranks(chosen, rank_rounds)),
        "skipped": [*skipped, *too_large],
        "added_operations": {str(k): operations(k)._asdict() for k in PREDICTED_TASKS},
    }


def conclude(measured: dict[str, Any], machine: Machine) -> dict[str, Any]:
    """Measurements with the models fitted to them, the predictions and the answer."""
    solver = {int(k): 1e-3 * ms for k, ms in measured["solver_ms"].items()}
    counted = {int(k): Operations(**v) for k, v in measured["added_operations"].items()}
    result = {
        "question": (__doc__ or "").splitlines()[0],
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
    assert __doc__ is not None
    parser = new_parser(__doc__.splitlines()[0])
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
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if options.refit is None:
            measured = measure(torch.device(options.device), options.rounds, options.quick)
        else:
            measured = json.loads(options.refit.read_text(encoding="utf-8"))
    finally:
        torch.set_num_threads(threads)
    result = conclude(measured, machine)
    out = result_path(options, "scaling")
    if out is not None:
        draw(result, out.with_suffix(".svg"))
        write_json(out, result)
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
    print(result["answer"])
    return result


if __name__ == "__main__":
    main()
