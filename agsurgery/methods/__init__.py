"""The methods: functions from the Gramian of the task gradients to the weights of their combination."""

from __future__ import annotations

from agsurgery.methods._base import Method, Reduction, Solution, Weighting, solve
from agsurgery.methods.ags import AGS
from agsurgery.methods.cagrad import CAGrad
from agsurgery.methods.pcgrad import PCGrad
from agsurgery.methods.scalarization import Mean, Sum

__all__ = [
    "AGS",
    "CAGrad",
    "Mean",
    "Method",
    "PCGrad",
    "Reduction",
    "Solution",
    "Sum",
    "Weighting",
    "resolve",
    "solve",
]

_BY_NAME: dict[str, type[Method]] = {
    method.__name__.lower(): method for method in (AGS, CAGrad, Mean, PCGrad, Sum)
}


def resolve(method: str | Weighting) -> Weighting:
    """Return the method itself, or a new one with default settings for a name such as `"cagrad"`.

    Raises:
        ValueError: unknown name.
        TypeError: not a name and not callable, or a class instead of an instance.
    """
    if isinstance(method, str):
        if method.lower() not in _BY_NAME:
            raise ValueError(f"`method` must be one of {sorted(_BY_NAME)}. Got {method!r}.")
        return _BY_NAME[method.lower()]()
    if isinstance(method, type):
        raise TypeError(f"`method` must be an instance. Got the class; write {method.__name__}().")
    if not callable(method):
        raise TypeError(
            "`method` must be a name or a callable from a Gramian to weights. "
            f"Got {type(method).__name__}."
        )
    return method
