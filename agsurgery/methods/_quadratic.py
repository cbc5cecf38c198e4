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
"""Mean product of coordinate and multiplier at which steps end, for linear terms of order one."""


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
    """Mehrotra's predictor and corrector, then the exact solution on the set they point to."""
    matrix = matrix.unsqueeze(-3)
    point = torch.ones_like(linear)
    dual = torch.ones_like(linear)
    for _ in range(STEPS):
        product = (point * dual).mean(-1, keepdim=True)
        newton = Newton(matrix, point, dual)
        force = -times(matrix, point) - linear
        step = newton.solve(force)
        dual_step = newton.dual_step(step)
        target, second_order = newton.corrector(step, dual_step, product)
        step = newton.solve(force + (target - second_order) / point)
        dual_step = newton.dual_step(step) + (target - second_order) / point
        done = product < SOLVED  # going on would only pile up rounding
        reach = 0.995 * longest_step(point, step, dual, dual_step)
        point = torch.where(done, point, point + reach * step)
        dual = torch.where(done, dual, dual + reach * dual_step)
    candidates = [point.unsqueeze(0)]
    sets = candidate_sets(point, dual)
    for _ in range(3):
        candidates.append(solve_on_sets(matrix, -linear.unsqueeze(-2), sets).squeeze(-2))
        # Of two opposite gradients one is enough, and with both the system leaves it open which.
        sets = sets * (candidates[-1] > 0)
    points = torch.cat(candidates)
    return least_violating(points, times(matrix, points) + linear)


def candidate_sets(point: Tensor, dual: Tensor) -> Tensor:
    """Sets of positive coordinates, `(3, ..., K)`, that an interior point close to the solution leaves possible.

    Where a coordinate and its multiplier both vanish at the solution, they are still of one size. With or without such
    coordinates the solution is the same, but on a set with dependent gradients it may not be computable.
    """
    return torch.stack([(point > ratio * dual).to(point.dtype) for ratio in (1e-4, 1.0, 1e4)])


class Newton:
    r"""Newton's equations :math:`(M + \mathrm{diag}(\lambda / z))\,x = s` of an interior point.

    Scaled to :math:`I + S M S` with :math:`S^2 = \mathrm{diag}(z / \lambda)`, well conditioned at the boundary.

    Args:
        matrix: M, `(..., K, K)`.
        point: z > 0, `(..., K)`.
        dual: multipliers, positive, `(..., K)`.
    """

    def __init__(self, matrix: Tensor, point: Tensor, dual: Tensor) -> None:
        self.point, self.dual = point, dual
        self._scaling = (point / dual).sqrt()
        identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        scaled = self._scaling.unsqueeze(-1) * matrix * self._scaling.unsqueeze(-2)
        self._factor = torch.linalg.cholesky_ex(identity + scaled)[0]

    def solve(self, side: Tensor) -> Tensor:
        """Solution for one right-hand side `(..., K)`."""
        side = (self._scaling * side).unsqueeze(-1)
        return self._scaling * torch.cholesky_solve(side, self._factor).squeeze(-1)

    def dual_step(self, step: Tensor) -> Tensor:
        """Step of the multipliers that brings the products with the coordinates to zero, to first order."""
        return -self.dual - self.dual / self.point * step

    def corrector(self, step: Tensor, dual_step: Tensor, product: Tensor) -> tuple[Tensor, Tensor]:
        """Mehrotra's target for the products, and the second-order term that the predictor left out."""
        reach = longest_step(self.point, step, self.dual, dual_step)
        reached = (self.point + reach * step) * (self.dual + reach * dual_step)
        ratio = reached.mean(-1, keepdim=True) / product
        return ratio.pow(3) * product, step * dual_step


def longest_step(point: Tensor, step: Tensor, dual: Tensor, dual_step: Tensor) -> Tensor:
    """Largest step, at most 1, that keeps point and multipliers from becoming negative; `(..., 1)`."""
    value, change = torch.cat((point, dual), dim=-1), torch.cat((step, dual_step), dim=-1)
    reach = torch.where(change < 0, -value / change, torch.inf)
    return reach.amin(-1, keepdim=True).clamp(max=1)
