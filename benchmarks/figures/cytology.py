"""Average precision of the abnormal cells by arm, ranking and witness rate."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks._plots import new_figure, save_svg

RANKINGS = {
    "average_precision_attention": "attention",
    "average_precision_instance_score": "cell score",
    "average_precision_slide_label": "slide label",
    "average_precision_distance": "distance",
}
STYLES: dict[str, dict[str, Any]] = {
    "ags": {"color": "#d62728", "marker": "o"},
    "sum": {"color": "black", "marker": "s"},
    "simclr": {"color": "#1f77b4", "marker": "^"},
    "pcgrad": {"color": "#ff7f0e", "marker": "P"},
    "cagrad": {"color": "#8c564b", "marker": "X"},
    "priority": {"color": "#9467bd", "marker": "<"},
    "sil": {"color": "#2ca02c", "marker": "*"},
    "random": {"color": "0.55", "marker": "v"},
    "colour": {"color": "0.75", "marker": "D"},
}
NAMES = {
    "ags": "AGS",
    "sum": "plain sum",
    "simclr": "SimCLR",
    "pcgrad": "PCGrad",
    "cagrad": "CAGrad",
    "priority": "priority",
    "sil": "slide labels",
    "random": "random encoder",
    "colour": "mean colours",
}


def draw(result: Mapping[str, Any], path: Path) -> None:
    """One panel for each ranking: means over draws with 95 % intervals, side by side at each rate; dashes: chance."""
    rows = result["rows"]
    rates = sorted({row["rate"] for row in rows}, reverse=True)
    present = {row["arm"] for row in rows}
    arms = [name for name in STYLES if name in present]
    arms += sorted(present - set(arms))
    figure = new_figure(max(11, 0.1 * len(RANKINGS) * len(rates) * len(arms)), 3.6)
    panels = figure.subplots(1, len(RANKINGS), sharey=True)
    for axes, (metric, title) in zip(panels, RANKINGS.items(), strict=True):
        for number, arm in enumerate(arms):
            style = STYLES.get(arm, {"color": f"C{number}", "marker": "X"})
            shift = min(0.13, 0.85 / len(arms)) * (number - (len(arms) - 1) / 2)
            for row in rows:
                if row["arm"] != arm or row["metrics"].get(metric, {}).get("mean") is None:
                    continue
                found = row["metrics"][metric]
                place = rates.index(row["rate"]) + shift
                axes.plot(place, found["mean"], linestyle="none", markersize=6, **style)
                if found.get("low") is not None:
                    ends = [max(found["low"], 0), min(found["high"], 1)]
                    axes.plot([place, place], ends, color=style["color"], linewidth=1)
            axes.plot([], [], linestyle="none", label=NAMES.get(arm, arm), **style)
        for place, rate in enumerate(rates):
            chance = result["chance"].get(f"{rate:g}", {}).get("average_precision_random")
            if chance is not None:
                label = "chance" if place == 0 else None
                ends = [place - 0.4, place + 0.4]
                axes.plot(ends, [chance, chance], "--", color="0.3", linewidth=1, label=label)
        axes.set_xticks(range(len(rates)), [f"{100 * rate:g} %" for rate in rates])
        axes.set(title=f"ranked by {title}", xlabel="witness rate", ylim=(0, 1.02))
        axes.title.set_fontsize(9)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("average precision")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    save_svg(figure, path)
