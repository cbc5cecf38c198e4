"""Random fields and soft shapes, for a block of patches at once.

Every random number comes from a `Tape`, one row of uniform numbers per patch. Shapes are signed
distances in units of half a patch, negative inside.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "GRIDS",
    "Array",
    "Tape",
    "above",
    "coordinates",
    "ellipse",
    "inside",
    "nucleoli",
    "nucleus",
    "place",
    "smooth_fields",
]

Array = NDArray[Any]
"""Float32 throughout: half the memory, and exp takes half the time."""

GRIDS = {"warp_x": 7, "warp_y": 7, "haze": 6, "coarse": 18, "mid": 32, "grain": 40, "fine": 60}
"""Control points per side of each random field; a field's detail is about two of their steps."""

_LOBES = 4
_NUCLEOLI = 3


class Tape:
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


def smooth_fields(rows: Array, size: int) -> dict[str, Array]:
    """Smooth random fields of mean 0 and variance 1, each of shape (B, size, size)."""
    maps, start = {}, 0
    for name, grid in GRIDS.items():
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


def coordinates(size: int, zoom: Array) -> tuple[Array, Array]:
    """The y and x of the middles of the pixels, -1 to 1 over the patch times zoom."""
    line = ((np.arange(size, dtype=np.float32) + 0.5) * 2 / size - 1).astype(np.float32)
    return line[None, :, None] * zoom, line[None, None, :] * zoom


def inside(distance: Array, edge: Array) -> Array:
    """1 inside a shape, 0 outside, smooth across the edge; `distance` is negative inside."""
    ramp = np.clip(0.5 - distance / (2 * edge), 0, 1)
    smooth: Array = ramp * ramp * (3 - 2 * ramp)
    return smooth


def above(field: Array, level: Array | float, softness: float = 0.8) -> Array:
    """Spots where a field exceeds a level, from 0 to 1."""
    return np.clip((field - level) / softness, 0, 1)


def ellipse(tape: Tape, x: Array, y: Array, radius: Array, flat: float) -> Array:
    """Distance to a turned ellipse around the origin of x and y."""
    along, across = _turned(tape, x, y, math.pi, flat)
    length: Array = np.sqrt(along * along + across * across)
    return length - radius


def _turned(tape: Tape, x: Array, y: Array, most: float, flat: float) -> tuple[Array, Array]:
    """Coordinates along and across axes turned by up to `most`, squeezed by up to `flat`."""
    turn, squeeze = tape.uniform(0, most), 1 + flat * tape.uniform()
    cos, sin = np.cos(turn), np.sin(turn)
    return (x * cos + y * sin) / squeeze, (y * cos - x * sin) * squeeze


def place(tape: Tape, near: float, far: float) -> tuple[Array, Array]:
    """A point at a random angle, between two distances from the origin."""
    turn, way = tape.uniform(0, 2 * math.pi), tape.uniform(near, far)
    return way * np.cos(turn), way * np.sin(turn)


def nucleus(tape: Tape, bend: Array, core: Array, x: Array, y: Array) -> Array:
    """Distance to a nucleus: lobes on an arc that melt into each other, a disc when `bend` is 0."""
    along, across = _turned(tape, x, y, 2 * math.pi, 0.16)
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


def nucleoli(tape: Tape, expected: Array, core: Array, x: Array, y: Array, edge: Array) -> Array:
    """Pale round bodies in the nucleus, from 0 to 1."""
    pale: Array = np.zeros_like(x)
    for number in range(_NUCLEOLI):
        dx, dy = place(tape, 0.1, 0.6)
        radius = core * tape.uniform(0.15, 0.26)
        # A fractional expectation becomes a body that is there in that share of the cells.
        there = tape.uniform() < expected - number
        gap = np.hypot(x - core * dx, y - core * dy) - radius
        pale = np.maximum(pale, there * tape.uniform(0.6, 1.0) * inside(gap, 1.5 * edge))
    return pale
