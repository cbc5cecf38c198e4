"""STCH: minimise a smooth maximum of the losses."""

from __future__ import annotations

import math

from torch import Tensor

from agsurgery.methods._base import LossMethod, Reduction
from agsurgery.methods._preference import PerTask, Preference


class STCH(LossMethod):
    r"""Smooth Tchebycheff scalarisation: minimise :math:`\mu \log \sum_i \exp(p_i (l_i - z_i) / \mu)`.

    Its gradient has the weights :math:`p_i\,\mathrm{softmax}(p\,(l - z) / \mu)_i`, here times K. A small mu serves the
    task that is furthest from its ideal; a large one all tasks in proportion to p.

    Args:
        mu: width of the smoothing, positive, on the scale of the losses.
        ideal: K numbers z, by place or task name: the best value of each loss; None: zeros.
        preference: K positive numbers p, by place or task name, scaled to mean 1; None: ones.
        reduction: `"mean"` divides by K. The paper's gradient has the scale of the mean.

    Raises:
        TypeError, ValueError: `mu` is not positive and finite; `ideal` or `preference` are not as above.

    Note:
        The paper's preferences sum to 1: with these, mu here is K times as large. Other code takes logarithms of the
        losses relative to their values in the first epochs; scale the losses, or divide by such values, for the same
        effect.

    Example:
        >>> import torch
        >>> STCH(mu=1.0)(torch.tensor([0.0, 1.0986123]))  # log 3
        tensor([0.5000, 1.5000])

    References:
        Lin et al., [Smooth Tchebycheff Scalarization](https://arxiv.org/abs/2402.19078), 2024.
    """

    def __init__(
        self,
        mu: float = 1.0,
        *,
        ideal: Preference = None,
        preference: Preference = None,
        reduction: Reduction = "sum",
    ) -> None:
        super().__init__(reduction=reduction)
        if not 0 < mu < math.inf:
            raise ValueError(f"`mu` must be positive and finite. Got {mu}.")
        self.mu = mu
        self.ideal = None if ideal is None else PerTask(ideal, "ideal", positive=False)
        self.preference = PerTask(preference, "preference")

    def _weigh(self, losses: Tensor, tasks: tuple[str, ...]) -> Tensor:
        above = losses if self.ideal is None else losses - self.ideal.tensor(tasks, losses)
        share = self.preference.tensor(tasks, losses)
        share = share / share.mean()
        return len(tasks) * share * (share * above / self.mu).softmax(0)
