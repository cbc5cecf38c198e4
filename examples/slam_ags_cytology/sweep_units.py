"""The grid as units of work, and the results of those that are finished."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .files import write_text
from .sweep_config import SweepConfig

__all__ = [
    "Unit",
    "finished_rows",
    "folders",
    "read_unit",
    "run_folder",
    "units_of",
    "write_unit",
]

RECIPE = 1
"""Raised whenever a unit of work changes by more than rounding, so that results of an older version are made anew."""


@dataclass(frozen=True)
class Unit:
    """What one worker does without interruption: an arm on the bags of one draw, at one rate or at several in turn."""

    arm: str
    draw: int
    rates: tuple[float, ...]


def units_of(config: SweepConfig) -> list[Unit]:
    """All work, draw by draw, so that an unfinished sweep has whole draws."""
    together = config.shared_encoder or config.curriculum
    groups = [config.rates] if together else [(rate,) for rate in config.rates]
    return [
        Unit(arm, draw, rates)
        for draw in range(config.draws)
        for rates in groups
        for arm in config.all_arms
    ]


def run_folder(out: Path, rate: float, draw: int) -> Path:
    """Run folder of one cell of the grid."""
    return out / f"rate-{rate:g}" / f"draw-{draw}"


def folders(config: SweepConfig, unit: Unit) -> list[Path]:
    """Run folders of a unit, in the order of its rates."""
    return [run_folder(config.out, rate, unit.draw) for rate in unit.rates]


def _fingerprint(config: SweepConfig, folder: Path) -> str:
    """Hash of all that decides about the result of a unit, but for its arm and seeds."""
    settings: dict[str, Any] = {
        "recipe": RECIPE,
        "shared": config.shared_encoder or config.curriculum,
        "curriculum": config.curriculum,
        "top_k": config.evaluate.top_k,
        "manifest": hashlib.sha256((folder / "manifest.csv").read_bytes()).hexdigest(),
    }
    if settings["shared"]:
        settings["rates"] = list(config.rates)
    places = ("out", "arm", "arms", "seeds", "device", "workers", "channels_last", "tensorboard")
    for step in ("pretrain", "embed", "mil"):
        values = asdict(getattr(config, step))
        settings[step] = {key: value for key, value in values.items() if key not in places}
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def _unit_path(folder: Path, arm: str) -> Path:
    return folder / "units" / f"{arm}.json"


def read_unit(config: SweepConfig, unit: Unit, folder: Path) -> dict[str, Any] | None:
    """The finished result of a unit in one run folder, if it is of these settings and has all seeds."""
    try:
        found: dict[str, Any] = json.loads(_unit_path(folder, unit.arm).read_text(encoding="utf-8"))
        same = found["fingerprint"] == _fingerprint(config, folder)
        whole = {*config.mil.seeds} <= {row["seed"] for row in found["rows"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if same and whole else None


def write_unit(
    config: SweepConfig,
    arm: str,
    folder: Path,
    rows: Sequence[dict[str, Any]],
    status: dict[str, Any],
) -> None:
    """Keep the result of a unit in one run folder, for `read_unit`.

    Args:
        config: Of the sweep.
        arm: Of the unit.
        folder: Run folder.
        rows: Figures, one row for each seed and split. NaN is written as null.
        status: How the pretraining ended; empty for an arm without one.
    """
    content = {
        "fingerprint": _fingerprint(config, folder),
        "collapsed": bool(status.get("collapsed", False)),
        "weak": bool(status.get("weak", False)),
        "rows": [{key: _json(value) for key, value in row.items()} for row in rows],
    }
    path = _unit_path(folder, arm)
    path.parent.mkdir(exist_ok=True)
    write_text(path, json.dumps(content, allow_nan=False) + "\n")


def _json(value: Any) -> Any:
    if isinstance(value, float):
        return None if math.isnan(value) else value
    return value.item() if hasattr(value, "item") else value


def finished_rows(config: SweepConfig, unit: Unit) -> list[dict[str, Any]]:
    """Rows of a unit for the table: one for each rate, seed and split that is finished."""
    rows = []
    for rate, folder in zip(unit.rates, folders(config, unit), strict=True):
        found = read_unit(config, unit, folder)
        for row in found["rows"] if found else ():
            if row["seed"] in config.mil.seeds:
                ending = {key: found[key] for key in ("collapsed", "weak")} if found else {}
                rows.append({**row, "draw": unit.draw, "rate": rate, **ending})
    return rows
