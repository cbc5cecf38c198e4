"""Arms x witness rates x draws x seeds: how results depend on the share of abnormal cells.

A *draw* is a new choice of bags from the same pools of cells, together with a new seed of the pretraining; within a
draw the MIL training is repeated with several seeds. OUT/rate-R/draw-D is an ordinary run folder, which the other
commands understand. Whatever is finished is kept: the same command after an interruption, of whatever kind,
continues, and a larger grid in the same folder adds what is missing.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from .bags import BagsConfig, bags, repeats
from .errors import UserError
from .evaluate import evaluate
from .files import write_text
from .report import report
from .run import of_synthetic
from .sweep_config import SweepConfig, check_sweep
from .sweep_progress import failures, quiet
from .sweep_report import sweep_report
from .sweep_summary import summarise, sweep_table, sweep_text
from .sweep_units import Unit, finished_rows, read_unit, run_folder, units_of
from .sweep_workers import do_units
from .synthetic import synthetic

__all__ = ["SweepConfig", "sweep"]


def sweep(config: SweepConfig) -> Path:
    """Carry out what is missing of the grid, and return the path of the report.

    Raises:
        UserError: A setting or the data do not allow it, or a part of the grid failed (the rest is finished first).
    """
    check_sweep(config)
    config.out.mkdir(parents=True, exist_ok=True)
    with quiet(config.out / "sweep.log"):
        config = _with_cells(config)
        for draw in range(config.draws):
            for rate in config.rates:
                bags(_bags_config(config, draw, rate))
    _warn_of_repeated_bags(config)
    write_text(config.out / "sweep.json", json.dumps(asdict(config), indent=1, default=str) + "\n")
    failed = {} if config.only_report else do_units(config)
    rows = [row for unit in units_of(config) for row in finished_rows(config, unit)]
    if not rows:
        raise UserError(
            f"No part of the sweep is finished. {failures(failed) if failed else 'Run it first.'}"
        )
    table = sweep_table(rows, config.all_arms, config.rates)
    summary = summarise(table, _facts(config, rows))
    with quiet(config.out / "sweep.log"):
        _run_reports(config)
    sweep_report(config.out, table, summary)
    print(sweep_text(summary))
    if failed:
        raise UserError(failures(failed))
    return config.out / "report.html"


def _with_cells(config: SweepConfig) -> SweepConfig:
    """The configuration with a folder of cells: the user's, or synthetic ones drawn now."""
    if config.bags.cells is not None:
        return config
    cells = synthetic(replace(config.synthetic, out=config.out))
    return replace(config, bags=of_synthetic(config.bags, cells))


def _bags_config(config: SweepConfig, draw: int, rate: float) -> BagsConfig:
    return replace(
        config.bags,
        out=run_folder(config.out, rate, draw),
        witness_rate=rate,
        seed=config.bags.seed + draw,
    )


def _warn_of_repeated_bags(config: SweepConfig) -> None:
    """Say what the log of the bags step says; one draw stands for all, since the recipe decides."""
    folder = run_folder(config.out, config.rates[0], 0)
    record = json.loads((folder / "bags.json").read_text(encoding="utf-8"))["summary"]
    for split, numbers in record.items():
        if numbers.get("repeated_bags"):  # bags of an older version do not have it
            total = numbers["negative_bags"] + numbers["positive_bags"]
            print(repeats(numbers, f"{total} {split}"), flush=True)


def _run_reports(config: SweepConfig) -> None:
    """Pages with cells, for the first draw of each rate."""
    for rate in config.rates:
        folder = run_folder(config.out, rate, 0)
        there = tuple(
            arm
            for arm in config.all_arms
            if read_unit(config, Unit(arm, 0, (rate,)), folder) is not None
        )
        if not there:
            continue
        try:
            evaluate(replace(config.evaluate, out=folder, arms=there))
            report(replace(config.report, out=folder, arms=there))
        except UserError as error:  # such as seeds of earlier settings beside the present ones
            print(f"No page for {folder}: {error}")


def _facts(config: SweepConfig, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What a reader must know before the figures."""
    done = {(row["arm"], row["rate"], row["draw"]) for row in rows}
    return {
        "arms": list(config.all_arms),
        "witness_rates": list(config.rates),
        "draws": config.draws,
        "mil_seeds": list(config.mil.seeds),
        "reference": config.reference
        if config.reference in config.all_arms
        else config.all_arms[0],
        "top_k": config.evaluate.top_k,
        "shared_encoder": config.shared_encoder or config.curriculum,
        "curriculum": config.curriculum,
        "bag_size": config.bags.bag_size,
        "bags": {
            split: getattr(config.bags, f"{split}_bags") for split in ("train", "val", "test")
        },
        "normal": list(config.bags.normal),
        "positive": list(config.bags.positive),
        "reuse_normals": config.bags.reuse_normals,
        "missing": len(config.all_arms) * len(config.rates) * config.draws - len(done),
        "pretrain": {
            key: value
            for key, value in asdict(config.pretrain).items()
            if key not in ("out", "arm", "device")
        },
    }


if __name__ == "__main__":
    sys.exit("Run `python -m examples.slam_ags_cytology sweep`.")
