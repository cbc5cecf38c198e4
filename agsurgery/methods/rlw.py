"""RLW: weigh losses at random."""

from __future__ import annotations

import torch
from torch import Tensor

from agsurgery.methods._base import LossMethod
from agsurgery.methods._random import Seeded, uniform


class RLW(Seeded, LossMethod):
    r"""Random loss weighting: :math:`w = K\,\mathrm{softmax}(z)` with z standard normal, drawn anew in each step.

    Args:
        seed: of the draws. Equal seeds give equal weights on every rank.
        reduction: `"mean"` divides by K. The paper's weights sum to 1, which is the scale of the mean.

    Example:
        >>> import torch
        >>> round(float(RLW()(torch.ones(4)).sum()), 6)
        4.0

    References:
        Lin et al., [Reasonable Effectiveness of Random Weighting](https://arxiv.org/abs/2111.10603), 2022.
    """

    def _weigh(self, losses: Tensor, tasks: tuple[str, ...]) -> Tensor:
        drawn = uniform(self._random.next(losses.device), len(tasks))
        normal: Tensor = torch.special.ndtri(drawn)
        return len(tasks) * normal.softmax(0).to(losses.dtype)
