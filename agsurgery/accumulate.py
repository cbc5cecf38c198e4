"""Per-task gradients by `.backward()`: for what `torch.autograd.grad` cannot see, and for frameworks that call it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from agsurgery.blocks import Blocks
from agsurgery.graph import explained
from agsurgery.jacobian import Rows
from agsurgery.passes import Own, Step
from agsurgery.sharding import Resharding, any_sharded


class Collector:
    """Task gradients that wait to be combined: of one batch, or summed over several micro-batches.

    A parameter that two tasks or more have a gradient for is shared. Which ones these are is known when all tasks have
    come, and may change with every micro-batch.

    Attributes:
        tasks: names, in the order in which they came.
        losses: for each task, the sum of its losses; None where nobody saw them.
        pending: whether something came that no combination has seen.
        by_hand: whether it came through `taking`.
    """

    def __init__(self) -> None:
        self.tasks: list[str] = []
        self.losses: list[Tensor | None] = []
        self.pending = False
        self.by_hand = False
        self._waiting: list[dict[Tensor, Tensor]] = []
        # Gradients that lie in the rows already, by their ids: sums are made in place there.
        self._stored: set[int] = set()

    @contextmanager
    def taking(self, task: str, parameters: Sequence[Tensor]) -> Iterator[None]:
        """While open, `.grad` of `parameters` is empty; what is there at the end belongs to `task`.

        A task that comes again adds to what it has (micro-batches). On an error nothing is taken.
        """
        with _put_aside(parameters):
            yield
            self.add(task, {p: p.grad for p in parameters if p.grad is not None}, None)
            self.by_hand = True

    def add(self, task: str, gradients: Mapping[Tensor, Tensor], loss: Tensor | None) -> None:
        """Add to what a task has."""
        self.pending = True
        if task not in self.tasks:
            self.tasks.append(task)
            self.losses.append(loss)
            self._waiting.append(dict(gradients))
            return
        place = self.tasks.index(task)
        known = self.losses[place]
        self.losses[place] = None if known is None or loss is None else known + loss.to(known)
        held = self._waiting[place]
        for parameter, gradient in gradients.items():
            before = held.get(parameter)
            if before is None:
                held[parameter] = gradient
            elif id(before) in self._stored and gradient.layout == torch.strided:
                before.add_(gradient)
            else:  # autograd may hold this tensor elsewhere too
                held[parameter] = before + gradient

    def receive(self, other: Collector) -> None:
        """Add all that another one has."""
        for task, gradients, loss in zip(other.tasks, other._waiting, other.losses, strict=True):
            self.add(task, gradients, loss)

    def reached(self) -> list[list[Tensor]]:
        """For each task, the parameters that it has a gradient for."""
        return [list(held) for held in self._waiting]

    def write(
        self, rows: Rows, common: Sequence[Tensor], blocks: Blocks | None, *, keep: bool = False
    ) -> Own:
        """Write all rows; returns the gradients that are a task's own.

        Args:
            rows: where to write.
            common: the shared parameters.
            blocks: see `Partition`.
            keep: more is to be added later. The gradients of shared parameters are then held in the rows alone. Else
                everything is forgotten here.
        """
        rows.lay_out(common, len(self.tasks), blocks)
        own: Own = []
        self._stored = set()
        self.pending = self.by_hand = False
        for task, held in enumerate(self._waiting):
            own.append(rows.write(task, list(held), list(held.values())))
            if keep:
                # Views of rows laid out before stay valid: they hold on to that storage.
                # Rows that processes average in place are no longer this process's own.
                views = rows.stored(task) if rows.processes is None else {}
                held |= views
                self._stored |= {id(view) for view in views.values()}
            else:
                held.clear()  # one task's gradients less beside the rows
        if not keep:
            self.clear()
        return own

    def take(self) -> list[dict[Tensor, Tensor]]:
        """The gradients of each task, which are forgotten here."""
        waiting = self._waiting
        self.clear()
        return waiting

    def clear(self) -> None:
        """Forget everything."""
        self.tasks, self.losses, self._waiting, self._stored = [], [], [], set()
        self.pending = self.by_hand = False


def collect(
    step: Step,
    parameters: Sequence[Tensor],
    resharding: Resharding | None = None,
    *,
    retain_last: bool = False,
) -> Collector:
    """Call `.backward()` on each loss.

    Args:
        step: the losses.
        parameters: those that may get a gradient.
        resharding: saves FSDP2 to gather the parameters for each pass.
        retain_last: whether the graphs are needed once more.

    Raises:
        ValueError: a loss with a graph left no gradient in any parameter.
    """
    collector = Collector()
    # The user's own leaves, such as inputs, keep what they have.
    # (Under FSDP2 the leaves of the graph are its own.)
    others = [] if any_sharded(parameters) else step.reach.others
    last = max((task for task, root in enumerate(step.roots) if root is not None), default=0)
    with _put_aside(others), _freed(resharding):
        for task, (name, loss, root) in enumerate(
            zip(step.tasks, step.losses, step.roots, strict=True)
        ):
            with collector.taking(name, parameters):
                if root is None:
                    continue
                keep = step.retain_graph or retain_last or step.reach.retain[task]
                if resharding is not None:
                    resharding.free_after(task == last and not retain_last)
                with explained(), torch.enable_grad():
                    torch.autograd.backward([root], [step.start(loss)], retain_graph=keep)
                if all(parameter.grad is None for parameter in parameters):
                    raise ValueError(
                        f"The loss of task {name!r} must reach at least one of the parameters. It has a graph, but "
                        "left no gradient. Give the optimizer the parameters of this model."
                    )
            collector.losses[task] = loss.detach()
    return collector


@contextmanager
def _freed(resharding: Resharding | None) -> Iterator[None]:
    """At the end, also after an error, the next backward pass frees the parameters as ever."""
    try:
        yield
    finally:
        if resharding is not None:
            resharding.free_after(True)


@contextmanager
def _put_aside(leaves: Sequence[Tensor]) -> Iterator[None]:
    """While open, `.grad` of the leaves is empty; at the end it is what it was."""
    before = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    try:
        yield
    finally:
        for leaf, gradient in zip(leaves, before, strict=True):
            leaf.grad = gradient
