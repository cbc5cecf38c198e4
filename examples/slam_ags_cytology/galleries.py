"""The cells that the report shows: bag by bag, the most suspicious first, with small pictures."""

from __future__ import annotations

import base64
import io
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

import pandas as pd
from markupsafe import Markup
from PIL import Image

from .errors import UserError
from .files import portable_path
from .metrics import RANKINGS
from .results import read_result, seed_folders
from .store import decode

__all__ = ["Thumbnails", "bags_to_show", "dots", "first_seed", "normals", "search"]


@dataclass
class Thumbnails:
    """Small pictures of cells, each stored once however often it is shown."""

    out: Path
    size: int
    pictures: dict[str, str] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=dict)

    def number(self, path: str) -> int:
        """Number of the style class that shows this cell."""
        if path not in self.numbers:
            self.numbers[path] = len(self.numbers)
            self.pictures[path] = self._encode(self.out / path)
        return self.numbers[path]

    def _encode(self, path: Path) -> str:
        try:
            pixels = decode(path, self.size)
        except Exception:  # Pillow raises all kinds; a lost picture must not cost the page
            return ""
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format="JPEG", quality=85)
        return base64.b64encode(buffer.getvalue()).decode("ascii")

    def css(self) -> Markup:
        """Style rules; safe, as they hold numbers and base64 only."""
        rules = (
            f".t{self.numbers[path]}{{background-image:url(data:image/jpeg;base64,{data})}}"
            for path, data in self.pictures.items()
            if data
        )
        return Markup("\n".join(rules))


def first_seed(out: Path, arm: str, split: str) -> tuple[int, pd.DataFrame, pd.DataFrame]:
    """The lowest seed of an arm, its bags by name, and its cells, of one split."""
    folders = seed_folders(out, arm)
    if not folders:
        raise UserError(
            f"{out / 'mil' / arm} must hold the evaluated results. Found none. "
            "Run the mil and evaluate steps again."
        )
    seed, folder = folders[0]
    bags, cells = read_result(folder)
    return seed, bags[bags["split"] == split].set_index("bag"), cells[cells["split"] == split]


def bags_to_show(
    results: dict[str, tuple[int, pd.DataFrame, pd.DataFrame]], count: int
) -> list[str]:
    """The same bags in all arms, so that galleries can be compared: highest mean probability first."""
    table = pd.concat([bags for _, bags, _ in results.values()])
    mean = table[table["label"] == 1].groupby(level=0)["probability"].mean()
    return list(mean.sort_index().sort_values(ascending=False, kind="stable").index[:count])


def dots(out: Path, arm: str, split: str) -> list[dict[str, Any]]:
    """A point per bag and seed for the strip of probabilities; `place` spreads them vertically."""
    found: list[dict[str, Any]] = []
    for i, (seed, folder) in enumerate(seed_folders(out, arm)):
        bags, _ = read_result(folder)
        for j, bag in enumerate(bags[bags["split"] == split].itertuples(index=False)):
            found.append(
                {
                    "name": bag.bag,
                    "label": int(bag.label),
                    "x": round(100 * float(bag.probability), 2),
                    "place": (7 * j + 3 * i) % 11 - 5,
                    "seed": seed,
                    "main": i == 0,
                }
            )
    return found


def search(
    cells: pd.DataFrame, bag: Any, name: str, count: int, thumbs: Thumbnails
) -> dict[str, Any]:
    """What is shown of one positive bag: its first `count` cells in each ranking."""
    mine = cells[cells["bag"] == name]
    known = bool((mine["instance_label"] >= 0).all())
    rankings = {}
    for key in RANKINGS:
        order = mine.sort_values(key, ascending=False, kind="stable").head(count)
        shown = _cells(order, key, len(mine), thumbs)
        rankings[key] = {
            "cells": shown,
            "found": sum(cell["truth"] == "abnormal" for cell in shown),
        }
    return {
        "name": name,
        "probability": float(bag["probability"]),
        "called": bool(bag["probability"] >= bag["threshold"]),
        "size": len(mine),
        "positives": int((mine["instance_label"] == 1).sum()) if known else None,
        "shown": min(count, len(mine)),
        "rankings": rankings,
    }


def normals(cells: pd.DataFrame, key: str, count: int, thumbs: Thumbnails) -> list[dict[str, Any]]:
    """The least suspicious cells of negative bags, each file once."""
    negative = cells[cells["label"] == 0].sort_values(key, kind="stable").drop_duplicates("path")
    return _cells(negative.head(count), key, 0, thumbs)


def _cells(frame: pd.DataFrame, key: str, size: int, thumbs: Thumbnails) -> list[dict[str, Any]]:
    truths = {1: "abnormal", 0: "normal"}
    shown = []
    for rank, cell in enumerate(frame.itertuples(index=False), start=1):
        path, score = str(cell.path), float(getattr(cell, key))
        shown.append(
            {
                "rank": rank,
                "thumb": thumbs.number(path),
                "lost": not thumbs.pictures[path],
                "truth": truths.get(cast(int, cell.instance_label), "unknown"),
                "score": _score_text(key, score, size),
                "file": Path(path).name,
                "class_name": cell.class_name,
                "href": _link(path, thumbs.out),
            }
        )
    return shown


def _score_text(key: str, score: float, size: int) -> str:
    """Short text: attention as a multiple of what equal weights would give."""
    if key == "attention" and size:
        return f"×{score * size:.2g}"
    return f"{score:.3g}" if key == "distance" else f"{score:+.2f}"


def _link(path: str, out: Path) -> str:
    """Link from the page to a source file, relative to the page."""
    relative = portable_path(out / path, out)
    if os.path.isabs(relative):
        try:
            relative = Path(os.path.relpath(relative, out)).as_posix()
        except ValueError:  # another drive of Windows has no relative path
            return Path(relative).as_uri()
    # The prefix keeps a file named like "javascript:..." from being read as an address.
    return "./" + quote(os.fsencode(relative))
