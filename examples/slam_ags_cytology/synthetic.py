"""Cell-like patches drawn from a seed, so that the whole application runs without a download.

The look follows May-Gruenwald-Giemsa smears of bone marrow: a violet nucleus in bluish cytoplasm,
grey-pink red cells and cropped neighbours around it, and a microscope that changes stain, white
balance, focus and light from patch to patch. The cells are a stylisation for testing software. They
say nothing about real cells, and a figure measured on them is not a figure about diagnosis.

How a patch comes about: one row of uniform random numbers decides everything about it, hence it
depends neither on the number of patches drawn with it nor on the size of a block. Shapes are signed
distances in units of half a patch; stains are densities that absorb light (Beer-Lambert law).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from .errors import UserError

__all__ = ["ABNORMAL_CLASSES", "NORMAL_CLASSES", "SyntheticConfig", "draw_cells", "synthetic"]

Array = NDArray[Any]
"""Float32 throughout: half the memory, and exp takes half the time."""

NORMAL_CLASSES = ("LYT", "MON", "NGS")
"""Lymphocyte-like, monocyte-like and segmented-neutrophil-like cells."""

ABNORMAL_CLASSES = ("BLA", "PMO")
"""Blast-like and promyelocyte-like cells."""

SMALLEST_SIZE = 16
"""Below this many pixels a nucleolus is smaller than a pixel, and nothing is left to see."""

RECIPE = 1
"""Raised whenever the drawing changes, so that patches of two recipes are never mixed."""

CHUNK = 64
"""Patches that share one random stream; a resumed run redraws whole chunks."""

BLOCK = 16
"""Patches drawn at once: few enough for the arrays to stay in the processor's cache."""


@dataclass(frozen=True)
class SyntheticConfig:
    """What to draw, and where to."""

    out: Path
    """Run folder; the patches go to OUT/cells/CLASS/CLASS_00001.png."""
    normal: int = 6000
    """Normal cells in total, spread evenly over LYT, MON and NGS."""
    abnormal: int = 600
    """Abnormal cells in total, spread evenly over BLA and PMO."""
    size: int = 64
    """Width and height of a patch in pixels, at least 16."""
    seed: int = 0
    """Seed of all random numbers. The first cells stay the same when more are drawn."""
    difficulty: float = 0.5
    """Overlap between the types: 0 textbook cells, 1 cells that experts would argue about."""


@dataclass(frozen=True)
class _CellType:
    """Textbook mean of each property of a type; `_SPREAD` says how far single cells stray."""

    radius: float
    """Radius of the cell, in half patches."""
    ratio: float
    """Radius of the nucleus over that of the cell."""
    bend: float
    """0: round nucleus, 0.4: kidney, 0.75: lobes on an arc."""
    eccentric: float
    """Shift of the nucleus from the centre, as a share of the free room."""
    coarse: float
    """Share of coarse clumps in the chromatin; the rest is fine."""
    contrast: float
    """Relative contrast of the chromatin."""
    nucleoli: float
    """Expected number of nucleoli, 0 to 3."""
    granules: float
    """Density of granules."""
    granule_size: float
    """0: fine dust, 1: coarse grains."""
    basophilia: float
    """Blue of the cytoplasm."""
    hof: float
    """Strength of the pale zone beside the nucleus."""


_TYPES = {
    "LYT": _CellType(0.47, 0.84, 0.10, 0.25, 0.90, 0.26, 0.2, 0.10, 0.3, 0.50, 0.1),
    "MON": _CellType(0.64, 0.74, 0.48, 0.30, 0.55, 0.22, 0.2, 0.25, 0.1, 0.40, 0.2),
    "NGS": _CellType(0.58, 0.72, 0.80, 0.20, 0.85, 0.26, 0.0, 0.80, 0.1, 0.20, 0.1),
    "BLA": _CellType(0.61, 0.86, 0.10, 0.25, 0.05, 0.13, 2.6, 0.10, 0.3, 0.58, 0.2),
    "PMO": _CellType(0.70, 0.69, 0.14, 0.80, 0.20, 0.15, 1.4, 0.90, 0.9, 0.45, 0.8),
}

_SPREAD = _CellType(0.065, 0.06, 0.08, 0.25, 0.15, 0.04, 0.6, 0.2, 0.2, 0.14, 0.25)
"""Standard deviation inside every type."""

_SMALLEST = _CellType(0.30, 0.45, 0.0, 0.0, 0.0, 0.05, 0.0, 0.0, 0.0, 0.08, 0.0)
_LARGEST = _CellType(0.85, 0.93, 0.85, 1.0, 1.0, 0.40, 3.0, 1.2, 1.0, 0.95, 1.0)


_PULL = 0.6
"""Share of the way to the average cell that the means of all types go at difficulty 1."""

# Optical density (R, G, B) at a stain density of one: nuclear violet, cytoplasmic blue, pink of
# granules and debris, grey-pink of red cells.
_STAINS = np.array(
    [[1.60, 2.60, 0.55], [1.00, 0.80, 0.16], [0.35, 0.90, 0.25], [0.19, 0.29, 0.26]], np.float32
)

_GRIDS = {"warp_x": 7, "warp_y": 7, "haze": 6, "coarse": 18, "mid": 32, "grain": 40, "fine": 60}
"""Control points per side of each random field; a field's detail is about two of their steps."""

_SCALARS = 256
"""Uniform numbers per patch that are set aside for everything except fields and sensor noise."""

_LOBES = 4
_RED_CELLS = 5
_NEIGHBOURS = 2
_NUCLEOLI = 3


class _Tape:
    """Hands out the columns of a block of uniform numbers in order, one row per patch."""

    def __init__(self, rows: Array) -> None:
        self.rows = rows
        self.at = 0

    def uniform(self, low: float = 0.0, high: float = 1.0) -> Array:
        """Uniform numbers between two bounds, shape (B, 1, 1)."""
        column = self.rows[:, self.at]
        self.at += 1
        return (low + (high - low) * column)[:, None, None]

    def bell(self, mean: float = 0.0, spread: float = 1.0) -> Array:
        """Bell-shaped numbers, never further than three spreads from the mean, shape (B, 1, 1)."""
        total = self.uniform() + self.uniform() + self.uniform()
        return mean + spread * 2.0 * (total - 1.5)  # three uniforms have a variance of 1/4


def draw_cells(
    class_name: str,
    count: int,
    size: int,
    generator: np.random.Generator,
    *,
    difficulty: float = 0.5,
) -> NDArray[np.uint8]:
    """Patches of one class, uint8 RGB of shape (count, size, size, 3).

    Args:
        class_name: One of `NORMAL_CLASSES` or `ABNORMAL_CLASSES`.
        count: Number of patches, at least 1.
        size: Width and height in pixels, at least 16.
        generator: Source of all randomness. Each patch takes the same amount from it, so that two
            calls for `a` and `b` patches draw what one call for `a + b` draws.
        difficulty: Overlap between the types, 0 to 1.

    Returns:
        The patches.

    Raises:
        TypeError: If `generator` is not a `numpy.random.Generator`.
        ValueError: If another argument is out of range.

    Note:
        Processors and libraries round products of matrices differently: on another machine
        a pixel may differ by one grey level.

    Example:
        >>> draw_cells("BLA", 3, 32, np.random.default_rng(0)).shape
        (3, 32, 32, 3)
    """
    if not isinstance(generator, np.random.Generator):
        raise TypeError(
            f"`generator` must be a numpy.random.Generator. Got {type(generator).__name__}. "
            "Make one with numpy.random.default_rng(seed)."
        )
    if class_name not in _TYPES:
        raise ValueError(
            f"`class_name` must be one of {', '.join(_TYPES)}. Got {class_name!r}. "
            "These are the types that can be drawn."
        )
    if count < 1:
        raise ValueError(f"`count` must be at least 1. Got {count}. Ask for one patch or more.")
    _check_size_and_difficulty(size, difficulty)
    patches = np.empty((count, size, size, 3), np.uint8)
    width = _SCALARS + sum(grid * grid for grid in _GRIDS.values()) + 3 * size * size
    for start in range(0, count, BLOCK):
        rows = generator.random((min(BLOCK, count - start), width), dtype=np.float32)
        patches[start : start + len(rows)] = _draw_block(class_name, size, rows, difficulty)
    return patches


def _draw_block(class_name: str, size: int, rows: Array, difficulty: float) -> NDArray[np.uint8]:
    tape = _Tape(rows[:, :_SCALARS])
    maps = _fields(rows[:, _SCALARS:], size)
    sensor = rows[:, -3 * size * size :].reshape(-1, size, size, 3)
    cell = _sample_cell(class_name, tape, difficulty)
    # The magnification is no property of a type: it blurs what the size alone would say.
    zoom = np.exp(tape.bell(0.0, 0.1))
    y, x = _coordinates(size, zoom)
    edge = 1.6 / size * zoom  # half width of an antialiased edge: 0.8 pixels
    bent = 0.035 * zoom
    x, y = x + bent * maps["warp_x"], y + bent * maps["warp_y"]
    stain = _background(tape, x, y, edge, maps)
    for _ in range(_NEIGHBOURS):
        _add_neighbour(tape, stain, x, y, edge, maps)
    _add_cell(tape, cell, stain, x, y, edge, maps)
    return _photograph(tape, stain, sensor)


def _fields(rows: Array, size: int) -> dict[str, Array]:
    """Smooth random fields of mean 0 and variance 1, each of shape (B, size, size)."""
    maps, start = {}, 0
    for name, grid in _GRIDS.items():
        knots = (rows[:, start : start + grid * grid] - 0.5) * math.sqrt(12.0)
        spline = _spline(size, grid)
        maps[name] = spline @ knots.reshape(-1, grid, grid) @ spline.T
        start += grid * grid
    return maps


@lru_cache(maxsize=32)
def _spline(size: int, grid: int) -> Array:
    """Cubic B-spline weights (size, grid), each row of norm 1 so that variances stay 1."""
    at = (np.arange(size) + 0.5) / size * (grid - 3) + 1.0
    far = np.abs(at[:, None] - np.arange(grid))
    weights: Array = np.where(
        far < 1, 2 / 3 - far**2 + far**3 / 2, np.clip(2 - far, 0, None) ** 3 / 6
    )
    weights /= np.linalg.norm(weights, axis=1, keepdims=True)
    return weights.astype(np.float32)


def _sample_cell(class_name: str, tape: _Tape, difficulty: float) -> dict[str, Array]:
    """The properties of single cells, name to (B, 1, 1)."""
    cell = {}
    for field in fields(_CellType):
        name = field.name
        average = sum(getattr(kind, name) for kind in _TYPES.values()) / len(_TYPES)
        mean = getattr(_TYPES[class_name], name)
        mean += _PULL * difficulty * (average - mean)
        value = tape.bell(mean, getattr(_SPREAD, name))
        cell[name] = np.clip(value, getattr(_SMALLEST, name), getattr(_LARGEST, name))
    return cell


def _coordinates(size: int, zoom: Array) -> tuple[Array, Array]:
    line = ((np.arange(size, dtype=np.float32) + 0.5) * 2 / size - 1).astype(np.float32)
    return line[None, :, None] * zoom, line[None, None, :] * zoom


def _inside(distance: Array, edge: Array) -> Array:
    """1 inside a shape, 0 outside, smooth across the edge; `distance` is negative inside."""
    ramp = np.clip(0.5 - distance / (2 * edge), 0, 1)
    smooth: Array = ramp * ramp * (3 - 2 * ramp)
    return smooth


def _above(field: Array, level: Array | float, softness: float = 0.8) -> Array:
    """Spots where a field exceeds a level, from 0 to 1."""
    return np.clip((field - level) / softness, 0, 1)


def _ellipse(tape: _Tape, x: Array, y: Array, radius: Array, flat: float) -> Array:
    """Distance to a turned ellipse around the origin of x and y."""
    turn, squeeze = tape.uniform(0, math.pi), 1 + flat * tape.uniform()
    cos, sin = np.cos(turn), np.sin(turn)
    along, across = (x * cos + y * sin) / squeeze, (y * cos - x * sin) * squeeze
    length: Array = np.sqrt(along * along + across * across)
    return length - radius


def _place(tape: _Tape, near: float, far: float) -> tuple[Array, Array]:
    turn, way = tape.uniform(0, 2 * math.pi), tape.uniform(near, far)
    return way * np.cos(turn), way * np.sin(turn)


def _background(tape: _Tape, x: Array, y: Array, edge: Array, maps: dict[str, Array]) -> Array:
    """Stain densities (4, B, size, size) of plasma, debris and red cells."""
    stain = np.zeros((4, *maps["haze"].shape), np.float32)
    haze = tape.uniform(0.0, 0.12) * np.clip(1 + 0.6 * maps["haze"], 0, None)
    stain[1] = haze
    stain[2] = tape.uniform(0, 1) * 0.5 * haze
    thick, pallor = tape.uniform(0.4, 1.3), tape.uniform(-0.2, 0.75)
    crowd = tape.uniform(0.1, 0.95)
    for _ in range(_RED_CELLS):
        dx, dy = _place(tape, 0.55, 1.5)
        radius = tape.bell(0.31, 0.025)
        gap = _ellipse(tape, x - dx, y - dy, radius, 0.22)
        there = (tape.uniform() < crowd) * thick
        hollow = 1 - pallor * np.clip(-gap / radius, 0, 1) ** 2
        stain[3] += there * hollow * _inside(gap, edge)
    specks = _above(maps["mid"] + 0.6 * maps["haze"], tape.uniform(2.3, 4.2))
    stain[0] += 0.35 * tape.uniform() * specks
    stain[2] += 0.8 * specks
    return stain


def _lay(stain: Array, alpha: Array, densities: tuple[Array | float, ...]) -> None:
    """Cover what is below by a layer; what was there shines through where alpha is below 1."""
    for i, density in enumerate(densities):
        stain[i] += alpha * (density - stain[i])


def _add_neighbour(
    tape: _Tape, stain: Array, x: Array, y: Array, edge: Array, maps: dict[str, Array]
) -> None:
    """A cropped nucleated cell at the border, of no type: it says nothing about the middle."""
    there = tape.uniform() < 0.6
    dx, dy = _place(tape, 1.0, 1.6)
    radius, ratio = tape.uniform(0.38, 0.75), tape.uniform(0.55, 0.92)
    blue, grainy = tape.uniform(0.2, 0.8), tape.uniform(0.0, 1.0)
    gap = _ellipse(tape, x - dx, y - dy, radius, 0.15)
    chromatin = 0.2 * (tape.uniform() * maps["coarse"] + tape.uniform() * maps["mid"])
    grains = grainy * _above(maps["fine"], 0.3, 2.0)
    alpha = there * _inside(gap, edge)
    _lay(stain, alpha, (0.05 + 0.25 * grains, blue, 0.1 + 0.3 * grains, 0.0))
    core = there * _inside(gap + radius * (1 - ratio), edge)
    _lay(stain, core, (np.clip(tape.bell(0.9, 0.12) * (1 + chromatin), 0.2, None), 0.2, 0.0, 0.0))


def _add_cell(
    tape: _Tape,
    cell: dict[str, Array],
    stain: Array,
    x: Array,
    y: Array,
    edge: Array,
    maps: dict[str, Array],
) -> None:
    """The cell in the middle: cytoplasm with granules, nucleus with chromatin and nucleoli."""
    x, y = x - tape.bell(0, 0.04), y - tape.bell(0, 0.04)
    radius = cell["radius"]
    core = radius * cell["ratio"]
    turn = tape.uniform(0, 2 * math.pi)
    ux, uy = np.cos(turn), np.sin(turn)
    shift = cell["eccentric"] * (radius - core)
    nx, ny = x - shift * ux, y - shift * uy
    nucleus = _nucleus(tape, cell["bend"], core, nx, ny)
    body = _ellipse(tape, x, y, radius, 0.14)
    body = np.minimum(body, nucleus - tape.uniform(0.01, 0.05))

    # The pale zone lies where the nucleus leaves room.
    hx, hy = x + 0.35 * radius * ux, y + 0.35 * radius * uy
    hof = cell["hof"] * np.exp(-(hx * hx + hy * hy) / (0.4 * radius) ** 2)
    large = cell["granule_size"]
    level = 2.0 - 1.3 * cell["granules"]
    dust = _above(maps["fine"], level - 0.9, 2.0)
    grains = (1 - large) * dust + 1.4 * large * _above(maps["grain"], level - 0.2, 1.3)
    grains *= 1 - 0.5 * hof
    mottle = 1 + 0.12 * maps["mid"] + 0.1 * maps["coarse"]
    blue = cell["basophilia"] * mottle * (1 - 0.6 * hof)
    hue = tape.uniform(0.15, 0.4)
    _lay(stain, _inside(body, edge), (0.04 + hue * grains, blue, 0.12 + 0.35 * grains, 0.0))

    coarse = cell["coarse"]
    clumps = coarse * maps["coarse"] + (1 - coarse) * (0.5 * maps["mid"] + 0.6 * maps["fine"])
    clumps /= np.sqrt(coarse**2 + 0.61 * (1 - coarse) ** 2)
    clumps = np.maximum(clumps, -1)  # a hole between clumps must not pass for a nucleolus
    rim = np.exp(-((nucleus / (0.12 * core)) ** 2))
    dense = tape.bell(0.92, 0.12) * (1 + cell["contrast"] * clumps + 0.12 * rim)
    pale = _nucleoli(tape, cell["nucleoli"], core, nx, ny, edge)
    dense = dense * (1 - 0.55 * pale)
    over = 0.25 * large * _above(maps["grain"], level, 1.0)  # a few grains lie on the nucleus
    violet = np.clip(dense + over, 0.15, None)
    _lay(stain, _inside(nucleus, edge), (violet, 0.15 + 0.3 * pale, 0.0, 0.0))


def _nucleus(tape: _Tape, bend: Array, core: Array, x: Array, y: Array) -> Array:
    """Distance to a nucleus: lobes on an arc that melt into each other, a disc when `bend` is 0."""
    turn, squeeze = tape.uniform(0, 2 * math.pi), 1 + 0.16 * tape.uniform()
    cos, sin = np.cos(turn), np.sin(turn)
    along, across = (x * cos + y * sin) / squeeze, (y * cos - x * sin) * squeeze
    arc, lobe = bend * core, (1 - 0.71 * bend) * core
    span = tape.bell(1.75, 0.15)
    melt = 0.07 * core
    total: Array = np.zeros_like(along)
    for step in range(_LOBES):
        angle = span * (2 * step / (_LOBES - 1) - 1) + tape.bell(0, 0.16)
        lx, ly = along - arc * (np.cos(angle) - 0.3), across - arc * np.sin(angle)
        size = lobe * (1 + 0.35 * bend * tape.bell())
        total = total + np.exp(np.clip((size - np.sqrt(lx * lx + ly * ly)) / melt, -20, 20))
    # Where all lobes coincide the sum counts four times; the constant keeps the radius as asked.
    level: Array = np.log(total / (1 + 3 * np.exp(-8 * bend)))
    return -melt * level


def _nucleoli(tape: _Tape, expected: Array, core: Array, x: Array, y: Array, edge: Array) -> Array:
    """Pale round bodies in the nucleus, from 0 to 1."""
    pale: Array = np.zeros_like(x)
    for number in range(_NUCLEOLI):
        dx, dy = _place(tape, 0.1, 0.6)
        radius = core * tape.uniform(0.15, 0.26)
        # A fractional expectation becomes a body that is there in that share of the cells.
        there = tape.uniform() < expected - number
        gap = np.hypot(x - core * dx, y - core * dy) - radius
        pale = np.maximum(pale, there * tape.uniform(0.6, 1.0) * _inside(gap, 1.5 * edge))
    return pale


def _photograph(tape: _Tape, stain: Array, sensor: Array) -> NDArray[np.uint8]:
    """What the camera sees of stain densities (4, B, size, size): uint8 (B, size, size, 3)."""
    size = stain.shape[-1]
    strength = np.exp(tape.bell(0, 0.16))
    hue = [np.exp(tape.bell(0, 0.12)) for _ in range(_STAINS.size)]
    colours = np.concatenate(hue, axis=2).reshape(-1, *_STAINS.shape) * _STAINS * strength
    density = np.moveaxis(stain, 0, -1).reshape(len(colours), -1, len(_STAINS)) @ colours

    # Two habits of exposure, grey and bright, as found side by side in collections of smears.
    bright = tape.uniform() < 0.45
    white = np.where(bright, tape.bell(0.95, 0.06), tape.bell(0.64, 0.05))
    tint = [tape.bell(tone, 0.03) for tone in (1.0, 0.98, 1.0)]
    line = np.linspace(-1, 1, size, dtype=np.float32)
    dx, dy = tape.bell(0, 0.04), tape.bell(0, 0.04)
    light = 1 + dx * line[None, None, :] + dy * line[None, :, None]
    picture = np.exp(-density).reshape(-1, size, size, 3)
    picture *= (light * white)[..., None] * np.concatenate(tint, axis=2)[:, :, None, :]

    picture = _defocus(picture, tape.uniform(0.25, 0.9) ** 2 * size / 64 + 0.2)
    picture += (sensor - 0.5) * tape.uniform(0.01, 0.06)[..., None]
    return (np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8)


def _defocus(picture: Array, sigma: Array) -> Array:
    """Gaussian blur of (B, size, size, 3), one sigma in pixels per patch."""
    size = picture.shape[1]
    at = np.arange(size, dtype=np.float32)
    kernel = np.exp(-((at[:, None] - at) ** 2) / (2 * sigma * sigma))
    kernel /= kernel.sum(2, keepdims=True)
    rows = (kernel @ picture.reshape(-1, size, size * 3)).reshape(picture.shape)
    blurred: Array = kernel[:, None] @ rows
    return blurred


def _check_size_and_difficulty(size: int, difficulty: float) -> None:
    if size < SMALLEST_SIZE:
        raise UserError(
            f"`size` must be at least {SMALLEST_SIZE} pixels. Got {size}. "
            "Smaller cells show no chromatin: choose 32, 64 or more."
        )
    if not 0 <= difficulty <= 1:  # also refuses NaN
        raise UserError(
            f"`difficulty` must lie between 0 and 1. Got {difficulty}. The default is 0.5."
        )


def synthetic(config: SyntheticConfig) -> Path:
    """Draw the patches of a run that are not there yet, and return the folder OUT/cells.

    A run that was interrupted can be repeated: files that exist are kept, the rest is drawn as it
    would have been. OUT/cells.json says which settings made the folder.

    Args:
        config: What to draw and where to.

    Returns:
        Path of the folder with one folder per class.

    Raises:
        UserError: If a setting is out of range, or OUT holds cells made by other settings.
    """
    _check(config)
    folder, record = config.out / "cells", config.out / "cells.json"
    _claim(config, folder, record)
    counts = _counts(config)
    with tqdm(total=sum(counts.values()), unit="cell", desc="synthetic", disable=None) as progress:
        for class_name, count in counts.items():
            for done in _draw_class(config, class_name, count, folder / class_name):
                progress.update(done)
    _write_record(config, record, complete=True)
    return folder


def _check(config: SyntheticConfig) -> None:
    for name in ("normal", "abnormal"):
        if getattr(config, name) < 1:
            raise UserError(
                f"`{name}` must be at least 1. Got {getattr(config, name)}. "
                "Bags need cells of both kinds: ask for one or more."
            )
    if config.seed < 0:
        raise UserError(f"`seed` must not be negative. Got {config.seed}. Use 0, 1, 2, ...")
    _check_size_and_difficulty(config.size, config.difficulty)
    for path in (config.out, config.out / "cells"):
        if path.exists() and not path.is_dir():
            raise UserError(f"`out` must be a folder. Got the file {path}. Choose another folder.")


def _claim(config: SyntheticConfig, folder: Path, record: Path) -> None:
    """Make the folder, or make sure that the same settings made it."""
    advice = "Choose another folder with `out`, or delete this one."
    if record.exists():
        try:
            found = json.loads(record.read_text(encoding="utf-8"))
            same, settings = found["fingerprint"] == _fingerprint(config), found["config"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{record} must be a record of drawn cells. {advice}") from error
        if not same:
            wanted = _settings(config)
            changed = [
                f"{key} was {settings.get(key)}, now {value}"
                for key, value in wanted.items()
                if settings.get(key) != value
            ]
            what = "; ".join(changed) or "an older version drew them"
            raise UserError(
                f"{config.out} must hold cells made by the same settings. "
                f"Found others: {what}. {advice}"
            )
        return
    if folder.exists() and any(folder.iterdir()):
        raise UserError(
            f"{folder} must be empty or made by this step. It has other files. {advice}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    # Written before the first cell, so that an interrupted run is recognised.
    _write_record(config, record, complete=False)


def _settings(config: SyntheticConfig) -> dict[str, Any]:
    """The settings that decide about pixels, that is all but the place."""
    settings = asdict(config)
    del settings["out"]
    return {**settings, "recipe": RECIPE}


def _fingerprint(config: SyntheticConfig) -> str:
    return hashlib.sha256(json.dumps(_settings(config), sort_keys=True).encode()).hexdigest()


def _write_record(config: SyntheticConfig, record: Path, *, complete: bool) -> None:
    content = {
        "config": _settings(config),
        "fingerprint": _fingerprint(config),
        "cells": _counts(config),
        "complete": complete,
    }
    part = record.with_name(record.name + ".part")
    part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(part, record)


def _counts(config: SyntheticConfig) -> dict[str, int]:
    """Cells per class: even shares, the first classes take the remainder."""
    counts: dict[str, int] = {}
    for total, names in ((config.normal, NORMAL_CLASSES), (config.abnormal, ABNORMAL_CLASSES)):
        cuts = [math.ceil(total * i / len(names)) for i in range(len(names) + 1)]
        counts |= {
            name: stop - start for name, (start, stop) in zip(names, pairwise(cuts), strict=True)
        }
    return {name: count for name, count in counts.items() if count}


def _draw_class(
    config: SyntheticConfig, class_name: str, count: int, folder: Path
) -> Iterator[int]:
    """Write the missing patches of one class; yields how many cells each chunk settled."""
    folder.mkdir(exist_ok=True)
    there = {path.name for path in folder.iterdir()}
    names = [f"{class_name}_{number:05d}.png" for number in range(1, count + 1)]
    for start in range(0, count, CHUNK):
        wanted = names[start : start + CHUNK]
        if not there.issuperset(wanted):
            stream = (config.seed, zlib.crc32(class_name.encode()), start // CHUNK)
            generator = np.random.default_rng(stream)
            patches = draw_cells(
                class_name, len(wanted), config.size, generator, difficulty=config.difficulty
            )
            for name, patch in zip(wanted, patches, strict=True):
                if name not in there:
                    _write_png(patch, folder / name)
        yield len(wanted)


def _write_png(patch: NDArray[np.uint8], path: Path) -> None:
    part = path.with_name(path.name + ".part")
    # Noise does not compress: the fastest level loses little.
    Image.fromarray(patch).save(part, format="PNG", compress_level=1)
    os.replace(part, path)
