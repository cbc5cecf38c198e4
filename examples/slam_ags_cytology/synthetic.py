"""Folders of synthetic cells, so that the whole application runs without a download.

The pictures are for testing software, see `drawing.py`: they say nothing about real cells.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from .drawing import RECIPE, check_size_and_difficulty, draw_cells
from .errors import UserError
from .files import replacing, write_text
from .morphology import ABNORMAL_CLASSES, NORMAL_CLASSES

__all__ = ["ABNORMAL_CLASSES", "NORMAL_CLASSES", "SyntheticConfig", "synthetic"]

CHUNK = 64
"""Patches that share one random stream; a resumed run redraws whole chunks."""


@dataclass(frozen=True)
class SyntheticConfig:
    """Draw synthetic cells into OUT/cells, one folder per class."""

    out: Path
    """Run folder; the patches go to OUT/cells/CLASS/CLASS_00001.png."""
    normal: int = 6000
    """Normal cells in total, spread evenly over LYT, MON and NGS."""
    abnormal: int = 600
    """Abnormal cells in total, spread evenly over BLA and PMO."""
    size: int = 64
    """Width and height of a patch in pixels, at least 16."""
    seed: int = 0
    """Seed of all random numbers. The first cells stay the same when more are drawn."""
    difficulty: float = 0.5
    """Overlap between the types: 0 textbook cells, 1 cells that experts would argue about."""


def synthetic(config: SyntheticConfig) -> Path:
    """Draw the patches of a run that are not there yet, and return the folder OUT/cells.

    A run that was interrupted can be repeated: files that exist are kept, the rest is drawn as it
    would have been. OUT/cells.json says which settings made the folder.

    Args:
        config: What to draw and where to.

    Returns:
        Path of the folder with one folder per class.

    Raises:
        UserError: If a setting is out of range, or OUT holds cells made by other settings.
    """
    _check(config)
    folder, record = config.out / "cells", config.out / "cells.json"
    _claim(config, folder, record)
    counts = _counts(config)
    with tqdm(total=sum(counts.values()), unit="cell", desc="synthetic", disable=None) as progress:
        for class_name, count in counts.items():
            for done in _draw_class(config, class_name, count, folder / class_name):
                progress.update(done)
    _write_record(config, record, complete=True)
    return folder


def _check(config: SyntheticConfig) -> None:
    for name in ("normal", "abnormal"):
        if getattr(config, name) < 1:
            raise UserError(
                f"`{name}` must be at least 1. Got {getattr(config, name)}. "
                "Bags need cells of both kinds: ask for one or more."
            )
    if config.seed < 0:
        raise UserError(f"`seed` must not be negative. Got {config.seed}. Use 0, 1, 2, ...")
    check_size_and_difficulty(config.size, config.difficulty)
    for path in (config.out, config.out / "cells"):
        if path.exists() and not path.is_dir():
            raise UserError(f"`out` must be a folder. Got the file {path}. Choose another folder.")


def _claim(config: SyntheticConfig, folder: Path, record: Path) -> None:
    """Make the folder, or make sure that the same settings made it."""
    advice = "Choose another folder with `out`, or delete this one."
    if record.exists():
        try:
            found = json.loads(record.read_text(encoding="utf-8"))
            same, settings = found["fingerprint"] == _fingerprint(config), found["config"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{record} must be a record of drawn cells. {advice}") from error
        if not same:
            wanted = _settings(config)
            changed = [
                f"{key} was {settings.get(key)}, now {value}"
                for key, value in wanted.items()
                if settings.get(key) != value
            ]
            what = "; ".join(changed) or "an older version drew them"
            raise UserError(
                f"{config.out} must hold cells made by the same settings. "
                f"Found others: {what}. {advice}"
            )
        return
    if folder.exists() and any(folder.iterdir()):
        raise UserError(
            f"{folder} must be empty or made by this step. It has other files. {advice}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    # Written before the first cell, so that an interrupted run is recognised.
    _write_record(config, record, complete=False)


def _settings(config: SyntheticConfig) -> dict[str, Any]:
    """The settings that decide about pixels, that is all but the place."""
    settings = asdict(config)
    del settings["out"]
    return {**settings, "recipe": RECIPE}


def _fingerprint(config: SyntheticConfig) -> str:
    return hashlib.sha256(json.dumps(_settings(config), sort_keys=True).encode()).hexdigest()


def _write_record(config: SyntheticConfig, record: Path, *, complete: bool) -> None:
    content = {
        "config": _settings(config),
        "fingerprint": _fingerprint(config),
        "cells": _counts(config),
        "complete": complete,
    }
    write_text(record, json.dumps(content, indent=2) + "\n")


def _counts(config: SyntheticConfig) -> dict[str, int]:
    """Cells per class: even shares, the first classes take the remainder."""
    counts: dict[str, int] = {}
    for total, names in ((config.normal, NORMAL_CLASSES), (config.abnormal, ABNORMAL_CLASSES)):
        cuts = [math.ceil(total * i / len(names)) for i in range(len(names) + 1)]
        counts |= {
            name: stop - start for name, (start, stop) in zip(names, pairwise(cuts), strict=True)
        }
    return {name: count for name, count in counts.items() if count}


def _draw_class(
    config: SyntheticConfig, class_name: str, count: int, folder: Path
) -> Iterator[int]:
    """Write the missing patches of one class; yields how many cells each chunk settled."""
    folder.mkdir(exist_ok=True)
    there = {path.name for path in folder.iterdir()}
    names = [f"{class_name}_{number:05d}.png" for number in range(1, count + 1)]
    for start in range(0, count, CHUNK):
        wanted = names[start : start + CHUNK]
        if not there.issuperset(wanted):
            stream = (config.seed, zlib.crc32(class_name.encode()), start // CHUNK)
            generator = np.random.default_rng(stream)
            patches = draw_cells(
                class_name, len(wanted), config.size, generator, difficulty=config.difficulty
            )
            for name, patch in zip(wanted, patches, strict=True):
                if name not in there:
                    with replacing(folder / name) as part:
                        # Noise does not compress: the fastest level loses little.
                        Image.fromarray(patch).save(part, format="PNG", compress_level=1)
        yield len(wanted)
