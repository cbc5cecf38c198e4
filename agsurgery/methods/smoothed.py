"""Smoothed: an exponential moving average of the weights of any method."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from agsurgery.methods._base import Problem, Solution, Uses, Weighting, known, uses
from agsurgery.methods._state import TaskState
from agsurgery.methods._wrapper import Wrapper


class Smoothed(Wrapper):
    r"""Weights :math:`\bar w_t = \alpha\,\bar w_{t-1} + (1 - \alpha)\,w_t` with the weights :math:`w_t` of `method`.

    Weights computed from the gradients of one batch are noisy, and correlated with them; averaging
    over steps takes away most of both. The first step starts the average from its own weights; a task
    starts it when it is first seen, and keeps it while absent.

    Guarantees: none of those of the method inside, since the weights come from earlier gradients.

    Args:
        method: the method inside: an instance, a name, or any callable from Gramian to weights.
        momentum: :math:`\alpha`, at least 0 and below 1. 0 is the method itself.

    Raises:
        ValueError: `momentum` is outside [0, 1).
        TypeError: the method inside works on coordinates and has no weights.

    Note:
        The paper starts from equal weights and decreases :math:`1 - \alpha` over the steps; its experiments, as here,
        keep it constant. Weights of a step with a non-finite gradient do not enter the average.

    Example:
        >>> import torch
        >>> from agsurgery import PCGrad
        >>> method = Smoothed(PCGrad(), momentum=0.5)
        >>> method(torch.eye(2, dtype=torch.float64))
        tensor([1., 1.], dtype=torch.float64)
        >>> method(torch.tensor([[1.0, -0.5], [-0.5, 1.0]], dtype=torch.float64))
        tensor([1.2500, 1.2500], dtype=torch.float64)

    References:
        Zhou et al., [On the Convergence of Stochastic Multi-Objective Gradient Manipulation and
        Beyond](https://openreview.net/forum?id=ScwfQ7hdwyP), 2022, Algorithm 1 (CR-MOGM).
    """

    def __init__(self, method: str | Weighting, *, momentum: float = 0.9) -> None:
        super().__init__(method)
        if not 0 <= momentum < 1:
            raise ValueError(f"`momentum` must be at least 0 and below 1. Got {momentum}.")
        self.momentum = momentum
        self._average = TaskState(weights=(1, 0.0), seen=(1, 0.0))

    @property
    def uses(self) -> Uses:  # type: ignore[override]  # that of the method inside
        """What the method inside looks at."""
        return uses(self.method)

    def _solve_sum(self, problem: Problem) -> Solution:
        weights, scale = self._solve_inner(problem)
        old = self._average.read(problem.tasks, weights)
        past = torch.where(old["seen"] > 0, old["weights"], weights)
        average = self.momentum * past + (1 - self.momentum) * weights
        finite = known(self.method, problem.gramian, problem.losses)
        new = {"weights": average, "seen": torch.ones_like(average)}
        self._average.write(problem.tasks, weights, new, finite)
        return Solution(average, torch.ones_like(scale))

    def state(self) -> Mapping[str, Tensor]:
        """The averages by task, and under `inner.` the state of the method inside."""
        inner = super().state()
        return {**self._average.tensors(), **{f"inner.{name}": inner[name] for name in inner}}

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Take over a saved state."""
        self._average.load(state_dict)
        inner = {name: v for name, v in state_dict.items() if name.startswith("inner.")}
        super().load_state_dict({name.removeprefix("inner."): v for name, v in inner.items()})
