"""NashMTL: the Nash bargaining solution between the tasks."""

from __future__ import annotations

from agsurgery.methods._base import Method, Problem, Reduction, Solution
from agsurgery.methods._preference import PerTask, Preference
from agsurgery.methods.fair_grad import Length, fair_weights


class NashMTL(Method):
    r"""The update with the largest product of the tasks' gains: :math:`G w = 1 / w`, element by element.

    Guarantees, for any number of tasks: every task gains, wherever there is an update by which every task gains;
    multiplying one loss by a factor changes the length of the update at most, never its direction. Where no update
    serves all tasks (the gradients' convex combinations reach zero, up to 1e-6 of their squared lengths) the
    weights are zero.

    Args:
        length: `"sum"` gives the update the norm of the plain sum. `"exact"` is the bargaining solution itself: its
            norm is :math:`\sqrt K` whatever the gradients are, and the learning rate alone sets the length of a step.
        preference: K positive bargaining powers p, by place or task name: :math:`G w = p / w`.
        reduction: `"mean"` divides by K.

    Raises:
        TypeError, ValueError: `length` unknown, `preference` not K positive numbers.

    Note:
        The equation is the stationary point of the strictly convex :math:`\tfrac12 w^\top G w - \sum_i \log w_i`,
        solved here by Newton's method on the cosines. Official code approximates it by a sequence of convex programs,
        solves for the Gramian divided by its norm without undoing that, and clips the update to norm 1; where its
        solver fails it keeps the old weights in silence. A task with a zero gradient is absent.

    Example:
        >>> import torch
        >>> NashMTL(length="exact")(torch.tensor([[1.0, 0.0], [0.0, 16.0]], dtype=torch.float64))
        tensor([1.0000, 0.2500], dtype=torch.float64)

    References:
        Navon et al., [Multi-Task Learning as a Bargaining Game](https://arxiv.org/abs/2202.01017), 2022, claim 3.1.
    """

    def __init__(
        self,
        *,
        length: Length = "sum",
        preference: Preference = None,
        reduction: Reduction = "sum",
    ) -> None:
        super().__init__(reduction=reduction)
        if length not in ("sum", "exact"):
            raise ValueError(f'`length` must be "sum" or "exact". Got {length!r}.')
        self.length: Length = length
        self.preference = PerTask(preference, "preference")

    def _solve_sum(self, problem: Problem) -> Solution:
        weights = fair_weights(problem, 1.0, self.preference, self.length)
        return Solution(weights, problem.gramian.new_ones(problem.gramian.shape[:-2]))
