"""Gradients that do not go through the rows, averaged over the processes before they come to `.grad`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from agsurgery.bucket import gradient_dtype
from agsurgery.distributed import Processes
from agsurgery.jacobian import deliver_own
from agsurgery.sharding import local, placement_of, rewrapped


class Outbox:
    """Collects this process's gradients of one step.

    Args:
        processes: those that average.
    """

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self._held: dict[int, Tensor] = {}

    def add(self, gradients: Mapping[Tensor, Tensor], factor: Tensor | None = None) -> None:
        """Add gradients, times a factor."""
        for parameter, gradient in gradients.items():
            gradient = gradient.to(gradient_dtype(parameter))
            if factor is not None:
                gradient = gradient * factor.to(gradient.device, gradient.real.dtype)
            held = self._held.get(id(parameter))
            self._held[id(parameter)] = gradient if held is None else held + gradient

    def send(self, parameters: Sequence[Tensor]) -> None:
        """Average, and add to `.grad`; a gradient that nobody added here counts as zero.

        Args:
            parameters: the same in all processes, and all that something was added for.

        Raises:
            RuntimeError: something was added for another one.
        """
        groups: dict[Any, list[Tensor]] = {}
        for parameter in parameters:
            if self._processes.averages(parameter):
                key = (parameter.device, gradient_dtype(parameter))
                groups.setdefault(key, []).append(parameter)
            elif id(parameter) in self._held:
                deliver_own({parameter: self._held.pop(id(parameter))}, None)
        for members in groups.values():
            parts = [self._flat(parameter) for parameter in members]
            mean = self._processes.average(torch.cat(parts))
            flats = torch.split(mean, [len(part) for part in parts])
            for parameter, flat in zip(members, flats, strict=True):
                deliver_own({parameter: _shaped(flat, parameter)}, None)
        if self._held:
            raise RuntimeError(
                "The losses must reach the parameters that the processes agreed on. In this process they reach "
                f'{len(self._held)} others. Pass `Replicas(agree="always")`.'
            )

    def _flat(self, parameter: Tensor) -> Tensor:
        """The gradient held here as a vector of real numbers."""
        gradient = self._held.pop(id(parameter), None)
        if gradient is None:
            blank = local(parameter.detach())
            gradient = torch.zeros_like(blank, dtype=gradient_dtype(parameter))
        elif gradient.layout != torch.strided:  # indices differ between processes
            gradient = gradient.to_dense()
        part = local(gradient, placement_of(parameter))
        if part.is_complex():
            part = torch.view_as_real(part.resolve_conj())
        return part.reshape(-1)


def _shaped(flat: Tensor, parameter: Tensor) -> Tensor:
    shape = local(parameter.detach()).shape
    if parameter.is_complex():
        return rewrapped(torch.view_as_complex(flat.view(*shape, 2)), parameter)
    return rewrapped(flat.view(shape), parameter)
