"""Settings of the pretraining, each number with its place in the paper, and which of them cannot work."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from .arms import ARMS, check_arm
from .devices import pick_device
from .errors import UserError

__all__ = ["ARMS", "PUBLISHED", "PretrainConfig", "check_config", "published"]


@dataclass(frozen=True)
class PretrainConfig:
    """Train the encoder of one arm into OUT/pretrain/ARM."""

    out: Path
    """Run folder, with the manifest of the bags step."""
    arm: str | None = None
    """What is trained, and how two objectives are reconciled: ags, pcgrad, cagrad, sum, priority (the contrast gives
    way to nothing), or any other method of agsurgery by name, such as upgrad. The same with -labels behind it
    (ags-labels): contrast on all patches, and the label of its slide taught to each. Or simclr (contrast on all
    patches, labels unused), sil (labels of slides alone), or random (an encoder that is not trained). None: ags with
    paper, else simclr, which no other was shown to beat at low witness rates (README)."""
    paper: bool = False
    """The published recipe: every setting below whose paper value differs is set to it, unless it was changed by hand.
    Embed with `--level projector` to follow it to the end."""
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
    schedule: Literal["steps", "epochs"] = "steps"
    """Whether the learning rate moves in every step from near 0, or once per epoch from a tenth of its peak. The paper:
    epochs."""
    temperature: float = 0.2
    """Of the contrastive loss. The paper: 0.07."""
    similarity_temperature: float = 0.07
    """Divides the similarity loss, 1 - mean cosine. The paper: 0.07. Without effect while the next limit binds."""
    similarity_share: float | Literal["progress"] | None = 0.1
    """Greatest length of the similarity gradient relative to the contrastive one, before surgery. None: no limit, as
    in the paper, which collapses. progress: the share of chance by which the contrastive loss has fallen."""
    similarity_start: float = 0.33
    """Share of the steps after which the similarity objective is switched on. The paper: 0."""
    max_scale: float | None = 10.0
    """Upper limit of the factor by which AGS restores the length of the step. None: no limit, as in the paper."""
    granularity: Literal["global", "part", "parameter"] = "global"
    """Reconcile all parameters together, encoder and projector each for itself, or every tensor. The paper: global."""
    hidden: int = 128
    """Width of the projector. The paper: 512."""
    outputs: int = 64
    """Outputs of the projector. The paper: 512."""
    projector_batch_norm: bool = False
    """BatchNorm inside the projector. The paper: no."""
    statistics: Literal["shared", "separate", "views"] = "shared"
    """BatchNorm statistics: of one joint batch, in one forward pass (always so where all patches are contrasted); of
    each side, in two; or of each view of each side, in four. The paper: views."""
    augmentation: Literal["stain", "paper"] = "stain"
    """Random views: crops, flips, quarter turns and stain variation for all; or those of the paper, where the first
    view of a patch of a negative slide is its centre."""
    jitter: float = 0.4
    """Range of brightness, contrast and saturation around 1. The paper: 0.1."""
    stain: float = 0.1
    """Range of a factor for each colour channel around 1; of the hue, with the paper's views. The paper: 0.1."""
    colours: Literal["cells", "paper"] = "cells"
    """Standardise colours by mean and spread of the training cells, or by the constants of the paper."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the network's forward and backward pass; losses and surgery stay in fp32 and fp64. The paper: fp32."""
    channels_last: bool = True
    """Store images with their channels innermost, which convolutions prefer on most devices. Changes speed only."""
    log_every: int = 1
    """Steps between two rows of the log. Each row waits for the device: use 10 or more on a GPU."""
    tensorboard: bool = False
    """Write the log for TensorBoard too, into OUT/pretrain/ARM/tensorboard (needs the package tensorboard)."""
    seed: int = 0
    """Seed of the initial weights, the order of the cells and the views."""
    workers: int | None = None
    """Processes that decode cells. None: one for each core."""
    device: str = "auto"
    """cpu, cuda or auto, which takes cuda if there is one."""


PUBLISHED: dict[str, Any] = {
    **{"encoder": "resnet18", "patch": 250, "crop": 224, "epochs": 150, "batch": 256},
    **{"lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-4, "warmup": 10 / 150, "schedule": "epochs"},
    **{"temperature": 0.07, "similarity_temperature": 0.07},
    **{"similarity_share": None, "similarity_start": 0.0, "max_scale": None},
    **{"granularity": "global", "hidden": 512, "outputs": 512, "projector_batch_norm": False},
    **{"statistics": "views", "augmentation": "paper", "jitter": 0.1, "stain": 0.1},
    **{"colours": "paper", "precision": "fp32"},
}
"""The published recipe, by setting; the defects of its code (batches that repeat patches, for one) are left out."""


def published(config: PretrainConfig) -> PretrainConfig:
    """The configuration with an arm, and with `paper` carried out: its value wherever a setting has its default.

    A setting that was changed by hand is kept, so that one thing at a time can differ from the paper.
    """
    if config.arm is None:
        config = replace(config, arm="ags" if config.paper else "simclr")
    if not config.paper:
        return config
    defaults = {field.name: field.default for field in fields(PretrainConfig)}
    changes = {
        name: value for name, value in PUBLISHED.items() if getattr(config, name) == defaults[name]
    }
    return replace(config, **changes)


def check_config(config: PretrainConfig) -> None:
    """Refuse settings that are wrong whatever the data are.

    Raises:
        UserError: naming the setting, what must hold and what was found.
    """
    limited = config.similarity_share is not None or config.similarity_start > 0
    check_arm(config.arm, limited=limited)
    if not 8 <= config.crop <= config.patch:
        raise UserError(f"crop must be between 8 and patch ({config.patch}). Got {config.crop}.")
    share = config.similarity_share
    if isinstance(share, str):
        if share != "progress":
            raise UserError(
                f"similarity_share must be a positive number, progress, or None. Got {share!r}."
            )
    elif share is not None and not share > 0:
        raise UserError(f"similarity_share must be positive, or None. Got {share}.")
    if config.max_scale is not None and not config.max_scale > 0:
        raise UserError(f"max_scale must be positive, or None. Got {config.max_scale}.")
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
        "log_every",
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
