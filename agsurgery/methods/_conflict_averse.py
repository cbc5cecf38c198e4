r"""The conflict-averse problem on K x K data.

In coordinates :math:`u_i = v_i |g_i|` of the unit gradients, with :math:`\gamma_i = \cos(g_i, g_0)`,
the cosine matrix C and :math:`a_i = 1/|g_i|` up to a common factor,

.. math:: \min_u \; \gamma^\top u + c \sqrt{u^\top C u} \quad \text{such that} \quad u \ge 0,\; a^\top u = 1,

every number is of order one at any scale of the gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from agsurgery.methods._cosine import NOISE, Cosines, squared_norm

_STEPS = (
    40  # of the interior-point method: twice what most problems take, enough for imbalance of 1e6
)
_SHRINK = 0.2
_SOLVED = 1e-12  # mean product of slack and multiplier, in units where all data are of order one
_SMALLEST_GAP = 1e-14
_RIDGE = NOISE  # on the cosines: bounds the weights where gradients are dependent up to rounding


def conflict_averse_weights(split: Cosines, c: float) -> Tensor:
    """Weights of the conflict-averse update for any number of tasks, on the scale of the sum.

    Args:
        split: norms and cosines of the Gramian.
        c: radius of the ball around the mean gradient, relative to its norm.

    Returns:
        `(K,)`; the plain sum where the mean gradient is zero.
    """
    present = (split.norms != 0).to(split.norms.dtype)
    mean_norm = squared_norm(present, split).sqrt()  # K |g_0|: K cancels on the scale of the sum
    if c == 0:
        return torch.ones_like(present)
    toward_mean = split.matrix @ split.norms / mean_norm
    # An absent task is kept in the system, so that shapes do not depend on data, but made too costly to choose.
    cost = torch.where(present == 0, 10 * (1 + c), toward_mean)
    smallest = torch.where(present == 0, torch.inf, split.norms).amin()
    price = torch.where(present == 0, 1.0, smallest * split.reciprocals)
    matrix = split.matrix + torch.diag(1 - present + _RIDGE)
    direction = present * _interior_point(cost, matrix, price, c)
    weights = present + c * mean_norm * direction * split.reciprocals
    # The weight of a zero gradient cannot change the update, but a head may be scaled by it.
    return torch.where((present == 0) | (mean_norm == 0), 1.0, weights)


def _interior_point(cost: Tensor, matrix: Tensor, price: Tensor, c: float) -> Tensor:
    r"""Subgradient of the norm at the minimiser: :math:`u / \sqrt{u^\top C u}` where that is not 0/0.

    A primal-dual path: with barrier parameter mu the norm is smoothed to :math:`t = \mu/c + \sqrt{\mu^2/c^2 + u^\top
    C u}`, the value that a logarithmic barrier for its cone gives, and the subgradient `pull` (rho, with
    :math:`t \rho = c u` on the path) is an unknown of its own. So the kink at the origin does no harm (as in
    Chan, Golub and Mulet, 1999, for total variation). A fixed number of Newton steps, no branch on data.
    """
    identity = torch.eye(cost.shape[0], dtype=cost.dtype, device=cost.device)
    point = torch.ones_like(cost) / price.sum()
    dual = torch.full_like(cost, 1 + c)
    multiplier = cost.new_zeros(())
    pull = torch.zeros_like(cost)
    gap = (point * dual).mean()  # the barrier parameter
    for _ in range(_STEPS):
        image, pulled = matrix @ point, matrix @ pull
        norm = (point @ image).clamp(min=0).sqrt()
        slack = (point @ dual + (c * norm - pull @ image).clamp(min=0)) / (cost.shape[0] + 1)
        done = (
            slack < _SOLVED
        )  # going on would only pile up rounding where the solution is not unique
        gap = torch.where(done, gap, (_SHRINK * torch.minimum(gap, slack)).clamp(min=_SMALLEST_GAP))
        smooth = gap / c
        root = (smooth.square() + norm.square()).sqrt()
        length = smooth + root
        mixed = torch.outer(pulled, image) / root
        hessian = (c * matrix - (mixed + mixed.T) / 2) / length
        # (H + diag(dual / point)) is scaled to I + S H S, which is well conditioned at the boundary.
        scaling = (point / dual).sqrt()
        system = identity + scaling.unsqueeze(1) * hessian * scaling
        residual = multiplier * price - cost - c * image / length + gap / point
        sides = scaling.unsqueeze(1) * torch.stack((residual, price), dim=1)
        solved = scaling.unsqueeze(1) * torch.linalg.solve_ex(system, sides)[0]
        newton, slope = solved.unbind(1)
        shift = (1 - price @ point - price @ newton) / (price @ slope)
        step = newton + shift * slope
        stretch = (image @ step) / root
        next_pull = (c * (point + step) - pull * stretch) / length
        next_pull = next_pull * (c / (next_pull @ matrix @ next_pull).clamp(min=0).sqrt()).clamp(
            max=1
        )
        dual_step = gap / point - dual - dual / point * step
        trial = (next_pull + step + dual_step + shift).sum()
        done = done | (trial - trial != 0)  # rounding broke the step down: stay where we are
        pull = torch.where(done, pull, next_pull)
        dual = torch.where(done, dual, _keep_positive(dual, dual_step))
        point = torch.where(done, point, _keep_positive(point, step))
        multiplier = torch.where(done, multiplier, multiplier + shift)
    return pull / c


def _keep_positive(value: Tensor, step: Tensor) -> Tensor:
    """Go along `step`, at most 99.5 % of the way to the boundary of the positive orthant."""
    reach = torch.where(step < 0, -value / step, torch.inf).amin()
    return value + (0.995 * reach).clamp(max=1) * step


def conflict_averse_pair(split: Cosines, c: float) -> Tensor:
    r"""Closed form of `conflict_averse_weights` for two tasks.

    Either the best step serves both alike: its pull along :math:`g_1 - g_2` is what makes
    :math:`\langle g_1, d\rangle = \langle g_2, d\rangle`, and the rest of the radius goes toward the shortest
    point of the line through both. Or one task is worse off everywhere in the ball, and gets the whole radius.

    All lengths below are relative to the shorter gradient, so that nothing cancels under imbalance.
    """
    present = (split.norms != 0).to(split.norms.dtype)
    mean_norm = squared_norm(present, split).sqrt()
    norms = split.norms / torch.where(present == 0, torch.inf, split.norms).amin()
    cosine = split.matrix.diagonal(1).squeeze(0)
    sine_squared = 1 - cosine.square()
    sine_squared = torch.where(sine_squared < NOISE, 0.0, sine_squared)
    first, second = norms.unbind()
    difference = (
        first - cosine * second,
        second - cosine * first,
    )  # <g1-g2, g1> / |g1| and <g2-g1, g2> / |g2|
    length = (first * difference[0] + second * difference[1]).clamp(min=0)  # |g1 - g2|^2
    total = (norms.square().sum() + 2 * cosine * first * second).clamp(min=0).sqrt()  # |g1 + g2|
    radius = c * total
    # On the scale of the sum, d = g1 + g2 + r; equal service asks for <r, g1 - g2> = |g2|^2 - |g1|^2.
    along = (second - first) * (second + first) / length
    across = (radius.square() - along.square() * length).clamp(min=0).sqrt()
    altitude = (
        (sine_squared / length).clamp(min=0).sqrt()
    )  # shortest point of the line, over |g1| |g2|
    share = (
        torch.stack((second * difference[1], first * difference[0])) / length
    )  # its weights on g1 and g2
    lift = torch.where(altitude == 0, 0.0, across * share / (altitude * first * second))
    both = torch.stack((along, -along)) + lift
    # Otherwise the task that stays worse off: the one with the smaller optimum when alone.
    alone = norms * (split.matrix @ norms + radius)
    worse = 0.5 + 0.5 * torch.sign(
        alone.flip(0) - alone
    )  # (1, 0), (0, 1), or halves for equal gradients
    only = radius * worse / norms
    # Opposite gradients: any pull along their line is a sum of the two with positive coefficients.
    cone = torch.where(sine_squared == 0, cosine < 0, (both >= 0).all())
    fits = cone & (along.square() * length <= radius.square())
    weights = 1 + torch.where(fits, both, only)
    single = present * (1 + c)  # one task alone, or none
    weights = torch.where(present.all() | torch.isnan(mean_norm), weights, single)
    # The weight of a zero gradient cannot change the update, but a head may be scaled by it.
    return torch.where((present == 0) | (mean_norm == 0), 1.0, weights)
