r"""The conflict-averse problem: the best step, for the worst-off task, in a ball around the mean gradient.

In coordinates z of the unit gradients, relative to the length of the mean gradient :math:`g_0`, the step is
:math:`g_0 + J^\top D^{-1} z`. With :math:`\gamma_i = \cos(g_i, g_0)`, the cosine matrix C and
:math:`a_i = 1/|g_i|` up to a common factor, it is optimal if for some :math:`\mu` (the gain of the worst-off task)

.. math:: z \ge 0, \quad \lambda = C z + \gamma - \mu a \ge 0, \quad z^\top \lambda = 0, \quad z^\top C z = c^2,

a quadratic problem over the orthant with one more unknown. On a given set of positive coordinates z is linear in
:math:`\mu`, and the last condition a quadratic equation for it.

Where some convex combination of the gradients vanishes, not all tasks can gain: :math:`\mu` is at most 0, and of the
steps that reach 0 the one nearest to the mean gradient is taken, its projection on the dual cone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from agsurgery.methods._cosine import NOISE, Cosines, squared_norm, times
from agsurgery.methods._quadratic import (
    ENUMERATED,
    all_sets,
    candidate_sets,
    least_violating,
    minimise,
    solve_on_sets,
    with_ridge,
)
from agsurgery.methods._simplex import shortest_combination

_ROUNDS = 12
"""Of the search beyond the enumerated sizes: enough for imbalance of 1e6 and for dependent gradients."""


def conflict_averse_weights(split: Cosines, c: float) -> Tensor:
    """Weights of the conflict-averse update, on the scale of the sum.

    Args:
        split: norms and cosines of the Gramian, `(..., K)` and `(..., K, K)`.
        c: radius of the ball around the mean gradient, relative to its norm.

    Returns:
        `(..., K)`; those of the plain sum where the mean gradient is zero.
    """
    present = split.present
    if c == 0:
        return torch.ones_like(present)
    total = squared_norm(present, split).sqrt().unsqueeze(-1)  # K |g_0|: K cancels
    absent = 1 - present
    matrix = split.matrix + torch.diag_embed(absent)
    # An absent task stays in the system, so that shapes do not depend on data, at a cost that nobody pays.
    toward_mean = times(split.matrix, split.norms) / total + absent * (2 + c)
    combination = shortest_combination(split)
    reach = (combination.point * times(split.matrix, combination.point)).sum(-1, keepdim=True)
    vanishes = reach <= NOISE * combination.point.sum(-1, keepdim=True).square()
    nearest = minimise(matrix, toward_mean.unsqueeze(-2)).squeeze(-2)
    inside = (nearest * times(matrix, nearest)).sum(-1, keepdim=True) <= c * c
    problem = (with_ridge(matrix), toward_mean / c, combination.price)
    small = present.shape[-1] <= ENUMERATED
    boundary = c * (_enumerate(*problem) if small else _search(*problem, c))
    point = torch.where(vanishes & inside, nearest, boundary)
    weights = 1 + total * point * split.reciprocals
    # The weight of a zero gradient cannot change the update, but a head may be scaled by it.
    return torch.where((present == 0) | (total == 0), 1.0, weights)


def _enumerate(matrix: Tensor, toward_mean: Tensor, price: Tensor) -> Tensor:
    """Solution for radius 1 by trying every set of positive coordinates."""
    sets = all_sets(price.shape[-1], matrix)
    return least_violating(*_on_sets(matrix, toward_mean, price, sets))


def _on_sets(
    matrix: Tensor, toward_mean: Tensor, price: Tensor, sets: Tensor
) -> tuple[Tensor, Tensor]:
    """Points of radius 1 on each set, both of them where there are two, and their slacks.

    Args:
        matrix: `(..., K, K)`.
        toward_mean: `(..., K)`.
        price: a, `(..., K)`.
        sets: indicators, `(S, K)` or `(S, ..., K)`.

    Returns:
        Points and slacks, both `(2 S, ..., K)`.
    """
    if sets.dim() < matrix.dim():
        sets = sets.view(sets.shape[0], *(1,) * (matrix.dim() - 2), sets.shape[-1])
    fixed, moving = _lines(matrix, toward_mean, price, sets)
    points, slacks = [], []
    for sign in (1.0, -1.0):
        gain = _gain(matrix, fixed, moving, sign)
        point = fixed + gain * moving
        points.append(point)
        slacks.append(times(matrix, point) + toward_mean - gain * price)
    return torch.cat(points), torch.cat(slacks)


def _lines(
    matrix: Tensor, toward_mean: Tensor, price: Tensor, sets: Tensor
) -> tuple[Tensor, Tensor]:
    """On each set the point is `fixed + mu moving`."""
    sides = torch.stack((-toward_mean, price), dim=-2)
    fixed, moving = solve_on_sets(matrix, sides, sets).unbind(-2)
    return fixed, moving


def _gain(matrix: Tensor, fixed: Tensor, moving: Tensor, sign: float = 1.0) -> Tensor:
    """The mu for which `fixed + mu moving` has length 1 in the metric of the matrix, or comes nearest to it."""
    square = (moving * times(matrix, moving)).sum(-1, keepdim=True)
    mixed = (moving * times(matrix, fixed)).sum(-1, keepdim=True)
    rest = (fixed * times(matrix, fixed)).sum(-1, keepdim=True) - 1
    root = (mixed.square() - square * rest).clamp(min=0).sqrt()
    # The form that does not cancel: one root is the quotient, the other follows from their product.
    large = -(mixed + torch.where(mixed < 0, -root, root))
    first = torch.where((mixed < 0) == (sign > 0), large / square, rest / large)
    return torch.where(root == 0, -mixed / square, first)


def _search(matrix: Tensor, toward_mean: Tensor, price: Tensor, c: float) -> Tensor:
    """Solution for radius 1 by Newton's method on the gain.

    The step for a given gain is the nearest one that reaches it, a problem that `minimise` solves. Its length is a
    convex function of the gain, so that Newton's method converges from anywhere; each of its steps is the closed form
    on a set.
    """
    gain = torch.zeros_like(price.narrow(-1, 0, 1))
    low, high = gain - torch.inf, gain + (1 + 1 / c) * (1 + NOISE)
    for _ in range(_ROUNDS):
        point, slack = _nearest(matrix, toward_mean, price, gain)
        excess = (point * times(matrix, point)).sum(-1, keepdim=True) - 1
        long = excess > 0
        low, high = torch.where(long, low, gain), torch.where(long, gain, high)
        sets = (point > slack).to(point.dtype)
        fixed, moving = _lines(matrix, toward_mean, price, sets)
        newton = _gain(matrix, fixed, moving)
        between = torch.where(low.isfinite(), (low + high) / 2, 2 * high - 1)
        # Where several sets meet in one point, Newton's step on one of them may lead nowhere.
        moves = ((newton - gain).abs() > NOISE * (1 + gain.abs())) | (excess.abs() <= NOISE)
        gain = torch.where((newton >= low) & (newton <= high) & moves, newton, between)
    point, slack = _nearest(matrix, toward_mean, price, gain)
    points, slacks = _on_sets(matrix, toward_mean, price, candidate_sets(point, slack))
    length = (point * times(matrix, point)).sum(-1, keepdim=True).sqrt()
    points = torch.cat((points, (point / length).unsqueeze(0)))
    slacks = torch.cat((slacks, (slack + times(matrix, point) * (1 / length - 1)).unsqueeze(0)))
    return least_violating(points, slacks)


def _nearest(
    matrix: Tensor, toward_mean: Tensor, price: Tensor, gain: Tensor
) -> tuple[Tensor, Tensor]:
    """Point and slack of the nearest step with a given gain."""
    linear = toward_mean - gain * price
    point = minimise(matrix, linear.unsqueeze(-2)).squeeze(-2)
    return point, times(matrix, point) + linear
