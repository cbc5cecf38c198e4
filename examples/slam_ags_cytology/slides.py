"""The user's own slides as bags, with a split drawn between slides or patients if none is given."""

import hashlib
import os
from pathlib import Path

import pandas as pd

from .cells import find_cells
from .errors import UserError, listing
from .files import text_digest
from .manifest import parse_manifest
from .recipe import BagsConfig
from .rules import check_manifest
from .splits import divide
from .tables import read_table, require_columns

__all__ = ["read_slides"]


def read_slides(config: BagsConfig) -> tuple[pd.DataFrame, str]:
    """The typed rows of a user's manifest, its split drawn if absent, and a digest of what was read."""
    assert config.slides is not None  # see check_config
    table = read_table(config.slides)
    digest = hashlib.sha256(config.slides.read_bytes()).hexdigest()
    drawn = "split" not in table.columns or not (table["split"] != "").any()
    if drawn:
        table["split"] = "train"  # a placeholder that every later check accepts
    if config.cells is not None:
        table = _with_cells(table, config.slides, config.cells)
        digest = text_digest("\n".join((digest, *table["path"])))
    frame = parse_manifest(table, config.slides)
    if drawn:
        check_manifest(frame, config.slides, check_files=False)
        frame["split"] = _divide_slides(frame, config)
    return frame, digest


def _with_cells(table: pd.DataFrame, source: Path, root: Path) -> pd.DataFrame:
    """A row for every image below ROOT/SLIDE, from a table with a row for every slide."""
    require_columns(table, ("bag", "label"), source)
    if "path" in table:
        raise UserError(
            f"{source} lists images (column path), so that cells would have no effect. Give one of the two, or list "
            "slides: bag and label, one line for each."
        )
    twice = sorted(set(table["bag"][table["bag"].duplicated()]))
    if twice:
        raise UserError(f"{source} must list a slide once. Found more often: {listing(twice)}.")
    missing = [name for name in table["bag"] if not (name and (root / name).exists())]
    if missing:
        raise UserError(
            f"Every slide in {source} must be a folder (or tar archive) in {root}. Not there: "
            f"{listing(map(repr, missing))}."
        )
    unlisted = {path.name for path in root.iterdir() if path.is_dir()} - set(table["bag"])
    if unlisted:
        print(f"{root}: {len(unlisted)} folders are no slides of {source} and are not used.")
    paths = [
        [os.path.abspath(root / name / cell.file) for cell in find_cells(root / name)]
        for name in table["bag"]
    ]
    parse_manifest(table.assign(path="."), source)  # what is wrong is told by the line of the slide
    expanded: pd.DataFrame = table.assign(path=paths).explode("path", ignore_index=True)
    return expanded


def _divide_slides(frame: pd.DataFrame, config: BagsConfig) -> pd.Series:
    """A split for every row: whole bags, or whole groups of bags, stratified by label."""
    unit = _connected(frame) if "group" in frame else frame["bag"]
    # A patient with slides of both labels is counted as positive.
    labels = frame["label"].groupby(unit, sort=True).max()
    for label in (0, 1):
        number = int((labels == label).sum())
        wanted = sum(share > 0 for share in config.split_fractions)
        if number < wanted:
            raise UserError(
                f"{config.slides}: to draw the splits, at least {wanted} slides (groups, if given) "
                f"of each label are needed. Found {number} of label {label}. Add a column split, "
                "or set a share of split_fractions to 0."
            )
    strata = {str(name): str(label) for name, label in labels.items()}
    splits = divide(strata, config.split_fractions, config.split_seed)
    return unit.map(splits)


def _connected(frame: pd.DataFrame) -> pd.Series:
    """For every row the name of its cluster of bags, linked by shared groups."""
    parent: dict[str, str] = {}

    def top(name: str) -> str:
        while parent.setdefault(name, name) != name:
            name = parent[name]
        return name

    bag_names = [f"bag {name}" for name in frame["bag"]]
    for bag, group in sorted(set(zip(bag_names, frame["group"], strict=True))):
        low, high = sorted((top(bag), top(f"group {group}" if group else bag)))
        parent[high] = low
    return pd.Series([top(bag) for bag in bag_names], index=frame.index)
