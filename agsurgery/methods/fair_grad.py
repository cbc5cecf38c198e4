"""FairGrad: the update that maximises an alpha-fair utility of the tasks' gains."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from agsurgery.methods._base import Method, Problem, Reduction, Solution
from agsurgery.methods._cosine import squared_norm, times
from agsurgery.methods._newton import fair_point
from agsurgery.methods._preference import PerTask, Preference

Length: TypeAlias = Literal["sum", "exact"]
"""Norm of the update: that of the plain sum, or that of the paper's equation."""


def fair_weights(problem: Problem, alpha: float, preference: PerTask, length: Length) -> Tensor:
    r"""Weights with :math:`(G w)_i = p_i\,w_i^{-1/\alpha}`, or these rescaled.

    Args:
        problem: what to solve.
        alpha: positive.
        preference: p.
        length: see `FairGrad`.

    Returns:
        `(..., K)`; 1 for absent tasks.
    """
    split = problem.split
    longest = split.norms.amax(-1, keepdim=True)
    longest = torch.where(longest == 0, 1.0, longest)
    norms = torch.where(split.norms == 0, 1.0, split.norms / longest)
    # In coordinates y = D w of the unit gradients the equation is C y = c y^(-1/alpha).
    price = preference.tensor(problem.tasks, norms) * norms ** (1 / alpha - 1)
    matrix = split.matrix + torch.diag_embed(1 - split.present)
    point = fair_point(matrix, price, alpha)
    if length == "exact":
        point = point * longest ** ((1 - alpha) / (1 + alpha))
    else:
        plain = squared_norm(split.present, split).unsqueeze(-1)
        own = (point * times(split.matrix, point)).sum(-1, keepdim=True)
        point = torch.where(own > 0, (plain / own).sqrt(), 0.0) * point
    return torch.where(split.norms == 0, 1.0, point * split.reciprocals)


class FairGrad(Method):
    r"""The update on which the tasks' gains are alpha-fair: :math:`G w = w^{-1/\alpha}`, element by element.

    It maximises :math:`\sum_i u_i^{1-\alpha} / (1 - \alpha)` of the gains :math:`u_i = \langle g_i, d\rangle` over
    directions d: the sum of the gains for alpha towards 0, their product (`NashMTL`) for alpha = 1, and
    the smallest of them for large alpha.

    Guarantees, for any number of tasks: every task gains, wherever there is an update by which every task gains.
    Where there is none (some convex combination of the gradients is zero, up to 1e-6 of the squared lengths) the
    weights are zero.

    Args:
        alpha: positive. The paper's experiments use 0.5 to 5, official code 1 unless told otherwise.
        length: `"sum"` gives the update the norm of the plain sum, `"exact"` that of the equation, which depends on
            alpha: with alpha = 1 it is :math:`\sqrt K` whatever the gradients are.
        preference: K positive numbers p, by place or task name: :math:`(G w)_i = p_i w_i^{-1/\alpha}`.
        reduction: `"mean"` divides by K.

    Raises:
        TypeError, ValueError: `alpha` is not positive and finite, `length` unknown, `preference` not K positive
            numbers.

    Note:
        Solved by Newton's method on the cosines, to 1e-8 in each equation; official code calls a least-squares
        solver of SciPy on the raw Gramian. Where alpha is far from 1 the equation itself multiplies imbalance:
        with norms of 1 to 1e6, alpha = 0.3 and alpha = 5 are beyond float64. A zero gradient is an absent task.

    Example:
        >>> import torch
        >>> FairGrad(2.0, length="exact")(torch.tensor([[1.0, 0.0], [0.0, 16.0]], dtype=torch.float64))
        tensor([1.0000, 0.1575], dtype=torch.float64)

    References:
        Ban and Ji, [Fair Resource Allocation in Multi-Task Learning](https://arxiv.org/abs/2402.15638), 2024.
    """

    def __init__(
        self,
        alpha: float = 1.0,
        *,
        length: Length = "sum",
        preference: Preference = None,
        reduction: Reduction = "sum",
    ) -> None:
        super().__init__(reduction=reduction)
        if not 0 < alpha < math.inf:
            raise ValueError(f"`alpha` must be positive and finite. Got {alpha}.")
        if length not in ("sum", "exact"):
            raise ValueError(f'`length` must be "sum" or "exact". Got {length!r}.')
        self.alpha = alpha
        self.length: Length = length
        self.preference = PerTask(preference, "preference")

    def _solve_sum(self, problem: Problem) -> Solution:
        weights = fair_weights(problem, self.alpha, self.preference, self.length)
        return Solution(weights, problem.gramian.new_ones(problem.gramian.shape[:-2]))
