"""Row norms and cosines of a Gramian: the scale-free coordinates in which every method works."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

NOISE = 1e-6
"""Share of a squared length below which a difference of vectors is what rounding left over, and its direction
means nothing: the entries of a float32 Gramian are good to about 2e-7."""


class Cosines(NamedTuple):
    """`norms` `(K,)`, their reciprocals `(K,)` (0 for a zero row), and the cosine `matrix` `(K, K)`."""

    norms: Tensor
    reciprocals: Tensor
    matrix: Tensor


def cosines(gramian: Tensor) -> Cosines:
    r"""Split a Gramian :math:`G = D C D` into row norms :math:`D` and cosines :math:`C`.

    A zero row has cosine 0 with every other row, so that an absent task conflicts with nobody; the diagonal
    is 1 up to rounding for all other rows. NaN and infinity come out as NaN.
    """
    norms = gramian.diagonal().clamp(min=0).sqrt()
    reciprocals = torch.where(norms == 0, 0.0, norms.reciprocal())
    matrix = (gramian * reciprocals.unsqueeze(0) * reciprocals.unsqueeze(1)).clamp(-1, 1)
    return Cosines(norms, reciprocals, matrix)


def squared_norm(weights: Tensor, split: Cosines) -> Tensor:
    r""":math:`|J^\top w|^2`, never negative, computed on the cosines."""
    scaled = weights * split.norms
    return (scaled @ split.matrix @ scaled).clamp(min=0)
