"""Row norms and cosines of a Gramian: the scale-free coordinates in which every method works.

All functions take leading batch dimensions (blocks of parameters), written `...`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NOISE = 1e-6
"""Share of a squared length below which a difference of vectors is what rounding left over, and its direction
means nothing: the entries of a float32 Gramian are good to about 2e-7."""


@dataclass(frozen=True)  # older compilers cannot trace a property of a NamedTuple
class Cosines:
    """`norms` `(..., K)`, their reciprocals `(..., K)` (0 for a zero row), and the cosine `matrix` `(..., K, K)`."""

    norms: Tensor
    reciprocals: Tensor
    matrix: Tensor

    @property
    def present(self) -> Tensor:
        """`(..., K)`, 1 for a task with a gradient and 0 for one without, in the dtype of the norms."""
        return (self.norms != 0).to(self.norms.dtype)


def cosines(gramian: Tensor) -> Cosines:
    r"""Split a Gramian :math:`G = D C D` into row norms :math:`D` and cosines :math:`C`.

    A zero row has cosine 0 with every other row, so that an absent task conflicts with nobody; the diagonal
    is 1 up to rounding for all other rows. NaN and infinity come out as NaN.
    """
    norms = gramian.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    reciprocals = norms.reciprocal().nan_to_num(nan=torch.nan, posinf=0.0)
    matrix = (gramian * reciprocals.unsqueeze(-2) * reciprocals.unsqueeze(-1)).clamp(-1, 1)
    return Cosines(norms, reciprocals, matrix)


def times(matrix: Tensor, vector: Tensor) -> Tensor:
    """Product of `(..., K, K)` matrices with `(..., K)` vectors."""
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def squared_norm(weights: Tensor, split: Cosines) -> Tensor:
    r""":math:`|J^\top w|^2`, never negative, computed on the cosines."""
    scaled = weights * split.norms
    return (scaled * times(split.matrix, scaled)).sum(-1).clamp(min=0)
