"""UW: weigh losses by learnt uncertainties."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from agsurgery.methods._adam import ENTRIES, adam_step
from agsurgery.methods._base import LossMethod, Reduction
from agsurgery.methods._state import TaskState


class UW(LossMethod):
    r"""Uncertainty weighting: minimise :math:`\sum_i e^{-s_i} l_i + s_i` over the network and the log-variances s.

    The weights are :math:`e^{-s_i}`, at first 1. For a constant loss s tends to :math:`\log l_i`, and the weighted
    loss to 1.

    Args:
        lr: learning rate of s, by Adam inside the method, after each use.
        reduction: `"mean"` divides by K; the paper sums.

    Raises:
        ValueError: `lr` is not positive and finite.

    Note:
        The paper halves both terms, which halves all weights; with the factor left out training starts as the plain
        sum. s moves by about `lr` in a step, so that a weight follows a loss that fell tenfold in some 2.3 / lr
        steps. The losses must be positive: a negative one has no finite optimum, and its weight grows. Up to the sign
        of s this is the loss part of IMTL as well.

    Example:
        >>> import torch
        >>> UW()(torch.tensor([4.0, 0.5]))
        tensor([1., 1.])

    References:
        Kendall, Gal and Cipolla, [Multi-Task Learning Using Uncertainty to Weigh
        Losses](https://arxiv.org/abs/1705.07115), 2018, equation 7.
    """

    def __init__(self, lr: float = 0.01, *, reduction: Reduction = "sum") -> None:
        super().__init__(reduction=reduction)
        if not 0 < lr < math.inf:
            raise ValueError(f"`lr` must be positive and finite. Got {lr}.")
        self.lr = lr
        self._memory = TaskState(value=(1, 0.0), **ENTRIES)

    def _weigh(self, losses: Tensor, tasks: tuple[str, ...]) -> Tensor:
        memory = self._memory.read(tasks, losses)
        weights = (-memory["value"]).exp()
        new = adam_step(memory["value"], 1 - weights * losses, memory, self.lr)
        self._memory.write(tasks, losses, new, torch.isfinite(losses).all())
        return weights

    def state(self) -> Mapping[str, Tensor]:
        """Log-variances (`value`) and Adam's moments by task."""
        return self._memory.tensors()

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Take over a saved state."""
        self._memory.load(state_dict)
