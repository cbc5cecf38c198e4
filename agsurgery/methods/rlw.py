"""RLW: weigh losses at random."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from agsurgery.methods._base import LossMethod, Reduction
from agsurgery.methods._random import Draws, uniform


class RLW(LossMethod):
    r"""Random loss weighting: :math:`w = K\,\mathrm{softmax}(z)` with z standard normal, drawn anew in each step.

    Args:
        seed: of the draws. Equal seeds give equal weights on every rank.
        reduction: see `Method`. The paper's weights sum to 1, which is the scale of the mean.

    Example:
        >>> import torch
        >>> round(float(RLW()(torch.ones(4)).sum()), 6)
        4.0

    References:
        Lin et al., [Reasonable Effectiveness of Random Weighting](https://arxiv.org/abs/2111.10603), 2022.
    """

    def __init__(self, *, seed: int = 0, reduction: Reduction = "sum") -> None:
        super().__init__(reduction=reduction)
        self._random = Draws(seed)

    @property
    def seed(self) -> int:
        """The seed in use: that of the checkpoint, once one was loaded."""
        return self._random.seed

    def _weigh(self, losses: Tensor, tasks: tuple[str, ...]) -> Tensor:
        drawn = uniform(self._random.next(losses.device), len(tasks))
        normal: Tensor = torch.special.ndtri(drawn)
        return len(tasks) * normal.softmax(0).to(losses.dtype)

    def state(self) -> Mapping[str, Tensor]:
        """Seed and number of the draws so far."""
        return self._random.tensors()
