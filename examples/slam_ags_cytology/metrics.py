"""Figures of merit of bags and of ranked cells, as pure functions.

All figures of a ranking are expectations over the order of cells with equal scores. A collapsed
encoder gives equal scores, and must not profit from the order in which cells happen to be stored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import t as student
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, roc_auc_score

__all__ = [
    "BAG_METRICS",
    "RANKINGS",
    "RETRIEVAL_METRICS",
    "SEEDLESS",
    "bag_metrics",
    "choose_threshold",
    "interval",
    "retrieval",
]

RANKINGS = ("attention", "instance_score", "slide_label", "distance")
"""Scores that order the cells of a bag, the most suspicious first."""

SEEDLESS = ("slide_label", "distance")
"""Those that are the same for all seeds of the MIL training: their seeds are one repetition."""

RETRIEVAL_METRICS = (
    "average_precision",
    "cell_auroc",
    "r_precision",
    "enrichment",
    "recall_at_k",
    "precision_at_k",
    "enrichment_at_k",
    "first_positive",
)
BAG_METRICS = ("bag_f1", "bag_auroc", "bag_balanced_accuracy", "bag_accuracy")


def retrieval(scores: ArrayLike, labels: ArrayLike, top_k: int = 400) -> dict[str, float]:
    """Figures of merit of one ranked bag with n cells, m of them abnormal.

    - average_precision: mean precision at the ranks of the abnormal cells.
    - cell_auroc: probability that an abnormal cell is ranked before a normal one; NaN if m = n. It
      flatters at low witness rates: 50 normal cells before each abnormal one of 1000 still give 0.95.
    - r_precision: share of abnormal cells among the first m, which is also the recall there.
    - enrichment: r_precision over the witness rate m/n; 1 is chance.
    - recall_at_k: share of the m abnormal cells among the first K = min(top_k, n).
    - precision_at_k: share of abnormal cells among the first K.
    - enrichment_at_k: precision_at_k over the witness rate; 1 where K is the whole bag.
    - first_positive: rank of the first abnormal cell, from 1.

    Args:
        scores: Score of each cell, (n,), high is suspicious. Equal scores count as a random order,
            and the result is the expectation over it: constant scores give the exact chance level.
        labels: 1 abnormal, 0 normal, (n,), both present or all 1.
        top_k: Cells looked at, capped at the size of the bag. The published evaluation takes 400.

    Raises:
        ValueError: If shapes differ, a score is NaN, a label is unknown, or no cell is abnormal.

    Example:
        >>> found = retrieval([0.9, 0.8, 0.7, 0.1], [1, 0, 1, 0], top_k=3)
        >>> round(found["average_precision"], 4), found["r_precision"], found["recall_at_k"]
        (0.8333, 0.5, 1.0)
        >>> retrieval([0, 0, 0, 0, 0], [1, 1, 0, 0, 0])["first_positive"]  # (n + 1) / (m + 1)
        2.0
    """
    score, label = np.asarray(scores, float), np.asarray(labels)
    _check_ranking(score, label, top_k)
    total, positives = len(score), int(label.sum())
    # Groups of equal scores in descending order: size, positives, and both before the group.
    _, group, size = np.unique(-score, return_inverse=True, return_counts=True)
    hits = np.bincount(group, label, len(size))
    before, hits_before = np.cumsum(size) - size, np.cumsum(hits) - hits

    def found(k: int) -> float:
        return float((hits * np.clip(k - before, 0, size) / size).sum())

    k = min(top_k, total)
    first = int(np.argmax(hits > 0))
    # At place j of a group of g cells with p positives, a cell is positive with probability p/g,
    # and then (j-1)(p-1)/(g-1) of the cells before it in the group are expected to be.
    rank = np.arange(1, total + 1)
    g, p, s, h = (np.repeat(x, size) for x in (size, hits, before, hits_before))
    at_rank = p / g * (h + 1 + (rank - s - 1) * (p - 1) / np.maximum(g - 1, 1)) / rank
    # Of the normal cells of its own group, an abnormal cell is ranked before half.
    misses = size - hits
    won = float((hits * (misses.sum() - np.cumsum(misses) + misses / 2)).sum())
    pairs = positives * (total - positives)
    return {
        "average_precision": float(at_rank.sum()) / positives,
        "cell_auroc": won / pairs if pairs else math.nan,
        "r_precision": found(positives) / positives,
        "enrichment": found(positives) / positives * total / positives,
        "recall_at_k": found(k) / positives,
        "precision_at_k": found(k) / k,
        "enrichment_at_k": found(k) / k * total / positives,
        "first_positive": float(before[first] + (size[first] + 1) / (hits[first] + 1)),
    }


def _check_ranking(score: np.ndarray, label: np.ndarray, top_k: int) -> None:
    if score.ndim != 1 or score.shape != label.shape:
        raise ValueError(
            f"`scores` and `labels` must be (n,). Got {score.shape} and {label.shape}. "
            "Pass one bag."
        )
    if np.isnan(score).any():
        raise ValueError(f"`scores` must be numbers. {int(np.isnan(score).sum())} are NaN.")
    if not np.isin(label, (0, 1)).all() or not label.any():
        raise ValueError("`labels` must be 0 or 1 with at least one 1. Leave out other bags.")
    if top_k < 1:
        raise ValueError(f"`top_k` must be at least 1. Got {top_k}.")


def bag_metrics(
    labels: ArrayLike, probabilities: ArrayLike, threshold: ArrayLike
) -> dict[str, float]:
    """F1, AUROC, balanced accuracy and accuracy of calling bags positive from the threshold on.

    `bag_f1_all_positive` is the F1 of calling every bag positive, which a useful classifier must
    beat. AUROC and balanced accuracy are NaN if there are bags of one label only.

    Example:
        >>> bag_metrics([0, 0, 1, 1], [0.2, 0.6, 0.7, 0.9], 0.5)["bag_accuracy"]
        0.75
    """
    truth, probability = np.asarray(labels), np.asarray(probabilities, float)
    called = (probability >= np.asarray(threshold, float)).astype(int)
    both = len(np.unique(truth)) == 2
    share = float(truth.mean())
    balanced = float(balanced_accuracy_score(truth, called)) if both else math.nan
    return {
        "bag_f1": float(f1_score(truth, called, zero_division=0)),
        "bag_auroc": float(roc_auc_score(truth, probability)) if both else math.nan,
        "bag_balanced_accuracy": balanced,
        "bag_accuracy": float(accuracy_score(truth, called)),
        "bag_f1_all_positive": 2 * share / (1 + share),
    }


def interval(values: Sequence[float], level: float = 0.95) -> dict[str, float | int | None]:
    """Mean and t-interval of independent repetitions, NaN left out; no interval below two values.

    Example:
        >>> interval([1.0, 2.0, 3.0])["mean"], round(interval([1.0, 2.0, 3.0])["high"], 3)
        (2.0, 4.484)
    """
    known = np.asarray([value for value in values if not math.isnan(value)])
    if not len(known):
        return {"mean": None, "low": None, "high": None, "n": 0}
    mean = float(known.mean())
    if len(known) == 1:
        return {"mean": mean, "low": None, "high": None, "n": 1}
    error = float(known.std(ddof=1)) / math.sqrt(len(known))
    half = float(student.ppf((1 + level) / 2, len(known) - 1)) * error
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": len(known)}


def choose_threshold(labels: Sequence[int], probabilities: Sequence[float]) -> float:
    """Threshold with the best balanced accuracy on these bags; at or above it a bag is positive.

    Candidates are 0.5 and the middles between neighbouring probabilities. Among equals the one
    closest to 0.5 wins: the bags must speak for moving away from it.

    Example:
        >>> choose_threshold([0, 0, 1, 1], [0.1, 0.2, 0.8, 0.9])
        0.5
        >>> choose_threshold([0, 0, 1, 1], [0.1, 0.6, 0.8, 0.9])
        0.7
    """
    levels = sorted(set(probabilities))
    candidates: list[float] = [0.5, *((a + b) / 2 for a, b in pairwise(levels))]
    values = np.asarray(probabilities)

    def quality(level: float) -> tuple[float, float]:
        called = (values >= level).astype(int)
        return float(balanced_accuracy_score(labels, called)), -abs(level - 0.5)

    best: float = max(candidates, key=quality)
    return round(best, 9)
