"""TrimmedMean: in each coordinate the mean of the gradients without the extreme ones."""

from __future__ import annotations

import torch
from torch import Tensor

from agsurgery.methods._base import Reduction, RowMethod


class TrimmedMean(RowMethod):
    r"""In each coordinate, the mean of the K entries without the `trim` largest and the `trim` smallest, times K.

    Guarantees: each coordinate lies in the range of the other tasks' entries, times K, whatever finite gradients up to
    `trim` tasks have. The order of the tasks does not matter. The update may oppose a task, and
    for K = 2 `trim` + 1 or 2 `trim` + 2 it is K times the median.

    A task without a gradient votes for 0 in every coordinate: this is not the result without that task. A
    coordinate that is not finite for one task is not finite in the update, though trimming would hide it.

    Args:
        trim: number of entries to leave out at each end, at least 0; there must be more than 2 `trim` tasks. 0 is
            the plain sum.
        reduction: `"mean"` divides by K: the trimmed mean of the paper.

    Raises:
        TypeError: `trim` is not an integer.
        ValueError: `trim` is negative; in a step, there are not more than 2 `trim` tasks.

    Note:
        The paper trims a fraction of the gradients, which come from machines that compute the same loss,
        some of them faulty. Tasks differ by right: what is trimmed is often the signal of the
        smallest or the largest task. Rescale the losses to comparable gradients first.

    Example:
        >>> import torch
        >>> rows = torch.tensor([[1.0, 0.0], [2.0, -3.0], [99.0, -1.0]])
        >>> TrimmedMean(reduction="mean")(rows)
        tensor([ 2., -1.])
        >>> TrimmedMean()(rows)
        tensor([ 6., -3.])

    References:
        Yin et al., [Byzantine-Robust Distributed Learning: Towards Optimal Statistical
        Rates](https://arxiv.org/abs/1803.01498), 2018, Definition 2.
    """

    def __init__(self, trim: int = 1, *, reduction: Reduction = "sum") -> None:
        super().__init__(reduction=reduction)
        if isinstance(trim, bool) or not isinstance(trim, int):
            raise TypeError(f"`trim` must be an integer. Got {trim!r}.")
        if trim < 0:
            raise ValueError(f"`trim` must not be negative. Got {trim}.")
        self.trim = trim

    def _combine_sum(self, rows: Tensor, start: int) -> Tensor:
        tasks = rows.shape[0]
        if tasks <= 2 * self.trim:
            raise ValueError(
                f"TrimmedMean(trim={self.trim}) leaves out {2 * self.trim} gradients and needs more than that. "
                f"Got {tasks}; use a smaller `trim`, or a method for few tasks."
            )
        kept = list(rows.unbind(0))
        for _ in range(self.trim):
            kept = _without_extremes(kept)
        update = torch.stack(kept).mean(0) * tasks
        return torch.where(torch.isfinite(rows).all(0), update, torch.nan)


def _without_extremes(rows: list[Tensor]) -> list[Tensor]:
    """The entries of each coordinate but the largest and the smallest, in some order.

    Two passes of bubble sort on whole rows: for a few rows much faster than sorting millions of short columns.
    """
    smallest, *rest = rows
    for place, row in enumerate(rest):
        smallest, rest[place] = torch.minimum(smallest, row), torch.maximum(smallest, row)
    largest, *rest = rest
    for place, row in enumerate(rest):
        rest[place], largest = torch.minimum(row, largest), torch.maximum(row, largest)
    return rest
