r"""Singular values and vectors of K x K matrices, and what follows from them for cosine matrices.

LAPACK has no host to wait for on the CPU. On an accelerator its counterparts wait for the device to say whether they
converged, which cannot be captured in a CUDA graph; there a Jacobi method in torch operations takes their place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from agsurgery.methods._cosine import NOISE, Cosines


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Singular value decomposition :math:`A = U S V^T`.

    Args:
        matrix: `(..., K, K)`, float64.

    Returns:
        U, singular values `(..., K)` in descending order, V^T. Columns of U are zero where the singular value is, on
        an accelerator.
    """
    if matrix.device.type == "cpu":
        left, values, right = torch.linalg.svd(_finite(matrix))
        return left, values, right
    return jacobi_svd(matrix)


def symmetric(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors, in columns, and eigenvalues of a positive semidefinite matrix, in any order."""
    if matrix.device.type == "cpu":
        values, vectors = torch.linalg.eigh(_finite(matrix))
        return vectors, values
    vectors, values, _ = jacobi_svd(matrix)
    return vectors, values


def _finite(matrix: Tensor) -> Tensor:
    """LAPACK refuses NaN and infinity; the answer for them is made NaN later, by `solve`."""
    return torch.nan_to_num(matrix, 0.0, 0.0, 0.0)


def jacobi_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same by Hestenes' method: rotate pairs of columns until all are orthogonal.

    The pairs of a round are disjoint and rotate together; K - 1 rounds meet every pair once (a round-robin tournament).
    Small columns beside large ones keep their relative precision.
    """
    size = matrix.shape[-1]
    width = size + size % 2
    padding = (0, width - size, 0, width - size)
    columns = torch.nn.functional.pad(matrix, padding)
    vectors = torch.eye(width, dtype=matrix.dtype, device=matrix.device).expand_as(columns)
    stacked = torch.cat((columns, vectors), dim=-2)  # both are rotated alike
    for _ in range(_sweeps(size) * (width - 1)):
        first, second = stacked.chunk(2, dim=-1)
        a, b = first.narrow(-2, 0, width), second.narrow(-2, 0, width)
        inner = (a * b).sum(-2, keepdim=True)
        difference = b.square().sum(-2, keepdim=True) - a.square().sum(-2, keepdim=True)
        angle = 0.5 * torch.atan2(2 * inner, difference.abs())
        angle = torch.where(difference < 0, -angle, angle)
        cosine, sine = angle.cos(), angle.sin()
        rotated = (cosine * first - sine * second, sine * first + cosine * second)
        stacked = _next_round(*rotated)
    columns, vectors = stacked.chunk(2, dim=-2)
    values = columns.square().sum(-2).sqrt()
    ranks = values.argsort(dim=-1, descending=True)
    values = values.gather(-1, ranks)
    columns = columns.gather(-1, ranks.unsqueeze(-2).expand_as(columns))
    vectors = vectors.gather(-1, ranks.unsqueeze(-2).expand_as(vectors))
    left = torch.where(values.unsqueeze(-2) == 0, 0.0, columns / values.unsqueeze(-2))
    left, vectors = (m.narrow(-1, 0, size).narrow(-2, 0, size) for m in (left, vectors))
    return left, values.narrow(-1, 0, size), vectors.mT


def _sweeps(size: int) -> int:
    """At least one more than nearly equal gradients need, which converge last: 4 for 3, 7 for 8, 12 for 32."""
    return 3 + 2 * (size - 1).bit_length()


def _next_round(first: Tensor, second: Tensor) -> Tensor:
    """All columns in their seats for the next round: the first stays, all others move on by one, around both halves.

    By slices, since an index made on the host could not be copied in a CUDA graph.
    """
    half = first.shape[-1]
    if half == 1:
        return torch.cat((first, second), dim=-1)
    start, middle, end = torch.split(first, [1, half - 2, 1], dim=-1)
    joining, moving = torch.split(second, [1, half - 1], dim=-1)
    return torch.cat((start, joining, middle, moving, end), dim=-1)


def least_squares(split: Cosines, target: Tensor) -> Tensor:
    """The shortest y with C y nearest to `target`, both `(..., K)`; zero where only rounding is near to it.

    So it is for exactly opposite gradients and equal targets: nothing has equal cosines with both.
    """
    if target.shape[-1] == 2:
        # The eigenvectors are (1, 1) and (1, -1), which serves as well beside an absent task, at cosine 0.
        cosine = split.matrix.diagonal(1, -2, -1)
        mean = target.mean(-1, keepdim=True)
        half = torch.where(1 + cosine <= NOISE, 0.0, mean / (1 + cosine))
        other = torch.where(1 - cosine <= NOISE, 0.0, (target - mean) / (1 - cosine))
        return half + other
    return Spectrum(split).least_squares(target)


class Spectrum:
    r"""Eigenvalues and eigenvectors of the cosine matrix, without those that are rounding noise.

    Args:
        split: norms and cosines of the Gramian.

    Attributes:
        vectors: `(..., K, K)`, one eigenvector in each column.
        values: `(..., K)` eigenvalues, 0 for those below `NOISE` times the largest.
        kept: `(..., K)`, 1 for the others and 0 for those.
    """

    def __init__(self, split: Cosines) -> None:
        self.vectors, values = symmetric(split.matrix)
        self.kept = (values > NOISE * values.amax(-1, keepdim=True)).to(values.dtype)
        self.values = values * self.kept

    def least_squares(self, target: Tensor) -> Tensor:
        """See the function of this name."""
        coordinates = (self.vectors.mT @ target.unsqueeze(-1)).squeeze(-1) * self.kept
        reached = coordinates.square().sum(-1, keepdim=True)
        noise = reached <= NOISE * target.square().sum(-1, keepdim=True)
        solved = torch.where((self.kept == 0) | noise, 0.0, coordinates / self.values)
        return (self.vectors @ solved.unsqueeze(-1)).squeeze(-1)
