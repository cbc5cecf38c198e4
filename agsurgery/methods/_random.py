"""Random task orders drawn on the device from a counter, without a generator object.

A `torch.Generator` belongs to one device, cannot be captured in a CUDA graph without registering it, and cannot
exist under a fake device. Hashing `(seed, number of the draw)` gives the same order on every rank and device,
and its whole state is two integers that fit in a checkpoint.
"""

from __future__ import annotations

import operator
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


def stream(seed: Tensor, draw: Tensor) -> Tensor:
    """Start of the numbers of one draw (0-d int64, as both arguments); the same everywhere."""
    return _draw_start(hashed(seed + 1), draw)


def _draw_start(seed_hash: Tensor, draw: Tensor) -> Tensor:
    return hashed(seed_hash + draw)


def uniform(start: Tensor, count: int, offset: int = 0) -> Tensor:
    """`(count,)` float64 numbers in (0, 1), number `offset` and following of the draw that begins at `start`."""
    index = torch.arange(offset, offset + count, device=start.device)
    return (_shift_right(hashed(start + index), 11).double() + 0.5) * 2.0**-53


def random_orders(start: Tensor, tasks: int) -> Tensor:
    """One random order of the other tasks for each task.

    Args:
        start: 0-d int64 from `stream`.
        tasks: number of tasks K.

    Returns:
        `(K, K - 1)` int64; row i is a random permutation of the tasks other than i.
    """
    index = torch.arange(tasks * tasks, device=start.device)
    keys = hashed(start + index).view(tasks, tasks)
    # Only the upper bits decide, so that the largest key is free to put each task itself last.
    keys = _shift_right(keys, 1).fill_diagonal_(2**63 - 1)
    return keys.argsort(dim=1).narrow(1, 0, tasks - 1)


class Draws:
    """Seed and number of the draws taken so far: all there is to remember of a random stream.

    Raises:
        TypeError: the seed is not an integer.
    """

    def __init__(self, seed: int) -> None:
        try:
            number = operator.index(seed)  # of NumPy's integers too
        except TypeError:
            raise TypeError(f"`seed` must be an integer. Got {seed!r}.") from None
        self._seed = torch.tensor(number, dtype=torch.int64)
        self._draws = torch.zeros((), dtype=torch.int64)
        self._hash: Tensor | None = None  # of the seed, on the device of the draws

    @property
    def seed(self) -> int:
        """The seed. Synchronises, where draws were taken on a device."""
        return int(self._seed)

    def tensors(self) -> dict[str, Tensor]:
        """`seed` and `draws`, 0-d int64."""
        return {"seed": self._seed, "draws": self._draws}

    def load(self, entries: Mapping[str, Tensor]) -> None:
        """Take over what `tensors` gave.

        Raises:
            KeyError: an entry is missing.
        """
        for name, value in self.tensors().items():
            if name not in entries:
                raise KeyError(f"A random state needs {name!r}. Got {sorted(entries)}.")
            value.copy_(torch.as_tensor(entries[name]))
        self._hash = None

    def next(self, device: torch.device) -> Tensor:
        """A 0-d int64 on `device` from which to hash the numbers of the next draw."""
        if self._draws.device != device:
            self._seed, self._draws = self._seed.to(device), self._draws.to(device)
            self._hash = None
        if self._hash is None:
            self._hash = hashed(self._seed + 1)
        self._draws.add_(1)
        return _draw_start(self._hash, self._draws)


class Seeded(Method):
    """Base of the methods that draw at random."""

    def __init__(self, *, seed: int = 0, reduction: Reduction = "sum") -> None:
        super().__init__(reduction=reduction)
        self._random = Draws(seed)

    @property
    def seed(self) -> int:
        """The seed in use: that of the checkpoint, once one was loaded."""
        return self._random.seed

    def state(self) -> Mapping[str, Tensor]:
        """Seed and number of the draws so far (0-d int64)."""
        return self._random.tensors()


class RandomlyOrdered(Seeded):
    """Base of the methods that take the tasks in random order."""

    def _orders(self, gramian: Tensor) -> Tensor | None:
        """The orders of this step; None for two tasks, where they make no difference."""
        if gramian.shape[-1] < 3:
            return None
        return random_orders(self._random.next(gramian.device), gramian.shape[-1])
