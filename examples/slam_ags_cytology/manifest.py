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

Other columns are dropped. Every rule is checked here, once: later steps can trust the frame.
"""

import csv
import difflib
import io
import os
import re
import stat
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import pandas as pd

from .errors import UserError

SPLITS = ("train", "val", "test")
REQUIRED = ("path", "bag", "label", "split")
OPTIONAL = ("instance_label", "class_name", "group")
COLUMNS = REQUIRED + OPTIONAL

# What people call these columns elsewhere; only used to suggest, never to guess.
SYNONYMS = {
    "path": ("file", "filename", "file_name", "filepath", "file_path", "image", "img"),
    "bag": ("slide", "slide_id", "bag_id", "bag_name", "case", "case_id", "sample"),
    "label": ("bag_label", "slide_label", "target", "y", "diagnosis"),
    "split": ("set", "fold", "partition", "subset"),
}


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
    table = read_table(path)
    require_columns(table, REQUIRED, path)
    return check_manifest(
        parse_manifest(table, path), path, training=training, check_files=check_files
    )


def write_manifest(frame: pd.DataFrame, path: str | Path) -> Path:
    """Write a manifest in one step (a reader never sees half a file) and return its path."""
    target = Path(path)
    text = manifest_text(frame, target.parent)
    with replacing(target) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
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


def portable_path(path: str | Path, folder: str | Path) -> str:
    """`path` relative to `folder` (with /) if it lies inside, else absolute."""
    absolute, root = os.path.abspath(path), os.path.abspath(folder)
    inside = absolute == root or absolute.startswith(root.rstrip(os.sep) + os.sep)
    return Path(absolute).relative_to(root).as_posix() if inside else absolute


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when the block ends without an error."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def listing(items: Iterable[object], limit: int = 5) -> str:
    """The first few items as text, and how many more there are."""
    shown = [str(item) for item in items]
    more = f" and {len(shown) - limit} more" if len(shown) > limit else ""
    return ", ".join(shown[:limit]) + more


# --- from bytes to a table of text -------------------------------------------------------------


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


def require_columns(table: pd.DataFrame, required: Sequence[str], path: str | Path) -> None:
    """Refuse a table without one of the required columns, with a suggestion where one is close."""
    found = list(table.columns)
    missing = [name for name in required if name not in found]
    if not missing:
        return
    spare = [name for name in found if name not in COLUMNS]
    hints = [f"{name}{_did_you_mean(name, spare)}" for name in missing]
    raise UserError(
        f"{path} must have the columns {', '.join(required)}. Found: {listing(found, 20)}. "
        f"Missing: {', '.join(hints)}."
    )


def _did_you_mean(name: str, candidates: Sequence[str]) -> str:
    close = [other for other in candidates if other in SYNONYMS.get(name, ())]
    close = close or difflib.get_close_matches(name, candidates, n=1, cutoff=0.6)
    return f" (did you mean to rename {close[0]!r}?)" if close else ""


# --- from text to typed columns ----------------------------------------------------------------


def parse_manifest(table: pd.DataFrame, path: str | Path) -> pd.DataFrame:
    """Typed columns from a table of text; values are checked one by one, bags are not yet."""
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


# --- rules about bags, cells and splits --------------------------------------------------------


def check_manifest(
    frame: pd.DataFrame, source: str | Path, *, training: bool = True, check_files: bool = True
) -> pd.DataFrame:
    """The frame with a fresh index, if it obeys all rules; see `read_manifest`."""
    _check_bag_names(frame, source)
    _check_one_value_per_bag(frame, "label", source)
    _check_one_value_per_bag(frame, "split", source)
    _check_bag_sizes(frame, source)
    _check_instances(frame, source)
    identity = _identities(frame, source) if check_files else frame["path"].map(os.path.normcase)
    _check_cells(frame, identity, source)
    if "group" in frame:
        _check_groups(frame, source)
    if training:
        _check_training(frame, source)
    checked: pd.DataFrame = frame.reset_index(drop=True)
    return checked


def _check_bag_names(frame: pd.DataFrame, source: str | Path) -> None:
    """Later steps write a file per bag (name percent-encoded), where case may not matter."""
    names = list(dict.fromkeys(frame["bag"]))
    wrong = [name for name in names if not name.isprintable() or len(quote(name)) > 200]
    if wrong:
        raise UserError(
            f"{source}: a bag's name must be short and printable, it names a file later. "
            f"Found {listing(map(repr, wrong))}. Use at most 200 characters (60 if not Latin)."
        )
    folded: dict[str, str] = {}
    for name in names:
        other = folded.setdefault(name.casefold(), name)
        if other != name:
            raise UserError(
                f"{source}: names of bags must differ by more than case. "
                f"Found {other!r} and {name!r}."
            )


def _check_one_value_per_bag(frame: pd.DataFrame, column: str, source: str | Path) -> None:
    kinds = frame.groupby("bag", sort=False)[column].nunique()
    mixed = kinds.index[kinds > 1]
    if len(mixed):
        values = sorted(set(frame.loc[frame["bag"] == mixed[0], column]), key=str)
        raise UserError(
            f"{source}: all cells of a bag must have the same {column}. Bag {mixed[0]!r} has "
            f"{' and '.join(map(str, values))} ({len(mixed)} such bags). "
            "Is each slide named once, and differently from the others?"
        )


def _check_bag_sizes(frame: pd.DataFrame, source: str | Path) -> None:
    counts = frame["bag"].value_counts(sort=False)
    small = counts.index[counts < 2]
    if len(small):
        raise UserError(
            f"{source}: a bag must hold at least 2 cells. {len(small)} bags hold one: "
            f"{listing(map(repr, small))}. Remove these bags, or check column bag."
        )


def _check_instances(frame: pd.DataFrame, source: str | Path) -> None:
    wrong = frame[(frame["label"] == 0) & (frame["instance_label"].fillna(0) == 1)]
    if len(wrong):
        first = wrong.iloc[0]
        raise UserError(
            f"{source}: a bag with label 0 must not hold a cell with instance_label 1. "
            f"Found {len(wrong)}, first {first['path']} in bag {first['bag']!r}. "
            "Correct the bag's label or the cell's."
        )


def _identities(frame: pd.DataFrame, source: str | Path) -> pd.Series:
    """One value per physical file, so that a link to a cell counts as that cell."""
    known: dict[str, Hashable] = {}
    missing: list[str] = []
    for path in frame["path"].unique():
        try:
            status = os.stat(path)
        except (OSError, ValueError):
            missing.append(path)
            continue
        if not stat.S_ISREG(status.st_mode):
            missing.append(path)
        # Some network file systems number no files: the name is all there is to compare.
        known[path] = (status.st_dev, status.st_ino) if status.st_ino else os.path.normcase(path)
    if missing:
        backslash = os.sep == "/" and any("\\" in path for path in missing)
        raise UserError(
            f"{source}: every path must be an existing file. {len(missing)} are not: "
            f"{listing(missing)}. Relative paths start at the manifest's folder"
            + (", and folders are separated by /." if backslash else ".")
        )
    return pd.Series([known[path] for path in frame["path"]], index=frame.index, dtype=object)


def _check_cells(frame: pd.DataFrame, identity: pd.Series, source: str | Path) -> None:
    # Normal by its bag's label, even where the cell itself was not labelled.
    instance = frame["instance_label"].mask(frame["label"] == 0, 0)
    cells = pd.DataFrame(
        {
            "cell": pd.factorize(identity)[0],
            "bag": pd.factorize(frame["bag"])[0],
            "split": frame["split"],
            "instance": instance.astype("Float64"),
        },
    )
    repeated = frame[cells.duplicated(["cell", "bag"])]
    if len(repeated):
        first = repeated.iloc[0]
        raise UserError(
            f"{source}: a bag must not hold the same cell twice. Found {len(repeated)}, first "
            f"{first['path']} in bag {first['bag']!r}. Remove the repeated rows."
        )
    by_cell = cells.groupby("cell", sort=False)
    shared = by_cell["split"].nunique()
    if (shared > 1).any():
        raise UserError(
            f"{source}: a cell must not be in two splits, or the test is no test. "
            f"{int((shared > 1).sum())} cells are: {_sightings(frame, cells, shared)}."
        )
    truths = by_cell["instance"].nunique()
    if (truths > 1).any():
        raise UserError(
            f"{source}: a cell must not be both normal and positive. {int((truths > 1).sum())} "
            f"cells are (cells of a bag with label 0 are normal): "
            f"{_sightings(frame, cells, truths)}."
        )


def _sightings(frame: pd.DataFrame, cells: pd.DataFrame, counts: pd.Series) -> str:
    """The rows of the first cell that was counted more than once."""
    cell = counts.index[counts > 1][0]
    rows = frame[cells["cell"] == cell]
    return listing(
        f"{row.path} ({row.split}, bag {row.bag!r})" for row in rows.itertuples(index=False)
    )


def _check_groups(frame: pd.DataFrame, source: str | Path) -> None:
    grouped = frame[frame["group"] != ""]
    counts = grouped.groupby("group", sort=False)["split"].nunique()
    divided = counts.index[counts > 1]
    if len(divided):
        found = sorted(set(grouped.loc[grouped["group"] == divided[0], "split"]))
        raise UserError(
            f"{source}: a group must not be divided between splits. {len(divided)} are, first "
            f"{divided[0]!r} ({' and '.join(found)}). Move its bags to one split."
        )


def _check_training(frame: pd.DataFrame, source: str | Path) -> None:
    train = frame[frame["split"] == "train"].drop_duplicates("bag")
    negative, positive = (int((train["label"] == label).sum()) for label in (0, 1))
    if not (negative and positive):
        raise UserError(
            f"{source}: split train must hold bags of both labels. "
            f"Found {negative} with label 0 and {positive} with label 1."
        )


def check_copies(frame: pd.DataFrame, copies: Iterable[Sequence[str]]) -> None:
    """Refuse pictures that are in two splits under two names.

    Args:
        frame: A checked manifest.
        copies: Groups of paths with the same content, as found by `store.CellStore.copies`.
    """
    splits = dict(zip(frame["path"], frame["split"], strict=True))
    leaks = [
        group for group in copies if len({splits[path] for path in group if path in splits}) > 1
    ]
    if leaks:
        raise UserError(
            "A cell must not be in two splits under two names, or the test is no test. "
            f"{len(leaks)} pictures are, first: "
            f"{listing(f'{path} ({splits[path]})' for path in leaks[0] if path in splits)}. "
            "Remove the copies."
        )
