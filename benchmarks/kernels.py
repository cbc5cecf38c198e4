"""How fast are the two passes over the K x n gradients, and how exact is the Gramian?

Speed: gigabytes of gradients per second, beside a plain copy of as many bytes in the same round (the ratio is what to
look at: 1 is the speed of the copy, which moves each byte twice). Accuracy: largest error of a cosine against float64,
for random and for nearly parallel rows, beside the plain product `J @ J.T`.

    python -m benchmarks.kernels --columns 1000000 10000000
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

from agsurgery import kernels
from benchmarks._cli import finish, new_parser, parse, provenance, threads
from benchmarks._measure import Spread, Step, interleaved, waiter
from benchmarks.figures import kernels as figure

TASKS = (2, 4, 8, 16)
COLUMNS = (100_000, 1_000_000, 10_000_000)
BLOCK_SECONDS = 0.02
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PARALLEL = 1e-3
"""Length of what tells nearly parallel rows apart, relative to what they have in common."""


def speeds(
    tasks: int, columns: int, dtype: torch.dtype, device: torch.device, rounds: int, seconds: float
) -> dict[str, Any]:
    """GB/s of a copy, of the Gramian and of the combination, and their time relative to the copy."""
    length = kernels.padded_length(columns)
    rows = torch.randn(tasks, length, device=device).to(dtype)
    other, out = torch.empty_like(rows), torch.empty(length, dtype=dtype, device=device)
    weights = torch.linspace(0.5, 1.5, tasks, dtype=torch.float64, device=device)
    steps: dict[str, Step] = {
        "copy": lambda: _done(other.copy_(rows)),
        "gramian": lambda: _done(kernels.gramian(rows)),
        "combine": lambda: _done(kernels.combine(weights, rows, out)),
    }
    samples = interleaved(
        steps, rounds=rounds, block_seconds=seconds, warmup=2, synchronise=waiter(device)
    )
    gigabytes = rows.numel() * rows.element_size() / 1e9
    result: dict[str, Any] = {}
    for name, own in samples.items():
        over = [a.wall / b.wall for a, b in zip(own, samples["copy"], strict=True)]
        result[name] = {
            "gigabytes_per_second": Spread.of([gigabytes / s.wall for s in own]).to_dict(2),
            "time_over_copy": Spread.of(over).to_dict(3),
        }
    return result


def _done(tensor: Tensor) -> None:
    """A step returns nothing."""


def errors(tasks: int, columns: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Largest error of a cosine: our Gramian and the plain product, random and nearly parallel rows."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(tasks, columns, generator=generator)
    common = torch.randn(columns, generator=generator)
    found: dict[str, Any] = {}
    for name, rows in {"random": noise, "nearly parallel": common + PARALLEL * noise}.items():
        rows = rows.to(device, dtype)
        padded = rows.new_zeros(tasks, kernels.padded_length(columns))
        padded[:, :columns] = rows
        exact = _in_float64(rows)
        plain = rows @ rows.T
        found[name] = {
            "ours": _largest_error(kernels.gramian(padded), exact),
            "plain product": _largest_error(plain, exact),
        }
    return found


def _in_float64(rows: Tensor) -> Tensor:
    parts = [part.double() @ part.double().T for part in torch.split(rows, 1 << 20, dim=1)]
    return torch.stack(parts).sum(0)


def _largest_error(gramian: Tensor, exact: Tensor) -> float:
    """Relative to the lengths of the rows; infinity stays infinity."""
    norms = exact.diagonal().sqrt()
    error = (gramian.double() - exact).abs() / torch.outer(norms, norms)
    return float(f"{error.max().item():.2e}")


def table(cases: dict[str, Any]) -> str:
    """One line for each case."""
    lines = [
        f"{'case':<26} {'Gramian GB/s':>13} {'/ copy':>7} {'combine GB/s':>13} {'/ copy':>7}"
        f"  {'error':>8} {'plain':>8}  {'parallel':>8} {'plain':>8}"
    ]
    for name, case in cases.items():
        cells = []
        for kernel in ("gramian", "combine"):
            speed = case["speed"][kernel]
            cells.append(
                f"{speed['gigabytes_per_second']['median']:>13.1f} {speed['time_over_copy']['median']:>7.2f}"
            )
        for kind in ("random", "nearly parallel"):
            error = case["error"][kind]
            cells.append(f" {error['ours']:>8.0e} {error['plain product']:>8.0e}")
        lines.append(f"{name:<26} {' '.join(cells)}")
    return "\n".join(lines)


def answer(cases: dict[str, Any]) -> str:
    """One sentence on all cases."""
    wide = [case for case in cases.values() if case["dtype"] == "float32"]

    def span(kernel: str) -> str:
        ratios = [case["speed"][kernel]["time_over_copy"]["median"] for case in wide]
        return f"{min(ratios):.2f} to {max(ratios):.2f}"

    ours = max(e["ours"] for case in wide for e in case["error"].values())
    plain = max(e["plain product"] for case in wide for e in case["error"].values())
    return (
        f"Answer: in float32 the Gramian takes {span('gramian')} times a copy of the rows, the combination "
        f"{span('combine')} times; cosines are off by at most {ours:.0e}, with the plain product by {plain:.0e}."
    )


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark with command line arguments; returns what the JSON file holds."""
    parser = new_parser(__doc__)
    parser.add_argument("--tasks", type=int, nargs="+", default=list(TASKS), help="K to try")
    parser.add_argument("--columns", type=int, nargs="+", default=list(COLUMNS), help="n to try")
    parser.add_argument("--rounds", type=int, default=11, help="samples per kernel (default: 11)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch (default: 1)")
    options = parse(parser, arguments, tasks=1, columns=1, rounds=1, threads=1)
    device = torch.device(options.device)
    if options.quick:
        options.tasks, options.columns, options.rounds = [2, 4], [10_000], 1
    with threads(options.threads):
        record = provenance(options, ("torch",), __doc__)
        cases = {}
        for (name, dtype), columns, tasks in product(
            DTYPES.items(), options.columns, options.tasks
        ):
            cases[f"{name}, n = {columns:.0e}, K = {tasks}"] = {
                "dtype": name,
                "columns": columns,
                "tasks": tasks,
                "speed": speeds(tasks, columns, dtype, device, options.rounds, BLOCK_SECONDS),
                "error": errors(tasks, columns, dtype, device),
            }
    print(table(cases))
    result = {"answer": answer(cases), "rounds": options.rounds, **record, "cases": cases}
    return finish(options, "kernels", result, figure.draw)


if __name__ == "__main__":
    main()
