"""Is the representation alive? Spread of the projector outputs, and a verdict on a finished pretraining."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Spread:
    """How far the rows of a batch are from being all equal.

    Attributes:
        std: mean standard deviation per dimension of the unit rows, times sqrt(d): 1 for directions spread evenly
            over the sphere, 0 for a point.
        effective_rank: exponential of the entropy of the shares of the squared singular values (Roy and Vetterli,
            2007), of the rows as they are: 1 when all rows are equal. Without their mean it would measure the noise
            around a collapsed point instead, and look healthy.
    """

    std: float
    effective_rank: float


def spread(rows: Tensor) -> Spread:
    """Spread of `(R, d)` rows, after scaling each to unit length; NaN where a row is not finite."""
    units = functional.normalize(rows.detach().float(), dim=1)
    if not units.isfinite().all():  # a diverged training, and svdvals would raise
        return Spread(math.nan, math.nan)
    std = float(units.std(0).mean()) * math.sqrt(rows.shape[1])
    shares = torch.linalg.svdvals(units).square()
    shares = shares / shares.sum()
    entropy = -(shares * shares.clamp(min=1e-12).log()).sum()
    return Spread(std, float(entropy.exp()))


# Read off 54 pretrainings on real and synthetic cells (README): collapsed ones ended at rank 1.06 and below with
# a loss from 0.99 times chance up, healthy ones at rank 1.7 and above with a loss of 0.83 and below. One sign alone is
# not enough: the loss starts near chance, and a few outliers keep the spread up while all other cells are equal.
COLLAPSED_RANK, COLLAPSED_LOSS = 1.15, 0.98
WEAK_RANK, WEAK_LOSS = 1.6, 0.85


@dataclass(frozen=True)
class Verdict:
    """How a pretraining ended: `collapsed`, or else perhaps `weak`; `reason` in words, empty if neither."""

    collapsed: bool
    weak: bool
    reason: str


def verdict(
    log: Sequence[Mapping[str, float]], chance: float, column: str = "loss_contrastive"
) -> Verdict:
    """Judge a pretraining by the last tenth of its log.

    Args:
        log: rows with `column` and `effective_rank`, in order.
        chance: loss in that column when all rows are equal.
        column: of the loss to judge by. Only of a contrastive one is it said that little was learnt: where most
            labels are wrong, a loss near chance is right, and two directions are enough to tell two labels apart.
    """
    tail = log[-max(1, len(log) // 10) :]
    loss = sum(row[column] for row in tail) / len(tail)
    rank = sum(row["effective_rank"] for row in tail) / len(tail)
    if not (math.isfinite(loss) and math.isfinite(rank)):
        return Verdict(True, False, "the loss is not finite")
    name = column.removeprefix("loss_").replace("_", " ")
    signs = f"{name} loss {loss:.2f} where chance is {chance:.2f}, effective rank of the embeddings {rank:.2f}"
    if rank < COLLAPSED_RANK and loss > COLLAPSED_LOSS * chance:
        return Verdict(True, False, f"all cells look alike to the encoder: {signs}")
    if column == "loss_contrastive" and (rank < WEAK_RANK or loss > WEAK_LOSS * chance):
        return Verdict(False, True, f"the encoder learnt little: {signs}")
    return Verdict(False, False, "")
