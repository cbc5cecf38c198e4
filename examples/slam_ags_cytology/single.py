"""Rank cells by a linear model in which every cell has the label of its slide: single-instance learning."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.covariance import LedoitWolf

from .embeddings import Bag

__all__ = ["SlideLabels"]

Floats = NDArray[np.float64]


class SlideLabels:
    r"""Linear discriminant between cells of positive and of negative train slides, on standardised embeddings.

    .. math:: \mathrm{score}(x) = (\mu_1 - \mu_0)^\top \Sigma^{-1} (x - (\mu_0 + \mu_1) / 2)

    Of the cells of positive slides 90 to 99.5 % are normal, so most of these labels are wrong. But normal cells look
    the same in both kinds of slides and cancel in the difference of the means, which points from normal to abnormal
    cells, only shorter: :math:`\mu_1 - \mu_0` is the witness rate times what it would be with labelled cells. The
    inverse covariance takes back directions in which cells vary anyway, and with them most of the chance difference
    between two samples of normal cells. No cell is labelled for it, and there is nothing to tune: the covariance within
    the two groups is shrunk by the rule of Ledoit and Wolf.

    Attributes:
        weights: (d,).
        bias: Added to the product.

    References:
        Koriakina et al.: [Deep multiple instance learning versus conventional deep single instance learning for
        interpretable oral cancer detection](https://doi.org/10.1371/journal.pone.0302169), 2024, find single-instance
        learning level with attention on cytology; theirs trains a network.
    """

    def __init__(self, bags: Sequence[Bag], scaled: Sequence[Floats]) -> None:
        """Fit on the train bags.

        Args:
            bags: Bags, of both labels in the train split.
            scaled: Their standardised embeddings, (n_i, d) each.
        """
        pairs = [
            (bag.label, x) for bag, x in zip(bags, scaled, strict=True) if bag.split == "train"
        ]
        groups = [np.concatenate([x for label, x in pairs if label == side]) for side in (0, 1)]
        means = [group.mean(0) for group in groups]
        within = np.concatenate([x - mean for x, mean in zip(groups, means, strict=True)])
        difference: Floats = means[1] - means[0]
        if within.any():  # cells that are all the same have no spread to measure in
            precision = LedoitWolf(assume_centered=True).fit(within).precision_
            difference = precision @ difference
        self.weights = difference
        self.bias = -float(difference @ (means[0] + means[1])) / 2

    def score(self, features: Floats) -> Floats:
        """Score of each row, (n,); above 0 it is closer to the positive slides."""
        found: Floats = features @ self.weights + self.bias
        return found
