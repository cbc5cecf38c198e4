"""Fixed: constant weights, the baseline that takes tuning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from agsurgery.methods._base import Method, Problem, Solution
from agsurgery.methods._preference import PerTask


class Fixed(Method):
    """The task gradients times constant weights, as in a hand-tuned sum of losses.

    Args:
        weights: K finite numbers in the order of the losses, or by task name.

    Raises:
        TypeError, ValueError: `weights` is not that; when called, it does not fit the tasks.

    Example:
        >>> import torch
        >>> Fixed([1.0, 0.5])(torch.eye(2, dtype=torch.float64))
        tensor([1.0000, 0.5000], dtype=torch.float64)
    """

    def __init__(self, weights: Sequence[float] | Mapping[str, float]) -> None:
        super().__init__(reduction="sum")
        self.weights = PerTask(weights, "weights", positive=False)

    def _solve_sum(self, problem: Problem) -> Solution:
        gramian = problem.gramian
        weights = self.weights.tensor(problem.tasks, gramian).expand(gramian.shape[:-1])
        return Solution(weights, gramian.new_ones(gramian.shape[:-2]))
