"""The forms in which losses may come, and the factor that a `GradScaler` gives them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from agsurgery.graph import Root, gradient_root, stacked_roots

Losses: TypeAlias = "Sequence[Tensor] | Mapping[str, Tensor] | Tensor"
"""K scalar losses: a list or tuple, a dict from task name to loss, or a 1-D tensor."""


def read_losses(losses: Losses) -> tuple[list[str], list[Tensor], list[Root | None]]:
    """Task names, scalar losses and where their backward passes start."""
    if isinstance(losses, Tensor):
        if losses.dim() != 1 or losses.shape[0] == 0:
            raise ValueError(
                f"A tensor of losses must have shape (K,), K >= 1. Got shape {tuple(losses.shape)}. "
                "Pass a list of scalars, or `loss.unsqueeze(0)` for a single one."
            )
        values = list(losses.unbind())
        return [str(i) for i in range(len(values))], values, stacked_roots(losses)
    if isinstance(losses, Mapping):
        names, values = [str(name) for name in losses], list(losses.values())
        labels = [f"losses[{name!r}]" for name in losses]
    elif isinstance(losses, list | tuple):
        names, values = [str(i) for i in range(len(losses))], list(losses)
        labels = [f"losses[{i}]" for i in range(len(losses))]
    else:
        raise TypeError(
            "`losses` must be a list, tuple or dict of scalar tensors, or a 1-D tensor. "
            f"Got {type(losses).__name__}."
        )
    if not values:
        raise ValueError("`losses` must hold at least one loss. Got none.")
    if len(set(names)) < len(names):
        raise ValueError(f"Task names must differ as text. Got {names}.")
    for label, value in zip(labels, values, strict=True):
        if not isinstance(value, Tensor):
            raise TypeError(
                f"`{label}` must be a scalar tensor. Got {type(value).__name__}. "
                "For a task without a loss in this batch pass `torch.zeros(())` or leave it out."
            )
        if value.numel() != 1:
            raise ValueError(
                f"`{label}` must be a scalar. Got shape {tuple(value.shape)}. Reduce it, for instance with `.mean()`."
            )
        if value.is_complex() or not value.is_floating_point():
            raise TypeError(f"`{label}` must be real floating point. Got {value.dtype}.")
    values = [value if value.dim() == 0 else value.reshape(()) for value in values]
    return names, values, [gradient_root(value) for value in values]


def loss_scale(scaler: torch.amp.GradScaler | None, device: torch.device) -> Tensor | None:
    """The factor of a `GradScaler`, 0-d on `device`; None without one, or if it is disabled."""
    if scaler is None or not scaler.is_enabled():
        return None
    scale: Tensor = scaler.scale(torch.ones((), device=device))
    return scale
