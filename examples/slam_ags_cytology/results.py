"""What earlier steps left in a run folder: which arms there are, and their checked results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from .errors import UserError
from .metrics import RANKINGS

__all__ = ["find_arms", "read_fingerprint", "read_result", "read_status", "seed_folders"]


def find_arms(folder: Path, arms: Sequence[str], pattern: str, step: str) -> tuple[str, ...]:
    """Arms to work on: those asked for, or all sub-folders of `folder` with a file like `pattern`.

    Raises:
        UserError: If there are none, or one that was asked for is not there.
    """
    there = sorted({path.relative_to(folder).parts[0] for path in folder.glob(f"*/{pattern}")})
    missing = [arm for arm in arms if arm not in there]
    if missing or not there:
        raise UserError(
            f"{folder} must hold the results of {', '.join(missing) or 'one arm at least'}. "
            f"Found {', '.join(there) or 'nothing'}. Run the {step} step first, or change `arms`."
        )
    return tuple(dict.fromkeys(arms)) or tuple(there)


def read_fingerprint(folder: Path) -> str:
    """Hash of what a training was made from; empty if there is no readable model in the folder."""
    try:
        return str(torch.load(folder / "model.pt", weights_only=True)["fingerprint"])
    except Exception:  # many kinds for a damaged file; all of them mean: not usable
        return ""


def seed_folders(out: Path, arm: str) -> list[tuple[int, Path]]:
    """Seed and folder of each finished training of an arm, all made from the same input."""
    folders = [path.parent for path in (out / "mil" / arm).glob("seed*/model.pt")]
    found = sorted((int(path.name[4:]), path) for path in folders if path.name[4:].isdecimal())
    if len({read_fingerprint(path) for _, path in found}) > 1:
        raise UserError(
            f"All seeds of arm {arm!r} must come from the same embeddings and settings. Found "
            f"several in {out / 'mil' / arm}. Run the mil step for all of them, or delete old ones."
        )
    return found


def read_result(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The tables bags.csv and instances.csv of one training, checked.

    Raises:
        UserError: If a file is missing or damaged, or a score is NaN.
    """
    numbers = ("probability", "threshold", *RANKINGS)
    text = dict.fromkeys(("bag", "split", "path", "class_name"), str)
    frames = []
    for name, columns in (("bags.csv", numbers[:2]), ("instances.csv", RANKINGS)):
        try:
            frame = pd.read_csv(
                folder / name,
                dtype=text,
                keep_default_na=False,
                na_values={column: ["", "nan"] for column in columns},
            )
            values = frame[list(columns)].to_numpy(float)
            frame["label"].astype(int)
        except (OSError, KeyError, ValueError) as error:
            raise UserError(
                f"{folder / name} must be a table of the mil step. It could not be read: {error}. "
                "Delete the folder and run the mil step again."
            ) from error
        if not np.isfinite(values).all():
            raise UserError(
                f"All scores in {folder / name} must be finite. Found NaN or infinity. "
                "Delete the folder and run the mil step again."
            )
        frames.append(frame)
    return frames[0], frames[1]


def read_status(out: Path, arm: str) -> dict[str, Any] | None:
    """What the pretrain step says about an arm; None where it left no status.json.

    Raises:
        UserError: If the file is damaged: a collapse must not go unnoticed.
    """
    path = out / "pretrain" / arm / "status.json"
    if not path.exists():
        return None
    try:
        status = json.loads(path.read_text(encoding="utf-8"))
        bool(status["collapsed"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} must say whether pretraining collapsed. It could not be read: {error!r}. "
            "Run the pretrain step again."
        ) from error
    found: dict[str, Any] = status
    return found
