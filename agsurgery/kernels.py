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

BLOCK_CHUNK = 1024
"""The same where every block of parameters has its own weights; each is padded to a multiple of it."""

SLAB = 1 << 21
"""Entries of gradients worked on at a time, where copies of them are made or they are formed to be dropped at once."""


def slab_length(tasks: int) -> int:
    """Columns worked on at a time: a multiple of `CHUNK`."""
    return max(1, SLAB // (tasks * CHUNK)) * CHUNK


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
        rows: `(K, n)`, real floating point; the elements of a row lie side by side.

    Returns:
        `(K, K)` symmetric float64 tensor on the device of `rows` (float32 where the device has no float64).
        Non-finite rows give non-finite entries.
    """
    if rows.element_size() < 4:
        slabs = torch.split(rows, slab_length(rows.shape[0]), dim=1)
        parts = [_symmetric(_gramian_wide(slab.float())) for slab in slabs]
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)
    return _symmetric(_gramian_wide(rows))


def _gramian_wide(rows: Tensor) -> Tensor:
    columns = rows.shape[1]
    if columns <= CHUNK:
        return torch.mm(rows, rows.T).to(solver_dtype(rows.device))
    whole = columns // CHUNK * CHUNK
    product = chunk_gramians(rows if whole == columns else rows.narrow(1, 0, whole), CHUNK)
    total = product.sum(0, dtype=solver_dtype(rows.device))
    if whole < columns:
        rest = rows.narrow(1, whole, columns - whole)
        total = total + torch.mm(rest, rest.T)
    return total


def _symmetric(product: Tensor) -> Tensor:
    """A product of a matrix with its own transpose need not be symmetric to the last bit."""
    return (product + product.mT).mul_(0.5)


def chunk_gramians(rows: Tensor, chunk: int) -> Tensor:
    """`(n / chunk, K, K)` Gramians of the chunks of `(K, n)` rows, in the dtype of the rows."""
    chunks = rows.view(rows.shape[0], -1, chunk).transpose(0, 1)
    return torch.bmm(chunks, chunks.mT)


def block_gramians(rows: Tensor, block_of_chunk: Tensor, blocks: int) -> Tensor:
    """Gramians of blocks of columns.

    Args:
        rows: `(K, m * BLOCK_CHUNK)`, each block starting at a multiple of `BLOCK_CHUNK`, padded with zeros.
        block_of_chunk: `(m,)` int64 on the device of `rows`, for each chunk the block it belongs to.
        blocks: number of blocks B.

    Returns:
        `(B, K, K)` float64 (float32 where the device has none); zero for a block without columns.
    """
    tasks = rows.shape[0]
    total = rows.new_zeros(blocks, tasks, tasks, dtype=solver_dtype(rows.device))
    start = 0
    for slab in torch.split(rows, slab_length(tasks), dim=1):
        wide = slab.float() if slab.element_size() < 4 else slab
        product = chunk_gramians(wide, BLOCK_CHUNK)
        places = block_of_chunk.narrow(0, start, product.shape[0])
        total.index_add_(0, places, product.to(total.dtype))
        start += product.shape[0]
    return _symmetric(total)


def combine(weights: Tensor, rows: Tensor, out: Tensor, *, accumulate: bool = False) -> Tensor:
    r"""Weighted sum of the rows, :math:`J^\top w`, written into `out`.

    Args:
        weights: `(K,)` on the device of `rows`.
        rows: `(K, n)`.
        out: `(n,)`, of any floating dtype; its memory is reused, because a fresh tensor of this size costs
            more in page faults than the product itself.
        accumulate: add to `out` instead of overwriting it.

    Returns:
        `out`.
    """
    if rows.dtype != out.dtype or rows.element_size() < 4:
        wide = weights.to(torch.float32)

        def weighted(slab: Tensor, _: int) -> Tensor:
            return torch.mm(wide.to(slab.dtype).unsqueeze(0), slab).squeeze(0)

        return combine_columns(weighted, rows, out, accumulate=accumulate)
    row = weights.to(rows.dtype).unsqueeze(0)
    if accumulate:
        torch.addmm(out.unsqueeze(0), row, rows, out=out.unsqueeze(0))
    else:
        torch.mm(row, rows, out=out.unsqueeze(0))
    return out


def combine_blocks(
    weights: Tensor,
    rows: Tensor,
    out: Tensor,
    *,
    block_of_chunk: Tensor,
    accumulate: bool = False,
) -> Tensor:
    """The same with weights for each block of columns.

    Args:
        weights: `(B, K)` on the device of `rows`.
        rows: see `block_gramians`.
        out: see `combine`.
        block_of_chunk: see `block_gramians`.
        accumulate: see `combine`.

    Returns:
        `out`.
    """
    by_chunk = weights.index_select(0, block_of_chunk).unsqueeze(1)

    def weighted(slab: Tensor, start: int) -> Tensor:
        chunks = slab.view(slab.shape[0], -1, BLOCK_CHUNK).transpose(0, 1)
        part = by_chunk.narrow(0, start // BLOCK_CHUNK, chunks.shape[0]).to(slab.dtype)
        return torch.bmm(part, chunks).view(-1)

    return combine_columns(weighted, rows, out, accumulate=accumulate)


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
        out: `(n,)`, of any floating dtype.
        accumulate: add to `out` instead of overwriting it.

    Returns:
        `out`.
    """
    start, length = 0, slab_length(rows.shape[0])
    slabs = torch.split(rows, length, dim=1)
    for slab, target in zip(slabs, torch.split(out, length), strict=True):
        update = function(slab.float() if slab.element_size() < 4 else slab, start)
        target.add_(update) if accumulate else target.copy_(update)
        start += slab.shape[1]
    return out


def solver_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on a device without float64 (Apple's MPS)."""
    return torch.float32 if device.type == "mps" else torch.float64
