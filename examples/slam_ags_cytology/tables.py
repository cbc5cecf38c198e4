"""Read any CSV file that a person or a spreadsheet wrote, as a table of text.

Separator, byte-order mark and empty lines are seen to; what cannot be read safely is refused.
"""

import csv
import difflib
import io
import re
from collections.abc import Collection, Sequence
from pathlib import Path

import pandas as pd

from .errors import UserError, listing

__all__ = ["read_table", "require_columns"]

# What people call these columns elsewhere; only used to suggest, never to guess.
SYNONYMS = {
    "path": ("file", "filename", "file_name", "filepath", "file_path", "image", "img"),
    "bag": ("slide", "slide_id", "bag_id", "bag_name", "case", "case_id", "sample"),
    "label": ("bag_label", "slide_label", "target", "y", "diagnosis"),
    "split": ("set", "fold", "partition", "subset"),
}


def read_table(path: str | Path) -> pd.DataFrame:
    """The rows of a CSV file as stripped text; column names in lower case; index = line number."""
    text = _decode(Path(path))
    declared = re.match(r"sep=(.)\r?\n", text)  # a first line that some spreadsheets write
    start = declared.end() if declared else 0
    header_line = text[start:].lstrip("\r\n").split("\n", 1)[0]
    separator = declared[1] if declared else max(",;\t", key=header_line.count)
    reader = csv.reader(io.StringIO(text[start:], newline=""), delimiter=separator, strict=True)
    header: list[str] = []
    rows: list[list[str]] = []
    lines: list[int] = []
    try:
        for cells in reader:
            fields = [cell.strip() for cell in cells]
            if not any(fields):
                continue
            if not header:
                header = [name.lower() for name in fields]
                continue
            line = reader.line_num + (1 if declared else 0)
            rows.append(_fit(fields, header, line, path))
            lines.append(line)
    except csv.Error as error:
        raise UserError(
            f"{path} must be a CSV file. Line {reader.line_num} cannot be read: {error}."
        ) from None
    if not header:
        raise UserError(f"{path} is empty. A manifest has a header line and one line per cell.")
    if not rows:
        raise UserError(f"{path} has a header line but no rows. Add one line per cell.")
    return _named(pd.DataFrame(rows, index=lines, dtype=str), header, path)


def _decode(path: Path) -> str:
    if not path.is_file():
        found = "It is a folder" if path.is_dir() else "There is no such file"
        raise UserError(f"{path} must be a CSV file. {found}.")
    raw = path.read_bytes()
    if raw.startswith((b"PK\x03\x04", b"\xd0\xcf\x11\xe0")):
        raise UserError(f"{path} is a spreadsheet, not a CSV file. Save it as 'CSV UTF-8' first.")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} must be encoded in UTF-8. Byte {error.start} is not. "
            "Save it again as 'CSV UTF-8'."
        ) from None


def _fit(fields: list[str], header: list[str], line: int, path: str | Path) -> list[str]:
    """Fields padded to the header: spreadsheets leave out empty cells at the end of a line."""
    if any(fields[len(header) :]):
        raise UserError(
            f"{path}, line {line}: found {len(fields)} fields, the header has {len(header)}. "
            "Put quotes around fields that contain the separator."
        )
    return (fields + [""] * (len(header) - len(fields)))[: len(header)]


def _named(table: pd.DataFrame, header: list[str], path: str | Path) -> pd.DataFrame:
    repeated = sorted({name for name in header if name and header.count(name) > 1})
    if repeated:
        raise UserError(
            f"{path}: each column must have its own name (case does not matter). "
            f"Found more than once: {listing(repeated)}."
        )
    table.columns = pd.Index(header)
    named: pd.DataFrame = table.loc[:, [name for name in header if name]]
    return named


def require_columns(
    table: pd.DataFrame, required: Sequence[str], path: str | Path, known: Collection[str] = ()
) -> None:
    """Refuse a table without one of the required columns, with a suggestion where one is close.

    Args:
        table: What `read_table` returned.
        required: Names of the columns that must be there.
        path: Where the table came from, for the message.
        known: Columns with a meaning of their own, which are no misspelt required ones.
    """
    found = list(table.columns)
    missing = [name for name in required if name not in found]
    if not missing:
        return
    spare = [name for name in found if name not in known]
    hints = [f"{name}{_did_you_mean(name, spare)}" for name in missing]
    raise UserError(
        f"{path} must have the columns {', '.join(required)}. Found: {listing(found, 20)}. "
        f"Missing: {', '.join(hints)}."
    )


def _did_you_mean(name: str, candidates: Sequence[str]) -> str:
    close = [other for other in candidates if other in SYNONYMS.get(name, ())]
    close = close or difflib.get_close_matches(name, candidates, n=1, cutoff=0.6)
    return f" (did you mean to rename {close[0]!r}?)" if close else ""
