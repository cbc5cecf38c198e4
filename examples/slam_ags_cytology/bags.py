"""Bags of cells, as a manifest: drawn from folders of labelled cells, or a user's own slides.

No file is copied. What differs from the published script: everything is seeded; cells are divided
into training, validation and test pools *before* bags are drawn, so that no test cell is ever a
training cell; labels are columns, not parts of folder names; and nothing is overwritten.

Cells of the public bone-marrow data set carry no patient or slide: the split is between cells, not
between patients, here and in the paper.
"""

import difflib
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from .errors import UserError
from .manifest import (
    REQUIRED,
    SPLITS,
    check_manifest,
    listing,
    manifest_text,
    parse_manifest,
    portable_path,
    read_table,
    replacing,
    require_columns,
)

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp")
ROLES = ("normal", "positive", "distractor")
_NUMBERED = re.compile(r"([A-Z]{3})_\d+")


@dataclass(frozen=True)
class BagsConfig:
    """Make OUT/manifest.csv. Give either cells (bags are drawn) or slides (bags are yours)."""

    out: Path
    """Run folder. An existing manifest made in another way is never overwritten."""
    cells: Path | None = None
    """Folder of cell images, one folder per class at any depth, or files named CLASS_00001.jpg."""
    slides: Path | None = None
    """CSV file of your own slides: path, bag, label, optional split, instance_label, class_name and
    group (a patient: its slides stay in one split)."""
    class_from: Literal["auto", "name", "folder"] = "auto"
    """Class of a cell: three capitals and a number at the start of its file name (name), the top
    folder below CELLS (folder), or the name where it has that form, else the folder (auto)."""
    normal: tuple[str, ...] = ("LYT",)
    """Classes of normal cells. Each is drawn in proportion to its number of cells."""
    positive: tuple[str, ...] = ("BLA",)
    """Classes of the cells to be found. Each is drawn in proportion to its number of cells."""
    distractors: tuple[str, ...] = ()
    """Classes added to negative and positive bags alike, for instance artefacts (ART)."""
    distractor_rate: float = 0.0
    """Share of distractors in every bag."""
    witness_rate: float = 0.1
    """Share of positive cells in a positive bag: max(1, round(witness_rate * bag_size)) cells."""
    bag_size: int = 100
    """Cells per bag."""
    train_bags: int = 12
    """Training bags of each label: 12 means 12 negative and 12 positive."""
    val_bags: int = 2
    """Validation bags of each label."""
    test_bags: int = 6
    """Test bags of each label."""
    reuse_normals: bool = False
    """Where a split has too few normal cells, allow one cell in several bags of that split; never
    twice in one bag, never in two splits. Positive cells and distractors are never reused."""
    split_csv: Path | None = None
    """A published split of CELLS: CSV with columns file (relative to CELLS), split or group (cells
    that must stay together) or both, optional class. Cells that it does not list are not used."""
    split_fractions: tuple[float, float, float] = (0.6, 0.1, 0.3)
    """Shares of training, validation and test (of the cells of each class, or of the slides of each
    label) where no split is given."""
    split_seed: int = 0
    """Seed of that division. Keep it when you draw other bags: test cells then stay test cells."""
    seed: int = 0
    """Seed of the bags."""


_ONLY_CELLS = (
    *("class_from", "normal", "positive", "distractors", "distractor_rate", "witness_rate"),
    *("bag_size", "train_bags", "val_bags", "test_bags", "reuse_normals", "split_csv", "seed"),
)


def bags(config: BagsConfig) -> Path:
    """Path of OUT/manifest.csv, made as `config` says, or kept if it was made in the same way.

    OUT/bags.json records the configuration, a fingerprint of the input, and a summary.

    Raises:
        UserError: If the configuration cannot be carried out, or OUT holds another manifest.
    """
    check_config(config)
    target = config.out / "manifest.csv"
    if config.slides is not None:
        frame, inputs = _read_slides(config)
    else:
        cells = load_cells(config)
        frame, inputs = None, _digest(cells)
    record: dict[str, Any] = {"config": _portable_config(config), "inputs": inputs}
    if target.exists():
        _refuse_other(target, record)
        print(f"{target}: kept, it was made with the same configuration.")
        return target
    frame = draw_bags(cells, config) if frame is None else frame
    frame = check_manifest(frame, config.slides or config.cells or target)
    text = manifest_text(frame, config.out)
    record["manifest"] = hashlib.sha256(text.encode()).hexdigest()
    record["summary"] = summary(frame)
    _write(target, text, record)
    _report(target, record["summary"], config)
    return target


def check_config(config: BagsConfig) -> None:
    """Refuse settings that are wrong whatever the data are."""
    if (config.cells is None) == (config.slides is None):
        raise UserError(
            "Give either cells (a folder of labelled cells, to draw bags from) or slides (a CSV "
            f"file of your own bags). Found {'neither' if config.cells is None else 'both'}."
        )
    if config.out.exists() and not config.out.is_dir():
        raise UserError(f"out must be a folder. {config.out} is a file.")
    shares = config.split_fractions
    if not (all(0 <= share < 1 for share in shares) and shares[0] and abs(sum(shares) - 1) < 1e-6):
        raise UserError(
            "split_fractions must be three shares (training above 0) that add up to 1. "
            f"Found {shares}. For instance 0.6 0.1 0.3."
        )
    for name in ("seed", "split_seed"):
        if getattr(config, name) < 0:
            raise UserError(f"{name} must not be negative. Found {getattr(config, name)}.")
    if config.slides is not None:
        defaults = {field.name: field.default for field in fields(BagsConfig)}
        idle = [name for name in _ONLY_CELLS if getattr(config, name) != defaults[name]]
        if idle:
            raise UserError(f"{listing(idle)} would have no effect on slides. Leave it out.")
    else:
        _check_recipe(config)


def _check_recipe(config: BagsConfig) -> None:
    if not 0 < config.witness_rate <= 1:
        raise UserError(
            "witness_rate is the share of positive cells in a positive bag, above 0 and at most 1. "
            f"Found {config.witness_rate}. For instance 0.05 for 5 %."
        )
    if not 0 <= config.distractor_rate < 1:
        raise UserError(
            f"distractor_rate must be at least 0 and below 1. Found {config.distractor_rate}."
        )
    if config.bag_size < 2:
        raise UserError(f"bag_size must be at least 2. Found {config.bag_size}.")
    if config.train_bags < 1 or config.val_bags < 0 or config.test_bags < 0:
        raise UserError(
            "train_bags must be at least 1, val_bags and test_bags at least 0. Found "
            f"{config.train_bags}, {config.val_bags} and {config.test_bags}."
        )
    if not config.normal or not config.positive:
        raise UserError("normal and positive must each name at least one class. Found none.")
    if bool(config.distractors) != (config.distractor_rate > 0):
        raise UserError(
            "distractors and distractor_rate must be given together. Found "
            f"{config.distractors or 'no distractors'} at rate {config.distractor_rate}."
        )
    named = [*config.normal, *config.positive, *config.distractors]
    repeated = sorted({name for name in named if named.count(name) > 1})
    if repeated:
        raise UserError(
            "A class must be named once, as normal, positive or distractor. "
            f"Found more often: {listing(repeated)}."
        )
    recipe = Recipe.of(config)
    if recipe.positives + recipe.distractors > recipe.size:
        raise UserError(
            f"Positive cells and distractors must fit in a bag. Found {recipe.positives} and "
            f"{recipe.distractors} in a bag of {recipe.size}. Lower distractor_rate."
        )


# --- cells: find, name, divide -----------------------------------------------------------------


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

    Hidden files and folders are skipped: some are copies left by a file manager.
    """
    if not root.is_dir():
        found = "It is a file" if root.exists() else "There is no such folder"
        raise UserError(f"cells must be a folder of images. {root}: {found}.")
    files: list[str] = []
    visited: set[str] = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        place = os.path.realpath(folder)
        if place in visited:  # a link back to a folder seen before
            folders.clear()
            continue
        visited.add(place)
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f != "__MACOSX")
        relative = Path(folder).relative_to(root).as_posix()
        prefix = "" if relative == "." else f"{relative}/"
        files.extend(
            prefix + name
            for name in names
            if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")
        )
    if not files:
        raise UserError(
            f"cells must hold images ({', '.join(IMAGE_SUFFIXES)}). Found none below {root}."
        )
    return [Cell(file, class_of(file, class_from)) for file in sorted(files)]


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


def divide(
    strata: Mapping[str, str], fractions: tuple[float, float, float], seed: int
) -> dict[str, str]:
    """A split for every unit, in the wanted proportions inside every stratum.

    Units are ordered by a hash of seed and name, not by a generator: no listing order can matter.
    """
    members: dict[str, list[str]] = {}
    for unit, stratum in strata.items():
        members.setdefault(stratum, []).append(unit)
    splits: dict[str, str] = {}
    for units in members.values():
        units.sort(key=lambda unit: _sha256(f"{seed}/{unit}"))
        counts = apportion(len(units), fractions)
        labels = [split for split, count in zip(SPLITS, counts, strict=True) for _ in range(count)]
        splits.update(zip(units, labels, strict=True))
    return splits


def apportion(total: int, fractions: tuple[float, float, float]) -> tuple[int, int, int]:
    """Whole numbers near the fractions that add up to `total`, none of them 0 if that is possible.

    With too few for all, training comes first, then test, then validation.
    """
    first = [index for index in (0, 2, 1) if fractions[index] > 0][:total]
    counts = [int(index in first) for index in range(3)]
    for _ in range(total - len(first)):
        lag = [fractions[index] * total - counts[index] for index in range(3)]
        counts[int(np.argmax(lag))] += 1
    return counts[0], counts[1], counts[2]


# --- bags: how many cells of which kind, from which pool ---------------------------------------


class Recipe(NamedTuple):
    """How many cells of each role a bag holds."""

    size: int
    positives: int
    distractors: int

    @classmethod
    def of(cls, config: BagsConfig) -> "Recipe":
        """The recipe that a configuration asks for."""
        return cls(
            config.bag_size,
            max(1, round(config.witness_rate * config.bag_size)),
            round(config.distractor_rate * config.bag_size),
        )

    def counts(self, label: int) -> dict[str, int]:
        """Cells of each role in one bag."""
        positives = self.positives if label else 0
        normals = self.size - self.distractors - positives
        return {"normal": normals, "positive": positives, "distractor": self.distractors}

    def needs(self, bags_per_label: int, reuse_normals: bool) -> dict[str, int]:
        """Different cells of each role for so many bags of each label."""
        negative, positive = self.counts(0), self.counts(1)
        needs = {role: bags_per_label * (negative[role] + positive[role]) for role in ROLES}
        if reuse_normals and bags_per_label:
            needs["normal"] = negative["normal"]  # the largest number that one bag needs
        return needs


Pools = dict[str, dict[str, list[Cell]]]
"""Cells by split and role."""


def draw_bags(cells: Iterable[Cell], config: BagsConfig) -> pd.DataFrame:
    """The manifest of bags drawn from cells with a split; the order of `cells` does not matter."""
    pools = _pools(cells, config)
    available = {
        split: {role: len(pool) for role, pool in roles.items()} for split, roles in pools.items()
    }
    short = _shortages(config, available)
    if short:
        raise UserError(
            "Too few cells for these bags: "
            + "; ".join(short)
            + ". "
            + _remedies(config, available)
        )
    recipe, rows = Recipe.of(config), []
    for index, split in enumerate(SPLITS):
        rng = np.random.default_rng([config.seed, index])
        rows.extend(_draw_split(split, pools[split], recipe, _bags_per_label(config, split), rng))
    return _frame(rows, config)


def _pools(cells: Iterable[Cell], config: BagsConfig) -> Pools:
    roles = dict.fromkeys(config.normal, "normal") | dict.fromkeys(config.positive, "positive")
    roles |= dict.fromkeys(config.distractors, "distractor")
    pools: Pools = {split: {role: [] for role in ROLES} for split in SPLITS}
    for cell in sorted(cells):
        if cell.kind in roles:
            pools[cell.split][roles[cell.kind]].append(cell)
    return pools


def _bags_per_label(config: BagsConfig, split: str) -> int:
    return {"train": config.train_bags, "val": config.val_bags, "test": config.test_bags}[split]


class _Row(NamedTuple):
    bag: str
    label: int
    split: str
    instance_label: int
    cell: Cell


def _draw_split(
    split: str,
    pools: Mapping[str, Sequence[Cell]],
    recipe: Recipe,
    bags_per_label: int,
    rng: np.random.Generator,
) -> list[_Row]:
    reuse = recipe.needs(bags_per_label, False)["normal"] > len(pools["normal"])
    queues = {role: iter(rng.permutation(len(pools[role]))) for role in ROLES}
    rows: list[_Row] = []
    for label, word in ((0, "negative"), (1, "positive")):
        for number in range(1, bags_per_label + 1):
            picked: list[_Row] = []
            for role, count in recipe.counts(label).items():
                if role == "normal" and reuse:
                    chosen = list(rng.choice(len(pools[role]), count, replace=False))
                else:
                    chosen = [next(queues[role]) for _ in range(count)]
                bag, truth = f"{split}-{word}-{number:03d}", int(role == "positive")
                picked += [_Row(bag, label, split, truth, pools[role][i]) for i in chosen]
            # Shuffled, so that the position of a cell in its bag tells nothing about it.
            rows += [picked[i] for i in rng.permutation(len(picked))]
    return rows


def _frame(rows: Sequence[_Row], config: BagsConfig) -> pd.DataFrame:
    root = os.path.abspath(config.cells or "")
    frame: pd.DataFrame = pd.DataFrame(
        {
            "path": [os.path.join(root, *row.cell.file.split("/")) for row in rows],
            "bag": [row.bag for row in rows],
            "label": np.array([row.label for row in rows], dtype=np.int64),
            "split": [row.split for row in rows],
            "instance_label": pd.array([row.instance_label for row in rows], dtype="Int8"),
            "class_name": [row.cell.kind for row in rows],
        }
    )
    if any(row.cell.group for row in rows):
        frame["group"] = [row.cell.group for row in rows]
    return frame


# --- too few cells: say what is missing, and the smallest change that works --------------------

Available = Mapping[str, Mapping[str, int]]


def _shortages(
    config: BagsConfig, available: Available, splits: Sequence[str] = SPLITS
) -> list[str]:
    short = []
    for split in splits:
        number = _bags_per_label(config, split)
        for role, need in Recipe.of(config).needs(number, config.reuse_normals).items():
            if need > available[split][role]:
                name = role if role == "distractor" else f"{role} cell"
                short.append(f"{split} needs {need} {name}s, there are {available[split][role]}")
    return short


def _remedies(config: BagsConfig, available: Available) -> str:
    """Changes of one setting that would be enough, each the smallest of its kind."""

    def enough(**change: Any) -> bool:
        changed = _changed(config, **change)
        recipe = Recipe.of(changed)
        if recipe.positives + recipe.distractors > recipe.size:
            return False
        return not _shortages(changed, available)

    remedies = []
    if not config.reuse_normals and enough(reuse_normals=True):
        remedies.append(
            "reuse_normals=True (a normal cell may then be in several bags of one split)"
        )
    fewer = _fewer_bags(config, available)
    if fewer:
        remedies.append(fewer)
    # Smaller bags must still hold a positive cell without being rounded up to one.
    sizes = range(config.bag_size - 1, 1, -1)
    size = next((n for n in sizes if config.witness_rate * n >= 0.5 and enough(bag_size=n)), None)
    if size:
        remedies.append(f"bag_size={size}")
    for name, now in (
        ("witness_rate", Recipe.of(config).positives),
        ("distractor_rate", Recipe.of(config).distractors),
    ):
        rates = (number / config.bag_size for number in range(now - 1, 0, -1))
        rate = next((rate for rate in rates if enough(**{name: rate})), None)
        if rate:
            remedies.append(f"{name}={rate:g}")
    if not remedies:
        return "No single change is enough: add cells, or combine fewer and smaller bags."
    return "Enough would be " + ", or ".join(remedies) + "."


def _changed(config: BagsConfig, **change: Any) -> BagsConfig:
    return replace(config, **change)


def _fewer_bags(config: BagsConfig, available: Available) -> str:
    """The largest numbers of bags that can be drawn, as settings; empty if a split allows none."""
    changes = []
    for split in SPLITS:
        wanted, name = _bags_per_label(config, split), f"{split}_bags"
        most = next(
            (
                number
                for number in range(wanted, -1, -1)
                if not _shortages(_changed(config, **{name: number}), available, [split])
            ),
            0,
        )
        if wanted and not most:
            return ""
        if most < wanted:
            changes.append(f"{name}={most}")
    return ", ".join(changes[:-1]) + (" and " if changes[1:] else "") + "".join(changes[-1:])


# --- slides: the user's own bags ---------------------------------------------------------------


def _read_slides(config: BagsConfig) -> tuple[pd.DataFrame, str]:
    """The typed rows of a user's manifest, its split drawn if absent, and a digest of the file."""
    assert config.slides is not None  # see check_config
    table = read_table(config.slides)
    drawn = "split" not in table.columns or not (table["split"] != "").any()
    if drawn:
        table["split"] = "train"  # a placeholder that every later check accepts
    require_columns(table, REQUIRED, config.slides)
    frame = parse_manifest(table, config.slides)
    if drawn:
        check_manifest(frame, config.slides, check_files=False)
        frame["split"] = _divide_slides(frame, config)
    return frame, hashlib.sha256(config.slides.read_bytes()).hexdigest()


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


# --- records -----------------------------------------------------------------------------------


def _digest(cells: Iterable[Cell]) -> str:
    return _sha256("\n".join("\t".join(cell) for cell in cells))


def _sha256(text: str) -> str:
    """Hexadecimal digest; file names that are not valid UTF-8 are let through here."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def _portable_config(config: BagsConfig) -> dict[str, Any]:
    """The configuration as JSON values; paths inside OUT are relative, so that OUT can be moved."""
    values = asdict(config)
    del values["out"]
    for name, value in values.items():
        if isinstance(value, Path):
            values[name] = portable_path(value, config.out)
        elif isinstance(value, tuple):
            values[name] = list(value)
    return values


def _refuse_other(target: Path, record: Mapping[str, Any]) -> None:
    """Refuse to go on if the manifest was made in another way than `record` says."""
    advice = f"Choose another out, or delete {target} to make it again."
    try:
        made = json.loads((target.parent / "bags.json").read_text(encoding="utf-8"))
        config = {name: made["config"].get(name) for name in record["config"]}
        inputs, digest = made["inputs"], made["manifest"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{target} exists, but bags.json beside it does not say how it was made. "
            f"It is not overwritten. {advice}"
        ) from None
    different = [
        f"{name} was {config[name]}, is {value}"
        for name, value in record["config"].items()
        if config[name] != value
    ]
    if different:
        raise UserError(
            f"{target} was made with another configuration and is not overwritten: "
            f"{listing(different)}. {advice}"
        )
    if inputs != record["inputs"]:
        raise UserError(
            f"{target} was made from other input: since then files were added, removed, renamed or "
            f"divided differently. It is not overwritten. {advice}"
        )
    if digest != hashlib.sha256(target.read_bytes()).hexdigest():
        raise UserError(
            f"{target} was changed since it was made. To use your own manifest, give it as slides "
            f"with another out. {advice}"
        )


def summary(frame: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Per split: bags of each label, cells, different cells, positives, witness rate, classes."""
    result: dict[str, dict[str, Any]] = {}
    for split in SPLITS:
        part = frame[frame["split"] == split]
        first = part.drop_duplicates("bag")
        positive = part[part["label"] == 1]
        known = positive["instance_label"].dropna()
        result[split] = {
            "negative_bags": int((first["label"] == 0).sum()),
            "positive_bags": int((first["label"] == 1).sum()),
            "cells": len(part),
            "different_cells": int(part["path"].nunique()),
            "bags_share_cells": bool(part["path"].duplicated().any()),
            "positive_cells": int((known == 1).sum()),
            "unlabelled_cells": int(len(positive) - len(known)),
            "witness_rate": float((known == 1).mean()) if len(known) else None,
            "classes": {str(k): int(v) for k, v in part["class_name"].value_counts().items() if k},
        }
    return result


def _write(target: Path, text: str, record: Mapping[str, Any]) -> None:
    """The record first: a manifest without a record would be refused for ever."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target.with_name("bags.json")) as temporary:
        temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    with replacing(target) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def _report(target: Path, numbers: Mapping[str, Mapping[str, Any]], config: BagsConfig) -> None:
    print(f"{target}:")
    for split, part in numbers.items():
        rate = part["witness_rate"]
        bags_, cells = part["negative_bags"] + part["positive_bags"], part["cells"]
        if not bags_:
            print(f"  {split:5}  no bags")
            continue
        witness = "unknown" if rate is None else f"{rate:.2%}"
        print(
            f"  {split:5}  {bags_} bags ({part['negative_bags']} negative, {part['positive_bags']} "
            f"positive), {cells} cells, witness rate {witness}"
        )
        if part["bags_share_cells"]:
            print(
                f"         only {part['different_cells']} are different: bags share cells, so give "
                "intervals over several draws (seed)."
            )
    if config.cells is None:
        return
    print("  Cells, not patients, are divided between the splits.")
    own = config.cells / "manifest.csv"
    if config.split_csv is None and own.is_file():
        print(f"  {own} was not used. If it is a published split, give it as split_csv.")
