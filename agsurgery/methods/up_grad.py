"""UPGrad: project every task gradient on the dual cone, and sum the projections."""

from __future__ import annotations

import torch

from agsurgery.methods._base import Method, Problem, Reduction, Solution
from agsurgery.methods._dual_cone import project
from agsurgery.methods._preference import PerTask, Preference


class UPGrad(Method):
    r"""Sum of the projections of the task gradients on the cone of updates that oppose no task.

    .. math:: w = \sum_i p_i\,\pi(e_i), \qquad \pi(u) = \arg\min_{v \ge u} v^\top G v,

    with unit vectors :math:`e_i` and preferences :math:`p_i`. For two tasks in conflict this is PCGrad.

    Guarantees, for any number of tasks: no task is opposed; equals the plain sum (of :math:`p_i g_i`) where no two
    gradients conflict; multiplying one loss by a factor multiplies its share of the update by that factor. The
    update is zero only where some convex combination of the gradients, with all weights positive, is.

    Args:
        preference: K positive numbers :math:`p_i`, in the order of the losses or by task name; None: ones.
        reduction: `"mean"` divides by K. The paper takes the mean of the projections.

    Raises:
        TypeError, ValueError: `preference` is not K positive numbers.

    Note:
        The paper's code divides the Gramian by its trace and adds 1e-4 to the diagonal, so that tasks with small
        gradients stop counting, and replaces all gradients shorter than 0.01 in total by their mean.
        Here the problem is solved on the cosines and nothing is added beyond 1e-13. A zero gradient is an absent task.

    Example:
        >>> import torch
        >>> UPGrad()(torch.tensor([[1.0, -0.5], [-0.5, 1.0]], dtype=torch.float64))
        tensor([1.5000, 1.5000], dtype=torch.float64)

    References:
        Quinton and Rey, [Jacobian Descent for Multi-Objective Optimization](https://arxiv.org/abs/2406.16232), 2024,
        the unconflicting projection of gradients.
    """

    def __init__(self, *, preference: Preference = None, reduction: Reduction = "sum") -> None:
        super().__init__(reduction=reduction)
        self.preference = PerTask(preference, "preference")

    def _solve_sum(self, problem: Problem) -> Solution:
        split = problem.split
        shares = self.preference.tensor(problem.tasks, split.norms) * split.norms
        if shares.shape[-1] == 2:  # each loses its component against the other, as in PCGrad
            overlap = split.matrix.diagonal(1, -2, -1).clamp(max=0)
            coordinates = shares - overlap * shares.flip(-1)
        else:
            # pi is linear in the length of its argument: from unit vectors, imbalance costs no digits.
            projections = project(split, torch.diag_embed(split.present))
            coordinates = (shares.unsqueeze(-1) * projections).sum(-2)
        weights = torch.where(split.norms == 0, 1.0, coordinates * split.reciprocals)
        return Solution(weights, problem.gramian.new_ones(problem.gramian.shape[:-2]))
