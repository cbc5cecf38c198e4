"""The two-loss landscape of CAGrad and Nash-MTL: its losses with their gradients, and its Pareto set."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import optimize
from torch import Tensor

Array = NDArray[np.float64]

STARTS = ((-8.5, 7.5), (0.0, 0.0), (9.0, 9.0), (-7.5, -0.5), (9.0, -1.0))
SCALE = 0.1  # of the first loss, as Nash-MTL has it
FLOOR = 5e-6  # under the logarithm
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
