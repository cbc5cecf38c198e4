"""All cells of a run decoded once, as one memory-mapped array of uint8.

An array that was left half made by an interruption is continued: a journal beside it says which rows are there.
Images that cannot be decoded are listed in unreadable.csv with the reason, and left out by every later step.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import multiprocessing
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from tqdm import tqdm

from .decoding import Chunk, Decoded, decode, decode_chunk, ignore_interrupts
from .errors import UserError, listing
from .files import replacing, write_text
from .sources import locate, status

__all__ = ["CellStore", "decode", "open_store"]

VERSION = 2  # part of the fingerprint: raise it when decoding changes
CHUNK = 64  # images per task
PROCESSES_FROM = 20_000  # images below which threads do: processes take seconds to start
SPARE_BYTES = 64 * 2**20  # left free on the disk
MOST_UNREADABLE = 0.5  # share above which something else must be wrong


@dataclass(frozen=True, eq=False)
class CellStore:
    """Decoded cells. Cheap to pickle: a worker process maps the same file again."""

    paths: tuple[str, ...]
    """Path of each row, in order of first appearance."""
    images: npt.NDArray[np.uint8]
    """Read-only memory map, (N, size, size, 3), RGB."""
    file: Path
    """The .npy file."""
    copies: tuple[tuple[str, ...], ...] = ()
    """Groups of paths whose files have the same bytes."""
    unreadable: tuple[str, ...] = ()
    """Paths whose rows are empty, since they could not be decoded; see `readable`."""
    _row: dict[str, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Index the paths."""
        object.__setattr__(self, "_row", {path: row for row, path in enumerate(self.paths)})

    def __len__(self) -> int:
        """Number of different cells."""
        return len(self.paths)

    @property
    def size(self) -> int:
        """Width and height in pixels."""
        return int(self.images.shape[1])

    def row(self, path: str) -> int:
        """Row of one path."""
        try:
            return self._row[path]
        except KeyError:
            raise KeyError(f"{path} must be among the {len(self)} paths of {self.file}.") from None

    def rows(self, paths: Iterable[str]) -> npt.NDArray[np.int64]:
        """Rows of some paths, which may repeat: `store.images[store.rows(frame.path)]`."""
        return np.array([self.row(path) for path in paths], dtype=np.int64)

    def __reduce__(self) -> tuple[Any, ...]:
        """Send the names, not the pixels."""
        return _attach, (self.paths, self.file, self.copies, self.unreadable)

    def readable(self, frame: pd.DataFrame) -> pd.DataFrame:
        """The rows of a manifest whose cells could be decoded.

        Raises:
            UserError: a bag has none left.
        """
        if not self.unreadable:
            return frame
        kept: pd.DataFrame = frame[~frame["path"].isin(self.unreadable)]
        empty = set(frame["bag"]) - set(kept["bag"])
        if empty:
            raise UserError(
                f"Every bag must hold a readable cell. None is left in {listing(sorted(empty))}; see "
                f"{self.file.parent / UNREADABLE}. Replace these files, or remove their rows from the manifest."
            )
        return kept


UNREADABLE = "unreadable.csv"


def _attach(
    paths: tuple[str, ...],
    file: Path,
    copies: tuple[tuple[str, ...], ...],
    unreadable: tuple[str, ...],
) -> CellStore:
    return CellStore(paths, np.load(file, mmap_mode="r"), file, copies, unreadable)


def open_store(
    paths: Iterable[str], size: int, folder: str | Path, workers: int | None = None
) -> CellStore:
    """The cells decoded to `size` x `size`, from FOLDER/cells-SIZE.npy if it is current, else made.

    Args:
        paths: Absolute paths; repeated ones share a row.
        size: Width and height in pixels.
        folder: Where the cache goes: cells-SIZE.npy, cells-SIZE.json, and unreadable.csv if it is needed.
        workers: Processes that decode. None: one for each core that this process may use.

    Returns:
        The store; row i is the i-th different path.

    Raises:
        UserError: If images are missing, most of them are unreadable, another process is decoding into this folder, or
            the disk is too full.
    """
    if not 8 <= size <= 4096:
        raise UserError(f"size must be between 8 and 4096 pixels. Found {size}.")
    if workers is not None and workers < 1:
        raise UserError(f"workers must be at least 1, or None. Found {workers}.")
    names = tuple(dict.fromkeys(paths))
    if not names:
        raise UserError("A store needs at least one cell. Found no paths. Is the manifest empty?")
    folder = Path(os.path.abspath(folder))
    file, note = folder / f"cells-{size}.npy", folder / f"cells-{size}.json"
    fingerprint = _fingerprint(names, size)
    store = _reopen(names, size, file, note, fingerprint)
    if store is not None:
        return store
    folder.mkdir(parents=True, exist_ok=True)
    with _Unfinished.claimed(file, names, size, fingerprint) as unfinished:
        _check_disk(unfinished.bytes_left(), folder, size)
        unfinished.decode(workers or _cores())
        problems = unfinished.problems
        try:
            _report(problems, names, folder)
        except UserError:
            unfinished.part.unlink()
            raise
        note.unlink(missing_ok=True)  # an old note must never describe the new array
        os.replace(unfinished.part, file)
        content = {
            "fingerprint": fingerprint,
            "cells": len(names),
            "size": size,
            "copies": unfinished.copies(),
            "unreadable": sorted(problems),
        }
        write_text(note, json.dumps(content) + "\n")
    return _described(names, file, content)


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _described(names: tuple[str, ...], file: Path, content: dict[str, Any]) -> CellStore:
    """The store that a note describes."""
    copies = tuple(tuple(names[row] for row in rows) for rows in content["copies"])
    return _attach(names, file, copies, tuple(names[row] for row in content["unreadable"]))


def _fingerprint(names: Sequence[str], size: int) -> str:
    """Changes when a path, a modification time, a file's length or the size changes."""
    digest = hashlib.sha256(f"{VERSION} {size}".encode())
    missing = []
    for name in names:
        try:
            found = status(name)
        except (OSError, ValueError):
            found = None
        if found is None:
            missing.append(name)
            continue
        line = f"\n{name}\t{found.changed}\t{found.offset}\t{found.length}"
        digest.update(line.encode("utf-8", "surrogateescape"))
    if missing:
        raise UserError(
            f"Every cell must be an existing file. {len(missing)} are not: {listing(missing, 10)}. "
            "Were files moved since the manifest was made?"
        )
    return digest.hexdigest()


def _reopen(
    names: tuple[str, ...], size: int, file: Path, note: Path, fingerprint: str
) -> CellStore | None:
    """The store on disk, or None if it is absent, damaged or out of date."""
    try:
        content = json.loads(note.read_text(encoding="utf-8"))
        if content["fingerprint"] != fingerprint:
            return None
        store = _described(names, file, content)
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None
    expected = (len(names), size, size, 3)
    return store if store.images.shape == expected and store.images.dtype == np.uint8 else None


def _check_disk(needed: int, folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed + SPARE_BYTES:
        raise UserError(
            f"{needed / 1e9:.2f} GB must be free in {folder} to decode the cells at {size} pixels. "
            f"Found {free / 1e9:.2f} GB. Choose a smaller size or an out on another disk."
        )


def _report(problems: dict[int, str], names: Sequence[str], folder: Path) -> None:
    """List what could not be decoded in FOLDER/unreadable.csv.

    Raises:
        UserError: it is most of all.
    """
    target = folder / UNREADABLE
    if not problems:
        target.unlink(missing_ok=True)
        return
    with (
        replacing(target) as part,
        part.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(("path", "reason"))
        writer.writerows((names[row], problems[row]) for row in sorted(problems))
    shown = listing((f"{names[row]} ({problems[row]})" for row in sorted(problems)), 3)
    text = f"{len(problems)} of {len(names)} cells cannot be read: {shown}. All are listed in {target}."
    if len(problems) > MOST_UNREADABLE * len(names):
        raise UserError(f"Most cells must be readable images. {text}")
    print(f"WARNING: {text} They are left out.")


class _Unfinished:
    """An array that is being made: the file, and a journal of the rows that are in it.

    Attributes:
        part: the array's file while it is not complete.
        problems: what is wrong with an image, by row.
    """

    def __init__(self, file: Path, names: Sequence[str], size: int) -> None:
        self.part, self.journal = file.with_suffix(".part"), file.with_suffix(".journal")
        self.names, self.size = names, size
        self.problems: dict[int, str] = {}
        self._digests: dict[int, str] = {}
        header = io.BytesIO()
        shape = (len(names), size, size, 3)
        np.lib.format.write_array_header_1_0(
            header, {"descr": "|u1", "fortran_order": False, "shape": shape}
        )
        self._header = header.getvalue()

    @classmethod
    @contextmanager
    def claimed(
        cls, file: Path, names: Sequence[str], size: int, fingerprint: str
    ) -> Iterator[_Unfinished]:
        """The array to be made, begun or continued, while no other process may touch it."""
        lock = file.with_suffix(".lock")
        with lock.open("ab") as stream:
            _lock(stream, file.parent)
            unfinished = cls(file, names, size)
            unfinished._begin(fingerprint)
            yield unfinished
            unfinished.journal.unlink()
        lock.unlink(missing_ok=True)

    def _begin(self, fingerprint: str) -> None:
        """Take over the rows of an interrupted run on the same images, or start with empty rows."""
        good = []
        try:
            first, *lines = self.journal.read_text(encoding="utf-8").splitlines()
            if (
                json.loads(first) == [fingerprint, CHUNK]
                and self.part.stat().st_size == self._bytes()
            ):
                for line in lines:
                    self._take(Decoded(**json.loads(line, object_hook=_with_rows)))
                    good.append(line)
        except (OSError, ValueError, TypeError, AttributeError):
            pass  # no journal, or its last line was cut off: what came before is good
        if good:
            print(f"Continuing with {len(self._digests)} of {len(self.names)} cells decoded.")
        else:
            with self.part.open("wb") as stream:
                stream.write(self._header)
                stream.truncate(self._bytes())  # zeros, which take no room on most disks
        write_text(self.journal, "\n".join((json.dumps([fingerprint, CHUNK]), *good, "")))

    def _bytes(self) -> int:
        return len(self._header) + len(self.names) * self.size**2 * 3

    def bytes_left(self) -> int:
        """Bytes still to be written."""
        return (len(self.names) - len(self._digests)) * self.size**2 * 3

    def _take(self, decoded: Decoded) -> None:
        self._digests |= dict(enumerate(decoded.digests, decoded.start))
        self.problems |= decoded.problems

    def decode(self, workers: int) -> None:
        """Decode all rows that are not there yet, a few tasks in flight at a time."""
        starts = [start for start in range(0, len(self.names), CHUNK) if start not in self._digests]
        progress = tqdm(
            total=len(self.names),
            initial=len(self._digests),
            desc=f"decoding to {self.size} px",
            unit="cell",
            disable=None,
        )
        with (
            progress,
            self.journal.open("a", encoding="utf-8") as journal,
            _executor(workers, len(starts) * CHUNK) as pool,
        ):
            waiting: set[Future[Decoded]] = set()
            try:
                for start in starts:
                    waiting.add(pool.submit(decode_chunk, *self._task(start)))
                    if len(waiting) >= 3 * workers:
                        waiting = self._collect(waiting, journal, progress)
                while waiting:
                    waiting = self._collect(waiting, journal, progress)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _task(self, start: int) -> tuple[Chunk, int, Path, int]:
        names = self.names[start : start + CHUNK]
        chunk = Chunk(start, [locate(name) for name in names])
        return chunk, self.size, self.part, len(self._header)

    def _collect(
        self, waiting: set[Future[Decoded]], journal: IO[str], progress: tqdm[Any]
    ) -> set[Future[Decoded]]:
        """Note what is finished; the pixels are in the file before the journal says so."""
        finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
        for future in finished:
            decoded = future.result()
            self._take(decoded)
            journal.write(json.dumps(asdict(decoded)) + "\n")
            journal.flush()
            progress.update(len(decoded.digests))
        return set(waiting)

    def copies(self) -> list[list[int]]:
        """Rows of images with the same bytes."""
        groups: dict[str, list[int]] = {}
        for row in sorted(self._digests):
            if row not in self.problems:
                groups.setdefault(self._digests[row], []).append(row)
        return [rows for rows in groups.values() if len(rows) > 1]


def _with_rows(value: dict[str, Any]) -> dict[Any, Any]:
    """JSON knows text keys only; those of `problems` are rows."""
    return {int(key) if key.isdigit() else key: item for key, item in value.items()}


def _executor(workers: int, images: int) -> Executor:
    """Processes for many images; threads for few, since Pillow decodes without the interpreter's lock."""
    if workers == 1 or images < PROCESSES_FROM:
        return ThreadPoolExecutor(workers)
    # Not forked: a process with threads (torch has some) must not be.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=ignore_interrupts)


def _lock(stream: IO[bytes], folder: Path) -> None:
    """Hold the file until it is closed, or the process ends in whatever way.

    Raises:
        UserError: another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # not on Windows
        return
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise UserError(
            f"Only one process may decode cells into {folder}. Another one is at work there: wait for it."
        ) from error
