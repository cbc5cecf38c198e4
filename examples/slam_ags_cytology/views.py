"""From stored patches to network input, and the random views that the pretraining compares."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn


def to_float(patches: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """`(N, H, W, 3)` uint8 patches as `(N, 3, H, W)` float32 in [0, 1], converted on `device`."""
    whole = torch.from_numpy(np.ascontiguousarray(patches))
    if torch.device(device).type == "cuda":
        whole = whole.pin_memory().to(device, non_blocking=True)  # a quarter of the bytes of floats
    return whole.permute(0, 3, 1, 2).float().div_(255)


def centre(images: Tensor, size: int) -> Tensor:
    """Central `size` x `size` crop of `(N, 3, H, W)` images."""
    top, left = (images.shape[2] - size) // 2, (images.shape[3] - size) // 2
    return images[:, :, top : top + size, left : left + size]


class RandomViews(nn.Module):
    """Random crop at fixed scale, flips, quarter turns and stain variation, each image with its own draw.

    The scale is fixed because the size of a nucleus tells cells apart: rescaling crops teach the encoder to ignore
    it. Stain variation must be strong enough that two views of a cell cannot be matched by colour alone.

    Args:
        size: side of the crop in pixels, less than that of the patches so that the position varies.
        jitter: range of brightness, contrast and saturation factors around 1.
        stain: range of a separate factor for each colour channel around 1.
    """

    def __init__(self, size: int, *, jitter: float, stain: float) -> None:
        super().__init__()
        from kornia import augmentation

        self.geometry = nn.Sequential(
            augmentation.RandomCrop((size, size)),
            augmentation.RandomHorizontalFlip(),
            augmentation.RandomRotation90((0, 3)),
        )
        self.jitter = jitter
        self.stain = stain

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """One random view of each image; `(N, 3, H, W)` in [0, 1], also the result."""
        images = self.geometry(images)
        return self._colour(images)

    def pair(self, images: Tensor, *, negative: bool) -> tuple[Tensor, Tensor]:
        """Two random views of each image; those of negative slides are drawn like the others."""
        del negative
        return self(images), self(images)

    def _colour(self, images: Tensor) -> Tensor:
        """Brightness, contrast, saturation and channel factors, for a whole batch in a few operations."""
        count = images.shape[0]

        def factors(width: float, channels: int = 1) -> Tensor:
            return 1 + width * (2 * torch.rand(count, channels, 1, 1, device=images.device) - 1)

        images = images * (factors(self.jitter) * factors(self.stain, 3))
        images = torch.lerp(images.mean((1, 2, 3), keepdim=True), images, factors(self.jitter))
        grey = images.mean(1, keepdim=True)
        return torch.lerp(grey, images, factors(self.jitter)).clamp(0, 1)


class PublishedViews(nn.Module):
    """The views of the published code: crop, horizontal flip, colour jitter and one quarter turn.

    Of a patch of a negative slide, the first view is its centre as it is.

    Args:
        size: side of the crop in pixels.
        jitter: range of brightness, contrast and saturation around 1.
        hue: range of the shift of the hue.
    """

    def __init__(self, size: int, *, jitter: float, hue: float) -> None:
        super().__init__()
        from kornia import augmentation

        self.size = size
        self.random = nn.Sequential(
            augmentation.RandomCrop((size, size)),
            augmentation.RandomHorizontalFlip(),
            augmentation.ColorJitter(jitter, jitter, jitter, hue, p=0.8),
            augmentation.RandomRotation90((1, 1), p=0.8),
        )

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """One random view of each image; `(N, 3, H, W)` in [0, 1], also the result."""
        views: Tensor = self.random(images)
        return views

    def pair(self, images: Tensor, *, negative: bool) -> tuple[Tensor, Tensor]:
        """Two views of each image; of the patches of negative slides only the second is random."""
        return (centre(images, self.size) if negative else self(images)), self(images)
