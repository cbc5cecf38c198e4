"""Encoders and the projector that only the pretraining uses."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from examples.torchvision_import import import_torchvision

from .errors import UserError
from .files import replacing

ENCODERS = ("small", "resnet18")


class Encoder(nn.Module):
    """Images to feature vectors; input `(N, 3, H, W)` float32 in [0, 1], output `(N, features)`.

    Args:
        name: one of `ENCODERS`.

    Attributes:
        channels_last: whether images are stored with their channels innermost; changes speed only.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.channels_last = True
        if name not in ENCODERS:
            raise UserError(f"encoder must be one of {', '.join(ENCODERS)}. Got {name!r}.")
        self.trunk, self.features = _small() if name == "small" else _resnet18()
        # Of the training cells. Buffers, so that an encoder file is enough to use it.
        self.register_buffer("mean", torch.full((3, 1, 1), 0.5))
        self.register_buffer("std", torch.full((3, 1, 1), 0.25))

    def forward(self, images: Tensor) -> Tensor:
        """Features of a batch of images."""
        images = (images - self.mean) / self.std
        order = torch.channels_last if self.channels_last else torch.contiguous_format
        return self.trunk(images.contiguous(memory_format=order))


def _resnet18() -> tuple[nn.Module, int]:
    """ResNet-18 without its classifier, from scratch, as in the paper: 11.2 million parameters."""
    models = import_torchvision().models
    trunk = models.resnet18(weights=None)
    features = int(trunk.fc.in_features)
    trunk.fc = nn.Identity()
    return trunk, features


def _small() -> tuple[nn.Module, int]:
    """Four residual blocks, 16 to 128 channels: for patches of about 64 pixels on a CPU, 0.3 million parameters."""
    block = import_torchvision().models.resnet.BasicBlock
    widths = (16, 32, 64, 128)
    layers: list[nn.Module] = [
        nn.Conv2d(3, widths[0], 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(widths[0]),
        nn.ReLU(inplace=True),
        block(widths[0], widths[0]),
    ]
    for narrow, wide in pairwise(widths):
        shortcut = nn.Sequential(
            nn.Conv2d(narrow, wide, 1, stride=2, bias=False), nn.BatchNorm2d(wide)
        )
        layers.append(block(narrow, wide, stride=2, downsample=shortcut))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(1)), widths[-1]


def projector(features: int, hidden: int, outputs: int, *, batch_norm: bool) -> nn.Sequential:
    """Two-layer perceptron on top of the encoder; the paper's has no BatchNorm and 512 units in both layers."""
    middle: list[nn.Module] = [nn.BatchNorm1d(hidden)] if batch_norm else []
    return nn.Sequential(
        nn.Linear(features, hidden, bias=not batch_norm),
        *middle,
        nn.ReLU(inplace=True),
        nn.Linear(hidden, outputs),
    )


class Pretrained(nn.Module):
    """Encoder and projector as they are trained together."""

    def __init__(self, encoder: str, hidden: int, outputs: int, *, batch_norm: bool) -> None:
        super().__init__()
        self.encoder = Encoder(encoder)
        self.projector = projector(self.encoder.features, hidden, outputs, batch_norm=batch_norm)
        self.settings = {
            "encoder": encoder,
            "hidden": hidden,
            "outputs": outputs,
            "batch_norm": batch_norm,
        }

    def forward(self, images: Tensor) -> Tensor:
        """Projector outputs of a batch of images."""
        return self.projector(self.encoder(images))


def save_encoder(model: Pretrained, path: Path, **extra: Any) -> None:
    """Write the model, what is needed to build it again, and `extra` plain values, replacing `path` at once."""
    content = {"settings": model.settings, "state": model.state_dict(), "extra": extra}
    with replacing(path) as temporary:
        torch.save(content, temporary)


def load_encoder(path: Path, *, level: str = "encoder") -> tuple[nn.Module, dict[str, Any]]:
    """Read what `save_encoder` wrote.

    Args:
        path: an `encoder.pt`.
        level: `"encoder"` for the features, `"projector"` for the projector's output.

    Returns:
        The network in evaluation mode (input as for `Encoder`), and the extra values.

    Raises:
        UserError: no such file, or not one of ours.
    """
    if not path.is_file():
        raise UserError(
            f"There must be a pretrained encoder at {path}. Found none; run `pretrain` first."
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict):
            raise TypeError(f"it holds a {type(content).__name__}")
        model = Pretrained(**{**content["settings"]})
        model.load_state_dict(content["state"])
        extra = dict(content["extra"])
    except Exception as error:  # unpickling bytes that are no pickle raises nearly anything
        first = (str(error).strip() or "it is empty").splitlines()[0]
        raise UserError(
            f"{path} must be an encoder written by `pretrain`. Reading it failed: {type(error).__name__}: {first}"
        ) from error
    model.eval()
    return (model.encoder if level == "encoder" else model), extra
