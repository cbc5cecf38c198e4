"""Granularity: which parameters share one set of weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

from torch import Tensor

Granularity: TypeAlias = (
    "Literal['global', 'group', 'parameter'] | Mapping[str, Iterable[Tensor]] | "
    "Sequence[Iterable[Tensor]]"
)
"""One Gramian for all shared parameters, one for each parameter group or parameter tensor, or any partition."""

REST = "rest"
"""Name of the block of the parameters that a partition does not name."""


class Blocks(NamedTuple):
    """`names` of B blocks, and for parameters, by id, the `place` of their block; `rest` for those not listed."""

    names: tuple[str, ...]
    place: dict[int, int]
    rest: int

    def of(self, parameter: Tensor) -> int:
        """Block of a parameter."""
        return self.place.get(id(parameter), self.rest)


def _partition_of(what: object) -> str:
    return (
        "A partition must be a list of lists of parameters, or a dict from name to such a list. "
        f"Got {type(what).__name__}."
    )


class Partition:
    """The blocks that a user asked for.

    Args:
        granularity: see `agsurgery.GradientSurgery`.

    Raises:
        ValueError: an unknown word, an empty partition, or a parameter in two blocks.
        TypeError: a partition of something else than tensors.
    """

    def __init__(self, granularity: Granularity) -> None:
        self.granularity = granularity
        self._named: dict[str, list[Tensor]] = {}
        if isinstance(granularity, str):
            if granularity not in ("global", "group", "parameter"):
                raise ValueError(
                    '`granularity` must be "global", "group", "parameter", or a partition of the parameters. '
                    f"Got {granularity!r}."
                )
            return
        if isinstance(granularity, Tensor) or not isinstance(granularity, Iterable):
            raise TypeError(_partition_of(granularity))
        parts = granularity if isinstance(granularity, Mapping) else dict(enumerate(granularity))
        owner: dict[int, str] = {}
        for key, members in parts.items():
            name = str(key)
            # A tensor could be iterated too, but its rows are no parameters.
            if isinstance(members, Tensor) or not isinstance(members, Iterable):
                raise TypeError(_partition_of(members))
            self._named[name] = list(members)
            for member in self._named[name]:
                if not isinstance(member, Tensor):
                    raise TypeError(
                        f"Block {name!r} of the partition must hold tensors. Got {type(member).__name__}."
                    )
                if owner.setdefault(id(member), name) != name:
                    raise ValueError(
                        f"A parameter must be in one block of the partition. One of shape {tuple(member.shape)} is in "
                        f"{owner[id(member)]!r} and {name!r}."
                    )
        if not self._named or REST in self._named:
            raise ValueError(
                f"A partition must name at least one block, and none of them {REST!r}. Got {list(self._named)}."
            )

    @property
    def is_global(self) -> bool:
        """Whether one set of weights serves all parameters."""
        return self.granularity == "global"

    def blocks(
        self, parameters: Sequence[Tensor], groups: Sequence[Mapping[str, Any]] | None
    ) -> Blocks | None:
        """Blocks for these parameters; None if there is only one.

        Args:
            parameters: all that may be shared, in a fixed order: for `"parameter"` each is a block, shared or not, so
                that a method's memory of a block stays in its place.
            groups: the optimizer's parameter groups.

        Raises:
            ValueError: `"group"` without an optimizer.
        """
        if self.is_global:
            return None
        if self.granularity == "group":
            if groups is None:
                raise ValueError(
                    '`granularity="group"` needs the parameter groups of an optimizer. Use `GradientSurgery`, or '
                    "pass a partition."
                )
            place = {id(p): i for i, group in enumerate(groups) for p in group["params"]}
            return Blocks(tuple(str(i) for i in range(len(groups))), place, 0)
        if self.granularity == "parameter":
            names = tuple(str(i) for i in range(len(parameters)))
            return Blocks(names, {id(p): i for i, p in enumerate(parameters)}, 0)
        place = {id(p): i for i, part in enumerate(self._named.values()) for p in part}
        return Blocks((*self._named, REST), place, len(self._named))
