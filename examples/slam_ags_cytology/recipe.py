"""What bags are asked for: the settings, what is wrong with them, and the cells that they need."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, NamedTuple

from .errors import UserError, listing

__all__ = ["ROLES", "BagsConfig", "Recipe", "bags_per_label", "check_config"]

ROLES = ("normal", "positive", "distractor")


@dataclass(frozen=True)
class BagsConfig:
    """Make OUT/manifest.csv. Give cells (bags are drawn), slides (bags are yours), or both (a folder per slide)."""

    out: Path
    """Run folder. An existing manifest made in another way is never overwritten."""
    cells: Path | None = None
    """Folder of cell images, one folder per class at any depth, or files named CLASS_00001.jpg. Tar archives count as
    folders (there, NAME.cls tells the class where nothing else does). With slides: one folder or archive per slide."""
    slides: Path | None = None
    """CSV file of your own slides: path, bag, label, optional split, instance_label, class_name and
    group (a patient: its slides stay in one split). With cells: one line per slide and no path; the images of slide X
    are all those below CELLS/X."""
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


def check_config(config: BagsConfig) -> None:
    """Refuse settings that are wrong whatever the data are."""
    if config.cells is None and config.slides is None:
        raise UserError(
            "Give cells (a folder of labelled cells, to draw bags from), slides (a CSV file of your own bags), or both "
            "(a folder with one folder of cells per slide, and their labels). Found neither."
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


def bags_per_label(config: BagsConfig, split: str) -> int:
    """Bags of each label that a split shall hold."""
    return {"train": config.train_bags, "val": config.val_bags, "test": config.test_bags}[split]
