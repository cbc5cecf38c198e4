"""Random: a random convex combination of the task gradients, the baseline that any method should beat."""

from __future__ import annotations

from agsurgery.methods._base import Problem, Solution
from agsurgery.methods._random import Seeded, uniform


class Random(Seeded):
    """Weights drawn uniformly from the simplex in each step, times K.

    Unlike `RLW` it belongs to the methods of the gradients: heads keep their own gradients, and the report has a
    Gramian.

    Args:
        seed: of the draws. Equal seeds give equal weights on every rank.
        reduction: `"mean"` divides by K: the weights sum to 1.

    Example:
        >>> import torch
        >>> round(float(Random()(torch.eye(4, dtype=torch.float64)).sum()), 6)
        4.0
    """

    def _solve_sum(self, problem: Problem) -> Solution:
        gramian = problem.gramian
        tasks = gramian.shape[-1]
        # Normalised exponentials are uniform on the simplex.
        drawn = -uniform(self._random.next(gramian.device), tasks).log()
        weights = (tasks * drawn / drawn.sum()).to(gramian.dtype).expand(gramian.shape[:-1])
        return Solution(weights, gramian.new_ones(gramian.shape[:-2]))
