"""The work of one unit: an arm from its encoder to its figures, in the run folders of one draw."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

from .colour import COLOUR, colour
from .embed import embed
from .evaluate import measure_arm
from .mil import mil
from .pretrain import pretrain
from .results import read_status
from .sweep_config import SweepConfig
from .sweep_progress import quiet
from .sweep_units import Unit, folders, read_unit, write_unit

__all__ = ["DEVICE", "do_unit"]

DEVICE = "SLAM_AGS_SWEEP_DEVICE"
"""Where this process computes; an environment variable, as it belongs to the process and not to the settings."""


def do_unit(config: SweepConfig, unit: Unit) -> float:
    """Carry out one unit; returns its seconds."""
    begin = time.monotonic()
    above: Path | None = None
    for folder in folders(config, unit):
        if read_unit(config, unit, folder) is None:
            folder.mkdir(parents=True, exist_ok=True)
            with quiet(folder / f"{unit.arm}.log"):
                _do_in(config, unit, folder, above)
        above = folder
    return time.monotonic() - begin


def _do_in(config: SweepConfig, unit: Unit, folder: Path, above: Path | None) -> None:
    """One arm in one run folder; `above` is the folder of the next higher rate if encoders are shared."""
    device = os.environ[DEVICE]
    embedding = replace(config.embed, out=folder, device=device)
    if unit.arm == COLOUR:
        colour(embedding, config.pretrain.patch)
    else:
        if above is None:
            seed = config.pretrain.seed + unit.draw
            pretrain(replace(config.pretrain, out=folder, arm=unit.arm, seed=seed, device=device))
        else:
            _copy_encoder(above, folder, unit.arm)
        embed(replace(embedding, arms=(unit.arm,)))
    start = above if config.curriculum else None
    # At the highest rate there is nothing learnt yet that could be held fixed.
    freeze = () if config.curriculum and above is None else config.mil.freeze
    learning = replace(config.mil, out=folder, arms=(unit.arm,), device=device)
    mil(replace(learning, start=start, freeze=freeze))
    rows = measure_arm(folder, unit.arm, config.mil.seeds, config.evaluate.top_k)
    write_unit(config, unit.arm, folder, rows, read_status(folder, unit.arm) or {})


def _copy_encoder(above: Path, folder: Path, arm: str) -> None:
    """The files of the encoder, with the record of how it was made: it was trained on bags of another rate."""
    source, target = above / "pretrain" / arm, folder / "pretrain" / arm
    target.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "log.csv", "status.json", "encoder.pt"):  # the encoder last
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)
