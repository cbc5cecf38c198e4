"""Adam on numbers that belong to tasks, for methods that learn their weights."""

from __future__ import annotations

import torch
from torch import Tensor

ENTRIES = {"first": (1, 0.0), "second": (1, 0.0), "steps": (1, 0.0)}
"""What Adam remembers, for `TaskState`; each task counts its own steps, since it may be absent from some."""


def adam_step(
    value: Tensor, gradient: Tensor, memory: dict[str, Tensor], lr: float
) -> dict[str, Tensor]:
    """One step of Adam with its usual constants (0.9, 0.999, 1e-8).

    Args:
        value: `(K,)`.
        gradient: `(K,)`.
        memory: the `ENTRIES`, each `(K,)`.
        lr: learning rate.

    Returns:
        The new `value`, and the new entries.

    References:
        Kingma and Ba, [Adam](https://arxiv.org/abs/1412.6980), 2015, Algorithm 1.
    """
    steps = memory["steps"] + 1
    first = torch.lerp(gradient, memory["first"], 0.9)
    second = torch.lerp(gradient.square(), memory["second"], 0.999)
    size = (second / (1 - 0.999**steps)).sqrt() + 1e-8
    moved = value - lr * first / (1 - 0.9**steps) / size
    return {"value": moved, "first": first, "second": second, "steps": steps}
