"""Does surgery lower the error of physics-informed networks, whose residual and boundary losses conflict?

Two equations with a known solution:

- Burgers, u_t + u u_x = (0.05 / pi) u_xx on [-1, 1] x [0, 1], from u = -sin(pi x), zero at both ends (as Raissi et al.,
  2019, at five times their viscosity); the reference is the Cole-Hopf formula, by Gauss-Hermite quadrature.
- Helmholtz, u_xx + u_yy + u = f on [-1, 1]^2, zero at the border, with f such that u = sin(pi x) sin(2 pi y) (as Wang
  et al., 2021, at half their frequency).

Both are made easier than in the papers so that a small network gets somewhere in a few thousand steps on one core:
what holds here need not hold for long runs. Every method gets the same budget: the same number of steps of Adam with a
cosine schedule, and the same number of trials, the best of which is chosen by its error with two seeds of its own. With
the chosen one it then runs on fresh seeds; initial weights and points are the same for all methods. "weighted sum"
spends its trials on the weight of the boundary loss too. Some have no row, since with two tasks they have the
direction of another: UPGrad that of PCGrad; IMTLG and NashMTL that of ConFIG.

The runs of a method go through one batch of networks, since a method takes a batch of Gramians. The tests hold the
steps against `GradientSurgery`.

    python -m benchmarks.pinn
    python -m benchmarks.pinn --problems helmholtz --methods AGS PCGrad CAGrad Sum
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import agsurgery
from agsurgery import ConflictMonitor, SurgeryReport
from benchmarks._cli import finish, new_parser, parse, provenance, threads
from benchmarks._intervals import Interval
from benchmarks._optimizers import Adam
from benchmarks._pinn_equations import PROBLEMS, Problem
from benchmarks._pinn_networks import initial, jet, values
from benchmarks.figures import pinn as figure

PACKAGES = ("torch", "numpy", "scipy", "matplotlib")
STEPS, SEEDS = 2000, 6
RATES = (3e-3, 1e-2, 3e-2, 1e-1)
TUNING_SEEDS = (1000, 1001)  # one alone chooses rates with which most runs fail
FAILED = 10.0  # relative errors are cut off here: a network without any training has 1
WATCHED = 20  # every n-th step goes to the monitor


# -- methods --------------------------------------------------------------------------------------


class Trial(NamedTuple):
    """A learning rate, and the weight of the boundary loss."""

    rate: float
    weight: float = 1.0


RATES_ONLY = tuple(Trial(rate) for rate in RATES)
WEIGHTED = (Trial(1e-2, 10.0), Trial(3e-2, 10.0), Trial(3e-2, 100.0), Trial(1e-1, 10.0))
"""As many trials."""

METHODS: dict[str, tuple[Callable[[], Any], tuple[Trial, ...]]] = {
    "AGS": (agsurgery.AGS, RATES_ONLY),
    "PCGrad": (agsurgery.PCGrad, RATES_ONLY),
    "CAGrad": (agsurgery.CAGrad, RATES_ONLY),
    "Sum": (agsurgery.Sum, RATES_ONLY),
    "weighted sum": (agsurgery.Sum, WEIGHTED),
    "ConFIG": (agsurgery.ConFIG, RATES_ONLY),
    "MGDA": (agsurgery.MGDA, RATES_ONLY),
    "AlignedMTL": (agsurgery.AlignedMTL, RATES_ONLY),
}
PLAIN, TUNED = "Sum", "weighted sum"


# -- training -------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """Relative L2 errors of the runs, what the monitor saw in all of them, and seconds of a run."""

    errors: list[float]
    seen: dict[str, float]
    seconds: float


def relative_errors(problem: Problem, parameters: Tensor) -> list[float]:
    """|u - reference| / |reference| of R networks on the grid, at most `FAILED`."""
    grid = problem.grid()
    points = torch.from_numpy(grid).to(parameters)
    with torch.no_grad():
        found = values(parameters, points.expand(len(parameters), -1, -1)).double().cpu().numpy()
    exact = problem.reference(grid)
    errors = np.linalg.norm(found - exact, axis=1) / np.linalg.norm(exact)
    return np.where(errors < FAILED, errors, FAILED).tolist()


def losses_of(
    problem: Problem, parameters: Tensor, inside: Tensor, border: Tensor, given: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean squares of both violations, `(R,)` each."""
    residual = problem.residual(inside, jet(parameters, inside)).square().mean(1)
    return residual, (values(parameters, border) - given).square().mean(1)


def train(
    problem: Problem,
    method: Any,
    trials: Sequence[Trial],
    seeds: Sequence[int],
    steps: int,
    device: torch.device,
) -> Outcome:
    """Some runs at once; seed for seed the same initial weights and points for every method."""
    begin = time.perf_counter()
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    parameters = torch.stack([initial(generator) for generator in generators]).to(device)
    parameters.requires_grad_()
    inside = torch.stack([problem.inside(steps, g) for g in generators], 1).to(device)
    borders = [problem.border(steps, g) for g in generators]
    border, given = (torch.stack(parts, 1).to(device) for parts in zip(*borders, strict=True))
    adam = Adam(parameters.detach(), torch.tensor([trial.rate for trial in trials], device=device))
    weight = torch.tensor([trial.weight for trial in trials], device=device)
    monitor = ConflictMonitor(history=2)
    for step in range(steps):
        residual, boundary = losses_of(problem, parameters, inside[step], border[step], given[step])
        losses = (residual, weight * boundary)
        # The sum over the runs has the gradients of all of them.
        rows = torch.stack([torch.autograd.grad(loss.sum(), parameters)[0] for loss in losses], 1)
        gramians = rows.double() @ rows.double().mT
        weights = method(gramians)
        if step % WATCHED == 0:
            for report in reports(torch.stack(losses, 1).detach(), gramians, weights):
                monitor.update(report)
        update = (weights.to(rows).unsqueeze(1) @ rows).squeeze(1)
        adam.step(parameters.detach(), update, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    seen = monitor.to_dict()
    shares = ("conflict", "sum_raises", "update_raises", "imbalance", "sum_cosine")
    return Outcome(
        relative_errors(problem, parameters.detach()),
        {name: float(f"{seen[name]:.4g}") for name in shares if name in seen},
        (time.perf_counter() - begin) / len(seeds),
    )


def reports(losses: Tensor, gramians: Tensor, weights: Tensor) -> Iterator[SurgeryReport]:
    """One report for each run."""
    tasks, scale = ("residual", "boundary"), gramians.new_ones(())
    for loss, gramian, weight in zip(losses, gramians, weights, strict=True):
        yield SurgeryReport(tasks, loss, gramian, weight, scale)


class Effort(NamedTuple):
    """How much a method may try."""

    steps: int
    seeds: int
    trials: int


def judge(problem: Problem, name: str, effort: Effort, device: torch.device) -> dict[str, Any]:
    """Choose among the trials by the geometric mean over two seeds, then run the chosen one on fresh ones."""
    make, trials = METHODS[name]
    trials = trials[: effort.trials]
    pairs = [(trial, seed) for trial in trials for seed in TUNING_SEEDS]
    tuned = train(
        problem, make(), [t for t, _ in pairs], [s for _, s in pairs], effort.steps, device
    )
    count = len(TUNING_SEEDS)
    tried = [
        math.prod(tuned.errors[i : i + count]) ** (1 / count) for i in range(0, len(pairs), count)
    ]
    best = trials[tried.index(min(tried))]
    seeds = range(effort.seeds)
    runs = train(problem, make(), [best] * len(seeds), seeds, effort.steps, device)
    return {
        "tried": [
            {**trial._asdict(), "error": float(f"{error:.4g}")}
            for trial, error in zip(trials, tried, strict=True)
        ],
        "chosen": best._asdict(),
        "errors": [float(f"{error:.4g}") for error in runs.errors],
        "error": Interval.geometric(runs.errors).to_dict(),
        "seen": runs.seen,
        "seconds": round(runs.seconds, 2),
    }


def compare(methods: dict[str, Any]) -> None:
    """Add to each method the ratio of its error to that of the two sums, seed by seed."""
    for key, rival in (("over_sum", PLAIN), ("over_weighted_sum", TUNED)):
        if rival not in methods:
            continue
        for name, found in methods.items():
            if name == rival:
                continue
            pairs = zip(found["errors"], methods[rival]["errors"], strict=True)
            found[key] = Interval.geometric([a / b for a, b in pairs]).to_dict()


# -- report ---------------------------------------------------------------------------------------


def row(name: str, found: dict[str, Any]) -> str:
    """One line of the table."""

    def cell(key: str) -> str:
        if key not in found:
            return "-"
        return "{mean:.3g} ({low:.3g} - {high:.3g})".format(**found[key])

    chosen = found["chosen"]
    trial = f"{chosen['rate']:g}" + (f", {chosen['weight']:g}" if chosen["weight"] != 1 else "")
    seen = found["seen"]
    shares = [f"{seen[k]:.0%}" if k in seen else "-" for k in ("conflict", "update_raises")]
    return (
        f"  {name:<13} {trial:<10} {cell('error'):<26} {cell('over_sum'):<22} "
        f"{cell('over_weighted_sum'):<22} {shares[0]:>8} {shares[1]:>7} {found['seconds']:>8.1f}"
    )


HEADER = (
    f"  {'method':<13} {'lr, weight':<10} {'relative error':<26} {'/ Sum':<22} {'/ weighted sum':<22} "
    f"{'conflict':>8} {'raised':>7} {'seconds':>8}"
)
LEGEND = (
    "error, ratios: geometric means over the seeds with 95 % intervals; conflict: share of the steps; raised: share in "
    "which the update raises a loss to first order; seconds: of a run"
)


def answer(problems: dict[str, Any]) -> str:
    """The result in a few sentences."""
    parts = []
    for found in problems.values():
        methods = found["methods"]
        rivals = [name for name in methods if name not in (PLAIN, TUNED)]
        if PLAIN not in methods or not rivals:
            parts.append(f"{found['title']}: nothing to compare")
            continue
        told = {name: methods[name]["over_sum"] for name in [*rivals, TUNED] if name in methods}
        each = ", ".join(f"{name} {ratio['mean']:.2f}" for name, ratio in told.items())
        sure = [name for name, ratio in told.items() if ratio["high"] < 1]
        worse = [name for name, ratio in told.items() if ratio["low"] > 1]
        sentence = (
            f"{found['title']}: error over that of the plain sum: {each}; beyond chance better: "
            f"{', '.join(sure) or 'none'}, worse: {', '.join(worse) or 'none'}"
        )
        if TUNED in methods:
            beaten = [n for n in rivals if methods[n]["over_weighted_sum"]["high"] < 1]
            lost = [n for n in rivals if methods[n]["over_weighted_sum"]["low"] > 1]
            sentence += (
                f"; better than the weighted sum: {', '.join(beaten) or 'none'}, worse: "
                f"{', '.join(lost) or 'none'}"
            )
        parts.append(sentence)
    return f"Answer: {'. '.join(parts)}."


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark with command line arguments; returns what the JSON file holds."""
    parser = new_parser(__doc__)
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--steps", type=int, default=STEPS, help=f"(default: {STEPS})")
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"(default: {SEEDS})")
    options = parse(parser, arguments, steps=1, seeds=2)
    effort = Effort(options.steps, options.seeds, len(RATES))
    if options.quick:
        effort = Effort(4, 2, 2)
    problems: dict[str, Any] = {}
    with threads():
        record = provenance(options, PACKAGES, __doc__)
        for key in options.problems:
            problem = PROBLEMS[key]
            print(f"{problem.title}\n{HEADER}", flush=True)
            methods: dict[str, Any] = {}
            for name in options.methods:
                methods[name] = judge(problem, name, effort, torch.device(options.device))
                print(row(name, methods[name]), flush=True)
            compare(methods)
            problems[key] = {"title": problem.title, "methods": methods}
    for found in problems.values():
        print("\n".join(["", found["title"], HEADER]))
        print("\n".join(row(name, method) for name, method in found["methods"].items()))
    print(LEGEND)
    result = {"answer": answer(problems), **effort._asdict(), **record, "problems": problems}
    return finish(options, "pinn", result, figure.draw)


if __name__ == "__main__":
    main()
