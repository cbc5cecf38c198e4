"""Bags of embedded cells as HDF5 files, one file per bag.

The data set `features` (n, d) is where CLAM and torchmil look for the instances of a bag, so that
a folder written here can be given to other software for multiple instance learning.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

from .errors import UserError
from .files import replacing

__all__ = [
    "UNKNOWN",
    "Bag",
    "bag_path",
    "fingerprints",
    "read_bag",
    "read_bags",
    "write_bag",
]

UNKNOWN = -1
"""Instance label of a cell whose truth is not known."""

_TEXT = h5py.string_dtype("utf-8")
_PER_CELL = ("paths", "instance_label", "class_name")


@dataclass(frozen=True, eq=False)
class Bag:
    """The cells of one slide, in the order of the manifest."""

    name: str
    """Name of the bag, as in the manifest."""
    label: int
    """1: the slide holds abnormal cells, 0: it holds none."""
    split: str
    """train, val or test."""
    features: NDArray[np.float32]
    """Embeddings, (n, d)."""
    paths: NDArray[np.object_]
    """Image file of each cell, relative to the run folder if inside it, (n,)."""
    instance_label: NDArray[np.int8]
    """1 abnormal, 0 normal, -1 unknown, (n,)."""
    class_name: NDArray[np.object_]
    """Name of the type of each cell, empty where unknown, (n,)."""


def bag_path(folder: Path, name: str) -> Path:
    """File of a bag in a folder; the manifest allows only names that every file system takes."""
    return folder / f"{name}.h5"


def write_bag(path: Path, bag: Bag, *, fingerprint: str = "", source: str = "") -> None:
    """Write one bag, atomically.

    Args:
        path: File to write, see `bag_path`.
        bag: The bag. Its features are stored as float32.
        fingerprint: Says from what the bag was made; a later run with another one makes it anew.
        source: Says by which encoder; bags of one folder must agree.

    Raises:
        ValueError: If the arrays do not agree in length, or the features are not finite (n, d).
    """
    features = np.asarray(bag.features, np.float32)
    if features.ndim != 2 or not len(features):
        raise ValueError(
            f"`features` must be (n, d), n at least 1. Got {features.shape}. Pass a row per cell."
        )
    if not np.isfinite(features).all():
        raise ValueError(f"`features` of bag {bag.name!r} must be finite. Found NaN or infinity.")
    for name in _PER_CELL:
        found = len(getattr(bag, name))
        if found != len(features):
            raise ValueError(
                f"`{name}` must have {len(features)} entries, as `features`. Got {found}."
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part, h5py.File(part, "w") as file:
        file.create_dataset("features", data=features)
        file.create_dataset("paths", data=list(bag.paths), dtype=_TEXT)
        file.create_dataset("instance_label", data=np.asarray(bag.instance_label, np.int8))
        file.create_dataset("class_name", data=list(bag.class_name), dtype=_TEXT)
        file.attrs.update(
            bag=bag.name, label=bag.label, split=bag.split, fingerprint=fingerprint, source=source
        )


def read_bag(path: Path) -> Bag:
    """Read one bag.

    Raises:
        UserError: If the file is not such a bag, or its parts do not agree.
    """
    try:
        with h5py.File(path) as file:
            bag = Bag(
                str(file.attrs["bag"]),
                int(file.attrs["label"]),
                str(file.attrs["split"]),
                file["features"][:].astype(np.float32, copy=False),
                file["paths"].asstr()[:],
                file["instance_label"][:],
                file["class_name"].asstr()[:],
            )
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} must be a bag of embeddings. It could not be read: {error}. "
            "Delete it and run the embed step again."
        ) from error
    lengths = {len(bag.features), *(len(getattr(bag, name)) for name in _PER_CELL)}
    if bag.features.ndim != 2 or len(lengths) > 1 or 0 in lengths:
        raise UserError(
            f"{path} must hold one row of features, path, label and class for each cell. "
            f"Found features of shape {bag.features.shape} and lengths {sorted(lengths)}. "
            "Delete it and run the embed step again."
        )
    return bag


def fingerprints(path: Path) -> tuple[str, str]:
    """The `fingerprint` and `source` of a bag file; empty if there is no readable file."""
    try:
        with h5py.File(path) as file:
            return str(file.attrs.get("fingerprint", "")), str(file.attrs.get("source", ""))
    except OSError:
        return "", ""


def read_bags(folder: Path) -> list[Bag]:
    """All bags of a folder, sorted by split and name, checked to belong together.

    Raises:
        UserError: If there are none, or one has NaN or infinite features, or they come from
            different encoders.
    """
    files = sorted(folder.glob("*.h5"))
    if not files:
        raise UserError(
            f"{folder} must hold the embedded bags, one .h5 file each. Found none. "
            "Run the embed step first."
        )
    if len({fingerprints(file)[1] for file in files}) > 1:
        raise UserError(
            f"The bags in {folder} must come from one encoder. Found several, as after an "
            "interrupted embed step. Run the embed step again."
        )
    bags = [read_bag(file) for file in files]
    widths = sorted({bag.features.shape[1] for bag in bags})
    if len(widths) > 1:
        raise UserError(f"The bags in {folder} must have features of one width. Found {widths}.")
    for bag in bags:
        bad = int((~np.isfinite(bag.features)).any(1).sum())
        if bad:
            raise UserError(
                f"The features of bag {bag.name!r} in {folder} must be finite. "
                f"{bad} of {len(bag.features)} cells have NaN or infinity: the encoder diverged. "
                "Train it again with a smaller `lr`."
            )
    return sorted(bags, key=lambda bag: (bag.split, bag.name))
