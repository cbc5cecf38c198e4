"""Hold the balance between the two objectives, in terms of their gradients.

With equal say, the pull that makes all normal cells alike wins before the contrast has learnt to tell cells apart, and
every embedding ends up in one point (figures in the README). So the similarity gradient is shortened, before any
surgery, to at most a fixed share of the contrastive gradient. The rule needs the Gramian only, which makes it a
method: it wraps another one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass
class CappedShare:
    r"""Weights of `method` after the second of two gradients was limited to `share` times the length of the first.

    :math:`s = \min(1, \mathrm{share}\,|g_1| / |g_2|)`; the method sees the Gramian of :math:`g_1` and :math:`s g_2`,
    and its second weight is multiplied by s.

    Attributes:
        method: a method of agsurgery, for two tasks.
        share: greatest length of the second gradient, relative to the first; a number, or a tensor set anew each step.
        active: while False, the second task has weight 0 (it is switched on later in the training).
    """

    method: Any
    share: float | Tensor
    active: bool = True

    def solve(self, gramian: Tensor) -> Any:
        """What the inner method answers (`weights` and `scale`), in terms of the gradients as they came."""
        first, second = gramian.diagonal().sqrt().unbind()
        limit = self.share * first
        shrink = torch.where(second > limit, limit / second, 1.0)
        factors = torch.stack((torch.ones_like(shrink), shrink))
        answer = self.method.solve(gramian * torch.outer(factors, factors))
        weights = answer.weights * factors if self.active else gramian.new_tensor([1.0, 0.0])
        return answer._replace(weights=weights)

    def __call__(self, gramian: Tensor) -> Tensor:
        """The `(2,)` weights."""
        weights: Tensor = self.solve(gramian).weights
        return weights

    def state_dict(self) -> dict[str, Tensor]:
        """What the inner method remembers; the optimizer keeps the state of its own methods only."""
        state = getattr(self.method, "state_dict", dict)()
        return dict(state)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what `state_dict` gave."""
        if state:
            self.method.load_state_dict(state)


class Answer(NamedTuple):
    """What a method answers, as those of the library do: `(2,)` weights and the factor of the update as a whole."""

    weights: Tensor
    scale: Tensor


class Priority:
    r"""The first objective has priority: the second gradient loses what opposes the first, and nothing else changes.

    :math:`g_1 + g_2 - \min(0, \langle g_1, g_2 \rangle) / |g_1|^2\, g_1`. PCGrad does the same to both gradients.

    Guarantees: to first order the second objective does not slow down the first, at any length of its gradient.
    """

    def solve(self, gramian: Tensor) -> Answer:
        """The weights for a `(2, 2)` Gramian, and the scale 1."""
        against = gramian[0, 1].clamp(max=0)
        added = torch.where(gramian[0, 0] > 0, -against / gramian[0, 0], 0.0)
        one = torch.ones_like(added)
        return Answer(torch.stack((one + added, one)), one)

    def __call__(self, gramian: Tensor) -> Tensor:
        """The `(2,)` weights."""
        return self.solve(gramian).weights
