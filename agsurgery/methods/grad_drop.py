"""GradDrop: in each coordinate keep the gradients of one sign, drawn at random."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from agsurgery.methods._base import Reduction, RowMethod
from agsurgery.methods._preference import PerTask
from agsurgery.methods._random import Seeded, uniform


class GradDrop(Seeded, RowMethod):
    r"""Gradient sign dropout: in each coordinate the positive or the negative entries go through, by a draw.

    With the entries :math:`g_i` of the tasks in one coordinate, their purity
    :math:`P = \frac12\left(1 + \frac{\sum_i g_i}{\sum_i |g_i|}\right)` and :math:`U` uniform in (0, 1), the update is

    .. math:: \sum_i \bigl(l_i + (1 - l_i)\,M_i\bigr)\,g_i, \qquad M_i = \begin{cases}
        [g_i > 0] & P > U \\ [g_i < 0] & \text{otherwise.}\end{cases}

    Guarantees: a coordinate in which no two tasks differ in sign has the plain sum, whatever is drawn. With the same
    leak for all tasks every coordinate has the plain sum in expectation. The update may oppose a task. A task
    without a gradient changes nothing for the others. A coordinate that is not finite for one task is not finite
    in the update.

    Args:
        leak: :math:`l_i`, the share of a gradient that passes whatever its sign, between 0 and 1: one number, or one
            for each task in the order of the losses. 1 for all tasks is the plain sum.
        seed: of the draws. Equal seeds give equal draws on every rank.
        reduction: `"mean"` divides by K; the paper sums.

    Raises:
        TypeError: `leak` is neither a number nor a sequence.
        ValueError: a number of `leak` is outside [0, 1]; in a step, there is not one for each task.
        RuntimeError: `combine` was called before `begin`.

    Note:
        The paper works on the gradients of the representation shared by the tasks, multiplied by its sign and summed
        over the batch. Here, as in TorchJD, the coordinates are those of the shared parameters, where there is no batch
        and where the sign of a parameter says nothing. The draw of a coordinate is a function of the seed, the step
        and the coordinate's place, so that it does not depend on the parts in which `combine` is given the gradients.

    Example:
        >>> import torch
        >>> rows = torch.tensor([[1.0, -1.0, 3.0], [2.0, -1.0, -1.0]])
        >>> method = GradDrop()
        >>> method(rows)  # P = 1, 0 and 0.75: the third is 3 in three steps of four, and else -1
        tensor([ 3., -2.,  3.])
        >>> GradDrop(leak=1.0)(rows)
        tensor([ 3., -2.,  2.])

    References:
        Chen et al., [Just Pick a Sign: Optimizing Deep Multitask Models with Gradient Sign
        Dropout](https://arxiv.org/abs/2010.06808), 2020, Algorithm 1.
    """

    def __init__(
        self,
        leak: float | Sequence[float] = 0.0,
        *,
        seed: int = 0,
        reduction: Reduction = "sum",
    ) -> None:
        super().__init__(seed=seed, reduction=reduction)
        numbers = [leak] if isinstance(leak, int | float) else leak
        if isinstance(numbers, Mapping):
            raise TypeError(
                "`leak` must be a number, or a sequence of K numbers in the order of the losses: a method that works "
                "on coordinates is not told the names of the tasks. Got a dict."
            )
        self._leaks = PerTask(numbers, "leak", positive=False)
        if not all(0 <= number <= 1 for number in numbers):
            raise ValueError(f"Every number of `leak` must be between 0 and 1. Got {leak!r}.")
        self.leak = leak
        self._start: Tensor | None = None

    def begin(self, device: torch.device) -> None:
        """Take the next draw."""
        self._start = self._random.next(device)

    def _combine_sum(self, rows: Tensor, start: int) -> Tensor:
        if self._start is None:
            raise RuntimeError(
                "`GradDrop.combine` must follow `begin`, which takes the draw of the step. Call the method itself, or "
                "`begin` before the first part."
            )
        count = rows.shape[1]
        draw = uniform(self._start.to(rows.device), count, start).to(rows.dtype)
        # Rounded up to 1 it would drop entries that all agree.
        draw = draw.clamp(max=1 - torch.finfo(rows.dtype).eps)
        up, down = rows.clamp(min=0).sum(0), rows.clamp(max=0).sum(0)
        # The purity P; NaN where all entries are 0, of which either sign is as good.
        upwards = up / (up - down) > draw
        chosen = torch.where(upwards, rows > 0, rows < 0)
        leak = self._leak_of(rows)
        # Multiplied and not selected: zero times what is not finite is not finite.
        return ((leak + (1 - leak) * chosen) * rows).sum(0)

    def _leak_of(self, rows: Tensor) -> float | Tensor:
        if isinstance(self.leak, int | float):
            return float(self.leak)
        return self._leaks.tensor([str(task) for task in range(rows.shape[0])], rows).unsqueeze(1)
