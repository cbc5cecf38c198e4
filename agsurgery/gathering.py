"""Task gradients that come in several calls: micro-batches, and tasks one by one."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from agsurgery.accumulate import Collector, collect
from agsurgery.agreement import Council
from agsurgery.blocks import Blocks
from agsurgery.checks import check_rows_kept
from agsurgery.options import Level
from agsurgery.outbox import Outbox
from agsurgery.passes import Step, rows_by_task
from agsurgery.report import SurgeryReport, detached_losses
from agsurgery.run import Run
from agsurgery.stages import rows_through
from agsurgery.standing import Standing
from agsurgery.surgery import Surgery, full_precision


class MicroBatches:
    """Gathers the gradients of each task, and combines all that have come.

    Args:
        surgery: what is done with them.
    """

    def __init__(self, surgery: Surgery) -> None:
        self._surgery = surgery
        self._collector = Collector()
        self._standing = Standing()

    def __getstate__(self) -> dict[str, Any]:
        # As for `.grad`: gradients are no part of a copy.
        return {
            "_surgery": self._surgery,
            "_collector": Collector(),
            "_standing": Standing(),
        }

    @property
    def pending(self) -> list[str]:
        """Names of the tasks whose gradients no combination has seen; empty if there is nothing new."""
        return self._collector.tasks if self._collector.pending else []

    def drop(self) -> None:
        """Forget task gradients of earlier calls; what is in `.grad` stays."""
        self._collector.clear()
        self._standing.clear()

    def forget_method(self) -> None:
        """The method's state was loaded since the last combination."""
        self._standing.forget_method()

    def _renew(self) -> None:
        """See whether earlier micro-batches still count."""
        if self._standing.dropped():
            self.drop()
        self._standing.check()

    @contextmanager
    def taking(self, task: str, parameters: Sequence[Tensor]) -> Iterator[None]:
        """Take the gradient of one task from a backward pass inside.

        Raises:
            RuntimeError: the method looks at losses, or the engine is to run backward passes itself.
        """
        surgery = self._surgery
        check_rows_kept(surgery.options, surgery.kind, surgery.method, "`task()`")
        self._renew()
        with self._collector.taking(task, parameters):
            yield

    def wanted(self, combine: bool, level: Level) -> bool:
        """Whether the task gradients of this call are kept for later ones, or join those of earlier ones.

        Args:
            combine: see `GradientSurgery.backward`.
            level: see `agsurgery.backward`.

        Raises:
            RuntimeError: tasks that came one by one wait, or nobody keeps the gradients of each task.
            ValueError: surgery at the features, which differ between micro-batches.
        """
        if self._collector.by_hand:
            raise RuntimeError(
                f"The gradients of the tasks {self._collector.tasks} wait to be combined. Call `combine()` first, or "
                "`zero_grad()` to drop them."
            )
        self._renew()
        surgery = self._surgery
        options = surgery.options
        if combine and options.accumulation == "gradients" and not self._collector.tasks:
            return False
        check_rows_kept(options, surgery.kind, surgery.method, "`combine=False`")
        if level == "features":
            raise ValueError(
                'Features differ from one micro-batch to the next, so `level="features"` allows neither '
                '`combine=False` nor `accumulation="tasks"`.'
            )
        return True

    def gather(self, step: Step, border: set[Node] | None, collected: bool, *, hold: bool) -> None:
        """Add the task gradients of one call to those of the calls before.

        Args:
            step: the losses.
            border: nodes of the features; None without.
            collected: whether the gradients come by `.backward()`.
            hold: whether more calls follow before they are combined.
        """
        collector, surgery = self._collector, self._surgery
        try:
            with torch.no_grad(), full_precision(step.device):
                target = _Intake(collector, step)
                if collected:
                    parameters = step.parameters or ()
                    collector.receive(collect(step, parameters, surgery.options.resharding))
                elif border is not None:
                    rows_through(step, target, border)
                else:
                    rows_by_task(step, target)
                if hold:  # in the rows, where `buffer_dtype` counts
                    common = surgery.common(collector)
                    collector.write(surgery.rows, common, step.blocks, keep=True)
                    collector.pending = True
        except BaseException:
            self.drop()  # some tasks have come and others not
            raise

    def combine(
        self,
        parameters: Sequence[Tensor],
        groups: Sequence[Mapping[str, Any]] | None,
        loss_scale: Tensor | None,
        council: Council | None,
    ) -> SurgeryReport:
        """Combine all task gradients that have come; with `accumulation="tasks"` in place of the last such update.

        Args:
            parameters: of the optimizer, without duplicates.
            groups: its groups.
            loss_scale: factor of a `GradScaler` that is in the gradients already.
            council: of the processes; None where there is one.

        Raises:
            RuntimeError: no task has come.
        """
        if not self._collector.pending:
            raise RuntimeError(
                "`combine` needs gradients. Compute them inside `with optimizer.task(name):`, once for each task, "
                "or by `backward(losses, combine=False)`."
            )
        collector, surgery = self._collector, self._surgery
        keep = surgery.options.accumulation == "tasks"
        common, agreement = surgery.common(collector), None
        if council is not None:
            agreement = surgery.agree_on_gradients(collector, council)
            common = agreement.shared
        device = parameters[0].device
        with torch.no_grad(), full_precision(device):
            if keep:
                self._standing.take_back(parameters, surgery.method)
            unknown = torch.full((), torch.nan, device=device)
            losses = detached_losses([unknown if x is None else x for x in collector.losses])
            if council is not None:
                losses = council.processes.mean_losses(losses)
            run = Run(None, losses, tuple(collector.tasks), loss_scale)
            blocks = surgery.partition.blocks(parameters, groups)
            if council is not None and council.processes.averaging:
                run.outbox = Outbox(council.processes)
            own = collector.write(surgery.rows, common, blocks, keep=keep)
            surgery.combine_rows(run)
            surgery.deliver_heads(own, run)
            if agreement is not None and run.outbox is not None:
                run.outbox.send(agreement.own)
            if keep:
                self._standing.note(parameters)
            return run.report(None if blocks is None else blocks.names)


class _Intake:
    """Takes the rows of one step for a collector."""

    def __init__(self, collector: Collector, step: Step) -> None:
        self._collector = collector
        self._step = step

    def lay_out(self, shared: Sequence[Tensor], tasks: int, blocks: Blocks | None) -> None:
        """Nothing: that is done when all has come."""

    def arriving(
        self, task: int, leaves: Sequence[Tensor]
    ) -> AbstractContextManager[Collection[int]]:
        """Nothing: a row that has something already cannot be written over."""
        return nullcontext(())

    def write(
        self,
        task: int,
        leaves: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        arrived: Collection[int] = (),
    ) -> dict[Tensor, Tensor]:
        """Add to what the task has; nothing is its own yet."""
        found = {p: g for p, g in zip(leaves, gradients, strict=True) if g is not None}
        self._collector.add(self._step.tasks[task], found, self._step.losses[task].detach())
        return {}
