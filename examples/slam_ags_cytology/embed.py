"""Every bag through the encoder of every arm: OUT/embed/ARM/BAG.h5.

The features come from the encoder by default. The projector was trained to forget what the pretraining
objective does not need, and is thrown away, as usual in self-supervised learning.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

from . import networks, views
from .devices import pick_device
from .embeddings import UNKNOWN, Bag, bag_path, fingerprints, write_bag
from .errors import UserError
from .files import portable_path
from .manifest import read_manifest
from .results import find_arms
from .store import CellStore, open_store

__all__ = ["EmbedConfig", "embed", "encode"]

RECIPE = 1
"""Raised whenever the input of the encoder is made differently, so that old files are made anew."""


@dataclass(frozen=True)
class EmbedConfig:
    """Embed the cells of every bag with the pretrained encoders: OUT/embed."""

    out: Path
    """Run folder; reads manifest.csv and OUT/pretrain/ARM/encoder.pt, writes OUT/embed/ARM."""
    arms: tuple[str, ...] = ()
    """Pretraining arms to use. Empty: all that have an encoder."""
    level: Literal["encoder", "projector"] = "encoder"
    """Output of the encoder, or of the projector on top of it (as the published code does)."""
    patch: int | None = None
    """Side to which cells are resized, in pixels. None: as in pretraining."""
    crop: int | None = None
    """Side of the central part that the encoder sees. None: as in pretraining."""
    batch_size: int = 256
    """Cells per forward pass."""
    device: str = "auto"
    """cpu, cuda or auto, which takes cuda if there is one."""


def embed(config: EmbedConfig) -> Path:
    """Write the embeddings of all bags and arms, and return the folder OUT/embed.

    A bag that is there, and was made from the same pixels by the same encoder, is kept. Files of bags that the
    manifest no longer names are removed.

    Raises:
        UserError: If a setting is out of range, a file is missing, or an encoder gives NaN or infinity.
    """
    _check(config)
    frame = read_manifest(config.out / "manifest.csv", training=False, check_files=False)
    arms = find_arms(config.out / "pretrain", config.arms, "encoder.pt", "pretrain")
    device = torch.device(pick_device(config.device))
    for arm in arms:
        path = config.out / "pretrain" / arm / "encoder.pt"
        encoder, extra = networks.load_encoder(path, level=config.level)
        patch, crop = _geometry(config, extra)
        store = open_store(frame["path"], patch, config.out)
        readable = store.readable(frame)
        weights = hashlib.sha256(path.read_bytes()).hexdigest()
        source = _hash([RECIPE, weights, config.level, patch, crop])
        _embed_arm(config, readable, store, encoder.to(device), crop, source, arm)
    return config.out / "embed"


def _check(config: EmbedConfig) -> None:
    if config.batch_size < 1:
        raise UserError(f"`batch_size` must be at least 1. Got {config.batch_size}. Try 256.")
    if config.level not in ("encoder", "projector"):
        raise UserError(f"`level` must be encoder or projector. Got {config.level!r}. Choose one.")


def _geometry(config: EmbedConfig, extra: dict[str, Any]) -> tuple[int, int]:
    """Sides of the decoded cells and of their central part: as asked for, else as in pretraining."""
    patch: Any = extra.get("patch") if config.patch is None else config.patch
    crop: Any = extra.get("crop", patch) if config.crop is None else config.crop
    if patch is None:
        raise UserError(
            "`patch` must be given where the encoder's file does not name it. Found neither. "
            "Set it to the size of the cells in pretraining."
        )
    if not 1 <= crop <= patch:
        raise UserError(f"`crop` must be 1 to `patch` ({patch}). Got {crop}. Change one of them.")
    return int(patch), int(crop)


def _embed_arm(
    config: EmbedConfig,
    frame: pd.DataFrame,
    store: CellStore,
    encoder: nn.Module,
    crop: int,
    source: str,
    arm: str,
) -> None:
    folder = config.out / "embed" / arm
    names = list(dict.fromkeys(frame["bag"]))
    for stale in {*folder.glob("*.h5")} - {bag_path(folder, name) for name in names}:
        stale.unlink()
    rows_of = frame.groupby("bag", sort=False).indices
    for name in tqdm(names, desc=f"embed {arm}", unit="bag", disable=None):
        part = frame.iloc[rows_of[name]]
        pixels = store.images[store.rows(part["path"])]
        bag = _without_features(part, config.out)
        fingerprint = _fingerprint(bag, pixels, source)
        path = bag_path(folder, name)
        if fingerprints(path) == (fingerprint, source):
            continue
        features = encode(encoder, pixels, crop, config.batch_size)
        bad = int((~np.isfinite(features)).any(1).sum())
        if bad:
            raise UserError(
                f"The encoder of arm {arm!r} must give finite features. {bad} of {len(features)} cells of "
                f"bag {name!r} gave NaN or infinity: its training diverged. Lower `lr` in pretraining."
            )
        whole = Bag(
            bag.name, bag.label, bag.split, features, bag.paths, bag.instance_label, bag.class_name
        )
        write_bag(path, whole, fingerprint=fingerprint, source=source)


def encode(
    encoder: nn.Module, pixels: NDArray[np.uint8], crop: int, batch_size: int = 256
) -> NDArray[np.float32]:
    """Features of patches, (n, d) float32.

    Args:
        encoder: Network from float32 images (n, 3, crop, crop) in [0, 1] to (n, d); used in evaluation mode, in
            which the features of a cell do not depend on the other cells of its batch.
        pixels: Patches, uint8 (n, H, W, 3).
        crop: Width and height of the central part that the encoder sees.
        batch_size: Patches per forward pass.
    """
    was_training = encoder.training
    device = next((p.device for p in encoder.parameters()), torch.device("cpu"))
    encoder.eval()
    parts = []
    with torch.inference_mode():
        for start in range(0, len(pixels), batch_size):
            images = views.to_float(pixels[start : start + batch_size]).to(device)
            # flatten, not squeeze: the last batch may hold one cell
            parts.append(encoder(views.centre(images, crop)).flatten(1).float().cpu().numpy())
    encoder.train(was_training)
    return np.concatenate(parts)


def _without_features(part: pd.DataFrame, out: Path) -> Bag:
    """The cells of one bag in the order of the manifest."""
    return Bag(
        str(part["bag"].iloc[0]),
        int(part["label"].iloc[0]),
        str(part["split"].iloc[0]),
        np.empty((len(part), 0), np.float32),
        np.array([portable_path(path, out) for path in part["path"]], object),
        part["instance_label"].fillna(UNKNOWN).to_numpy(np.int8),
        np.array([str(name) for name in part["class_name"]], object),
    )


def _fingerprint(bag: Bag, pixels: NDArray[np.uint8], source: str) -> str:
    """Hash of all that goes into a bag's file, the pixels included: files may change under a name."""
    content: Sequence[Any] = [
        *(source, bag.name, bag.label, bag.split, list(bag.paths), list(bag.class_name)),
        *(bag.instance_label.tolist(), hashlib.sha256(pixels.tobytes()).hexdigest()),
    ]
    return _hash(content)


def _hash(content: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
