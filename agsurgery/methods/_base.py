"""What a method is, and the one door through which the engine calls it."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from agsurgery.methods._cosine import Cosines, cosines
from agsurgery.methods._state import TaskState

Reduction: TypeAlias = Literal["sum", "mean"]
"""Scale of an update: of the sum of the task gradients, or of their mean (K times smaller)."""

Weighting: TypeAlias = "Callable[[Tensor], Tensor]"
"""Anything that maps a `(K, K)` Gramian to `(K,)` weights is a method."""

Uses: TypeAlias = Literal["gramian", "losses", "rows"]
"""What a method looks at: inner products of the task gradients, values of the losses, or single coordinates."""


class Problem:
    """What a method is asked to weigh.

    Attributes:
        gramian: `(..., K, K)` inner products of the task gradients, float64; leading dimensions are blocks of
            parameters, each solved on its own. NaN for methods that look at losses only.
        losses: `(K,)` values of the losses in the dtype of `gramian`; None where a Gramian is all there is.
        tasks: K names.
    """

    def __init__(self, gramian: Tensor, losses: Tensor | None, tasks: tuple[str, ...]) -> None:
        self.gramian = gramian
        self.losses = losses
        self.tasks = tasks
        self._split: Cosines | None = None

    @property
    def split(self) -> Cosines:
        """Norms and cosines of the Gramian, computed once for a method and the methods around it."""
        if self._split is None:  # not `cached_property`, which a compiler cannot trace
            self._split = cosines(self.gramian)
        return self._split


def check_square(gramian: Tensor) -> None:
    """Refuse what is no Gramian.

    Raises:
        TypeError: no tensor.
        ValueError: another shape than `(..., K, K)`, K >= 1.
    """
    if not isinstance(gramian, Tensor):
        raise TypeError(f"`gramian` must be a tensor. Got {type(gramian).__name__}.")
    shape = gramian.shape
    if len(shape) < 2 or shape[-1] != shape[-2] or shape[-1] == 0:
        raise ValueError(
            "`gramian` must be square: the inner products of K >= 1 task gradients, of shape (K, K), or (..., K, K) "
            f"for blocks of parameters. Got shape {tuple(shape)}. From gradients as rows it is `rows @ rows.T`."
        )


class Solution(NamedTuple):
    """What a method answers: `weights` `(..., K)`, and the `scale` `(...)` by which it stretched the update."""

    weights: Tensor
    scale: Tensor


class Method(ABC):
    """Base of the methods shipped here: a function of the Gramian, plus a few numbers of state for some.

    Args:
        reduction: `"sum"` keeps the update on the scale of `sum(losses).backward()`, so that the learning
            rate stays right; `"mean"` divides it by the number of tasks.
    """

    uses: ClassVar[Uses] = "gramian"

    def __init__(self, *, reduction: Reduction = "sum") -> None:
        if reduction not in ("sum", "mean"):
            raise ValueError(f'`reduction` must be "sum" or "mean". Got {reduction!r}.')
        self.reduction: Reduction = reduction

    def __call__(self, gramian: Tensor) -> Tensor:
        """Return the `(..., K)` weights for a `(..., K, K)` Gramian of task gradients; NaN if that is not finite.

        Raises:
            TypeError, ValueError: `gramian` is no square matrix, nor several of them.
        """
        return solve(self, gramian).weights

    def solve(
        self,
        gramian: Tensor,
        losses: Tensor | None = None,
        tasks: Sequence[str] | None = None,
    ) -> Solution:
        """Return the weights, and the factor by which the method scaled its update.

        Args:
            gramian: `(..., K, K)`, float64.
            losses: `(K,)` values of the losses, for the methods that look at them.
            tasks: K names, by which preferences and state are kept; None: `"0"`, `"1"`, ...

        Raises:
            TypeError, ValueError: `gramian` is no square matrix, nor several of them.
            ValueError: the method needs losses and got none, or has no preference for one of the tasks.
        """
        check_square(gramian)
        names = map(str, range(gramian.shape[-1])) if tasks is None else tasks
        return self.answer(Problem(gramian, losses, tuple(names)))

    def answer(self, problem: Problem) -> Solution:
        """Solve, on the scale asked for."""
        weights, scale = self._solve_sum(problem)
        if self.reduction == "mean":
            weights = weights / problem.gramian.shape[-1]
        return Solution(weights, scale)

    @abstractmethod
    def _solve_sum(self, problem: Problem) -> Solution:
        """Solve on the scale of the sum of the task gradients."""

    def expect(self, tasks: Sequence[str], like: Tensor) -> None:
        """Make room for what is remembered of tasks that have not come yet.

        Args:
            tasks: K names.
            like: `(..., K)` tensor on the device of the Gramians to come, with their leading dimensions.
        """
        for value in vars(self).values():
            if isinstance(value, TaskState):
                value.read(tasks, like)
            elif isinstance(value, Method):
                value.expect(tasks, like)

    def state(self) -> Mapping[str, Tensor]:
        """The live state tensors by name, changed in place by calls; empty for a pure function."""
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """A copy of the state, to be saved."""
        return {name: value.clone() for name, value in self.state().items()}

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Take over a saved state.

        Raises:
            KeyError: an entry is missing.
        """
        for name, value in self.state().items():
            if name not in state_dict:
                raise KeyError(
                    f"{type(self).__name__} needs the state {name!r}. Got {sorted(state_dict)}."
                )
            value.copy_(torch.as_tensor(state_dict[name]))

    def __repr__(self) -> str:
        # As it would be written: what `__init__` takes, under which name each method keeps it.
        names = inspect.signature(type(self)).parameters
        shown = ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
        return f"{type(self).__name__}({shown})"


class LossMethod(Method):
    """Base of the methods that weigh the losses by their values: one backward pass of the weighted sum."""

    uses: ClassVar[Uses] = "losses"

    def __call__(self, losses: Tensor) -> Tensor:
        """Return the `(K,)` weights for `(K,)` values of the losses.

        Raises:
            ValueError: `losses` has another shape.
        """
        if losses.dim() != 1 or losses.shape[0] == 0:
            raise ValueError(
                f"{type(self).__name__} weighs losses by their values, which must have shape (K,), K >= 1. Got shape "
                f"{tuple(losses.shape)}."
            )
        unknown = torch.full_like(losses, torch.nan).diag_embed()
        return solve(self, unknown, losses.detach()).weights

    def _solve_sum(self, problem: Problem) -> Solution:
        if problem.losses is None:
            raise ValueError(
                f"{type(self).__name__} weighs the losses by their values, and needs them. Got a Gramian only; pass "
                "`losses=`, or use `GradientSurgery.backward`."
            )
        weights = self._weigh(problem.losses, problem.tasks)
        return Solution(weights, weights.new_ones(()))

    @abstractmethod
    def _weigh(self, losses: Tensor, tasks: tuple[str, ...]) -> Tensor:
        """Return `(K,)` weights on the scale of the sum for `(K,)` values of the losses."""


class RowMethod(Method):
    """Base of the methods that treat every coordinate of the task gradients by itself, and so have no weights."""

    uses: ClassVar[Uses] = "rows"

    def __call__(self, rows: Tensor) -> Tensor:
        """Return the `(n,)` update for `(K, n)` task gradients.

        Raises:
            ValueError: `rows` has another shape.
        """
        if rows.dim() != 2 or rows.shape[0] == 0:
            raise ValueError(
                f"{type(self).__name__} works on the coordinates of task gradients, which must have shape (K, n), "
                f"K >= 1: one in each row. Got shape {tuple(rows.shape)}."
            )
        self.begin(rows.device)
        return self.combine(rows)

    def begin(self, device: torch.device) -> None:
        """Get ready for one step; `combine` follows, once for each part of the parameters."""

    def combine(self, rows: Tensor, start: int = 0) -> Tensor:
        """Return the `(n,)` update for a part of the task gradients.

        Args:
            rows: `(K, n)`, float32 or float64.
            start: number of coordinates in the parts before this one.
        """
        update = self._combine_sum(rows, start)
        return update / rows.shape[0] if self.reduction == "mean" else update

    @abstractmethod
    def _combine_sum(self, rows: Tensor, start: int) -> Tensor:
        """Combine on the scale of the sum of the task gradients."""

    def _solve_sum(self, problem: Problem) -> Solution:
        raise TypeError(
            f"{type(self).__name__} works on the coordinates of the gradients and has no weights: it cannot be called "
            "with a Gramian, nor be wrapped by another method."
        )


def uses(method: Weighting) -> Uses:
    """What a method looks at; any callable that is no `Method` looks at the Gramian."""
    return method.uses if isinstance(method, Method) else "gramian"


def solve(
    method: Weighting,
    gramian: Tensor,
    losses: Tensor | None = None,
    tasks: Sequence[str] | None = None,
) -> Solution:
    """Weights of any method, never a finite answer to a non-finite question.

    Args:
        method: a `Method`, or any callable from Gramian to weights; with a `solve(gramian)` like that of a `Method`
            it may report a scale too.
        gramian: `(..., K, K)`, float64.
        losses: `(K,)` values of the losses.
        tasks: K names.

    Returns:
        Weights in the dtype of `gramian`, all NaN where an entry of the Gramian is not finite (of the losses, for a
        method that looks at these), and the scale (1 for callables that do not report one).

    Raises:
        ValueError: the callable returned another shape than `(..., K)`.
    """
    answer = getattr(method, "solve", None)
    if isinstance(method, Method):
        weights, scale = method.solve(gramian, losses, tasks)
    elif gramian.dim() > 2:  # a callable of the user's need not know blocks
        parts = [solve(method, block) for block in gramian.unbind()]
        weights = torch.stack([part.weights for part in parts])
        scale = torch.stack([part.scale for part in parts])
    elif answer is None:
        weights, scale = method(gramian), gramian.new_ones(())
    else:
        weights, scale = answer(gramian)
    weights = weights.to(gramian.dtype)
    if weights.shape != gramian.shape[:-1]:
        raise ValueError(
            f"A method must return {gramian.shape[-1]} weights for {gramian.shape[-1]} tasks. "
            f"{method!r} returned shape {tuple(weights.shape)}."
        )
    poison = (_seen(method, gramian, losses) * 0).sum(-1)  # NaN if anything is not finite, else 0
    return Solution(weights + poison.unsqueeze(-1), scale + poison)


def known(method: Weighting, gramian: Tensor, losses: Tensor | None) -> Tensor:
    """Whether all that `method` looks at is finite: one boolean for each block."""
    return torch.isfinite(_seen(method, gramian, losses)).all(-1)


def _seen(method: Weighting, gramian: Tensor, losses: Tensor | None) -> Tensor:
    """What `method` looks at, in one dimension beside those of the blocks."""
    return losses if uses(method) == "losses" and losses is not None else gramian.flatten(-2)
