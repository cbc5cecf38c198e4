"""Why does the published pretraining of the cytology example collapse, and which settings train?

Pretrains the example's small encoder with the published balance of its two losses and with alternatives that
change one thing each, on the same cells and bags, and reports for each setting: contrastive loss at the end beside its
chance value, effective rank of the embeddings (1: all cells look alike), length of the similarity gradient relative to
the contrastive one as the losses give them, their cosine, and how well test cells are ranked by their distance to
the normal training cells (average precision; chance is the share of abnormal cells).

    python -m benchmarks.collapse
    python -m benchmarks.collapse --cells CELLS --normal LYT --positive BLA --name real

Without --cells the cells are synthetic. Each setting takes one to two minutes on two cores.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from sklearn.covariance import LedoitWolf
from sklearn.metrics import average_precision_score

from benchmarks._cli import finish, new_parser, parse, provenance
from examples.slam_ags_cytology import views
from examples.slam_ags_cytology.bags import BagsConfig, bags
from examples.slam_ags_cytology.manifest import read_manifest
from examples.slam_ags_cytology.networks import load_encoder
from examples.slam_ags_cytology.pretrain import PretrainConfig, pretrain
from examples.slam_ags_cytology.store import open_store
from examples.slam_ags_cytology.synthetic import (
    ABNORMAL_CLASSES,
    NORMAL_CLASSES,
    SyntheticConfig,
    synthetic,
)

PACKAGES = ("torch", "kornia", "scikit-learn")
PUBLISHED: dict[str, Any] = {
    "similarity_share": None,
    "similarity_start": 0.0,
    "similarity_temperature": 0.07,
    "temperature": 0.07,
    "lr": 1e-3,
    "statistics": "separate",
}


@dataclass(frozen=True)
class Setting:
    """A row of the table: an arm of the example, and what differs from its defaults."""

    name: str
    arm: str
    changes: dict[str, Any] = field(default_factory=dict)


SETTINGS = (
    Setting("random encoder", "random"),
    Setting("published, plain sum", "sum", PUBLISHED),
    Setting("published, AGS", "ags", PUBLISHED),
    Setting("published, lr 0.1", "sum", PUBLISHED | {"lr": 0.1}),
    Setting(
        "published, BatchNorm in projector",
        "sum",
        PUBLISHED | {"projector_batch_norm": True, "lr": 0.03},
    ),
    Setting(
        "no limit, temperature 0.2", "sum", {"similarity_share": None, "similarity_start": 0.0}
    ),
    Setting("share 0.3, plain sum", "sum", {"similarity_share": 0.3, "similarity_start": 0.0}),
    Setting("share 0.3, AGS", "ags", {"similarity_share": 0.3, "similarity_start": 0.0}),
    Setting("default, plain sum", "sum"),
    Setting("default, AGS", "ags"),
    Setting("SimCLR on all patches", "simclr"),
)


def measure(
    setting: Setting, draw: BagsConfig, epochs: int, seed: int, device: str
) -> dict[str, Any]:
    """Pretrain one setting, and say how it ended."""
    bags(draw)
    config = PretrainConfig(
        draw.out, arm=setting.arm, epochs=epochs, seed=seed, device=device, **setting.changes
    )
    encoder_path = pretrain(config)
    folder = encoder_path.parent
    status = json.loads((folder / "status.json").read_text(encoding="utf-8"))
    row: dict[str, Any] = {"setting": setting.name, "seed": seed, "collapsed": status["collapsed"]}
    if setting.arm != "random":
        log = pd.read_csv(folder / "log.csv")
        tail = log.tail(max(1, len(log) // 10))
        row |= {
            "contrastive": float(tail["loss_contrastive"].mean()),
            "chance": status["chance"],
            "effective_rank": float(tail["effective_rank"].mean()),
        }
        if setting.arm != "simclr":  # which has one objective only
            row["norm_ratio"] = float((tail["norm_similarity"] / tail["norm_contrastive"]).mean())
            row["cosine"] = float(tail["cosine"].mean())
    return row | {"average_precision": ranking(encoder_path, config)}


def ranking(encoder_path: Path, config: PretrainConfig) -> float:
    """Average precision of the abnormal test cells, ranked by distance to the normal training cells."""
    frame = read_manifest(config.out / "manifest.csv")
    store = open_store(frame["path"], config.patch, config.out)
    encoder, _ = load_encoder(encoder_path)
    encoder.to(config.device)
    features = []
    with torch.no_grad():
        for rows in np.array_split(store.rows(frame["path"]), max(1, len(frame) // 256)):
            images = views.centre(views.to_float(store.images[rows]), config.crop)
            features.append(encoder(images.to(config.device)).cpu().numpy())
    embedded = np.concatenate(features)
    normal = ((frame["split"] == "train") & (frame["label"] == 0)).to_numpy()
    test = (frame["split"] == "test").to_numpy()
    distance = LedoitWolf().fit(embedded[normal]).mahalanobis(embedded[test])
    return float(average_precision_score(frame.loc[test, "instance_label"].astype(int), distance))


def table(rows: list[dict[str, Any]]) -> str:
    """Aligned columns, one line per setting and seed."""
    frame = pd.DataFrame(rows)
    return frame.to_string(index=False, float_format=lambda value: f"{value:.3f}", na_rep="-")


def answer(rows: list[dict[str, Any]]) -> str:
    """Which settings fail."""
    collapsed = sorted({row["setting"] for row in rows if row["collapsed"]})
    return f"Answer: {len(collapsed)} settings collapse ({'; '.join(collapsed) or 'none'}), the others do not."


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run all settings, store the results, and answer."""
    parser = new_parser(__doc__)
    parser.add_argument(
        "--cells", type=Path, help="folder of class folders; synthetic cells without it"
    )
    parser.add_argument("--split-csv", type=Path, help="published split of these cells")
    parser.add_argument("--normal", nargs="+", default=["LYT"])
    parser.add_argument("--positive", nargs="+", default=["BLA"])
    parser.add_argument("--reuse-normals", action="store_true", help="as in the bags step")
    parser.add_argument("--witness-rate", type=float, default=0.1)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--settings", nargs="+", choices=[s.name for s in SETTINGS])
    parser.add_argument(
        "--name", default="synthetic", help="of the result: results/collapse_NAME.json"
    )
    options = parse(parser, arguments, epochs=1)
    if options.quick:
        options.epochs = 1
    record = provenance(options, PACKAGES, __doc__)
    chosen = [s for s in SETTINGS if options.settings is None or s.name in options.settings]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        cells, classes = options.cells, (tuple(options.normal), tuple(options.positive))
        if cells is None:
            small = {"normal": 420, "abnormal": 60} if options.quick else {}
            cells = synthetic(SyntheticConfig(out=Path(folder), **small))
            classes = (NORMAL_CLASSES, ABNORMAL_CLASSES)
        for number, setting in enumerate(chosen):
            for seed in options.seeds:
                draw = BagsConfig(
                    out=Path(folder) / f"{number}-{seed}",
                    cells=cells,
                    split_csv=options.split_csv,
                    normal=classes[0],
                    positive=classes[1],
                    witness_rate=options.witness_rate,
                    reuse_normals=options.reuse_normals,
                    **({"bag_size": 10} if options.quick else {}),
                )
                rows.append(measure(setting, draw, options.epochs, seed, options.device))
                print(table(rows[-1:]), flush=True)
    print(table(rows))
    facts = {"witness_rate": options.witness_rate, "epochs": options.epochs}
    result = {"answer": answer(rows), **record, **facts, "rows": rows}
    return finish(options, f"collapse_{options.name}", result)


if __name__ == "__main__":
    main()
