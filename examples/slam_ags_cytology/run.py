"""All steps in order, from one configuration, to a report."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from .arms import ARMS, check_arm
from .bags import BagsConfig, bags
from .colour import COLOUR, colour
from .distributed import started_by_torchrun
from .embed import EmbedConfig, embed
from .errors import UserError
from .evaluate import EvaluateConfig, evaluate
from .files import write_text
from .mil import MilConfig, mil
from .pretrain import PretrainConfig, pretrain
from .report import ReportConfig, report
from .synthetic import ABNORMAL_CLASSES, SyntheticConfig, synthetic

EASY_NORMALS = ("LYT", "NGS")
"""Normal classes of synthetic cells, unless others are named. Monocyte-like cells (MON) are left out: in a few minutes
of training no encoder tells them from blasts (README), and a demonstration should show a difference."""

_HERE = Path()  # the steps' own `out`: replaced by the run's


@dataclass(frozen=True)
class RunConfig:
    """Cells or slides in, report out: every step for every arm.

    Without cells or slides (see the bags options) synthetic cells are drawn, so that nothing needs a download.
    A run that was interrupted continues where it stopped when the same command is given again.
    """

    out: Path
    """Run folder. The report will be OUT/report.html."""
    arms: tuple[str, ...] = ("random", "sil", "simclr", "sum", "ags")
    """Pretrainings to compare; see pretrain --help."""
    colour: bool = True
    """Add the arm `colour`: mean colours in place of an encoder, the baseline that every encoder must beat."""
    synthetic: SyntheticConfig = field(
        default_factory=lambda: SyntheticConfig(out=_HERE, difficulty=0.0)
    )
    """Synthetic cells, used when the bags options name neither cells nor slides. Textbook cells by default, which a
    few minutes of training can tell apart."""
    bags: BagsConfig = field(default_factory=lambda: BagsConfig(out=_HERE))
    """Bags, drawn from cells or taken from slides. Of synthetic cells BLA and PMO are to be found among LYT and NGS,
    unless classes are named."""
    pretrain: PretrainConfig = field(default_factory=lambda: PretrainConfig(out=_HERE))
    """Pretraining of each arm."""
    embed: EmbedConfig = field(default_factory=lambda: EmbedConfig(out=_HERE))
    """Embedding of all bags."""
    mil: MilConfig = field(default_factory=lambda: MilConfig(out=_HERE))
    """Attention multiple-instance learning on the embeddings."""
    evaluate: EvaluateConfig = field(default_factory=lambda: EvaluateConfig(out=_HERE))
    """Metrics."""
    report: ReportConfig = field(default_factory=lambda: ReportConfig(out=_HERE))
    """The report."""


def run(config: RunConfig) -> Path:
    """Carry out all steps; return the path of the report.

    Raises:
        UserError: a setting or the data do not allow it.
    """
    _check(config)
    out = config.out
    draw = config.bags
    if draw.cells is None and draw.slides is None:
        draw = of_synthetic(draw, synthetic(replace(config.synthetic, out=out)))
    bags(replace(draw, out=out))
    _record(config)
    for arm in config.arms:
        pretrain(replace(config.pretrain, out=out, arm=arm))
    embed(replace(config.embed, out=out, arms=config.arms))
    arms = config.arms
    if config.colour:
        colour(replace(config.embed, out=out), config.pretrain.patch)
        arms = (*arms, COLOUR)
    mil(replace(config.mil, out=out, arms=arms))
    evaluate(replace(config.evaluate, out=out, arms=arms))
    return report(replace(config.report, out=out, arms=arms))


def of_synthetic(draw: BagsConfig, cells: Path) -> BagsConfig:
    """Bags of synthetic cells in the folder `cells`, of the easy classes unless others are named."""
    return replace(
        draw,
        cells=cells,
        normal=EASY_NORMALS if draw.normal == BagsConfig.normal else draw.normal,
        positive=ABNORMAL_CLASSES if draw.positive == BagsConfig.positive else draw.positive,
    )


def _check(config: RunConfig) -> None:
    """Find what is wrong with the settings before any long work."""
    if not config.arms:
        raise UserError(f"arms must be some of {', '.join(ARMS)}. Got none.")
    for arm in config.arms:
        check_arm(arm)
    if started_by_torchrun():
        raise UserError(
            "Only the pretrain step works in several processes. Run the steps one by one, that one with torchrun."
        )
    for name in ("synthetic", "bags", "pretrain", "embed", "mil", "evaluate", "report"):
        if getattr(config, name).out != _HERE:
            raise UserError(
                f"{name}.out must not be set: all steps of a run share the run's own out."
            )
    ignored = [
        name for name in ("embed", "mil", "evaluate", "report") if getattr(config, name).arms
    ]
    if ignored or config.pretrain.arm != PretrainConfig.arm:
        name = f"{ignored[0]}.arms" if ignored else "pretrain.arm"
        raise UserError(f"{name} must not be set: all steps of a run work on the run's own arms.")


def _record(config: RunConfig) -> None:
    write_text(config.out / "run.json", json.dumps(asdict(config), indent=1, default=str) + "\n")
