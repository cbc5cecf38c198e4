"""All cells of a run decoded once, as one memory-mapped array of uint8.

Conversion to RGB: transparent parts become white (the empty background of a slide); 16-bit grey is
scaled by its full range, the same for all files, so that brightness stays comparable; a file of
several pages gives its first. Of an image that is not square, the middle is kept (centre crop): the
cell is there, and padding would tell a network which file an image came from. Images of another
size are resized with an antialiasing (bicubic) filter. Colour profiles and EXIF rotation are
ignored.
"""

import hashlib
import io
import json
import os
import shutil
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from tqdm import tqdm

from .errors import UserError, listing
from .files import replacing, write_text

VERSION = 1  # part of the fingerprint: raise it when decoding changes
WORKERS = 2  # Pillow decodes without holding the interpreter lock
CHUNK = 64  # images per task; 2 * WORKERS tasks are held in memory at a time
LONGEST = 2.0  # longer side / shorter side of a picture that can be of one cell
SPARE_BYTES = 64 * 2**20  # left free on the disk


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
        return _attach, (self.paths, self.file, self.copies)


def _attach(paths: tuple[str, ...], file: Path, copies: tuple[tuple[str, ...], ...]) -> CellStore:
    return CellStore(paths, np.load(file, mmap_mode="r"), file, copies)


def open_store(paths: Iterable[str], size: int, folder: str | Path) -> CellStore:
    """The cells decoded to `size` x `size`, from FOLDER/cells-SIZE.npy if it is current, else made.

    Args:
        paths: Absolute paths; repeated ones share a row.
        size: Width and height in pixels.
        folder: Where the two cache files go, cells-SIZE.npy and cells-SIZE.json.

    Returns:
        The store; row i is the i-th different path.

    Raises:
        UserError: If images are missing or unreadable (all are tried, then all are named together),
            or the disk is too full.
    """
    if not 8 <= size <= 4096:
        raise UserError(f"size must be between 8 and 4096 pixels. Found {size}.")
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
    _check_disk(len(names) * size * size * 3, folder, size)
    note.unlink(missing_ok=True)  # an old note must never describe the new array
    digests = _decode_all(names, size, file)
    groups: dict[bytes, list[int]] = {}
    for row, digest in enumerate(digests):
        groups.setdefault(digest, []).append(row)
    content = {
        "fingerprint": fingerprint,
        "cells": len(names),
        "size": size,
        "copies": [rows for rows in groups.values() if len(rows) > 1],
    }
    write_text(note, json.dumps(content) + "\n")
    return _attach(names, file, _named(content["copies"], names))


def _named(groups: Any, names: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(names[row] for row in rows) for rows in groups)


def _fingerprint(names: Sequence[str], size: int) -> str:
    """Changes when a path, a modification time, a file's length or the size changes."""
    digest = hashlib.sha256(f"{VERSION} {size}".encode())
    missing = []
    for name in names:
        try:
            status = os.stat(name)
        except (OSError, ValueError):
            missing.append(name)
            continue
        line = f"\n{name}\t{status.st_mtime_ns}\t{status.st_size}"
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
        store = _attach(names, file, _named(content["copies"], names))
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


def _decode_all(names: Sequence[str], size: int, file: Path) -> list[bytes]:
    """Write all images to `file` and return a digest of each input file.

    The array is written as a stream: on a full disk a stream raises an error, a memory map kills
    the process.
    """
    digests: list[bytes] = []
    problems: list[str] = []
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(names), size, size, 3)}
    progress = tqdm(total=len(names), desc=f"decoding to {size} px", unit="cell", disable=None)
    with replacing(file) as temporary, temporary.open("wb") as stream, progress:
        np.lib.format.write_array_header_1_0(stream, header)
        for batch in _in_order(names, size):
            for name, result in batch:
                if isinstance(result, str):
                    problems.append(f"{name} ({result})")
                elif not problems:  # else the file is thrown away: only look for more problems
                    digests.append(result[0])
                    stream.write(result[1])
            progress.update(len(batch))
        if problems:
            raise UserError(
                f"Every cell must be a readable image. {len(problems)} of {len(names)} are not: "
                f"{listing(problems, 10)}. Replace these files, or remove their rows from the "
                "manifest."
            )
    return digests


Result = tuple[bytes, bytes] | str
"""Digest of the file and pixels, or what is wrong with it."""


def _in_order(names: Sequence[str], size: int) -> Iterator[list[tuple[str, Result]]]:
    """Results in the order of `names`, decoded in threads, with few in memory at a time."""

    def work(part: Sequence[str]) -> list[tuple[str, Result]]:
        return [(name, _try(name, size)) for name in part]

    waiting: deque[Future[list[tuple[str, Result]]]] = deque()
    with ThreadPoolExecutor(WORKERS) as pool:
        for start in range(0, len(names), CHUNK):
            waiting.append(pool.submit(work, names[start : start + CHUNK]))
            if len(waiting) >= 2 * WORKERS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _try(name: str, size: int) -> Result:
    # Pillow's decoders raise nearly every kind of exception on damaged files.
    try:
        raw = Path(name).read_bytes()
        pixels = decode(io.BytesIO(raw), size).tobytes()
    except Exception as error:
        text = str(error).replace(name, "file").split("<_io", 1)[0].strip()
        return f"{type(error).__name__}: {text}"[:200]
    return hashlib.blake2b(raw, digest_size=16).digest(), pixels


def decode(source: str | Path | io.BytesIO, size: int) -> npt.NDArray[np.uint8]:
    """One image as (size, size, 3) RGB; see the top of this file for the conversions."""
    with Image.open(source) as image:
        width, height = image.size
        side = min(width, height)
        if max(width, height) > LONGEST * side:
            raise ValueError(f"{width} x {height} pixels is not the shape of a picture of one cell")
        rgb = _to_rgb(image)
    left, top = (width - side) // 2, (height - side) // 2
    square = rgb.crop((left, top, left + side, top + side))
    if side != size:
        square = square.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(square, dtype=np.uint8)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.convert("RGB")
    if image.mode.startswith("I"):
        return _scale_grey(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range; save it with 8 bits")
    if "A" in image.mode.upper().replace("LAB", "") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def _scale_grey(image: Image.Image) -> Image.Image:
    """16-bit grey to RGB by its full range; Pillow itself would clip everything above 255."""
    values = np.asarray(image).astype(np.int64)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535 or high < 4096:
        raise ValueError(
            f"16-bit grey must use its range 0 to 65535; found {low} to {high}; save it with 8 bits"
        )
    grey = np.round(values / 257).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")
