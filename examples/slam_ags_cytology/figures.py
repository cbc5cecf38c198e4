"""The curves of the report as SVG, the same bytes for the same run."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.decomposition import PCA

from .embeddings import read_bags
from .metrics import RANKINGS
from .results import read_result, seed_folders

__all__ = [
    "COLOURS",
    "MAP_CELLS",
    "RANKING_NAMES",
    "curves",
    "maps",
    "overview",
    "rate_lines",
    "spreads",
]

COLOURS = (
    *("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#56b4e9"),
    *("#5b4b8a", "#444444", "#e69f00", "#b0154f", "#9aa5b1", "#5f8a00"),
)
"""Colours of the arms, the first eight told apart by readers with colour-blindness (after Okabe and Ito)."""

RANKING_NAMES = {
    "attention": "Attention",
    "instance_score": "Cell score",
    "slide_label": "Slide label per cell",
    "distance": "Distance to normal",
}

ABNORMAL, NORMAL, UNKNOWN = "#d55e00", "#0072b2", "#6b7684"
"""Colours of cells by their truth, the same as the frames of the pictures."""

MAP_CELLS = 1500
"""Cells in a map of embeddings, at most."""

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


def overview(summary: dict[str, Any], split: str, arms: list[dict[str, Any]]) -> Markup | None:
    """Average precision of all arms and rankings with intervals; None without labels of cells."""
    chance = summary["splits"][split]["average_precision_random"]
    if chance is None:
        return None
    marks = dict(zip(RANKINGS, ("o", "s", "^", "D"), strict=True))
    with rc_context({"svg.hashsalt": "report", "svg.fonttype": "none"}):
        figure, axes = _figure(6.4, 0.9 + 0.55 * len(arms))
        axes.axvline(chance, color="#666", linestyle="--", linewidth=1, label="chance")
        for i, key in enumerate(RANKINGS):
            for arm in arms:
                found = summary["arms"][arm["name"]]["metrics"][split][f"average_precision_{key}"]
                half = 0.0 if found["low"] is None else found["mean"] - found["low"]
                axes.errorbar(
                    found["mean"],
                    arm["index"] + 0.18 * (i - 1.5),
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
        figure.legend(loc="outside upper center", ncols=3, fontsize=9, frameon=False)
        return _svg(figure, "overview")


def curves(out: Path, arms: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Title, note and picture of each quantity that at least one arm logged in pretraining."""
    logs = {}
    for arm in arms:
        path = out / "pretrain" / arm["name"] / "log.csv"
        if path.exists():
            logs[arm["name"]] = pd.read_csv(path)
    return [
        {"title": title, "note": note, "svg": svg}
        for column, title, note in _PANELS
        if (svg := _panel(column, logs, arms)) is not None
    ]


def _panel(
    column: str,
    logs: dict[str, pd.DataFrame],
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


def spreads(out: Path, arms: list[dict[str, Any]], split: str) -> list[dict[str, Any]]:
    """For each arm, how attention is distributed over the cells of its positive bags."""
    found = []
    for arm in arms:
        folder = dict(seed_folders(out, arm["name"]))[arm["seed"]]
        cells = read_result(folder)[1]
        cells = cells[(cells["split"] == split) & (cells["label"] == 1)]
        if len(cells):
            found.append({"arm": arm, "svg": _spread(cells, f"attention{arm['index']}")})
    return found


def _spread(cells: pd.DataFrame, prefix: str) -> Markup:
    multiple = cells["attention"] * cells.groupby("bag")["attention"].transform("size")
    # Attention of 0 after rounding is drawn at the left end: a logarithm has no place for it.
    logs = np.log10(np.maximum(multiple.to_numpy(float), 1e-3))
    kinds = [
        (1, "abnormal", ABNORMAL, "-"),
        (0, "normal", NORMAL, "--"),
        (-1, "unknown", UNKNOWN, ":"),
    ]
    with rc_context({"svg.hashsalt": "report", "svg.fonttype": "none"}):
        figure, axes = _figure(4.4, 2.5)
        for value, name, colour, style in kinds:
            mine = np.sort(logs[cells["instance_label"].to_numpy() == value])
            if len(mine):
                height = np.arange(1, len(mine) + 1) / len(mine)
                x, y = np.r_[mine[0], mine], np.r_[0, height]
                keep = np.unique(np.linspace(0, len(x) - 1, min(200, len(x))).round().astype(int))
                axes.step(x[keep], y[keep], style, color=colour, where="post", label=name)
        axes.axvline(0, color="#666", linestyle=":", linewidth=1)
        low, high = min(float(logs.min()), -0.02), max(float(logs.max()), 0.02)
        axes.set_xlim(low - 0.03 * (high - low), high + 0.03 * (high - low))
        step = 1 if high - low < 1 else 3  # of the ticks 1 2 5, all or the decades
        ticks = [m * 10.0**i for i in range(-3, 5) for m in (1, 2, 5)][::step]
        ticks = [tick for tick in ticks if low <= np.log10(tick) <= high]
        axes.set_xticks(np.log10(ticks), [f"×{tick:g}" for tick in ticks])
        axes.set_xlabel("attention over an equal share", fontsize=9)
        axes.set_ylabel("share of cells below", fontsize=9)
        axes.legend(fontsize=9, frameon=False)
        return _svg(figure, prefix)


def maps(out: Path, arms: list[dict[str, Any]], split: str) -> list[dict[str, Any]]:
    """For each arm with embeddings, its cells in the plane of their two largest principal components."""
    found = []
    for arm in arms:
        folder = out / "embed" / arm["name"]
        if not any(folder.glob("*.h5")):
            continue
        bags = [bag for bag in read_bags(folder) if bag.split == split]
        features = np.concatenate([bag.features for bag in bags]).astype(float)
        truth = np.concatenate([bag.instance_label for bag in bags])
        spread = features.std(0)
        scaled = (features - features.mean(0)) / np.where(spread > 0, spread, 1.0)
        if min(scaled.shape) < 2 or not scaled.any():
            note = "All cells have the same embedding: there is nothing to draw."
            found.append({"arm": arm, "svg": Markup(""), "note": note})
            continue
        pca = PCA(2, svd_solver="covariance_eigh").fit(scaled)
        share = pca.explained_variance_ratio_
        note = f"{100 * share.sum():.0f} % of the variance of {features.shape[1]} features."
        points = pca.transform(scaled)
        found.append({"arm": arm, "svg": _map(points, truth, f"map{arm['index']}"), "note": note})
    return found


def _map(points: np.ndarray, truth: np.ndarray, prefix: str) -> Markup:
    order = np.random.default_rng(0).permutation(len(points))
    # Few as they are, none of the abnormal cells may be missing.
    order = order[np.argsort(truth[order] != 1, kind="stable")][:MAP_CELLS]
    kinds = [
        (-1, "unknown", UNKNOWN, "."),
        (0, "normal", NORMAL, "."),
        (1, "abnormal", ABNORMAL, "^"),
    ]
    with rc_context({"svg.hashsalt": "report", "svg.fonttype": "none"}):
        figure, axes = _figure(4.4, 3.2)
        for value, name, colour, marker in kinds:
            mine = points[order[truth[order] == value]]
            if len(mine):
                size, alpha = (22, 0.85) if value == 1 else (9, 0.35)
                axes.scatter(
                    *mine.T,
                    s=size,
                    c=colour,
                    marker=marker,
                    alpha=alpha,
                    linewidths=0,
                    label=name,
                    rasterized=True,  # a thousand points as vectors would be half of the page
                )
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_xlabel("first component", fontsize=9)
        axes.set_ylabel("second component", fontsize=9)
        axes.legend(fontsize=9, frameon=False, markerscale=1.5)
        return _svg(figure, prefix)


def rate_lines(summary: dict[str, Any], metric: str, colours: dict[str, str]) -> Markup | None:
    """One figure of merit over the witness rates, a line per arm, with intervals; None where there is none.

    Args:
        summary: What `sweep_summary.summarise` returned.
        metric: Name of the figure.
        colours: Colour of each arm, in the order in which they are drawn.
    """
    rates = [float(rate) for rate in summary["chance"]][::-1]  # the lowest first
    known = [cell for cell in summary["cells"] if cell["metrics"][metric]["mean"] is not None]
    if not known:
        return None
    markers = "osD^vP*X"
    with rc_context({"svg.hashsalt": "report", "svg.fonttype": "none"}):
        figure, axes = _figure(4.4, 2.9)
        for i, (arm, colour) in enumerate(colours.items()):
            mine = {cell["rate"]: cell["metrics"][metric] for cell in known if cell["arm"] == arm}
            at = [j for j, rate in enumerate(rates) if rate in mine]
            # So that intervals do not hide each other, nor reach those of the next rate.
            shift = min(0.09, 0.6 / len(colours)) * (i - (len(colours) - 1) / 2)
            means = [mine[rates[j]]["mean"] for j in at]
            halves = [
                0.0
                if mine[rates[j]]["low"] is None
                else mine[rates[j]]["mean"] - mine[rates[j]]["low"]
                for j in at
            ]
            axes.errorbar(
                np.array(at) + shift,
                means,
                yerr=halves if any(halves) else None,
                color=colour,
                marker=markers[i % len(markers)],
                markersize=4.5,
                capsize=2,
                linewidth=1.4,
                elinewidth=0.8,
            )
        name = metric if metric.startswith("bag_") else _random_name(metric)
        levels = [summary["chance"][f"{rate:g}"].get(name) for rate in rates]
        if metric == "bag_f1":
            levels = [summary["chance"][f"{rate:g}"]["bag_f1_all_positive"] for rate in rates]
        if None not in levels:
            axes.plot(range(len(rates)), levels, color="#666", linestyle="--", linewidth=1)
        axes.set_xticks(range(len(rates)), [f"{100 * rate:g} %" for rate in rates])
        axes.set_xlabel("witness rate", fontsize=9)
        if metric.startswith(("enrichment", "first_positive")):
            axes.set_ylim(bottom=0)
        else:
            axes.set_ylim(-0.02, 1.02)
        return _svg(figure, metric)


def _random_name(metric: str) -> str:
    """Name of the chance level of a figure of a ranking."""
    ranking = next(key for key in RANKINGS if metric.endswith(key))
    return f"{metric.removesuffix(ranking)}random"
