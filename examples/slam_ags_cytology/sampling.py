"""Draw bags from pools of cells: no cell in two splits, none twice in a bag."""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from .cells import Cell
from .errors import UserError
from .manifest import SPLITS
from .recipe import ROLES, BagsConfig, Recipe, bags_per_label
from .remedies import remedies, shortages

__all__ = ["draw_bags"]

Pools = dict[str, dict[str, list[Cell]]]
"""Cells by split and role."""


def draw_bags(cells: Iterable[Cell], config: BagsConfig) -> pd.DataFrame:
    """The manifest of bags drawn from cells with a split; the order of `cells` does not matter."""
    pools = _pools(cells, config)
    available = {
        split: {role: len(pool) for role, pool in roles.items()} for split, roles in pools.items()
    }
    short = shortages(config, available)
    if short:
        raise UserError(
            "Too few cells for these bags: " + "; ".join(short) + ". " + remedies(config, available)
        )
    recipe, rows = Recipe.of(config), []
    for index, split in enumerate(SPLITS):
        rng = np.random.default_rng([config.seed, index])
        rows.extend(_draw_split(split, pools[split], recipe, bags_per_label(config, split), rng))
    return _frame(rows, config)


def _pools(cells: Iterable[Cell], config: BagsConfig) -> Pools:
    roles = dict.fromkeys(config.normal, "normal") | dict.fromkeys(config.positive, "positive")
    roles |= dict.fromkeys(config.distractors, "distractor")
    pools: Pools = {split: {role: [] for role in ROLES} for split in SPLITS}
    for cell in sorted(cells):
        if cell.kind in roles:
            pools[cell.split][roles[cell.kind]].append(cell)
    return pools


class _Row(NamedTuple):
    bag: str
    label: int
    split: str
    instance_label: int
    cell: Cell


def _draw_split(
    split: str,
    pools: Mapping[str, Sequence[Cell]],
    recipe: Recipe,
    bags_per_label: int,
    rng: np.random.Generator,
) -> list[_Row]:
    reuse = recipe.needs(bags_per_label, False)["normal"] > len(pools["normal"])
    queues = {role: iter(rng.permutation(len(pools[role]))) for role in ROLES}
    rows: list[_Row] = []
    for label, word in ((0, "negative"), (1, "positive")):
        for number in range(1, bags_per_label + 1):
            picked: list[_Row] = []
            for role, count in recipe.counts(label).items():
                if role == "normal" and reuse:
                    chosen = list(rng.choice(len(pools[role]), count, replace=False))
                else:
                    chosen = [next(queues[role]) for _ in range(count)]
                bag, truth = f"{split}-{word}-{number:03d}", int(role == "positive")
                picked += [_Row(bag, label, split, truth, pools[role][i]) for i in chosen]
            # Shuffled, so that the position of a cell in its bag tells nothing about it.
            rows += [picked[i] for i in rng.permutation(len(picked))]
    return rows


def _frame(rows: Sequence[_Row], config: BagsConfig) -> pd.DataFrame:
    root = os.path.abspath(config.cells or "")
    frame: pd.DataFrame = pd.DataFrame(
        {
            "path": [os.path.join(root, *row.cell.file.split("/")) for row in rows],
            "bag": [row.bag for row in rows],
            "label": np.array([row.label for row in rows], dtype=np.int64),
            "split": [row.split for row in rows],
            "instance_label": pd.array([row.instance_label for row in rows], dtype="Int8"),
            "class_name": [row.cell.kind for row in rows],
        }
    )
    if any(row.cell.group for row in rows):
        frame["group"] = [row.cell.group for row in rows]
    return frame
