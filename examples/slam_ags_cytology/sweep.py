"""Arms x witness rates x draws x seeds: how results depend on the share of abnormal cells.

A *draw* is a new choice of bags from the same pools of cells, together with a new seed of the pretraining; within a
draw the MIL training is repeated with several seeds. OUT/rate-R/draw-D is an ordinary run folder, which the other
commands understand. Whatever is finished is kept: the same command after an interruption, of whatever kind,
continues, and a larger grid in the same folder adds what is missing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import multiprocessing
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from .arms import ARMS, check_arm
from .bags import BagsConfig, bags
from .colour import COLOUR, colour
from .embed import EmbedConfig, embed
from .errors import UserError, listing
from .evaluate import EvaluateConfig, check_top_k, evaluate, measure_arm
from .files import write_text
from .manifest import read_manifest
from .mil import MilConfig, mil
from .pretrain import PretrainConfig, pretrain
from .recipe import Recipe
from .report import ReportConfig, report
from .results import read_status
from .run import of_synthetic
from .sharing import drop_store, share_store
from .store import open_store
from .sweep_report import sweep_report
from .sweep_summary import summarise, sweep_table, sweep_text
from .synthetic import SyntheticConfig, synthetic

__all__ = ["SweepConfig", "sweep"]

RECIPE = 1
"""Raised whenever a unit of work changes, so that results of an older version are made anew."""

_HERE = Path()  # the steps' own `out`: replaced by the run's


@dataclass(frozen=True)
class SweepConfig:
    """Repeat a run over arms, witness rates, draws and seeds, and compare with intervals.

    Uses one process per GPU, or one per core; an interrupted sweep continues when the same command is given again.
    """

    out: Path
    """Folder of the sweep, with a run folder for every part of the grid. Writes OUT/sweep.csv, OUT/summary.json and
    OUT/report.html."""
    arms: tuple[str, ...] = ("random", "simclr", "sum", "ags")
    """Pretrainings to compare; see pretrain --help."""
    witness_rates: tuple[float, ...] = (0.1, 0.05, 0.01, 0.005)
    """Shares of abnormal cells in a positive bag. The paper: from 0.1 down to 0.005."""
    draws: int = 3
    """Draws of bags; each also pretrains with a seed of its own. Intervals are over draws."""
    colour: bool = True
    """Add the arm `colour`: mean colours in place of an encoder, the baseline that every encoder must beat."""
    shared_encoder: bool = False
    """Pretrain at the highest witness rate only, and use that encoder at all rates of the same draw."""
    curriculum: bool = False
    """Start the MIL training of each witness rate from the model of the next higher one; implies shared_encoder,
    because features of two encoders have nothing to do with each other. Uses data that a laboratory with
    low rates alone does not have."""
    reference: str = "sum"
    """Arm from which the differences of the others are given, paired by draw."""
    workers: int | None = None
    """Processes. None: one for each GPU, or else for each core."""
    only_report: bool = False
    """Work on nothing: write table, summary and page of what is finished so far, as while a sweep is running."""
    keep_stores: bool = False
    """Keep the decoded cells of finished runs."""
    synthetic: SyntheticConfig = field(
        default_factory=lambda: SyntheticConfig(out=_HERE, difficulty=0.0)
    )
    """Synthetic cells, used when the bags options name no cells."""
    bags: BagsConfig = field(
        default_factory=lambda: BagsConfig(out=_HERE, bag_size=200, reuse_normals=True)
    )
    """Bags. witness_rate is set by the sweep, seed is that of the first draw."""
    pretrain: PretrainConfig = field(default_factory=lambda: PretrainConfig(out=_HERE))
    """Pretraining; seed is that of the first draw."""
    embed: EmbedConfig = field(default_factory=lambda: EmbedConfig(out=_HERE))
    """Embedding of all bags."""
    mil: MilConfig = field(default_factory=lambda: MilConfig(out=_HERE))
    """Multiple-instance learning, once for each of its seeds."""
    evaluate: EvaluateConfig = field(default_factory=lambda: EvaluateConfig(out=_HERE))
    """Metrics."""
    report: ReportConfig = field(default_factory=lambda: ReportConfig(out=_HERE))
    """The reports with cells, one per witness rate, of the first draw."""

    @property
    def all_arms(self) -> tuple[str, ...]:
        """The pretrainings, and the colours if asked for."""
        return (*self.arms, COLOUR) if self.colour else self.arms

    @property
    def rates(self) -> tuple[float, ...]:
        """Witness rates, the highest first: the order of a curriculum."""
        return tuple(sorted(self.witness_rates, reverse=True))


@dataclass(frozen=True)
class Unit:
    """What one worker does without interruption: an arm on the bags of one draw, at one rate or at several in turn."""

    arm: str
    draw: int
    rates: tuple[float, ...]


def sweep(config: SweepConfig) -> Path:
    """Carry out what is missing of the grid, and return the path of the report.

    Raises:
        UserError: A setting or the data do not allow it, or a part of the grid failed (the rest is finished first).
    """
    _check(config)
    config.out.mkdir(parents=True, exist_ok=True)
    with _quiet(config.out / "sweep.log"):
        config = _with_cells(config)
        for draw in range(config.draws):
            for rate in config.rates:
                bags(_bags_config(config, draw, rate))
    write_text(config.out / "sweep.json", json.dumps(asdict(config), indent=1, default=str) + "\n")
    failed = {} if config.only_report else _work(config)
    rows = [row for unit in _units(config) for row in _finished_rows(config, unit)]
    if not rows:
        raise UserError(
            f"No part of the sweep is finished. {_failures(failed) if failed else 'Run it first.'}"
        )
    table = sweep_table(rows, config.all_arms, config.rates)
    summary = summarise(table, _facts(config, rows))
    with _quiet(config.out / "sweep.log"):
        _run_reports(config)
    sweep_report(config.out, table, summary)
    print(sweep_text(summary))
    if failed:
        raise UserError(_failures(failed))
    return config.out / "report.html"


def run_folder(out: Path, rate: float, draw: int) -> Path:
    """Run folder of one cell of the grid."""
    return out / f"rate-{rate:g}" / f"draw-{draw}"


# --- the grid ------------------------------------------------------------------------------------


def _check(config: SweepConfig) -> None:
    if not config.arms:
        raise UserError(f"arms must be some of {', '.join(ARMS)}. Got none.")
    for arm in config.arms:
        check_arm(arm)
    if config.draws < 1:
        raise UserError(f"draws must be at least 1. Got {config.draws}. Take 3 or more.")
    if config.workers is not None and config.workers < 1:
        raise UserError(f"workers must be at least 1. Got {config.workers}. Leave it out for all.")
    if config.bags.slides is not None:
        raise UserError(
            "A sweep draws bags at several witness rates, so it needs cells. Slides have the rates "
            "that they have: use `run` for them."
        )
    if config.mil.start is not None:
        raise UserError("mil.start must not be set: use curriculum.")
    check_top_k(config.evaluate.top_k)
    if config.out.exists() and not config.out.is_dir():
        raise UserError(f"out must be a folder. {config.out} is a file.")
    for step in ("synthetic", "bags", "pretrain", "embed", "mil", "evaluate", "report"):
        if getattr(config, step).out != _HERE:
            raise UserError(f"{step}.out must not be set: the sweep has its own out.")
    for rate in config.witness_rates:
        if not 0 < rate <= 1:
            raise UserError(f"witness_rates must be above 0 and at most 1. Got {rate}.")
    counts = [Recipe.of(replace(config.bags, witness_rate=rate)).positives for rate in config.rates]
    for (rate, count), (other, same) in pairwise(zip(config.rates, counts, strict=True)):
        if count == same:
            raise UserError(
                f"Every witness rate must give other bags. Rates {rate:g} and {other:g} both put {count} abnormal "
                f"cell(s) into a bag of {config.bags.bag_size}. Raise bags.bag_size or leave one out."
            )


def _with_cells(config: SweepConfig) -> SweepConfig:
    """The configuration with a folder of cells: the user's, or synthetic ones drawn now."""
    if config.bags.cells is not None:
        return config
    cells = synthetic(replace(config.synthetic, out=config.out))
    return replace(config, bags=of_synthetic(config.bags, cells))


def _bags_config(config: SweepConfig, draw: int, rate: float) -> BagsConfig:
    return replace(
        config.bags,
        out=run_folder(config.out, rate, draw),
        witness_rate=rate,
        seed=config.bags.seed + draw,
    )


def _units(config: SweepConfig) -> list[Unit]:
    """All work, draw by draw, so that an unfinished sweep has whole draws."""
    together = config.shared_encoder or config.curriculum
    groups = [config.rates] if together else [(rate,) for rate in config.rates]
    return [
        Unit(arm, draw, rates)
        for draw in range(config.draws)
        for rates in groups
        for arm in config.all_arms
    ]


def _folders(config: SweepConfig, unit: Unit) -> list[Path]:
    return [run_folder(config.out, rate, unit.draw) for rate in unit.rates]


def _fingerprint(config: SweepConfig, folder: Path) -> str:
    """Hash of all that decides about the result of a unit, but for its arm and seeds."""
    settings: dict[str, Any] = {
        "recipe": RECIPE,
        "shared": config.shared_encoder or config.curriculum,
        "curriculum": config.curriculum,
        "top_k": config.evaluate.top_k,
        "manifest": hashlib.sha256((folder / "manifest.csv").read_bytes()).hexdigest(),
    }
    if settings["shared"]:
        settings["rates"] = list(config.rates)
    places = ("out", "arm", "arms", "seeds", "device", "workers", "channels_last", "tensorboard")
    for step in ("pretrain", "embed", "mil"):
        values = asdict(getattr(config, step))
        settings[step] = {key: value for key, value in values.items() if key not in places}
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def _read(config: SweepConfig, unit: Unit, folder: Path) -> dict[str, Any] | None:
    """The finished result of a unit in one run folder, if it is of these settings and has all seeds."""
    try:
        found: dict[str, Any] = json.loads(_unit_path(folder, unit.arm).read_text(encoding="utf-8"))
        same = found["fingerprint"] == _fingerprint(config, folder)
        whole = {*config.mil.seeds} <= {row["seed"] for row in found["rows"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if same and whole else None


def _unit_path(folder: Path, arm: str) -> Path:
    return folder / "units" / f"{arm}.json"


def _finished_rows(config: SweepConfig, unit: Unit) -> list[dict[str, Any]]:
    rows = []
    for rate, folder in zip(unit.rates, _folders(config, unit), strict=True):
        found = _read(config, unit, folder)
        for row in found["rows"] if found else ():
            if row["seed"] in config.mil.seeds:
                ending = {key: found[key] for key in ("collapsed", "weak")} if found else {}
                rows.append({**row, "draw": unit.draw, "rate": rate, **ending})
    return rows


# --- the work ------------------------------------------------------------------------------------


def _work(config: SweepConfig) -> dict[str, str]:
    """Do the units that are not finished; returns what went wrong, by unit."""
    units = _units(config)
    wanted = [
        unit
        for unit in units
        if any(_read(config, unit, folder) is None for folder in _folders(config, unit))
    ]
    if not wanted:
        return {}
    progress = _Progress(config, wanted, len(units))
    failed: dict[str, str] = {}
    store = None
    waiting: dict[Future[float], Unit] = {}
    queue = list(wanted)
    workers, devices = _resources(config, len(wanted))
    with _executor(workers, devices) as pool:
        try:
            while queue or waiting:
                while queue and len(waiting) < workers:
                    unit = queue.pop(0)
                    for folder in _folders(config, unit):
                        finished = _read(config, unit, folder) is not None
                        if (
                            not finished
                            and not (folder / f"cells-{config.pretrain.patch}.json").exists()
                        ):
                            store = store or _all_cells(config, units)
                            manifest = read_manifest(folder / "manifest.csv", check_files=False)
                            share_store(store, manifest["path"], folder)
                    waiting[pool.submit(_do, config, unit)] = unit
                done, _ = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    unit = waiting.pop(future)
                    error = future.exception()
                    if isinstance(error, BrokenProcessPool):
                        raise UserError(
                            f"A worker process died while it worked on {_name(unit)}: was the memory full? "
                            "The same command continues; try it with fewer workers."
                        )
                    if error is not None and not isinstance(error, Exception):
                        raise error
                    if error is not None:
                        failed[_name(unit)] = f"{type(error).__name__}: {error}"
                    progress.report(unit, None if error else future.result())
                    busy = {*queue, *waiting.values()}
                    _drop_stores(config, unit, busy)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failed


def _all_cells(config: SweepConfig, units: Sequence[Unit]) -> Any:
    """One store with the cells of all runs, decoded once, also when a sweep is continued."""
    paths: dict[str, None] = {}
    for folder in dict.fromkeys(f for unit in units for f in _folders(config, unit)):
        paths |= dict.fromkeys(read_manifest(folder / "manifest.csv", check_files=False)["path"])
    return open_store(sorted(paths), config.pretrain.patch, config.out)


def _drop_stores(config: SweepConfig, unit: Unit, busy: set[Unit]) -> None:
    if config.keep_stores:
        return
    used = {folder for other in busy for folder in _folders(config, other)}
    for folder in {*_folders(config, unit)} - used:
        drop_store(folder, config.pretrain.patch)


def _resources(config: SweepConfig, units: int) -> tuple[int, list[str]]:
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
    if workers == 1:
        before = os.environ.get(_DEVICE)
        os.environ[_DEVICE] = devices[0]
        try:
            yield _Inline()
        finally:
            os.environ.pop(_DEVICE)
            if before is not None:
                os.environ[_DEVICE] = before
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


_DEVICE = "SLAM_AGS_SWEEP_DEVICE"
"""Where this process computes; an environment variable, as it belongs to the process and not to the settings."""


class _Inline(Executor):
    """Does the work at once, in this process: one worker needs no second copy of torch."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def _begin_worker(devices: Any, threads: int) -> None:
    os.environ[_DEVICE] = devices.get()
    torch.set_num_threads(threads)

    def end_with_parent() -> None:
        """Without this a worker whose parent was killed would wait for work for ever."""
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _do(config: SweepConfig, unit: Unit) -> float:
    """Carry out one unit; returns its seconds."""
    begin = time.monotonic()
    above: Path | None = None
    for folder in _folders(config, unit):
        if _read(config, unit, folder) is None:
            folder.mkdir(parents=True, exist_ok=True)
            with _quiet(folder / f"{unit.arm}.log"):
                _do_in(config, unit, folder, above)
        above = folder
    return time.monotonic() - begin


def _do_in(config: SweepConfig, unit: Unit, folder: Path, above: Path | None) -> None:
    """One arm in one run folder; `above` is the folder of the next higher rate if encoders are shared."""
    device = os.environ[_DEVICE]
    embedding = replace(config.embed, out=folder, device=device)
    if unit.arm == COLOUR:
        colour(embedding, config.pretrain.patch)
    else:
        if above is None:
            seed = config.pretrain.seed + unit.draw
            pretrain(replace(config.pretrain, out=folder, arm=unit.arm, seed=seed, device=device))
        else:
            _copy_encoder(above, folder, unit.arm)
        embed(replace(embedding, arms=(unit.arm,)))
    start = above if config.curriculum else None
    # At the highest rate there is nothing learnt yet that could be held fixed.
    freeze = () if config.curriculum and above is None else config.mil.freeze
    learning = replace(config.mil, out=folder, arms=(unit.arm,), device=device)
    mil(replace(learning, start=start, freeze=freeze))
    rows = measure_arm(folder, unit.arm, config.mil.seeds, config.evaluate.top_k)
    status = read_status(folder, unit.arm) or {}
    content = {
        "fingerprint": _fingerprint(config, folder),
        "collapsed": bool(status.get("collapsed", False)),
        "weak": bool(status.get("weak", False)),
        "rows": [{key: _json(value) for key, value in row.items()} for row in rows],
    }
    _unit_path(folder, unit.arm).parent.mkdir(exist_ok=True)
    write_text(_unit_path(folder, unit.arm), json.dumps(content, allow_nan=False) + "\n")


def _json(value: Any) -> Any:
    if isinstance(value, float):
        return None if math.isnan(value) else value
    return value.item() if hasattr(value, "item") else value


def _copy_encoder(above: Path, folder: Path, arm: str) -> None:
    """The files of the encoder, with the record of how it was made: it was trained on bags of another rate."""
    source, target = above / "pretrain" / arm, folder / "pretrain" / arm
    target.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "log.csv", "status.json", "encoder.pt"):  # the encoder last
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)


def _run_reports(config: SweepConfig) -> None:
    """Pages with cells, for the first draw of each rate."""
    for rate in config.rates:
        folder = run_folder(config.out, rate, 0)
        there = tuple(
            arm
            for arm in config.all_arms
            if _read(config, Unit(arm, 0, (rate,)), folder) is not None
        )
        if not there:
            continue
        try:
            evaluate(replace(config.evaluate, out=folder, arms=there))
            report(replace(config.report, out=folder, arms=there))
        except UserError as error:  # such as seeds of earlier settings beside the present ones
            print(f"No page for {folder}: {error}")


# --- what is said meanwhile ----------------------------------------------------------------------


@contextlib.contextmanager
def _quiet(log: Path) -> Iterator[None]:
    """What the steps print goes to a file: several write at the same time."""
    with (
        log.open("a", encoding="utf-8", errors="replace") as stream,
        contextlib.redirect_stdout(stream),
        contextlib.redirect_stderr(stream),
    ):
        yield


class _Progress:
    """A line per finished unit, with the time left: by kind of unit, since a random encoder costs next to nothing."""

    def __init__(self, config: SweepConfig, wanted: Sequence[Unit], total: int) -> None:
        self.begin = time.monotonic()
        self.weight = {unit: self._weight(unit) for unit in wanted}
        self.done, self.finished = 0.0, total - len(wanted)
        self.total = total
        if self.finished:
            print(f"Continuing: {self.finished} of {total} parts are finished.", flush=True)

    @staticmethod
    def _weight(unit: Unit) -> float:
        """Expected cost; measured at the default settings: MIL and embedding take a tenth of a pretraining."""
        trained = 0 if unit.arm in ("random", COLOUR) else 1
        return trained + 0.1 * len(unit.rates)

    def report(self, unit: Unit, seconds: float | None) -> None:
        self.done += self.weight[unit]
        self.finished += 1
        elapsed = time.monotonic() - self.begin
        left = elapsed / self.done * (sum(self.weight.values()) - self.done)
        how = "FAILED" if seconds is None else f"{seconds:.0f} s"
        print(
            f"[{self.finished}/{self.total}] {_name(unit)}: {how}. "
            f"Elapsed {_clock(elapsed)}, about {_clock(left)} left.",
            flush=True,
        )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


def _name(unit: Unit) -> str:
    rates = " to ".join(dict.fromkeys(f"{100 * r:g} %" for r in (unit.rates[0], unit.rates[-1])))
    return f"{unit.arm} at {rates}, draw {unit.draw}"


def _failures(failed: dict[str, str]) -> str:
    return (
        f"{len(failed)} part(s) of the sweep failed: "
        f"{listing(f'{name} ({error})' for name, error in failed.items())}. "
        "The same command tries them again."
    )


def _facts(config: SweepConfig, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What a reader must know before the figures."""
    done = {(row["arm"], row["rate"], row["draw"]) for row in rows}
    return {
        "arms": list(config.all_arms),
        "witness_rates": list(config.rates),
        "draws": config.draws,
        "mil_seeds": list(config.mil.seeds),
        "reference": config.reference
        if config.reference in config.all_arms
        else config.all_arms[0],
        "top_k": config.evaluate.top_k,
        "shared_encoder": config.shared_encoder or config.curriculum,
        "curriculum": config.curriculum,
        "bag_size": config.bags.bag_size,
        "bags": {
            split: getattr(config.bags, f"{split}_bags") for split in ("train", "val", "test")
        },
        "normal": list(config.bags.normal),
        "positive": list(config.bags.positive),
        "reuse_normals": config.bags.reuse_normals,
        "missing": len(config.all_arms) * len(config.rates) * config.draws - len(done),
        "pretrain": {
            key: value
            for key, value in asdict(config.pretrain).items()
            if key not in ("out", "arm", "device")
        },
    }


if __name__ == "__main__":
    sys.exit("Run `python -m examples.slam_ags_cytology sweep`.")
