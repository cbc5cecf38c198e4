"""A model of the cost of a step: fitted to some cells, compared with others, extended to machines we do not have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

Array = NDArray[np.float64]

TERMS: dict[str, Callable[[float, float], float]] = {
    "per step": lambda tasks, parameters: 1.0,
    "per task": lambda tasks, parameters: tasks,
    "per parameter": lambda tasks, parameters: parameters,
    "per task and parameter": lambda tasks, parameters: tasks * parameters,
    "per pair of tasks and parameter": lambda tasks, parameters: tasks**2 * parameters,
}
"""What a step can cost, by K and n. The first two are overhead of operations, whatever their size."""

OF_PASSES = tuple(TERMS)[:4]
OF_SURGERY = tuple(TERMS)


class Fit(NamedTuple):
    """Seconds for each unit of each term."""

    coefficients: dict[str, float]

    @classmethod
    def of(
        cls, names: Sequence[str], tasks: Sequence[int], sizes: Sequence[int], seconds: Array
    ) -> Fit:
        """Least squares of relative errors, with no term less than zero.

        Args:
            names: of `TERMS`.
            tasks: K of each cell.
            sizes: n of each cell.
            seconds: measured, positive.
        """
        pairs = list(zip(tasks, sizes, strict=True))
        matrix = np.array([[TERMS[name](k, n) for name in names] for k, n in pairs])
        relative = matrix / seconds[:, None]
        unit = relative.max(0)  # columns differ by ten orders of magnitude
        found, _ = nnls(relative / unit, np.ones(len(seconds)))
        return cls({name: float(c) for name, c in zip(names, found / unit, strict=True)})

    def predict(self, tasks: float, parameters: float) -> float:
        """Seconds."""
        return sum(c * TERMS[name](tasks, parameters) for name, c in self.coefficients.items())


def fit_exchange(
    messages: Sequence[float], sizes: Sequence[float], added: Array, total: Array
) -> Array:
    """`(2,)` seconds for each message and each byte.

    Args:
        messages: of each cell.
        sizes: bytes of each cell.
        added: seconds over the step of a single process.
        total: seconds of the step: errors are relative to it, since `added` may be lost in it.
    """
    relative = np.stack([messages, sizes], 1) / total[:, None]
    unit = relative.max(0)
    found: Array = nnls(relative / unit, added / total)[0] / unit
    return found


def exchanged(tasks: int, parameters: int, ranks: int, exchange: str) -> float:
    """Bytes of float32 that leave each process in a step, as docs/distributed.md has it."""
    share = (ranks - 1) / ranks
    rows = 2 * tasks if exchange == "all_reduce" else tasks + 1
    return 4 * rows * parameters * share


@dataclass(frozen=True)
class Machine:
    """What a prediction assumes: inputs, none of them measured.

    Args:
        flops: operations per second that a forward or backward pass reaches.
        memory: bytes per second between processor and memory.
        network: bytes per second that leave each process.
        launch: seconds to start an operation, however small.
        samples: in a forward pass of one process; one sample costs two operations for each parameter.
        tensors: parameter tensors of the network.
    """

    flops: float = 2e14
    memory: float = 2e12
    network: float = 2.5e10
    launch: float = 5e-6
    samples: int = 4096
    tensors: int = 200


class Operations(NamedTuple):
    """Operations that surgery adds to K bare backward passes: counted, for K tasks."""

    base: float
    per_tensor: float


def predict_step(
    machine: Machine, tasks: int, parameters: int, ranks: int, operations: Operations
) -> dict[str, Any]:
    """Seconds of a step by part, and its ratio to the plain summed step on the same machine.

    A pass forward takes 2 operations for each parameter and sample, one backward 4. Surgery reads each gradient,
    writes it to its row, reads the row for the Gramian and for the combination (4 K n numbers), writes the update and
    adds it to `.grad` (4 n); the Gramian takes 2 K^2 n operations. Parts follow each other; what a machine overlaps is
    to be taken off. The plain step exchanges its one gradient by an all-reduce.
    """
    forward = 2 * parameters * machine.samples / machine.flops
    parts = {
        "forward": forward,
        "backward": 2 * tasks * forward,
        "rows": 4 * (4 * tasks + 4) * parameters / machine.memory
        + 2 * tasks**2 * parameters / machine.flops,
        "exchange": exchanged(tasks, parameters, ranks, "reduce_scatter") / machine.network,
        "operations": machine.launch * (operations.base + operations.per_tensor * machine.tensors),
    }
    plain = 3 * forward + exchanged(1, parameters, ranks, "all_reduce") / machine.network
    total = sum(parts.values())
    return {
        "tasks": tasks,
        "parameters": parameters,
        "ranks": ranks,
        "milliseconds": {name: float(f"{1e3 * value:.4g}") for name, value in parts.items()},
        "total_ms": float(f"{1e3 * total:.4g}"),
        "over_plain": float(f"{total / plain:.4g}"),
    }


def assumptions(machine: Machine) -> dict[str, float]:
    """As they go into the JSON file."""
    return asdict(machine)
