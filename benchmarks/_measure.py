"""Interleaved timing, peak memory, and the record of where a number comes from."""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

Step = Callable[[], None]


@dataclass(frozen=True)
class Sample:
    """Mean seconds per step of one block of steps: on the clock, and of processor time of this process."""

    wall: float
    cpu: float


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of a few numbers."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise `values`; the quartiles of a single number are this number."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    def to_dict(self, digits: int = 4) -> dict[str, float]:
        """Rounded numbers for a JSON file."""
        return {
            "median": round(self.median, digits),
            "q25": round(self.low, digits),
            "q75": round(self.high, digits),
        }


def interleaved(
    steps: Mapping[str, Step],
    *,
    rounds: int,
    block_seconds: float,
    warmup: int,
    synchronise: Callable[[], None],
) -> dict[str, list[Sample]]:
    """Time every step in every round, so that a busy machine hits all of them alike.

    A round runs one block of each step after the other, starting with a different one each time. A block takes about
    `block_seconds` whatever the step costs; short steps run once more, untimed, in front of it, since the other
    arms have emptied the caches.

    Args:
        steps: what to time, by name.
        rounds: number of samples per name.
        block_seconds: length of a block in seconds; at least one step.
        warmup: untimed steps of each before the first round.
        synchronise: waits for the device; called before each look at the clock.

    Returns:
        For each name its samples, one per round: samples of equal position belong to the same round.
    """
    counts: dict[str, int] = {}
    for name, step in steps.items():
        _run(step, warmup, synchronise)
        once = _run(step, 1, synchronise).wall
        counts[name] = max(1, round(block_seconds / once))
    samples: dict[str, list[Sample]] = {name: [] for name in steps}
    order = list(steps)
    with _no_garbage_collection():
        for _ in range(rounds):
            for name in order:
                if counts[name] > 1:
                    _run(steps[name], 1, synchronise)
                samples[name].append(_run(steps[name], counts[name], synchronise))
            order = order[1:] + order[:1]
            gc.collect()
    return samples


def waiter(device: torch.device) -> Callable[[], None]:
    """What waits until a device has done its work; on a CPU there is nothing to wait for."""
    return partial(torch.cuda.synchronize, device) if device.type == "cuda" else _nothing


def _nothing() -> None:
    pass


def _run(step: Step, count: int, synchronise: Callable[[], None]) -> Sample:
    synchronise()
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(count):
        step()
    synchronise()
    return Sample((time.perf_counter() - wall) / count, (time.process_time() - cpu) / count)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def peak_bytes(build: Callable[[], Step], *, device: torch.device, steps: int = 3) -> int | None:
    """Largest number of bytes in live tensors while `build` makes a step and it runs a few times.

    Counted at torch's allocator, from the memory events of the profiler on a CPU and from the allocator's
    statistics on a GPU: exact and repeatable, where the resident size of a process depends on what malloc keeps.
    What existed before `build` does not count, what it makes (model, optimizer state, buffers) does.

    Returns:
        Bytes; None where this torch does not tell.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        _build_and_run(build, steps)
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device)) - before
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the profiler's own
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profiler:
            _build_and_run(build, steps)
    try:  # the memory events have no public accessor
        events = profiler.profiler.kineto_results.events()
        changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    except AttributeError:
        return None
    live = peak = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        live += change
        peak = max(peak, live)
    return peak or None


def _build_and_run(build: Callable[[], Step], steps: int) -> None:
    step = build()
    for _ in range(steps):
        step()


def environment(device: torch.device, packages: Sequence[str]) -> dict[str, Any]:
    """Commit, versions, machine and date of a measurement."""
    cuda = device.type == "cuda"
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if (status := _git("status", "--porcelain")) is None else bool(status),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
        "machine": {
            "cpu": _cpu_model(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "load": [round(load, 2) for load in _load()],
            "system": f"{platform.system()} {platform.machine()}",
            "gpu": torch.cuda.get_device_name(device) if cuda else None,
            "cuda": torch.version.cuda if cuda else None,
        },
    }


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _git(*arguments: str) -> str | None:
    """Answer of a read-only git command; None outside a checkout."""
    command = ["git", "--no-optional-locks", *arguments]
    folder = Path(__file__).resolve().parent
    try:
        answer = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()


def _version(package: str) -> str | None:
    if package == "torch":
        return str(torch.__version__)  # with the build, such as +cpu
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or "unknown"


def _load() -> tuple[float, ...]:
    return os.getloadavg() if hasattr(os, "getloadavg") else ()
