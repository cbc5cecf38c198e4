"""Parameters sharded over several devices (DTensor): their local parts, and sums over all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Placement:
    """How a DTensor lies on its mesh; hashable, so that parameters can be grouped by it."""

    mesh: Any
    placements: tuple[Any, ...]

    def summed(self, product: Tensor) -> Tensor:
        """Sum of inner products of local parts over the dimensions of the mesh that hold different parts."""
        for dimension, placement in enumerate(self.placements):
            if placement.is_shard():
                group = self.mesh.get_group(dimension)
                torch.distributed.all_reduce(product, group=group)
        return product


def is_sharded(tensor: Tensor) -> bool:
    """Whether this is a DTensor (FSDP2, tensor parallel)."""
    return hasattr(tensor, "placements")


def placement_of(tensor: Tensor) -> Placement | None:
    """Mesh and placements of a DTensor; None for a plain tensor."""
    if not is_sharded(tensor):
        return None
    sharded: Any = tensor
    return Placement(sharded.device_mesh, tuple(sharded.placements))


def local(tensor: Tensor, placement: Placement | None = None) -> Tensor:
    """This process's part of a DTensor, brought to a placement first; a plain tensor as it is."""
    if not is_sharded(tensor):
        return tensor
    sharded: Any = tensor
    if placement is not None and tuple(sharded.placements) != placement.placements:
        sharded = sharded.redistribute(placements=placement.placements)
    part: Tensor = sharded.to_local()
    return part


def rewrapped(part: Tensor, like: Tensor) -> Tensor:
    """A local part as a tensor of the kind of `like`."""
    if not is_sharded(like):
        return part
    from torch.distributed.tensor import DTensor

    sharded: Any = like
    whole: Tensor = DTensor.from_local(
        part,
        sharded.device_mesh,
        sharded.placements,
        run_check=False,
        shape=sharded.shape,
        stride=sharded.stride(),
    )
    return whole


def any_sharded(parameters: Sequence[Tensor]) -> bool:
    """Whether one of them is a DTensor."""
    return any(is_sharded(parameter) for parameter in parameters)
