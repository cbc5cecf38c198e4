"""What do the methods cost on K x K Gramians, and how exact are they, beside TorchJD's?

Three parts, in one run: the time of a call (medians of interleaved rounds), the error of the update against a conic
solver or a closed form on the gradients themselves, and the share of random imbalanced gradients for which the
update opposes some task by more than 0.01 in cosine.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import agsurgery
from benchmarks._cli import finish, new_parser, parse, provenance, threads
from benchmarks._measure import Spread, interleaved, waiter
from benchmarks.figures import solver_cost as figure

PACKAGES = ("torch", "torchjd", "quadprog", "cvxpy", "clarabel", "scipy")
SIZES = (2, 4, 8, 16, 32)
COLUMNS = 64
OPPOSED = -0.01

Update = Callable[[Tensor], Tensor]
"""From `(K, n)` gradients to the `(n,)` update."""


def random_rows(tasks: int, ratio: float, columns: int, seed: int) -> Tensor:
    """`(K, n)` independent gradients with norms spread from 1 to `ratio` on a logarithmic scale, shuffled."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(tasks, columns, dtype=torch.float64, generator=generator)
    scales = torch.logspace(0, math.log10(ratio), tasks, dtype=torch.float64)
    order = torch.randperm(tasks, generator=generator)
    return torch.nn.functional.normalize(rows, dim=1) * scales[order].unsqueeze(1)


# -- oracles: unit vectors along the exact update ---------------------------------------------------


def _program(build: Callable[[Any, Any], Any], rows: Tensor) -> Tensor:
    """Solve a convex program over weights of the unit gradients; the update it gives."""
    import cvxpy

    units = torch.nn.functional.normalize(rows, dim=1)
    factor = torch.linalg.qr(units.T)[1].numpy()
    point = cvxpy.Variable(len(rows))
    tolerances = dict.fromkeys(("tol_gap_abs", "tol_gap_rel", "tol_feas"), 1e-12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it asks for more digits than it can prove
        build(factor @ point, point).solve(solver=cvxpy.CLARABEL, **tolerances)
    return torch.from_numpy(point.value) @ units


def _dual_cone(rows: Tensor, lower: Tensor) -> Tensor:
    import cvxpy

    def build(vector: Any, point: Any) -> Any:
        return cvxpy.Problem(cvxpy.Minimize(cvxpy.sum_squares(vector)), [point >= lower.numpy()])

    return _program(build, rows)


def oracle_upgrad(rows: Tensor) -> Tensor:
    """Sum of the projections, each by the conic solver."""
    corners = torch.eye(len(rows), dtype=rows.dtype)
    parts = [norm * _dual_cone(rows, e) for norm, e in zip(rows.norm(dim=1), corners, strict=True)]
    return torch.stack(parts).sum(0)


def oracle_dualproj(rows: Tensor) -> Tensor:
    """Projection of the sum."""
    norms = rows.norm(dim=1)
    return norms.max() * _dual_cone(rows, norms / norms.max())


def oracle_mgda(rows: Tensor) -> Tensor:
    """Shortest convex combination."""
    import cvxpy

    price = (rows.norm(dim=1).min() / rows.norm(dim=1)).numpy()

    def build(vector: Any, point: Any) -> Any:
        return cvxpy.Problem(
            cvxpy.Minimize(cvxpy.sum_squares(vector)), [point >= 0, price @ point == 1]
        )

    return _program(build, rows)


def oracle_cagrad(rows: Tensor, c: float = 0.5) -> Tensor:
    """Best worst case in the ball around the mean gradient."""
    import cvxpy

    units = torch.nn.functional.normalize(rows, dim=1)
    basis, triangle = torch.linalg.qr(rows.T)
    mean = triangle.mean(1)
    mean = mean / mean.norm()
    price = (rows.norm(dim=1).min() / rows.norm(dim=1)).numpy()
    step, worst = cvxpy.Variable(triangle.shape[0]), cvxpy.Variable()
    constraints = [
        (units @ basis).numpy() @ step >= cvxpy.multiply(price, worst),
        cvxpy.norm(step - mean.numpy()) <= c,
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cvxpy.Problem(cvxpy.Maximize(worst), constraints).solve(
            solver=cvxpy.CLARABEL, tol_gap_abs=1e-12, tol_gap_rel=1e-12, tol_feas=1e-12
        )
    return basis @ torch.from_numpy(step.value)


def oracle_nash(rows: Tensor) -> Tensor:
    """Stationary point of half the squared length less the logarithms of the weights."""
    import cvxpy

    def build(vector: Any, point: Any) -> Any:
        objective = cvxpy.sum_squares(vector) / 2 - cvxpy.sum(cvxpy.log(point))
        return cvxpy.Problem(cvxpy.Minimize(objective))

    return _program(build, rows)


def oracle_equal_cosines(rows: Tensor) -> Tensor:
    """Least-squares solution of equal inner products with the unit gradients."""
    units = torch.nn.functional.normalize(rows, dim=1)
    return torch.linalg.pinv(units) @ torch.ones(len(rows), dtype=rows.dtype)


def oracle_aligned(rows: Tensor) -> Tensor:
    """All singular values of the matrix of gradients replaced by one."""
    left, _, right = torch.linalg.svd(rows, full_matrices=False)
    return left.sum(0) @ right


def oracle_pcgrad(rows: Tensor) -> Tensor:
    """Two gradients, each without its component against the other."""
    first, second = rows
    inner = min(float(first @ second), 0.0)
    return first + second - inner / (second @ second) * second - inner / (first @ first) * first


# -- what is compared -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """A method of ours, that of TorchJD, and what both should give.

    `promises`: ours opposes no task, whatever the gradients. `sizes`: for which K the oracle knows the answer.
    """

    ours: Callable[[], Callable[[Tensor], Tensor]]
    peer: str | None
    peer_options: dict[str, Any]
    oracle: Update | None
    promises: bool = False
    sizes: tuple[int, ...] = (4, 16)


PAIRS = {
    "PCGrad": Pair(agsurgery.PCGrad, "PCGradWeighting", {}, oracle_pcgrad, sizes=(2,)),
    "AGS": Pair(agsurgery.AGS, None, {}, oracle_pcgrad, sizes=(2,)),
    "GradVac": Pair(agsurgery.GradVac, "GradVacWeighting", {}, None),
    "CAGrad": Pair(agsurgery.CAGrad, "CAGradWeighting", {"c": 0.5}, oracle_cagrad),
    "MGDA": Pair(agsurgery.MGDA, "MGDAWeighting", {}, oracle_mgda, promises=True),
    "UPGrad": Pair(agsurgery.UPGrad, "UPGradWeighting", {}, oracle_upgrad, promises=True),
    "DualProj": Pair(agsurgery.DualProj, "DualProjWeighting", {}, oracle_dualproj, promises=True),
    "IMTLG": Pair(agsurgery.IMTLG, "IMTLGWeighting", {}, oracle_equal_cosines),
    "NashMTL": Pair(agsurgery.NashMTL, "NashMTL", {}, oracle_nash, promises=True),
    "FairGrad": Pair(
        agsurgery.FairGrad, "FairGradWeighting", {"alpha": 1.0}, oracle_nash, promises=True
    ),
    "AlignedMTL": Pair(agsurgery.AlignedMTL, "AlignedMTLWeighting", {}, oracle_aligned),
    "ConFIG": Pair(agsurgery.ConFIG, "ConFIG", {}, oracle_equal_cosines),
}


def our_update(pair: Pair, device: torch.device) -> Update:
    """Update of our method, solved on the device."""
    method = pair.ours()
    return lambda rows: method((rows @ rows.T).to(device)).to(rows.device) @ rows


def make_peer(pair: Pair, tasks: int) -> tuple[Callable[[Tensor], Tensor], bool]:
    """TorchJD's method, and whether it takes the matrix of gradients instead of the Gramian.

    Raises:
        ImportError: it is not there.
    """
    import torchjd.aggregation

    if pair.peer is None or not hasattr(torchjd.aggregation, pair.peer):
        raise ImportError(f"TorchJD has no {pair.peer or 'counterpart'}")
    options = {**pair.peer_options, **({"n_tasks": tasks} if pair.peer == "NashMTL" else {})}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of its own NashMTL
        return getattr(torchjd.aggregation, pair.peer)(**options), not pair.peer.endswith(
            "Weighting"
        )


def peer_update(pair: Pair, tasks: int) -> Update:
    """Update of the peer."""
    peer, takes_rows = make_peer(pair, tasks)
    return peer if takes_rows else lambda rows: peer(rows @ rows.T) @ rows


def attempt(update: Update, rows: Tensor) -> Tensor | None:
    """The update, or None where it fails or is not finite."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = update(rows)
    except Exception:  # whatever a solver behind it raises
        return None
    return result if bool(result.isfinite().all()) else None


# -- the three parts --------------------------------------------------------------------------------


def times(
    pair: Pair, tasks: int, device: torch.device, rounds: int, block: float
) -> dict[str, Any]:
    """Microseconds of a call, ours and the peer's."""
    rows = random_rows(tasks, 10.0, COLUMNS, seed=tasks)
    gramian, ours = rows @ rows.T, pair.ours()
    placed = gramian.to(device)
    steps: dict[str, Callable[[], None]] = {"ours": lambda: (ours(placed), None)[1]}
    try:
        peer, takes_rows = make_peer(pair, tasks)
        argument = rows if takes_rows else gramian
        peer(argument)
        steps["peer"] = lambda: (peer(argument), None)[1]
    except Exception as error:
        reason = str(error)
    samples = interleaved(
        steps, rounds=rounds, block_seconds=block, warmup=2, synchronise=waiter(device)
    )
    wall = {name: [1e6 * sample.wall for sample in found] for name, found in samples.items()}
    row: dict[str, Any] = {"ours_us": Spread.of(wall["ours"]).to_dict(1)}
    if "peer" in wall:
        row["peer_us"] = Spread.of(wall["peer"]).to_dict(1)
        ratios = [theirs / own for own, theirs in zip(wall["ours"], wall["peer"], strict=True)]
        row["peer_over_ours"] = Spread.of(ratios).to_dict(2)
    else:
        row["no_peer"] = reason
    return row


def errors(pair: Pair, inputs: int, device: torch.device) -> dict[str, Any]:
    """Largest distance from the exact update, both made unit vectors, over norms of 1 to 100."""
    if pair.oracle is None:
        return {}
    worst: dict[str, float | None] = {"ours": 0.0, "peer": 0.0}
    for tasks in pair.sizes:
        for seed in range(inputs):
            rows = random_rows(tasks, 100.0, COLUMNS, seed)
            exact = torch.nn.functional.normalize(pair.oracle(rows), dim=0)
            for name in worst:
                try:
                    made = our_update(pair, device) if name == "ours" else peer_update(pair, tasks)
                except ImportError:
                    worst[name] = None
                    continue
                update = attempt(made, rows)
                # A zero or failed update is as far from a unit vector as it can be.
                unit = torch.zeros_like(exact) if update is None else update
                unit = torch.nn.functional.normalize(unit, dim=0)
                worst[name] = max(worst[name] or 0.0, float((unit - exact).norm()))
    return worst


def opposed(update: Update, tasks: int, ratio: float, scale: float, inputs: int) -> float:
    """Share of random gradients for which the update fails or opposes a task."""
    count = 0
    for seed in range(inputs):
        rows = scale * random_rows(tasks, ratio, 8, seed)
        result = attempt(update, rows)
        if result is None:
            count += 1
            continue
        cosines = torch.nn.functional.cosine_similarity(rows / scale, result / scale, dim=1)
        count += bool((cosines < OPPOSED).any())
    return count / inputs


def conflicts(pair: Pair, inputs: int, device: torch.device) -> dict[str, Any]:
    """Largest share over 2, 3 and 5 tasks, by imbalance and scale of the gradients."""
    cells: dict[str, Any] = {}
    for ratio, scale in ((100.0, 1.0), (1000.0, 1.0), (100.0, 1e-4)):
        cell: dict[str, float | None] = {"ours": 0.0, "peer": 0.0}
        for tasks in (2, 3, 5):
            share = opposed(our_update(pair, device), tasks, ratio, scale, inputs)
            cell["ours"] = max(cell["ours"] or 0.0, share)
            try:
                theirs = opposed(peer_update(pair, tasks), tasks, ratio, scale, inputs)
            except ImportError:
                cell["peer"] = None
                continue
            cell["peer"] = max(cell["peer"] or 0.0, theirs)
        cells[f"1:{ratio:.0f}, scale {scale:g}"] = cell
    return cells


def answer(methods: dict[str, Any]) -> str:
    """The result in one sentence."""
    cells = [
        (name, int(tasks), row["peer_over_ours"]["median"])
        for name, found in methods.items()
        for tasks, row in found["time"].items()
        if "peer_over_ours" in row
    ]
    slower = [f"{name} K={tasks} ({1 / ratio:.1f}x)" for name, tasks, ratio in cells if ratio < 1]
    worst = [m["error"]["ours"] for m in methods.values() if m["error"].get("ours") is not None]
    peers = [m["error"]["peer"] for m in methods.values() if m["error"].get("peer") is not None]
    shares = {
        who: [
            cell[who]
            for name, found in methods.items()
            for cell in found["conflicts"].values()
            if PAIRS[name].promises and cell[who] is not None
        ]
        for who in ("ours", "peer")
    }
    faster = f"Answer: ours is faster in {len(cells) - len(slower)} of {len(cells)} cells"
    if slower:
        faster += f", slower in {', '.join(slower)}"
    accuracy = f"largest error {max(worst, default=0):.0e}"
    if peers:
        accuracy += f" (TorchJD {max(peers):.0e})"
    share = max(shares["ours"], default=0)
    promise = (
        f"methods that promise to oppose no task oppose one in {share:.0%} of the inputs at worst"
    )
    if shares["peer"]:
        promise += f" (TorchJD's: {max(shares['peer']):.0%})"
    return f"{faster}; {accuracy}; {promise}."


def shown(value: float | None, digits: str) -> str:
    """A number in so many digits, as `format` has them."""
    return "-" if value is None else format(value, digits)


def table(name: str, found: dict[str, Any]) -> str:
    """The three parts of one method, for the screen."""
    cells = []
    for tasks, row in found["time"].items():
        peer = f"{row['peer_us']['median']:.0f}" if "peer_us" in row else "-"
        cells.append(f"K={tasks}: {row['ours_us']['median']:.0f} / {peer}")
    lines = [f"{name}\n  us, ours / torchjd   {'   '.join(cells)}"]
    if found["error"]:
        ours, peer = (shown(found["error"][who], ".0e") for who in ("ours", "peer"))
        lines.append(f"  error                {ours} / {peer}")
    parts = [
        f"{inputs}: {shown(share['ours'], '.0%')} / {shown(share['peer'], '.0%')}"
        for inputs, share in found["conflicts"].items()
    ]
    lines.append(f"  opposes a task       {'   '.join(parts)}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark with command line arguments; returns what the JSON file holds."""
    parser = new_parser(__doc__)
    parser.add_argument("--methods", nargs="+", choices=PAIRS, help="default: all")
    parser.add_argument("--rounds", type=int, default=9, help="samples per time (default: 9)")
    parser.add_argument("--inputs", type=int, default=200, help="for the conflicts (default: 200)")
    options = parse(parser, arguments, rounds=1, inputs=1)
    device = torch.device(options.device)
    sizes, exact = (SIZES[:1], 1) if options.quick else (SIZES, 5)
    rounds, block, inputs = options.rounds, 0.02, options.inputs
    if options.quick:
        rounds, block, inputs = 1, 0.001, 3
    methods: dict[str, Any] = {}
    with threads(), torch.no_grad():
        record = provenance(options, PACKAGES, __doc__)
        for name in options.methods or PAIRS:
            pair = PAIRS[name]
            methods[name] = {
                "promises_no_conflict": pair.promises,
                "time": {str(k): times(pair, k, device, rounds, block) for k in sizes},
                "error": errors(pair, exact, device),
                "conflicts": conflicts(pair, inputs, device),
            }
            print(table(name, methods[name]), flush=True)
    print("us: median of a call; error: largest distance of unit vectors; both ours / TorchJD's")
    counts = {"rounds": rounds, "inputs": inputs}
    result = {"answer": answer(methods), **counts, **record, "methods": methods}
    return finish(options, "solver_cost", result, figure.draw)


if __name__ == "__main__":
    main()
