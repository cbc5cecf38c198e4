"""GradVac: turn task gradients until they are as aligned with each other as they usually are."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from agsurgery.methods._base import Problem, Reduction, Solution, known
from agsurgery.methods._cosine import NOISE
from agsurgery.methods._random import RandomlyOrdered
from agsurgery.methods._state import TaskState

_NEARLY_ONE = 1 - NOISE  # targets beyond would ask for an infinite multiple of a parallel gradient


class GradVac(RandomlyOrdered):
    r"""Gradient vaccine: where the cosine of two gradients is below its running mean, it is raised to that.

    For each task i, :math:`g_i' = g_i`; then for each other j in random order, with
    :math:`\phi = \cos(g_i', g_j)` and the target :math:`\hat\phi_{ij}`, if :math:`\phi < \hat\phi_{ij}`,

    .. math:: g_i' \leftarrow g_i' + \frac{|g_i'|\,(\hat\phi_{ij} \sqrt{1 - \phi^2} - \phi \sqrt{1 - \hat\phi_{ij}^2})}
        {|g_j| \sqrt{1 - \hat\phi_{ij}^2}}\; g_j,

    after which the cosine is the target; and always :math:`\hat\phi_{ij} \leftarrow (1 - \beta) \hat\phi_{ij} + \beta
    \phi`. The update is :math:`\sum_i g_i'`. Targets start at 0: the first step, and all steps with :math:`\beta =
    0`, are PCGrad.

    Guarantees: none of non-conflict beyond PCGrad's, and that only while the targets are 0.

    Args:
        beta: rate of the running mean, between 0 and 1. TorchJD and LibMTL use 0.5; the default is the smaller value
            of the paper's experiments, with which the mean spans about a hundred steps.
        seed: of the random orders (three tasks and more). Equal seeds give equal orders on every rank.
        reduction: see `Method`; the paper sums.

    Raises:
        ValueError: `beta` is outside [0, 1].

    Note:
        Targets are kept for each ordered pair of tasks, by name, and follow every cosine measured, as in the paper;
        some code updates them only at a conflict, after which they can never rise. Targets are used up to 1 - 1e-6 in
        size; pairs of which one gradient is zero, or was turned to nothing, are left alone and teach nothing.

    Example:
        >>> import torch
        >>> method = GradVac(beta=1.0)
        >>> method(torch.tensor([[1.0, 0.6], [0.6, 1.0]], dtype=torch.float64))
        tensor([1., 1.], dtype=torch.float64)
        >>> method(torch.eye(2, dtype=torch.float64))  # the target is 0.6 now: 0.6 / 0.8 of the other is added
        tensor([1.7500, 1.7500], dtype=torch.float64)

    References:
        Wang et al., [Gradient Vaccine](https://arxiv.org/abs/2010.05874), 2021, equations 2 and 3, Algorithm 1.
    """

    def __init__(self, beta: float = 0.01, *, seed: int = 0, reduction: Reduction = "sum") -> None:
        super().__init__(seed=seed, reduction=reduction)
        if not 0 <= beta <= 1:
            raise ValueError(f"`beta` must be between 0 and 1. Got {beta}.")
        self.beta = beta
        self._targets = TaskState(target=(2, 0.0))

    def _solve_sum(self, problem: Problem) -> Solution:
        norms, matrix = problem.split.norms, problem.split.matrix
        old = self._targets.read(problem.tasks, norms)["target"]
        targets = old.clone()
        # Row i holds the coefficients on unit vectors, in units of |g_i|, of what has been added to g_i so far.
        change = torch.zeros_like(matrix)
        own = problem.split.present.unsqueeze(-1)  # squared length of the unit vector to start from
        for against in self._visits(problem.gramian).unbind(1):
            places = against.unsqueeze(1).expand(*norms.shape, 1)
            columns = matrix.index_select(-2, against)
            inner = matrix.gather(-1, places) + (change * columns).sum(-1, keepdim=True)
            turned = (change @ matrix * change).sum(-1, keepdim=True)
            length = own + 2 * (change * matrix).sum(-1, keepdim=True) + turned
            usable = (length > NOISE) & (columns.gather(-1, places) > 0)
            length = length.clamp(min=NOISE).sqrt()
            cosine = (inner / length).clamp(-1, 1)
            target = targets.gather(-1, places)
            bounded = target.clamp(-_NEARLY_ONE, _NEARLY_ONE)
            sine, target_sine = (1 - cosine.square()).sqrt(), (1 - bounded.square()).sqrt()
            missing = length * (bounded * sine / target_sine - cosine)
            added = torch.where(usable & (cosine < bounded), missing, 0.0)
            change = change.scatter_add(-1, places, added)
            learnt = torch.where(usable, (1 - self.beta) * target + self.beta * cosine, target)
            targets = targets.scatter(-1, places, learnt)
        finite = known(self, problem.gramian, problem.losses)
        self._targets.write(problem.tasks, norms, {"target": targets}, finite)
        weights = 1 + (norms.unsqueeze(-1) * change).sum(-2) * problem.split.reciprocals
        return Solution(weights, problem.gramian.new_ones(problem.gramian.shape[:-2]))

    def _visits(self, gramian: Tensor) -> Tensor:
        """`(K, K - 1)`, row i the other tasks in the order in which i meets them."""
        orders = self._orders(gramian)
        if orders is not None:
            return orders
        tasks = gramian.shape[-1]
        others = torch.arange(tasks - 1, -1, -1, device=gramian.device)
        return others.view(tasks, 1).narrow(1, 0, tasks - 1)

    def state(self) -> Mapping[str, Tensor]:
        """Targets by task, and seed and number of the random orders drawn so far."""
        return {**super().state(), **self._targets.tensors()}

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Take over a saved state.

        Raises:
            KeyError: the seed or the number of draws is missing.
        """
        self._random.load(state_dict)
        self._targets.load(state_dict)
