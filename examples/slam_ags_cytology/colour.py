"""Embeddings that know nothing but colour: the baseline that every encoder must beat.

Stain and background differ between classes of cells, and sometimes between the slides that the classes come from.
A ranking by colour alone shows how much of a result such differences explain. Written as the embeddings of an arm
named `colour`, it is classified, ranked and reported like any other.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn

from . import embed as embedding
from .manifest import read_manifest
from .store import open_store

__all__ = ["COLOUR", "MeanColours", "colour"]

COLOUR = "colour"
"""Name of the arm."""


class MeanColours(nn.Module):
    """Mean red, green and blue of the border, of the ring inside it, and of the middle: `(N, 9)`.

    The border is an eighth of the side wide, the middle is the central half. No shape, no texture, nothing trained.
    """

    def forward(self, images: Tensor) -> Tensor:
        """Mean colours of `(N, 3, H, W)` images."""
        height, width = images.shape[2:]
        zone = torch.zeros(height, width, dtype=torch.long, device=images.device)
        zone[height // 8 : height - height // 8, width // 8 : width - width // 8] = 1
        zone[height // 4 : height - height // 4, width // 4 : width - width // 4] = 2
        return torch.cat([images[:, :, zone == i].mean(2) for i in range(3)], dim=1)


def colour(config: embedding.EmbedConfig, patch: int) -> Path:
    """Write the mean colours of all cells as OUT/embed/colour, and return that folder.

    Args:
        config: Run folder and batch size of the embed step.
        patch: Side to which cells are resized: that of the encoders, whose decoded cells are used.
    """
    frame = read_manifest(config.out / "manifest.csv", training=False, check_files=False)
    store = open_store(frame["path"], patch, config.out)
    readable = getattr(store, "readable", None)
    frame = readable(frame) if readable else frame
    source = hashlib.sha256(f"{embedding.RECIPE} mean colours of 3 zones {patch}".encode())
    embedding._embed_arm(config, frame, store, MeanColours(), patch, source.hexdigest(), COLOUR)
    return config.out / "embed" / COLOUR
