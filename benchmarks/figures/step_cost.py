"""Time of a whole step of every arm over that of the plain sum, one panel for each case."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks._plots import new_figure, save_svg

ORDER = ("AGS", "K passes")
"""At the top; the others follow as they were measured."""


def shown(case: Mapping[str, Any]) -> str:
    """What a panel is called: the network and its losses."""
    network = case["title"].partition(",")[0].partition(" (")[0]
    return f"{network}\n{case['tasks']} losses"


def peer(name: str) -> bool:
    """Whether an arm is of another package."""
    return name.startswith(("torchjd", "pytorch_optimizer"))


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Medians with quartiles over the rounds, on a logarithmic axis; the dotted line is K passes without surgery."""
    cases = list(result["cases"].values())
    if not cases:
        return
    measured = dict.fromkeys(name for case in cases for name in case["arms"])
    rest = [name for name in measured if name not in (*ORDER, "plain sum")]
    names = [*ORDER, *sorted(rest, key=peer)]
    figure = new_figure(2.6 + 1.5 * len(cases), 0.6 + 0.27 * len(names))
    panels = figure.subplots(1, len(cases), squeeze=False, sharey=True)[0]
    for axes, case in zip(panels, cases, strict=True):
        for place, name in enumerate(names):
            if name not in case["arms"]:
                continue
            over = case["arms"][name]["over_plain"]
            ours = name == "AGS"
            style = {
                "color": "#d62728" if ours else "black",
                "marker": "s" if peer(name) else "o",
                "markerfacecolor": "white" if peer(name) else None,
                "markersize": 7 if ours else 5,
            }
            axes.plot(over["median"], place, linestyle="none", zorder=3, **style)
            axes.plot([over["q25"], over["q75"]], [place, place], color=style["color"], linewidth=1)
        axes.axvline(case["arms"]["K passes"]["over_plain"]["median"], color="0.4", linestyle=":")
        axes.axvline(1, color="0.7", linewidth=1)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_title(shown(case), fontsize=8)
        axes.grid(axis="y", color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].get_yticklabels()[0].set_fontweight("bold")
    panels[0].invert_yaxis()
    figure.supxlabel(
        "time of a step over that of the plain sum; dotted: K backward passes; squares: peers",
        fontsize=9,
    )
    save_svg(figure, path)
