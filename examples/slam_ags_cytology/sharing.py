"""Decoded cells of one store given to another run folder, so that no image is decoded twice."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from .files import replacing, write_text
from .store import CellStore, _fingerprint

__all__ = ["drop_store", "share_store"]


def share_store(store: CellStore, paths: Iterable[str], folder: Path) -> None:
    """Make FOLDER/cells-SIZE.npy of some cells of `store`, as `open_store` would have decoded them.

    Args:
        store: Cells of all runs.
        paths: Cells of this run; all must be in `store`. Repeated ones share a row.
        folder: Run folder.
    """
    names = tuple(dict.fromkeys(paths))
    rows = store.rows(names)
    place = {int(row): i for i, row in enumerate(rows)}
    whole = json.loads(store.file.with_suffix(".json").read_text(encoding="utf-8"))
    copies = [sorted(place[row] for row in group if row in place) for group in whole["copies"]]
    content = {
        "fingerprint": _fingerprint(names, store.size),
        "cells": len(names),
        "size": store.size,
        "copies": [group for group in copies if len(group) > 1],
        "unreadable": sorted(place[row] for row in whole.get("unreadable", ()) if row in place),
    }
    file = folder / store.file.name
    note = file.with_suffix(".json")
    note.unlink(missing_ok=True)  # an old note must never describe the new array
    with replacing(file) as part, part.open("wb") as stream:
        header = {
            "descr": "|u1",
            "fortran_order": False,
            "shape": (len(names), *store.images.shape[1:]),
        }
        np.lib.format.write_array_header_1_0(stream, header)
        for some in np.array_split(rows, max(1, len(rows) // 1024)):
            stream.write(store.images[some].tobytes())
    write_text(note, json.dumps(content) + "\n")


def drop_store(folder: Path, size: int) -> None:
    """Remove the decoded cells of a finished run; they can be made again."""
    for suffix in (".json", ".npy"):
        (folder / f"cells-{size}{suffix}").unlink(missing_ok=True)
