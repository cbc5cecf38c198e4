"""Where do the methods end up on losses whose Pareto set is known, and is it where theory says?

Two kinds of losses:

- The two-objective landscape of CAGrad (Liu et al., 2021) as Nash-MTL (Navon et al., 2022) runs it: a narrow curved
  valley above, where the gradients conflict and one is much longer; a bowl below, which holds the Pareto set. Five
  starts, Adam at 1e-3, 35,000 steps, the first loss times 0.1. SGD has no row: beside the valley the gradients are
  up to 1e5 times as long as elsewhere, and no learning rate serves both.
- Pairs of strongly convex quadratics in ten dimensions, once alike in scale and once with the second a hundred times
  as large, under small steps of SGD. The Pareto set has a closed form. So has the point where a method must end
  whose fixed points are those of the sum (`Sum`; `CAGrad` for c < 1, theorem 3.2 of its paper). The others stop
  wherever they meet the Pareto set; there an ODE solver follows the flow of formulas written anew for two vectors.

The gradients are written by hand, and all starts, or pairs, run at once: a method takes a batch of Gramians.
The tests check the gradients numerically, and the steps against `GradientSurgery`.

    python -m benchmarks.landscape
    python -m benchmarks.landscape --methods AGS PCGrad CAGrad Sum
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

import agsurgery
from benchmarks._cli import finish, new_parser, parse, provenance, threads
from benchmarks._landscape_quadratics import LARGER, PAIRS, Pair, predicted, start_of
from benchmarks._landscape_toy import REACHED, STARTS, distance_to_curve, toy, toy_pareto_set
from benchmarks.figures import landscape as figure

PACKAGES = ("torch", "numpy", "scipy", "matplotlib")
METHODS: dict[str, Callable[[], Any]] = {
    "AGS": agsurgery.AGS,
    "PCGrad": agsurgery.PCGrad,
    "CAGrad": agsurgery.CAGrad,
    "Sum": agsurgery.Sum,
    "ConFIG": agsurgery.ConFIG,
    "MGDA": agsurgery.MGDA,
    "DualProj": agsurgery.DualProj,
    "NashMTL": agsurgery.NashMTL,
    "IMTLG": agsurgery.IMTLG,
    "AlignedMTL": agsurgery.AlignedMTL,
    "GradVac": agsurgery.GradVac,
}
"""For two tasks UPGrad equals PCGrad."""

RATE, STEPS, SMALL_STEPS = 1e-3, 35_000, 10_000
MARKS = 150  # parts of a path: what the figure needs, in a file of a quarter of a megabyte


# -- running --------------------------------------------------------------------------------------


def updates(method: Any, gradients: Tensor) -> Tensor:
    """`(S, n)` combined gradients of S problems, from `(S, 2, n)`."""
    weights = method(gradients @ gradients.mT)
    return (weights.unsqueeze(-2) @ gradients).squeeze(-2)


def measure_toy(name: str, steps: int, keep: int, device: torch.device) -> dict[str, Any]:
    """One method on the landscape; of its paths `keep + 1` points are kept, by start and coordinate."""
    begin = time.perf_counter()
    method = METHODS[name]()
    points = torch.tensor(STARTS, dtype=torch.float64, device=device)
    adam = torch.optim.Adam([points.requires_grad_()], lr=RATE, fused=True)
    marks = set(np.linspace(0, steps, keep + 1).round().astype(int).tolist())
    path = []
    for step in range(steps + 1):
        if step in marks:
            path.append(points.detach().cpu().numpy().copy())
        if step < steps:
            points.grad = updates(method, toy(points.detach()).gradients)
            adam.step()
    curve = toy_pareto_set()
    distances = [distance_to_curve(end, curve) for end in path[-1]]
    values = toy(points.detach()).values.cpu().numpy()
    return {
        "ends": np.round(path[-1], 4).tolist(),
        "losses": np.round(values, 4).tolist(),
        "distance": [float(f"{d:.4g}") for d in distances],
        "reached": sum(d < REACHED for d in distances),
        "path": np.round(np.stack(path, 2), 3).tolist(),
        "seconds": round(time.perf_counter() - begin, 1),
    }


def measure_quadratics(
    name: str, larger: float, steps: int, device: torch.device
) -> dict[str, float | None]:
    """One method on all pairs of one scale: largest distances over the pairs, in units of that between centres."""
    method = METHODS[name]()
    pairs = [Pair.draw(seed, larger) for seed in range(PAIRS)]
    points = torch.from_numpy(np.stack([start_of(pair) for pair in pairs])).to(device)
    rates = torch.tensor([[pair.rate] for pair in pairs], dtype=torch.float64, device=device)
    matrices = torch.from_numpy(np.stack([pair.matrices for pair in pairs])).to(device)
    centres = torch.from_numpy(np.stack([pair.centres for pair in pairs])).to(device)
    for _ in range(steps):
        apart = (points.unsqueeze(1) - centres).unsqueeze(-1)
        points = points - rates * updates(method, (matrices @ apart).squeeze(-1))
    ends: dict[str, list[float]] = {"to_pareto": [], "to_sum": [], "to_predicted": []}
    for pair, end in zip(pairs, points.cpu().numpy(), strict=True):
        unit = float(np.linalg.norm(pair.centres[0] - pair.centres[1]))
        ends["to_pareto"].append(pair.distance(end) / unit)
        ends["to_sum"].append(float(np.linalg.norm(end - pair.best(0.5))) / unit)
        expected = predicted(name, pair, steps * pair.rate)
        if expected is not None:
            ends["to_predicted"].append(float(np.linalg.norm(end - expected)) / unit)
    return {key: float(f"{max(v):.3g}") if v else None for key, v in ends.items()}


# -- report ---------------------------------------------------------------------------------------

HEADER = (
    f"  {'method':<11} {'reached':>7}  {'distance to the Pareto set, by start':<40} "
    f"{'quadratics, 1 : 1':<26} {'quadratics, 1 : 100':<26}"
)
LEGEND = (
    f"reached: starts of the landscape that end within {REACHED} of the Pareto set; quadratics: largest distance of "
    "the end to the Pareto set / to the minimum of the sum / to the point predicted, over that between the two minima"
)


def row(name: str, found: dict[str, Any]) -> str:
    """One line of the table."""
    distances = " ".join(f"{d:7.3g}" for d in found["landscape"]["distance"])
    cells = []
    for quadratic in found["quadratics"].values():
        numbers = [quadratic[key] for key in ("to_pareto", "to_sum", "to_predicted")]
        cells.append(" / ".join("-" if v is None else f"{v:.1e}" for v in numbers))
    reached = f"{found['landscape']['reached']}/{len(STARTS)}"
    return f"  {name:<11} {reached:>7}  {distances:<40} {cells[0]:<26} {cells[1]:<26}"


def answer(methods: dict[str, Any]) -> str:
    """The result in one sentence."""
    reached = ", ".join(
        f"{name} {found['landscape']['reached']}" for name, found in methods.items()
    )
    sentence = f"Answer: of {len(STARTS)} starts on the landscape reach the Pareto set: {reached}"
    quadratics = {name: list(found["quadratics"].values()) for name, found in methods.items()}
    on = [n for n, qs in quadratics.items() if max(q["to_pareto"] for q in qs) < 0.01]
    at_sum = [n for n, qs in quadratics.items() if max(q["to_sum"] for q in qs) < 0.01]
    errors = [
        q["to_predicted"] for qs in quadratics.values() for q in qs if q["to_predicted"] is not None
    ]
    sentence += (
        f"; on quadratics end within 1 % of it: {', '.join(on) or 'none'}, at the minimum of the sum: "
        f"{', '.join(at_sum) or 'none'}"
    )
    if errors:
        sentence += f"; largest distance to a predicted end: {max(errors):.1e}"
    return sentence + "."


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark with command line arguments; returns what the JSON file holds."""
    parser = new_parser(__doc__)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    options = parse(parser, arguments)
    device = torch.device(options.device)
    steps, small_steps, keep = (20, 20, 5) if options.quick else (STEPS, SMALL_STEPS, MARKS)
    methods: dict[str, Any] = {}
    with threads():
        record = provenance(options, PACKAGES, __doc__)
        print(HEADER, flush=True)
        for name in options.methods:
            methods[name] = {
                "landscape": measure_toy(name, steps, keep, device),
                "quadratics": {
                    f"1:{larger:g}": measure_quadratics(name, larger, small_steps, device)
                    for larger in LARGER
                },
            }
            print(row(name, methods[name]), flush=True)
    print(LEGEND)
    counts = {"steps": steps, "small_steps": small_steps}
    result = {"answer": answer(methods), **counts, **record, "methods": methods}
    return finish(options, "landscape", result, figure.draw)


if __name__ == "__main__":
    main()
