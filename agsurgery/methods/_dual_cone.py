r"""Projection on the dual cone of the task gradients: the vectors that oppose none of them.

The projection of :math:`J^\top u` is :math:`J^\top v` with :math:`v = \arg\min_{v \ge u} v^\top G v`. In coordinates
:math:`y = D v` of the unit gradients and :math:`y = D u + z` it is a problem over the orthant, on the cosines:
imbalance of the gradients enters only the linear term.
"""

from __future__ import annotations

import torch
from torch import Tensor

from agsurgery.methods._cosine import Cosines
from agsurgery.methods._quadratic import minimise


def project(split: Cosines, vectors: Tensor) -> Tensor:
    """Coordinates of the projections of several vectors.

    Args:
        split: norms and cosines of the Gramian.
        vectors: `(..., R, K)` coordinates on the unit gradients, D u, zero for absent tasks.

    Returns:
        `(..., R, K)` coordinates y on the unit gradients.
    """
    absent = (1 - split.present).unsqueeze(-2)
    matrix = split.matrix + torch.diag_embed(absent.squeeze(-2))
    # A positive linear term keeps an absent task out of it for certain.
    size = vectors.abs().amax(-1, keepdim=True)
    linear = vectors @ split.matrix + absent * torch.where(size == 0, 1.0, size)
    return vectors + minimise(matrix, linear)
