"""What a user can choose about surgery beside the method."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from agsurgery.blocks import Granularity
from agsurgery.distributed import Replicas
from agsurgery.sharding import Resharding

EngineName: TypeAlias = Literal["grad", "lean", "accumulate", "reweight"]
"""How the task gradients are computed, and how their combination comes to `.grad`."""

Heads: TypeAlias = Literal["own", "weighted"]
"""What a parameter reached by a single loss receives: that loss's gradient, or this times the task's weight."""

Outside: TypeAlias = Literal["error", "ignore"]
"""What to do about parameters that the losses reach and that were not given."""

Accumulation: TypeAlias = Literal["gradients", "tasks"]
"""What adds up over the calls of `backward` between two steps: `.grad`, or the gradients of each task."""

Level: TypeAlias = Literal["parameters", "features"]
"""Where the task gradients meet."""

Features: TypeAlias = "Tensor | Iterable[Tensor]"
"""The representation through which the losses share their trunk."""


@dataclass(frozen=True)
class Options:
    """The choices that hold for every step; see `agsurgery.GradientSurgery`.

    Raises:
        ValueError: an unknown word, or a number out of range.
        TypeError: `buffer_dtype` is no dtype.
    """

    engine: EngineName = "grad"
    every: int = 1
    granularity: Granularity = "global"
    heads: Heads | None = None
    shared: Iterable[Tensor] | None = None
    outside: Outside = "error"
    buffer_dtype: torch.dtype | None = None
    accumulation: Accumulation = "gradients"
    tasks: Sequence[str] = ()
    replicas: Replicas | None = None
    resharding: Resharding | None = None

    def __post_init__(self) -> None:
        _one_of("engine", self.engine, get_args(EngineName))
        _one_of("heads", self.heads, (*get_args(Heads), None))
        _one_of("outside", self.outside, get_args(Outside))
        _one_of("accumulation", self.accumulation, get_args(Accumulation))
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1:
            raise ValueError(f"`every` must be an integer >= 1. Got {self.every!r}.")
        dtype = self.buffer_dtype
        if dtype is not None and not isinstance(dtype, torch.dtype):
            raise TypeError(
                f"`buffer_dtype` must be a dtype such as `torch.bfloat16`. Got {dtype!r}."
            )
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"`buffer_dtype` must be a floating point dtype. Got {dtype}.")


def as_names(tasks: Iterable[str]) -> tuple[str, ...]:
    """Names of tasks as a tuple.

    Raises:
        TypeError: one string, or something else than strings.
        ValueError: a name comes twice.
    """
    names = () if isinstance(tasks, str) else tuple(tasks)
    if isinstance(tasks, str) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"`tasks` must be names, such as `['depth', 'edges']`. Got {tasks!r}.")
    if len(set(names)) < len(names):
        raise ValueError(f"The names in `tasks` must differ. Got {list(names)}.")
    return names


def check_level(level: Level, features: Features | None) -> None:
    """Refuse what the arguments of one step do not allow.

    Raises:
        ValueError: an unknown word, or surgery on features without features.
    """
    _one_of("level", level, get_args(Level))
    if level == "features" and features is None:
        raise ValueError(
            '`level="features"` needs `features=`: the tensors through which the losses depend on the trunk.'
        )


def _one_of(name: str, value: object, words: tuple[object, ...]) -> None:
    if value not in words:
        known = ", ".join("None" if word is None else f'"{word}"' for word in words)
        raise ValueError(f"`{name}` must be one of {known}. Got {value!r}.")
