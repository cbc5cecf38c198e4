"""State with one entry per task, found by the task's name and not by its place in the list of losses."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class TaskState:
    """Tensors that remember something for each task, or for each pair of tasks.

    Tasks join when they are first seen and stay when they are absent, so that a batch without one of them changes
    nothing for it. Names are kept as bytes in a tensor: some checkpoint formats carry no text.

    Args:
        entries: name of each tensor, with its order (0: one number, 1: one for each task, 2: one for each ordered
            pair of tasks) and the value it starts from.
    """

    def __init__(self, **entries: tuple[int, float]) -> None:
        self._entries = entries
        self._tasks: tuple[str, ...] = ()
        self._tensors: dict[str, Tensor] = {}
        # Made when asked for: JSON cannot be traced by a compiler.
        self._names: Tensor | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The tasks seen so far."""
        return self._tasks

    def tensors(self) -> dict[str, Tensor]:
        """The live tensors, and the names; empty before the first `read`."""
        if not self._tensors:
            return {}
        if self._names is None:
            self._names = torch.tensor(list(json.dumps(self._tasks).encode()), dtype=torch.uint8)
        return {**self._tensors, "tasks": self._names}

    def read(self, tasks: Sequence[str], like: Tensor) -> dict[str, Tensor]:
        """Entries of the given tasks, in their order.

        Args:
            tasks: K names.
            like: `(..., K)` tensor whose batch shape, dtype and device the entries have.
        """
        self._admit(tuple(tasks), like)
        if self._tasks == tuple(tasks):
            return dict(self._tensors)
        places = self._places(tasks, like.device)
        read: dict[str, Tensor] = {}
        for name, (order, _) in self._entries.items():
            value = self._tensors[name]
            for dimension in range(order):
                value = value.index_select(-1 - dimension, places)
            read[name] = value
        return read

    def write(
        self, tasks: Sequence[str], like: Tensor, values: Mapping[str, Tensor], where: Tensor
    ) -> None:
        """Replace entries of the given tasks, in place.

        Args:
            tasks: K names.
            like: see `read`.
            values: new entries by name.
            where: boolean, for each block: elsewhere the old entries stay.
        """
        old = self.read(tasks, like)
        for name, value in values.items():
            order, _ = self._entries[name]
            chosen = where.view(where.shape + (1,) * order)
            target = self._tensors[name]
            if self._tasks == tuple(tasks) or order == 0:
                torch.where(chosen, value, target, out=target)
                continue
            value = torch.where(chosen, value, old[name])
            places = self._places(tasks, target.device)
            if order == 2:
                rows = target.index_select(-2, places).index_copy(-1, places, value)
                target.index_copy_(-2, places, rows)
            else:
                target.index_copy_(-1, places, value)

    def load(self, entries: Mapping[str, Tensor]) -> None:
        """Take over what `tensors` gave, here or in another process; nothing if that was empty, or another state's."""
        if "tasks" not in entries or not self._entries.keys() <= entries.keys():
            return
        self._names = torch.as_tensor(entries["tasks"], dtype=torch.uint8).clone()
        self._tasks = tuple(json.loads(bytes(self._names.tolist()).decode()))
        self._tensors = {name: torch.as_tensor(entries[name]).clone() for name in self._entries}

    def _admit(self, tasks: tuple[str, ...], like: Tensor) -> None:
        """Make room for tasks not seen before, on the device of `like`."""
        joining = [task for task in tasks if task not in self._tasks]
        if self._tensors and not joining:
            first = next(iter(self._tensors.values()))
            if first.device != like.device:
                self._tensors = {name: t.to(like.device) for name, t in self._tensors.items()}
            return
        known = len(self._tasks)
        self._tasks = (*self._tasks, *joining)
        self._names = None
        grown: dict[str, Tensor] = {}
        for name, (order, initial) in self._entries.items():
            shape = (*like.shape[:-1], *(len(self._tasks),) * order)
            value = like.new_full(shape, initial)
            if name in self._tensors:
                corner = value
                for dimension in range(order):
                    corner = corner.narrow(-1 - dimension, 0, known)
                corner.copy_(self._tensors[name])
            grown[name] = value
        self._tensors = grown

    def _places(self, tasks: Sequence[str], device: torch.device) -> Tensor:
        return torch.tensor([self._tasks.index(task) for task in tasks], device=device)
