"""What each loss reaches in the autograd graph, found before any backward pass."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

Root: TypeAlias = GradientEdge
"""Where the backward pass of one loss starts."""


@dataclass(frozen=True)
class Reach:
    """What a walk over the autograd graph of K losses found.

    Attributes:
        leaves: for each loss, the leaf tensors that it reaches, in the order of the walk's parameter list.
        retain: for each loss, whether a later loss needs part of its graph.
        others: leaves reached that were not in the list asked about.
        reentrant: whether a reentrant checkpoint lies on the way, which `torch.autograd.grad` cannot see through.
        border: for each loss, where it enters the nodes at which the walk was told to stop.
    """

    leaves: list[list[Tensor]]
    retain: list[bool]
    others: list[Tensor]
    reentrant: bool
    border: list[list[GradientEdge]]


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


def children(node: Node) -> list[Node]:
    """Nodes that receive a gradient from `node`."""
    return [child for child, _ in node.next_functions if child is not None]


def leaf_of(node: Node) -> Tensor | None:
    """The leaf into which `node` accumulates; None for a node that computes something."""
    return None if node.next_functions else getattr(node, "variable", None)


def is_reentrant(node: Node) -> bool:
    """Whether a reentrant checkpoint hides behind this node."""
    return type(node).__name__ == "CheckpointFunctionBackward"


def walk(
    roots: Sequence[Root | None],
    parameters: Sequence[Tensor] | None,
    stop: Collection[Node] = frozenset(),
) -> Reach:
    """Find the leaves that each root reaches, visiting every node of the joint graph once.

    Args:
        roots: one per loss; None for a constant.
        parameters: leaves asked about, without duplicates; None asks about all leaves.
        stop: nodes not to walk through.

    Returns:
        A `Reach`. Losses are taken to be differentiated in their order, down to the nodes where the walk stopped.
    """
    found: list[Tensor] = list(parameters or ())
    position = {id(leaf): i for i, leaf in enumerate(found)}
    others: dict[int, Tensor] = {}
    gates: dict[tuple[Node, int], int] = {}  # edges into `stop`, and their bits in `gate_masks`
    reached: dict[Node, int] = {}  # the leaves below a node, as a bit mask over `found`
    entered: dict[Node, int] = {}  # the gates below a node, likewise; only kept where there are any
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

    def gate_mask(node: Node, number: int) -> int:
        return 1 << gates.setdefault((node, number), len(gates))

    for loss, root in enumerate(roots):
        stack = [] if root is None or root.node in stop else [(root.node, children(root.node))]
        while stack:
            node, below = stack[-1]
            fresh = [child for child in below if child not in reached and child not in stop]
            if fresh and node not in reached:
                stack += [(child, children(child)) for child in fresh]
                continue
            stack.pop()
            if node in reached:
                meet(node, loss)
                continue
            leaf = None if below else leaf_of(node)
            if leaf is not None:
                reached[node] = leaf_mask(leaf)
                continue
            mask = gate = 0
            for child in below:
                if child not in stop:
                    meet(child, loss)
                    mask |= reached[child]
                    gate |= entered.get(child, 0)
            if stop:
                for entered_node, number in node.next_functions:
                    if entered_node is not None and entered_node in stop:
                        gate |= gate_mask(entered_node, number)
            if gate:
                entered[node] = gate
            reached[node], owner[node] = mask, loss
            reentrant |= is_reentrant(node)

    masks, gate_masks = [], []
    for root in roots:
        inside = root is not None and root.node not in stop
        masks.append(reached[root.node] if root is not None and inside else 0)
        if root is not None and not inside:
            gate_masks.append(gate_mask(root.node, root.output_nr))
        else:
            gate_masks.append(0 if root is None else entered.get(root.node, 0))
    return Reach(
        leaves=[[leaf for i, leaf in enumerate(found) if mask >> i & 1] for mask in masks],
        retain=[label in group[i + 1 :] for i, label in enumerate(group)],
        others=list(others.values()),
        reentrant=reentrant,
        border=[
            [GradientEdge(*edge) for edge, i in gates.items() if mask >> i & 1]
            for mask in gate_masks
        ],
    )


def descendants(roots: Sequence[Root]) -> Iterator[Node]:
    """All nodes below some roots, these included, each once."""
    seen: set[Node] = set()
    stack = [root.node for root in roots]
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            yield node
            stack += children(node)


def any_above_another(nodes: Collection[Node]) -> bool:
    """Whether one of some nodes lies below another."""
    wanted = set(nodes)
    if len(wanted) < 2:
        return False
    seen: set[Node] = set()
    stack = [child for node in wanted for child in children(node)]
    while stack:
        node = stack.pop()
        if node in wanted:
            return True
        if node not in seen:
            seen.add(node)
            stack += children(node)
    return False


def meeting_nodes(roots: Sequence[Root | None]) -> set[Node]:
    """Nodes that two losses or more pass through, leaves included.

    All that lies below such a node is in the set too, so every path from a loss to a shared leaf enters it
    exactly once.
    """
    owner: dict[Node, int] = {}
    common: set[Node] = set()
    for loss, root in enumerate(roots):
        stack = [] if root is None else [root.node]
        while stack:
            node = stack.pop()
            if node in common:
                continue
            if owner.setdefault(node, loss) != loss:
                common |= _unmarked(node, common)
                continue
            stack += [child for child in children(node) if owner.get(child) != loss]
    return common


def _unmarked(node: Node, marked: Collection[Node]) -> set[Node]:
    """Nodes below `node`, itself included, that are not marked; below a marked node all are."""
    seen = {node}
    stack = [node]
    while stack:
        for child in children(stack.pop()):
            if child not in seen and child not in marked:
                seen.add(child)
                stack.append(child)
    return seen


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


def gradients(
    roots: Sequence[GradientEdge],
    inputs: Sequence[Tensor | GradientEdge],
    starts: Sequence[Tensor],
    retain_graph: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of `inputs`, None for those not reached, of the roots with the gradients they start from.

    Raises:
        RuntimeError: a compiled model was compiled for one backward pass only.
    """
    if not inputs:
        return ()
    with explained():
        targets: Any = list(inputs)  # the stubs know lists of one kind only
        found: tuple[Tensor | None, ...] = torch.autograd.grad(
            list(roots), targets, list(starts), retain_graph=retain_graph, allow_unused=True
        )
        return found


@contextmanager
def explained() -> Iterator[None]:
    """Say what to do where an error of autograd does not."""
    try:
        yield
    except RuntimeError as error:
        if "donated buffer" not in str(error):
            raise
        raise RuntimeError(
            "Several backward passes through a compiled model need its graph kept, but it was compiled for a "
            "single one. Set `torch._functorch.config.donated_buffer = False` before compiling."
        ) from error
