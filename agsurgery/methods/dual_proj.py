"""DualProj: project the sum of the task gradients on the dual cone."""

from __future__ import annotations

import torch

from agsurgery.methods._base import Method, Problem, Reduction, Solution
from agsurgery.methods._cosine import times
from agsurgery.methods._dual_cone import project
from agsurgery.methods._preference import PerTask, Preference


class DualProj(Method):
    r"""The update nearest to the plain sum that opposes no task.

    .. math:: w = \arg\min_{v \ge p} v^\top G v, \qquad
        J^\top w = \arg\min_d |d - J^\top p| \;\text{ such that }\; \langle g_i, d\rangle \ge 0 \;\text{ for all } i.

    Guarantees, for any number of tasks: no task is opposed; equals the plain sum (of :math:`p_i g_i`) where this
    opposes no task, and so where no two gradients conflict; never longer than the plain sum.

    Args:
        preference: K positive numbers :math:`p_i`, in the order of the losses or by task name; None: ones.
        reduction: `"mean"` divides by K. TorchJD projects the mean gradient, gradient episodic memory that of
            the current task.

    Raises:
        TypeError, ValueError: `preference` is not K positive numbers.

    Note:
        Solved on the cosines, as `UPGrad` is, where other code regularises the Gramian. Unlike UPGrad it may keep
        nothing of a task with a small gradient but the promise not to oppose it. A zero gradient is an absent task.

    Example:
        >>> import torch
        >>> DualProj()(torch.tensor([[4.0, -1.0], [-1.0, 0.5]], dtype=torch.float64))
        tensor([1.0000, 2.0000], dtype=torch.float64)

    References:
        Lopez-Paz and Ranzato, [Gradient Episodic Memory for Continual
        Learning](https://arxiv.org/abs/1706.08840), 2017, the quadratic program of section 3.

        Quinton and Rey, [Jacobian Descent](https://arxiv.org/abs/2406.16232), 2024, name it DualProj.
    """

    def __init__(self, *, preference: Preference = None, reduction: Reduction = "sum") -> None:
        super().__init__(reduction=reduction)
        self.preference = PerTask(preference, "preference")

    def _solve_sum(self, problem: Problem) -> Solution:
        split = problem.split
        shares = self.preference.tensor(problem.tasks, split.norms) * split.norms
        if shares.shape[-1] == 2:  # the sum opposes one of two at most
            coordinates = shares - times(split.matrix, shares).clamp(max=0)
        else:
            longest = shares.amax(-1, keepdim=True)
            longest = torch.where(longest == 0, 1.0, longest)
            coordinates = longest * project(split, (shares / longest).unsqueeze(-2)).squeeze(-2)
        weights = torch.where(split.norms == 0, 1.0, coordinates * split.reciprocals)
        return Solution(weights, problem.gramian.new_ones(problem.gramian.shape[:-2]))
