"""Checks that run in several processes: started once for a whole file of them, each reported on its own.

`python -m tests._distributed MODULE WORLD FILE BACKEND` runs every function of a module whose name begins with
`check_`, in WORLD processes, and writes what went wrong to a file. A fresh interpreter forks them after its imports:
faster than spawning each, and no thread of autograd exists yet.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing as mp

from agsurgery import agreement

Check = Callable[[int, int], None]
"""A check gets its rank and the number of processes."""

WAIT = timedelta(seconds=60)
"""After this a collective that does not end is an error."""


def checks(module: str) -> dict[str, Check]:
    content = vars(sys.modules.get(module) or importlib.import_module(module))
    return {name: value for name, value in content.items() if name.startswith("check_")}


def outcomes(module: str, world: int = 2, backend: str = "gloo") -> dict[str, str]:
    """For each check of a module what went wrong, by process; empty where all is well."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "outcomes.json"
        arguments = [module, str(world), str(file), backend]
        command = [sys.executable, "-m", "tests._distributed", *arguments]
        root = Path(__file__).parent.parent
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, cwd=root, env=environment, capture_output=True, text=True, timeout=300
        )
        if not file.exists():
            pytest.fail(f"The processes did not report.\n{done.stdout}\n{done.stderr}")
        return json.loads(file.read_text(encoding="utf-8"))


@contextmanager
def alone() -> Iterator[None]:
    """Surgery inside acts as in a single process: the reference."""
    there = agreement.several_processes
    agreement.several_processes = lambda: False
    try:
        yield
    finally:
        agreement.several_processes = there


def equal_everywhere(tensors: list[torch.Tensor], world: int) -> bool:
    """Whether tensors are the same to the last bit in all processes."""
    flat = torch.cat([t.detach().double().reshape(-1) for t in tensors])
    all_of_them = [torch.empty_like(flat) for _ in range(world)]
    dist.all_gather(all_of_them, flat)
    return all(torch.equal(flat, other) for other in all_of_them)


def _work(rank: int, module: str, world: int, folder: str, backend: str) -> None:
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    found: dict[str, str] = {}
    for name, check in checks(module).items():
        start = time.perf_counter()
        torch.manual_seed(0)
        store = Path(folder) / name
        # A group of its own: what one check left unfinished must not meet the next.
        dist.init_process_group(
            backend, init_method=f"file://{store}", rank=rank, world_size=world, timeout=WAIT
        )
        found[name] = ""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                # Of torch itself, in its own FSDP2, DTensor and checkpoints.
                warnings.filterwarnings("ignore", message=".*is deprecated")
                warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* view tensor")
                check(rank, world)
            dist.barrier()  # whoever leaves early closes connections that others still open
        except BaseException:
            found[name] = f"process {rank}:\n{traceback.format_exc()}"
        dist.destroy_process_group()
        (Path(folder) / f"rank{rank}").write_text(json.dumps(found), encoding="utf-8")
        if os.environ.get("AGSURGERY_TIMES") and rank == 0:
            print(f"{time.perf_counter() - start:6.2f} {name}", flush=True)


def _main(module: str, world: int, file: str, backend: str) -> None:
    importlib.import_module(module)
    # DDP and FSDP2 import it late; here it is imported once for all processes.
    importlib.import_module("torch._dynamo")
    with tempfile.TemporaryDirectory() as folder:
        died = "did not come to an end"
        # A process that has used CUDA cannot be forked.
        method = "spawn" if backend == "nccl" else "fork"
        try:
            mp.start_processes(_work, (module, world, folder, backend), world, start_method=method)
        except (
            Exception
        ) as error:  # gloo aborts the process when messages have another size than expected
            died = str(error)
        files = [path for r in range(world) if (path := Path(folder) / f"rank{r}").exists()]
        parts = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    joined = {
        name: "\n".join(filter(None, (part.get(name, died) for part in parts))) if parts else died
        for name in checks(module)
    }
    Path(file).write_text(json.dumps(joined), encoding="utf-8")


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4])
