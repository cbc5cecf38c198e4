"""Settings of a sweep, and which of them cannot work."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

from .arms import ARMS, check_arm
from .bags import BagsConfig
from .colour import COLOUR
from .embed import EmbedConfig
from .errors import UserError
from .evaluate import EvaluateConfig, check_top_k
from .mil import MilConfig
from .pretrain import PretrainConfig
from .recipe import Recipe
from .report import ReportConfig
from .synthetic import SyntheticConfig

__all__ = ["SweepConfig", "check_sweep"]

_HERE = Path()  # the steps' own `out`: replaced by the run's


@dataclass(frozen=True)
class SweepConfig:
    """Repeat a run over arms, witness rates, draws and seeds, and compare with intervals.

    Uses one process per GPU, or one per core; an interrupted sweep continues when the same command is given again.
    """

    out: Path
    """Folder of the sweep, with a run folder for every part of the grid. Writes OUT/sweep.csv, OUT/summary.json and
    OUT/report.html."""
    arms: tuple[str, ...] = ("random", "sil", "simclr", "sum", "ags")
    """Pretrainings to compare; see pretrain --help."""
    witness_rates: tuple[float, ...] = (0.1, 0.05, 0.01, 0.005)
    """Shares of abnormal cells in a positive bag. The paper: from 0.1 down to 0.005."""
    draws: int = 3
    """Draws of bags; each also pretrains with a seed of its own. Intervals are over draws."""
    colour: bool = True
    """Add the arm `colour`: mean colours in place of an encoder, the baseline that every encoder must beat."""
    shared_encoder: bool = False
    """Pretrain at the highest witness rate only, and use that encoder at all rates of the same draw."""
    curriculum: bool = False
    """Start the MIL training of each witness rate from the model of the next higher one; implies shared_encoder,
    because features of two encoders have nothing to do with each other. Uses data that a laboratory with
    low rates alone does not have."""
    reference: str = "sum"
    """Arm from which the differences of the others are given, paired by draw."""
    workers: int | None = None
    """Processes. None: one for each GPU, or else for each core."""
    only_report: bool = False
    """Work on nothing: write table, summary and page of what is finished so far, as while a sweep is running."""
    keep_stores: bool = False
    """Keep the decoded cells of finished runs."""
    synthetic: SyntheticConfig = field(
        default_factory=lambda: SyntheticConfig(out=_HERE, difficulty=0.0)
    )
    """Synthetic cells, used when the bags options name no cells."""
    bags: BagsConfig = field(
        default_factory=lambda: BagsConfig(out=_HERE, bag_size=200, reuse_normals=True)
    )
    """Bags. witness_rate is set by the sweep, seed is that of the first draw."""
    pretrain: PretrainConfig = field(default_factory=lambda: PretrainConfig(out=_HERE))
    """Pretraining; seed is that of the first draw."""
    embed: EmbedConfig = field(default_factory=lambda: EmbedConfig(out=_HERE))
    """Embedding of all bags."""
    mil: MilConfig = field(default_factory=lambda: MilConfig(out=_HERE))
    """Multiple-instance learning, once for each of its seeds."""
    evaluate: EvaluateConfig = field(default_factory=lambda: EvaluateConfig(out=_HERE))
    """Metrics."""
    report: ReportConfig = field(default_factory=lambda: ReportConfig(out=_HERE))
    """The reports with cells, one per witness rate, of the first draw."""

    @property
    def all_arms(self) -> tuple[str, ...]:
        """The pretrainings, and the colours if asked for."""
        return (*self.arms, COLOUR) if self.colour else self.arms

    @property
    def rates(self) -> tuple[float, ...]:
        """Witness rates, the highest first: the order of a curriculum."""
        return tuple(sorted(self.witness_rates, reverse=True))


def check_sweep(config: SweepConfig) -> None:
    """Find what is wrong with the settings before anything is written.

    Raises:
        UserError: A setting does not allow a sweep, or two settings contradict each other.
    """
    if not config.arms:
        raise UserError(f"arms must be some of {', '.join(ARMS)}. Got none.")
    for arm in config.arms:
        check_arm(arm)
    if config.draws < 1:
        raise UserError(f"draws must be at least 1. Got {config.draws}. Take 3 or more.")
    if config.workers is not None and config.workers < 1:
        raise UserError(f"workers must be at least 1. Got {config.workers}. Leave it out for all.")
    if config.bags.slides is not None:
        raise UserError(
            "A sweep draws bags at several witness rates, so it needs cells. Slides have the rates "
            "that they have: use `run` for them."
        )
    if config.mil.start is not None:
        raise UserError("mil.start must not be set: use curriculum.")
    check_top_k(config.evaluate.top_k)
    if config.out.exists() and not config.out.is_dir():
        raise UserError(f"out must be a folder. {config.out} is a file.")
    for step in ("synthetic", "bags", "pretrain", "embed", "mil", "evaluate", "report"):
        if getattr(config, step).out != _HERE:
            raise UserError(f"{step}.out must not be set: the sweep has its own out.")
    for rate in config.witness_rates:
        if not 0 < rate <= 1:
            raise UserError(f"witness_rates must be above 0 and at most 1. Got {rate}.")
    counts = [Recipe.of(replace(config.bags, witness_rate=rate)).positives for rate in config.rates]
    for (rate, count), (other, same) in pairwise(zip(config.rates, counts, strict=True)):
        if count == same:
            raise UserError(
                f"Every witness rate must give other bags. Rates {rate:g} and {other:g} both put {count} abnormal "
                f"cell(s) into a bag of {config.bags.bag_size}. Raise bags.bag_size or leave one out."
            )
