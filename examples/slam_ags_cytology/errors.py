"""The one error that the command line prints as a clean message, and the lists inside it."""

from collections.abc import Iterable


class UserError(ValueError):
    """Something that the user can put right: a setting, a file or a folder."""


def listing(items: Iterable[object], limit: int = 5) -> str:
    """The first few items as text, and how many more there are."""
    shown = [str(item) for item in items]
    more = f" and {len(shown) - limit} more" if len(shown) > limit else ""
    return ", ".join(shown[:limit]) + more
