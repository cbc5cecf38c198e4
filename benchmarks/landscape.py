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
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import integrate, optimize
from torch import Tensor

import agsurgery
from benchmarks._cli import new_parser, parse, result_path
from benchmarks._measure import environment, write_json
from benchmarks._plots import colour, new_figure, save_svg

Array = NDArray[np.float64]

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


# -- the landscape --------------------------------------------------------------------------------

STARTS = ((-8.5, 7.5), (0.0, 0.0), (9.0, 9.0), (-7.5, -0.5), (9.0, -1.0))
SCALE = 0.1  # of the first loss, as Nash-MTL has it
FLOOR = 5e-6  # under the logarithm
RATE, STEPS = 1e-3, 35_000
REACHED = 0.1  # distance to the Pareto set


class Both(NamedTuple):
    """Two losses at S points: `values` `(S, 2)` and `gradients` `(S, 2, n)`."""

    values: Tensor
    gradients: Tensor


def toy(points: Tensor) -> Both:
    """Both losses at `(S, 2)` points.

    L_i = max(tanh(y / 2), 0) f_i + max(tanh(-y / 2), 0) g_i, with
    f_1 = log max(|(-x - 7) / 2 - tanh(-y)|, FLOOR) + 6, f_2 = log max(|(-x + 3) / 2 + tanh(-y) + 2|, FLOOR) + 6,
    g_1 = ((x - 7)^2 + (y + 8)^2 / 10) / 10 - 20 and g_2 the same with x + 7; L_1 times SCALE.
    """
    x, y = points.unsqueeze(-2).unbind(-1)  # (S, 1)
    sign, side, scale = points.new_tensor([[1.0, -1.0], [7.0, -7.0], [SCALE, 1.0]]).unbind()
    half, bend = torch.tanh(y / 2), torch.tanh(y)
    above, below = half.clamp(min=0), (-half).clamp(min=0)
    slope = 0.5 - 0.5 * half.square()
    # At y = 0 both sides count, as autograd has it for clamp.
    above_slope, below_slope = slope * (y >= 0), -slope * (y <= 0)

    valley = (-x - side) / 2 + sign * bend  # (-x + 3) / 2 + 2 is (-x + 7) / 2
    f = valley.abs().clamp(min=FLOOR).log() + 6
    inverse = torch.where(valley.abs() >= FLOOR, 1 / valley, 0.0)
    f_x, f_y = -0.5 * inverse, sign * (1 - bend.square()) * inverse

    g = ((x - side).square() + (y + 8).square() / 10) / 10 - 20
    g_x, g_y = (x - side) / 5, (y + 8) / 50

    values = scale * (above * f + below * g)
    along_x = above * f_x + below * g_x
    along_y = above * f_y + above_slope * f + below * g_y + below_slope * g
    return Both(values, scale.unsqueeze(-1) * torch.stack([along_x, along_y], -1))


def toy_pareto_set(points: int = 200) -> Array:
    """`(points, 2)` points of the Pareto set from one end to the other.

    They minimise t L_1 + (1 - t) L_2 in the bowl: x, from the derivatives along x, runs from -7 to 7, and y is found
    by a bracketing solver.
    """

    def slope(y: float, x: float) -> float:
        """Derivative along y of the weighted sum that has its minimum at x."""
        weights = ((x + 7) / 14, (7 - x) / 14)
        bowls = [((x - side) ** 2 + (y + 8) ** 2 / 10) / 10 - 20 for side in (7, -7)]
        bowl = sum(w * b for w, b in zip(weights, bowls, strict=True))
        return float(-0.5 / np.cosh(y / 2) ** 2 * bowl + np.tanh(-y / 2) * (y + 8) / 50)

    xs = np.linspace(-7, 7, points)
    return np.array([[x, optimize.brentq(slope, -10.0, -7.0, args=(x,), xtol=1e-12)] for x in xs])


def distance_to_curve(point: Array, curve: Array) -> float:
    """Distance of a point to a polyline."""
    start, step = curve[:-1], np.diff(curve, axis=0)
    along = ((point - start) * step).sum(1) / (step**2).sum(1)
    nearest = start + np.clip(along, 0, 1)[:, None] * step
    return float(np.linalg.norm(nearest - point, axis=1).min())


# -- quadratics -----------------------------------------------------------------------------------

DIMENSIONS, PAIRS = 10, 5
LARGER = (1.0, 100.0)  # scale of the second loss over the first
SMALL_STEPS = 10_000


class Pair(NamedTuple):
    """Two losses (p - a_i)' A_i (p - a_i) / 2; `matrices` `(2, n, n)`, `centres` `(2, n)`."""

    matrices: Array
    centres: Array

    @classmethod
    def draw(cls, seed: int, larger: float) -> Pair:
        """Eigenvalues from 1 to 10, the second matrix times `larger`."""
        generator = np.random.default_rng(seed)
        matrices = []
        for scale in (1.0, larger):
            basis = np.linalg.qr(generator.normal(size=(DIMENSIONS, DIMENSIONS)))[0]
            matrices.append(scale * (basis * np.geomspace(1, 10, DIMENSIONS)) @ basis.T)
        return cls(np.stack(matrices), generator.normal(size=(2, DIMENSIONS)))

    def gradients(self, point: Array) -> Array:
        """`(2, n)` gradients."""
        found: Array = np.einsum("kij,kj->ki", self.matrices, point - self.centres)
        return found

    def best(self, share: float) -> Array:
        """The minimum of share L_1 + (1 - share) L_2: for 0 <= share <= 1 these are the Pareto set."""
        first, second = share * self.matrices[0], (1 - share) * self.matrices[1]
        found: Array = np.linalg.solve(
            first + second, first @ self.centres[0] + second @ self.centres[1]
        )
        return found

    def distance(self, point: Array) -> float:
        """Distance of a point to the Pareto set."""

        def squared(logit: float) -> float:
            return float(((self.best(1 / (1 + np.exp(-logit))) - point) ** 2).sum())

        grid = np.linspace(-25, 25, 501)  # the ends are the minima of the losses, to 1e-11
        middle = grid[int(np.argmin([squared(v) for v in grid]))]
        bounds = (middle - 0.1, middle + 0.1)
        found = optimize.minimize_scalar(
            squared, bounds=bounds, method="bounded", options={"xatol": 1e-10}
        )
        return float(np.sqrt(found.fun))

    @property
    def rate(self) -> float:
        """A small learning rate: a hundredth of what the sum is stable with."""
        return float(0.02 / np.linalg.eigvalsh(self.matrices.sum(0))[-1])


def start_of(pair: Pair) -> Array:
    """On neither side: a point off the Pareto set, the same in every run."""
    return pair.centres.mean(0) + 2.0


def flow_pcgrad(a: Array, b: Array) -> Array:
    """PCGrad for two vectors."""
    inner = a @ b
    if inner >= 0:
        return a + b
    return a + b - inner / (b @ b) * b - inner / (a @ a) * a


def flow_ags(a: Array, b: Array) -> Array:
    """AGS for two vectors, with its cap."""
    update = flow_pcgrad(a, b)
    return min(10.0, float(np.linalg.norm(a + b) / np.linalg.norm(update))) * update


def flow_mgda(a: Array, b: Array) -> Array:
    """Twice the shortest convex combination of two vectors."""
    apart = b - a
    share = np.clip(b @ apart / (apart @ apart), 0, 1)
    return 2 * (share * a + (1 - share) * b)


def flow_config(a: Array, b: Array) -> Array:
    """The bisector, as long as the sum of both projections on it."""
    bisector = a / np.linalg.norm(a) + b / np.linalg.norm(b)
    bisector = bisector / np.linalg.norm(bisector)
    return ((a + b) @ bisector) * bisector


def flow_dualproj(a: Array, b: Array) -> Array:
    """The sum, without its component against the vector that it opposes."""
    total = a + b
    for vector in (a, b):
        if total @ vector < 0:
            return total - total @ vector / (vector @ vector) * vector
    return total


FLOWS = {
    "AGS": flow_ags,
    "PCGrad": flow_pcgrad,
    "ConFIG": flow_config,
    "MGDA": flow_mgda,
    "DualProj": flow_dualproj,
}
OF_THE_SUM = ("Sum", "CAGrad")
"""Methods that end at the minimum of the sum."""


def predicted(method: str, pair: Pair, duration: float) -> Array | None:
    """Where a method must end, by a linear system or an ODE solver; None where neither tells."""
    if method in OF_THE_SUM:
        return pair.best(0.5)
    if method not in FLOWS:
        return None
    flow = FLOWS[method]

    def velocity(_: float, point: Array) -> Array:
        return -flow(*pair.gradients(point))

    tolerances = {"rtol": 1e-8, "atol": 1e-10}
    solved = integrate.solve_ivp(
        velocity, (0, duration), start_of(pair), method="LSODA", **tolerances
    )
    end: Array = solved.y[:, -1]
    return end


# -- running --------------------------------------------------------------------------------------


def updates(method: Any, gradients: Tensor) -> Tensor:
    """`(S, n)` combined gradients of S problems, from `(S, 2, n)`."""
    weights = method(gradients @ gradients.mT)
    return (weights.unsqueeze(-2) @ gradients).squeeze(-2)


def measure_toy(name: str, steps: int, keep: int, device: torch.device) -> dict[str, Any]:
    """One method on the landscape."""
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
        "path": np.round(np.stack(path), 3).tolist(),
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


def draw(methods: dict[str, Any], path: Path) -> None:
    """The paths of each method over the mean of the two losses, with the Pareto set."""
    columns = 4
    rows = -(-len(methods) // columns)
    figure = new_figure(3.2 * columns, 3.1 * rows)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    axis = torch.linspace(-10, 10, 121, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)
    values = toy(grid.view(-1, 2)).values.view(*grid.shape)
    height = (values[..., 0] / SCALE + values[..., 1]).numpy()
    curve = toy_pareto_set()
    names = list(methods)
    for axes, (name, found) in zip(panels, methods.items(), strict=False):
        axes.contour(axis, axis, height, levels=14, cmap="Greys", linewidths=0.5, alpha=0.6)
        axes.plot(*curve.T, color="0.5", linewidth=4, alpha=0.7)
        for line in np.array(found["landscape"]["path"]).transpose(1, 0, 2):
            axes.plot(*line.T, color=colour(name, names), linewidth=1.3)
            axes.plot(*line[0], "o", color="black", markersize=3)
            axes.plot(*line[-1], "*", color=colour(name, names), markersize=9)
        title = f"{name}: {found['landscape']['reached']} of {len(STARTS)}"
        axes.set(title=title, xlim=(-10.5, 10.5), ylim=(-10.5, 10.5))
    for axes in panels[len(methods) :]:
        axes.set_visible(False)
    save_svg(figure, path)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark with command line arguments; returns what the JSON file holds."""
    assert __doc__ is not None
    parser = new_parser(__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    options = parse(parser, arguments)
    device, threads = torch.device(options.device), torch.get_num_threads()
    steps, small_steps, keep = (20, 20, 5) if options.quick else (STEPS, SMALL_STEPS, 200)
    torch.set_num_threads(1)
    methods: dict[str, Any] = {}
    try:
        record = environment(device, PACKAGES)
        record["versions"]["agsurgery"] = agsurgery.__version__
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
    finally:
        torch.set_num_threads(threads)
    summary = answer(methods)
    result = {
        "question": __doc__.splitlines()[0],
        "answer": summary,
        "device": options.device,
        "steps": steps,
        "small_steps": small_steps,
        **record,
        "methods": methods,
    }
    out = result_path(options, "landscape")
    if out is not None:
        draw(methods, out.with_suffix(".svg"))
        for found in methods.values():
            del found["landscape"]["path"]  # in the figure
        write_json(out, result)
    print(LEGEND)
    print(summary)
    return result


if __name__ == "__main__":
    main()
