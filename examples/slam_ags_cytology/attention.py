"""Two ways to score the cells of a bag: a network with gated attention, and a distance to normal."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.covariance import LedoitWolf
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["GatedAttention", "NormalCells"]

Floats = NDArray[np.float64]


class GatedAttention(nn.Module):
    r"""Bag logit by gated attention pooling over a shared hidden layer.

    With standardised features x_i:

    .. math::
        h_i = \mathrm{ReLU}(W x_i), \quad
        a = \mathrm{softmax}_i\; w^\top(\tanh(V h_i) \odot \sigma(U h_i)), \quad
        \mathrm{logit} = c^\top \textstyle\sum_i a_i h_i + b

    References:
        Ilse, Tomczak, Welling: [Attention-based Deep Multiple Instance
        Learning](https://arxiv.org/abs/1802.04712), 2018, equation 9.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor, hidden: int = 128, dropout: float = 0.25) -> None:
        """Make an untrained network.

        Args:
            mean: Mean of the train features, (d,).
            std: Their standard deviation, (d,); entries of zero count as one.
            hidden: Width of h.
            dropout: Dropout rate on x and h.
        """
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("std", torch.where(std > 0, std, torch.ones_like(std)))
        self.embed = nn.Sequential(
            nn.Dropout(dropout), nn.Linear(len(mean), hidden), nn.ReLU(), nn.Dropout(dropout)
        )
        self.value = nn.Linear(hidden, hidden // 2)
        self.gate = nn.Linear(hidden, hidden // 2)
        self.weigh = nn.Linear(hidden // 2, 1)
        self.classify = nn.Linear(hidden, 1)

    @property
    def parts(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by the names under which they can be frozen."""
        attention = (self.value, self.gate, self.weigh)
        return {
            "embed": list(self.embed.parameters()),
            "attention": [p for module in attention for p in module.parameters()],
            "classifier": list(self.classify.parameters()),
        }

    def loss(self, features: Tensor, target: Tensor) -> Tensor:
        """Cross entropy of one bag, its label 0 or 1 as a float tensor ()."""
        return F.binary_cross_entropy_with_logits(self(features)[0], target)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logit of the bag (), attention (n,) that sums to one, logit of each cell alone (n,)."""
        hidden = self.embed((features - self.mean) / self.std)
        gated = torch.tanh(self.value(hidden)) * torch.sigmoid(self.gate(hidden))
        attention = self.weigh(gated).squeeze(1).softmax(0)
        # The classifier is affine and attention sums to one, so that the logit of the weighted mean
        # is the weighted mean of the logits.
        alone = self.classify(hidden).squeeze(1)
        return attention @ alone, attention, alone


class NormalCells:
    """Distance of standardised embeddings to the cells of slide-negative train bags.

    The Mahalanobis form measures in units of the normal cells' own spread, direction by direction.
    Their covariance is shrunk towards a multiple of the identity (Ledoit-Wolf), because a few
    thousand cells in 512 dimensions leave the plain estimate near singular. Abnormal cells take no
    part in the fit.
    """

    def __init__(self, normal: Floats, kind: str = "mahalanobis") -> None:
        """Fit centre and covariance.

        Args:
            normal: Standardised embeddings of normal cells, (n, d).
            kind: "mahalanobis" or "euclidean".
        """
        self.centre = normal.mean(0)
        self.precision: Floats | None = None
        centred = normal - self.centre
        # Cells that are all the same have no spread to measure in.
        if kind == "mahalanobis" and centred.any():
            self.precision = LedoitWolf(assume_centered=True).fit(centred).precision_

    def distance(self, features: Floats) -> Floats:
        """Distance of each row, (n,)."""
        away = features - self.centre
        scaled = away if self.precision is None else away @ self.precision
        squared: Floats = np.einsum("nd,nd->n", away, scaled)
        return np.sqrt(np.maximum(squared, 0.0))
