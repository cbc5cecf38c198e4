"""MGDA: the shortest convex combination of the task gradients."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from agsurgery.methods._base import Method, Problem, Reduction, Solution
from agsurgery.methods._cosine import Cosines
from agsurgery.methods._simplex import shortest_combination

Normalization: TypeAlias = Literal["none", "norm", "loss", "loss+norm"]


class MGDA(Method):
    r"""Multiple-gradient descent: :math:`w = K \arg\min_{v \ge 0,\, 1^\top v = 1} |J^\top v|^2`.

    Guarantees without normalisation, for any number of tasks: no task is opposed, and all tasks with positive weight
    gain alike, :math:`\langle g_i, d\rangle = |d|^2 / K`, the others more. The update is zero exactly where
    some convex combination of the gradients is. It is ruled by the shortest gradient: a task that has converged
    stops all others. With a normalisation the first guarantee is for :math:`\sum_i v_i g_i / s_i`, and is lost for the
    update, which takes the same v to the gradients as they are.

    Args:
        normalization: solve for gradients divided by s: `"none"`, `"norm"` (:math:`s_i = |g_i|`), `"loss"`
            (:math:`s_i = l_i`) or `"loss+norm"` (:math:`s_i = l_i |g_i|`). The losses must be positive; the weights
            are NaN if one is not.
        reduction: `"mean"` divides by K. The paper's weights sum to 1, which is the scale of the mean; `"sum"`
            multiplies them by the number of tasks with a gradient.

    Raises:
        ValueError: unknown normalisation; one with losses is asked for weights without losses.

    Note:
        Solved exactly, where public code takes some Frank-Wolfe steps. The normalisations are those of the authors'
        code, which applies the weights to the unnormalised losses; the paper does not mention them. A task with a
        zero gradient is absent: by the definition it would stop the training.

    Example:
        >>> import torch
        >>> MGDA()(torch.tensor([[1.0, 0.0], [0.0, 3.0]], dtype=torch.float64))
        tensor([1.5000, 0.5000], dtype=torch.float64)

    References:
        Désidéri, [Multiple-gradient descent algorithm](https://doi.org/10.1016/j.crma.2012.03.014), 2012.

        Sener and Koltun, [Multi-Task Learning as Multi-Objective Optimization](https://arxiv.org/abs/1810.04650), 2018,
        equation 3.
    """

    def __init__(
        self, *, normalization: Normalization = "none", reduction: Reduction = "sum"
    ) -> None:
        super().__init__(reduction=reduction)
        if normalization not in ("none", "norm", "loss", "loss+norm"):
            raise ValueError(
                '`normalization` must be "none", "norm", "loss" or "loss+norm". '
                f"Got {normalization!r}."
            )
        self.normalization: Normalization = normalization

    def _solve_sum(self, problem: Problem) -> Solution:
        split = problem.split
        lengths = torch.ones_like(split.norms) if "norm" in self.normalization else split.norms
        if "loss" in self.normalization:
            lengths = lengths / self._positive_losses(problem)
        lengths = torch.where(split.norms == 0, 0.0, lengths)
        reciprocals = torch.where(lengths == 0, 0.0, lengths.reciprocal())
        combination = shortest_combination(Cosines(lengths, reciprocals, split.matrix))
        count = split.present.sum(-1, keepdim=True)
        weights = torch.where(split.norms == 0, 1.0, count * combination.weights)
        return Solution(weights, problem.gramian.new_ones(problem.gramian.shape[:-2]))

    def _positive_losses(self, problem: Problem) -> Tensor:
        if problem.losses is None:
            raise ValueError(
                f'MGDA with normalization="{self.normalization}" needs the losses. Got a Gramian only; pass `losses=`, '
                "or use `GradientSurgery.backward`."
            )
        return torch.where(problem.losses > 0, problem.losses, torch.nan)
