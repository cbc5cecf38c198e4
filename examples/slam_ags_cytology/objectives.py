"""What a pretraining minimises: views of a batch, forward passes, losses by task."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from .losses import contrastive_loss, similarity_loss

Views = tuple[Tensor, Tensor]
"""Two views of each patch of one side, `(N, 3, H, W)` each."""

Statistics = Literal["shared", "separate", "views"]
"""Whose BatchNorm statistics a patch is standardised with in training."""


def forward(
    model: nn.Module, positive: Views, negative: Views, statistics: Statistics
) -> tuple[Tensor, Tensor]:
    """Projector outputs of the positive and the negative patches, first views in front, float32.

    Args:
        model: images to projector outputs.
        positive: views of patches of positive slides.
        negative: views of patches of negative slides.
        statistics: `"shared"`: one forward pass over everything. `"separate"`: one for each side. `"views"`: one
            for each view of each side, four in all, as published.
    """
    if statistics == "shared":
        outputs = model(torch.cat((*positive, *negative))).float()
        rows = 2 * len(positive[0]), 2 * len(negative[0])
        of_positive, of_negative = outputs.split(rows)
        return of_positive, of_negative
    if statistics == "separate":
        return model(torch.cat(positive)).float(), model(torch.cat(negative)).float()
    first, second, third, fourth = (model(view).float() for view in (*positive, *negative))
    return torch.cat((first, second)), torch.cat((third, fourth))


def pair_losses(
    of_positive: Tensor, of_negative: Tensor, temperature: float, similarity_temperature: float
) -> dict[str, Tensor]:
    """Contrast on the patches of positive slides, similarity on those of negative ones."""
    return {
        "contrastive": contrastive_loss(*of_positive.chunk(2), temperature),
        "similarity": similarity_loss(of_negative, similarity_temperature),
    }


def slide_label_loss(
    of_positive: Tensor, of_negative: Tensor, classifier: nn.Module
) -> dict[str, Tensor]:
    """Single-instance learning: every patch is taught the label of its slide, right or wrong."""
    logits = classifier(torch.cat((of_positive, of_negative))).squeeze(1)
    targets = torch.cat(
        (of_positive.new_ones(len(of_positive)), logits.new_zeros(len(of_negative)))
    )
    return {"slide_label": functional.binary_cross_entropy_with_logits(logits, targets)}
