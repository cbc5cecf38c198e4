"""The two passes over the K x n gradient data: the Gramian and the weighted combination.

Everything of size n happens here, in as few torch operations as were found to be fast *and* accurate. The
K x K result is float64, because the methods that use it subtract nearly equal numbers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

CHUNK = 4096
"""Columns summed by one float32 dot product. Short sums keep the error of the Gramian near 1e-7, where one sum
over ten million columns is wrong in the third digit; shorter chunks still would cost time."""

ALIGN = 16
"""Every parameter starts at a multiple of this many elements, so that its view is aligned for vector loads."""

_SLAB = 256 * CHUNK  # columns worked on at a time where each pass makes copies of them


def padded_length(columns: int) -> int:
    """Row length to allocate for `columns` elements: a multiple of `CHUNK`, or of `ALIGN` when short."""
    unit = CHUNK if columns > CHUNK else ALIGN
    return max(unit, -(-columns // unit) * unit)


def gramian(rows: Tensor) -> Tensor:
    r"""Inner products of all pairs of rows, :math:`G = J J^\top`.

    The columns are cut into chunks, a batched product gives one K x K matrix per chunk, and these are summed
    in float64. Rows of 16-bit floats are widened to float32 slab by slab: squares of float16 gradients
    overflow, and bfloat16 sums keep only two digits.

    Args:
        rows: `(K, n)`, real floating point, contiguous, `n` as given by `padded_length`, padding filled with zeros.

    Returns:
        `(K, K)` symmetric float64 tensor on the device of `rows` (float32 where the device has no float64).
        Non-finite rows give non-finite entries.
    """
    if rows.element_size() < 4:
        parts = [_gramian_wide(slab.float()) for slab in torch.split(rows, _SLAB, dim=1)]
        return torch.stack(parts).sum(0)
    return _gramian_wide(rows)


def _gramian_wide(rows: Tensor) -> Tensor:
    tasks, columns = rows.shape
    if columns <= CHUNK:
        product = torch.mm(rows, rows.T).to(solver_dtype(rows.device))
    else:
        chunks = rows.view(tasks, columns // CHUNK, CHUNK).transpose(0, 1)
        product = torch.bmm(chunks, chunks.mT).sum(0, dtype=solver_dtype(rows.device))
    return (
        product + product.T
    ) / 2  # a product of a matrix with itself need not be symmetric to the last bit


def combine(weights: Tensor, rows: Tensor, out: Tensor, *, accumulate: bool = False) -> Tensor:
    r"""Weighted sum of the rows, :math:`J^\top w`, written into `out`.

    Args:
        weights: `(K,)` on the device of `rows`.
        rows: `(K, n)`.
        out: `(n,)`, same dtype as `rows`; its memory is reused, because a fresh tensor of this size costs
            more in page faults than the product itself.
        accumulate: add to `out` instead of overwriting it.

    Returns:
        `out`.
    """
    if rows.element_size() < 4:
        wide = weights.to(torch.float32)
        for slab, target in zip(
            torch.split(rows, _SLAB, dim=1), torch.split(out, _SLAB), strict=True
        ):
            update = torch.mm(wide.unsqueeze(0), slab.float()).squeeze(0)
            target.copy_(target.float() + update if accumulate else update)
        return out
    row = weights.to(rows.dtype).unsqueeze(0)
    if accumulate:
        torch.addmm(out.unsqueeze(0), row, rows, out=out.unsqueeze(0))
    else:
        torch.mm(row, rows, out=out.unsqueeze(0))
    return out


def combine_columns(
    function: Callable[[Tensor, int], Tensor],
    rows: Tensor,
    out: Tensor,
    *,
    accumulate: bool = False,
) -> Tensor:
    """Apply a function of single columns, slab by slab so that what it makes on the way stays small.

    Args:
        function: from `(K, m)` columns, at least float32, and the number of columns before them, to `(m,)`.
        rows: `(K, n)`.
        out: `(n,)`, same dtype as `rows`.
        accumulate: add to `out` instead of overwriting it.

    Returns:
        `out`.
    """
    start = 0
    for slab, target in zip(torch.split(rows, _SLAB, dim=1), torch.split(out, _SLAB), strict=True):
        update = function(slab.float() if slab.element_size() < 4 else slab, start)
        target.copy_(target.to(update.dtype) + update if accumulate else update)
        start += slab.shape[1]
    return out


def solver_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on a device without float64 (Apple's MPS)."""
    return torch.float32 if device.type == "mps" else torch.float64
