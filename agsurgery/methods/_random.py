"""Random task orders drawn on the device from a counter, without a generator object.

A `torch.Generator` belongs to one device, cannot be captured in a CUDA graph without registering it, and cannot
exist under a fake device. Hashing `(seed, number of the draw)` gives the same order on every rank and device,
and its whole state is two integers that fit in a checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from agsurgery.methods._base import Method, Reduction

# SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014), as signed integers.
_GAMMA = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64


def _shift_right(value: Tensor, bits: int) -> Tensor:
    return (value >> bits) & ((1 << (64 - bits)) - 1)  # `>>` alone copies the sign bit


def hashed(value: Tensor) -> Tensor:
    """SplitMix64 of each int64 element: integers that look independent and uniform."""
    value = value * _GAMMA
    value = (value ^ _shift_right(value, 30)) * _MIX_1
    value = (value ^ _shift_right(value, 27)) * _MIX_2
    return value ^ _shift_right(value, 31)


def random_orders(seed: Tensor, draw: Tensor, tasks: int) -> Tensor:
    """One random order of the other tasks for each task.

    Args:
        seed: 0-d int64.
        draw: 0-d int64, number of the draw; the same seed and draw give the same orders everywhere.
        tasks: number of tasks K.

    Returns:
        `(K, K - 1)` int64; row i is a random permutation of the tasks other than i.
    """
    stream = hashed(hashed(seed + 1) + draw)
    index = torch.arange(tasks * tasks, device=draw.device)
    keys = hashed(stream + index).view(tasks, tasks)
    # Only the upper bits decide, so that the largest key is free to put each task itself last.
    keys = _shift_right(keys, 1).fill_diagonal_(2**63 - 1)
    return keys.argsort(dim=1).narrow(1, 0, tasks - 1)


class RandomlyOrdered(Method):
    """Base of the methods that take the tasks in random order; their state is the seed and a counter."""

    def __init__(self, *, seed: int = 0, reduction: Reduction = "sum") -> None:
        super().__init__(reduction=reduction)
        self._seed = torch.tensor(seed, dtype=torch.int64)
        self._draws = torch.zeros((), dtype=torch.int64)

    def state(self) -> Mapping[str, Tensor]:
        """Seed and number of the random orders drawn so far (0-d int64)."""
        return {"seed": self._seed, "draws": self._draws}

    def _orders(self, gramian: Tensor) -> Tensor | None:
        if gramian.shape[0] < 3:
            return None
        if self._draws.device != gramian.device:
            self._seed, self._draws = self._seed.to(gramian.device), self._draws.to(gramian.device)
        self._draws.add_(1)
        return random_orders(self._seed, self._draws, gramian.shape[0])
