"""One image of a cell, of any format a laboratory has, as a square of RGB bytes.

Transparent parts become white (the empty background of a slide); 16-bit grey is scaled by its full range, the same
for all files, so that brightness stays comparable; a file of several pages gives its first. Of an image that is not
square, the middle is kept (centre crop): the cell is there, and padding would tell a network which file an image
came from. Images of another size are resized with an antialiasing (bicubic) filter. Colour profiles and EXIF
rotation are ignored.

Nothing here imports torch: the processes that decode start fast and stay small.
"""

from __future__ import annotations

import hashlib
import io
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from .sources import Place, locate, read_bytes

LONGEST = 2.0  # longer side / shorter side of a picture that can be of one cell


@dataclass(frozen=True)
class Chunk:
    """Images that one task decodes, and where their pixels go."""

    start: int
    """Row of the first."""
    places: Sequence[Place]
    """Where the bytes of each image are."""


@dataclass(frozen=True)
class Decoded:
    """What a task found out; the pixels are in the file already."""

    start: int
    digests: list[str]
    """Of the bytes of each image; empty where there is no image."""
    problems: dict[int, str] = field(default_factory=dict)
    """What is wrong with an image, by row. Its pixels are left as they were, zero in a new file."""


def decode_chunk(chunk: Chunk, size: int, file: Path, header: int) -> Decoded:
    """Decode some images into their rows of an array in a file.

    Args:
        chunk: what to decode.
        size: width and height in pixels.
        file: an existing file, written through a stream: on a full disk a stream raises an error, where a memory map
            would kill the process.
        header: number of bytes in front of the array.
    """
    decoded = Decoded(chunk.start, [])
    with file.open("r+b") as stream:
        for row, place in enumerate(chunk.places, chunk.start):
            # Pillow's decoders raise nearly every kind of exception on damaged files.
            try:
                raw = read_bytes(place)
                pixels = decode(io.BytesIO(raw), size).tobytes()
            except Exception as error:
                text = str(error).replace(place.file, "file").split("<_io", 1)[0].strip()
                decoded.problems[row] = f"{type(error).__name__}: {text}"[:200]
                decoded.digests.append("")
                continue
            decoded.digests.append(hashlib.blake2b(raw, digest_size=16).hexdigest())
            stream.seek(header + row * len(pixels))
            stream.write(pixels)
    return decoded


def ignore_interrupts() -> None:
    """Leave Ctrl-C to the process that started this one, which ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def decode(source: str | Path | io.BytesIO, size: int) -> npt.NDArray[np.uint8]:
    """One image as (size, size, 3) RGB; see the top of this file for the conversions.

    Args:
        source: a path, also one into a tar archive, or the bytes themselves.
        size: width and height in pixels.
    """
    if not isinstance(source, io.BytesIO):
        source = io.BytesIO(read_bytes(locate(str(source))))
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
