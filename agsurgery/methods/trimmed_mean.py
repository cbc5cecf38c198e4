"""TrimmedMean: the mean of each coordinate without its extremes."""

from __future__ import annotations

from torch import Tensor

from agsurgery.methods._base import Reduction, RowMethod


class TrimmedMean(RowMethod):
    """Mean over the tasks of each coordinate, after its largest and its smallest entries are left out.

    Guarantees: none for whole gradients. Each coordinate lies between its own extremes, so that `trim` tasks, whatever
    their gradients, cannot move it beyond what the others hold. A task with a zero gradient votes for zero.

    Args:
        trim: number of largest and of smallest entries to leave out, at least 0, less than half the tasks.
        reduction: see `Method`; the paper takes the mean, `"sum"` multiplies it by K.

    Raises:
        ValueError: `trim` is negative, or leaves nothing.

    Example:
        >>> import torch
        >>> TrimmedMean(1, reduction="mean")(torch.tensor([[1.0, 5.0], [2.0, 6.0], [90.0, -70.0]]))
        tensor([2., 5.])

    References:
        Yin et al., [Byzantine-Robust Distributed Learning](https://arxiv.org/abs/1803.01498), 2018, definition 2.
    """

    def __init__(self, trim: int = 1, *, reduction: Reduction = "sum") -> None:
        super().__init__(reduction=reduction)
        if trim < 0:
            raise ValueError(f"`trim` must not be negative. Got {trim}.")
        self.trim = trim

    def _combine_sum(self, rows: Tensor, start: int) -> Tensor:
        tasks = rows.shape[0]
        if tasks <= 2 * self.trim:
            raise ValueError(
                f"`trim` must be less than half the number of tasks. Got {self.trim} for {tasks} tasks; "
                "two tasks have only extremes."
            )
        kept = rows.sort(dim=0).values.narrow(0, self.trim, tasks - 2 * self.trim)
        # Infinities may have been trimmed, but must not go unnoticed.
        return kept.mean(0) * tasks + 0 * rows.sum(0)
