"""Random task orders drawn on the device from a counter, without a generator object.

A `torch.Generator` belongs to one device, cannot be captured in a CUDA graph without registering it, and cannot
exist under a fake device. Hashing `(seed, number of the draw)` gives the same order on every rank and device,
and its whole state is two integers that fit in a checkpoint.
"""

from __future__ import annotations

import torch
from torch import Tensor

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
