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

    # Of a parameter that is sharded twice (FSDP2 around tensor parallel) one placement is no `is_shard()`.

    def shard(self) -> tuple[int, int]:
        """Which part of the parameters this process holds, and how many parts there are; replicas hold the same."""
        part, parts = 0, 1
        for dimension, placement in enumerate(self.placements):
            if not placement.is_replicate():
                size = self.mesh.size(dimension)
                part, parts = part * size + self.mesh.get_local_rank(dimension), parts * size
        return part, parts

    def summed(self, product: Tensor) -> Tensor:
        """Sum of inner products of local parts over the dimensions of the mesh that hold different parts."""
        for dimension, placement in enumerate(self.placements):
            if not placement.is_replicate():
                group = self.mesh.get_group(dimension)
                torch.distributed.all_reduce(product, group=group)
        return product


class Resharding:
    """Keeps the gathered parameters of FSDP2 between the backward passes of one step, and frees them after the last.

    Args:
        model: with modules that `fully_shard` was applied to.

    Raises:
        TypeError: it has none.
    """

    def __init__(self, model: Any) -> None:
        modules = model.modules() if isinstance(model, torch.nn.Module) else ()
        # By name of the method: importing the class would start what a single process does not need.
        self._modules: list[Any] = [m for m in modules if hasattr(m, "set_reshard_after_backward")]
        if not self._modules:
            raise TypeError(
                "`fsdp_model` must be a model that `torch.distributed.fsdp.fully_shard` was applied to, or to its "
                f"modules. Got {type(model).__name__}."
            )

    def __deepcopy__(self, memo: object) -> None:
        return None  # a copy of the optimizer has other parameters

    def __reduce__(self) -> Any:
        return _nothing, ()

    def free_after(self, last: bool) -> None:
        """Say whether the parameters are to be freed after the next backward pass."""
        for module in self._modules:
            module.set_reshard_after_backward(last, recurse=False)


def _nothing() -> None:
    return None


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
