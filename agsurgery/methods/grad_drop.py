"""GradDrop: keep, for each coordinate, the gradients of one sign."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from agsurgery.methods._base import Reduction, RowMethod
from agsurgery.methods._random import Draws, uniform


class GradDrop(RowMethod):
    r"""Gradient sign dropout.

    For each coordinate, with :math:`P = \tfrac12 (1 + \sum_i g_i / \sum_i |g_i|)` and U uniform in (0, 1), the positive
    entries are kept if :math:`U < P` and the negative ones if not:

    .. math:: d = \sum_i \big(\lambda_i + (1 - \lambda_i)\,M_i\big)\,g_i,

    with M the mask of the entries kept and :math:`\lambda` the leak, the part that always passes.

    Guarantees: none for whole gradients. In each coordinate all that is kept has one sign (without leak), and a
    coordinate on which all tasks agree receives their sum.

    Args:
        leak: share of each gradient that passes whatever its sign, from 0 to 1; one number, or one for each loss in
        order. seed: of the draws. Equal seeds give equal draws on every rank.
        reduction: see `Method`; the paper sums.

    Raises:
        ValueError: `leak` is outside [0, 1], or does not fit the number of tasks.

    Note:
        The paper drops entries of the gradient at a shared representation, multiplied by the sign of the
        representation and summed over the batch. This one, like TorchJD's and that in the code of CAGrad, drops
        entries of the gradients of shared parameters.

    Example:
        >>> import torch
        >>> GradDrop()(torch.tensor([[1.0, -2.0], [3.0, -4.0]]))  # nothing to drop
        tensor([ 4., -6.])

    References:
        Chen et al., [Just Pick a Sign](https://arxiv.org/abs/2010.06808), 2020, Algorithm 1.
    """

    def __init__(
        self,
        leak: float | Sequence[float] = 0.0,
        *,
        seed: int = 0,
        reduction: Reduction = "sum",
    ) -> None:
        super().__init__(reduction=reduction)
        leaks = [leak] if isinstance(leak, int | float) else list(leak)
        if not leaks or not all(0 <= value <= 1 for value in leaks):
            raise ValueError(f"`leak` must be between 0 and 1 for every task. Got {leak!r}.")
        self.leak = leak
        self._leaks = tuple(float(value) for value in leaks)
        self._random = Draws(seed)
        self._start: Tensor | None = None

    def begin(self, device: torch.device) -> None:
        """Draw anew."""
        self._start = self._random.next(device)

    def _combine_sum(self, rows: Tensor, start: int) -> Tensor:
        if len(self._leaks) not in (1, rows.shape[0]):
            raise ValueError(
                f"`leak` must have one number for each task. Got {len(self._leaks)} for {rows.shape[0]} tasks."
            )
        assert self._start is not None
        drawn = uniform(self._start.to(rows.device), rows.shape[1], start).to(rows.dtype)
        total = rows.abs().sum(0)
        balance = torch.where(total == 0, 0.0, rows.sum(0) / total)
        keep_positive = drawn < (1 + balance) / 2
        kept = torch.where((rows > 0) == keep_positive, rows, 0.0)
        # NaN and infinity compare as they like: the sum brings them back.
        kept_sum = kept.sum(0) + 0 * total
        if not any(self._leaks):
            return kept_sum
        leaks = [leak for leak in self._leaks for _ in range(rows.shape[0] // len(self._leaks))]
        for leak, row, keep in zip(leaks, rows, kept, strict=True):
            kept_sum = kept_sum + leak * (row - keep)
        return kept_sum

    def state(self) -> Mapping[str, Tensor]:
        """Seed and number of the draws so far."""
        return self._random.tensors()
