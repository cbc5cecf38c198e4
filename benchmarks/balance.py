"""Which balance of similarity and contrast makes abnormal cells easiest to find?

Pretrains the encoder of examples/slam_ags_cytology by different rules on one draw of bags for each seed, and reports
for each setting the average precision of the abnormal cells, ranked by their distance to the normal training cells and
by the cell score of attention MIL, from encoder features and, for comparison, from projector outputs.

Settings are chosen without the test cells: with `--judge val`, cells of split `test` are left out of everything, and
the others are divided anew for each seed, 60 % to train on and 40 % to judge on. `--judge test` keeps the published
split: for the confirmation of what was chosen. All cells of the judging part count, weighted so that abnormal ones have
the share that they have in a positive bag; chance is that share.

    python -m benchmarks.balance --cells CELLS --split-csv SPLIT.csv --rates 0.05 --seeds 0 1

A run that was interrupted continues: rows that the result file holds are kept, each with its own commit
and date. A setting takes 50 s on one core.
"""

from __future__ import annotations

import itertools
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import average_precision_score

from benchmarks._cli import finish, new_parser, parse, provenance, result_path, threads
from benchmarks._measure import write_json
from examples.slam_ags_cytology.attention import GatedAttention, NormalCells
from examples.slam_ags_cytology.bags import BagsConfig, bags
from examples.slam_ags_cytology.cells import load_cells
from examples.slam_ags_cytology.embed import encode
from examples.slam_ags_cytology.manifest import read_manifest
from examples.slam_ags_cytology.mil import MilConfig, train_mil
from examples.slam_ags_cytology.networks import load_encoder
from examples.slam_ags_cytology.pretrain import PretrainConfig, pretrain
from examples.slam_ags_cytology.store import open_store

PACKAGES = ("torch", "kornia", "scikit-learn")
MIL_SEEDS = 2  # trainings of attention MIL, of whose cell scores the mean average precision counts
MEASURES = ("ap_distance", "ap_score", "ap_distance_projector", "ap_score_projector")


@dataclass(frozen=True)
class Setting:
    """A row of the table: an arm of the example, and what differs from the base of this study."""

    arm: str
    changes: dict[str, Any] = field(default_factory=dict)


BASE: dict[str, Any] = {"similarity_share": 0.1, "similarity_start": 0.33}
FREE: dict[str, Any] = {"similarity_share": None, "similarity_start": 0.0}
PROGRESS: dict[str, Any] = {"similarity_share": "progress", "similarity_start": 0.0}

SETTINGS: dict[str, Setting] = {
    "random encoder": Setting("random"),
    "slide labels": Setting("sil"),
    "SimCLR": Setting("simclr"),
    # the share, by method
    **{
        f"{arm}, share {share:g} from a third on": Setting(arm, BASE | {"similarity_share": share})
        for arm in ("sum", "ags", "priority")
        for share in (0.05, 0.1, 0.3, 1.0)
    },
    **{
        f"{arm}, share {share:g} from the start": Setting(
            arm, {"similarity_share": share, "similarity_start": 0.0}
        )
        for arm in ("sum", "ags", "priority")
        for share in (0.1, 0.3)
    },
    **{f"{arm}, share by progress": Setting(arm, PROGRESS) for arm in ("sum", "ags", "priority")},
    **{f"{arm}, no limit": Setting(arm, FREE) for arm in ("sum", "ags", "priority")},
    # a fixed weight of the similarity loss, relative to a contrastive loss of temperature 0.2, instead of a limit
    **{
        f"{arm}, similarity weighted {weight:g}": Setting(
            arm, FREE | {"similarity_temperature": 0.2 / weight}
        )
        for arm in ("sum", "ags", "priority", "cagrad")
        for weight in (0.02, 0.05, 0.1)
    },
    # other methods
    **{
        f"{arm}, share 0.1 from a third on": Setting(arm, BASE)
        for arm in ("pcgrad", "cagrad", "upgrad", "imtlg", "alignedmtl", "mgda")
    },
    "ags, share 0.1, factor at most 1": Setting("ags", BASE | {"max_scale": 1.0}),
    # another pair: contrast on all cells, and the labels of their slides
    **{f"{arm}, no limit": Setting(arm) for arm in ("sum-labels", "ags-labels", "priority-labels")},
    # where the gradients are reconciled
    "ags, share 0.1, encoder and projector apart": Setting("ags", BASE | {"granularity": "part"}),
    "ags, share 0.1, every tensor apart": Setting("ags", BASE | {"granularity": "parameter"}),
    # the space in which the objectives meet
    **{
        f"ags, share 0.1, temperature {value:g}": Setting("ags", BASE | {"temperature": value})
        for value in (0.1, 0.5)
    },
    "ags, share 0.1, projector with BatchNorm": Setting(
        "ags", BASE | {"projector_batch_norm": True}
    ),
    "ags, share 0.1, projector of 512": Setting("ags", BASE | {"hidden": 512, "outputs": 512}),
    # whose statistics BatchNorm uses
    "ags, share 0.1, two passes": Setting("ags", BASE | {"statistics": "separate"}),
    "ags, share 0.1, four passes": Setting("ags", BASE | {"statistics": "views"}),
    "sum, share 0.1, two passes": Setting("sum", BASE | {"statistics": "separate"}),
    "sum, share 0.1, four passes": Setting("sum", BASE | {"statistics": "views"}),
}


@dataclass(frozen=True)
class Task:
    """Where the cells are, and how they are used."""

    cells: Path
    split_csv: Path | None
    normal: tuple[str, ...]
    positive: tuple[str, ...]
    judge: str
    epochs: int
    patch: int
    crop: int
    device: str = "cpu"
    mil_epochs: int = MilConfig.epochs

    def draw(self, folder: Path, rate: float, seed: int) -> BagsConfig:
        """Bags of one seed at one witness rate."""
        common: dict[str, Any] = {
            "out": folder,
            "cells": self.cells,
            "normal": self.normal,
            "positive": self.positive,
            "witness_rate": rate,
            "reuse_normals": True,
            "val_bags": 4,
            "test_bags": 0,
            "seed": seed,
        }
        if self.judge == "test":
            return BagsConfig(split_csv=self.split_csv, **common | {"val_bags": 2})
        return BagsConfig(
            split_csv=self._without_test(folder),
            split_fractions=(0.6, 0.4, 0.0),
            split_seed=seed,
            **common,
        )

    def _without_test(self, folder: Path) -> Path | None:
        """The published split without its test cells, and without its division of the others."""
        if self.split_csv is None:
            return None
        table = pd.read_csv(self.split_csv, dtype=str)
        table["group"] = table["group"].fillna("") if "group" in table else ""
        columns = [name for name in ("file", "class", "group") if name in table]
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / "cells.csv"
        table.loc[table["split"] != "test", columns].to_csv(target, index=False)
        return target


def measure(setting: Setting, task: Task, rate: float, seed: int, folder: Path) -> dict[str, Any]:
    """Pretrain one setting, and say how well its features tell the abnormal cells from the normal ones."""
    begin = time.process_time()
    draw = task.draw(folder, rate, seed)
    bags(draw)
    config = PretrainConfig(
        out=folder,
        arm=setting.arm,
        epochs=task.epochs,
        patch=task.patch,
        crop=task.crop,
        seed=seed,
        device=task.device,
        **setting.changes,
    )
    path = pretrain(config)
    status = json.loads((path.parent / "status.json").read_text(encoding="utf-8"))
    row: dict[str, Any] = {"collapsed": status["collapsed"], "weak": status["weak"]}
    if status["steps"]:
        log = pd.read_csv(path.parent / "log.csv")
        tail = log.tail(max(1, len(log) // 10)).mean(numeric_only=True)
        for name in ("loss_contrastive", "loss_similarity", "cosine", "scale", "effective_rank"):
            row[name] = _finite(tail[name])
        row["norm_ratio"] = _finite(tail["norm_similarity"] / tail["norm_contrastive"])
        row["loss_chance"] = status["chance"]
        row["steps"] = status["steps"]
    for level, suffix in (("encoder", ""), ("projector", "_projector")):
        distance, score = judge(path, level, config, draw, task, rate)
        row |= {f"ap_distance{suffix}": distance, f"ap_score{suffix}": score}
    return row | {"cpu_seconds": round(time.process_time() - begin, 1)}


def judge(
    path: Path,
    level: str,
    config: PretrainConfig,
    draw: BagsConfig,
    task: Task,
    rate: float,
) -> tuple[float, float]:
    """Average precision of the judging cells by distance to normal, and by the cell score of attention MIL."""
    frame = read_manifest(config.out / "manifest.csv")
    assert draw.cells is not None
    pool = [cell for cell in load_cells(draw) if cell.split == task.judge]
    names = [str(draw.cells.absolute() / cell.file) for cell in pool]
    truth = np.array([cell.kind in task.positive for cell in pool])
    store = open_store([*frame["path"], *names], config.patch, config.out / "judged")
    network, _ = load_encoder(path, level=level)
    features = encode(network.to(task.device), np.array(store.images), config.crop)

    train = frame[frame["split"] == "train"]
    fitted = features[store.rows(train["path"])].astype(np.float64)
    mean, std = fitted.mean(0), fitted.std(0)
    std[std <= 1e-6 * np.abs(mean)] = 1.0
    normal = (fitted[(train["label"] == 0).to_numpy()] - mean) / std
    judged = features[store.rows(names)]
    distance = NormalCells(normal).distance((judged.astype(np.float64) - mean) / std)

    def of(split: str) -> tuple[list[torch.Tensor], list[int]]:
        groups = [part for _, part in frame[frame["split"] == split].groupby("bag", sort=True)]
        tensors = [
            torch.from_numpy(features[store.rows(part["path"])]).to(task.device) for part in groups
        ]
        return tensors, [int(part["label"].iloc[0]) for part in groups]

    weights = np.where(truth, rate / truth.sum(), (1 - rate) / (~truth).sum())
    scored = []
    for mil_seed in range(MIL_SEEDS):
        model = GatedAttention(torch.tensor(mean).float(), torch.tensor(std).float())
        model.to(task.device)
        train_mil(
            model,
            of("train"),
            of("val"),
            MilConfig(out=config.out, epochs=task.mil_epochs),
            mil_seed,
        )
        model.eval()
        with torch.no_grad():
            score = model(torch.from_numpy(judged).to(task.device))[2].cpu().numpy()
        scored.append(float(average_precision_score(truth, score, sample_weight=weights)))
    of_distance = float(average_precision_score(truth, distance, sample_weight=weights))
    return of_distance, sum(scored) / len(scored)


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def table(rows: list[dict[str, Any]]) -> str:
    """Mean over the seeds, with the number of seeds and the range of the average precision by distance."""
    frame = pd.DataFrame(rows)
    if "effective_rank" not in frame:  # of the random encoder alone
        frame["effective_rank"] = np.nan
    grouped = frame.groupby(["rate", "setting"], sort=False)
    shown = grouped[[*MEASURES, "effective_rank"]].mean()
    shown["seeds"] = grouped.size()
    shown["collapsed"] = grouped["collapsed"].sum()
    lows, highs = grouped["ap_distance"].min(), grouped["ap_distance"].max()
    shown["distance from-to"] = [f"{a:.2f}-{b:.2f}" for a, b in zip(lows, highs, strict=True)]
    text: str = shown.to_string(float_format=lambda value: f"{value:.3f}", na_rep="-")
    return text


def answer(rows: list[dict[str, Any]]) -> str:
    """The setting with the best mean of both rankings at each witness rate, of those with the most seeds."""
    frame = pd.DataFrame(rows)
    frame["merit"] = frame[["ap_distance", "ap_score"]].mean(axis=1)
    parts = []
    for rate, part in frame.groupby("rate"):
        by_setting = part.groupby("setting")["merit"]
        means = by_setting.mean()[by_setting.size() == by_setting.size().max()]
        best = str(means.idxmax())
        parts.append(
            f"at {rate:.1%} {best} ({means[best]:.3f}, SimCLR {means.get('SimCLR', np.nan):.3f})"
        )
    return "Answer: best mean of both average precisions " + "; ".join(parts) + "."


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure what is not measured yet, store it, and answer."""
    parser = new_parser(__doc__)
    parser.add_argument("--cells", type=Path, help="folder of class folders; needed")
    parser.add_argument("--split-csv", type=Path, help="published split of these cells")
    parser.add_argument("--normal", nargs="+", default=["LYT"])
    parser.add_argument("--positive", nargs="+", default=["BLA", "EOS", "MON", "NGS", "PMO"])
    parser.add_argument("--judge", choices=("val", "test"), default="val")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.05, 0.01])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=18)
    parser.add_argument("--patch", type=int, default=48, help="side of a decoded cell")
    parser.add_argument("--crop", type=int, default=42, help="side of what the encoder sees")
    parser.add_argument(
        "--settings", nargs="+", metavar="WORDS", help="only those that hold one of these words"
    )
    options = parse(parser, arguments, epochs=1)
    if options.cells is None:
        parser.error("--cells must name a folder with a folder of cells for each class. Got none.")
    names = [
        name
        for name in SETTINGS
        if options.settings is None or any(word in name for word in options.settings)
    ]
    if not names:
        parser.error(
            f"--settings must have a word that is in the name of a setting, such as `SimCLR`. Got {options.settings}."
        )
    if options.quick:
        names = names[:2]
        options.rates, options.seeds = options.rates[:1], options.seeds[:1]
        options.epochs, options.patch, options.crop = 1, 16, 14
    task = Task(
        options.cells,
        options.split_csv,
        tuple(options.normal),
        tuple(options.positive),
        options.judge,
        options.epochs,
        options.patch,
        options.crop,
        options.device,
        2 if options.quick else MilConfig.epochs,
    )
    title = f"balance_{options.judge}"
    facts = {"judge": options.judge, "normal": options.normal, "positive": options.positive}
    path = result_path(options, title)
    # What is stored stays as it is, with its commit and date, unless a row is added.
    result = json.loads(path.read_text(encoding="utf-8")) if path and path.exists() else {}
    rows: list[dict[str, Any]] = result.get("rows", [])
    others = {key: result.get(key) for key in facts if rows and result.get(key) != facts[key]}
    if others:
        parser.error(
            f"{path} must hold rows of the same task. It has {others}. Name another --out."
        )
    done = {(row["setting"], row["rate"], row["seed"], row["epochs"]) for row in rows}
    with threads():
        record = provenance(options, PACKAGES, __doc__)
        for rate, seed, name in itertools.product(options.rates, options.seeds, names):
            if (name, rate, seed, options.epochs) in done:
                continue
            with tempfile.TemporaryDirectory() as folder:
                row = measure(SETTINGS[name], task, rate, seed, Path(folder))
            key = {"setting": name, "rate": rate, "seed": seed, "epochs": options.epochs}
            rows.append(key | row | {"commit": record["commit"], "date": record["date"]})
            result = {"answer": answer(rows), **record, **facts, "rows": rows}
            if path is not None:  # after each row, to be continued from there
                write_json(path, result)
            print(json.dumps(rows[-1]), flush=True)
    print(table(rows))
    return finish(options, title, result)


if __name__ == "__main__":
    main()
