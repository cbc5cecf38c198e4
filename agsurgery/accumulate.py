"""Per-task gradients by `.backward()`: for what `torch.autograd.grad` cannot see, and for frameworks that call it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from agsurgery.blocks import Blocks
from agsurgery.graph import explained
from agsurgery.jacobian import Rows
from agsurgery.passes import Own, Step
from agsurgery.sharding import Resharding, any_sharded


class Collector:
    """Takes what a plain `.backward()` leaves in `.grad`, task by task.

    A parameter that two tasks or more left a gradient in is shared. Which ones these are is known when all tasks have
    come; until then their gradients wait here, in the memory that autograd gave them.
    """

    def __init__(self) -> None:
        self.tasks: list[str] = []
        self._waiting: list[dict[Tensor, Tensor]] = []

    @contextmanager
    def taking(self, task: str, parameters: Sequence[Tensor]) -> Iterator[None]:
        """While open, `.grad` of `parameters` is empty; what is there at the end belongs to `task`.

        A task that comes again adds to what it has (micro-batches). On an error nothing is taken.
        """
        with _put_aside(parameters):
            yield
            self._add(task, {p: p.grad for p in parameters if p.grad is not None})

    def _add(self, task: str, taken: dict[Tensor, Tensor]) -> None:
        if task not in self.tasks:
            self.tasks.append(task)
            self._waiting.append(taken)
            return
        held = self._waiting[self.tasks.index(task)]
        for parameter, gradient in taken.items():
            held[parameter] = held[parameter] + gradient if parameter in held else gradient

    def reached(self) -> list[list[Tensor]]:
        """For each task, the parameters that it has a gradient for."""
        return [list(held) for held in self._waiting]

    def write(self, rows: Rows, common: Sequence[Tensor], blocks: Blocks | None) -> Own:
        """Write all rows, and forget them here; returns the gradients that are a task's own.

        Args:
            rows: where to write.
            common: the shared parameters.
            blocks: see `Partition`.
        """
        waiting = self.take()
        rows.lay_out(common, len(waiting), blocks)
        own: Own = []
        for task, held in enumerate(waiting):
            own.append(rows.write(task, list(held), list(held.values())))
            held.clear()  # one task's gradients less beside the rows
        return own

    def take(self) -> list[dict[Tensor, Tensor]]:
        """The gradients of each task, which are forgotten here."""
        waiting = self._waiting
        self.clear()
        return waiting

    def clear(self) -> None:
        """Forget everything."""
        self.tasks, self._waiting = [], []


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
