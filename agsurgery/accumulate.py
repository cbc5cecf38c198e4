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
from agsurgery.sharding import any_sharded


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

    def write(self, rows: Rows, shared: set[int] | None, blocks: Blocks | None) -> Own:
        """Write all rows, and forget them here; returns the gradients that are a task's own.

        Args:
            rows: where to write.
            shared: ids of the parameters to treat as shared; None: those that two tasks or more have.
            blocks: see `Partition`.
        """
        count: dict[int, int] = {}
        order: dict[int, Tensor] = {}
        for held in self._waiting:
            for parameter in held:
                count[id(parameter)] = count.get(id(parameter), 0) + 1
                order[id(parameter)] = parameter
        common = [
            parameter
            for key, parameter in order.items()
            if (count[key] > 1 if shared is None else key in shared)
        ]
        rows.lay_out(common, len(self.tasks), blocks)
        own: Own = []
        for task, held in enumerate(self._waiting):
            own.append(rows.write(task, list(held), list(held.values())))
            held.clear()  # one task's gradients less beside the rows
        self.clear()
        return own

    def clear(self) -> None:
        """Forget everything."""
        self.tasks, self._waiting = [], []


def collect(step: Step, parameters: Sequence[Tensor], *, retain_last: bool = False) -> Collector:
    """Call `.backward()` on each loss.

    Raises:
        ValueError: a loss with a graph left no gradient in any parameter.
    """
    collector = Collector()
    # The user's own leaves, such as inputs, keep what they have.
    # (Under FSDP2 the leaves of the graph are its own.)
    others = [] if any_sharded(parameters) else step.reach.others
    with _put_aside(others):
        for task, (name, loss, root) in enumerate(
            zip(step.tasks, step.losses, step.roots, strict=True)
        ):
            with collector.taking(name, parameters):
                if root is None:
                    continue
                keep = step.retain_graph or retain_last or step.reach.retain[task]
                with explained(), torch.enable_grad():
                    torch.autograd.backward([root], [step.start(loss)], retain_graph=keep)
                if all(parameter.grad is None for parameter in parameters):
                    raise ValueError(
                        f"The loss of task {name!r} must reach at least one of the parameters. It has a graph, but "
                        "left no gradient. Give the optimizer the parameters of this model."
                    )
    return collector


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
