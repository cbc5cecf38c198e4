"""The pool of workers, one process for each device, and the units that are given to them."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch

from .errors import UserError
from .sweep_cells import SharedCells
from .sweep_config import SweepConfig
from .sweep_progress import Progress, name_of
from .sweep_units import Unit, folders, read_unit, units_of
from .sweep_work import DEVICE, do_unit

__all__ = ["do_units", "resources"]


def do_units(config: SweepConfig) -> dict[str, str]:
    """Do the units that are not finished; returns what went wrong, by unit.

    Raises:
        UserError: A worker process died.
    """
    units = units_of(config)
    wanted = [
        unit
        for unit in units
        if any(read_unit(config, unit, folder) is None for folder in folders(config, unit))
    ]
    if not wanted:
        return {}
    progress = Progress(wanted, len(units))
    failed: dict[str, str] = {}
    waiting: dict[Future[float], Unit] = {}
    queue = list(wanted)
    cells = SharedCells(config, units)
    workers, devices = resources(config, len(wanted))
    with _executor(workers, devices) as pool:
        try:
            while queue or waiting:
                while queue and len(waiting) < workers:
                    unit = queue.pop(0)
                    cells.give(unit)
                    waiting[pool.submit(do_unit, config, unit)] = unit
                done, _ = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    unit = waiting.pop(future)
                    error = future.exception()
                    if isinstance(error, BrokenProcessPool):
                        raise UserError(
                            f"A worker process died while it worked on {name_of(unit)}: was the memory full? "
                            "The same command continues; try it with fewer workers."
                        )
                    if error is not None and not isinstance(error, Exception):
                        raise error
                    if error is not None:
                        failed[name_of(unit)] = f"{type(error).__name__}: {error}"
                    progress.report(unit, None if error else future.result())
                    cells.drop(unit, busy={*queue, *waiting.values()})
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failed


def resources(config: SweepConfig, units: int) -> tuple[int, list[str]]:
    """Number of processes, and the device of each."""
    device = config.pretrain.device
    gpus = torch.cuda.device_count() if device == "auto" and torch.cuda.is_available() else 0
    # A device that was named is one device, unless it is the processor.
    many = _cores() if device in ("auto", "cpu") else 1
    workers = min(config.workers or gpus or many, units)
    if gpus:
        return workers, [f"cuda:{i % gpus}" for i in range(workers)]
    return workers, [device] * workers


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextlib.contextmanager
def _executor(workers: int, devices: list[str]) -> Iterator[Executor]:
    """A pool whose workers know their device; a single worker is this process."""
    if workers == 1:
        before = os.environ.get(DEVICE)
        os.environ[DEVICE] = devices[0]
        try:
            yield _Inline()
        finally:
            os.environ.pop(DEVICE)
            if before is not None:
                os.environ[DEVICE] = before
        return
    # Not forked: torch has threads, and CUDA cannot be forked at all.
    context = multiprocessing.get_context("spawn")
    names = context.SimpleQueue()
    for device in devices:
        names.put(device)
    with ProcessPoolExecutor(
        workers,
        mp_context=context,
        initializer=_begin_worker,
        initargs=(names, max(1, _cores() // workers)),
    ) as pool:
        yield pool


class _Inline(Executor):
    """Does the work at once, in this process: one worker needs no second copy of torch."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        """A future that is done."""
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def _begin_worker(devices: Any, threads: int) -> None:
    os.environ[DEVICE] = devices.get()
    torch.set_num_threads(threads)

    def end_with_parent() -> None:
        """Without this a worker whose parent was killed would wait for work for ever."""
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
