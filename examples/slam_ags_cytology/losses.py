"""The two objectives of the pretraining, on projector outputs.

Both work on rows of unit length, u = z / |z|, and on their cosines.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def contrastive_loss(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    r"""NT-Xent: each view must find its other view among all views of the batch.

    .. math::
        -\frac{1}{2N} \sum_a \log \frac{\exp(u_a \cdot u_{p(a)} / \tau)}{\sum_{k \ne a} \exp(u_a \cdot u_k / \tau)}

    Args:
        first: `(N, d)` first views.
        second: `(N, d)` second views, same order.
        temperature: tau > 0.

    Returns:
        Scalar. :math:`\ln(2N - 1)` when all rows are equal: see `chance`.

    References:
        Chen et al., [A Simple Framework for Contrastive Learning](https://arxiv.org/abs/2002.05709), 2020, equation 1.
    """
    count = first.shape[0]
    rows = functional.normalize(torch.cat((first, second)), dim=1)
    logits = rows @ rows.T / temperature
    logits = logits.masked_fill(
        torch.eye(2 * count, dtype=torch.bool, device=rows.device), -torch.inf
    )
    partner = torch.arange(2 * count, device=rows.device).roll(count)
    return functional.cross_entropy(logits, partner)


def chance(count: int) -> float:
    """Value of `contrastive_loss` on `count` patches that tells no two rows apart, ln(2N - 1)."""
    return float(torch.log(torch.tensor(2.0 * count - 1)))


def similarity_loss(rows: Tensor, temperature: float) -> Tensor:
    r"""Mean distance, in cosine, between all pairs of rows: zero when every row is equal.

    .. math:: \frac{1}{\tau} \Big(1 - \frac{|\sum_a u_a|^2 - R}{R (R - 1)}\Big)

    This closed form needs O(R d) operations and no R x R matrix. It is what the supervised contrastive loss of the
    published code amounts to, where `temperature` = 0.07 only multiplies the loss by 14.3.

    Args:
        rows: `(R, d)` all views of the batch, R >= 2.
        temperature: tau > 0; 1 leaves the loss in units of cosine.

    Returns:
        Scalar between 0 and `2 / temperature`.
    """
    count = rows.shape[0]
    units = functional.normalize(rows, dim=1)
    mean_cosine = (units.sum(0).square().sum() - units.square().sum()) / (count * (count - 1))
    return (1 - mean_cosine) / temperature
