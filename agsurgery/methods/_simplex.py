r"""The shortest convex combination of the task gradients, :math:`\min_w w^\top G w` over the simplex.

In coordinates :math:`u_i = w_i |g_i|` of the unit gradients, with the price :math:`a_i = 1/|g_i|` up to a common
factor, the simplex is :math:`a^\top u = 1, u \ge 0`. Minimising
:math:`\tfrac12 u^\top (C + a a^\top) u - a^\top u` over the orthant alone gives a multiple of the same point: with
:math:`s = a^\top u` its conditions are :math:`C u - (1 - s) a \ge 0`, tight where u is positive, and
:math:`0 < s \le 1`, with equality where the shortest combination is zero. So there is no equality to keep.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from agsurgery.methods._cosine import NOISE, Cosines
from agsurgery.methods._quadratic import minimise


@dataclass(frozen=True)
class Combination:
    """`point` u and `price` a, both `(..., K)`; a is 1 for the shortest gradient and 0 for an absent one."""

    point: Tensor
    price: Tensor

    @property
    def weights(self) -> Tensor:
        """`(..., K)` convex weights of the gradients."""
        share = self.point * self.price
        return share / share.sum(-1, keepdim=True)


def shortest_combination(split: Cosines) -> Combination:
    """Solve for gradients given by norms and cosines; absent tasks get weight 0."""
    absent = 1 - split.present
    shortest = torch.where(split.norms == 0, torch.inf, split.norms).amin(-1, keepdim=True)
    price = torch.where(split.norms == 0, 0.0, shortest * split.reciprocals)
    if price.shape[-1] == 2:
        return Combination(_pair(split, price), price)
    matrix = split.matrix + price.unsqueeze(-1) * price.unsqueeze(-2) + torch.diag_embed(absent)
    point = minimise(matrix, (absent - price).unsqueeze(-2)).squeeze(-2)
    return Combination(point, price)


def _pair(split: Cosines, price: Tensor) -> Tensor:
    r"""A multiple of the point for two tasks: :math:`u \propto C^{-1} a`, or one task alone where that is negative."""
    rest = price - split.matrix.diagonal(1, -2, -1) * price.flip(-1)
    # Equal gradients leave nothing but rounding, and may be mixed in any proportion.
    equal = rest.amax(-1, keepdim=True) <= NOISE**2
    return torch.where(equal, split.present, rest.clamp(min=0))
