"""Does pretraining with two reconciled objectives find abnormal cells that SimCLR misses, and at which witness rates?

Runs the sweep of the cytology example on small synthetic cells: no pretraining, the label of its slide taught to every
cell, contrast on all cells (SimCLR), and both objectives with the plain sum or with AGS; at several witness rates (the
share of abnormal cells in an abnormal slide); every part with several draws of bags and seeds. Mean colours stand in
for an encoder as another baseline. Figures are means over draws with 95 % intervals by Student's t; differences from
SimCLR are paired by draw. Synthetic cells say nothing about real ones.

    python -m benchmarks.cytology                       # ten minutes on two cores
    python -m benchmarks.cytology --cells CELLS --split-csv SPLIT.csv --normal LYT --positive BLA --name mine
    python -m benchmarks.cytology --from-sweep OUT --name real    # store a sweep of the example

A second call with the same --work continues an interrupted one.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from benchmarks._cli import finish, new_parser, parse, provenance
from benchmarks.figures import cytology as figure
from examples.slam_ags_cytology.bags import BagsConfig
from examples.slam_ags_cytology.mil import MilConfig
from examples.slam_ags_cytology.pretrain import PretrainConfig
from examples.slam_ags_cytology.sweep import SweepConfig, sweep
from examples.slam_ags_cytology.synthetic import SyntheticConfig

PACKAGES = ("torch", "kornia", "scikit-learn", "numpy")
RANKINGS = ("attention", "instance_score", "slide_label", "distance")
SHOWN = ("bag_f1", "bag_auroc", *(f"average_precision_{key}" for key in RANKINGS))


class Sizes(NamedTuple):
    """Settings of the synthetic cells, the bags and the MIL training."""

    cells: dict[str, Any]
    bags: dict[str, Any]
    mil: dict[str, Any]


FULL = Sizes(
    {"normal": 4500, "abnormal": 600},
    {"bag_size": 100, "train_bags": 12, "val_bags": 2, "test_bags": 6},
    {"epochs": 60, "patience": 15},
)
QUICK = Sizes(
    {"normal": 240, "abnormal": 60},
    {"bag_size": 10, "train_bags": 3, "val_bags": 1, "test_bags": 2},
    {"epochs": 2},
)


def configure(options: argparse.Namespace, out: Path) -> SweepConfig:
    """The sweep that the options ask for."""
    here = SweepConfig(out).bags.out
    draw: dict[str, Any] = {}
    if options.cells is not None:
        draw = {
            "cells": options.cells,
            "split_csv": options.split_csv,
            "normal": tuple(options.normal),
            "positive": tuple(options.positive),
        }
    sizes = QUICK if options.quick else FULL
    return SweepConfig(
        out=out,
        arms=tuple(options.arms),
        witness_rates=tuple(options.rates),
        draws=options.draws,
        reference="simclr" if "simclr" in options.arms else options.arms[0],
        workers=options.workers,
        only_report=options.only_report,
        synthetic=SyntheticConfig(here, size=options.size, difficulty=0.0, **sizes.cells),
        bags=BagsConfig(here, reuse_normals=True, **sizes.bags, **draw),
        pretrain=PretrainConfig(
            here,
            patch=options.size,
            crop=options.size * 7 // 8,
            epochs=options.epochs,
            device=options.device,
        ),
        mil=MilConfig(
            here,
            seeds=tuple(range(options.seeds)),
            device=options.device,
            **sizes.mil,
        ),
    )


def rows(summary: dict[str, Any], table: pd.DataFrame) -> list[dict[str, Any]]:
    """One row per arm and witness rate, numbers only; `by_draw` has the means over the MIL seeds of each draw.

    Args:
        summary: of the sweep.
        table: its `sweep.csv`.
    """
    test = table[table["split"] == "test"]
    by_draw = test.groupby(["arm", "rate", "draw"])[list(SHOWN)].mean()
    found = []
    for cell in summary["cells"]:
        keys = ("arm", "rate", "draws", "seeds", "over", "collapsed", "weak")
        row = {key: cell[key] for key in keys}
        row["metrics"] = {name: _rounded(cell["metrics"][name]) for name in cell["metrics"]}
        row["differences"] = {
            name: _rounded(cell["differences"][name]) for name in SHOWN if cell["differences"]
        }
        mine = by_draw.loc[cell["arm"], cell["rate"]]
        row["by_draw"] = {
            str(draw): {name: round(value, 4) for name, value in figures.items()}
            for draw, figures in mine.to_dict("index").items()
        }
        found.append(row)
    return found


def _rounded(figure: dict[str, Any]) -> dict[str, Any]:
    return {
        key: round(value, 4) if isinstance(value, float) else value for key, value in figure.items()
    }


def answer(summary: dict[str, Any], arm: str = "ags") -> str:
    """Say in a line whether `arm` beats the reference, at each rate, in the ranking that serves the reference best."""
    reference = summary["facts"]["reference"]
    parts = []
    for rate in summary["chance"]:
        cells = {c["arm"]: c for c in summary["cells"] if f"{c['rate']:g}" == rate}
        if arm not in cells or reference not in cells or arm == reference:
            continue
        name = max(  # the ranking that serves the reference best: no favour to the arm
            (f"average_precision_{key}" for key in RANKINGS),
            key=lambda n, of=cells[reference]: of["metrics"][n]["mean"],
        )
        mine, other = (cells[a]["metrics"][name]["mean"] for a in (arm, reference))
        found = cells[arm]["differences"][name]
        decided = found["low"] is not None and not found["low"] <= 0 <= found["high"]
        verdict = ("better" if found["mean"] > 0 else "worse") if decided else "undecided"
        parts.append(f"{100 * float(rate):g} %: {mine:.3f} against {other:.3f} ({verdict})")
    return f"Answer: average precision of {arm} against {reference}: {'; '.join(parts) or 'not measured'}."


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the sweep, store the result, and answer."""
    parser = new_parser(__doc__)
    parser.add_argument("--cells", type=Path, help="folder of cells; synthetic ones without it")
    parser.add_argument("--split-csv", type=Path, help="published split of these cells")
    parser.add_argument("--normal", nargs="+", default=["LYT"])
    parser.add_argument("--positive", nargs="+", default=["BLA"])
    parser.add_argument("--arms", nargs="+", default=["random", "sil", "simclr", "sum", "ags"])
    parser.add_argument("--rates", type=float, nargs="+", default=[0.1, 0.05, 0.01])
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=2, help="of the MIL training, per draw")
    parser.add_argument("--epochs", type=int, default=8, help="of the pretraining")
    parser.add_argument("--size", type=int, default=32, help="of the cells, in pixels")
    parser.add_argument("--workers", type=int, default=None)
    parser.add_argument(
        "--only-report", action="store_true", help="store what is finished in --work so far"
    )
    parser.add_argument("--work", type=Path, help="folder of the sweep; a temporary one without it")
    parser.add_argument(
        "--from-sweep", type=Path, help="store what `sweep` of the example left here; run nothing"
    )
    parser.add_argument("--note", help="kept in the result, such as the commit of that sweep")
    parser.add_argument("--name", default="synthetic", help="results/cytology_NAME.json")
    options = parse(parser, arguments, draws=1, seeds=1, epochs=1, size=8)
    if options.quick:
        options.rates, options.draws, options.seeds = [0.3], 2, 1
        options.epochs, options.size, options.workers = 1, 16, 1
    record = provenance(options, PACKAGES, __doc__)
    with tempfile.TemporaryDirectory() as folder:
        out = options.from_sweep or options.work or Path(folder) / "sweep"
        if options.from_sweep is None:
            sweep(configure(options, out))
        elif not options.note:
            parser.error("--from-sweep needs a --note that says at which commit the sweep ran.")
        elif not (out / "summary.json").is_file():
            parser.error(
                f"--from-sweep must be the --out of a sweep. Found no summary.json in {out}."
            )
        summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
        table = pd.read_csv(out / "sweep.csv")
    result = {
        "answer": answer(summary),
        **({"note": options.note} if options.note else {}),
        **record,
        "facts": summary["facts"],
        "chance": summary["chance"],
        "rows": rows(summary, table),
    }
    return finish(options, f"cytology_{options.name}", result, figure.draw)


if __name__ == "__main__":  # also imported by worker processes
    main()
