"""Read, check and write manifests: a CSV file with one row per cell.

Columns (in any order; names are stripped and case does not matter):

==============  ========  ===========================================================
path            required  image of one cell, absolute or relative to the manifest's folder
bag             required  name of its bag (a slide)
label           required  0 or 1, the label of the whole bag
split           required  train, val or test, one for the whole bag
instance_label  optional  0 or 1 for this cell, empty = unknown
class_name      optional  free text
group           optional  cells that must share a split (a patient, a field of view)
==============  ========  ===========================================================

Other columns are dropped. The rules about bags and splits are in `rules.py`.
"""

import difflib
import os
from pathlib import Path

import pandas as pd

from .errors import UserError, listing
from .files import portable_path, write_text
from .rules import check_manifest
from .tables import read_table, require_columns

__all__ = [
    "COLUMNS",
    "REQUIRED",
    "SPLITS",
    "manifest_text",
    "parse_manifest",
    "read_manifest",
    "write_manifest",
]

SPLITS = ("train", "val", "test")
REQUIRED = ("path", "bag", "label", "split")
OPTIONAL = ("instance_label", "class_name", "group")
COLUMNS = REQUIRED + OPTIONAL


def read_manifest(
    path: str | Path, *, training: bool = True, check_files: bool = True
) -> pd.DataFrame:
    """The checked manifest, one row per cell in the order of the file.

    Args:
        path: CSV file (comma, semicolon or tab) in UTF-8, with or without a byte-order mark.
        training: Whether `train` must hold bags of both labels.
        check_files: Whether to look at the image files: all must exist, and two names of one file
            (links) count as one cell. Pass False in steps that never open an image.

    Returns:
        Columns path (absolute), bag, split, class_name (text, may be empty), label (int64),
        instance_label (Int8, NA = unknown), and group (text) if the file has one.

    Raises:
        UserError: If the file or one of the rules is broken.
    """
    frame = parse_manifest(read_table(path), path)
    return check_manifest(frame, path, training=training, check_files=check_files)


def write_manifest(frame: pd.DataFrame, path: str | Path) -> Path:
    """Write a manifest in one step (a reader never sees half a file) and return its path."""
    target = Path(path)
    write_text(target, manifest_text(frame, target.parent))
    return target


def manifest_text(frame: pd.DataFrame, folder: Path) -> str:
    """The manifest as CSV text. Files inside `folder` get relative paths: both can be moved."""
    table = frame[[name for name in COLUMNS if name in frame.columns]].copy()
    table["path"] = [portable_path(path, folder) for path in table["path"]]
    text: str = table.to_csv(index=False, lineterminator="\n")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"File names must be valid UTF-8 to be listed in a manifest. Found "
            f"{error.object[max(0, error.start - 40) : error.end]!r}. Rename these files."
        ) from None
    return text


def parse_manifest(table: pd.DataFrame, path: str | Path) -> pd.DataFrame:
    """Typed columns from a table of text; values are checked one by one, bags are not yet."""
    require_columns(table, REQUIRED, path, known=COLUMNS)
    for name in REQUIRED:
        blank = table.index[table[name] == ""]
        if len(blank):
            raise UserError(
                f"{path}: column {name} must be filled in every row. "
                f"It is empty in line {listing(blank)}."
            )
    folder = os.path.abspath(Path(path).parent)
    frame: pd.DataFrame = pd.DataFrame(index=table.index)
    frame["path"] = [os.path.abspath(os.path.join(folder, name)) for name in table["path"]]
    frame["bag"] = table["bag"]
    frame["label"] = _binary(table["label"], "label", path).astype("int64")
    frame["split"] = _split(table["split"], path)
    unknown = pd.Series("", index=table.index, dtype=str)
    instance = table.get("instance_label", unknown)
    frame["instance_label"] = _binary(instance, "instance_label", path)
    frame["class_name"] = table.get("class_name", unknown)
    if "group" in table:
        frame["group"] = table["group"]
    return frame


def _binary(column: pd.Series, name: str, path: str | Path) -> pd.Series:
    """0/1 as Int8 with NA where the text is empty. `1.0` is what spreadsheets make of 1."""
    values = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "": pd.NA, "nan": pd.NA, "na": pd.NA}
    if name in REQUIRED:
        values = {text: value for text, value in values.items() if value is not pd.NA}
    lowered = column.str.lower()
    wrong = column.index[~lowered.isin(list(values))]
    if len(wrong):
        allowed = "0 or 1" if name in REQUIRED else "0, 1 or empty (unknown)"
        raise UserError(
            f"{path}: column {name} must be {allowed}. "
            f"Found {_where(column, wrong)}. Write 0 for negative and 1 for positive."
        )
    return pd.Series([values[text] for text in lowered], index=column.index, dtype="Int8")


def _split(column: pd.Series, path: str | Path) -> pd.Series:
    lowered = column.str.lower()
    wrong = column.index[~lowered.isin(SPLITS)]
    if len(wrong):
        close = difflib.get_close_matches(str(lowered[wrong[0]]), SPLITS, n=1, cutoff=0.4)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise UserError(
            f"{path}: column split must be one of {', '.join(SPLITS)}. "
            f"Found {_where(column, wrong)}.{hint}"
        )
    return lowered


def _where(column: pd.Series, lines: pd.Index) -> str:
    return listing([f"{column[line]!r} (line {line})" for line in lines])
