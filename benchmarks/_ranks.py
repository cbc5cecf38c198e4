"""Steps with AGS in several processes of one machine: their time, and what they send.

`python -m benchmarks._ranks FILE` reads a list of cells from a JSON file and writes their results back to it. A fresh
interpreter forks the processes: autograd has not run in it yet, and torch is imported once for all of them.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor
from torch import distributed as dist
from torch import multiprocessing as mp
from torch.utils._python_dispatch import TorchDispatchMode

from agsurgery import AGS, GradientSurgery, Replicas
from benchmarks._measure import write_json

LAYERS, BATCH, RATE = 4, 8, 1e-6
WAIT = timedelta(seconds=300)


class RankCell(TypedDict):
    """One measurement: processes, tasks, parameters, and how the task gradients are averaged."""

    ranks: int
    tasks: int
    parameters: int
    exchange: str


class Network:
    """Square layers that all K losses share: distances of the output to K targets.

    Args:
        tasks: K.
        parameters: n; the width is chosen so that the layers hold about as many.
        device: where.
        layers: number of weight matrices.
        seed: of inputs and targets; the weights are the same for all seeds.
    """

    def __init__(
        self,
        tasks: int,
        parameters: int,
        device: torch.device,
        *,
        layers: int = LAYERS,
        seed: int = 0,
    ) -> None:
        width = max(1, round((parameters / layers) ** 0.5))
        torch.manual_seed(0)
        modules: list[torch.nn.Module] = []
        for _ in range(layers):
            linear = torch.nn.Linear(width, width, bias=False, device=device)
            modules += [linear, torch.nn.Tanh()]
        self.layers = torch.nn.Sequential(*modules)
        self.size = sum(p.numel() for p in self.layers.parameters())
        generator = torch.Generator().manual_seed(seed)
        self.inputs = torch.randn(BATCH, width, generator=generator).to(device)
        self.targets = torch.randn(tasks, BATCH, width, generator=generator).to(device)

    def losses(self) -> list[Tensor]:
        """K scalars, from one forward pass."""
        output = self.layers(self.inputs)
        return [(output - target).square().mean() for target in self.targets]


class Traffic(TorchDispatchMode):
    """Bytes that leave a process, for collectives that send no number more often than they must."""

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.share = (ranks - 1) / ranks
        self.bytes, self.messages = 0.0, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Count collectives by the tensor that holds the numbers of all processes, and let everything pass."""
        namespace, name = func._schema.name.split("::")
        if namespace == "c10d" and name != "barrier":
            self.messages += 1
            tensors = [t for a in args for t in _tensors(a)]
            whole = max(t.numel() * t.element_size() for t in tensors)
            # An all-reduce is a reduce-scatter and an all-gather.
            self.bytes += (2 if name.startswith("allreduce") else 1) * whole * self.share
        return func(*args, **(kwargs or {}))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for v in value for t in _tensors(v)] if isinstance(value, list | tuple) else []


def _cell(cell: RankCell, rank: int, rounds: int, steps: int) -> dict[str, Any]:
    """Time and traffic of one process."""
    cpu = torch.device("cpu")
    network = Network(cell["tasks"], cell["parameters"], cpu, seed=rank)
    base = torch.optim.SGD(network.layers.parameters(), lr=RATE)
    optimizer = GradientSurgery(base, AGS(), process_group=Replicas(exchange=cell["exchange"]))  # type: ignore[arg-type]

    def step() -> None:
        optimizer.zero_grad()
        optimizer.backward(network.losses())
        optimizer.step()

    for _ in range(steps):
        step()
    traffic = Traffic(cell["ranks"])
    with traffic:
        step()
    seconds: dict[str, list[float]] = {"cpu": [], "wall": []}
    gc.collect()
    for _ in range(rounds):
        if cell["ranks"] > 1:
            dist.barrier()
        wall, processor = time.perf_counter(), time.process_time()
        for _ in range(steps):
            step()
        seconds["cpu"].append((time.process_time() - processor) / steps)
        seconds["wall"].append((time.perf_counter() - wall) / steps)
    digest = sum(p.detach().double().sum().item() for p in network.layers.parameters())
    return {
        "size": network.size,
        "bytes": traffic.bytes,
        "messages": traffic.messages,
        "digest": digest,
        **seconds,
    }


def steps_per_block(parameters: int) -> int:
    """By size alone, since every process must make the same number."""
    return min(20, max(1, 1_000_000 // parameters))


def _work(rank: int, ranks: int, cells: list[RankCell], folder: str, rounds: int) -> None:
    torch.set_num_threads(1)
    store = Path(folder) / f"store{ranks}"
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=WAIT
    )
    _cell(cells[0], rank, 1, 1)  # whatever happens only once in a process
    found = [_cell(c, rank, rounds, steps_per_block(c["parameters"])) for c in cells]
    dist.barrier()
    dist.destroy_process_group()
    (Path(folder) / f"{ranks}-{rank}.json").write_text(json.dumps(found), encoding="utf-8")


def measure_ranks(cells: list[RankCell], rounds: int) -> list[dict[str, Any]]:
    """For each cell what its processes found: size, bytes, messages, and seconds by process and round.

    Raises:
        RuntimeError: a process failed, or the parameters drifted apart.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "cells.json"
        write_json(file, {"cells": cells, "rounds": rounds})
        root = Path(__file__).resolve().parent.parent
        command = [sys.executable, "-m", "benchmarks._ranks", str(file)]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"The processes must end well. They did not:\n{done.stderr}")
        results: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["results"]
    for cell, result in zip(cells, results, strict=True):
        if len(set(result["digest"])) != 1:
            raise RuntimeError(f"Parameters must be equal in all processes. They are not: {cell}")
    return results


def _main(file: Path) -> None:
    request = json.loads(file.read_text(encoding="utf-8"))
    cells: list[RankCell] = request["cells"]
    results: list[dict[str, Any]] = [{} for _ in cells]
    for ranks in sorted({cell["ranks"] for cell in cells}):
        mine = [i for i, cell in enumerate(cells) if cell["ranks"] == ranks]
        with tempfile.TemporaryDirectory() as folder:
            arguments = (ranks, [cells[i] for i in mine], folder, request["rounds"])
            mp.start_processes(_work, arguments, ranks, start_method="fork")  # type: ignore[no-untyped-call]
            texts = [(Path(folder) / f"{ranks}-{r}.json").read_text("utf-8") for r in range(ranks)]
        parts = [json.loads(text) for text in texts]
        for position, i in enumerate(mine):
            each = [part[position] for part in parts]
            results[i] = {key: [one[key] for one in each] for key in each[0]}
    write_json(file, {"results": results})


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
