"""Pretrain an encoder from slide labels, by the objectives of one arm.

Differences from the published script, each of which changed the result there: every patch is seen once per
epoch; both views are augmented; the run is seeded, logged, resumable, and says so when it collapsed. See the README
beside this file for the choice of defaults.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import views
from .devices import pick_device
from .distributed import join
from .errors import UserError
from .files import write_text
from .manifest import read_manifest
from .networks import Pretrained, save_encoder
from .pretrain_config import ARMS, PretrainConfig, check_config, published
from .rules import check_copies
from .store import CellStore, open_store
from .training import Side, Training

__all__ = ["ARMS", "PretrainConfig", "pretrain"]


def pretrain(config: PretrainConfig) -> Path:
    """Train, or continue, or keep the finished encoder of one arm.

    Returns:
        Path of `OUT/pretrain/ARM/encoder.pt`. Beside it: `log.csv`, `status.json`, `config.json`.

    Raises:
        UserError: a setting or the data do not allow it; the folder holds a run made with other settings.
    """
    config = published(config)
    check_config(config)
    world, device = join(pick_device(config.device))
    frame = read_manifest(config.out / "manifest.csv")
    folder = config.out / "pretrain" / config.arm
    target = folder / "encoder.pt"
    settings = _settings(config) | {"processes": world.size}
    if _finished(folder, settings):
        print(f"{target}: kept, it was made with the same settings.")
        return target
    world.wait()  # until all have looked: the first may write soon
    if not world.leads:
        world.wait()  # until the first has decoded the cells
    store = open_store(frame["path"], config.patch, config.out, config.workers)
    frame = store.readable(frame)
    if world.leads:
        world.wait()
    check_copies(frame, store.copies)
    train = frame[frame["split"] == "train"]
    sides = [
        Side(np.unique(store.rows(train.loc[train["label"] == label, "path"]))) for label in (1, 0)
    ]
    steps = round(sum(len(side.rows) for side in sides) / config.batch)
    if steps < 1 or min(len(side.rows) for side in sides) < 2 * steps * world.size:
        raise UserError(
            "Every batch must hold at least 2 patches of each side for every process. Found "
            f"{len(sides[0].rows)} training cells in positive bags and {len(sides[1].rows)} in negative ones for "
            f"batches of {config.batch} on {world.size} processes. Draw more bags, or change batch."
        )
    torch.manual_seed(config.seed)
    model = Pretrained(
        config.encoder, config.hidden, config.outputs, batch_norm=config.projector_batch_norm
    ).to(device)
    model.encoder.channels_last = config.channels_last
    _set_colours(model, store, sides, config)
    if world.leads:
        _claim(folder, settings)
    training = Training(config, model, store, sides, steps, world)
    world.wait()
    untrained = {"collapsed": False, "weak": False, "reason": "", "steps": 0}
    status = untrained if config.arm == "random" else training.run(folder)
    if world.leads:
        _finish(config, model, folder, status)
    world.wait()
    return target


def _finish(
    config: PretrainConfig, model: Pretrained, folder: Path, status: dict[str, Any]
) -> None:
    """Write the encoder and how its training ended; only then the checkpoint may go."""
    target = folder / "encoder.pt"
    save_encoder(model, target, arm=config.arm, crop=config.crop, patch=config.patch)
    _write_json(
        folder / "status.json", {key: _finite_or_none(value) for key, value in status.items()}
    )
    (folder / "checkpoint.pt").unlink(missing_ok=True)
    if status["reason"]:
        ending = "COLLAPSED" if status["collapsed"] else "ended weak"
        print(f"WARNING: pretraining {config.arm} {ending}: {status['reason']}.")


PAPER_MEAN, PAPER_STD = (0.6009, 0.5513, 0.7394), (0.1982, 0.2448, 0.1076)


def _set_colours(
    model: Pretrained,
    store: CellStore,
    sides: Sequence[Side],
    config: PretrainConfig,
    most: int = 2000,
) -> None:
    """Colour mean and spread of training cells (a regular subset of fewer than twice `most`), or the paper's."""
    if config.colours == "paper":
        model.encoder.mean.copy_(torch.tensor(PAPER_MEAN).view(3, 1, 1))
        model.encoder.std.copy_(torch.tensor(PAPER_STD).view(3, 1, 1))
        return
    rows = np.concatenate([side.rows for side in sides])
    chosen = np.sort(rows)[:: max(1, len(rows) // most)]
    pixels = views.to_float(store.images[chosen])
    model.encoder.mean.copy_(pixels.mean((0, 2, 3)).view(3, 1, 1))
    model.encoder.std.copy_(pixels.std((0, 2, 3)).clamp(min=1e-3).view(3, 1, 1))


_PLACE = ("out", "device", "workers", "channels_last", "tensorboard")
"""Settings that say where and how fast it runs, not what comes out."""


def _settings(config: PretrainConfig) -> dict[str, Any]:
    """All that decides about the result: the configuration without its folder, and the manifest."""
    settings = asdict(config)
    for place in _PLACE:
        settings.pop(place)
    settings["manifest"] = hashlib.sha256((config.out / "manifest.csv").read_bytes()).hexdigest()
    return settings


def _finished(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether the folder holds the result of these very settings; it must not hold that of others."""
    note = folder / "config.json"
    if not note.is_file():
        return False
    found = json.loads(note.read_text(encoding="utf-8"))
    changed = sorted(key for key in settings if found.get(key) != settings[key])
    if changed:
        raise UserError(
            f"{folder} must belong to a run with the same settings. It differs in {', '.join(changed)}. "
            "Choose another out, or delete that folder to train again."
        )
    return (folder / "encoder.pt").is_file() and (folder / "status.json").is_file()


def _claim(folder: Path, settings: dict[str, Any]) -> None:
    """Record what the folder is for. Only once nothing is left to refuse: else a corrected setting would differ."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", settings)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=1) + "\n")


def _finite_or_none(value: Any) -> Any:
    """JSON has no NaN: null stands for the loss of a task that an arm lacks, and for a diverged training."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
