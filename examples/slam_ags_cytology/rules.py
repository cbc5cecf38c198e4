"""What must hold for bags, cells and splits, checked once: later steps can trust the manifest."""

import os
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from urllib.parse import quote

import pandas as pd

from .errors import UserError, listing
from .sources import status

__all__ = ["check_copies", "check_manifest"]


def check_manifest(
    frame: pd.DataFrame, source: str | Path, *, training: bool = True, check_files: bool = True
) -> pd.DataFrame:
    """The frame with a fresh index, if it obeys all rules; see `manifest.read_manifest`."""
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
            found = status(path)
        except (OSError, ValueError):
            found = None
        if found is None:
            missing.append(path)
            continue
        # Some network file systems number no files: the name is all there is to compare.
        known[path] = found[:3] if found.inode else os.path.normcase(path)
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
