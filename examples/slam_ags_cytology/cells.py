"""Images of single cells: found in folders, named by class, divided into pools."""

import difflib
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from .errors import UserError, listing
from .files import portable_path
from .manifest import SPLITS
from .recipe import BagsConfig
from .sources import members, read_bytes
from .splits import divide
from .tables import read_table, require_columns

__all__ = ["Cell", "apply_split_csv", "assign_splits", "class_of", "find_cells", "load_cells"]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp")
_NUMBERED = re.compile(r"([A-Z]{3})_\d+")


class Cell(NamedTuple):
    """One image of a cell."""

    file: str
    """Path relative to the root of all cells, with /."""
    kind: str
    """Its class."""
    split: str = ""
    group: str = ""


def load_cells(config: BagsConfig) -> list[Cell]:
    """All cells of the classes in use, with their split, sorted by file."""
    assert config.cells is not None  # see check_config
    cells = find_cells(config.cells, config.class_from)
    if config.split_csv is not None:
        cells = apply_split_csv(cells, config.split_csv, config.cells)
    _check_classes(cells, config)
    used = {*config.normal, *config.positive, *config.distractors}
    return assign_splits([cell for cell in cells if cell.kind in used], config)


def find_cells(root: Path, class_from: str = "auto") -> list[Cell]:
    """All images below `root`, sorted by path, whatever order the file system lists them in.

    A tar archive counts as a folder (its own name is no class); so `root` may be one, or hold a few (shards). Hidden
    files and folders are skipped: some are copies left by a file manager.
    """
    if root.is_file() and root.suffix == ".tar":
        return _sorted(_in_archive(root, "", class_from), root)
    if not root.is_dir():
        found = "It is a file" if root.exists() else "There is no such folder"
        raise UserError(f"cells must be a folder of images, or a tar archive. {root}: {found}.")
    cells: list[Cell] = []
    visited: set[str] = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        place = os.path.realpath(folder)
        if place in visited:  # a link back to a folder seen before
            folders.clear()
            continue
        visited.add(place)
        folders[:] = sorted(name for name in folders if not _hidden(name))
        relative = Path(folder).relative_to(root).as_posix()
        prefix = "" if relative == "." else f"{relative}/"
        for name in names:
            if _hidden(name):
                continue
            if name.lower().endswith(IMAGE_SUFFIXES):
                cells.append(Cell(prefix + name, class_of(prefix + name, class_from)))
            elif name.endswith(".tar"):
                cells += _in_archive(Path(folder, name), f"{prefix}{name}/", class_from)
    return _sorted(cells, root)


def _sorted(cells: list[Cell], root: Path) -> list[Cell]:
    if not cells:
        raise UserError(
            f"cells must hold images ({', '.join(IMAGE_SUFFIXES)}). Found none below {root}."
        )
    return sorted(cells)


def _in_archive(archive: Path, prefix: str, class_from: str) -> list[Cell]:
    """The images of an archive; a class that neither name nor folder tells is in NAME.cls, as WebDataset has it."""
    inside = members(archive)
    cells = []
    for name in inside:
        file = Path(name).as_posix()
        if not file.lower().endswith(IMAGE_SUFFIXES) or any(map(_hidden, file.split("/"))):
            continue
        kind = class_of(file, class_from)
        label = inside.get(name.rsplit(".", 1)[0] + ".cls")
        if not kind and label is not None and class_from == "auto":
            kind = read_bytes(label).decode("utf-8", "replace").strip()
        cells.append(Cell(prefix + file, kind))
    return cells


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def class_of(file: str, class_from: str = "auto") -> str:
    """Class of a cell, from the name of its file or its top folder; empty if there is none."""
    *folders, name = file.split("/")
    numbered = _NUMBERED.match(name)
    if numbered and class_from != "folder":
        return numbered[1]
    return folders[0] if folders and class_from != "name" else ""


def _check_classes(cells: Sequence[Cell], config: BagsConfig) -> None:
    counts = Counter(cell.kind or "(no class)" for cell in cells)
    asked = [*config.normal, *config.positive, *config.distractors]
    unknown = [name for name in asked if name not in counts]
    if not unknown:
        return
    close = difflib.get_close_matches(unknown[0].upper(), list(counts), n=1, cutoff=0.6)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    folders = {cell.file.split("/")[0] for cell in cells}
    if config.class_from == "auto" and set(unknown) <= folders:
        hint = " These are folders, but the file names look like classes: set class_from=folder."
    elif any("," in name for name in unknown):
        hint = " Separate classes by spaces."
    found = listing((f"{name} ({count})" for name, count in sorted(counts.items())), 30)
    raise UserError(
        f"Every class must be among the cells. Not found: {listing(map(repr, unknown))}. "
        f"Classes found: {found}.{hint}"
    )


def apply_split_csv(cells: Sequence[Cell], path: Path, root: Path) -> list[Cell]:
    """The cells that a published split lists, with its class, split and group."""
    table = read_table(path)
    require_columns(table, ("file",), path)
    if not {"split", "group"} & set(table.columns):
        raise UserError(
            f"{path} must have a column split or group. Found: {listing(table.columns, 20)}."
        )
    blank = pd.Series("", index=table.index, dtype=str)
    columns = {name: table.get(name, blank) for name in ("class", "split", "group")}
    columns["split"] = columns["split"].str.lower()
    wrong = sorted(set(columns["split"]) - set(SPLITS)) if "split" in table else []
    if wrong:
        raise UserError(
            f"{path}: column split must be one of {', '.join(SPLITS)}. "
            f"Found {listing(map(repr, wrong))}."
        )
    base = os.path.abspath(root)
    files = [portable_path(os.path.join(base, file), base) for file in table["file"]]
    twice = [file for file, count in Counter(files).items() if count > 1]
    if twice:
        raise UserError(f"{path} must list a file once. Found more often: {listing(twice)}.")
    known = {cell.file: cell for cell in cells}
    listed = [
        Cell(file, kind or known[file].kind, split, group)
        for file, kind, split, group in zip(files, *columns.values(), strict=True)
        if file in known
    ]
    if not listed:
        raise UserError(
            f"{path} must name files relative to {root}. None of its {len(files)} files is there, "
            f"first {files[0]}."
        )
    _check_groups(listed, path)
    if len(listed) < len(files) or len(listed) < len(cells):
        print(
            f"{path}: {len(listed)} cells are listed and present, {len(files) - len(listed)} "
            f"listed but absent, {len(cells) - len(listed)} present but not listed (not used)."
        )
    return sorted(listed)


def _check_groups(cells: Iterable[Cell], path: Path) -> None:
    first: dict[str, Cell] = {}
    for cell in cells:
        other = first.setdefault(cell.group, cell) if cell.group else cell
        if other.split != cell.split:
            raise UserError(
                f"{path}: a group must not be divided between splits. Group {cell.group!r} holds "
                f"{other.file} ({other.split}) and {cell.file} ({cell.split})."
            )


def assign_splits(cells: Iterable[Cell], config: BagsConfig) -> list[Cell]:
    """The cells sorted by file, each with a split; groups and given splits are kept.

    Depends only on `split_seed`, the class and the relative paths: other classes, bags and seeds do
    not move a cell from one pool to another.
    """
    ordered = sorted(cells)
    strata: dict[str, str] = {}
    for cell in ordered:
        if not cell.split:
            strata.setdefault(_unit(cell), cell.kind)
    splits = divide(strata, config.split_fractions, config.split_seed)
    return [cell if cell.split else cell._replace(split=splits[_unit(cell)]) for cell in ordered]


def _unit(cell: Cell) -> str:
    return f"group {cell.group}" if cell.group else f"file {cell.file}"
