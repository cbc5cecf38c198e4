"""ConFIG: the direction that has the same cosine with every task gradient."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from agsurgery.methods._base import Method, Problem, Reduction, Solution
from agsurgery.methods._cosine import Cosines, times
from agsurgery.methods._preference import PerTask, Preference
from agsurgery.methods._spectral import least_squares

Length: TypeAlias = Literal["projection", "min", "max", "harmonic", "arithmetic", "geometric"]


class ConFIG(Method):
    r"""Conflict-free inverse gradients: the direction of equal cosines, as long as all projections on it together.

    .. math:: x = D^{-1} C^+ p, \qquad u = x / \sqrt{x^\top G x}, \qquad
        w = \Big(\sum_i \langle g_i, J^\top u\rangle\Big) u

    with row norms D, cosines C and preferences p: the cosine of the update with :math:`g_i` is proportional to
    :math:`p_i`, and its length is the sum of the projections of the gradients on it.

    Guarantees: while the gradients are linearly independent no task is opposed, and with equal preferences all have
    the same positive cosine with the update. Dependent gradients (more tasks than dimensions, for instance) have no
    such direction in general; the least-squares solution taken then may oppose some, and is zero for exactly opposite
    ones.

    Args:
        length: `"projection"` is the length above; `"min"`, `"max"`, `"harmonic"`, `"arithmetic"` and `"geometric"` put
            that mean of the norms of the gradients in the place of each of them in it.
        preference: K positive numbers p, by place or task name; None: ones.
        reduction: `"mean"` divides by K. The paper's length is that of the sum.

    Raises:
        TypeError, ValueError: `length` unknown, `preference` not K positive numbers.

    Note:
        The pseudo-inverse is that of the cosines, so that imbalance costs no digits; eigenvalues below 1e-6 of
        the largest count as zero, since float32 gradients do not tell them from it. The reference package returns NaN
        for two parallel, opposite or zero gradients. A task with a zero gradient is absent.

    Example:
        >>> import torch
        >>> ConFIG()(torch.tensor([[1.0, 0.0], [0.0, 9.0]], dtype=torch.float64))
        tensor([2.0000, 0.6667], dtype=torch.float64)

    References:
        Liu et al., [ConFIG: Towards Conflict-free Training of Physics Informed Neural
        Networks](https://arxiv.org/abs/2408.11104), 2024, equations 2 and 3.
    """

    def __init__(
        self,
        *,
        length: Length = "projection",
        preference: Preference = None,
        reduction: Reduction = "sum",
    ) -> None:
        super().__init__(reduction=reduction)
        lengths = ("projection", "min", "max", "harmonic", "arithmetic", "geometric")
        if length not in lengths:
            raise ValueError(f"`length` must be one of {lengths}. Got {length!r}.")
        self.length: Length = length
        self.preference = PerTask(preference, "preference")

    def _solve_sum(self, problem: Problem) -> Solution:
        split = problem.split
        target = self.preference.tensor(problem.tasks, split.norms) * split.present
        point = least_squares(split, target)  # on the unit gradients
        cosines = times(split.matrix, point)
        squared = (point * cosines).sum(-1, keepdim=True)
        length = (self._lengths(split) * cosines).sum(-1, keepdim=True)
        point = torch.where(squared > 0, length / squared * point, 0.0)
        weights = torch.where(split.norms == 0, 1.0, point * split.reciprocals)
        return Solution(weights, problem.gramian.new_ones(problem.gramian.shape[:-2]))

    def _lengths(self, split: Cosines) -> Tensor:
        """`(..., K)`: what stands for the norm of each gradient in the length of the update."""
        norms, present = split.norms, split.present
        count = present.sum(-1, keepdim=True)
        if self.length == "projection":
            return norms
        if self.length == "min":
            mean = torch.where(norms == 0, torch.inf, norms).amin(-1, keepdim=True)
        elif self.length == "max":
            mean = norms.amax(-1, keepdim=True)
        elif self.length == "harmonic":
            mean = count / split.reciprocals.sum(-1, keepdim=True)
        elif self.length == "arithmetic":
            mean = norms.sum(-1, keepdim=True) / count
        else:
            logarithms = torch.where(norms == 0, 0.0, norms.log())
            mean = (logarithms.sum(-1, keepdim=True) / count).exp()
        return present * mean
