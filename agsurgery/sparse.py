"""Rows of sparse gradients: only the entries that some task touched are stored."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from agsurgery import kernels


class SparseRows:
    """Gradients of one parameter with `Embedding(sparse=True)` or the like, one per task.

    The rows of K tasks are laid over the union of the indices that any of them touches. Finding it reads indices on the
    host: on a GPU, sparse gradients synchronise. A task with a dense gradient makes all of them dense.

    Args:
        parameter: whose gradients these are.
    """

    def __init__(self, parameter: Tensor) -> None:
        self.parameter = parameter
        self._gradients: dict[int, Tensor] = {}
        self._rows: Tensor | None = None  # (K, m)
        self._indices: Tensor | None = None  # (sparse dimensions, touched); None if dense

    @property
    def used(self) -> bool:
        """Whether any task has written."""
        return bool(self._gradients)

    def clear(self) -> None:
        """Forget the last step."""
        self._gradients, self._rows, self._indices = {}, None, None

    def put(self, task: int, gradient: Tensor) -> None:
        """Set the gradient of a task."""
        self._gradients[task] = gradient

    def gramian(self, tasks: int) -> Tensor:
        """`(K, K)` inner products."""
        self._rows = self._stacked(tasks)
        return kernels.gramian(self._rows)

    def _stacked(self, tasks: int) -> Tensor:
        gradients = self._gradients
        if any(g.layout == torch.strided for g in gradients.values()):
            self._indices = None
            rows = torch.zeros_like(self.parameter, memory_format=torch.contiguous_format)
            rows = rows.expand(tasks, *rows.shape).clone()
            for task, gradient in gradients.items():
                rows[task].copy_(gradient.to_dense())
            return rows.view(tasks, -1)
        coalesced = {task: gradient.coalesce() for task, gradient in gradients.items()}
        indices = torch.cat([gradient.indices() for gradient in coalesced.values()], 1)
        self._indices, places = torch.unique(indices, dim=1, return_inverse=True)
        first = next(iter(coalesced.values())).values()
        rows = first.new_zeros(tasks, self._indices.shape[1], *first.shape[1:])
        start = 0
        for task, gradient in coalesced.items():
            values = gradient.values()
            rows[task].index_copy_(0, places.narrow(0, start, values.shape[0]), values)
            start += values.shape[0]
        return rows.view(tasks, -1)

    def deliver(self, combine: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Add a combination `(rows, out)` of the rows to the parameter's `.grad`."""
        assert self._rows is not None
        flat = combine(self._rows, torch.empty_like(self._rows[0]))
        if self._indices is None:
            update = flat.view(self.parameter.shape)
        else:
            dense = self.parameter.shape[self._indices.shape[0] :]
            update = torch.sparse_coo_tensor(
                self._indices,
                flat.view(-1, *dense),
                self.parameter.shape,
                is_coalesced=True,
                check_invariants=False,
            )
        gradient = self.parameter.grad
        if gradient is not None:  # dense + sparse is dense; in place it could not become so
            update = gradient + update if gradient.layout == torch.strided else update + gradient
        self.parameter.grad = update
        self.clear()

    def deliver_columns(self, function: Callable[[Tensor, int], Tensor], start: int) -> int:
        """Add a function of the columns; returns the number of columns up to the next rows."""
        assert self._rows is not None
        columns = self._rows.shape[1]

        def shifted(part: Tensor, offset: int) -> Tensor:
            return function(part, start + offset)

        self.deliver(lambda rows, out: kernels.combine_columns(shifted, rows, out))
        return start + columns
