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

from .metrics import RANKINGS

__all__ = ["COLOURS", "RANKING_NAMES", "curves", "overview"]

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#56b4e9", "#5b4b8a", "#444444")
"""Colours of the arms, told apart by readers with colour-blindness (after Okabe and Ito)."""

RANKING_NAMES = {
    "attention": "Attention",
    "instance_score": "Cell score",
    "distance": "Distance to normal",
}

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
