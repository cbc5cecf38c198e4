"""Tables in Markdown: rows of cells, and how numbers are written in them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

LEADING = ("AGS", "PCGrad", "CAGrad", "Sum")
"""Methods that lead every table, in bold."""

NOTHING = "–"
"""In a cell that cannot have a number."""


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, others: str = "---") -> str:
    """A table without a newline at its end.

    Args:
        header: names of the columns, the first of which may be empty.
        rows: cells; an empty one stays empty.
        others: how columns other than the first are aligned, as Markdown has it.

    Raises:
        ValueError: a row has not as many cells as the header.
    """
    lines = [_line(header), "|---|" + f"{others}|" * (len(header) - 1)]
    for cells in rows:
        if len(cells) != len(header):
            raise ValueError(
                f"A row must have {len(header)} cells, as the header. Got {len(cells)}: {cells}."
            )
        lines.append(_line(cells))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "|" + "".join(f" {cell} |" if cell else " |" for cell in cells)


def bold(text: str) -> str:
    """The same, in bold."""
    return f"**{text}**"


def method(name: str) -> str:
    """Name of a method, bold where it leads every table."""
    return bold(name) if name in LEADING else name


def plain(text: str) -> str:
    """Text that Markdown shows as it is, in a cell: no end of the cell, no beginning of a tag."""
    return text.replace("<", "&lt;").replace("|", r"\|")


def number(value: float | None, digits: str) -> str:
    """A number as `format` writes it with `digits`, such as ".2f"; a dash for None."""
    return NOTHING if value is None else format(value, digits)


def interval(found: Mapping[str, float] | None, digits: str, *, between: str = ", ") -> str:
    """Mean, and in brackets both ends; a dash for None.

    Args:
        found: `mean`, `low` and `high`.
        digits: of all three.
        between: the ends.
    """
    if found is None:
        return NOTHING
    mean, low, high = (number(found[key], digits) for key in ("mean", "low", "high"))
    return f"{mean} ({low}{between}{high})"
