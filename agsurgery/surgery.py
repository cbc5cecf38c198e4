"""What a method makes of the rows of one step, for a whole batch and for micro-batches alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from agsurgery.accumulate import Collector
from agsurgery.agreement import Agreement, Council, council_for
from agsurgery.blocks import Partition
from agsurgery.checks import as_tensors, check_options
from agsurgery.graph import shared_among
from agsurgery.jacobian import Rows, deliver_own
from agsurgery.methods import Solution, Weighting, resolve, solve
from agsurgery.methods._base import RowMethod, uses
from agsurgery.options import Heads, Options
from agsurgery.passes import Own, Step
from agsurgery.reuse import Reuse
from agsurgery.run import Run
from agsurgery.together import agreed_on_gradients


class Surgery:
    """One method with its options, the rows it works on, and the processes it works in.

    Args:
        method: see `agsurgery.backward`.
        options: see `Options`.

    Attributes:
        kind: what the method looks at.
        heads: what a parameter of a single loss receives.
        shared: the parameters that the user named as shared; None if the graph tells.
        council: of the processes of this step; None where there is one.

    Raises:
        TypeError, ValueError: unknown method, or options that contradict each other or the method.
    """

    def __init__(self, method: str | Weighting, options: Options) -> None:
        self.options = options
        self.method = resolve(method)
        self.kind = uses(self.method)
        check_options(options, self.kind, self.method)
        default: Heads = "weighted" if self.kind == "losses" else "own"
        self.heads: Heads = options.heads or default
        self.shared = None if options.shared is None else as_tensors(options.shared, "shared")
        self.partition = Partition(options.granularity)
        self.reuse = Reuse(options.every)
        self.rows = Rows(options.buffer_dtype)
        self.council: Council | None = None

    def __getstate__(self) -> dict[str, Any]:
        # The storage belongs to these very parameters; a copy makes its own.
        return self.__dict__ | {"rows": Rows(self.options.buffer_dtype), "council": None}

    # -- what is shared, and by whom ------------------------------------------------------------------

    def named(self) -> set[int] | None:
        """Ids of the parameters that the user named as shared."""
        return None if self.shared is None else {id(p) for p in self.shared}

    def common(self, collector: Collector) -> list[Tensor]:
        """The parameters that the tasks seen so far share."""
        return shared_among(collector.reached(), self.named())

    @contextmanager
    def together(self, parameters: Sequence[Tensor] | None) -> Iterator[Council | None]:
        """One step of all processes; None where there is only this one."""
        council = council_for(self.council, self.options.replicas, parameters)
        self.council = council
        self.rows.processes = None if council is None else council.processes
        with nullcontext() if council is None else council.failing_together():
            yield council

    def agree_on_gradients(self, collector: Collector, council: Council) -> Agreement:
        """See `agreed_on_gradients`."""
        return agreed_on_gradients(council, collector, self.named(), self.choices(None))

    def choices(self, step: Step | None) -> tuple[object, ...]:
        """What must be equal in all processes, as text that is."""
        options, blocks = self.options, None if step is None else step.blocks
        return (
            type(self.method).__name__,
            options.engine,
            self.heads,
            None if options.replicas is None else options.replicas.exchange,
            str(options.buffer_dtype),
            None if blocks is None else blocks.names,
            None if self.shared is None else len(self.shared),
            self.reuse.age,
        )

    # -- from rows to `.grad` -------------------------------------------------------------------------

    def solve(self, run: Run, gramian: Tensor) -> Solution:
        """Ask the method for weights, and note both in `run`."""
        if self.council is not None:
            self.council.check_alike(gramian)
        run.gramian = gramian
        run.solution = solve(self.method, gramian, run.losses.to(gramian), run.tasks)
        return run.solution

    def no_weights(self, run: Run, gramian: Tensor) -> None:
        """Note that a method for single coordinates has no weights."""
        run.gramian = gramian
        blank = gramian.new_full((len(run.tasks),), torch.nan)
        run.solution = Solution(blank, gramian.new_ones(()))

    def combine_rows(self, run: Run) -> None:
        """Deliver the update of the stored rows."""
        tasks = len(run.tasks)
        gramian = self.rows.gramian(tasks, run.losses.device)
        if isinstance(self.method, RowMethod):
            self.no_weights(run, gramian)
            self.method.begin(self.rows.device or run.losses.device)
            self.rows.deliver_columns(self.method.combine, tasks)
        else:
            self.rows.deliver(self.solve(run, gramian).weights)

    def deliver_heads(self, own: Own, run: Run) -> None:
        """Deliver the gradients of parameters of a single loss."""
        assert run.solution is not None
        for task, gradients in enumerate(own):
            factor = None if self.heads == "own" else run.solution.weights.select(-1, task)
            if run.outbox is None:
                deliver_own(gradients, factor)
            else:
                run.outbox.add(gradients, factor)


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Autocast off: inside its region it would compute the Gramian, and parts of the backward pass, in 16 bits."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
