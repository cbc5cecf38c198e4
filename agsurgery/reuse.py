"""Weights kept from one step to the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from agsurgery.methods import Solution
from agsurgery.methods._state import TaskState

_PREFIX = "every_"


class Reuse:
    """The weights of the last step that computed some, by task name.

    Args:
        every: number of steps that one set of weights serves.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self.age = 0  # number of steps that the weights have served
        self._tasks: frozenset[str] = frozenset()
        self._kept = TaskState(weights=(1, 1.0), scale=(0, 1.0))

    def recall(self, tasks: Sequence[str], active: Sequence[str]) -> Solution | None:
        """Weights for these tasks; None if it is time to compute some, or if other tasks are active than before.

        Args:
            tasks: K names.
            active: those among them that have a gradient.
        """
        if self.age == 0 or self.age >= self.every or self._tasks != set(active):
            return None
        self.age += 1
        tensors = self._kept.tensors()
        kept = self._kept.read(active, tensors["weights"])
        weights = kept["weights"].clone()
        if list(active) != list(tasks):  # an absent task has no gradient to weigh
            places = torch.tensor([tasks.index(name) for name in active], device=weights.device)
            weights = weights.new_ones(len(tasks)).index_copy(0, places, weights)
        return Solution(weights, kept["scale"].clone())

    def keep(self, tasks: Sequence[str], active: Sequence[str], solution: Solution) -> None:
        """Remember the weights of this step, unless they are not finite: then the ones before stay."""
        if self.every == 1:
            return
        if self._tasks != set(active):
            self._kept = TaskState(weights=(1, 1.0), scale=(0, 1.0))
            self._tasks = frozenset(active)
        self.age = 1
        weights = solution.weights
        if list(active) != list(tasks):
            places = torch.tensor([tasks.index(name) for name in active], device=weights.device)
            weights = weights.index_select(0, places)
        finite = torch.isfinite(weights).all() & torch.isfinite(solution.scale)
        values = {"weights": weights, "scale": solution.scale}
        self._kept.write(active, weights, values, finite)

    def expect(self, tasks: Sequence[str], like: Tensor) -> None:
        """Make room for the weights of tasks that have not come yet."""
        if self.every > 1:
            self._kept.read(tasks, like)

    def state(self) -> dict[str, Any]:
        """The live tensors and the age, for a checkpoint; empty if there is nothing to remember."""
        tensors = {_PREFIX + name: value for name, value in self._kept.tensors().items()}
        return {**tensors, _PREFIX + "age": self.age} if tensors else {}

    def load(self, entries: Mapping[str, Any]) -> None:
        """Take over what `state` gave; nothing if that was empty, or the weights serve one step."""
        own = {k.removeprefix(_PREFIX): v for k, v in entries.items() if k.startswith(_PREFIX)}
        if self.every == 1 or "age" not in own:
            return
        self.age = int(own.pop("age"))
        self._kept.load(own)
        self._tasks = frozenset(self._kept.names)
