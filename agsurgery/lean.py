r"""The Gramian of K gradients without ever holding them: all tasks pass through the graph together.

The K cotangents travel down the shared part of the graph as one batch. As soon as the K gradients of one parameter
are complete, their inner products are added to the Gramian and they are dropped. The weights of a matrix
multiplication get theirs a few columns at a time, so that K gradients of a large layer never exist. Where it has few
rows, or an embedding few indices, the inner products are taken without forming the gradients:

.. math:: \langle A^\top D_i, A^\top D_j \rangle = \sum (D_i D_j^\top) \odot (A A^\top)
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from agsurgery.graph import children, descendants, gradients, leaf_of
from agsurgery.jacobian import on_gradient
from agsurgery.kernels import SLAB, gramian, solver_dtype

Sink = Callable[[Tensor], None]
"""Takes a `(K, ...)` batch of cotangents or gradients."""


class _Tap(torch.autograd.Function):
    """Hand the batch behind a tensor inside `torch.vmap` to a sink, and return one zero in its shape."""

    @staticmethod
    def forward(batch: Tensor, tasks: int, sink: Sink) -> Tensor:
        """Outside of the batch: a gradient that is the same for all tasks."""
        sink(batch.unsqueeze(0).expand(tasks, *batch.shape))
        return batch.new_zeros(()).expand(batch.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Nothing to remember."""

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int, None, None], batch: Tensor, tasks: int, sink: Sink
    ) -> tuple[Tensor, int]:
        """The rule for batches."""
        batch = batch.movedim(in_dims[0], 0)
        sink(batch)
        return batch.new_zeros(()).expand(batch.shape), 0


def _tap(batch: Tensor, tasks: int, sink: Sink) -> Tensor:
    untyped: Any = _Tap.apply
    zeros: Tensor = untyped(batch, tasks, sink)
    return zeros


class NotBatchable(Exception):
    """The backward pass of all tasks together failed; one by one it may work."""


def warn_not_batchable(said: str) -> None:
    """Tell the user that this step needed the memory of the rows after all."""
    warnings.warn(
        'engine="lean" took the tasks one by one, in the time and memory of engine="grad": an operation below the '
        f"heads has no batching rule (`torch.vmap`). Replace it to save memory. It said: {said}",
        stacklevel=2,
    )


@contextmanager
def _no_advice() -> Iterator[None]:
    """Without the warning for operations that take the tasks of a batch one by one, which is all one could do."""
    functorch: Any = torch._C._functorch
    warn = getattr(functorch, "_set_vmap_fallback_warning_enabled", lambda on: None)
    warn(False)
    try:
        yield
    finally:
        warn(True)


class Shortcut(NamedTuple):
    """A node whose weight gradients need not be formed, and the Gramian they would have had."""

    node: Node
    leaves: list[Tensor]
    gramian: Callable[[Tensor], Tensor]


def trunk_gramian(
    edges: Sequence[GradientEdge],
    cotangents: Sequence[Tensor],
    leaves: Sequence[Tensor],
    whole: Sequence[Tensor],
) -> tuple[Tensor, list[Tensor | None]]:
    """Inner products of the K gradients of some leaves.

    Args:
        edges: where the K cotangents start.
        cotangents: `(K, ...)` for each edge.
        leaves: parameters below; their gradients are not kept.
        whole: parameters below whose gradients are asked for; they stay out of the Gramian.

    Returns:
        The `(K, K)` Gramian, and the `(K, ...)` gradients of `whole`, None for those not reached.

    Raises:
        NotBatchable: an operation cannot be differentiated for a batch of cotangents.
    """
    tasks, device = cotangents[0].shape[0], cotangents[0].device
    total = torch.zeros(tasks, tasks, dtype=solver_dtype(device), device=device)

    def add(product: Tensor) -> None:
        total.add_(product.to(total))

    def consume(batch: Tensor) -> None:
        batch = torch.view_as_real(batch.resolve_conj()) if batch.is_complex() else batch
        add(gramian(batch.reshape(tasks, -1)))

    shortcuts = find_shortcuts(edges, leaves, tasks)
    spared = {id(leaf) for shortcut in shortcuts for leaf in shortcut.leaves}
    formed = [leaf for leaf in leaves if id(leaf) not in spared]
    ends = _bottom(edges, shortcuts, [*formed, *whole])
    handles: list[Any] = []
    for leaf in formed:
        handles.append(on_gradient(leaf, lambda g: _tap(g, tasks, consume)))
    for shortcut in shortcuts:
        if shortcut.node not in ends:
            handles.append(shortcut.node.register_prehook(_watch(shortcut, tasks, add)))
    targets: list[Tensor | GradientEdge] = [*whole, *formed]
    targets += [GradientEdge(node, 0) for node in ends]
    reached: list[int] = []

    def differentiate(*starts: Tensor) -> tuple[Tensor, ...]:
        values = gradients(edges, targets, starts, retain_graph=True)
        reached.extend(i for i, value in enumerate(values) if value is not None)
        return tuple(value for value in values if value is not None)

    try:
        # Recomputation under a checkpoint replays the random state; it must not be drawn per task.
        with _no_advice():
            values = torch.vmap(differentiate, randomness="same")(*cotangents)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError, ValueError) as error:
        raise NotBatchable(str(error)) from error
    finally:
        for handle in handles:
            handle.remove()
    by_target = dict(zip(reached, values, strict=True))
    by_node = {shortcut.node: shortcut for shortcut in shortcuts}
    for i, node in enumerate(ends, len(whole) + len(formed)):
        if i in by_target:
            add(by_node[node].gramian(by_target[i]))
    return total, [by_target.get(i) for i in range(len(whole))]


def _watch(
    shortcut: Shortcut, tasks: int, add: Callable[[Tensor], None]
) -> Callable[[tuple[Tensor | None, ...]], None]:
    def watch(outputs: tuple[Tensor | None, ...]) -> None:
        if outputs[0] is not None:
            _tap(outputs[0], tasks, lambda batch: add(shortcut.gramian(batch)))

    return watch


def _bottom(
    edges: Sequence[GradientEdge], shortcuts: Sequence[Shortcut], leaves: Sequence[Tensor]
) -> list[Node]:
    """Shortcut nodes with no target below: autograd runs them only if their own cotangent is asked for."""
    wanted = {shortcut.node for shortcut in shortcuts}
    kept = {id(leaf) for leaf in leaves}
    parents: dict[Node, list[Node]] = {}
    nodes = list(descendants(edges))
    for node in nodes:
        for child in children(node):
            parents.setdefault(child, []).append(node)
    above: set[Node] = set()  # nodes with a target below
    stack = [node for node in nodes if node in wanted or id(leaf_of(node)) in kept]
    while stack:
        for parent in parents.get(stack.pop(), ()):
            if parent not in above:
                above.add(parent)
                stack.append(parent)
    return [shortcut.node for shortcut in shortcuts if shortcut.node not in above]


# -- inner products without gradients -------------------------------------------------------------


def find_shortcuts(
    edges: Sequence[GradientEdge], leaves: Sequence[Tensor], tasks: int
) -> list[Shortcut]:
    """Matrix products, and lookups of few indices, whose weights are used nowhere else."""
    nodes = list(descendants(edges))
    uses = Counter(child for node in nodes for child in children(node))
    # A hook of the user wants to see the gradient.
    free = {id(leaf) for leaf in leaves if not leaf._backward_hooks}

    def sole_leaf(node: Node | None) -> Tensor | None:
        if node is None or uses[node] > 1:
            return None
        leaf = leaf_of(node)
        return leaf if leaf is not None and id(leaf) in free else None

    found = []
    for node in nodes:
        make = _MAKERS.get(node.name())
        shortcut = None if make is None else make(node, sole_leaf, uses, tasks)
        if shortcut is not None:
            found.append(shortcut)
    return found


SoleLeaf = Callable[[Node | None], "Tensor | None"]


def _linear(node: Any, sole_leaf: SoleLeaf, uses: Counter[Node], tasks: int) -> Shortcut | None:
    """`A @ W`, `A @ W.T` and the same with a bias, whose weight is used nowhere else."""
    adds = node.name() == "AddmmBackward0"
    matrix = node.next_functions[-1][0]
    weight = sole_leaf(matrix)
    if (
        weight is None
        and matrix is not None
        and matrix.name() == "TBackward0"
        and uses[matrix] == 1
    ):
        weight = sole_leaf(matrix.next_functions[0][0])
    saved = "mat1" if adds else "self"
    if weight is None or weight.is_complex() or not _readable(node, saved):
        return None
    if adds and not (node._saved_alpha == 1 and node._saved_beta == 1):
        return None
    factor: Tensor = getattr(node, f"_saved_{saved}")
    rows, inputs = factor.shape
    outputs = weight.numel() // inputs
    by_pairs = (tasks * rows) ** 2 * outputs + rows**2 * inputs
    formed = tasks * rows * inputs * outputs + tasks**2 * inputs * outputs
    leaves = [weight]
    bias = sole_leaf(node.next_functions[0][0]) if adds else None
    if bias is not None and bias.dim() == 1:
        leaves.append(bias)
    method = _pairs if by_pairs < formed else _slabs

    def product(cotangent: Tensor) -> Tensor:
        # In float32 even under autocast: products of 16-bit numbers would be rounded to 16 bits.
        wide = torch.promote_types(cotangent.dtype, torch.float32)
        flat = cotangent.reshape(tasks, rows, -1).to(wide)
        return method(factor.to(wide), flat, len(leaves) == 2)

    return Shortcut(node, leaves, product)


def _pairs(factor: Tensor, cotangent: Tensor, bias: bool) -> Tensor:
    """Inner products of `A^T D_i`, from those of the rows of `A` and of the `(K, rows, outputs)` cotangents."""
    tasks, rows, _ = cotangent.shape
    inner = factor @ factor.T + (1 if bias else 0)  # a bias is the weight of an input of ones
    flat = cotangent.reshape(tasks * rows, -1)
    both = (flat @ flat.T).view(tasks, rows, tasks, rows) * inner.view(1, rows, 1, rows)
    return both.sum((1, 3), dtype=solver_dtype(flat.device))


def _slabs(factor: Tensor, cotangent: Tensor, bias: bool) -> Tensor:
    """The same from the gradients themselves, for a few outputs at a time."""
    tasks, _, outputs = cotangent.shape
    width = max(1, SLAB // (tasks * factor.shape[1]))
    total = gramian(cotangent.sum(1)) if bias else None
    for start in range(0, outputs, width):
        part = cotangent.narrow(2, start, min(width, outputs - start))
        product = gramian((part.mT @ factor).reshape(tasks, -1))
        total = product if total is None else total + product
    assert total is not None
    return total


def _embedding(node: Any, sole_leaf: SoleLeaf, uses: Counter[Node], tasks: int) -> Shortcut | None:
    """A lookup of fewer indices than the table has rows: gradients are summed over equal indices only."""
    table = sole_leaf(node.next_functions[0][0])
    if table is None or not _readable(node, "indices") or node._saved_scale_grad_by_freq:
        return None
    indices: Tensor = node._saved_indices
    if indices.numel() >= table.shape[0] or table.is_complex():
        return None
    padding = node._saved_padding_idx

    def product(cotangent: Tensor) -> Tensor:
        flat = cotangent.reshape(tasks, indices.numel(), -1)
        flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
        order, places = indices.reshape(-1).sort()
        fresh = torch.ones_like(order)
        fresh.narrow(0, 1, order.shape[0] - 1).copy_(order.diff() != 0)
        segment = fresh.cumsum(0) - 1  # equal indices, equal segment: no size is read on the host
        moved = flat.index_select(1, places)
        if padding >= 0:
            moved = moved * (order != padding).unsqueeze(1)
        summed = torch.zeros_like(moved).index_add_(1, segment, moved)
        return gramian(summed.reshape(tasks, -1))

    return Shortcut(node, [table], product)


_MAKERS = {"AddmmBackward0": _linear, "MmBackward0": _linear, "EmbeddingBackward0": _embedding}


def _readable(node: Any, name: str) -> bool:
    """Whether a saved tensor can be read without the hooks of a checkpoint or an offload, which count."""
    saved = getattr(node, f"_raw_saved_{name}", None)
    return getattr(saved, "unpack_hook", saved) is None
