"""What cells of each type look like, on average and one by one.

The types are stylised after cells of bone marrow; see `drawing.py` for what they are good for.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from .shapes import Array, Tape

__all__ = ["ABNORMAL_CLASSES", "NORMAL_CLASSES", "TYPES", "sample_cell"]

NORMAL_CLASSES = ("LYT", "MON", "NGS")
"""Lymphocyte-like, monocyte-like and segmented-neutrophil-like cells."""

ABNORMAL_CLASSES = ("BLA", "PMO")
"""Blast-like and promyelocyte-like cells."""


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


TYPES = {
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


def sample_cell(class_name: str, tape: Tape, difficulty: float) -> dict[str, Array]:
    """The properties of single cells, name to (B, 1, 1)."""
    cell = {}
    for field in fields(_CellType):
        name = field.name
        average = sum(getattr(kind, name) for kind in TYPES.values()) / len(TYPES)
        mean = getattr(TYPES[class_name], name)
        mean += _PULL * difficulty * (average - mean)
        value = tape.bell(mean, getattr(_SPREAD, name))
        cell[name] = np.clip(value, getattr(_SMALLEST, name), getattr(_LARGEST, name))
    return cell
