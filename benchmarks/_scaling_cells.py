"""Measured cells of the benchmark of scaling: steps by tasks and parameters, the solver alone, operations counted."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from agsurgery import AGS, GradientSurgery
from benchmarks._measure import Sample, Spread, Step, interleaved, waiter
from benchmarks._ranks import LAYERS, RATE, Network
from benchmarks._scaling_model import Operations

ARMS = ("plain sum", "K passes", "AGS")


def needed_bytes(tasks: int, parameters: int) -> int:
    """Live tensors of a step: weights, `.grad`, the gradient of one pass, the update, and K rows, in float32."""
    return 4 * parameters * (tasks + 4)


def steps_of(network: Network) -> dict[str, Step]:
    """The three arms, on one network: the learning rate is too small to matter."""
    parameters = list(network.layers.parameters())
    plain = torch.optim.SGD(parameters, lr=RATE)
    surgery = GradientSurgery(torch.optim.SGD(parameters, lr=RATE), AGS())

    def sum_step() -> None:
        plain.zero_grad()
        torch.stack(network.losses()).sum().backward()  # type: ignore[no-untyped-call]
        plain.step()

    def passes_step() -> None:
        plain.zero_grad()
        losses = network.losses()
        for task, loss in enumerate(losses):
            loss.backward(retain_graph=task + 1 < len(losses))  # type: ignore[no-untyped-call]
        plain.step()

    def surgery_step() -> None:
        surgery.zero_grad()
        surgery.backward(network.losses())
        surgery.step()

    return dict(zip(ARMS, (sum_step, passes_step, surgery_step), strict=True))


def measure_cell(
    tasks: int, parameters: int, device: torch.device, rounds: int, block: float
) -> dict[str, Any]:
    """Milliseconds of the three arms."""
    network = Network(tasks, parameters, device)
    samples = interleaved(
        steps_of(network), rounds=rounds, block_seconds=block, warmup=1, synchronise=waiter(device)
    )
    return {
        "tasks": tasks,
        "parameters": network.size,
        **{name: _times(found, device) for name, found in samples.items()},
        "over_plain": _ratio(samples, ARMS[0], device),
        "over_passes": _ratio(samples, ARMS[1], device),
    }


def _seconds(sample: Sample, device: torch.device) -> float:
    """The better witness: processor time, unless the work is done elsewhere."""
    return sample.wall if device.type == "cuda" else sample.cpu


def _times(samples: list[Sample], device: torch.device) -> dict[str, Any]:
    return {
        "ms": float(f"{1e3 * statistics.median(_seconds(s, device) for s in samples):.5g}"),
        "wall_ms": Spread.of([1e3 * s.wall for s in samples]).to_dict(),
        "cpu_ms": Spread.of([1e3 * s.cpu for s in samples]).to_dict(),
    }


def _ratio(samples: dict[str, list[Sample]], to: str, device: torch.device) -> float:
    pairs = zip(samples["AGS"], samples[to], strict=True)
    return round(statistics.median(_seconds(a, device) / _seconds(b, device) for a, b in pairs), 3)


def solver_seconds(
    tasks: Sequence[int], device: torch.device, rounds: int, block: float
) -> dict[int, float]:
    """Median seconds of AGS on a K x K Gramian, for each K."""
    method, steps = AGS(), {}
    for k in tasks:
        rows = torch.randn(k, 4 * k, generator=torch.Generator().manual_seed(k)).double()
        gramian = (rows @ rows.T).to(device)
        steps[str(k)] = lambda gramian=gramian: (method(gramian), None)[1]
    samples = interleaved(
        steps, rounds=rounds, block_seconds=block, warmup=2, synchronise=waiter(device)
    )
    return {int(k): statistics.median(_seconds(s, device) for s in v) for k, v in samples.items()}


class _Counter(TorchDispatchMode):
    """Operations that do work: views are free."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def operations(tasks: int) -> Operations:
    """Operations that AGS adds to K bare backward passes, from networks of two depths."""

    def added(layers: int) -> int:
        network = Network(tasks, 16 * layers, torch.device("cpu"), layers=layers)
        parameters = list(network.layers.parameters())
        surgery = steps_of(network)["AGS"]

        def bare() -> None:
            for loss in (losses := network.losses()):
                torch.autograd.grad(loss, parameters, retain_graph=loss is not losses[-1])

        counts = []
        for step in (surgery, bare):
            step()
            with _Counter() as counter:
                step()
            counts.append(counter.count)
        return counts[0] - counts[1]

    shallow, deep = added(LAYERS), added(2 * LAYERS)
    per_tensor = (deep - shallow) / LAYERS
    return Operations(shallow - per_tensor * LAYERS, per_tensor)
