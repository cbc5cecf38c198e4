"""GLS: minimise the geometric mean of the losses."""

from __future__ import annotations

import torch
from torch import Tensor

from agsurgery.methods._base import LossMethod


class GLS(LossMethod):
    r"""Geometric loss strategy: minimise :math:`\bar l = (\prod_i l_i)^{1/K}`.

    Its gradient is :math:`\sum_i \bar l / (K l_i)\, g_i`; on the scale of the sum :math:`w_i = \bar l / l_i`. Every
    loss counts by its relative change.

    Args:
        reduction: `"mean"` divides by K: the gradient of the geometric mean itself.

    Note:
        Computed by logarithms, because the product of many losses leaves the range of floats. The losses must be
        positive: the weights are NaN if one is not.

    Example:
        >>> import torch
        >>> GLS()(torch.tensor([4.0, 1.0]))
        tensor([0.5000, 2.0000])

    References:
        Chennupati et al., [MultiNet++](https://arxiv.org/abs/1904.08492), 2019, equation 2.
    """

    def _weigh(self, losses: Tensor, tasks: tuple[str, ...]) -> Tensor:
        logarithms = torch.where(losses > 0, losses, torch.nan).log()
        return (logarithms.mean() - logarithms).exp()
