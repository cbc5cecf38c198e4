"""Rank cells by a linear model in which every cell has the label of its slide: single-instance learning."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

from .embeddings import Bag

__all__ = ["SlideLabels"]

Floats = NDArray[np.float64]

PENALTIES = (1e-3, 1e-2, 1e-1)
"""Inverse strengths of the penalty to choose from, the strongest first."""


class SlideLabels:
    """Log-odds that a cell comes from a positive slide, from a logistic regression on standardised embeddings.

    Of the cells of positive slides 90 to 99.5 % are normal, so most of these labels are wrong. But normal cells
    look the same in both kinds of slides, hence the errors cancel: the log-odds grow with the share of abnormal cells
    among cells like this one. No cell is labelled for it. The penalty is the one with the lowest log loss on the cells
    of validation slides, against the labels of their slides; both labels weigh the same.

    Attributes:
        weights: (d,).
        bias: Of the log-odds.
        penalty: The chosen inverse strength.
    """

    def __init__(self, bags: Sequence[Bag], scaled: Sequence[Floats]) -> None:
        """Fit on the train bags, choose on the validation bags.

        Args:
            bags: Bags of both labels in both splits.
            scaled: Their standardised embeddings, (n_i, d) each.
        """
        train, val = (_cells(bags, scaled, split) for split in ("train", "val"))
        best = np.inf
        for penalty in PENALTIES:
            model = LogisticRegression(C=penalty, class_weight="balanced", max_iter=2000)
            model.fit(*train)
            weight = np.where(val[1] == 1, 0.5 / val[1].mean(), 0.5 / (1 - val[1].mean()))
            loss = log_loss(val[1], model.predict_proba(val[0]), sample_weight=weight)
            if loss < best:  # strictly: the stronger penalty among equals
                best, self.penalty = loss, penalty
                self.weights, self.bias = model.coef_[0], float(model.intercept_[0])

    def score(self, features: Floats) -> Floats:
        """Log-odds of each row, (n,)."""
        found: Floats = features @ self.weights + self.bias
        return found


def _cells(
    bags: Sequence[Bag], scaled: Sequence[Floats], split: str
) -> tuple[Floats, NDArray[np.int64]]:
    """All cells of a split, and the labels of their slides."""
    mine = [(x, bag.label) for x, bag in zip(scaled, bags, strict=True) if bag.split == split]
    labels = np.concatenate([np.full(len(x), label) for x, label in mine])
    return np.concatenate([x for x, _ in mine]), labels
