"""What a pretraining minimises: forward passes over the views of a batch, losses by task."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from .losses import chance, contrastive_loss, similarity_loss

Views = tuple[Tensor, Tensor]
"""Two views of each patch of one side, `(N, 3, H, W)` each."""

Outputs = tuple[Tensor, Tensor]
"""Projector outputs of the patches of positive and of negative slides, first views in front, float32."""

Statistics = Literal["shared", "separate", "views"]
"""Whose BatchNorm statistics a patch is standardised with in training."""

TASKS = ("contrastive", "similarity", "slide_label")
"""Names of all losses."""


class Objectives(nn.Module):
    """Losses of a batch, by task. Its parameters, if it has any, are trained with those of the model.

    Args:
        statistics: `"shared"`: one forward pass over everything. `"separate"`: one for each side. `"views"`: one
            for each view of each side, four in all, as published.

    Attributes:
        judged: the task whose loss tells whether anything was learnt: it has a known value when all patches look alike.
    """

    judged = "contrastive"

    def __init__(self, statistics: Statistics = "shared") -> None:
        super().__init__()
        self.statistics = statistics

    def outputs(self, model: nn.Module, positive: Views, negative: Views) -> Outputs:
        """Pass the views through the model (images to projector outputs), all at once or in parts."""
        if self.statistics == "shared":
            outputs = model(torch.cat((*positive, *negative))).float()
            rows = 2 * len(positive[0]), 2 * len(negative[0])
            of_positive, of_negative = outputs.split(rows)
            return of_positive, of_negative
        if self.statistics == "separate":
            return model(torch.cat(positive)).float(), model(torch.cat(negative)).float()
        first, second, third, fourth = (model(view).float() for view in (*positive, *negative))
        return torch.cat((first, second)), torch.cat((third, fourth))

    def losses(self, of_positive: Tensor, of_negative: Tensor) -> dict[str, Tensor]:
        """Losses by task."""
        raise NotImplementedError

    def watched(self, of_positive: Tensor, of_negative: Tensor) -> Tensor:
        """The rows whose spread is recorded: of all patches, where all have to be told apart."""
        return torch.cat((of_positive, of_negative))

    def chance(self, positives: float, negatives: float) -> float:
        """Value of the judged loss when all patches look alike, for so many patches of each side in a batch."""
        raise NotImplementedError


class PullAndPush(Objectives):
    """Contrast on the patches of positive slides, similarity on those of negative ones (SLAM-AGS, WeakSupCon).

    Args:
        temperature: of the contrastive loss.
        similarity_temperature: divides the similarity loss.
        statistics: as `Objectives`.
    """

    def __init__(
        self, temperature: float, similarity_temperature: float, statistics: Statistics
    ) -> None:
        super().__init__(statistics)
        self.temperature, self.similarity_temperature = temperature, similarity_temperature

    def losses(self, of_positive: Tensor, of_negative: Tensor) -> dict[str, Tensor]:
        """`contrastive` and `similarity`."""
        return {
            "contrastive": contrastive_loss(*of_positive.chunk(2), self.temperature),
            "similarity": similarity_loss(of_negative, self.similarity_temperature),
        }

    def watched(self, of_positive: Tensor, of_negative: Tensor) -> Tensor:
        """Patches of positive slides: the others shall look alike."""
        return of_positive

    def chance(self, positives: float, negatives: float) -> float:
        """Of the contrastive loss."""
        return chance(round(positives))


class Contrast(Objectives):
    """Contrast on all patches, labels unused (SimCLR), in one forward pass."""

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    def losses(self, of_positive: Tensor, of_negative: Tensor) -> dict[str, Tensor]:
        """`contrastive`."""
        pairs = zip(of_positive.chunk(2), of_negative.chunk(2), strict=True)
        first, second = (torch.cat(view) for view in pairs)
        return {"contrastive": contrastive_loss(first, second, self.temperature)}

    def chance(self, positives: float, negatives: float) -> float:
        """Of the contrastive loss."""
        return chance(round(positives + negatives))


class Labels(Objectives):
    """Single-instance learning: every patch is taught the label of its slide, right or wrong."""

    judged = "slide_label"

    def __init__(self, width: int, statistics: Statistics) -> None:
        super().__init__(statistics)
        self.classifier = nn.Linear(width, 1)

    def losses(self, of_positive: Tensor, of_negative: Tensor) -> dict[str, Tensor]:
        """`slide_label`, the cross-entropy."""
        return {"slide_label": slide_label_loss(of_positive, of_negative, self.classifier)}

    def chance(self, positives: float, negatives: float) -> float:
        """Entropy of the labels."""
        share = positives / (positives + negatives)
        return -share * math.log(share) - (1 - share) * math.log(1 - share)


class ContrastAndLabels(Contrast):
    """Contrast on all patches, and all are taught the label of their slide."""

    def __init__(self, temperature: float, width: int) -> None:
        super().__init__(temperature)
        self.classifier = nn.Linear(width, 1)

    def losses(self, of_positive: Tensor, of_negative: Tensor) -> dict[str, Tensor]:
        """`contrastive` and `slide_label`."""
        labelled = slide_label_loss(of_positive, of_negative, self.classifier)
        return {**super().losses(of_positive, of_negative), "slide_label": labelled}


def slide_label_loss(of_positive: Tensor, of_negative: Tensor, classifier: nn.Module) -> Tensor:
    """Cross-entropy of the labels of the slides, given to every patch."""
    logits = classifier(torch.cat((of_positive, of_negative))).squeeze(1)
    targets = torch.cat((logits.new_ones(len(of_positive)), logits.new_zeros(len(of_negative))))
    return functional.binary_cross_entropy_with_logits(logits, targets)
