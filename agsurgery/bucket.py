"""Rows of the gradients of parameters of one kind, in one flat tensor that stays from step to step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from agsurgery import kernels
from agsurgery.blocks import Blocks
from agsurgery.distributed import Part, Processes
from agsurgery.sharding import Placement, local, placement_of, rewrapped

Columns: TypeAlias = "Callable[[Tensor, int], Tensor]"
"""From `(K, m)` columns, and the number of columns before them, to `(m,)`."""


def gradient_dtype(parameter: Tensor) -> torch.dtype:
    """Dtype that `.grad` of a leaf must have: its own, unless the user set `grad_dtype`."""
    return getattr(parameter, "grad_dtype", None) or parameter.dtype


class Bucket:
    """Rows of the gradients of the shared parameters of one device, dtype and sharding, in one `(K, n)` tensor.

    Rows and result are allocated once and written in place in every step. The result is handed out as the
    parameters' `.grad`; as long as anybody still holds a view of it, the next step gets a new one.

    Args:
        parameters: parameters of one device, gradient dtype and placement, those of one block side by side.
        blocks: see `Partition`.
        dtype: of the rows; None: that of the gradients.
        processes: those over which the rows are averaged; None: they are averaged already.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        blocks: Blocks | None = None,
        dtype: torch.dtype | None = None,
        processes: Processes | None = None,
    ) -> None:
        self.parameters = list(parameters)
        self._local = [local(p.detach()) for p in self.parameters]  # shards, for shapes and strides
        first = self.parameters[0]
        self._placement: Placement | None = placement_of(first)
        self._complex = first.is_complex()
        wanted = gradient_dtype(first)
        self._dtype = wanted.to_real() if self._complex else wanted
        self._row_dtype = dtype or self._dtype
        self.device = first.device
        # Fused optimizers pair parameter and gradient in memory order, so the strides must be the same.
        self._strides = [torch.empty_like(p, device="meta").stride() for p in self._local]
        self._blocks = blocks
        self._starts, self._columns, self._block_of_chunk = self._place()
        self._length = self._columns
        self._processes = processes
        self._part = self._cut()
        self._rows = torch.empty(0, self._length, dtype=self._row_dtype, device=self.device)
        self._views: list[list[Tensor]] = []
        self._stale: list[set[int]] = []  # per row, positions that hold something else than zero
        self._result: Tensor | None = None
        self._result_views: list[Tensor] = []

    def _place(self) -> tuple[list[int], int, Tensor | None]:
        """Where each parameter starts, the length of a row, and the block of each chunk."""
        starts: list[int] = []
        chunks: list[int] = []
        end, last = 0, None
        for parameter, shard in zip(self.parameters, self._local, strict=True):
            block = None if self._blocks is None else self._blocks.of(parameter)
            if block is not None and block != last:
                end = -(-end // kernels.BLOCK_CHUNK) * kernels.BLOCK_CHUNK
                last = block
            starts.append(end)
            size = shard.numel() * (2 if self._complex else 1)
            end += -(-size // kernels.ALIGN) * kernels.ALIGN
            if block is not None:
                chunks += [block] * (-(-end // kernels.BLOCK_CHUNK) - len(chunks))
        if self._blocks is None:
            return starts, kernels.padded_length(end), None
        length = len(chunks) * kernels.BLOCK_CHUNK
        return starts, length, torch.tensor(chunks, device=self.device)

    def _cut(self) -> Part | None:
        """This process's part of the rows, whose length grows until it can be cut."""
        processes = self._processes
        if processes is None or not processes.cuts(self.device):
            return None
        if self._block_of_chunk is not None:
            self._length = processes.stored_length(self._columns, kernels.BLOCK_CHUNK)
            more = self._length // kernels.BLOCK_CHUNK - len(self._block_of_chunk)
            # Chunks of zeros, of any block.
            self._block_of_chunk = torch.nn.functional.pad(self._block_of_chunk, (0, more))
        else:
            long = self._columns > kernels.CHUNK * processes.size
            self._length = processes.stored_length(
                self._columns, kernels.CHUNK if long else kernels.ALIGN
            )
        part = Part(processes, self._length)
        if self._block_of_chunk is not None:
            chunk = kernels.BLOCK_CHUNK
            start, count = part.start // chunk, part.columns // chunk
            self._block_of_chunk = self._block_of_chunk.narrow(0, start, count)
        return part

    @property
    def is_cut(self) -> bool:
        """Whether this process has a part of the columns only."""
        return self._part is not None

    def average(self, tasks: int) -> None:
        """Average the first `tasks` rows over the processes."""
        if self._part is not None:
            self._part.take(self._rows.narrow(0, 0, tasks))
        elif self._processes is not None:
            self._processes.average(self._rows.narrow(0, 0, tasks))
            # Where this process wrote nothing, there may now be what another did.
            self._stale[:tasks] = [set(range(len(self.parameters))) for _ in range(tasks)]

    def _averaged(self, tasks: int) -> Tensor:
        """What this process has of the rows, after `average`."""
        if self._part is not None:
            return self._part.rows(tasks)
        whole = len(self._views) == tasks
        return self._rows if whole else self._rows.narrow(0, 0, tasks)

    def _split(self, row: Tensor, as_complex: bool) -> list[Tensor]:
        """Views of a flat row with the shapes and strides of the parameters.

        Complex ones have a last dimension of real and imaginary parts, or are complex if asked for.
        """
        views: list[Tensor] = []
        for shard, start, strides in zip(self._local, self._starts, self._strides, strict=True):
            size = shard.numel() * (2 if self._complex else 1)
            flat = row.narrow(0, start, size)
            if not self._complex:
                views.append(flat.as_strided(shard.shape, strides))
            elif as_complex:
                view = torch.view_as_complex(flat.view(-1, 2))
                views.append(view.as_strided(shard.shape, strides))
            else:
                twice = (*(2 * stride for stride in strides), 1)
                views.append(flat.as_strided((*shard.shape, 2), twice))
        return views

    def reserve(self, tasks: int) -> None:
        """Make room for at least `tasks` rows."""
        if len(self._views) < tasks:
            shape = (tasks, self._length)
            self._rows = torch.zeros(shape, dtype=self._row_dtype, device=self.device)
            self._views = [self._split(row, as_complex=False) for row in self._rows.unbind()]
            self._stale = [set() for _ in range(tasks)]

    def row(self, task: int, position: int) -> Tensor | None:
        """The gradient of a parameter in row `task`; None if it holds zeros there."""
        if task >= len(self._stale) or position not in self._stale[task]:
            return None
        view = self._views[task][position]
        return torch.view_as_complex(view) if self._complex else view

    def receive(self, task: int, position: int, gradient: Tensor) -> None:
        """Set one parameter's part of row `task`."""
        self._stale[task].add(position)
        self._copy(task, [position], [gradient])

    def write(self, task: int, gradients: Mapping[int, Tensor | None]) -> None:
        """Set row `task`: dense gradients at the positions of their parameters, zero elsewhere.

        None stands for a gradient that was received before.
        """
        views, stale = self._views[task], self._stale[task]
        if stale != gradients.keys():
            blank = [views[position] for position in stale - gradients.keys()]
            if blank:
                torch._foreach_zero_(blank)
            self._stale[task] = set(gradients)
        fresh = {position: g for position, g in gradients.items() if g is not None}
        if fresh:
            self._copy(task, list(fresh), list(fresh.values()))

    def _copy(self, task: int, positions: Sequence[int], sources: list[Tensor]) -> None:
        if self._placement is not None:
            sources = [local(source, self._placement) for source in sources]
        if self._complex:
            sources = [torch.view_as_real(source.resolve_conj()) for source in sources]
        views = self._views[task]
        torch._foreach_copy_([views[position] for position in positions], sources)

    def gramian(self, tasks: int) -> Tensor:
        """Inner products of the first `tasks` rows; real parts for complex parameters, summed over shards."""
        rows = self._averaged(tasks)
        if self._block_of_chunk is None:
            product = kernels.gramian(rows)
        else:
            assert self._blocks is not None
            names = self._blocks.names
            product = kernels.block_gramians(rows, self._block_of_chunk, len(names))
        return product if self._placement is None else self._placement.summed(product)

    def deliver(self, weights: Tensor) -> None:
        """Add the weighted sum of the rows to the parameters' `.grad`."""
        rows = self._averaged(weights.shape[-1])
        weights = weights.to(self.device)
        if self._block_of_chunk is None:
            self._deliver(partial(kernels.combine, weights, rows))
        else:
            places = self._block_of_chunk
            self._deliver(partial(kernels.combine_blocks, weights, rows, block_of_chunk=places))

    def deliver_columns(self, function: Columns, tasks: int, start: int) -> int:
        """Add a function of the columns of the first `tasks` rows to the parameters' `.grad`.

        Args:
            function: see `Columns`.
            tasks: K.
            start: number of columns in the buckets before this one.

        Returns:
            The same for the next bucket.
        """
        # A coordinate has a place of its own, and the next bucket the same start, in every process.
        first, span = start, self._columns
        if self._placement is not None:
            part, parts = self._placement.shard()
            sizes = [p.numel() * (2 if self._complex else 1) for p in self.parameters]
            span = sum(-(-size // kernels.ALIGN) * kernels.ALIGN for size in sizes)
            first, span = start + part * span, parts * span
        if self._part is not None:
            first += self._part.start

        def shifted(columns: Tensor, offset: int) -> Tensor:
            return function(columns, first + offset)

        self._deliver(partial(kernels.combine_columns, shifted, self._averaged(tasks)))
        return start + span

    def _deliver(self, combine: Callable[..., Tensor]) -> None:
        """Add what `combine` writes into the flat tensor it is given to the parameters' `.grad`."""
        if self._part is not None:
            combine = self._part.whole(combine, self._dtype)
        if all(parameter.grad is None for parameter in self.parameters):
            combine(out=self._free_result())
            for parameter, view in zip(self.parameters, self._result_views, strict=True):
                # As `.data`: as a view it would refuse in-place changes that gradients allow.
                parameter.grad = rewrapped(view.data, parameter)
        elif self._result is not None and self._delivered():
            combine(out=self._result, accumulate=True)
        else:
            update = combine(out=torch.empty(self._length, dtype=self._dtype, device=self.device))
            views = self._split(update, as_complex=self._complex)
            for parameter, view in zip(self.parameters, views, strict=True):
                view = rewrapped(view.data, parameter)
                parameter.grad = view if parameter.grad is None else parameter.grad.add_(view)

    def _delivered(self) -> bool:
        """Whether every `.grad` still is the view of the result that was handed out."""
        for parameter, view in zip(self.parameters, self._result_views, strict=True):
            if parameter.grad is None:
                return False
            if not _same_memory(local(parameter.grad), view):
                return False
        return True

    def _free_result(self) -> Tensor:
        """The previous result if nobody looks at it any more, else new memory."""
        if self._result is None or not _unseen(self._result, len(self._result_views)):
            self._result = torch.empty(self._length, dtype=self._dtype, device=self.device)
            self._result_views = self._split(self._result, as_complex=self._complex)
        return self._result


def buckets(
    parameters: Sequence[Tensor],
    blocks: Blocks | None = None,
    dtype: torch.dtype | None = None,
    processes: Processes | None = None,
) -> list[Bucket]:
    """One `Bucket` per device, gradient dtype and sharding, in order of first appearance."""
    ordered = parameters if blocks is None else sorted(parameters, key=blocks.of)
    groups: dict[Any, list[Tensor]] = {}
    for parameter in ordered:
        key = (parameter.device, gradient_dtype(parameter), placement_of(parameter))
        groups.setdefault(key, []).append(parameter)
    return [
        Bucket(
            group,
            blocks,
            dtype,
            processes if processes is not None and processes.averages(group[0]) else None,
        )
        for group in groups.values()
    ]


def _same_memory(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors are the same view of the same storage."""
    return (
        first.untyped_storage()._cdata == second.untyped_storage()._cdata
        and first.storage_offset() == second.storage_offset()
        and first.stride() == second.stride()
    )


def _unseen(tensor: Tensor, views: int) -> bool:
    """Whether only `views` other tensors share the memory of `tensor`: a user may have kept last step's `.grad`."""
    use_count: Any = getattr(torch._C, "_storage_Use_Count", None)
    if use_count is None:
        return False
    storage = tensor.untyped_storage()
    return int(use_count(storage._cdata)) <= views + 2  # and the storage object just made
