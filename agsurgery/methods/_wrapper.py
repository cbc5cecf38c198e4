"""Base of the methods that change the answer of another method."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from agsurgery.methods._base import Method, Problem, Reduction, Solution, Weighting, solve, uses
from agsurgery.methods._names import resolve


class Wrapper(Method):
    """A method around a method, whose state it hands on.

    Args:
        method: the method inside: an instance, a name, or any callable from Gramian to weights.
        reduction: `"mean"` divides by K.

    Raises:
        TypeError: the method inside works on coordinates and has no weights.
    """

    def __init__(self, method: str | Weighting, *, reduction: Reduction = "sum") -> None:
        super().__init__(reduction=reduction)
        self.method = resolve(method)
        if uses(self.method) == "rows":
            raise TypeError(
                f"`method` must be one with weights. Got {self.method!r}, which works on coordinates."
            )

    def _solve_inner(self, problem: Problem) -> Solution:
        if isinstance(self.method, Method):  # `solve` would check for infinities twice
            return self.method.answer(problem)
        return solve(self.method, problem.gramian, problem.losses, problem.tasks)

    def state(self) -> Mapping[str, Tensor]:
        """The state of the method inside."""
        return self.method.state() if isinstance(self.method, Method) else {}

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Hand a saved state to the method inside."""
        if isinstance(self.method, Method):
            self.method.load_state_dict(state_dict)
