"""Methods by name."""

from __future__ import annotations

from agsurgery.methods._base import Method, Weighting

_BY_NAME: dict[str, type[Method]] = {}


def register(*methods: type[Method]) -> None:
    """Make methods known by the names of their classes, in small letters."""
    _BY_NAME.update({method.__name__.lower(): method for method in methods})


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
