"""Two stages: each loss down to a border in the graph, then what all losses share below it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from agsurgery import kernels
from agsurgery.checks import check_features
from agsurgery.distributed import Shifted
from agsurgery.graph import any_above_another, entry, gradients, leaf_of, meeting_nodes, walk
from agsurgery.jacobian import Rows
from agsurgery.lean import NotBatchable, trunk_gramian, warn_not_batchable
from agsurgery.methods._base import RowMethod
from agsurgery.passes import Own, Step, Target, backward_through, rows_by_task

Weigh = Callable[[Tensor], Tensor]
"""From a Gramian to the weights."""


@dataclass(frozen=True)
class Heads:
    """Gradients of the part of the graph above some nodes, the border.

    Attributes:
        gradients: for each loss, by leaf.
        edges: where losses enter the border.
        below: for each edge, the leaves below.
        cotangents: for each loss, the gradients with respect to what comes out of `edges`, by position.
    """

    gradients: list[dict[Tensor, Tensor]]
    edges: list[GradientEdge]
    below: list[list[Tensor]]
    cotangents: list[dict[int, Tensor]]

    def trunk(self) -> list[Tensor]:
        """The leaves below the border, each once."""
        return list({id(p): p for leaves in self.below for p in leaves}.values())

    def stacked(self) -> list[Tensor]:
        """`(K, ...)` cotangents for each edge; zero for the losses that do not come by. The single ones are freed."""
        batches = []
        for edge in range(len(self.edges)):
            known = [cotangents.pop(edge, None) for cotangents in self.cotangents]
            blank = torch.zeros_like(next(c for c in known if c is not None))
            batches.append(torch.stack([blank if c is None else c for c in known]))
        return batches


def head_pass(step: Step, border: Collection[Node]) -> Heads:
    """Differentiate each loss down to the border. That part of the graph is freed as the losses are done."""
    reach = walk(step.roots, step.parameters, border)
    number: dict[GradientEdge, int] = {}
    for edge in (edge for edges in reach.border for edge in edges):
        number.setdefault(edge, len(number))
    below = walk(list(number), step.parameters).leaves

    @functools.cache
    def nested(entries: frozenset[int]) -> bool:
        return any_above_another([edge.node for edge, i in number.items() if i in entries])

    found: list[dict[Tensor, Tensor]] = []
    cotangents: list[dict[int, Tensor]] = []
    for task, (loss, root) in enumerate(zip(step.losses, step.roots, strict=True)):
        leaves, edges = reach.leaves[task], reach.border[task]
        found.append({})
        cotangents.append({})
        if root is None:
            continue
        start = step.start(loss)
        if entry(root).node in border:  # the loss itself is shared
            cotangents[task][number[entry(root)]] = start
            continue
        # Asked for what also lies below the border, autograd would go on through the border.
        entries = frozenset(number[edge] for edge in edges)
        deep = {id(leaf) for entry in entries for leaf in below[entry]}
        through = any(id(leaf) in deep for leaf in leaves) or nested(entries)
        keep = step.retain_graph or reach.retain[task] or through
        with _closed(edges) if through else nullcontext():
            values = gradients([root], [*leaves, *edges], [start], keep)
        for leaf, value in zip(leaves, values, strict=False):
            if value is not None:
                found[task][leaf] = value
        for edge, value in zip(edges, values[len(leaves) :], strict=True):
            if value is not None:
                cotangents[task][number[edge]] = value
    return Heads(found, list(number), below, cotangents)


@contextmanager
def _closed(border: Sequence[GradientEdge]) -> Iterator[None]:
    """While open, gradients come to the border and end there."""

    def nothing(gradients: tuple[Tensor | None, ...]) -> tuple[None, ...]:
        return (None,) * len(gradients)

    nodes: Any = {edge.node for edge in border}
    handles = [node.register_prehook(nothing) for node in nodes]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def rows_through(
    step: Step, rows: Target, border: Collection[Node], *, retain_last: bool = False
) -> Own:
    """The same as `rows_by_task`, in two stages: the heads, then K passes through what lies below the border."""
    step = replace(step, retain_graph=step.retain_graph or retain_last)
    rows.lay_out(step.parts.shared, len(step.tasks), step.blocks)
    heads = head_pass(step, border)
    if step.outbox is None:  # another process may have the tasks that pass there
        check_features(bool(heads.edges))
    later = [bool(cotangents) for cotangents in heads.cotangents]
    own: Own = []
    for task, cotangents in enumerate(heads.cotangents):
        found = heads.gradients[task]
        later[task] = False
        arrived: Collection[int] = ()
        if cotangents:
            leaves = list({id(p): p for edge in cotangents for p in heads.below[edge]}.values())
            edges = [heads.edges[edge] for edge in cotangents]
            keep = step.retain_graph or any(later)
            whole = [
                leaf for leaf in leaves if leaf not in found
            ]  # not a part of the gradient only
            with rows.arriving(task, whole) as arrived:
                values = gradients(edges, leaves, list(cotangents.values()), keep)
            for leaf, value in zip(leaves, values, strict=True):
                if value is not None:
                    found[leaf] = found[leaf] + value if leaf in found else value
        cotangents.clear()
        own.append(rows.write(task, list(found), list(found.values()), arrived))
        found.clear()
    return own


def lean_surgery(step: Step, rows: Rows, weigh: Weigh, *, weighted_heads: bool) -> Own:
    """Surgery without the rows of the trunk; returns the gradients of the parameters above it that are a loss's own.

    Args:
        step: the losses.
        rows: for the shared parameters that losses also reach apart from each other; these need their rows.
        weigh: from Gramian to weights.
        weighted_heads: whether parameters that are not shared get weighted gradients too.
    """
    border = {node for node in meeting_nodes(step.roots) if leaf_of(node) is None}
    if not border:  # disjoint graphs share nothing but leaves
        own = rows_by_task(step, rows)
        rows.deliver(weigh(rows.gramian(len(step.tasks), step.device)))
        return own
    heads = head_pass(step, border)
    shared = {id(p) for p in step.parts.shared}
    apart = {id(p) for found in heads.gradients for p in found}
    below = heads.trunk()
    spared = [p for p in below if id(p) in shared - apart]
    formed = [p for p in below if id(p) in shared & apart]
    cotangents = heads.stacked()
    gramian: Tensor | None = None
    try:
        gramian, batches = trunk_gramian(heads.edges, cotangents, spared, formed)
        wide = {id(p): b for p, b in zip(formed, batches, strict=True) if b is not None}
    except NotBatchable as error:
        spared, formed = [], [*spared, *formed]
        said = str(error)
    in_rows = apart | {id(p) for p in formed}
    rows.lay_out([p for p in step.parts.shared if id(p) in in_rows], len(step.tasks), None)
    own = []
    for task, found in enumerate(heads.gradients):
        part: Sequence[Tensor | None]
        if gramian is None:
            starts = [batch.select(0, task) for batch in cotangents]
            part = gradients(heads.edges, formed, starts, retain_graph=True)
        else:
            part = [wide[id(p)].select(0, task) if id(p) in wide else None for p in formed]
        for leaf, value in zip(formed, part, strict=True):
            if value is not None:
                found[leaf] = found[leaf] + value if leaf in found else value
        own.append(rows.write(task, list(found), list(found.values())))
        found.clear()
    if gramian is None:
        warn_not_batchable(said)
    product = rows.gramian(len(step.tasks), step.device)
    weights = weigh(product if gramian is None else gramian + product.to(gramian))
    rows.deliver(weights)
    rest = [p for p in below if id(p) not in shared]
    _through_trunk(step, heads.edges, cotangents, weights, spared, rest, weighted_heads)
    return own


def feature_surgery(
    step: Step,
    border: Collection[Node],
    weigh: Weigh,
    method: RowMethod | Shifted | None,
    *,
    weighted_heads: bool,
) -> Own:
    """Surgery on the gradients with respect to the features, and one pass of their combination through the trunk.

    Args:
        step: the losses.
        border: nodes that computed the features.
        weigh: from the Gramian of the gradients at the features to weights.
        method: a method without weights, which combines the coordinates of the features.
        weighted_heads: see `lean_surgery`.

    Returns:
        The gradients of the parameters above the features.

    Raises:
        ValueError: no loss passes through the features, or a shared parameter is reached around them.
    """
    heads = head_pass(step, border)
    if step.outbox is None:
        check_features(bool(heads.edges))
    shared = {id(p) for p in step.parts.shared}
    around = [p for found in heads.gradients for p in found if id(p) in shared]
    if around:
        raise ValueError(
            '`level="features"` weighs what passes through the features, so every shared parameter must lie below '
            f"them. One of shape {tuple(around[0].shape)} is reached around them; add the tensor through which it "
            'is to `features`, or use `level="parameters"`.'
        )
    below = heads.trunk()
    cotangents = heads.stacked()
    shape = (len(step.tasks), len(step.tasks))
    gramian = torch.zeros(shape, dtype=kernels.solver_dtype(step.device), device=step.device)
    for batch in cotangents:
        product = kernels.gramian(_real(batch).reshape(batch.shape[0], -1))
        gramian = gramian + product.to(gramian)
    weights = weigh(gramian)
    inside = [p for p in below if id(p) in shared]
    rest = [p for p in below if id(p) not in shared]
    if method is None:
        _through_trunk(step, heads.edges, cotangents, weights, inside, rest, weighted_heads)
        return heads.gradients
    method.begin(cotangents[0].device if cotangents else step.device)
    updates, start = [], 0
    for batch in cotangents:
        flat = _real(batch).reshape(batch.shape[0], -1)
        wide = flat.float() if flat.element_size() < 4 else flat
        update = method.combine(wide, start).to(flat.dtype).view(_real(batch[0]).shape)
        updates.append(torch.view_as_complex(update) if batch.is_complex() else update)
        start += flat.shape[1]
    backward_through(heads.edges, updates, inside, step.retain_graph or bool(rest), step.outbox)
    sums = [batch.sum(0) for batch in cotangents]
    backward_through(heads.edges, sums, rest, step.retain_graph, step.outbox)
    return heads.gradients


def _through_trunk(
    step: Step,
    edges: Sequence[GradientEdge],
    cotangents: Sequence[Tensor],
    weights: Tensor,
    shared: Sequence[Tensor],
    rest: Sequence[Tensor],
    weighted_rest: bool,
) -> None:
    """Weighted cotangents into the shared parameters; the plain sum into the rest, unless it is weighted too."""
    if weighted_rest:
        shared, rest = [*shared, *rest], []
    combined = [_combined(weights, batch) for batch in cotangents]
    box = step.outbox
    backward_through(edges, combined, shared, step.retain_graph or bool(rest), box)
    sums = [batch.sum(0) for batch in cotangents]
    backward_through(edges, sums, rest, step.retain_graph, box)


def _combined(weights: Tensor, batch: Tensor) -> Tensor:
    """Weighted sum over the first dimension, in float32 at least."""
    wide = torch.promote_types(batch.dtype, torch.float32)
    total: Tensor = torch.tensordot(weights.to(batch.device, wide), batch.to(wide), dims=1)
    return total.to(batch.dtype)


def _real(batch: Tensor) -> Tensor:
    return torch.view_as_real(batch.resolve_conj()) if batch.is_complex() else batch
