"""One page for a cytologist and a statistician: OUT/report.html, and OUT/results.csv.

The page is a single file without scripts: pictures and curves are inside it, nothing is loaded from
elsewhere, and a content security policy says so to the browser. Text from outside (names of files,
classes, bags, arms) reaches it through the template's escaping only. The same run gives the same page.
"""

from __future__ import annotations

import base64
import io
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

import jinja2
import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from .errors import UserError
from .evaluate import BAG_METRICS, RANKINGS, RETRIEVAL_METRICS, read_result, seed_folders
from .manifest import portable_path, read_manifest, replacing
from .store import decode

__all__ = ["ReportConfig", "report"]

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#56b4e9", "#5b4b8a", "#444444")
"""Colours of the arms, told apart by readers with colour-blindness (after Okabe and Ito)."""

RANKING_NAMES = {
    "attention": "Attention",
    "instance_score": "Cell score",
    "distance": "Distance to normal",
}

_BAG_NAMES = {
    "bag_f1": "F1",
    "bag_auroc": "AUROC",
    "bag_balanced_accuracy": "Balanced accuracy",
    "bag_accuracy": "Accuracy",
}
_CELL_NAMES = {
    "average_precision": "Average precision",
    "recall_at_k": "Recall at K",
    "precision_at_k": "Precision at K",
    "r_precision": "R-precision",
    "enrichment": "Enrichment",
    "first_positive": "First abnormal cell, rank",
}


@dataclass(frozen=True)
class ReportConfig:
    """What the page shows."""

    out: Path
    """Run folder; reads the results of all steps, writes OUT/report.html and OUT/results.csv."""
    arms: tuple[str, ...] = ()
    """Pretraining arms to show. Empty: all that were evaluated."""
    bags: int = 4
    """Positive bags for which cells are shown, those with the highest mean probability."""
    cells: int = 24
    """Cells shown for each bag and ranking, the most suspicious."""
    normals: int = 12
    """Normal cells shown for reference, the least suspicious of negative bags."""
    thumbnail: int = 96
    """Width and height of the small pictures, in pixels."""


def report(config: ReportConfig) -> Path:
    """Write the page and the table, and return OUT/report.html.

    Raises:
        UserError: If a setting is out of range, or the evaluation is missing or damaged.
    """
    _check(config)
    summary = _read_summary(config)
    split = "test" if "test" in summary["splits"] else list(summary["splits"])[-1]
    thumbs = _Thumbnails(config.out, config.thumbnail)
    arms = _arms(config, summary, split, thumbs)
    context = {
        "arms": arms,
        "collapsed": [arm for arm in arms if arm["collapsed"]],
        "facts": _facts(config, summary, split),
        "settings": _settings(config, [arm["name"] for arm in arms]),
        "split": split,
        "top_k": summary["top_k"],
        "chance": summary["splits"][split],
        "rankings": [
            {"key": key, "name": RANKING_NAMES[key], "chosen": key == summary["default_ranking"]}
            for key in RANKINGS
        ],
        "bag_table": _bag_table(summary, split, arms),
        "cell_tables": {key: _cell_table(summary, split, arms, key) for key in RANKINGS},
        "overview": _overview(summary, split, arms),
        "curves": _curves(config, summary, arms),
        "thumbs": thumbs,
        "n_shown": config.cells,
        # A collapsed arm is not what a reader should meet first.
        "first_arm": min(arms, key=lambda arm: (arm["collapsed"], arm["index"]))["index"],
        "seeds": _range(len(seed_folders(config.out, arm["name"])) for arm in arms),
    }
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.j2").render(context)
    with replacing(config.out / "results.csv") as part:
        _results(summary, arms).to_csv(part, index=False, float_format="%.9g")
    with replacing(config.out / "report.html") as part:
        # A file name may hold bytes that are no text; the page shows a mark in their place.
        part.write_text(page, encoding="utf-8", errors="replace")
    return config.out / "report.html"


def _check(config: ReportConfig) -> None:
    for name, least in (("bags", 1), ("cells", 1), ("normals", 0), ("thumbnail", 16)):
        if getattr(config, name) < least:
            raise UserError(
                f"`{name}` must be at least {least}. Got {getattr(config, name)}. Raise it."
            )


def _read_summary(config: ReportConfig) -> dict[str, Any]:
    path = config.out / "evaluate" / "summary.json"
    if not path.exists():
        raise UserError(f"{path} must exist. It does not. Run the evaluate step first.")
    try:
        summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found = summary["arms"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} must be a summary. It could not be read: {error!r}. Run the evaluate step again."
        ) from error
    missing = [arm for arm in config.arms if arm not in found]
    if missing:
        raise UserError(
            f"`arms` must have been evaluated. {', '.join(missing)} were not, "
            f"{', '.join(found)} were. Run the evaluate step for them, or change `arms`."
        )
    summary["arms"] = {arm: found[arm] for arm in config.arms or found}
    return summary


# --- what was run ------------------------------------------------------------------------------


def _facts(config: ReportConfig, summary: dict[str, Any], split: str) -> list[tuple[str, str]]:
    """Name and value of what a reader must know before the figures."""
    frame = read_manifest(config.out / "manifest.csv", training=False, check_files=False)
    rate = summary["splits"][split]["witness_rate"]
    facts = [("Cells", f"{frame['path'].nunique():,}")]
    for name in ("train", "val", "test"):
        bags = frame[frame["split"] == name].drop_duplicates("bag")["label"]
        if len(bags):
            facts.append((f"Bags, {name}", f"{(bags == 1).sum()} pos., {(bags == 0).sum()} neg."))
    sizes = frame.groupby("bag").size()
    facts.append(("Cells per bag", _range(sizes)))
    facts.append(("Witness rate", "not known" if rate is None else f"{100 * rate:.3g} %"))
    abnormal = frame.loc[frame["instance_label"] == 1, "class_name"].unique()
    normal = frame.loc[frame["instance_label"] == 0, "class_name"].unique()
    for title, names in (("Abnormal classes", abnormal), ("Normal classes", normal)):
        shown = sorted(name for name in names if name)
        if shown:
            facts.append((title, ", ".join(shown[:12]) + (" ..." if len(shown) > 12 else "")))
    return facts


def _range(counts: Iterable[int]) -> str:
    """Smallest and largest count as text."""
    values = sorted(int(count) for count in counts)
    low, high = f"{values[0]:,}", f"{values[-1]:,}"
    return low if low == high else f"{low} to {high}"


def _settings(config: ReportConfig, arms: Sequence[str]) -> list[tuple[str, str]]:
    """Title and text of the recorded configurations; folders of this machine are left out."""
    files = [("bags", config.out / "bags.json")]
    files += [(f"pretrain {arm}", config.out / "pretrain" / arm / "config.json") for arm in arms]
    found = []
    for title, path in files:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        values = content.get("config", content) if isinstance(content, dict) else {}
        shown = {key: value for key, value in values.items() if key not in ("out", "fingerprint")}
        found.append((title, json.dumps(shown, indent=1, ensure_ascii=False)))
    return found


# --- tables ------------------------------------------------------------------------------------


def _spread(figure: dict[str, Any], digits: int = 3) -> str:
    if figure["mean"] is None:
        return "–"
    text = f"{figure['mean']:.{digits}f}"
    return (
        text if figure["low"] is None else f"{text} ± {figure['mean'] - figure['low']:.{digits}f}"
    )


def _plain(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _digits(metric: str) -> int:
    return 1 if metric.startswith(("first_positive", "enrichment")) else 3


def _bag_table(summary: dict[str, Any], split: str, arms: list[dict[str, Any]]) -> dict[str, Any]:
    chance = summary["splits"][split]
    always = chance["bag_f1_all_positive"]
    return {
        "heads": [_BAG_NAMES[name] for name in BAG_METRICS],
        "chance": [_plain(always), "0.500", "0.500", "–"],
        "rows": [
            (arm, [_spread(summary["arms"][arm["name"]]["metrics"][split][m]) for m in BAG_METRICS])
            for arm in arms
        ],
    }


def _cell_table(
    summary: dict[str, Any], split: str, arms: list[dict[str, Any]], ranking: str
) -> dict[str, Any]:
    chance = summary["splits"][split]
    # At K = m recall, precision and R-precision are the same figure.
    same = () if summary["top_k"] else ("precision_at_k", "r_precision")
    names = [name for name in _CELL_NAMES if name not in same]
    return {
        "heads": [_CELL_NAMES[name] for name in names],
        "chance": [_plain(chance[f"{name}_random"], _digits(name)) for name in names],
        "rows": [
            (
                arm,
                [
                    _spread(
                        summary["arms"][arm["name"]]["metrics"][split][f"{name}_{ranking}"],
                        _digits(name),
                    )
                    for name in names
                ],
            )
            for arm in arms
        ],
    }


def _results(summary: dict[str, Any], arms: list[dict[str, Any]]) -> pd.DataFrame:
    """One row per arm, split and metric; the arm `chance` has the exact expectations."""
    rows = []
    for split, chance in summary["splits"].items():
        for ranking in RANKINGS:
            for name in RETRIEVAL_METRICS:
                value = chance[f"{name}_random"]
                rows.append(("chance", "", split, f"{name}_{ranking}", value, None, None, 0))
        for arm in arms:
            for metric, figure in summary["arms"][arm["name"]]["metrics"][split].items():
                collapsed = "" if arm["status"] is None else str(arm["collapsed"]).lower()
                values = (figure["mean"], figure["low"], figure["high"], figure["n"])
                rows.append((arm["name"], collapsed, split, metric, *values))
    columns = ["arm", "collapsed", "split", "metric", "mean", "low", "high", "n"]
    table: pd.DataFrame = pd.DataFrame(rows, columns=columns)
    return table


# --- galleries ---------------------------------------------------------------------------------


@dataclass
class _Thumbnails:
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


def _arms(
    config: ReportConfig, summary: dict[str, Any], split: str, thumbs: _Thumbnails
) -> list[dict[str, Any]]:
    results = {arm: _first_seed(config, arm, split) for arm in summary["arms"]}
    shown = _bags_to_show(results, config.bags)
    arms = []
    for i, (name, (seed, bags, cells)) in enumerate(results.items()):
        found = summary["arms"][name]
        arms.append(
            {
                "name": name,
                "index": i,
                "colour": COLOURS[i % len(COLOURS)],
                "collapsed": bool(found["collapsed"]),
                "status": found["status"],
                "reason": found["reason"],
                "seed": seed,
                "dots": _dots(config, name, split),
                "threshold": float(bags["threshold"].iloc[0]),
                "bags": [_search(config, cells, bags.loc[bag], bag, thumbs) for bag in shown],
                "normals": {key: _normals(config, cells, key, thumbs) for key in RANKINGS},
            }
        )
    return arms


def _first_seed(
    config: ReportConfig, arm: str, split: str
) -> tuple[int, pd.DataFrame, pd.DataFrame]:
    folders = seed_folders(config.out, arm)
    if not folders:
        raise UserError(
            f"{config.out / 'mil' / arm} must hold the evaluated results. Found none. "
            "Run the mil and evaluate steps again."
        )
    seed, folder = folders[0]
    bags, cells = read_result(folder)
    return seed, bags[bags["split"] == split].set_index("bag"), cells[cells["split"] == split]


def _bags_to_show(
    results: dict[str, tuple[int, pd.DataFrame, pd.DataFrame]], count: int
) -> list[str]:
    """The same bags in all arms, so that galleries can be compared: highest mean probability first."""
    table = pd.concat([bags for _, bags, _ in results.values()])
    mean = table[table["label"] == 1].groupby(level=0)["probability"].mean()
    return list(mean.sort_index().sort_values(ascending=False, kind="stable").index[:count])


def _dots(config: ReportConfig, arm: str, split: str) -> list[dict[str, Any]]:
    """A point per bag and seed for the strip of probabilities; `place` spreads them vertically."""
    dots: list[dict[str, Any]] = []
    for i, (seed, folder) in enumerate(seed_folders(config.out, arm)):
        bags, _ = read_result(folder)
        for j, bag in enumerate(bags[bags["split"] == split].itertuples(index=False)):
            dots.append(
                {
                    "name": bag.bag,
                    "label": int(bag.label),
                    "x": round(100 * float(bag.probability), 2),
                    "place": (7 * j + 3 * i) % 11 - 5,
                    "seed": seed,
                    "main": i == 0,
                }
            )
    return dots


def _search(
    config: ReportConfig, cells: pd.DataFrame, bag: Any, name: str, thumbs: _Thumbnails
) -> dict[str, Any]:
    """What is shown of one positive bag."""
    mine = cells[cells["bag"] == name]
    known = bool((mine["instance_label"] >= 0).all())
    rankings = {}
    for key in RANKINGS:
        order = mine.sort_values(key, ascending=False, kind="stable").head(config.cells)
        shown = _cells(config, order, key, len(mine), thumbs)
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
        "shown": min(config.cells, len(mine)),
        "rankings": rankings,
    }


def _normals(
    config: ReportConfig, cells: pd.DataFrame, key: str, thumbs: _Thumbnails
) -> list[dict[str, Any]]:
    """The least suspicious cells of negative bags, each file once."""
    negative = cells[cells["label"] == 0].sort_values(key, kind="stable").drop_duplicates("path")
    return _cells(config, negative.head(config.normals), key, 0, thumbs)


def _cells(
    config: ReportConfig, frame: pd.DataFrame, key: str, size: int, thumbs: _Thumbnails
) -> list[dict[str, Any]]:
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
                "href": _link(path, config.out),
            }
        )
    return shown


def _score_text(key: str, score: float, size: int) -> str:
    """Short text: attention as a multiple of what equal weights would give."""
    if key == "attention" and size:
        return f"×{score * size:.2g}"
    return f"{score:+.2f}" if key == "instance_score" else f"{score:.3g}"


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


# --- curves ------------------------------------------------------------------------------------

_PANELS = (
    (
        "loss_contrastive",
        "Contrastive loss",
        "Dashed: chance. A loss that stays there learns nothing.",
    ),
    ("loss_similarity", "Similarity loss", "Near 0 together with contrast at chance: collapse."),
    ("cosine", "Cosine between the two gradients", "Below 0 the objectives conflict."),
    ("conflict", "Share of steps with a conflict", "Running mean."),
    ("scale", "Scale factor of AGS", "1: the step is as long as the plain sum's."),
    ("effective_rank", "Effective rank of the embeddings", "Near 1: all cells look the same."),
)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)
    axes.grid(alpha=0.25, linewidth=0.6)
    return figure, axes


def _svg(figure: Figure, prefix: str) -> Markup:
    """The figure as an SVG element: the same bytes in each run, and names of its own on a shared page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, count=1, flags=re.DOTALL)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{prefix}-", text)
    return Markup(text)  # safe: Matplotlib escapes text


def _overview(summary: dict[str, Any], split: str, arms: list[dict[str, Any]]) -> Markup | None:
    """Average precision of all arms and rankings with intervals; None without labels of cells."""
    chance = summary["splits"][split]["average_precision_random"]
    if chance is None:
        return None
    marks = dict(zip(RANKINGS, ("o", "s", "D"), strict=True))
    with rc_context({"svg.hashsalt": "report", "svg.fonttype": "none"}):
        figure, axes = _figure(5.6, 0.9 + 0.45 * len(arms))
        axes.axvline(chance, color="#666", linestyle="--", linewidth=1, label="chance")
        for i, key in enumerate(RANKINGS):
            for arm in arms:
                found = summary["arms"][arm["name"]]["metrics"][split][f"average_precision_{key}"]
                half = 0.0 if found["low"] is None else found["mean"] - found["low"]
                axes.errorbar(
                    found["mean"],
                    arm["index"] + 0.22 * (i - 1),
                    xerr=half or None,
                    fmt=marks[key],
                    color=arm["colour"],
                    markersize=6,
                    markerfacecolor="white" if arm["collapsed"] else arm["colour"],
                    capsize=2,
                    linewidth=1,
                )
            axes.plot([], [], marks[key], color="#444", label=RANKING_NAMES[key])
        axes.set_yticks(
            [arm["index"] for arm in arms],
            [arm["name"] + (" (collapsed)" if arm["collapsed"] else "") for arm in arms],
            parse_math=False,
        )
        axes.set_ylim(len(arms) - 0.5, -0.5)
        axes.set_xlim(0, 1.02)
        axes.set_xlabel("average precision", fontsize=9)
        figure.legend(loc="outside upper center", ncols=4, fontsize=9, frameon=False)
        return _svg(figure, "overview")


def _curves(
    config: ReportConfig, summary: dict[str, Any], arms: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    logs = {}
    for arm in arms:
        path = config.out / "pretrain" / arm["name"] / "log.csv"
        if path.exists():
            logs[arm["name"]] = pd.read_csv(path)
    return [
        {"title": title, "note": note, "svg": svg}
        for column, title, note in _PANELS
        if (svg := _panel(column, logs, summary, arms)) is not None
    ]


def _panel(
    column: str,
    logs: dict[str, pd.DataFrame],
    summary: dict[str, Any],
    arms: Iterable[dict[str, Any]],
) -> Markup | None:
    with rc_context({"svg.hashsalt": "report", "svg.fonttype": "none"}):
        figure, axes = _figure(4.4, 2.5)
        drawn = False
        for arm in arms:
            log = logs.get(arm["name"])
            if log is None or column not in log or not log[column].notna().any():
                continue
            drawn = True
            x, y = _smooth(log["step"].to_numpy(float), log[column].to_numpy(float))
            axes.plot(x, y, color=arm["colour"], linewidth=1.5)
            chance = (arm["status"] or {}).get("chance")
            if column == "loss_contrastive" and isinstance(chance, float):
                axes.axhline(chance, color=arm["colour"], linestyle="--", linewidth=1)
        reference = {"cosine": 0.0, "scale": 1.0, "effective_rank": 1.0}.get(column)
        if reference is not None:
            axes.axhline(reference, color="#666", linestyle="--", linewidth=1)
        axes.set_xlabel("step", fontsize=9)
        return _svg(figure, column) if drawn else None


def _smooth(x: np.ndarray, y: np.ndarray, points: int = 150) -> tuple[np.ndarray, np.ndarray]:
    """Running mean over a fiftieth of the steps, at no more than `points` places."""
    window = max(1, len(y) // 50)
    mean = pd.Series(y).rolling(window, min_periods=1).mean().to_numpy()
    keep = np.unique(np.linspace(0, len(y) - 1, min(points, len(y))).round().astype(int))
    keep = keep[np.isfinite(mean[keep])]
    return x[keep], mean[keep]
