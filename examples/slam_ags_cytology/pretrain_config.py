"""Settings of the pretraining, each number with its place in the paper, and which of them cannot work."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .devices import pick_device
from .errors import UserError

ARMS = ("random", "simclr", "sum", "ags", "pcgrad", "cagrad")


@dataclass(frozen=True)
class PretrainConfig:
    """Train the encoder of one arm into OUT/pretrain/ARM."""

    out: Path
    """Run folder, with the manifest of the bags step."""
    arm: str = "ags"
    """How the two objectives are reconciled: ags, pcgrad, cagrad, sum; or simclr (contrast on all patches,
    labels unused), or random (an encoder that is not trained)."""
    encoder: Literal["small", "resnet18"] = "small"
    """resnet18 as in the paper, or a small one for the CPU."""
    patch: int = 64
    """Side to which cells are resized, in pixels. The paper: 250, with resnet18."""
    crop: int = 56
    """Side of the random crop that the encoder sees. The paper: 224."""
    epochs: int = 12
    """Passes over all training cells. The paper: 150 (of which each saw a small part of the cells)."""
    batch: int = 96
    """Patches per step from both sides together, in proportion to their numbers; two views each. The paper: 256."""
    lr: float = 0.1
    """Peak learning rate of SGD. The paper: 0.001."""
    momentum: float = 0.9
    """Momentum of SGD. The paper: 0.9."""
    weight_decay: float = 1e-4
    """Weight decay of SGD. The paper: 1e-4."""
    warmup: float = 0.1
    """Share of the steps in which the learning rate rises linearly; then a cosine. The paper: 10 of 150 epochs."""
    temperature: float = 0.2
    """Of the contrastive loss. The paper: 0.07."""
    similarity_temperature: float = 0.07
    """Divides the similarity loss, 1 - mean cosine. The paper: 0.07. Without effect while the next limit binds."""
    similarity_share: float | None = 0.1
    """Greatest length of the similarity gradient relative to the contrastive one, before surgery; None: no limit.
    The paper: none; that collapses."""
    similarity_start: float = 0.33
    """Share of the steps after which the similarity objective is switched on. The paper: 0."""
    hidden: int = 128
    """Width of the projector. The paper: 512."""
    outputs: int = 64
    """Outputs of the projector. The paper: 512."""
    projector_batch_norm: bool = False
    """BatchNorm inside the projector. The paper: no."""
    statistics: Literal["separate", "shared"] = "shared"
    """BatchNorm statistics of positive and negative patches: of each side, or of one joint batch. The paper:
    separate."""
    jitter: float = 0.4
    """Range of brightness, contrast and saturation around 1. The paper: 0.1."""
    stain: float = 0.1
    """Range of a factor for each colour channel around 1. The paper: a hue shift of 0.1."""
    seed: int = 0
    """Seed of the initial weights, the order of the cells and the views."""
    device: str = "auto"
    """cpu, cuda or auto, which takes cuda if there is one."""


def check_config(config: PretrainConfig) -> None:
    """Refuse settings that are wrong whatever the data are.

    Raises:
        UserError: naming the setting, what must hold and what was found.
    """
    if config.arm not in ARMS:
        raise UserError(f"arm must be one of {', '.join(ARMS)}. Got {config.arm!r}.")
    if not 8 <= config.crop <= config.patch:
        raise UserError(f"crop must be between 8 and patch ({config.patch}). Got {config.crop}.")
    if config.similarity_share is not None and not config.similarity_share > 0:
        raise UserError(
            f"similarity_share must be positive, or None. Got {config.similarity_share}."
        )
    if not 0 <= config.similarity_start < 1:
        raise UserError(
            f"similarity_start must be at least 0 and below 1. Got {config.similarity_start}."
        )
    for name in (
        "epochs",
        "batch",
        "lr",
        "temperature",
        "similarity_temperature",
        "hidden",
        "outputs",
    ):
        if not getattr(config, name) > 0:
            raise UserError(f"{name} must be positive. Got {getattr(config, name)}.")
    if not 0 <= config.warmup < 1:
        raise UserError(
            f"warmup must be a share of the steps, at least 0 and below 1. Got {config.warmup}."
        )
    if not 0 <= config.momentum < 1:
        raise UserError(f"momentum must be at least 0 and below 1. Got {config.momentum}.")
    if not config.weight_decay >= 0:
        raise UserError(f"weight_decay must not be negative. Got {config.weight_decay}.")
    for name in ("jitter", "stain"):
        if not 0 <= getattr(config, name) <= 1:
            raise UserError(
                f"{name} must be a range around 1, between 0 and 1. Got {getattr(config, name)}."
            )
    if not 0 <= config.seed < 2**32:
        raise UserError(
            f"seed must be at least 0 and below 2**32. Got {config.seed}. Use 0, 1, 2, ..."
        )
    pick_device(config.device)
