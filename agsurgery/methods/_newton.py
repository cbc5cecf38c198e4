r"""The stationary point of a fair utility: :math:`C y = c\,y^{-1/\alpha}`, :math:`y > 0`, on the cosine matrix C.

It is the minimum of a strictly convex function. Newton's method takes y and the utility's slope :math:`\lambda` as
unknowns of their own, :math:`C y = c \lambda` and :math:`\log y + \alpha \log \lambda = 0`: both are nearly linear
where the function itself has the poles of a barrier, and ten steps solve most problems.
"""

from __future__ import annotations

import torch
from torch import Tensor

from agsurgery.methods._cosine import NOISE, times

_STEPS = 24  # ten solve most problems, eighteen an imbalance of 1e6 at alpha = 2
_RIDGE = 1e-15  # bounds y where gradients are exactly opposite and there is no solution
_SOLVED = 1e-14


def fair_point(matrix: Tensor, price: Tensor, alpha: float) -> Tensor:
    """Solve for y.

    Args:
        matrix: C, `(..., K, K)`, positive semidefinite with unit diagonal.
        price: c, positive, `(..., K)`.
        alpha: positive.

    Returns:
        y `(..., K)`; zero where the update is a rounding error of its parts, as when there is no solution because some
        convex combination of the gradients vanishes.
    """
    if alpha == 1 and matrix.shape[-1] == 2:
        return _pair(matrix, price)
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    matrix = matrix + _RIDGE * identity
    point = price ** (alpha / (1 + alpha))  # the solution for orthogonal gradients
    slope = point ** (-1 / alpha)
    for _ in range(_STEPS if 0.5 <= alpha <= 2 else 2 * _STEPS):
        pull = price * slope
        gap = times(matrix, point) - pull
        mismatch = point.log() + alpha * slope.log()
        error = torch.maximum((gap / pull).abs(), mismatch.abs()).amax(-1, keepdim=True)
        # (C + diag(pull / (alpha y))) step = force, scaled to I + S C S.
        scaling = (alpha * point / pull).sqrt().unsqueeze(-1)
        factor = torch.linalg.cholesky_ex(identity + scaling * matrix * scaling.mT)[0]
        force = scaling * (-gap - pull * mismatch / alpha).unsqueeze(-1)
        half = torch.linalg.solve_triangular(factor, force, upper=False)
        step = torch.linalg.solve_triangular(factor.mT, half, upper=True)
        step = (scaling * step).squeeze(-1)
        slope_step = -(slope / alpha) * (mismatch + step / point)
        shrink = torch.maximum(-step / point, -slope_step / slope).amax(-1, keepdim=True)
        reach = 0.9 / shrink.clamp(min=0.9)  # at most 90 % of the way to zero
        done = error < _SOLVED
        point = torch.where(done, point, point + reach * step)
        slope = torch.where(done, slope, slope + reach * slope_step)
    length = (price * point * slope).sum(-1, keepdim=True)  # squared, of the update
    return torch.where(length <= NOISE * point.sum(-1, keepdim=True).square(), 0.0, point)


def _pair(matrix: Tensor, price: Tensor) -> Tensor:
    """Closed form for two tasks and alpha = 1: of the quadratic equations for y_1 and y_2 the positive solution."""
    cosine = matrix.diagonal(1, -2, -1)
    # With r = y_2 / y_1: y_1^2 (1 + cos r) = c_1 and y_1^2 (r^2 + cos r) = c_2.
    first, second = price.narrow(-1, 0, 1), price.narrow(-1, 1, 1)
    slope = cosine * (second - first)
    root = (slope.square() + 4 * first * second).sqrt()
    ratio = torch.where(slope < 0, 2 * second / (root - slope), (slope + root) / (2 * first))
    length = first / (1 + cosine * ratio)
    point = torch.where(length > 0, length, 0.0).sqrt() * torch.cat(
        (torch.ones_like(ratio), ratio), -1
    )
    noise = price.sum(-1, keepdim=True) <= NOISE * point.sum(-1, keepdim=True).square()
    return torch.where(noise | point.isinf().any(-1, keepdim=True), 0.0, point)
