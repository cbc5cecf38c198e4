"""The plain sum and the plain mean of the losses, as methods: the baselines of every comparison."""

from __future__ import annotations

from agsurgery.methods._base import Method, Problem, Solution


class Sum(Method):
    r"""Plain sum of the task gradients, :math:`w = (1, \dots, 1)`: what `sum(losses).backward()` does.

    Example:
        >>> import torch
        >>> Sum()(torch.eye(2, dtype=torch.float64))
        tensor([1., 1.], dtype=torch.float64)
    """

    def __init__(self) -> None:
        super().__init__(reduction="sum")

    def _solve_sum(self, problem: Problem) -> Solution:
        ones = problem.gramian.new_ones(problem.gramian.shape[:-1])
        return Solution(ones, problem.gramian.new_ones(problem.gramian.shape[:-2]))


class Mean(Method):
    r"""Plain mean of the task gradients, :math:`w = (1, \dots, 1) / K`.

    Example:
        >>> import torch
        >>> Mean()(torch.eye(2, dtype=torch.float64))
        tensor([0.5000, 0.5000], dtype=torch.float64)
    """

    def __init__(self) -> None:
        super().__init__(reduction="mean")

    def _solve_sum(self, problem: Problem) -> Solution:
        ones = problem.gramian.new_ones(problem.gramian.shape[:-1])
        return Solution(ones, problem.gramian.new_ones(problem.gramian.shape[:-2]))
