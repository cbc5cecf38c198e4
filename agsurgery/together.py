"""A step as all processes together see it: what is active, reached and shared in any of them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from torch.autograd.graph import Node

from agsurgery.accumulate import Collector
from agsurgery.agreement import Agreement, Council
from agsurgery.checks import check_features
from agsurgery.graph import walk
from agsurgery.outbox import Outbox
from agsurgery.passes import Step


def seen_together(
    step: Step,
    council: Council,
    *,
    shared: set[int] | None,
    border: Collection[Node] | None,
    collects: bool,
    ordinary: bool,
    choices: tuple[object, ...],
) -> Step:
    """Return the step with what holds in all processes, before any backward pass.

    Args:
        step: as this process alone sees it.
        council: of the processes.
        shared: ids of the parameters to treat as shared; None: those that two losses or more reach.
        border: nodes of the features; None without.
        collects: whether backward passes are to leave gradients in `.grad`, which are compared afterwards.
        ordinary: whether somebody else averages a backward pass.
        choices: what else must be equal.

    Raises:
        ValueError: the processes are about to do different things.
        RuntimeError: one of them failed, or no loss has a graph.
    """
    averaging = council.processes.averaging
    if averaging and border is not None and any(step.roots):
        # Told here, where the others can be told too.
        check_features(any(walk(step.roots, step.parameters, border).border))
    active = [root is not None for root in step.roots]
    # Whoever averages a backward pass of its own waits for all parameters in it.
    everywhere = active if ordinary or council.processes.sharded else None
    agreement = council.agree(
        "losses",
        step.tasks,
        active,
        [] if step.hidden else step.reach.leaves,
        shared,
        (choices, everywhere, border is None, collects, step.loss_scale is None),
        last=not (averaging and (collects or step.hidden)),
    )
    if not any(agreement.active):
        raise RuntimeError(
            "At least one loss must depend on a parameter in one of the processes. None of them has a graph."
        )
    step = replace(step, agreement=agreement)
    if not averaging:
        return step
    box = Outbox(council.processes)
    if step.hidden:
        return replace(step, outbox=box)
    here = {id(leaf) for leaves in step.reach.leaves for leaf in leaves}
    # Where the graph of this process does not tell what is shared, it is named.
    told = {id(p) for p in agreement.shared} & here == {id(p) for p in step.parts.shared}
    parts = agreement.split(step.reach.leaves)
    return replace(step, parts=parts, named=step.named or not told, outbox=box)


def agreed_on_gradients(
    council: Council, collector: Collector, shared: set[int] | None, choices: tuple[object, ...]
) -> Agreement:
    """Return what tasks have gradients for in any process, after their backward passes.

    Args:
        council: of the processes.
        collector: holds the gradients of this process.
        shared: see `seen_together`.
        choices: see `seen_together`.

    Raises:
        ValueError, RuntimeError: see `seen_together`.
    """
    reached = collector.reached()
    active = [bool(held) for held in reached]
    return council.agree("gradients", tuple(collector.tasks), active, reached, shared, choices)
