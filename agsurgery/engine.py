"""The engine: from losses to `.grad` with one method, one set of options, and storage kept from step to step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from agsurgery.accumulate import Collector, Gathering, collect
from agsurgery.agreement import Agreement, Council, council_for
from agsurgery.blocks import Partition
from agsurgery.checks import (
    as_tensors,
    check_hooks,
    check_options,
    check_reach,
    check_rows_kept,
    feature_nodes,
)
from agsurgery.distributed import Shifted
from agsurgery.graph import shared_among, split, walk
from agsurgery.jacobian import Rows, deliver_own
from agsurgery.kernels import solver_dtype
from agsurgery.losses import Losses, read_losses
from agsurgery.methods import Method, Solution, Weighting, resolve, solve
from agsurgery.methods._base import RowMethod, uses
from agsurgery.options import Features, Heads, Level, Options, check_level
from agsurgery.outbox import Outbox
from agsurgery.passes import Own, Step, rows_by_task, weighted_backward
from agsurgery.report import SurgeryReport, detached_losses
from agsurgery.reuse import Reuse
from agsurgery.run import Run
from agsurgery.sharding import any_sharded
from agsurgery.stages import feature_surgery, lean_surgery, rows_through
from agsurgery.standing import Standing
from agsurgery.together import agreed_on_gradients, seen_together


class Engine:
    """Surgery with one method.

    Args:
        method: see `agsurgery.backward`.
        options: None: the defaults.

    Raises:
        TypeError, ValueError: unknown method or option, or options that contradict each other.
    """

    def __init__(self, method: str | Weighting, options: Options | None = None) -> None:
        options = options or Options()
        self.options = options
        self.method = resolve(method)
        self._kind = uses(self.method)
        check_options(options, self._kind, self.method)
        default: Heads = "weighted" if self._kind == "losses" else "own"
        self.heads: Heads = options.heads or default
        self.shared = None if options.shared is None else as_tensors(options.shared, "shared")
        self.report: SurgeryReport | None = None
        self.collector = Collector()
        # State entries as the optimizer last put them in its groups.
        self.published: dict[str, Any] = {}
        self._partition = Partition(options.granularity)
        self._reuse = Reuse(options.every)
        self._standing = Standing()
        self._rows = Rows(options.buffer_dtype)
        self._council: Council | None = None

    def __getstate__(self) -> dict[str, Any]:
        # The storage belongs to these very parameters; a copy makes its own.
        return self.__dict__ | {
            "_rows": Rows(self.options.buffer_dtype),
            "_council": None,
            "collector": Collector(),
            "_standing": Standing(),
            "report": None,
            "published": {},
        }

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold: the live tensors of the method, and the kept weights."""
        method = self.method.state() if isinstance(self.method, Method) else {}
        return {**method, **self._reuse.state()}

    def load_state(self, entries: Mapping[str, Any]) -> None:
        """Take over what `state` gave; what it did not know stays as it is."""
        if isinstance(self.method, Method):
            self.method.load_state_dict({**self.method.state(), **entries})
            self._standing.forget_method()
        self._reuse.load(entries)

    def expect(self, parameters: Sequence[Tensor], groups: Sequence[Mapping[str, Any]]) -> None:
        """Make room in the state for the tasks that the user named.

        Args:
            parameters: of the optimizer, without duplicates.
            groups: its groups.
        """
        tasks = self.options.tasks
        if not tasks or not parameters:
            return
        blocks = self._partition.blocks(parameters, groups)
        shape = (len(tasks),) if blocks is None else (len(blocks.names), len(tasks))
        device = parameters[0].device
        like = torch.zeros(shape, dtype=solver_dtype(device), device=device)
        if isinstance(self.method, Method):
            self.method.expect(tasks, like)
        self._reuse.expect(tasks, like)

    # -- one step -----------------------------------------------------------------------------------

    def __call__(
        self,
        losses: Losses,
        parameters: Sequence[Tensor] | None,
        *,
        groups: Sequence[Mapping[str, Any]] | None = None,
        features: Features | None = None,
        level: Level = "parameters",
        retain_graph: bool = False,
        loss_scale: Tensor | None = None,
        combine: bool = True,
    ) -> SurgeryReport | None:
        """Add the combined gradient of `losses` to the `.grad` of `parameters`; see `agsurgery.backward`.

        Args:
            losses: see `agsurgery.backward`.
            parameters: without duplicates; None: all that the losses reach.
            groups: the optimizer's parameter groups.
            features: see `agsurgery.backward`.
            level: see `agsurgery.backward`.
            retain_graph: see `agsurgery.backward`.
            loss_scale: factor of a `GradScaler`, 0-d; None for 1.
            combine: False to hold the task gradients for a later call; returns None then.
        """
        with self._together(parameters) as council:
            return self._step(
                losses,
                parameters,
                council,
                groups,
                features,
                level,
                retain_graph,
                loss_scale,
                combine,
            )

    def _step(
        self,
        losses: Losses,
        parameters: Sequence[Tensor] | None,
        council: Council | None,
        groups: Sequence[Mapping[str, Any]] | None,
        features: Features | None,
        level: Level,
        retain_graph: bool,
        loss_scale: Tensor | None,
        combine: bool,
    ) -> SurgeryReport | None:
        gathering = self._gathers(combine, level)
        check_level(level, features)
        border = None if features is None else feature_nodes(features)
        # In another process a loss may have a graph, and its gradients are averaged with those of this one.
        averaged = council is not None and council.processes.averaging
        once_more = self.options.engine == "reweight"
        step = self._walked(losses, parameters, groups, retain_graph, loss_scale)
        if not any(step.roots) and (once_more or not averaged):
            raise RuntimeError(
                "At least one loss must depend on a parameter. None of them has a graph: were they computed "
                "under `torch.no_grad()`, or detached?"
            )
        collected = self._kind != "losses" and (step.hidden or self.options.engine == "accumulate")
        if collected:
            self._check_collected(parameters, border)
        alone = self._kind == "losses" and not averaged
        if collected or not (once_more or alone):  # the last pass is no ordinary one
            check_hooks(step.leaves() if parameters is None else parameters)
        # Task gradients that are held are compared when they are combined, unless a backward pass exchanges something.
        if council is not None and (council.processes.sharded or not gathering):
            step = seen_together(
                step,
                council,
                shared=self._named(),
                border=border,
                collects=gathering or collected or self.options.engine == "accumulate",
                ordinary=once_more,
                choices=(*self._choices(step), level, combine),
            )
        if gathering:
            assert parameters is not None
            self._gather(step, border, collected, hold=not combine)
            if not combine:
                return None
            return self._combine_gathered(parameters, groups, loss_scale, council)
        device = step.device if council is None else council.processes.device
        with torch.no_grad(), full_precision(device):
            detached = detached_losses(step.losses)
            if council is not None:
                detached = council.processes.mean_losses(detached)
            run = Run(step, detached)
            if self._kind == "losses":
                self._pass_once(run, self._solve(run, run.unknown()))
            elif level == "features":
                self._at_features(run, border or set())
            else:
                self._at_parameters(run, border, collected)
            self.report = run.report(self._partition_names(step))
        return self.report

    def _walked(
        self,
        losses: Losses,
        parameters: Sequence[Tensor] | None,
        groups: Sequence[Mapping[str, Any]] | None,
        retain_graph: bool,
        loss_scale: Tensor | None,
    ) -> Step:
        """The losses, and what they reach."""
        with torch.enable_grad():  # views of a loss made under no_grad would have no graph
            names, values, roots = read_losses(losses)
        reach = walk(roots, parameters)
        hidden = reach.reentrant or any_sharded(parameters or ())
        if not hidden and any(roots):
            check_reach(names, roots, reach, self.options.outside)
        parts = split(reach, self._named())
        return Step(
            tuple(names),
            values,
            roots,
            parameters,
            reach,
            parts,
            self.shared is not None,
            hidden,
            self._partition.blocks(parameters if parameters is not None else parts.shared, groups),
            retain_graph,
            loss_scale,
        )

    def _at_parameters(self, run: Run, border: set[Any] | None, collected: bool) -> None:
        """Surgery on the gradients of the shared parameters."""
        step = run.step
        active = step.active
        kept = self._reuse.recall(step.tasks, active)
        if kept is not None:
            run.gramian = run.unknown()
            self._pass_once(run, kept)
            return
        once_more = self.options.engine == "reweight"
        if self.options.engine == "lean":
            own = lean_surgery(
                step, self._rows, self._weigher(run), weighted_heads=self.heads == "weighted"
            )
        elif collected:
            assert step.parameters is not None
            collector = collect(
                step, step.parameters, self.options.resharding, retain_last=once_more
            )
            common = self._common(collector)
            if step.outbox is not None and self._council is not None:
                agreement = self._agree_on_gradients(collector, self._council)
                step, common = replace(step, agreement=agreement), agreement.shared
            own = collector.write(self._rows, common, step.blocks)
        elif border is not None:
            own = rows_through(step, self._rows, border, retain_last=once_more)
        else:
            own = rows_by_task(step, self._rows, retain_last=once_more)
        if once_more:
            gramian = self._rows.gramian(len(step.tasks), step.device)
            own.clear()
            self._pass_once(run, self._solve(run, gramian))
        else:
            if self.options.engine != "lean":
                self._combine_rows(run)
            self._deliver_own(own, run)
            if step.outbox is not None and step.agreement is not None:
                step.outbox.send(step.agreement.own)
        if run.solution is not None:
            self._reuse.keep(step.tasks, active, run.solution)

    def _combine_rows(self, run: Run) -> None:
        """Deliver the update of the stored rows."""
        tasks = len(run.tasks)
        gramian = self._rows.gramian(tasks, run.losses.device)
        if isinstance(self.method, RowMethod):
            self._no_weights(run, gramian)
            self.method.begin(self._rows.device or run.losses.device)
            self._rows.deliver_columns(self.method.combine, tasks)
        else:
            self._rows.deliver(self._solve(run, gramian).weights)

    def _at_features(self, run: Run, border: set[Any]) -> None:
        """Surgery on the gradients at the features."""
        if isinstance(self.method, RowMethod):
            method: RowMethod | None = self.method
        else:
            method = None

        step = run.step
        council = self._council if step.outbox is not None else None

        def weigh(gramian: Tensor) -> Tensor:
            if council is not None:
                gramian = council.processes.at_features(gramian)
            if method is None:
                return self._solve(run, gramian).weights
            self._no_weights(run, gramian)
            return gramian.new_ones(len(run.tasks))

        weighted = self.heads == "weighted"
        rule: RowMethod | Shifted | None = method
        if method is not None and council is not None:
            rule = Shifted(method, council.processes)
        own = feature_surgery(step, border, weigh, rule, weighted_heads=weighted)
        self._deliver_own(own, run)
        if step.outbox is not None and step.agreement is not None:
            step.outbox.send(step.agreement.reached)

    def _pass_once(self, run: Run, solution: Solution) -> None:
        """One backward pass of the weighted losses."""
        run.solution = solution
        step, council, own = run.step, self._council, self.heads == "own"
        if step.outbox is None or council is None or step.agreement is None:
            weighted_backward(step, solution.weights, own=own)
        elif self.options.engine == "reweight":  # averaged by whoever wraps the model
            weighted_backward(replace(step, outbox=None), solution.weights, own=own)
            council.check_averaged(step.agreement.reached)
        elif step.hidden or self.options.engine == "accumulate":
            assert step.parameters is not None
            collector = Collector()
            with collector.taking("all", step.parameters):
                weighted_backward(replace(step, outbox=None), solution.weights, own=own)
            agreement = self._agree_on_gradients(collector, council)
            step.outbox.add(collector.take()[0])
            step.outbox.send(agreement.reached)
        else:
            weighted_backward(step, solution.weights, own=own)
            step.outbox.send(step.agreement.reached)

    # -- tasks one by one -----------------------------------------------------------------------------

    def check_tasks(self) -> None:
        """Refuse what gradients that come task by task do not allow.

        Raises:
            RuntimeError: the method looks at losses, or the engine is to run backward passes itself.
        """
        check_rows_kept(self.options, self._kind, self.method, "`task()`")
        self._renew()

    def combine(
        self,
        parameters: Sequence[Tensor],
        groups: Sequence[Mapping[str, Any]] | None,
        loss_scale: Tensor | None,
    ) -> SurgeryReport:
        """Combine the task gradients that have come and were not combined yet.

        Args:
            parameters: of the optimizer, without duplicates.
            groups: its groups.
            loss_scale: factor of a `GradScaler` that is in the gradients already.

        Raises:
            RuntimeError: no task has come.
        """
        with self._together(parameters) as council:
            if not self.collector.pending:
                raise RuntimeError(
                    "`combine` needs gradients. Compute them inside `with optimizer.task(name):`, once for each task, "
                    "or by `backward(losses, combine=False)`."
                )
            return self._combine_gathered(parameters, groups, loss_scale, council)

    # -- several calls for one update -----------------------------------------------------------------

    def drop(self) -> None:
        """Forget task gradients of earlier calls; what is in `.grad` stays."""
        self.collector.clear()
        self._standing.clear()

    def _renew(self) -> None:
        """See whether earlier micro-batches still count."""
        if self._standing.dropped():
            self.drop()
        self._standing.check()

    def _gathers(self, combine: bool, level: Level) -> bool:
        """Whether the task gradients of this call are kept for later ones, or join those of earlier ones."""
        if self.collector.by_hand:
            raise RuntimeError(
                f"The gradients of the tasks {self.collector.tasks} wait to be combined. Call `combine()` first, or "
                "`zero_grad()` to drop them."
            )
        self._renew()
        if combine and self.options.accumulation == "gradients" and not self.collector.tasks:
            return False
        check_rows_kept(self.options, self._kind, self.method, "`combine=False`")
        if level == "features":
            raise ValueError(
                'Features differ from one micro-batch to the next, so `level="features"` allows neither '
                '`combine=False` nor `accumulation="tasks"`.'
            )
        return True

    def _gather(self, step: Step, border: set[Any] | None, collected: bool, *, hold: bool) -> None:
        """Add the task gradients of one call to those of the calls before."""
        collector = self.collector
        try:
            with torch.no_grad(), full_precision(step.device):
                target = Gathering(collector, step)
                if collected:
                    collector.receive(collect(step, step.parameters or (), self.options.resharding))
                elif border is not None:
                    rows_through(step, target, border)
                else:
                    rows_by_task(step, target)
                if hold:  # in the rows, where `buffer_dtype` counts
                    collector.write(self._rows, self._common(collector), step.blocks, keep=True)
                    collector.pending = True
        except BaseException:
            self.drop()  # some tasks have come and others not
            raise

    def _combine_gathered(
        self,
        parameters: Sequence[Tensor],
        groups: Sequence[Mapping[str, Any]] | None,
        loss_scale: Tensor | None,
        council: Council | None,
    ) -> SurgeryReport:
        """Combine all task gradients that have come; with `accumulation="tasks"` in place of the last such update."""
        collector, keep = self.collector, self.options.accumulation == "tasks"
        common, agreement = self._common(collector), None
        if council is not None:
            agreement = self._agree_on_gradients(collector, council)
            common = agreement.shared
        device = parameters[0].device
        with torch.no_grad(), full_precision(device):
            if keep:
                self._standing.take_back(parameters, self.method)
            unknown = torch.full((), torch.nan, device=device)
            losses = detached_losses([unknown if x is None else x for x in collector.losses])
            if council is not None:
                losses = council.processes.mean_losses(losses)
            run = Run(None, losses, tuple(collector.tasks), loss_scale)
            blocks = self._partition.blocks(parameters, groups)
            if council is not None and council.processes.averaging:
                run.outbox = Outbox(council.processes)
            own = collector.write(self._rows, common, blocks, keep=keep)
            self._combine_rows(run)
            self._deliver_own(own, run)
            if agreement is not None and run.outbox is not None:
                run.outbox.send(agreement.own)
            if keep:
                self._standing.note(parameters)
            self.report = run.report(None if blocks is None else blocks.names)
        return self.report

    # -- several processes ----------------------------------------------------------------------------

    @contextmanager
    def _together(self, parameters: Sequence[Tensor] | None) -> Iterator[Council | None]:
        """One step of all processes; None where there is only this one."""
        council = council_for(self._council, self.options.replicas, parameters)
        self._council = council
        self._rows.processes = None if council is None else council.processes
        with nullcontext() if council is None else council.failing_together():
            yield council

    def _agree_on_gradients(self, collector: Collector, council: Council) -> Agreement:
        return agreed_on_gradients(council, collector, self._named(), self._choices(None))

    def _choices(self, step: Step | None) -> tuple[object, ...]:
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
            self._reuse.age,
        )

    # -- parts ----------------------------------------------------------------------------------------

    def _solve(self, run: Run, gramian: Tensor) -> Solution:
        if self._council is not None:
            self._council.check_alike(gramian)
        run.gramian = gramian
        run.solution = solve(self.method, gramian, run.losses.to(gramian), run.tasks)
        return run.solution

    def _weigher(self, run: Run) -> Any:
        return lambda gramian: self._solve(run, gramian).weights

    def _no_weights(self, run: Run, gramian: Tensor) -> None:
        run.gramian = gramian
        blank = gramian.new_full((len(run.tasks),), torch.nan)
        run.solution = Solution(blank, gramian.new_ones(()))

    def _deliver_own(self, own: Own, run: Run) -> None:
        assert run.solution is not None
        for task, gradients in enumerate(own):
            factor = None if self.heads == "own" else run.solution.weights.select(-1, task)
            if run.outbox is None:
                deliver_own(gradients, factor)
            else:
                run.outbox.add(gradients, factor)

    def _common(self, collector: Collector) -> list[Tensor]:
        """The parameters that the tasks seen so far share."""
        return shared_among(collector.reached(), self._named())

    def _named(self) -> set[int] | None:
        return None if self.shared is None else {id(p) for p in self.shared}

    @staticmethod
    def _partition_names(step: Step) -> tuple[str, ...] | None:
        return None if step.blocks is None else step.blocks.names

    def _check_collected(self, parameters: Sequence[Tensor] | None, border: object) -> None:
        """What `.backward()` calls cannot do."""
        if parameters is None:
            raise ValueError(
                "The parameters must be given where the graph does not show them (a reentrant checkpoint, or "
                '`engine="accumulate"`). Pass `params`, or call '
                "`torch.utils.checkpoint.checkpoint(..., use_reentrant=False)`."
            )
        if self.options.engine == "lean" or border is not None:
            raise ValueError(
                '`engine="lean"` and `features=` differentiate parts of the graph, which a reentrant checkpoint, '
                'sharded parameters and `engine="accumulate"` do not allow. Leave them out, or call '
                "`torch.utils.checkpoint.checkpoint(..., use_reentrant=False)`."
            )


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Autocast off: inside its region it would compute the Gramian, and parts of the backward pass, in 16 bits."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
