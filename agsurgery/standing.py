"""What the last combination of some micro-batches left behind, so that the next one can replace it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from agsurgery.methods import Method, Weighting


class Standing:
    """The update in `.grad` that holds until the next micro-batch, what was there before it, and the method's state.

    Combining all micro-batches so far after each of them must come to what one combination of all of them would: so the
    earlier update is taken back, and a method that draws or remembers does so once.
    """

    def __init__(self) -> None:
        self._before: list[tuple[Tensor, Tensor | None]] = []
        self._given: list[tuple[Tensor, Tensor, int]] = []
        self._remembered: dict[str, Any] | None = None

    def dropped(self) -> bool:
        """Whether the user has set every `.grad` to None: the micro-batches before this one are over."""
        return bool(self._given) and all(parameter.grad is None for parameter, _, _ in self._given)

    def check(self) -> None:
        """Refuse to replace what others have changed.

        Raises:
            RuntimeError: a `.grad` is not what was left there.
        """
        for parameter, gradient, version in self._given:
            if parameter.grad is not gradient or gradient._version != version:
                raise RuntimeError(
                    'With `accumulation="tasks"`, nobody else may change `.grad` between two micro-batches: the next '
                    f"one replaces it. The gradient of shape {tuple(parameter.shape)} has changed. Pass that loss as "
                    "a task or call its `.backward()` after the last micro-batch; clip and unscale after the last one; "
                    "clear gradients with `zero_grad()`."
                )

    def take_back(self, parameters: Sequence[Tensor], method: Weighting) -> None:
        """Set `.grad` and the method to what they were before the first of these micro-batches."""
        if not self._given:
            self._before = [(p, None if p.grad is None else p.grad.clone()) for p in parameters]
            self._remembered = copy.deepcopy(vars(method)) if isinstance(method, Method) else None
            return
        self._given = []  # lets go of the memory of that update, which then serves the next
        for parameter, gradient in self._before:
            if gradient is None or parameter.grad is None:
                parameter.grad = None
            elif gradient.layout == parameter.grad.layout == torch.strided:
                parameter.grad.copy_(gradient)
            else:
                parameter.grad = gradient.clone()
        if self._remembered is not None:
            vars(method).update(copy.deepcopy(self._remembered))

    def note(self, parameters: Sequence[Tensor]) -> None:
        """Remember what is in `.grad` now."""
        self._given = [(p, p.grad, p.grad._version) for p in parameters if p.grad is not None]

    def forget_method(self) -> None:
        """Its state was loaded since."""
        self._remembered = None

    def clear(self) -> None:
        """Forget everything: what is in `.grad` stays."""
        self._before, self._given, self._remembered = [], [], None
