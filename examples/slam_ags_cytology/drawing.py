"""Cell-like patches from uniform random numbers: stain, layers, light and camera.

The look follows May-Gruenwald-Giemsa smears of bone marrow: a violet nucleus in bluish cytoplasm,
grey-pink red cells and cropped neighbours around it, and a microscope that changes stain, white
balance, focus and light from patch to patch. The cells are a stylisation for testing software. They
say nothing about real cells, and a figure measured on them is not a figure about diagnosis.

How a patch comes about: one row of uniform random numbers decides everything about it, hence it
depends neither on the number of patches drawn with it nor on the size of a block. Stains are
densities that absorb light (Beer-Lambert law).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from .errors import UserError
from .morphology import TYPES, sample_cell
from .shapes import (
    GRIDS,
    Array,
    Tape,
    above,
    coordinates,
    ellipse,
    inside,
    nucleoli,
    nucleus,
    place,
    smooth_fields,
)

__all__ = ["RECIPE", "check_size_and_difficulty", "draw_cells"]

SMALLEST_SIZE = 16
"""Below this many pixels a nucleolus is smaller than a pixel, and nothing is left to see."""

RECIPE = 1
"""Raised whenever the drawing changes, so that patches of two recipes are never mixed."""

BLOCK = 16
"""Patches drawn at once: few enough for the arrays to stay in the processor's cache."""

# Optical density (R, G, B) at a stain density of one: nuclear violet, cytoplasmic blue, pink of
# granules and debris, grey-pink of red cells.
_STAINS = np.array(
    [[1.60, 2.60, 0.55], [1.00, 0.80, 0.16], [0.35, 0.90, 0.25], [0.19, 0.29, 0.26]], np.float32
)

_SCALARS = 256
"""Uniform numbers per patch that are set aside for everything except fields and sensor noise."""

_RED_CELLS = 5
_NEIGHBOURS = 2


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
        class_name: One of `morphology.NORMAL_CLASSES` or `ABNORMAL_CLASSES`.
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
    if class_name not in TYPES:
        raise ValueError(
            f"`class_name` must be one of {', '.join(TYPES)}. Got {class_name!r}. "
            "These are the types that can be drawn."
        )
    if count < 1:
        raise ValueError(f"`count` must be at least 1. Got {count}. Ask for one patch or more.")
    check_size_and_difficulty(size, difficulty)
    patches = np.empty((count, size, size, 3), np.uint8)
    width = _SCALARS + sum(grid * grid for grid in GRIDS.values()) + 3 * size * size
    for start in range(0, count, BLOCK):
        rows = generator.random((min(BLOCK, count - start), width), dtype=np.float32)
        patches[start : start + len(rows)] = _draw_block(class_name, size, rows, difficulty)
    return patches


def check_size_and_difficulty(size: int, difficulty: float) -> None:
    """Refuse a size at which nothing is left to see, and a difficulty outside 0 to 1."""
    if size < SMALLEST_SIZE:
        raise UserError(
            f"`size` must be at least {SMALLEST_SIZE} pixels. Got {size}. "
            "Smaller cells show no chromatin: choose 32, 64 or more."
        )
    if not 0 <= difficulty <= 1:  # also refuses NaN
        raise UserError(
            f"`difficulty` must lie between 0 and 1. Got {difficulty}. The default is 0.5."
        )


def _draw_block(class_name: str, size: int, rows: Array, difficulty: float) -> NDArray[np.uint8]:
    tape = Tape(rows[:, :_SCALARS])
    maps = smooth_fields(rows[:, _SCALARS:], size)
    sensor = rows[:, -3 * size * size :].reshape(-1, size, size, 3)
    cell = sample_cell(class_name, tape, difficulty)
    # The magnification is no property of a type: it blurs what the size alone would say.
    zoom = np.exp(tape.bell(0.0, 0.1))
    y, x = coordinates(size, zoom)
    edge = 1.6 / size * zoom  # half width of an antialiased edge: 0.8 pixels
    bent = 0.035 * zoom
    x, y = x + bent * maps["warp_x"], y + bent * maps["warp_y"]
    stain = _background(tape, x, y, edge, maps)
    for _ in range(_NEIGHBOURS):
        _add_neighbour(tape, stain, x, y, edge, maps)
    _add_cell(tape, cell, stain, x, y, edge, maps)
    return _photograph(tape, stain, sensor)


def _background(tape: Tape, x: Array, y: Array, edge: Array, maps: dict[str, Array]) -> Array:
    """Stain densities (4, B, size, size) of plasma, debris and red cells."""
    stain = np.zeros((4, *maps["haze"].shape), np.float32)
    haze = tape.uniform(0.0, 0.12) * np.clip(1 + 0.6 * maps["haze"], 0, None)
    stain[1] = haze
    stain[2] = tape.uniform(0, 1) * 0.5 * haze
    thick, pallor = tape.uniform(0.4, 1.3), tape.uniform(-0.2, 0.75)
    crowd = tape.uniform(0.1, 0.95)
    for _ in range(_RED_CELLS):
        dx, dy = place(tape, 0.55, 1.5)
        radius = tape.bell(0.31, 0.025)
        gap = ellipse(tape, x - dx, y - dy, radius, 0.22)
        there = (tape.uniform() < crowd) * thick
        hollow = 1 - pallor * np.clip(-gap / radius, 0, 1) ** 2
        stain[3] += there * hollow * inside(gap, edge)
    specks = above(maps["mid"] + 0.6 * maps["haze"], tape.uniform(2.3, 4.2))
    stain[0] += 0.35 * tape.uniform() * specks
    stain[2] += 0.8 * specks
    return stain


def _lay(stain: Array, alpha: Array, densities: tuple[Array | float, ...]) -> None:
    """Cover what is below by a layer; what was there shines through where alpha is below 1."""
    for i, density in enumerate(densities):
        stain[i] += alpha * (density - stain[i])


def _add_neighbour(
    tape: Tape, stain: Array, x: Array, y: Array, edge: Array, maps: dict[str, Array]
) -> None:
    """A cropped nucleated cell at the border, of no type: it says nothing about the middle."""
    there = tape.uniform() < 0.6
    dx, dy = place(tape, 1.0, 1.6)
    radius, ratio = tape.uniform(0.38, 0.75), tape.uniform(0.55, 0.92)
    blue, grainy = tape.uniform(0.2, 0.8), tape.uniform(0.0, 1.0)
    gap = ellipse(tape, x - dx, y - dy, radius, 0.15)
    chromatin = 0.2 * (tape.uniform() * maps["coarse"] + tape.uniform() * maps["mid"])
    grains = grainy * above(maps["fine"], 0.3, 2.0)
    alpha = there * inside(gap, edge)
    _lay(stain, alpha, (0.05 + 0.25 * grains, blue, 0.1 + 0.3 * grains, 0.0))
    core = there * inside(gap + radius * (1 - ratio), edge)
    _lay(stain, core, (np.clip(tape.bell(0.9, 0.12) * (1 + chromatin), 0.2, None), 0.2, 0.0, 0.0))


def _add_cell(
    tape: Tape,
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
    core_gap = nucleus(tape, cell["bend"], core, nx, ny)
    body = ellipse(tape, x, y, radius, 0.14)
    body = np.minimum(body, core_gap - tape.uniform(0.01, 0.05))

    # The pale zone lies where the nucleus leaves room.
    hx, hy = x + 0.35 * radius * ux, y + 0.35 * radius * uy
    hof = cell["hof"] * np.exp(-(hx * hx + hy * hy) / (0.4 * radius) ** 2)
    large = cell["granule_size"]
    level = 2.0 - 1.3 * cell["granules"]
    dust = above(maps["fine"], level - 0.9, 2.0)
    grains = (1 - large) * dust + 1.4 * large * above(maps["grain"], level - 0.2, 1.3)
    grains *= 1 - 0.5 * hof
    mottle = 1 + 0.12 * maps["mid"] + 0.1 * maps["coarse"]
    blue = cell["basophilia"] * mottle * (1 - 0.6 * hof)
    hue = tape.uniform(0.15, 0.4)
    _lay(stain, inside(body, edge), (0.04 + hue * grains, blue, 0.12 + 0.35 * grains, 0.0))

    coarse = cell["coarse"]
    clumps = coarse * maps["coarse"] + (1 - coarse) * (0.5 * maps["mid"] + 0.6 * maps["fine"])
    clumps /= np.sqrt(coarse**2 + 0.61 * (1 - coarse) ** 2)
    clumps = np.maximum(clumps, -1)  # a hole between clumps must not pass for a nucleolus
    rim = np.exp(-((core_gap / (0.12 * core)) ** 2))
    dense = tape.bell(0.92, 0.12) * (1 + cell["contrast"] * clumps + 0.12 * rim)
    pale = nucleoli(tape, cell["nucleoli"], core, nx, ny, edge)
    dense = dense * (1 - 0.55 * pale)
    over = 0.25 * large * above(maps["grain"], level, 1.0)  # a few grains lie on the nucleus
    violet = np.clip(dense + over, 0.15, None)
    _lay(stain, inside(core_gap, edge), (violet, 0.15 + 0.3 * pale, 0.0, 0.0))


def _photograph(tape: Tape, stain: Array, sensor: Array) -> NDArray[np.uint8]:
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
