"""Backward passes: one per loss into rows, or one of the weighted losses into `.grad`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from agsurgery.agreement import Agreement
from agsurgery.blocks import Blocks
from agsurgery.graph import (
    Reach,
    Root,
    Split,
    children,
    entry,
    explained,
    gradients,
    is_reentrant,
    meeting_nodes,
    through,
)
from agsurgery.outbox import Outbox


@dataclass(frozen=True)
class Step:
    """What one call works on: the losses with where their backward passes start, and what these reach.

    Attributes:
        tasks: K names.
        losses: K scalars.
        roots: see `walk`.
        parameters: those that may get a gradient; None for all leaves.
        reach: see `walk`.
        parts: the reached parameters.
        named: whether the user named the shared parameters.
        hidden: whether parameters lie behind what the walk could not see through.
        blocks: see `Partition`.
        retain_graph: whether the graphs stay for another pass.
        loss_scale: of a `GradScaler`, 0-d; None for 1.
        outbox: takes the gradients of passes that go to `.grad`, to be averaged over the processes; None: they go
            there straight away.
        agreement: what holds in all processes together; None if there is one.
    """

    tasks: tuple[str, ...]
    losses: list[Tensor]
    roots: list[Root | None]
    parameters: Sequence[Tensor] | None
    reach: Reach
    parts: Split
    named: bool
    hidden: bool
    blocks: Blocks | None
    retain_graph: bool
    loss_scale: Tensor | None
    outbox: Outbox | None = None
    agreement: Agreement | None = None

    def start(self, loss: Tensor) -> Tensor:
        """Gradient of the scaled loss with respect to the loss."""
        return torch.ones_like(loss) if self.loss_scale is None else self.loss_scale.to(loss)

    @property
    def active(self) -> list[str]:
        """The tasks that have a gradient, here or in another process."""
        has = [root is not None for root in self.roots]
        if self.agreement is not None:
            has = self.agreement.active
        return [task for task, there in zip(self.tasks, has, strict=True) if there]

    @property
    def device(self) -> torch.device:
        """Device of the first loss."""
        return self.losses[0].device

    def leaves(self) -> list[Tensor]:
        """All parameters that some loss reaches, each once."""
        return list({id(leaf): leaf for reached in self.reach.leaves for leaf in reached}.values())


Own = list[dict[Tensor, Tensor]]
"""For each loss, the gradients of the parameters that are its own."""


class Target(Protocol):
    """Where rows go: into `Rows`, or to a `Collector` that waits for more."""

    def lay_out(self, shared: Sequence[Tensor], tasks: int, blocks: Blocks | None) -> None:
        """See `Rows.lay_out`."""

    def arriving(
        self, task: int, leaves: Sequence[Tensor]
    ) -> AbstractContextManager[Collection[int]]:
        """See `Rows.arriving`."""

    def write(
        self,
        task: int,
        leaves: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        arrived: Collection[int] = (),
    ) -> dict[Tensor, Tensor]:
        """See `Rows.write`."""


def rows_by_task(step: Step, rows: Target, *, retain_last: bool = False) -> Own:
    """One backward pass for each loss, its gradients written to its row; returns the own ones.

    Args:
        step: the losses.
        rows: where to write.
        retain_last: whether the graphs are needed once more.
    """
    rows.lay_out(step.parts.shared, len(step.tasks), step.blocks)
    retain = step.retain_graph or retain_last
    own: Own = []
    for task, (loss, root) in enumerate(zip(step.losses, step.roots, strict=True)):
        leaves = step.reach.leaves[task]
        if root is None:
            own.append(rows.write(task, (), ()))
            continue
        keep = retain or step.reach.retain[task]
        with rows.arriving(task, leaves) as arrived:
            found = gradients([root], leaves, [step.start(loss)], keep)
        own.append(rows.write(task, leaves, found, arrived))
    return own


def weighted_backward(step: Step, weights: Tensor, *, own: bool) -> None:
    """One ordinary backward pass of the weighted losses, into `.grad`, with all its hooks.

    Args:
        step: the losses.
        weights: `(K,)`.
        own: the parameters of a single loss get its gradient without the weight. Gradients are weighted where they
            enter what losses share, by hooks on the graph that live as long as this pass.

    Raises:
        RuntimeError: own gradients are asked for and a reentrant checkpoint hides which ones these are.
    """
    box = step.outbox
    limited = box is not None or bool(step.reach.others)
    inputs = step.leaves() if limited and not step.hidden else None
    active = [(i, root) for i, root in enumerate(step.roots) if root is not None]
    roots = [root for _, root in active]
    plain = [step.start(step.losses[i]) for i, _ in active]
    factors = [weights.select(0, i) for i, _ in active]
    weighted = [f.to(start) * start for f, start in zip(factors, plain, strict=True)]
    if not own:
        _backward(roots, weighted, step.retain_graph, inputs, box)
        return
    if step.named:
        shared = {id(p) for p in step.parts.shared}
        rest = [leaf for leaf in step.leaves() if id(leaf) not in shared]
        if rest:
            _backward(roots, plain, step.retain_graph or bool(shared), rest, box)
        if shared:
            mine = [leaf for leaf in step.leaves() if id(leaf) in shared]
            _backward(roots, weighted, step.retain_graph, mine, box)
        return
    common = meeting_nodes(roots)
    handles: list[Any] = []
    starts = []
    for root, factor, start, scaled in zip(roots, factors, plain, weighted, strict=True):
        first = entry(root).node
        starts.append(scaled if first in common else start)
        handles += _weigh_below(first, common, factor)
    try:
        _backward(roots, starts, step.retain_graph, inputs, box)
    finally:
        for handle in handles:
            handle.remove()


def _weigh_below(first: Node, common: Collection[Node], factor: Tensor) -> list[Any]:
    """Multiply what a loss sends into the common nodes; returns the handles of the hooks."""
    handles = []
    seen: set[Node] = set()
    stack = [] if first in common else [first]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if is_reentrant(node):
            raise RuntimeError(
                "A reentrant checkpoint that only one loss passes through hides which parameters are its own. Pass "
                '`heads="weighted"`, or call `torch.utils.checkpoint.checkpoint(..., use_reentrant=False)`.'
            )
        stack += [child for child in children(node) if child not in common]
        below = [through(*edge)[0] for edge in node.next_functions]
        entries = {i for i, child in enumerate(below) if child in common}
        if entries:
            handles.append(node.register_hook(_multiplier(entries, factor)))
    return handles


def _multiplier(entries: set[int], factor: Tensor) -> Callable[..., tuple[Tensor | None, ...]]:
    def multiply(
        inputs: tuple[Tensor | None, ...], outputs: tuple[Tensor | None, ...]
    ) -> tuple[Tensor | None, ...]:
        return tuple(
            g * factor.to(g.device, g.real.dtype) if g is not None and i in entries else g
            for i, g in enumerate(inputs)
        )

    return multiply


def _backward(
    roots: Sequence[GradientEdge],
    starts: Sequence[Tensor],
    retain_graph: bool,
    inputs: Sequence[Tensor] | None,
    outbox: Outbox | None,
) -> None:
    if outbox is not None and inputs is not None:
        values = gradients(roots, inputs, starts, retain_graph)
        found = zip(inputs, values, strict=True)
        outbox.add({leaf: value for leaf, value in found if value is not None})
        return
    with explained():
        torch.autograd.backward(list(roots), list(starts), retain_graph=retain_graph, inputs=inputs)


def backward_through(
    edges: Sequence[GradientEdge],
    starts: Sequence[Tensor],
    leaves: Sequence[Tensor],
    retain_graph: bool,
    outbox: Outbox | None = None,
) -> None:
    """One backward pass from some edges into the `.grad` of some leaves, or into `outbox`."""
    if edges and leaves:
        _backward(edges, starts, retain_graph, leaves, outbox)
