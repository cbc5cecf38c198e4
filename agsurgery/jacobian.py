"""The gradients of the shared parameters, one row per task, in flat, persistent storage."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from agsurgery import kernels
from agsurgery.blocks import Blocks
from agsurgery.bucket import Bucket, Columns, buckets, gradient_dtype
from agsurgery.distributed import Processes
from agsurgery.sharding import is_sharded
from agsurgery.sparse import SparseRows

LARGE = 1 << 16
"""Entries of a gradient from which on it is copied to its row as soon as it is there."""


class Rows:
    """Rows of the gradients of all shared parameters, whatever their devices, dtypes and layouts.

    Args:
        dtype: of the stored rows; None: that of each parameter's gradient.
    """

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        self._dtype = dtype
        # Set before `lay_out`: the processes over which rows are averaged; None: there is one.
        self.processes: Processes | None = None
        self._blocks: Blocks | None = None
        self._layout: list[Any] = []
        self._buckets: list[Bucket] = []
        self._active: list[Bucket] = []
        self._place: dict[int, tuple[Bucket, int]] = {}
        # Parameters whose gradients were sparse once have no place in a bucket.
        self._sparse: dict[int, SparseRows] = {}
        self._shared: Sequence[Tensor] = ()
        self._tasks = 0

    def lay_out(self, shared: Sequence[Tensor], tasks: int, blocks: Blocks | None) -> None:
        """Make room for `tasks` rows; what was stored is kept as long as the same parameters are shared.

        Args:
            shared: the shared parameters; empty if this step's losses share none.
            tasks: K.
            blocks: see `Partition`.
        """
        self._blocks, self._shared, self._tasks = blocks, shared, tasks
        self._active = []
        for rows in self._sparse.values():
            rows.clear()
        if not shared:
            return  # but keep the storage: a batch without one of two tasks shares nothing
        # `model.double()` and `model.to(device)` keep the identity of the parameters.
        layout: list[Any] = [
            (id(p), p.device, gradient_dtype(p), p.shape, p.stride()) for p in shared
        ]
        if blocks is not None:
            layout += [blocks.of(p) for p in shared]
        if self.processes is not None:
            layout.append(self.processes)
        if layout != self._layout:
            self._layout = layout
            self._fill_buckets()
        self._active = self._buckets
        for bucket in self._active:
            bucket.reserve(tasks)

    def _fill_buckets(self) -> None:
        dense = [p for p in self._shared if id(p) not in self._sparse]
        self._buckets = buckets(dense, self._blocks, self._dtype, self.processes)
        self._place = {
            id(parameter): (bucket, position)
            for bucket in self._buckets
            for position, parameter in enumerate(bucket.parameters)
        }

    @contextmanager
    def arriving(self, task: int, leaves: Sequence[Tensor]) -> Iterator[set[int]]:
        """While open, copy large gradients to row `task` as soon as autograd has computed them, and drop them.

        The next ones are then computed in the same memory, still in the processor's cache. Without this, all gradients
        of a task would lie in memory before the first is copied.

        Args:
            task: number of the row.
            leaves: parameters whose gradients may be taken.

        Returns:
            The ids of the parameters whose gradients came, for `write`; autograd hands out a placeholder for each.
        """
        arrived: set[int] = set()
        places = [self._place.get(id(leaf)) if self._shared else None for leaf in leaves]
        handles = [
            on_gradient(leaf, _Receiver(*place, task, id(leaf), arrived))
            for leaf, place in zip(leaves, places, strict=True)
            if place is not None and leaf.numel() >= LARGE
        ]
        try:
            yield arrived
        finally:
            for handle in handles:
                handle.remove()

    def write(
        self,
        task: int,
        leaves: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        arrived: Collection[int] = (),
    ) -> dict[Tensor, Tensor]:
        """Set row `task`: the given gradients at the places of their parameters, zero elsewhere.

        Args:
            task: number of the row.
            leaves: parameters.
            gradients: of these.
            arrived: see `arriving`.

        Returns:
            The gradients of parameters that have no place here: the loss's own.
        """
        if not self._shared:
            return {p: g for p, g in zip(leaves, gradients, strict=True) if g is not None}
        if self.processes is not None:  # the indices of sparse gradients differ between processes
            gradients = [
                g if g is None or g.layout == torch.strided else g.to_dense() for g in gradients
            ]
        sparse = [
            leaf
            for leaf, gradient in zip(leaves, gradients, strict=True)
            if gradient is not None and gradient.layout != torch.strided and id(leaf) in self._place
        ]
        if sparse:  # the rows move; what has arrived is written again
            gradients = [
                self._row(task, leaf) if id(leaf) in arrived else gradient
                for leaf, gradient in zip(leaves, gradients, strict=True)
            ]
            arrived = ()
        for leaf in sparse:
            self._take_out(leaf, task)
        own: dict[Tensor, Tensor] = {}
        # A constant loss reaches no leaf, and writes rows of zeros.
        rows: dict[Bucket, dict[int, Tensor | None]] = {bucket: {} for bucket in self._active}
        for leaf, gradient in zip(leaves, gradients, strict=True):
            if gradient is None:
                continue
            place = self._place.get(id(leaf))
            if place is not None:
                rows[place[0]][place[1]] = None if id(leaf) in arrived else gradient
            elif id(leaf) in self._sparse and any(leaf is p for p in self._shared):
                self._sparse[id(leaf)].put(task, gradient)
            else:
                own[leaf] = gradient
        for bucket, row in rows.items():
            bucket.write(task, row)
        return own

    def stored(self, task: int) -> dict[Tensor, Tensor]:
        """Views of the gradients in row `task`, by parameter: what is added to them is added to the row.

        Without sparse and sharded gradients, and those of which the row holds none.
        """
        found = {}
        for parameter in self._shared:
            view = self._row(task, parameter) if id(parameter) in self._place else None
            if view is not None and not is_sharded(parameter):
                found[parameter] = view
        return found

    def _row(self, task: int, leaf: Tensor) -> Tensor | None:
        bucket, position = self._place[id(leaf)]
        return bucket.row(task, position)

    def _take_out(self, leaf: Tensor, task: int) -> None:
        """Store the gradients of a parameter on their own, from the first time that one is sparse."""
        old = self._place
        self._sparse[id(leaf)] = SparseRows(leaf)
        self._fill_buckets()
        self._active = self._buckets
        for bucket in self._active:
            bucket.reserve(self._tasks)
        for earlier in range(task):
            leaves = [p for p in self._shared if id(p) in old]
            views = [old[id(p)][0].row(earlier, old[id(p)][1]) for p in leaves]
            self.write(earlier, leaves, views)

    def gramian(self, tasks: int, device: torch.device) -> Tensor:
        """Inner products of the first `tasks` rows, `(K, K)`, or `(B, K, K)` where there are blocks.

        The rows are averaged over the processes first. On the device of the first bucket, else on `device`; zero where
        nothing is shared.
        """
        for bucket in self._active:
            bucket.average(tasks)
        # Each process has a part of the columns: one sum over the processes for all buckets together.
        parts = [bucket.gramian(tasks) for bucket in self._active if bucket.is_cut]
        if parts and self.processes is not None:
            cut = parts[0]
            for part in parts[1:]:
                cut = cut + part.to(cut)
            parts = [self.processes.sum(cut)]
        parts += [bucket.gramian(tasks) for bucket in self._active if not bucket.is_cut]
        parts += [self._in_block(rows.gramian(tasks), rows) for rows in self._sparse_in_use()]
        if not parts:
            shape = (
                (tasks, tasks) if self._blocks is None else (len(self._blocks.names), tasks, tasks)
            )
            return torch.zeros(shape, dtype=kernels.solver_dtype(device), device=device)
        total = parts[0]
        for part in parts[1:]:
            total = total + part.to(total)
        return total

    def _sparse_in_use(self) -> list[SparseRows]:
        return [rows for rows in self._sparse.values() if rows.used]

    def _in_block(self, gramian: Tensor, rows: SparseRows) -> Tensor:
        if self._blocks is None:
            return gramian
        total = gramian.new_zeros(len(self._blocks.names), *gramian.shape)
        total.select(0, self._blocks.of(rows.parameter)).copy_(gramian)
        return total

    def deliver(self, weights: Tensor) -> None:
        """Add the weighted sums of the rows to the parameters' `.grad`.

        Args:
            weights: `(K,)`, or `(B, K)` where there are blocks.
        """
        for bucket in self._active:
            bucket.deliver(weights)
        for rows in self._sparse_in_use():
            block = None if self._blocks is None else self._blocks.of(rows.parameter)
            own = weights if block is None else weights.select(0, block)
            rows.deliver(partial(kernels.combine, own.to(rows.parameter.device)))

    def deliver_columns(self, function: Columns, tasks: int) -> None:
        """Add a function of the columns of the first `tasks` rows to the parameters' `.grad`."""
        start = 0
        for bucket in self._active:
            start = bucket.deliver_columns(function, tasks, start)
        for rows in self._sparse_in_use():
            start = rows.deliver_columns(function, start)

    @property
    def device(self) -> torch.device | None:
        """Device of the first rows; None if there are none."""
        if self._active:
            return self._active[0].device
        used = self._sparse_in_use()
        return used[0].parameter.device if used else None


class _Receiver:
    """Hook on the gradient of one parameter: copies it to its place in a row."""

    def __init__(
        self, bucket: Bucket, position: int, task: int, key: int, arrived: set[int]
    ) -> None:
        self._bucket, self._position, self._task = bucket, position, task
        self._key, self._arrived = key, arrived

    def __call__(self, gradient: Tensor) -> Tensor | None:
        if gradient.layout != torch.strided:
            return None
        self._bucket.receive(self._task, self._position, gradient)
        self._arrived.add(self._key)
        return gradient.new_zeros(()).expand(gradient.shape)


def on_gradient(leaf: Tensor, hook: Callable[[Tensor], Tensor | None]) -> Any:
    """Register a hook on the gradient of a leaf, which runs after those of the user."""
    untyped: Any = leaf.register_hook
    return untyped(hook)


def deliver_own(gradients: Mapping[Tensor, Tensor], factor: Tensor | None) -> None:
    """Add a loss's own gradients, times a factor, to `.grad`."""
    for parameter, gradient in gradients.items():
        gradient = gradient.to(gradient_dtype(parameter))
        if factor is not None:
            gradient = gradient * factor.to(gradient.device, gradient.real.dtype)
        if parameter.grad is None:
            # A copy: autograd may hand out one tensor twice, or one that the user's code still holds, and
            # its strides may differ from the parameter's, which fused optimizers do not notice.
            dense = gradient.layout == torch.strided
            parameter.grad = (
                torch.empty_like(parameter, dtype=gradient.dtype).copy_(gradient)
                if dense
                else gradient.clone()
            )
        else:
            parameter.grad.add_(gradient)
