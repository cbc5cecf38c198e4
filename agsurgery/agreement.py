"""What processes must agree on before they exchange gradients: an error everywhere, and not a wait without end."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from agsurgery.distributed import Processes, Replicas, several_processes
from agsurgery.graph import Split
from agsurgery.sharding import any_sharded, is_sharded


@dataclass(frozen=True)
class Agreement:
    """What holds in all processes together.

    Attributes:
        active: for each task, whether it has a graph in any of them.
        reached: parameters that some loss reaches in any of them, in the order of the optimizer.
        shared: those reached by two losses or more, or named so.
        own: the others.
    """

    active: list[bool]
    reached: list[Tensor]
    shared: list[Tensor]
    own: list[Tensor]

    def split(self, leaves: Sequence[Sequence[Tensor]]) -> Split:
        """The same for this process's losses."""
        chosen = {id(p) for p in self.shared}
        return Split(
            self.shared,
            [[leaf for leaf in reached if id(leaf) not in chosen] for reached in leaves],
        )


class Council:
    """Compares what the processes are about to do.

    In each step one small exchange finds out whether all are equal. Only if different parameters are reached, a second
    one finds those that are reached anywhere.

    Args:
        processes: all that take part.
    """

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self._once = processes.replicas is not None and processes.replicas.agree == "once"
        self._agreed: dict[str, Agreement] = {}
        self._expected = False  # whether other processes wait for a comparison
        self._averaged = self._alike = False
        self._index = {id(p): i for i, p in enumerate(processes.parameters)}
        self._shapes = _digest([(tuple(p.shape), str(p.dtype)) for p in processes.parameters])

    def agree(
        self,
        stage: str,
        tasks: tuple[str, ...],
        active: Sequence[bool],
        leaves: Sequence[Sequence[Tensor]],
        shared: set[int] | None,
        settings: object,
        *,
        last: bool = True,
    ) -> Agreement:
        """Compare the tasks, and join what the losses reach.

        Args:
            stage: names the comparison, if there are several in a step.
            tasks: K names.
            active: for each task, whether it has a graph here.
            leaves: for each task, the parameters that it reaches here.
            shared: ids of the parameters to treat as shared; None: those that two losses or more reach.
            settings: anything else that must be equal, with a text (`repr`) that is.
            last: whether no other comparison follows in this step.

        Raises:
            ValueError: tasks, parameters or settings differ.
            RuntimeError: another process failed before this point.
        """
        settings = (stage, settings)
        key = repr((settings, tasks))
        if key in self._agreed:
            return self._agreed[key]
        self._expected = False  # what goes wrong from here on goes wrong in all of them
        low, high = self._owners(leaves)
        processes = self.processes
        values = [
            len(tasks),
            _digest(tasks),
            len(low),
            self._shapes,
            _digest(settings),
            _digest((low, high, list(active))),
        ]
        failed, count, names, number, shapes, choices, pattern = self._compare(0, values)
        if failed:
            raise RuntimeError(
                "Another process raised an error before the gradients could be averaged. Its message says what to do."
            )
        if not (count and names):
            raise ValueError(
                "All processes must pass the same tasks in the same order. Got "
                f"{' and '.join(processes.texts(repr(list(tasks))))}. For a task that is absent from the batch of one "
                "process pass `torch.zeros(())` there, or open `task(name)` around nothing."
            )
        if not (number and shapes):
            raise ValueError(
                "All processes must hold the same parameters in the same order. Got "
                f"{' and '.join(processes.texts(f'{len(low)} with digest {self._shapes:x}'))}."
            )
        if not choices:
            raise ValueError(
                "All processes must run the same step: same options, features, scaler, and age of weights that are "
                'kept; with sharded parameters or `engine="reweight"` every task is needed everywhere (pass `0 * loss` '
                "for an absent one). Got "
                f"{' and '.join(processes.texts(repr(settings)))}."
            )
        present = list(active)
        if not pattern:
            joined = processes.most([*high, *(-i for i in low), *map(int, active)])
            size = len(low)
            high, low = joined[:size], [-i for i in joined[size : 2 * size]]
            present = [bool(value) for value in joined[2 * size :]]
        agreement = self._agreement(present, low, high, shared)
        self._expected = not last
        if self._once:
            self._agreed[key] = agreement
        return agreement

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """Tell the other processes of an error before the last comparison, so that they do not wait for this one."""
        self._expected = not self._agreed
        try:
            yield
        except Exception:
            if self._expected:
                self._expected = False
                self._compare(1, [0] * 6)
            raise

    def check_averaged(self, parameters: Sequence[Tensor]) -> None:
        """Once: whether the gradients that an ordinary backward pass left are those of all processes together.

        Args:
            parameters: those that it reached.

        Raises:
            RuntimeError: they differ.
        """
        self._expected = False
        if self._averaged:
            return
        self._averaged = True
        known = [p.grad for p in parameters if p.grad is not None and self.processes.averages(p)]
        sums = [
            torch.view_as_real(g).sum() if g.is_complex() else g.to_dense().sum() for g in known
        ]
        if not self.processes.equal([float(value) for value in sums], tolerance=0.0):
            raise RuntimeError(
                '`engine="reweight"` needs the last backward pass averaged over the processes by '
                "`DistributedDataParallel`. The gradients differ between the processes: call the model through it, and "
                'outside of `no_sync()`, or use `engine="grad"`.'
            )

    def check_alike(self, gramian: Tensor) -> None:
        """Once: whether parameters that are not sharded have the same gradients everywhere, where nobody averages.

        Args:
            gramian: as this process found it.

        Raises:
            RuntimeError: they differ.
        """
        processes = self.processes
        plain = any(not is_sharded(p) for p in processes.parameters)
        if self._alike or processes.averaging or not plain:
            return
        self._alike = True
        if not processes.equal(gramian.flatten().tolist(), tolerance=1e-3):
            raise RuntimeError(
                "Parameters that are not sharded must have the same gradients in all processes, as beside tensor "
                "parallel ones. They differ. Pass `process_group=True` (or the group of processes with different "
                "batches) to average them."
            )

    def _compare(self, failed: int, values: Sequence[int]) -> tuple[bool, ...]:
        """Whether any process failed; for each value, whether it is the same everywhere."""
        found = self.processes.most([failed, *values, *(-value for value in values)])
        highest, lowest = found[1 : 1 + len(values)], found[1 + len(values) :]
        equal = [high == -low for high, low in zip(highest, lowest, strict=True)]
        return (bool(found[0]), *equal)

    def _owners(self, leaves: Sequence[Sequence[Tensor]]) -> tuple[list[int], list[int]]:
        """For each parameter the first and the last task that reaches it; K and -1 if none does.

        Two numbers say all that matters: whether it is reached, and whether by several.
        """
        first = [len(leaves)] * len(self._index)
        last = [-1] * len(self._index)
        for task, reached in enumerate(leaves):
            for leaf in reached:
                place = self._index[id(leaf)]
                first[place] = min(first[place], task)
                last[place] = task
        return first, last

    def _agreement(
        self, active: list[bool], first: list[int], last: list[int], shared: set[int] | None
    ) -> Agreement:
        reached = [
            (p, a, b)
            for p, a, b in zip(self.processes.parameters, first, last, strict=True)
            if b >= 0
        ]
        chosen = {id(p) for p, a, b in reached if (a != b if shared is None else id(p) in shared)}
        return Agreement(
            active,
            [p for p, _, _ in reached],
            [p for p, _, _ in reached if id(p) in chosen],
            [p for p, _, _ in reached if id(p) not in chosen],
        )


def council_for(
    old: Council | None, replicas: Replicas | None, parameters: Sequence[Tensor] | None
) -> Council | None:
    """The council for a step; None where there is one process, or each acts on its own as the user asked.

    Args:
        old: the one of the step before, used again if nothing changed.
        replicas: what the user passed as `process_group`.
        parameters: those that may get a gradient.

    Raises:
        RuntimeError: there are several processes, and nobody averages their gradients.
        ValueError: the parameters are not given.
    """
    if not several_processes():
        return None
    if replicas is None and not any_sharded(parameters or ()):
        raise RuntimeError(
            "Surgery must act on the gradients of all processes together: each would step on its own batch, and the "
            "parameters would drift apart. Pass `process_group=True` (or a process group) to average the task "
            "gradients over the processes."
        )
    if not parameters:
        raise ValueError(
            "With `process_group` the parameters must be given, in the same order in all processes: pass `params`."
        )
    if old is None or list(map(id, parameters)) != list(map(id, old.processes.parameters)):
        old = Council(Processes(replicas, parameters))
    return old if old.processes.groups else None


def _digest(content: object) -> int:
    """A positive integer below 2^56 that differs where the text of `content` does."""
    return int.from_bytes(hashlib.blake2b(repr(content).encode(), digest_size=7).digest(), "big")
