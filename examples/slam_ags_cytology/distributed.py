"""Several processes, one per GPU, as `torchrun` starts them.

Every process draws the same batches and takes its part of each side. The losses are those of the part: a patch is
contrasted with the patches of its own process only, so that no embedding is exchanged, and the task gradients are
averaged over the processes before they are reconciled. The Gramian, and with it every decision of the method, is that
of the averaged gradients; it is the same everywhere. What differs from one process with the same `batch`: the number
of negatives per patch, and BatchNorm statistics, which are those of a part (their running averages are
averaged before they are saved).
"""

from __future__ import annotations

import atexit
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import distributed, nn


@dataclass(frozen=True)
class World:
    """The processes of one pretraining, and which of them this is."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process decodes, writes and prints."""
        return self.rank == 0

    def part(self, rows: np.ndarray) -> np.ndarray:
        """The part of a batch that this process works on; parts differ by one patch at most."""
        return rows[self.rank :: self.size]

    def wait(self) -> None:
        """Return once all processes have come here."""
        if self.size > 1:
            distributed.barrier()


def join(device: str) -> tuple[World, str]:
    """Join the processes that `torchrun` started; alone without it.

    Args:
        device: where this process computes; for `"cuda"` the GPU of its local rank is taken.

    Returns:
        The world, and the device of this process.
    """
    if not started_by_torchrun():
        return World(), device
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    if not distributed.is_initialized():
        distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
        atexit.register(_leave)
    return World(distributed.get_rank(), distributed.get_world_size()), device


def _leave() -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()


def started_by_torchrun() -> bool:
    """Whether this is one of several processes."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def surgery_options(world: World) -> dict[str, Any]:
    """Arguments of `GradientSurgery` by which it averages the task gradients over the processes."""
    return {} if world.size == 1 else {"process_group": distributed.group.WORLD}


def average_statistics(model: nn.Module, world: World) -> None:
    """Replace the running averages of BatchNorm by their mean over the processes."""
    if world.size == 1:
        return
    for buffer in model.buffers():
        if buffer.is_floating_point():
            distributed.all_reduce(buffer)
            buffer /= world.size
