"""Means of numbers over many steps, by task name, in a history of fixed length that lives on the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad


class Series:
    """Sums and counts of what was finite, over bins of consecutive steps.

    When all bins are full, neighbours are merged and each takes twice as many steps: the history covers everything
    since the start, in memory that does not grow. Only the host's own counter decides, so nothing is read from the
    device.

    Args:
        names: names of the numbers kept for each step, for each task, and for each ordered pair of tasks.
        bins: length of the history, even.
    """

    def __init__(self, names: Sequence[Sequence[str]], bins: int) -> None:
        self.names = tuple(tuple(group) for group in names)
        self.bins = bins
        self.tasks: tuple[str, ...] = ()
        self.steps = 0
        self.stride = 1
        self._totals: list[Tensor] = []

    def add(self, tasks: Sequence[str], values: Sequence[Tensor]) -> None:
        """Add the numbers of one step.

        Args:
            tasks: K names, in the order of all rows and columns.
            values: for each group of N names a tensor of shape `(N,)`, `(N, K)` and `(N, K, K)`. What is not finite
                is not counted.
        """
        self._admit(tasks, values[0])
        if self.steps == self.bins * self.stride:
            self._merge()
        place = self.steps // self.stride
        for order, value in enumerate(values):
            if not self.names[order]:
                continue
            ordered = self._ordered(value, tasks, order)
            finite = torch.isfinite(ordered)
            part = torch.stack(
                [ordered.masked_fill(finite.logical_not(), 0), finite.to(ordered.dtype)]
            )
            self._totals[order].select(0, place).add_(part)
        self.steps += 1

    def total(self) -> list[tuple[Tensor, Tensor]]:
        """For each group the sums and counts over all steps, on the host. Synchronises."""
        return [_split(total.sum(0).cpu()) for total in self._totals]

    def history(self, points: int) -> list[tuple[int, list[tuple[Tensor, Tensor]]]]:
        """The same for stretches of steps, each with the number of steps up to its end. Synchronises.

        Args:
            points: how many stretches at most.
        """
        begun = -(-self.steps // self.stride)
        width = max(1, -(-begun // points))
        parts = [total.cpu() for total in self._totals]
        found = []
        for start in range(0, begun, width):
            end = min(start + width, begun)
            totals = [_split(part.narrow(0, start, end - start).sum(0)) for part in parts]
            found.append((min(end * self.stride, self.steps), totals))
        return found

    def state_dict(self) -> dict[str, Any]:
        """A copy, to be saved."""
        return {
            "tasks": list(self.tasks),
            "steps": self.steps,
            "stride": self.stride,
            "totals": [total.clone() for total in self._totals],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave.

        Raises:
            ValueError: it has another length, or other numbers.
        """
        totals = [torch.as_tensor(total) for total in state["totals"]]
        found = [tuple(total.shape[:3]) for total in totals]
        needed = [(self.bins, 2, len(group)) for group in self.names]
        if totals and found != needed:
            raise ValueError(
                f"The state must come from a monitor with the same `history`. Got tensors of shapes {found} for "
                f"{needed}."
            )
        self.tasks = tuple(state["tasks"])
        self.steps, self.stride = int(state["steps"]), int(state["stride"])
        self._totals = [total.clone() for total in totals]

    def _admit(self, tasks: Sequence[str], like: Tensor) -> None:
        """Make room for tasks not seen before, on the device of `like`."""
        joining = [task for task in tasks if task not in self.tasks]
        if not self._totals:
            self._totals = [
                like.new_zeros(self.bins, 2, len(group), *(0,) * order)
                for order, group in enumerate(self.names)
            ]
        if self._totals[0].device != like.device:
            self._totals = [total.to(like.device) for total in self._totals]
        if joining:
            self.tasks = (*self.tasks, *joining)
            more = len(joining)
            self._totals = [pad(t, (0, more) * order) for order, t in enumerate(self._totals)]

    def _ordered(self, value: Tensor, tasks: Sequence[str], order: int) -> Tensor:
        """`value` in the order of all tasks seen so far, NaN for those that are absent."""
        if self.tasks == tuple(tasks):
            return value
        # Views put side by side: an index tensor would be a copy from the host, which waits for the device.
        places = [tasks.index(task) if task in tasks else len(tasks) for task in self.tasks]
        for dimension in range(-order, 0):
            blank = torch.full_like(value.narrow(dimension, 0, 1), torch.nan)
            padded = torch.cat([value, blank], dimension)
            value = torch.stack([padded.select(dimension, place) for place in places], dimension)
        return value

    def _merge(self) -> None:
        merged = []
        for total in self._totals:
            half = total.view(self.bins // 2, 2, *total.shape[1:]).sum(1)
            merged.append(torch.cat([half, torch.zeros_like(half)]))
        self._totals = merged
        self.stride *= 2


def _split(part: Tensor) -> tuple[Tensor, Tensor]:
    sums, counts = part.unbind()
    return sums, counts
