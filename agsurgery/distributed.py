"""Several processes: which of them average their gradients, and the collectives that do it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torch import distributed as dist

from agsurgery import kernels
from agsurgery.sharding import is_sharded

Exchange: TypeAlias = Literal["auto", "reduce_scatter", "all_reduce"]
"""How the rows of task gradients are averaged."""

Agree: TypeAlias = Literal["always", "once"]
"""How often the processes compare their tasks and parameters."""

ProcessGroup: TypeAlias = "Literal[True] | dist.ProcessGroup | Replicas"
"""The processes whose gradients are averaged: all, some, or some with options."""


@dataclass(frozen=True)
class Replicas:
    """Processes that hold the same parameters and compute gradients on batches of their own (DDP).

    Surgery acts on the gradients averaged over these processes, as `DistributedDataParallel` averages the gradient of
    a single loss, so that the parameters stay equal everywhere. With W processes, K tasks and n shared parameters:

    Args:
        group: a `torch.distributed.ProcessGroup` that this process belongs to; None: the default one.
        exchange: `"reduce_scatter"`: every process gets the average of a W-th of the columns of all task gradients,
            takes its part of the Gramian and of the update, and all parts are gathered; `(K + 1) n (W - 1) / W` numbers
            leave each process. `"all_reduce"`: every process gets the averages whole, `2 K n (W - 1) / W` numbers, in
            one exchange instead of K + 2. `"auto"`: `"all_reduce"` for parameters on the CPU, where gloo sums faster
            than it scatters and gathers, else `"reduce_scatter"`.
        agree: `"always"`: in every step the processes compare a few numbers, so that different tasks raise an error
            everywhere and a task may be absent from the batch of one of them. `"once"`: only in the first step; every
            process promises that the same losses reach the same parameters from then on. Where the group can send
            tensors on the CPU (`torch.distributed.init_process_group()` without a backend) the comparison does not wait
            for the GPU; a group of NCCL alone makes the host wait, unless it is made once.

    Raises:
        ValueError: an unknown word.
        TypeError: `group` is not a process group.

    Example:
        >>> Replicas(agree="once")
        Replicas(group=None, exchange='auto', agree='once')
    """

    group: dist.ProcessGroup | None = None
    exchange: Exchange = "auto"
    agree: Agree = "always"

    def __post_init__(self) -> None:
        for name, words in (("exchange", get_args(Exchange)), ("agree", get_args(Agree))):
            if getattr(self, name) not in words:
                known = ", ".join(f'"{word}"' for word in words)
                raise ValueError(f"`{name}` must be one of {known}. Got {getattr(self, name)!r}.")
        if self.group is not None and not isinstance(self.group, dist.ProcessGroup):
            raise TypeError(
                "`process_group` must be True (the default group), a torch.distributed.ProcessGroup that this process "
                f"belongs to, or agsurgery.Replicas. Got {self.group!r}."
            )

    def __deepcopy__(self, memo: object) -> Replicas:
        return self  # processes cannot be copied

    def __reduce__(self) -> Any:
        if self.group is not None:
            raise TypeError(
                "A process group cannot be pickled. Save `state_dict()`, or pass `process_group=True` for the default "
                "group, which is looked up when it is needed."
            )
        return Replicas, (None, self.exchange, self.agree)


def as_replicas(process_group: ProcessGroup | None) -> Replicas | None:
    """What the user passed as `process_group`: None, True, a process group or `Replicas`.

    Raises:
        TypeError: something else.
    """
    if process_group is None or isinstance(process_group, Replicas):
        return process_group
    return Replicas() if process_group is True else Replicas(process_group)


def several_processes() -> bool:
    """Whether `torch.distributed` was started with more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class Processes:
    """The processes that take part in a step.

    Args:
        replicas: those that average; None if parameters are only sharded.
        parameters: those that may get a gradient.
    """

    def __init__(self, replicas: Replicas | None, parameters: Sequence[Tensor]) -> None:
        self.replicas = replicas
        self.parameters = list(parameters)
        self.device = self.parameters[0].device
        self._group: Any = None
        self.size, self.rank = 1, 0
        if replicas is not None:
            self._group = dist.group.WORLD if replicas.group is None else replicas.group
            self.size, self.rank = dist.get_world_size(self._group), dist.get_rank(self._group)
        self.sharded = any(is_sharded(p) for p in self.parameters)
        self.groups = self._all_groups()
        self._mine: dict[Any, bool] = {}

    def _all_groups(self) -> list[Any]:
        """Every group within which something is exchanged: processes must agree in all of them."""
        groups = [self._group] if self.size > 1 else []
        meshes: list[Any] = []
        for parameter in self.parameters:
            sharded: Any = parameter
            if is_sharded(parameter) and sharded.device_mesh not in meshes:
                meshes.append(sharded.device_mesh)
        for mesh in meshes:
            for group in mesh.get_all_groups():
                if dist.get_world_size(group) > 1 and group not in groups:
                    groups.append(group)
        return groups

    @property
    def averaging(self) -> bool:
        """Whether there is a process group over which gradients are averaged."""
        return self.size > 1

    def averages(self, parameter: Tensor) -> bool:
        """Whether the gradients of a parameter must be averaged.

        Those of a parameter that is sharded over the processes of the group (FSDP2) have been averaged already; those
        of one that is sharded over other processes (tensor parallel, inside of data parallel) have not.
        """
        if not self.averaging:
            return False
        if not is_sharded(parameter):
            return True
        sharded: Any = parameter
        mesh = sharded.device_mesh
        if mesh not in self._mine:
            mine = set(dist.get_process_group_ranks(self._group))
            self._mine[mesh] = len(mine & set(mesh.mesh.flatten().tolist())) <= 1
        return self._mine[mesh]

    def cuts(self, device: torch.device) -> bool:
        """Whether each process gets a part of the averaged rows on a device, and not all of them."""
        if self.replicas is None or self.replicas.exchange == "all_reduce":
            return False
        return self.replicas.exchange == "reduce_scatter" or device.type != "cpu"

    # -- collectives --------------------------------------------------------------------------------

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over the processes that average, in place."""
        if self.averaging:
            dist.all_reduce(tensor, group=self._group)
        return tensor

    def average(self, tensor: Tensor) -> Tensor:
        """Mean over the processes that average, in place."""
        narrow = tensor.dtype == torch.float16  # whose sum might overflow
        if narrow:
            tensor.div_(self.size)
        self.sum(tensor)
        return tensor if narrow else tensor.div_(self.size)

    def mean_losses(self, losses: Tensor) -> Tensor:
        """Mean of the losses over all processes, in float64, on the device of the parameters.

        In one dtype everywhere: the zero of an absent task may have another than the losses of other processes.
        """
        mean = losses.to(self.device, kernels.solver_dtype(self.device), copy=True)
        for group in self.groups:
            dist.all_reduce(mean, group=group)
            mean.div_(dist.get_world_size(group))
        return mean

    def at_features(self, gramian: Tensor) -> Tensor:
        """The Gramian at the features of all processes, which hold those of different samples.

        A loss is the mean of those of the processes, so that each has a W-th of the gradient at its features.
        """
        return self.sum(gramian.to(self.device, copy=True)).div_(self.size**2)

    def stored_length(self, columns: int, unit: int) -> int:
        """Length of a row that can be cut into equal parts of whole units."""
        step = self.size * unit
        return -(-columns // step) * step

    def scatter(self, rows: Tensor, out: Tensor) -> Tensor:
        """Averages of this process's part of the columns.

        Args:
            rows: `(K, W m)`; changed if they are float16.
            out: `(K, m)`.

        Returns:
            `out`.
        """
        narrow = rows.dtype == torch.float16
        if narrow:
            rows.div_(self.size)
        # One exchange for each row: one for all would need the rows rearranged, in memory of their size.
        pending = [
            _reduce_scatter()(part, row, group=self._group, async_op=True)
            for part, row in zip(out.unbind(), rows.unbind(), strict=True)
        ]
        for work in pending:
            work.wait()
        return out if narrow else out.div_(self.size)

    def gather(self, part: Tensor, out: Tensor) -> Tensor:
        """All parts `(m,)` side by side in `out` `(W m,)`."""
        _all_gather()(out, part, group=self._group)
        return out

    def most(self, values: Sequence[int]) -> list[int]:
        """Elementwise maximum of some integers over all processes of all groups, on the host."""
        for device in ("cpu", self.device):
            found = torch.tensor(values, dtype=torch.int64, device=device)
            try:
                for group in self.groups:
                    dist.all_reduce(found, op=dist.ReduceOp.MAX, group=group)
            except RuntimeError as error:
                # Raised before anything is sent, and in every process alike.
                if device != "cpu" or "backend type associated with device" not in str(error):
                    raise
                continue
            return list(map(int, found.tolist()))
        raise AssertionError("unreachable")

    def equal(self, values: Sequence[float], tolerance: float) -> bool:
        """Whether some numbers are the same in all processes of all groups, on the host.

        Args:
            values: of this process; those that are not finite are not compared.
            tolerance: relative to the largest of them.
        """
        numbers = [value if math.isfinite(value) else 0.0 for value in values]
        pairs = torch.tensor(
            [*numbers, *(-n for n in numbers)], dtype=torch.float64, device=self.device
        )
        for group in self.groups:
            dist.all_reduce(pairs, op=dist.ReduceOp.MAX, group=group)
        highest, negated = pairs.view(2, -1).tolist()
        largest = max(map(abs, [*highest, *negated]), default=0.0)
        pairs_of = zip(highest, negated, strict=True)
        return all(high + low <= tolerance * largest for high, low in pairs_of)

    def texts(self, own: str) -> list[str]:
        """What the processes say, each different text once."""
        said = {own}
        for group in self.groups:
            gathered: list[Any] = [None] * dist.get_world_size(group)
            dist.all_gather_object(gathered, sorted(said), group=group)
            said |= {text for texts in gathered for text in texts}
        return sorted(said)


class Part:
    """This process's part of the averaged rows of one bucket.

    Args:
        processes: those that average.
        length: of the rows; a multiple of the number of processes.
    """

    def __init__(self, processes: Processes, length: int) -> None:
        self._processes = processes
        self.columns = length // processes.size
        self.start = processes.rank * self.columns
        self._rows: Tensor | None = None

    def rows(self, tasks: int) -> Tensor:
        """`(K, m)` averages; after `take`."""
        assert self._rows is not None
        return self._rows.narrow(0, 0, tasks)

    def take(self, rows: Tensor) -> None:
        """Average `(K, W m)` rows over the processes, and keep this one's part."""
        if self._rows is None or self._rows.shape[0] < rows.shape[0]:
            self._rows = rows.new_empty(rows.shape[0], self.columns)
        self._processes.scatter(rows, self.rows(rows.shape[0]))

    def whole(self, combine: Callable[..., Tensor], dtype: torch.dtype) -> Callable[..., Tensor]:
        """A function that writes the whole update, made from one that writes this process's part.

        Args:
            combine: writes `(m,)` into its argument `out`.
            dtype: of the update.
        """

        def gathered(out: Tensor, accumulate: bool = False) -> Tensor:
            part = combine(out=torch.empty(self.columns, dtype=dtype, device=out.device))
            if accumulate:
                return out.add_(self._processes.gather(part, torch.empty_like(out)))
            return self._processes.gather(part, out)

        return gathered


class Shifted:
    """A method for single coordinates, told where the coordinates of this process lie among those of all.

    At the features every process has coordinates of its own, those of its samples. With equal batches they have the
    places that they have in one process with the whole batch.

    Args:
        method: has `begin` and `combine`.
        processes: those that average.
    """

    def __init__(self, method: Any, processes: Processes) -> None:
        self._method, self._processes = method, processes

    def begin(self, device: torch.device) -> None:
        """See `RowMethod.begin`."""
        self._method.begin(device)

    def combine(self, rows: Tensor, start: int = 0) -> Tensor:
        """See `RowMethod.combine`."""
        place = start * self._processes.size + self._processes.rank * rows.shape[1]
        update: Tensor = self._method.combine(rows, place)
        return update


# torch 2.13 renamed both.
@functools.cache
def _reduce_scatter() -> Any:
    return getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@functools.cache
def _all_gather() -> Any:
    return getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
