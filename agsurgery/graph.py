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
        leaves: for each loss, the leaf tensors that it reaches; first those that every loss reaches.
        found: all leaves asked about.
        masks: for each loss, `leaves` as a bit mask over `found`.
        retain: for each loss, whether a later loss needs part of its graph.
        others: leaves reached that were not in the list asked about.
        reentrant: whether a reentrant checkpoint lies on the way, which `torch.autograd.grad` cannot see through.
        border: for each loss, where it enters the nodes at which the walk was told to stop.
    """

    leaves: list[list[Tensor]]
    found: list[Tensor]
    masks: list[int]
    retain: list[bool]
    others: list[Tensor]
    reentrant: bool
    border: list[list[GradientEdge]]


def gradient_root(loss: Tensor) -> Root | None:
    """Edge of the graph that computed `loss`, or None for a constant."""
    return get_gradient_edge(loss) if loss.requires_grad else None


def entry(edge: GradientEdge) -> GradientEdge:
    """The edge for which to look at the graph, where `edge` is the one to differentiate."""
    node, number = through(edge.node, edge.output_nr)
    return edge if node is None or node is edge.node else GradientEdge(node, number)


def through(node: Node | None, number: int) -> tuple[Node | None, int]:
    """The edge behind one that enters the node through which `DistributedDataParallel` passes all its outputs.

    With `find_unused_parameters=True` every loss would seem to reach whatever any output of the model reaches.

    Raises:
        RuntimeError: the model is under `static_graph=True`.
    """
    while node is not None and type(node).__name__ == "_DDPSinkBackward":
        sink: Any = node
        if sink.ddp_weakref().static_graph:
            raise RuntimeError(
                "`DistributedDataParallel` must not have `static_graph=True`: it learns from the first backward pass "
                "which parameters are used, and would see the pass of one loss only. Leave it out."
            )
        if len(sink._input_metadata) != len(node.next_functions):
            break  # some outputs are no tensors: which input belongs to which output is unknown
        node, number = node.next_functions[number]
    return node, number


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
    edges = node.next_functions
    if _in_group():
        edges = tuple(through(*edge) for edge in edges)
    return [child for child, _ in edges if child is not None]


def _in_group() -> bool:
    """Whether the model may be under `DistributedDataParallel`: to look costs time."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


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
    roots = [None if root is None else entry(root) for root in roots]
    search = _Search(parameters, stop, len(roots))
    masks: list[int] = []
    gate_masks: list[int] = []
    for loss, root in enumerate(roots):
        if root is None:
            masks.append(0)
            gate_masks.append(0)
        elif root.node in stop:
            masks.append(0)
            gate_masks.append(search.gate(root.node, root.output_nr))
        else:
            search.visit(loss, root.node)
            masks.append(search.reached[root.node])
            gate_masks.append(search.entered.get(root.node, 0))
    group, gates = search.group, list(search.gates)
    return Reach(
        leaves=_members(search.found, masks),
        found=search.found,
        masks=masks,
        retain=[label in group[i + 1 :] for i, label in enumerate(group)],
        others=list(search.others.values()),
        reentrant=search.reentrant,
        border=[[GradientEdge(*gates[i]) for i in _bits(mask)] for mask in gate_masks],
    )


class _Search:
    """The depth-first search of `walk`, which runs in every step: its loop is written for speed.

    Attributes:
        found: leaves asked about; bit i of a mask of leaves stands for the i-th.
        others: leaves reached that were not asked about.
        reached: for each node done, the leaves below.
        owner: for each node that may hold saved tensors, the first loss that came by.
        group: for each loss a label; equal ones for losses joined by common nodes.
        gates: edges into `stop`; bit i of a mask of gates stands for the i-th.
        entered: for each node done, the gates below, where there are any.
    """

    def __init__(
        self, parameters: Sequence[Tensor] | None, stop: Collection[Node], losses: int
    ) -> None:
        self.found = list(parameters or ())
        self.others: dict[int, Tensor] = {}
        self.reached: dict[Node, int] = {}
        self.owner: dict[Node, int] = {}
        self.group = list(range(losses))
        self.gates: dict[tuple[Node, int], int] = {}
        self.entered: dict[Node, int] = {}
        self.reentrant = False
        self._every_leaf = parameters is None
        self._position = {id(leaf): i for i, leaf in enumerate(self.found)}
        self._stop = stop
        self._wrapped = _in_group()

    def visit(self, loss: int, root: Node) -> None:
        """Find what lies below the root of a loss."""
        reached, owner, stop = self.reached, self.owner, self._stop
        below: dict[Node, list[Node]] = {}  # children of the nodes met for the first time
        stack = [root]
        while stack:
            node = stack.pop()
            if node in reached:
                continue
            if node not in below:
                edges = node.next_functions
                leaf = None if edges else leaf_of(node)
                if leaf is not None:
                    reached[node] = self._bit(leaf)
                    continue
                if self._wrapped:
                    edges = tuple(through(*edge) for edge in edges)
                below[node] = [child for child, _ in edges if child is not None]
                if stop:
                    below[node] = [child for child in below[node] if child not in stop]
                stack.append(node)  # to be done when all below is
                stack += below[node]
                continue
            mask = 0
            for child in below[node]:
                mask |= reached[child]
                if owner.get(child, loss) != loss:
                    self._join(owner[child], loss)
            reached[node], owner[node] = mask, loss
            if is_reentrant(node):
                self.reentrant = True
            if stop:
                self._enter(node, below[node])
        if owner.get(root, loss) != loss:
            self._join(owner[root], loss)

    def gate(self, node: Node, number: int) -> int:
        """Bit of an edge into `stop`."""
        return 1 << self.gates.setdefault((node, number), len(self.gates))

    def _enter(self, node: Node, below: Sequence[Node]) -> None:
        mask = 0
        for child in below:
            mask |= self.entered.get(child, 0)
        for entered, number in (through(*edge) for edge in node.next_functions):
            if entered is not None and entered in self._stop:
                mask |= self.gate(entered, number)
        if mask:
            self.entered[node] = mask

    def _join(self, first: int, second: int) -> None:
        old, new = self.group[first], self.group[second]
        if old != new:
            self.group = [new if label == old else label for label in self.group]

    def _bit(self, leaf: Tensor) -> int:
        position = self._position.get(id(leaf))
        if position is None:
            if not self._every_leaf:
                self.others[id(leaf)] = leaf
                return 0
            position = self._position[id(leaf)] = len(self.found)
            self.found.append(leaf)
        return 1 << position


def _bits(mask: int) -> Iterator[int]:
    """Places of the bits that are set."""
    while mask:
        lowest = mask & -mask
        yield lowest.bit_length() - 1
        mask ^= lowest


def _members(leaves: Sequence[Tensor], masks: Sequence[int]) -> list[list[Tensor]]:
    """For each mask the leaves in it; those in all masks come first, and are listed once."""
    common = -1
    for mask in masks:
        common &= mask or -1  # a constant loss reaches nothing, and says nothing
    common = max(common, 0)
    base = [leaves[i] for i in _bits(common)]
    return [base + [leaves[i] for i in _bits(mask & ~common)] if mask else [] for mask in masks]


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
        stack = [] if root is None else [entry(root).node]
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


def split(reach: Reach, named: set[int] | None) -> Split:
    """Divide the reached leaves into shared ones and each loss's own.

    Args:
        reach: see `walk`.
        named: ids of the parameters to treat as shared; None: those that two losses or more reach. A parameter
            that is not named although several losses reach it is own to each of them, and gets the plain sum.
    """
    once = twice = 0
    for mask in reach.masks:
        twice |= once & mask
        once |= mask
    if named is not None:
        chosen = [1 << i for i in _bits(once) if id(reach.found[i]) in named]
        twice = sum(chosen)
    shared, *own = _members(reach.found, [twice, *(mask & ~twice for mask in reach.masks)])
    return Split(shared, own)


def shared_among(leaves: Sequence[Sequence[Tensor]], named: set[int] | None) -> list[Tensor]:
    """The parameters in two lists or more; or those in any list that are named, by their ids."""
    count: dict[int, int] = {}
    order: dict[int, Tensor] = {}
    for reached in leaves:
        for leaf in reached:
            count[id(leaf)] = count.get(id(leaf), 0) + 1
            order[id(leaf)] = leaf
    return [
        leaf for key, leaf in order.items() if (count[key] > 1 if named is None else key in named)
    ]


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


_REDUCER = (
    "mark a variable ready only once",
    "undefined, but still allreduced",
    "training graph has changed",
)
"""What `DistributedDataParallel` says to a second backward pass."""


@contextmanager
def explained() -> Iterator[None]:
    """Say what to do where an error of autograd does not."""
    try:
        yield
    except RuntimeError as error:
        if any(part in str(error) for part in _REDUCER):
            raise RuntimeError(
                "`DistributedDataParallel` averages the gradients of one backward pass, and there is one for each "
                "task. Run forward pass and `backward` inside `with model.no_sync():` and pass `process_group=`, which "
                'averages in its place; or use `engine="grad"`, which `DistributedDataParallel` does not notice.'
            ) from error
        if "donated buffer" not in str(error):
            raise
        raise RuntimeError(
            "Several backward passes through a compiled model need its graph kept, but it was compiled for a "
            "single one. Set `torch._functorch.config.donated_buffer = False` before compiling."
        ) from error
