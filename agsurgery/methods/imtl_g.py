"""IMTL-G: the combination with the same projection on every task gradient."""

from __future__ import annotations

import torch

from agsurgery.methods._base import Method, Problem, Solution
from agsurgery.methods._cosine import NOISE
from agsurgery.methods._spectral import least_squares


class IMTLG(Method):
    r"""Impartial multi-task learning, its gradient part: weights that sum to K and equal projections on all gradients.

    .. math:: w = K\,\frac{x}{1^\top x}, \qquad x = D^{-1} C^+ 1,

    with row norms D and cosines C, so that :math:`\langle g_i, J^\top w\rangle / |g_i|` is the same for all i.

    Guarantees: with linearly independent gradients the projections are equal. They are positive, and no task is
    opposed, where the weights' sum before scaling is positive; where it is negative *all* tasks are opposed alike.
    Weights may be negative. Dependent gradients have no such combination in general; the least-squares solution
    taken then may oppose some.

    Args:
        reduction: `"mean"` divides by K. The paper's weights sum to 1, which is the scale of the mean.

    Note:
        The direction is that of `ConFIG`, or the opposite one where the weights' sum before scaling is negative; the
        length differs. For dependent gradients the pseudo-inverse is that of the cosines, where TorchJD takes that of
        the Gramian: this way the direction does not depend on the norms.
        Where the sum of the weights is rounding (1e-6 of the sum of their sizes) no such combination exists and the
        weights are zero. The loss part of the paper, IMTL-L, is `UW` up to the sign of its parameters. A zero gradient
        is an absent task.

    Example:
        >>> import torch
        >>> IMTLG()(torch.tensor([[1.0, 0.0], [0.0, 9.0]], dtype=torch.float64))
        tensor([1.5000, 0.5000], dtype=torch.float64)

    References:
        Liu et al., [Towards Impartial Multi-task Learning](https://openreview.net/forum?id=IMPnRXEWpvr), 2021,
        its closed form for the gradient weights.
    """

    def _solve_sum(self, problem: Problem) -> Solution:
        split = problem.split
        share = least_squares(split, split.present) * split.reciprocals
        total = share.sum(-1, keepdim=True)
        exists = total.abs() > NOISE * share.abs().sum(-1, keepdim=True)
        count = split.present.sum(-1, keepdim=True)
        weights = torch.where(exists, count * share / total, 0.0)
        weights = torch.where(split.norms == 0, 1.0, weights)
        return Solution(weights, problem.gramian.new_ones(problem.gramian.shape[:-2]))
