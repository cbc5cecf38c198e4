"""PCGrad: remove from each task gradient its component against every other task."""

from __future__ import annotations

import torch
from torch import Tensor

from agsurgery.methods._base import Problem, Solution
from agsurgery.methods._cosine import Cosines
from agsurgery.methods._random import RandomlyOrdered


def pcgrad_weights(split: Cosines, orders: Tensor | None) -> Tensor:
    r"""Weights of the summed PCGrad update.

    Task i starts from :math:`g_i` and, for each other task j in its order, loses its component along
    :math:`g_j` if their inner product is negative. All tasks advance together: row i of `change` holds the
    coefficients, in units of :math:`|g_i|` on unit vectors, of what has been added to :math:`g_i` so far.

    Args:
        split: norms and cosines of the Gramian.
        orders: `(K, K - 1)` indices, row i an order of the tasks other than i; unused (None) for two tasks.

    Returns:
        `(..., K)` weights, exactly 1 where nothing conflicts.
    """
    tasks = split.norms.shape[-1]
    if tasks == 1:
        return torch.ones_like(split.norms)
    if tasks == 2:
        # Each gradient is projected once, against an untouched one: the order has no effect.
        overlap = split.matrix.diagonal(1, -2, -1).clamp(max=0)
        return 1 - overlap * split.norms.flip(-1) * split.reciprocals
    assert orders is not None
    opposed = -split.matrix
    places = orders.expand(*split.norms.shape, tasks - 1)
    starts = opposed.gather(-1, places)
    columns = opposed.index_select(-2, orders.reshape(-1))
    columns = columns.view(*split.norms.shape, tasks - 1, tasks)
    change = torch.zeros_like(opposed)
    for target, start, column in zip(
        torch.split(places, 1, -1), torch.split(starts, 1, -1), columns.unbind(-2), strict=True
    ):
        overlap = start + (change * column).sum(-1, keepdim=True)
        change.scatter_add_(-1, target, overlap.clamp_(min=0))
    return 1 + (split.norms.unsqueeze(-1) * change).sum(-2) * split.reciprocals


class PCGrad(RandomlyOrdered):
    r"""Projecting conflicting gradients, summed over the tasks.

    For each task i, :math:`g_i' = g_i`; then for each other j in random order, if
    :math:`\langle g_i', g_j\rangle < 0`, :math:`g_i' \leftarrow g_i' -
    \frac{\langle g_i', g_j\rangle}{|g_j|^2} g_j`, with the original :math:`g_j`. The update is
    :math:`\sum_i g_i'`. For two tasks in conflict, :math:`w = (1 - G_{12}/G_{11},\; 1 - G_{12}/G_{22})`.

    Guarantees: equals the plain sum, exactly, when no two gradients conflict. For two tasks the update opposes
    neither. For three or more it may: each projection can undo an earlier one.

    Args:
        seed: of the random orders (three tasks and more). Equal seeds give equal orders on every rank.
        reduction: `"mean"` divides by K; the paper sums.

    Note:
        The order of the projections is drawn anew in each step, for each task, as in the paper's algorithm;
        its published code keeps one fixed order. The test for a conflict has no epsilon, so the method works the
        same at any scale of the gradients.

    Example:
        >>> import torch
        >>> PCGrad()(torch.tensor([[1.0, -0.5], [-0.5, 1.0]], dtype=torch.float64))
        tensor([1.5000, 1.5000], dtype=torch.float64)

    References:
        Yu et al., [Gradient Surgery for Multi-Task Learning](https://arxiv.org/abs/2001.06782), 2020, Algorithm 1.
    """

    def _solve_sum(self, problem: Problem) -> Solution:
        split = problem.split
        weights = pcgrad_weights(split, self._orders(problem.gramian))
        return Solution(weights, weights.new_ones(weights.shape[:-1]))
