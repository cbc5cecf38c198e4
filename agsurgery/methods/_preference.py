"""How much each task counts, given by place or by name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

Preference: TypeAlias = "Sequence[float] | Mapping[str, float] | None"
"""K positive numbers in the order of the losses, or by task name; None: all tasks count alike."""


class PerTask:
    """Numbers given once by the user, as a tensor in the order of the tasks of each step.

    Args:
        values: see `Preference`; None stands for ones.
        name: of the argument, for messages.
        positive: whether every number must be positive; if not, finite.

    Raises:
        TypeError: `values` is neither a sequence nor a mapping.
        ValueError: it is empty, or a number is not finite, or must be positive and is not.
    """

    def __init__(self, values: Preference, name: str, *, positive: bool = True) -> None:
        if isinstance(values, Tensor):
            values = values.tolist()
        if not (values is None or isinstance(values, Sequence | Mapping)) or isinstance(
            values, str
        ):
            raise TypeError(
                f"`{name}` must be a sequence of K numbers, a dict from task name to number, or None. "
                f"Got {type(values).__name__}."
            )
        if values is not None and not values:
            raise ValueError(f"`{name}` must hold one number for each task. Got none.")
        numbers = values.values() if isinstance(values, Mapping) else values or ()
        for number in numbers:
            if not math.isfinite(number) or (positive and number <= 0):
                kind = "finite and positive" if positive else "finite"
                raise ValueError(f"Every number of `{name}` must be {kind}. Got {values!r}.")
        self.values = values
        self._name = name
        self._cache: dict[tuple[object, ...], Tensor] = {}

    def tensor(self, tasks: Sequence[str], like: Tensor) -> Tensor:
        """The `(K,)` numbers of the given tasks, in the dtype and on the device of `like`.

        Raises:
            ValueError: another number of tasks, or a task without a number.
        """
        key = (tuple(tasks), like.dtype, like.device)
        # Copying numbers from the host in each step could not be captured in a CUDA graph.
        if key not in self._cache:
            numbers = torch.tensor(self._ordered(tasks), dtype=like.dtype, device=like.device)
            if not _is_fake(numbers):
                self._cache[key] = numbers
            return numbers
        return self._cache[key]

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_cache": {}}

    def __repr__(self) -> str:
        return repr(self.values)

    def _ordered(self, tasks: Sequence[str]) -> list[float]:
        if self.values is None:
            return [1.0] * len(tasks)
        if isinstance(self.values, Mapping):
            missing = [task for task in tasks if task not in self.values]
            if missing:
                raise ValueError(
                    f"`{self._name}` must have a number for every task. It has none for {missing}, "
                    f"but for {list(self.values)}."
                )
            return [float(self.values[task]) for task in tasks]
        if len(self.values) != len(tasks):
            raise ValueError(
                f"`{self._name}` must have as many numbers as there are tasks. Got {len(self.values)} for "
                f"{len(tasks)} tasks."
            )
        return [float(value) for value in self.values]


def _is_fake(tensor: Tensor) -> bool:
    return isinstance(tensor, torch._subclasses.FakeTensor)
