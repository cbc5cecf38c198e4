"""Hold the balance between the two objectives, in terms of their gradients.

With equal say, the pull that makes all normal cells alike wins before the contrast has learnt to tell cells apart, and
every embedding ends up in one point (figures in the README). So the similarity gradient is shortened, before any
surgery, to at most a fixed share of the contrastive gradient. The rule needs the Gramian only, which makes it a
method: it wraps another one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class CappedShare:
    r"""Weights of `method` after the second of two gradients was limited to `share` times the length of the first.

    :math:`s = \min(1, \mathrm{share}\,|g_1| / |g_2|)`; the method sees the Gramian of :math:`g_1` and :math:`s g_2`,
    and its second weight is multiplied by s.

    Attributes:
        method: a method of agsurgery, for two tasks.
        share: greatest length of the second gradient, relative to the first.
        active: while False, the second task has weight 0 (it is switched on later in the training).
    """

    method: Any
    share: float
    active: bool = True

    def solve(self, gramian: Tensor) -> Any:
        """What the inner method answers (`weights` and `scale`), in terms of the gradients as they came."""
        first, second = gramian.diagonal().sqrt().unbind()
        shrink = torch.where(second > self.share * first, self.share * first / second, 1.0)
        factors = torch.stack((torch.ones_like(shrink), shrink))
        answer = self.method.solve(gramian * torch.outer(factors, factors))
        weights = answer.weights * factors if self.active else gramian.new_tensor([1.0, 0.0])
        return answer._replace(weights=weights)

    def __call__(self, gramian: Tensor) -> Tensor:
        """The `(2,)` weights."""
        return self.solve(gramian).weights
