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

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import agsurgery
from agsurgery import ConflictMonitor, SurgeryReport
from benchmarks._cli import new_parser, parse, result_path
from benchmarks._intervals import Interval
from benchmarks._measure import environment, write_json
from benchmarks._optimizers import Adam
from benchmarks._plots import dots, new_figure, save_svg

PACKAGES = ("torch", "numpy", "scipy", "matplotlib")
VISCOSITY = 0.05 / math.pi
WAVES = (1, 2)  # half periods of the Helmholtz solution on [0, 1]
SIZES = (2, 20, 20, 20, 1)  # of the layers
INSIDE, BORDER = 128, 64  # points of a step
STEPS, SEEDS = 2000, 6
RATES = (3e-3, 1e-2, 3e-2, 1e-1)
TUNING_SEEDS = (1000, 1001)  # one alone chooses rates with which most runs fail
FAILED = 10.0  # relative errors are cut off here: a network without any training has 1
WATCHED = 20  # every n-th step goes to the monitor


# -- network --------------------------------------------------------------------------------------


class Jet(NamedTuple):
    """R functions of two coordinates at n points each, with first and pure second derivatives, all `(R, n)`."""

    value: Tensor
    first: tuple[Tensor, Tensor]
    second: tuple[Tensor, Tensor]


def initial(generator: torch.Generator) -> Tensor:
    """Parameters of one tanh network from two coordinates to one value, in a row: Xavier weights, zero biases."""
    parts = []
    for before, after in itertools.pairwise(SIZES):
        spread = math.sqrt(2 / (before + after))
        parts += [spread * torch.randn(before * after, generator=generator), torch.zeros(after)]
    return torch.cat(parts)


def layers(parameters: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Weights `(R, before, after)` and biases `(R, 1, after)` of R networks, views of `(R, p)` parameters."""
    found, start = [], 0
    for before, after in itertools.pairwise(SIZES):
        weight = parameters.narrow(1, start, before * after).view(-1, before, after)
        bias = parameters.narrow(1, start + before * after, after).unsqueeze(1)
        found.append((weight, bias))
        start += (before + 1) * after
    return found


def values(parameters: Tensor, points: Tensor) -> Tensor:
    """`(R, n)` values of R networks at `(R, n, 2)` points."""
    *hidden, (weight, bias) = layers(parameters)
    for inner, offset in hidden:
        points = torch.tanh(torch.baddbmm(offset, points, inner))
    return torch.baddbmm(bias, points, weight).squeeze(-1)


def jet(parameters: Tensor, points: Tensor) -> Jet:
    """The values with their derivatives, carried forward through the layers: one graph, one backward pass."""
    units = torch.eye(2, dtype=points.dtype, device=points.device)
    value, first = points, [unit.expand_as(points) for unit in units.unbind()]
    second = [torch.zeros_like(points)] * 2
    *hidden, last = layers(parameters)
    for weight, bias in hidden:
        moved = torch.cat([value, *first, *second], 1) @ weight
        value, x, y, xx, yy = moved.chunk(5, 1)
        value = torch.tanh(value + bias)
        slope = 1 - value.square()
        bend = -2 * value * slope
        first = [slope * x, slope * y]
        second = [slope * xx + bend * x.square(), slope * yy + bend * y.square()]
    moved = (torch.cat([value, *first, *second], 1) @ last[0]).squeeze(-1)
    value, x, y, xx, yy = moved.chunk(5, 1)
    return Jet(value + last[1].squeeze(-1), (x, y), (xx, yy))


# -- problems -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """An equation on a box.

    Attributes:
        title: for the table.
        low: lower corner.
        high: upper corner.
        residual: violation of the equation, from points and jet.
        border: draws points at which the solution is given, for some steps, with its values.
        reference: `(n,)` solution at `(n, 2)` points, float64.
    """

    title: str
    low: tuple[float, float]
    high: tuple[float, float]
    residual: Callable[[Tensor, Jet], Tensor]
    border: Callable[[int, torch.Generator], tuple[Tensor, Tensor]]
    reference: Callable[[np.ndarray], np.ndarray]

    def inside(self, steps: int, generator: torch.Generator) -> Tensor:
        """`(steps, INSIDE, 2)` uniform points."""
        low, high = torch.tensor(self.low), torch.tensor(self.high)
        return low + (high - low) * torch.rand(steps, INSIDE, 2, generator=generator)

    def grid(self, count: int = 101) -> np.ndarray:
        """`(count * count, 2)` points to judge the error at."""
        axes = [np.linspace(a, b, count) for a, b in zip(self.low, self.high, strict=True)]
        return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 2)


def burgers_reference(points: np.ndarray, nodes: int = 200) -> np.ndarray:
    """Solution of Burgers at `(n, 2)` points x, t by the Cole-Hopf formula.

    u = -int sin(pi y) f(y) e dz / int f(y) e dz, with y = x - 2 sqrt(nu t) z, f(y) = exp(-cos(pi y) / (2 pi nu)) and
    e = exp(-z^2), the weight of Gauss-Hermite quadrature (Basdevant et al., 1986).
    """
    z, weights = np.polynomial.hermite.hermgauss(nodes)
    x, t = points[:, :1], points[:, 1:]
    y = x - 2 * np.sqrt(VISCOSITY * t) * z
    exponent = -np.cos(np.pi * y) / (2 * np.pi * VISCOSITY)
    with np.errstate(divide="ignore"):  # the outermost weights underflow
        exponent = exponent + np.log(weights)
    mass = np.exp(exponent - exponent.max(axis=1, keepdims=True))
    found: np.ndarray = -(mass * np.sin(np.pi * y)).sum(1) / mass.sum(1)
    return found


def burgers_residual(points: Tensor, jet: Jet) -> Tensor:
    """u_t + u u_x - nu u_xx."""
    return jet.first[1] + jet.value * jet.first[0] - VISCOSITY * jet.second[0]


def burgers_border(steps: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`(steps, BORDER, 2)` points with their values: half of them at t = 0, a quarter at each end."""
    half = BORDER // 2
    x = 2 * torch.rand(steps, half, generator=generator) - 1
    t = torch.rand(steps, half, generator=generator)
    zero = torch.zeros(steps, half)
    ends = torch.where(torch.arange(half) % 2 == 0, -1.0, 1.0).expand(steps, half)
    points = torch.cat([torch.stack([x, zero], -1), torch.stack([ends, t], -1)], 1)
    return points, torch.cat([-torch.sin(math.pi * x), zero], 1)


def helmholtz_reference(points: np.ndarray) -> np.ndarray:
    """sin(pi x) sin(4 pi y)."""
    found: np.ndarray = np.prod(np.sin(np.pi * np.array(WAVES) * points), axis=1)
    return found


def helmholtz_residual(points: Tensor, jet: Jet) -> Tensor:
    """u_xx + u_yy + u - f."""
    waves = math.pi * torch.tensor(WAVES, dtype=points.dtype, device=points.device)
    solution = torch.sin(waves * points).prod(-1)
    force = (1 - waves.square().sum()) * solution
    return jet.second[0] + jet.second[1] + jet.value - force


def helmholtz_border(steps: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`(steps, BORDER, 2)` points, a quarter on each side, where the solution is zero."""
    along = 2 * torch.rand(steps, BORDER, generator=generator) - 1
    side = torch.arange(BORDER) % 4
    fixed = torch.where(side % 2 == 0, -1.0, 1.0).expand(steps, BORDER)
    vertical = side < 2
    points = torch.stack(
        [torch.where(vertical, fixed, along), torch.where(vertical, along, fixed)], -1
    )
    return points, torch.zeros(steps, BORDER)


PROBLEMS = {
    "burgers": Problem(
        "Burgers", (-1.0, 0.0), (1.0, 1.0), burgers_residual, burgers_border, burgers_reference
    ),
    "helmholtz": Problem(
        "Helmholtz",
        (-1.0, -1.0),
        (1.0, 1.0),
        helmholtz_residual,
        helmholtz_border,
        helmholtz_reference,
    ),
}


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


def draw(problems: dict[str, Any], path: Path) -> None:
    """One dot for each run, a bar for each geometric mean."""
    figure = new_figure(5.2 * len(problems), 3.6)
    panels = figure.subplots(1, len(problems), squeeze=False)[0]
    for axes, found in zip(panels, problems.values(), strict=True):
        methods = found["methods"].items()
        errors = {name: method["errors"] for name, method in methods}
        dots(axes, errors, {name: method["error"]["mean"] for name, method in methods})
        axes.set_yscale("log")
        axes.set(title=found["title"], ylabel="relative L2 error")
    save_svg(figure, path)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark with command line arguments; returns what the JSON file holds."""
    assert __doc__ is not None
    parser = new_parser(__doc__.splitlines()[0])
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--steps", type=int, default=STEPS, help=f"(default: {STEPS})")
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"(default: {SEEDS})")
    options = parse(parser, arguments, steps=1, seeds=2)
    device, threads = torch.device(options.device), torch.get_num_threads()
    effort = Effort(options.steps, options.seeds, len(RATES))
    if options.quick:
        effort = Effort(4, 2, 2)
    torch.set_num_threads(1)
    problems: dict[str, Any] = {}
    try:
        record = environment(device, PACKAGES)
        record["versions"]["agsurgery"] = agsurgery.__version__
        for key in options.problems:
            problem = PROBLEMS[key]
            print(f"{problem.title}\n{HEADER}", flush=True)
            methods: dict[str, Any] = {}
            for name in options.methods:
                methods[name] = judge(problem, name, effort, device)
                print(row(name, methods[name]), flush=True)
            compare(methods)
            problems[key] = {"title": problem.title, "methods": methods}
    finally:
        torch.set_num_threads(threads)
    for found in problems.values():
        print("\n".join(["", found["title"], HEADER]))
        print("\n".join(row(name, method) for name, method in found["methods"].items()))
    summary = answer(problems)
    result = {
        "question": __doc__.splitlines()[0],
        "answer": summary,
        "device": options.device,
        **effort._asdict(),
        **record,
        "problems": problems,
    }
    out = result_path(options, "pinn")
    if out is not None:
        write_json(out, result)
        draw(problems, out.with_suffix(".svg"))
    print(LEGEND)
    print(summary)
    return result


if __name__ == "__main__":
    main()
