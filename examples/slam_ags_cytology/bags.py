"""Bags of cells, as a manifest: drawn from folders of labelled cells, or a user's own slides.

No file is copied. What differs from the published script: everything is seeded; cells are divided
into training, validation and test pools *before* bags are drawn, so that no test cell is ever a
training cell; labels are columns, not parts of folder names; and nothing is overwritten.

Cells of the public bone-marrow data set carry no patient or slide: the split is between cells, not
between patients, here and in the paper.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from .cells import Cell, load_cells
from .errors import UserError, listing
from .files import portable_path, text_digest, write_text
from .manifest import SPLITS, manifest_text
from .recipe import BagsConfig, check_config
from .rules import check_manifest
from .sampling import draw_bags
from .slides import read_slides

__all__ = ["BagsConfig", "bags", "repeats", "summary"]


def bags(config: BagsConfig) -> Path:
    """Path of OUT/manifest.csv, made as `config` says, or kept if it was made in the same way.

    OUT/bags.json records the configuration, a fingerprint of the input, and a summary.

    Raises:
        UserError: If the configuration cannot be carried out, or OUT holds another manifest.
    """
    check_config(config)
    target = config.out / "manifest.csv"
    if config.slides is not None:
        frame, inputs = read_slides(config)
    else:
        cells = load_cells(config)
        frame, inputs = None, _digest(cells)
    record: dict[str, Any] = {"config": _portable_config(config), "inputs": inputs}
    if target.exists():
        _refuse_other(target, record)
        print(f"{target}: kept, it was made with the same configuration.")
        return target
    frame = draw_bags(cells, config) if frame is None else frame
    frame = check_manifest(frame, config.slides or config.cells or target)
    text = manifest_text(frame, config.out)
    record["manifest"] = text_digest(text)
    record["summary"] = summary(frame)
    _write(target, text, record)
    _report(target, record["summary"], config)
    return target


def _digest(cells: Iterable[Cell]) -> str:
    return text_digest("\n".join("\t".join(cell) for cell in cells))


def _portable_config(config: BagsConfig) -> dict[str, Any]:
    """The configuration as JSON values; paths inside OUT are relative, so that OUT can be moved."""
    values = asdict(config)
    del values["out"]
    for name, value in values.items():
        if isinstance(value, Path):
            values[name] = portable_path(value, config.out)
        elif isinstance(value, tuple):
            values[name] = list(value)
    return values


def _refuse_other(target: Path, record: Mapping[str, Any]) -> None:
    """Refuse to go on if the manifest was made in another way than `record` says."""
    advice = f"Choose another out, or delete {target} to make it again."
    try:
        made = json.loads((target.parent / "bags.json").read_text(encoding="utf-8"))
        config = {name: made["config"].get(name) for name in record["config"]}
        inputs, digest = made["inputs"], made["manifest"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{target} exists, but bags.json beside it does not say how it was made. "
            f"It is not overwritten. {advice}"
        ) from None
    different = [
        f"{name} was {config[name]}, is {value}"
        for name, value in record["config"].items()
        if config[name] != value
    ]
    if different:
        raise UserError(
            f"{target} was made with another configuration and is not overwritten: "
            f"{listing(different)}. {advice}"
        )
    if inputs != record["inputs"]:
        raise UserError(
            f"{target} was made from other input: since then files were added, removed, renamed or "
            f"divided differently. It is not overwritten. {advice}"
        )
    if digest != hashlib.sha256(target.read_bytes()).hexdigest():
        raise UserError(
            f"{target} was changed since it was made. To use your own manifest, give it as slides "
            f"with another out. {advice}"
        )


def summary(frame: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Per split: bags of each label, cells, different cells, positives, witness rate, classes."""
    result: dict[str, dict[str, Any]] = {}
    for split in SPLITS:
        part = frame[frame["split"] == split]
        first = part.drop_duplicates("bag")
        positive = part[part["label"] == 1]
        known = positive["instance_label"].dropna()
        result[split] = {
            "negative_bags": int((first["label"] == 0).sum()),
            "positive_bags": int((first["label"] == 1).sum()),
            "cells": len(part),
            "different_cells": int(part["path"].nunique()),
            "bags_share_cells": bool(part["path"].duplicated().any()),
            "repeated_bags": _repeated(part),
            "positive_cells": int((known == 1).sum()),
            "unlabelled_cells": int(len(positive) - len(known)),
            "witness_rate": float((known == 1).mean()) if len(known) else None,
            "classes": {str(k): int(v) for k, v in part["class_name"].value_counts().items() if k},
        }
    return result


def _repeated(part: pd.DataFrame) -> int:
    """Bags that hold exactly the cells of another."""
    contents = [frozenset(paths) for _, paths in part.groupby("bag")["path"]]
    return len(contents) - len(set(contents))


def _write(target: Path, text: str, record: Mapping[str, Any]) -> None:
    """The record first: a manifest without a record would be refused for ever."""
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text(target.with_name("bags.json"), json.dumps(record, indent=2) + "\n")
    write_text(target, text)


def repeats(numbers: Mapping[str, Any], whose: str) -> str:
    """A warning that bags of a split repeat one another; `numbers` is its part of the summary."""
    return (
        f"WARNING: {numbers['repeated_bags']} of {whose} bags repeat all cells of another, and say nothing that the "
        "other does not. Lower bag_size or the number of bags."
    )


def _report(target: Path, numbers: Mapping[str, Mapping[str, Any]], config: BagsConfig) -> None:
    print(f"{target}:")
    for split, part in numbers.items():
        rate = part["witness_rate"]
        bags_, cells = part["negative_bags"] + part["positive_bags"], part["cells"]
        if not bags_:
            print(f"  {split:5}  no bags")
            continue
        witness = "unknown" if rate is None else f"{rate:.2%}"
        print(
            f"  {split:5}  {bags_} bags ({part['negative_bags']} negative, {part['positive_bags']} "
            f"positive), {cells} cells, witness rate {witness}"
        )
        if part["bags_share_cells"]:
            print(
                f"         only {part['different_cells']} are different: bags share cells, so give "
                "intervals over several draws (seed)."
            )
        if part["repeated_bags"]:
            print(f"         {repeats(part, 'its')}")
    if config.cells is None:
        return
    print("  Cells, not patients, are divided between the splits.")
    own = config.cells / "manifest.csv"
    if config.split_csv is None and own.is_file():
        print(f"  {own} was not used. If it is a published split, give it as split_csv.")
