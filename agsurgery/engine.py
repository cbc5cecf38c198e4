"""The engine: from losses to `.grad` with one method, one set of options, and storage kept from step to step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from agsurgery.accumulate import Collector, collect
from agsurgery.agreement import Council
from agsurgery.checks import check_collected, check_hooks, check_reach, feature_nodes
from agsurgery.distributed import Shifted
from agsurgery.gathering import MicroBatches
from agsurgery.graph import split, walk
from agsurgery.kernels import solver_dtype
from agsurgery.losses import Losses, loss_scale, read_losses
from agsurgery.methods import Method, Solution, Weighting
from agsurgery.methods._base import RowMethod
from agsurgery.options import Features, Level, Options, check_level
from agsurgery.passes import Step, rows_by_task, weighted_backward
from agsurgery.report import SurgeryReport, detached_losses
from agsurgery.run import Run
from agsurgery.sharding import any_sharded
from agsurgery.stages import feature_surgery, lean_surgery, rows_through
from agsurgery.surgery import Surgery, full_precision
from agsurgery.together import seen_together


class Engine:
    """Surgery with one method.

    Args:
        method: see `agsurgery.backward`.
        options: None: the defaults.

    Attributes:
        report: of the last step; None before the first.
        published: state entries as the optimizer last put them in its groups.

    Raises:
        TypeError, ValueError: unknown method or option, or options that contradict each other.
    """

    def __init__(self, method: str | Weighting, options: Options | None = None) -> None:
        self._surgery = Surgery(method, options or Options())
        self._micro_batches = MicroBatches(self._surgery)
        self.report: SurgeryReport | None = None
        self.published: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"report": None, "published": {}}

    @property
    def options(self) -> Options:
        """The choices that hold for every step."""
        return self._surgery.options

    @property
    def method(self) -> Weighting:
        """The method that combines the task gradients."""
        return self._surgery.method

    # -- state ----------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold: the live tensors of the method, and the kept weights."""
        method = self.method.state() if isinstance(self.method, Method) else {}
        return {**method, **self._surgery.reuse.state()}

    def load_state(self, entries: Mapping[str, Any]) -> None:
        """Take over what `state` gave; what it did not know stays as it is."""
        if isinstance(self.method, Method):
            self.method.load_state_dict({**self.method.state(), **entries})
            self._micro_batches.forget_method()
        self._surgery.reuse.load(entries)

    def expect(self, parameters: Sequence[Tensor], groups: Sequence[Mapping[str, Any]]) -> None:
        """Make room in the state for the tasks that the user named.

        Args:
            parameters: of the optimizer, without duplicates.
            groups: its groups.
        """
        tasks = self.options.tasks
        if not tasks or not parameters:
            return
        blocks = self._surgery.partition.blocks(parameters, groups)
        shape = (len(tasks),) if blocks is None else (len(blocks.names), len(tasks))
        device = parameters[0].device
        like = torch.zeros(shape, dtype=solver_dtype(device), device=device)
        if isinstance(self.method, Method):
            self.method.expect(tasks, like)
        self._surgery.reuse.expect(tasks, like)

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
        scaler: torch.amp.GradScaler | None = None,
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
            scaler: see `agsurgery.backward`.
            combine: False to hold the task gradients for a later call; returns None then.
        """
        surgery, micro_batches = self._surgery, self._micro_batches
        with surgery.together(parameters) as council:
            gathering = micro_batches.wanted(combine, level)
            check_level(level, features)
            border = None if features is None else feature_nodes(features)
            step = self._walked(losses, parameters, groups, retain_graph, scaler)
            collected = self._checked(step, border, council)
            # Gradients that are held are compared when they are combined, unless a backward pass exchanges something.
            if council is not None and (council.processes.sharded or not gathering):
                step = seen_together(
                    step,
                    council,
                    shared=surgery.named(),
                    border=border,
                    collects=gathering or collected or self.options.engine == "accumulate",
                    ordinary=self.options.engine == "reweight",
                    choices=(*surgery.choices(step), level, combine),
                )
            if not gathering:
                self.report = self._whole(step, border, collected, level, council)
                return self.report
            assert parameters is not None
            micro_batches.gather(step, border, collected, hold=not combine)
            if not combine:
                return None
            self.report = micro_batches.combine(parameters, groups, step.loss_scale, council)
            return self.report

    def combine(
        self,
        parameters: Sequence[Tensor],
        groups: Sequence[Mapping[str, Any]] | None,
        scaler: torch.amp.GradScaler | None,
    ) -> SurgeryReport:
        """Combine the task gradients that have come and were not combined yet.

        Args:
            parameters: of the optimizer, without duplicates.
            groups: its groups.
            scaler: whose factor is in the gradients already.

        Raises:
            RuntimeError: no task has come.
        """
        with self._surgery.together(parameters) as council:
            scale = loss_scale(scaler, parameters[0].device) if parameters else None
            self.report = self._micro_batches.combine(parameters, groups, scale, council)
        return self.report

    def taking(self, task: str, parameters: Sequence[Tensor]) -> AbstractContextManager[None]:
        """See `GradientSurgery.task`."""
        return self._micro_batches.taking(task, parameters)

    @property
    def pending(self) -> list[str]:
        """Names of the tasks whose gradients wait to be combined."""
        return self._micro_batches.pending

    def drop(self) -> None:
        """Forget task gradients of earlier calls; what is in `.grad` stays."""
        self._micro_batches.drop()

    # -- parts ----------------------------------------------------------------------------------------

    def _walked(
        self,
        losses: Losses,
        parameters: Sequence[Tensor] | None,
        groups: Sequence[Mapping[str, Any]] | None,
        retain_graph: bool,
        scaler: torch.amp.GradScaler | None,
    ) -> Step:
        """The losses, and what they reach."""
        with torch.enable_grad():  # views of a loss made under no_grad would have no graph
            names, values, roots = read_losses(losses)
        reach = walk(roots, parameters)
        hidden = reach.reentrant or any_sharded(parameters or ())
        if not hidden and any(roots):
            check_reach(names, roots, reach, self.options.outside)
        parts = split(reach, self._surgery.named())
        # The scale lives where the parameters do; an absent task's constant may be elsewhere.
        home = next(iter(parameters or reach.found), values[0]).device
        return Step(
            tuple(names),
            values,
            roots,
            parameters,
            reach,
            parts,
            self._surgery.shared is not None,
            hidden,
            self._surgery.partition.blocks(
                parameters if parameters is not None else parts.shared, groups
            ),
            retain_graph,
            loss_scale(scaler, home),
        )

    def _checked(self, step: Step, border: set[Node] | None, council: Council | None) -> bool:
        """Refuse what this engine cannot do; whether the gradients come by `.backward()` calls."""
        # In another process a loss may have a graph, and its gradients are averaged with those of this one.
        averaged = council is not None and council.processes.averaging
        once_more = self.options.engine == "reweight"
        if not any(step.roots) and (once_more or not averaged):
            raise RuntimeError(
                "At least one loss must depend on a parameter. None of them has a graph: were they computed "
                "under `torch.no_grad()`, or detached?"
            )
        weighs_losses = self._surgery.kind == "losses"
        collected = not weighs_losses and (step.hidden or self.options.engine == "accumulate")
        if collected:
            check_collected(step.parameters, border, self.options)
        alone = weighs_losses and not averaged
        if collected or not (once_more or alone):  # the last pass is no ordinary one
            check_hooks(step.leaves() if step.parameters is None else step.parameters)
        return collected

    def _whole(
        self,
        step: Step,
        border: set[Node] | None,
        collected: bool,
        level: Level,
        council: Council | None,
    ) -> SurgeryReport:
        """Surgery on the losses of one call alone."""
        device = step.device if council is None else council.processes.device
        with torch.no_grad(), full_precision(device):
            losses = detached_losses(step.losses)
            if council is not None:
                losses = council.processes.mean_losses(losses)
            run = Run(step, losses)
            if self._surgery.kind == "losses":
                self._pass_once(run, self._surgery.solve(run, run.unknown()))
            elif level == "features":
                self._at_features(run, border or set())
            else:
                self._at_parameters(run, border, collected)
            return run.report(None if step.blocks is None else step.blocks.names)

    def _at_parameters(self, run: Run, border: set[Node] | None, collected: bool) -> None:
        """Surgery on the gradients of the shared parameters."""
        surgery, step = self._surgery, run.step
        active = step.active
        kept = surgery.reuse.recall(step.tasks, active)
        if kept is not None:
            run.gramian = run.unknown()
            self._pass_once(run, kept)
            return
        once_more = self.options.engine == "reweight"
        if self.options.engine == "lean":
            weighted = surgery.heads == "weighted"
            own = lean_surgery(
                step,
                surgery.rows,
                lambda gramian: surgery.solve(run, gramian).weights,
                weighted_heads=weighted,
            )
        elif collected:
            assert step.parameters is not None
            collector = collect(
                step, step.parameters, self.options.resharding, retain_last=once_more
            )
            common = surgery.common(collector)
            if step.outbox is not None and surgery.council is not None:
                agreement = surgery.agree_on_gradients(collector, surgery.council)
                step, common = replace(step, agreement=agreement), agreement.shared
            own = collector.write(surgery.rows, common, step.blocks)
        elif border is not None:
            own = rows_through(step, surgery.rows, border, retain_last=once_more)
        else:
            own = rows_by_task(step, surgery.rows, retain_last=once_more)
        if once_more:
            gramian = surgery.rows.gramian(len(step.tasks), step.device)
            own.clear()
            self._pass_once(run, surgery.solve(run, gramian))
        else:
            if self.options.engine != "lean":
                surgery.combine_rows(run)
            surgery.deliver_heads(own, run)
            if step.outbox is not None and step.agreement is not None:
                step.outbox.send(step.agreement.own)
        if run.solution is not None:
            surgery.reuse.keep(step.tasks, active, run.solution)

    def _at_features(self, run: Run, border: set[Node]) -> None:
        """Surgery on the gradients at the features."""
        surgery, step = self._surgery, run.step
        method = self.method if isinstance(self.method, RowMethod) else None
        council = surgery.council if step.outbox is not None else None

        def weigh(gramian: Tensor) -> Tensor:
            if council is not None:
                gramian = council.processes.at_features(gramian)
            if method is None:
                return surgery.solve(run, gramian).weights
            surgery.no_weights(run, gramian)
            return gramian.new_ones(len(run.tasks))

        weighted = surgery.heads == "weighted"
        rule: RowMethod | Shifted | None = method
        if method is not None and council is not None:
            rule = Shifted(method, council.processes)
        own = feature_surgery(step, border, weigh, rule, weighted_heads=weighted)
        surgery.deliver_heads(own, run)
        if step.outbox is not None and step.agreement is not None:
            step.outbox.send(step.agreement.reached)

    def _pass_once(self, run: Run, solution: Solution) -> None:
        """One backward pass of the weighted losses."""
        surgery = self._surgery
        run.solution = solution
        step, council, own = run.step, surgery.council, surgery.heads == "own"
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
            agreement = surgery.agree_on_gradients(collector, council)
            step.outbox.add(collector.take()[0])
            step.outbox.send(agreement.reached)
        else:
            weighted_backward(step, solution.weights, own=own)
            step.outbox.send(step.agreement.reached)
