"""What a method is, and the one door through which the engine calls it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

Reduction: TypeAlias = Literal["sum", "mean"]
"""Scale of an update: of the sum of the task gradients, or of their mean (K times smaller)."""

Weighting: TypeAlias = "Callable[[Tensor], Tensor]"
"""Anything that maps a `(K, K)` Gramian to `(K,)` weights is a method."""


class Solution(NamedTuple):
    """What a method answers: `weights` `(K,)` and the 0-d `scale` by which it stretched its update as a whole."""

    weights: Tensor
    scale: Tensor


class Method(ABC):
    """Base of the methods shipped here: a function of the Gramian, plus a few numbers of state for some.

    Args:
        reduction: `"sum"` keeps the update on the scale of `sum(losses).backward()`, so that the learning
            rate stays right; `"mean"` divides it by the number of tasks.
    """

    def __init__(self, *, reduction: Reduction = "sum") -> None:
        if reduction not in ("sum", "mean"):
            raise ValueError(f'`reduction` must be "sum" or "mean". Got {reduction!r}.')
        self.reduction: Reduction = reduction

    def __call__(self, gramian: Tensor) -> Tensor:
        """Return the `(K,)` weights for a `(K, K)` Gramian of task gradients."""
        return self.solve(gramian).weights

    def solve(self, gramian: Tensor) -> Solution:
        """Return the weights, and the factor by which the method scaled its update."""
        weights, scale = self._solve_sum(gramian)
        return Solution(weights / gramian.shape[0] if self.reduction == "mean" else weights, scale)

    @abstractmethod
    def _solve_sum(self, gramian: Tensor) -> Solution:
        """Solve on the scale of the sum of the task gradients."""

    def state(self) -> Mapping[str, Tensor]:
        """The live state tensors by name, changed in place by calls; empty for a pure function."""
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """A copy of the state, to be saved."""
        return {name: value.clone() for name, value in self.state().items()}

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Take over a saved state.

        Raises:
            KeyError: an entry is missing.
        """
        for name, value in self.state().items():
            if name not in state_dict:
                raise KeyError(
                    f"{type(self).__name__} needs the state {name!r}. Got {sorted(state_dict)}."
                )
            value.copy_(torch.as_tensor(state_dict[name]))

    def __repr__(self) -> str:
        public = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in public.items())})"


def solve(method: Weighting, gramian: Tensor) -> Solution:
    """Weights of any method for one Gramian, never a finite answer to a non-finite question.

    Args:
        method: a `Method`, or any callable from Gramian to weights; with a `solve` like that of a `Method` it may
            report a scale too.
        gramian: `(K, K)`, float64.

    Returns:
        Weights in the dtype of `gramian`, all NaN where an entry of `gramian` is not finite, and the scale
        (1 for callables that do not report one).

    Raises:
        ValueError: the callable returned another shape than `(K,)`.
    """
    answer = getattr(method, "solve", None)
    weights, scale = (method(gramian), gramian.new_ones(())) if answer is None else answer(gramian)
    weights = weights.to(gramian.dtype)
    if weights.shape != gramian.shape[:1]:
        raise ValueError(
            f"A method must return {gramian.shape[0]} weights for {gramian.shape[0]} tasks. "
            f"{method!r} returned shape {tuple(weights.shape)}."
        )
    poison = torch.where(torch.isfinite(gramian).all(), 0.0, torch.nan)
    return Solution(weights + poison, scale + poison)
