r"""Convex quadratic problems over the positive orthant, for K tasks at once.

.. math:: \min_z \; \tfrac12 z^\top M z + q^\top z \quad \text{such that} \quad z \ge 0,

with M positive semidefinite and its diagonal of order one. The dual cone of the gradients and the simplex of
their convex combinations both come down to it. Up to `ENUMERATED` tasks every set of positive coordinates is tried
at once, which is exact and costs one batched solve; beyond, an interior-point method with a fixed number of
steps finds the set. Neither reads a value on the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from agsurgery.methods._cosine import times

ENUMERATED = 8
"""Largest number of tasks for which all 2^K sets of positive coordinates are tried."""

RIDGE = 1e-13
"""On the diagonal: among the solutions that dependent gradients leave, the one that treats equals alike."""

STEPS = 16
"""Of an interior-point method: 13 solve what is not degenerate; what is, the last candidate set makes exact."""

SOLVED = 1e-15
"""Mean product of coordinate and slack at which steps end, for linear terms of order one."""


def minimise(matrix: Tensor, linear: Tensor) -> Tensor:
    """Solve one problem for each vector in `linear`.

    Args:
        matrix: M, `(..., K, K)`, float64, positive semidefinite.
        linear: q, `(..., R, K)`; R problems share a matrix.

    Returns:
        `(..., R, K)` solutions z, not negative.
    """
    matrix = with_ridge(matrix)
    size = linear.abs().amax(-1, keepdim=True)
    size = torch.where(size == 0, 1.0, size)
    solver = _enumerate if matrix.shape[-1] <= ENUMERATED else _interior_point
    return solver(matrix, linear / size) * size


def with_ridge(matrix: Tensor) -> Tensor:
    """The matrix with `RIDGE` added to its diagonal."""
    return matrix + RIDGE * torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)


def all_sets(tasks: int, like: Tensor) -> Tensor:
    """`(2^K, K)` indicators, 0 or 1, of all sets of tasks."""
    numbers = torch.arange(2**tasks, device=like.device).unsqueeze(-1)
    bits = torch.arange(tasks, device=like.device)
    return ((numbers >> bits) & 1).to(like.dtype)


def solve_on_sets(matrix: Tensor, sides: Tensor, sets: Tensor) -> Tensor:
    """Solutions x of `M x = s` in the coordinates of a set, zero outside.

    Args:
        matrix: `(..., K, K)`.
        sides: right-hand sides s, `(..., R, K)`.
        sets: `(..., K)` indicators.

    Returns:
        `(..., R, K)`; not finite, or meaningless, where the matrix is singular on the set.
    """
    columns = sets.unsqueeze(-1)
    masked = columns * matrix * sets.unsqueeze(-2) + torch.diag_embed(1 - sets)
    solved: Tensor = torch.linalg.solve_ex(masked, columns * sides.mT)[0]
    return solved.mT


def least_violating(points: Tensor, slacks: Tensor) -> Tensor:
    """The candidate for which `min(z, slack)`, zero at a solution, is nearest to zero in all coordinates.

    Args:
        points: z, `(S, ..., K)`.
        slacks: gradient of the objective there, `(S, ..., K)`.

    Returns:
        `(..., K)`, clamped to be not negative.
    """
    violation = torch.minimum(points, slacks).abs().amax(-1, keepdim=True)
    violation = torch.where(violation.isfinite(), violation, torch.inf)
    best = violation.argmin(0, keepdim=True).expand(1, *points.shape[1:])
    return points.gather(0, best).squeeze(0).clamp(min=0)


def _enumerate(matrix: Tensor, linear: Tensor) -> Tensor:
    tasks = matrix.shape[-1]
    sets = all_sets(tasks, matrix)
    points = solve_on_sets(matrix.unsqueeze(-3), -linear.unsqueeze(-3), sets).movedim(-3, 0)
    return least_violating(points, points @ matrix + linear)


def _interior_point(matrix: Tensor, linear: Tensor) -> Tensor:
    """Mehrotra's predictor and corrector, then exact solutions on the sets that they point to.

    Newton's equations are scaled to `I + S M S` with `S^2 = diag(z / slack)`, well conditioned at the boundary.
    Points and slacks go through all steps as one tensor, because the time goes into the number of operations.
    """
    matrix = matrix.unsqueeze(-3)
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    pair = linear.new_ones(2, *linear.shape)  # z, slack
    for _ in range(STEPS):
        point, slack = pair.unbind()
        products = point * slack
        ratio = slack / point
        scaling = ratio.rsqrt().unsqueeze(-1)
        factor = torch.linalg.cholesky_ex(identity + scaling * matrix * scaling.mT)[0]
        force = linear + times(matrix, point)
        predictor = _step(factor, scaling, ratio, -force, -slack)
        reach = _longest(pair, predictor)
        left = (pair + reach * predictor).prod(0).mean(-1, keepdim=True)
        mean = products.mean(-1, keepdim=True)
        centring = (left.pow(3) / mean.square() - predictor.prod(0)) / point
        step = _step(factor, scaling, ratio, centring - force, centring - slack)
        done = mean < SOLVED  # going on would only pile up rounding
        pair = torch.where(done, pair, pair + 0.995 * _longest(pair, step) * step)
    point, slack = pair.unbind()
    candidates = [point.unsqueeze(0)]
    sets = candidate_sets(point, slack)
    for _ in range(3):
        candidates.append(solve_on_sets(matrix, -linear.unsqueeze(-2), sets).squeeze(-2))
        # Of two opposite gradients one is enough, and with both the system leaves it open which.
        sets = sets * (candidates[-1] > 0)
    points = torch.cat(candidates)
    return least_violating(points, times(matrix, points) + linear)


def _step(
    factor: Tensor, scaling: Tensor, ratio: Tensor, force: Tensor, slack_force: Tensor
) -> Tensor:
    """Newton step of point and slack, `(2, ..., K)`."""
    # Two triangular solutions: `cholesky_solve` takes three times as long for small systems.
    half = torch.linalg.solve_triangular(factor, scaling * force.unsqueeze(-1), upper=False)
    point = (scaling * torch.linalg.solve_triangular(factor.mT, half, upper=True)).squeeze(-1)
    return torch.stack((point, slack_force - ratio * point))


def _longest(pair: Tensor, step: Tensor) -> Tensor:
    """Largest step, at most 1, that keeps points and slacks from becoming negative; `(..., 1)`."""
    return 1 / (-step / pair).amax((0, -1)).clamp(min=1).unsqueeze(-1)


def candidate_sets(point: Tensor, slack: Tensor) -> Tensor:
    """Sets of positive coordinates, `(3, ..., K)`, that an interior point close to the solution leaves possible.

    Where a coordinate and its slack both vanish at the solution, they are still of one size. With or without such
    coordinates the solution is the same, but on a set with dependent gradients it may not be computable.
    """
    return torch.stack([(point > ratio * slack).to(point.dtype) for ratio in (1e-4, 1.0, 1e4)])
