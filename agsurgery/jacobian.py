"""Which parameters each loss reaches, and the gradients of the shared ones as rows of flat, persistent storage."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from agsurgery import kernels

Root: TypeAlias = GradientEdge
"""Where the backward pass of one loss starts."""


@dataclass(frozen=True)
class Reach:
    """What a walk over the autograd graph of K losses found, before any backward pass.

    Attributes:
        leaves: for each loss, the leaf tensors that it reaches, in the order of the walk's parameter list.
        retain: for each loss, whether a later loss needs part of its graph.
        others: leaf parameters reached that were not in the list asked about.
        reentrant: whether a reentrant checkpoint lies on the way, which `torch.autograd.grad` cannot see through.
    """

    leaves: list[list[Tensor]]
    retain: list[bool]
    others: list[Tensor]
    reentrant: bool


def gradient_root(loss: Tensor) -> Root | None:
    """Edge of the graph that computed `loss`, or None for a constant."""
    return get_gradient_edge(loss) if loss.requires_grad else None


def stacked_roots(losses: Tensor) -> list[Root | None]:
    """Roots of the elements of a 1-D tensor of losses.

    For the result of `torch.stack` these are the roots of the scalars that went in: through an index every element
    would seem to reach everything that any of them reaches, and heads could not be told from shared parameters.
    """
    edge = gradient_root(losses)
    hooked = losses._backward_hooks  # a hook on the vector would be passed by
    if edge is not None and edge.node.name() == "StackBackward0" and not hooked:
        parents = edge.node.next_functions
        if len(parents) == losses.shape[0]:
            return [None if node is None else GradientEdge(node, index) for node, index in parents]
    return [gradient_root(loss) for loss in losses.unbind()]


def walk(roots: Sequence[Root | None], parameters: Sequence[Tensor] | None) -> Reach:
    """Find the leaves that each root reaches, visiting every node of the joint graph once.

    Args:
        roots: one per loss; None for a constant.
        parameters: leaves asked about, without duplicates; None asks about all leaves.

    Returns:
        A `Reach`. Losses are taken to be differentiated in their order.
    """
    found: list[Tensor] = list(parameters or ())
    position = {id(leaf): i for i, leaf in enumerate(found)}
    others: dict[int, Tensor] = {}
    reached: dict[Node, int] = {}  # the leaves below a node, as a bit mask over `found`
    # The first loss that came by, for nodes that may hold saved tensors.
    owner: dict[Node, int] = {}
    group = list(range(len(roots)))  # equal labels: losses joined by common nodes
    reentrant = False

    def meet(node: Node, loss: int) -> None:
        old, new = group[owner.get(node, loss)], group[loss]
        if old != new:
            group[:] = [new if label == old else label for label in group]

    def leaf_mask(leaf: Tensor) -> int:
        if id(leaf) not in position:
            if parameters is not None:
                others[id(leaf)] = leaf
                return 0
            position[id(leaf)] = len(found)
            found.append(leaf)
        return 1 << position[id(leaf)]

    for loss, root in enumerate(roots):
        stack = [] if root is None else [(root.node, _children(root.node))]
        while stack:
            node, children = stack[-1]
            fresh = [child for child in children if child not in reached]
            if fresh and node not in reached:
                stack += [(child, _children(child)) for child in fresh]
                continue
            stack.pop()
            if node in reached:
                meet(node, loss)
                continue
            leaf = getattr(node, "variable", None) if not children else None
            if leaf is not None:  # only a node that accumulates into a leaf has one
                reached[node] = leaf_mask(leaf)
                continue
            mask = 0
            for child in children:
                meet(child, loss)
                mask |= reached[child]
            reached[node], owner[node] = mask, loss
            reentrant |= type(node).__name__ == "CheckpointFunctionBackward"

    masks = [0 if root is None else reached[root.node] for root in roots]
    return Reach(
        leaves=[[leaf for i, leaf in enumerate(found) if mask >> i & 1] for mask in masks],
        retain=[label in group[i + 1 :] for i, label in enumerate(group)],
        others=list(others.values()),
        reentrant=reentrant,
    )


def _children(node: Node) -> list[Node]:
    return [child for child, _ in node.next_functions if child is not None]


@dataclass(frozen=True)
class Split:
    """Shared parameters, reached by two losses or more, and for each loss the ones that only it reaches."""

    shared: list[Tensor]
    own: list[list[Tensor]]


def split(leaves: Sequence[Sequence[Tensor]], shared: set[int] | None) -> Split:
    """Divide the reached leaves into shared ones and each loss's own.

    Args:
        leaves: for each loss, the leaves that it reaches.
        shared: ids of the parameters to treat as shared; None: those that two losses or more reach. A parameter
            that is not named although several losses reach it is own to each of them, and gets the plain sum.
    """
    count: dict[int, int] = {}
    order: dict[int, Tensor] = {}
    for reached in leaves:
        for leaf in reached:
            count[id(leaf)] = count.get(id(leaf), 0) + 1
            order[id(leaf)] = leaf
    chosen = (
        {key for key, times in count.items() if times > 1}
        if shared is None
        else shared & order.keys()
    )
    return Split(
        shared=[leaf for key, leaf in order.items() if key in chosen],
        own=[[leaf for leaf in reached if id(leaf) not in chosen] for reached in leaves],
    )


def gradient_dtype(parameter: Tensor) -> torch.dtype:
    """Dtype that `.grad` of a leaf must have: its own, unless the user set `grad_dtype`."""
    return getattr(parameter, "grad_dtype", None) or parameter.dtype


class Bucket:
    """Rows of the gradients of all shared parameters of one device and dtype, in one `(K, n)` tensor.

    Rows and result are allocated once and written in place in every step. The result is handed out as the
    parameters' `.grad`; as long as anybody still holds a view of it, the next step gets a new one.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = list(parameters)
        first = self.parameters[0]
        self._complex = first.is_complex()
        dtype = gradient_dtype(first)
        self._dtype = dtype.to_real() if self._complex else dtype
        self.device = first.device
        self._sizes = [self._padded(p) for p in self.parameters]
        # Fused optimizers pair parameter and gradient in memory order, so the strides must be the same.
        self._strides = [torch.empty_like(p, device="meta").stride() for p in self.parameters]
        self._length = kernels.padded_length(sum(self._sizes))
        self._rows = torch.empty(0, self._length, dtype=self._dtype, device=self.device)
        self._views: list[list[Tensor]] = []
        self._stale: list[set[int]] = []  # per row, positions that hold something else than zero
        self._result: Tensor | None = None

    def _padded(self, parameter: Tensor) -> int:
        size = parameter.numel() * (2 if self._complex else 1)
        return -(-size // kernels.ALIGN) * kernels.ALIGN

    def _split(self, row: Tensor) -> list[Tensor]:
        """Views of a flat row with the shapes and strides (and for complex ones the dtype) of the parameters."""
        views: list[Tensor] = []
        start = 0
        for parameter, size, strides in zip(
            self.parameters, self._sizes, self._strides, strict=True
        ):
            flat = row.narrow(0, start, size)
            if self._complex:
                flat = torch.view_as_complex(flat.view(-1, 2))
            views.append(flat.as_strided(parameter.shape, strides))
            start += size
        return views

    def reserve(self, tasks: int) -> None:
        """Make room for at least `tasks` rows."""
        if len(self._views) < tasks:
            self._rows = torch.zeros(tasks, self._length, dtype=self._dtype, device=self.device)
            self._views = [self._split(row) for row in self._rows]
            self._stale = [set() for _ in range(tasks)]

    def write(self, task: int, gradients: Mapping[int, Tensor]) -> None:
        """Set row `task`: gradients at the positions of their parameters, zero elsewhere.

        Raises:
            TypeError: a gradient is sparse.
        """
        views = self._views[task]
        blank = [views[position] for position in self._stale[task] - gradients.keys()]
        if blank:
            torch._foreach_zero_(blank)
        for gradient in gradients.values():
            if gradient.layout != torch.strided:
                raise TypeError(
                    "Gradients of shared parameters must be dense. Got a sparse one: use "
                    "`torch.nn.Embedding(..., sparse=False)`."
                )
        if gradients:
            torch._foreach_copy_(
                [views[position] for position in gradients], list(gradients.values())
            )
        self._stale[task] = set(gradients)

    def gramian(self, tasks: int) -> Tensor:
        """Inner products of the first `tasks` rows; real parts for complex parameters."""
        return kernels.gramian(self._rows[:tasks])

    def deliver(self, weights: Tensor) -> None:
        """Add the weighted sum of the rows to the parameters' `.grad`."""
        rows = self._rows[: weights.shape[0]]
        weights = weights.to(self.device)
        self._deliver(partial(kernels.combine, weights, rows))

    def deliver_columns(
        self, function: Callable[[Tensor, int], Tensor], tasks: int, start: int
    ) -> int:
        """Add a function of the columns of the first `tasks` rows to the parameters' `.grad`.

        Args:
            function: from `(K, m)` columns, and the number of columns before them, to `(m,)`.
            tasks: K.
            start: number of columns in the buckets before this one.

        Returns:
            The same for the next bucket.
        """

        def shifted(columns: Tensor, offset: int) -> Tensor:
            return function(columns, start + offset)

        self._deliver(partial(kernels.combine_columns, shifted, self._rows[:tasks]))
        return start + self._length

    def _deliver(self, combine: Callable[..., Tensor]) -> None:
        """Add what `combine` writes into the flat tensor it is given to the parameters' `.grad`."""
        if all(parameter.grad is None for parameter in self.parameters):
            self._result = combine(self._free_result())
            for parameter, view in zip(self.parameters, self._split(self._result), strict=True):
                # As a view it would refuse in-place changes that gradients allow.
                parameter.grad = view.data
        elif self._result is not None and self._delivered(self._result):
            combine(self._result, accumulate=True)
        else:
            update = combine(torch.empty_like(self._rows[0]))
            for parameter, view in zip(self.parameters, self._split(update), strict=True):
                parameter.grad = view.data if parameter.grad is None else parameter.grad.add_(view)

    def _delivered(self, result: Tensor) -> bool:
        """Whether every `.grad` still is the view of `result` that was handed out."""
        address = result.data_ptr()
        for parameter, size, strides in zip(
            self.parameters, self._sizes, self._strides, strict=True
        ):
            gradient = parameter.grad
            if gradient is None or gradient.data_ptr() != address or gradient.stride() != strides:
                return False
            address += size * result.element_size()
        return True

    def _free_result(self) -> Tensor:
        """The previous result if nobody looks at it any more, else new memory."""
        if self._result is None or not _sole_owner(self._result):
            return torch.empty(self._length, dtype=self._dtype, device=self.device)
        return self._result


def _sole_owner(tensor: Tensor) -> bool:
    """Whether no other tensor shares the memory of `tensor`: its user may have kept last step's `.grad`."""
    use_count: Any = getattr(torch._C, "_storage_Use_Count", None)
    if use_count is None:
        return False
    storage = tensor.untyped_storage()
    return int(use_count(storage._cdata)) <= 2  # the tensor, and the storage object just made


def buckets(parameters: Sequence[Tensor]) -> list[Bucket]:
    """One `Bucket` per device and gradient dtype, in order of first appearance."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for parameter in parameters:
        groups.setdefault((parameter.device, gradient_dtype(parameter)), []).append(parameter)
    return [Bucket(group) for group in groups.values()]
