"""Tables in documents that come from stored results: found by markers, compared, and written anew.

A table stands between two comments, each on a line of its own:

    <!-- table: multitask overlaid -->
    ...
    <!-- end of table -->

The name is that of the JSON file and, where a file has several tables, which of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from benchmarks.tables import TABLES

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "benchmarks/*.md", "docs/*.md", "examples/*/*.md")
    for path in ROOT.glob(pattern)
)
"""Where tables may be marked."""

BEGIN, END = re.compile(r"<!-- table: (\S+(?: \S+)*) -->"), "<!-- end of table -->"
LIKE_A_MARKER = re.compile(r"\s*<!--.*\btable\b.*")


def rendered(folder: Path) -> dict[str, str]:
    """All tables of the results in `folder`, by the names that their markers have."""
    found: dict[str, str] = {}
    for stem, render in TABLES.items():
        result = json.loads((folder / f"{stem}.json").read_text(encoding="utf-8"))
        found |= {f"{stem} {part}".rstrip(): text for part, text in render(result).items()}
    return found


def marked(text: str) -> dict[str, str]:
    """The tables that stand in a document, by name.

    Raises:
        ValueError: a marker is not one, is not closed, or comes twice.
    """
    return {name: "\n".join(lines) for name, lines in _parts(text) if name is not None}


def filled(text: str, tables: Mapping[str, str]) -> str:
    """A document with `tables` in the places that are marked for them.

    Raises:
        ValueError: a marker is not one, is not closed, comes twice, or names no table.
    """
    lines: list[str] = []
    for name, content in _parts(text):
        if name is None:
            lines += content
        elif name in tables:
            lines += tables[name].split("\n")
        else:
            raise ValueError(
                f"A marker must name a table of `benchmarks.tables`. Got {name!r}. "
                f"There are {', '.join(tables)}."
            )
    return "\n".join(lines)


def rewrite(documents: Iterable[Path], tables: Mapping[str, str]) -> list[Path]:
    """Put `tables` into all documents, or into none where one has a wrong marker.

    Returns:
        The documents that changed.

    Raises:
        ValueError: as `filled`, with the name of the document.
    """
    changed = {}
    for path in documents:
        before = path.read_text(encoding="utf-8")
        try:
            after = filled(before, tables)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        if after != before:
            changed[path] = after
    for path, text in changed.items():
        path.write_text(text, encoding="utf-8")
    return list(changed)


def _parts(text: str) -> list[tuple[str | None, list[str]]]:
    """Lines of a document in parts: the content of a table with its name, all others, markers too, with None."""
    parts: list[tuple[str | None, list[str]]] = [(None, [])]
    for place, line in enumerate(text.split("\n"), 1):
        inside = parts[-1][0]
        begin = BEGIN.fullmatch(line)
        if begin and inside is None:
            name = begin[1]
            if any(name == other for other, _ in parts):
                raise ValueError(f"A table must stand once. Line {place} marks {name!r} again.")
            parts[-1][1].append(line)
            parts.append((name, []))
        elif line == END and inside is not None:
            parts.append((None, [line]))
        elif LIKE_A_MARKER.fullmatch(line):
            expected = f"{END!r} for {inside!r}" if inside else "'<!-- table: NAME -->'"
            raise ValueError(f"The next marker must be {expected}. Line {place} is {line!r}.")
        else:
            parts[-1][1].append(line)
    if parts[-1][0] is not None:
        raise ValueError(f"A table must end with {END!r}. That of {parts[-1][0]!r} does not.")
    return parts
