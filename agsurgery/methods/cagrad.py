"""CAGrad: the step near the mean gradient that helps the worst-off task the most."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

from agsurgery.methods._base import Method, Problem, Reduction, Solution
from agsurgery.methods._conflict_averse import conflict_averse_weights

Rescale: TypeAlias = Literal["none", "quadratic", "linear"]


class CAGrad(Method):
    r"""Conflict-averse gradient descent.

    With :math:`g_0` the mean gradient, the update solves

    .. math:: \max_d \min_i \langle g_i, d \rangle \quad \text{such that} \quad |d - g_0| \le c\,|g_0|,

    which is :math:`d = g_0 + \sqrt\phi\, J^\top v / |J^\top v|` with :math:`\phi = c^2 |g_0|^2` and v the minimiser of
    :math:`\langle J^\top v, g_0\rangle + \sqrt\phi\,|J^\top v|` over the simplex.

    Guarantees: the minimum over the tasks of :math:`\langle g_i, d\rangle` is the largest within the ball.
    It is not negative, so that no task is opposed, for c >= 1; for c < 1 that depends on the gradients.
    `c = 0` is the plain mean.

    Args:
        c: radius of the ball relative to the mean gradient, at least 0. The paper uses 0.2 to 0.8 by task;
            0.5 is the usual default of public code.
        rescale: divide the update by `"quadratic"` :math:`1 + c^2` or `"linear"` :math:`1 + c`, as some of the
            authors' scripts do, or not at all (`"none"`, Algorithm 1).
        reduction: `"mean"` divides by K. The paper's step has the scale of the mean; `"sum"` multiplies it by K.

    Raises:
        ValueError: `c` is negative or not finite, or `rescale` is unknown.

    Note:
        The problem is solved on the cosines and row norms, never on raw gradients, so that its answer does
        not change when all losses are multiplied by a constant. Official and derived code hands the raw problem to a
        general solver with an absolute tolerance; for small gradients that returns equal weights. A task with a
        zero gradient is left out, also of the mean. Where some convex combination of the gradients vanishes (up to
        1e-6 of their squared lengths, the rounding of a float32 Gramian) the quotient above is 0/0 and several
        steps serve the worst task alike: the one nearest to the mean gradient is taken.

    Example:
        >>> import torch
        >>> CAGrad(c=0.5)(torch.eye(2, dtype=torch.float64))
        tensor([1.5000, 1.5000], dtype=torch.float64)

    References:
        Liu et al., [Conflict-Averse Gradient Descent for Multi-task Learning](https://arxiv.org/abs/2110.14048), 2021,
        equations 3 and 4, Algorithm 1.
    """

    def __init__(
        self,
        c: float = 0.5,
        *,
        rescale: Rescale = "none",
        reduction: Reduction = "sum",
    ) -> None:
        super().__init__(reduction=reduction)
        if not 0 <= c < math.inf:
            raise ValueError(f"`c` must be finite and not negative. Got {c}.")
        divisors = {"none": 1.0, "quadratic": 1 + c * c, "linear": 1 + c}
        if rescale not in divisors:
            raise ValueError(f"`rescale` must be one of {sorted(divisors)}. Got {rescale!r}.")
        self.c = c
        self.rescale: Rescale = rescale
        self._divisor = divisors[rescale]

    def _solve_sum(self, problem: Problem) -> Solution:
        weights = conflict_averse_weights(problem.split, self.c) / self._divisor
        return Solution(weights, problem.gramian.new_ones(problem.gramian.shape[:-2]))
