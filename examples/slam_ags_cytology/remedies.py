"""Too few cells for the bags: say what is missing, and the smallest change that works."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from .manifest import SPLITS
from .recipe import BagsConfig, Recipe, bags_per_label

__all__ = ["Available", "remedies", "shortages"]

Available = Mapping[str, Mapping[str, int]]
"""Number of cells by split and role."""


def shortages(
    config: BagsConfig, available: Available, splits: Sequence[str] = SPLITS
) -> list[str]:
    """What is missing for each split and role; empty if there are cells enough."""
    short = []
    for split in splits:
        number = bags_per_label(config, split)
        for role, need in Recipe.of(config).needs(number, config.reuse_normals).items():
            if need > available[split][role]:
                name = role if role == "distractor" else f"{role} cell"
                short.append(f"{split} needs {need} {name}s, there are {available[split][role]}")
    return short


def remedies(config: BagsConfig, available: Available) -> str:
    """Changes of one setting that would be enough, each the smallest of its kind."""

    def enough(**change: Any) -> bool:
        changed = _changed(config, **change)
        recipe = Recipe.of(changed)
        if recipe.positives + recipe.distractors > recipe.size:
            return False
        return not shortages(changed, available)

    found = []
    if not config.reuse_normals and enough(reuse_normals=True):
        found.append("reuse_normals=True (a normal cell may then be in several bags of one split)")
    fewer = _fewer_bags(config, available)
    if fewer:
        found.append(fewer)
    # Smaller bags must still hold a positive cell without being rounded up to one.
    sizes = range(config.bag_size - 1, 1, -1)
    size = next((n for n in sizes if config.witness_rate * n >= 0.5 and enough(bag_size=n)), None)
    if size:
        found.append(f"bag_size={size}")
    for name, now in (
        ("witness_rate", Recipe.of(config).positives),
        ("distractor_rate", Recipe.of(config).distractors),
    ):
        rates = (number / config.bag_size for number in range(now - 1, 0, -1))
        rate = next((rate for rate in rates if enough(**{name: rate})), None)
        if rate:
            found.append(f"{name}={rate:g}")
    if not found:
        return "No single change is enough: add cells, or combine fewer and smaller bags."
    return "Enough would be " + ", or ".join(found) + "."


def _changed(config: BagsConfig, **change: Any) -> BagsConfig:
    """`replace` for settings that are named by a variable, which no type checker can follow."""
    return replace(config, **change)


def _fewer_bags(config: BagsConfig, available: Available) -> str:
    """The largest numbers of bags that can be drawn, as settings; empty if a split allows none."""
    changes = []
    for split in SPLITS:
        wanted, name = bags_per_label(config, split), f"{split}_bags"
        most = next(
            (
                number
                for number in range(wanted, -1, -1)
                if not shortages(_changed(config, **{name: number}), available, [split])
            ),
            0,
        )
        if wanted and not most:
            return ""
        if most < wanted:
            changes.append(f"{name}={most}")
    return ", ".join(changes[:-1]) + (" and " if changes[1:] else "") + "".join(changes[-1:])
