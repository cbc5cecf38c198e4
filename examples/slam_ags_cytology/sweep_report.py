"""The results of a sweep as files: OUT/sweep.csv, OUT/summary.json and the page OUT/report.html."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
from markupsafe import Markup

from .colour import COLOUR
from .figures import COLOURS, RANKING_NAMES, rate_lines
from .files import replacing, write_text
from .metrics import BAG_METRICS, RANKINGS
from .report import BAG_NAMES, CELL_NAMES, digits, plain, spread, write_page

__all__ = ["sweep_report"]

_FIGURES = {
    "bag_auroc": "AUROC of slides",
    "bag_f1": "F1 of slides",
    **{
        f"average_precision_{key}": f"Average precision, {RANKING_NAMES[key].lower()}"
        for key in RANKINGS
    },
}
_COMPARED = {
    "bag_auroc": "AUROC of slides",
    "bag_f1": "F1 of slides",
    **{f"average_precision_{key}": f"AP, {RANKING_NAMES[key].lower()}" for key in RANKINGS},
}


def sweep_report(out: Path, table: pd.DataFrame, summary: dict[str, Any]) -> Path:
    """Write table, summary and page, and return the path of the page.

    Args:
        out: Folder of the sweep.
        table: What `sweep_summary.sweep_table` returned.
        summary: What `sweep_summary.summarise` made of it.
    """
    with replacing(out / "sweep.csv") as part:
        table.to_csv(part, index=False, float_format="%.9g")
    write_text(out / "summary.json", json.dumps(summary, indent=1, allow_nan=False) + "\n")
    return write_page("sweep.html.j2", _context(out, summary), out / "report.html")


def _context(out: Path, summary: dict[str, Any]) -> dict[str, Any]:
    facts, chance = summary["facts"], list(summary["chance"].values())
    names = facts["arms"]
    colours = {arm: COLOURS[i % len(COLOURS)] for i, arm in enumerate(names)}
    lines = {metric: rate_lines(summary, metric, colours) for metric in _FIGURES}
    repetitions = sorted({f"{cell[cell['over']]} {cell['over']}" for cell in summary["cells"]})
    return {
        "arms": [{"name": arm, "colour": colour} for arm, colour in colours.items()],
        "rankings": [
            {"key": key, "name": RANKING_NAMES[key], "chosen": key == summary["default_ranking"]}
            for key in RANKINGS
        ],
        "facts": _facts(facts),
        "collapsed": sum(cell["collapsed"] for cell in summary["cells"]),
        "trained": sum(
            cell["draws"] for cell in summary["cells"] if cell["arm"] not in ("random", COLOUR)
        ),
        "missing": facts["missing"],
        "over": " or ".join(repetitions),
        "n_seeds": len(facts["mil_seeds"]),
        "has_colour": COLOUR in names,
        "curriculum": facts["curriculum"],
        "shared": facts["shared_encoder"],
        "top_k": facts["top_k"],
        "capped": any(level["capped_bags"] for level in chance),
        "searched": any(level["searched_bags"] for level in chance),
        "slides_note": _slides_note(facts),
        "figures": [
            {"title": title, "svg": lines[metric]}
            for metric, title in _FIGURES.items()
            if lines[metric] is not None
        ],
        "bag_table": _table(summary, {name: BAG_NAMES[name] for name in BAG_METRICS}),
        "cell_tables": {
            key: _table(summary, {f"{name}_{key}": head for name, head in CELL_NAMES.items()})
            for key in RANKINGS
        },
        "difference_table": _differences(summary),
        "reference": facts["reference"],
        "runs": [
            {"href": f"./rate-{rate}/draw-0/report.html", "rate": f"{100 * float(rate):g} %"}
            for rate in summary["chance"]
            if (out / f"rate-{rate}" / "draw-0" / "report.html").exists()
        ],
        "settings": json.dumps(facts, indent=1, ensure_ascii=False, default=str),
    }


def _facts(facts: dict[str, Any]) -> list[tuple[str, str]]:
    bags = ", ".join(f"{name} {2 * count}" for name, count in facts["bags"].items())
    return [
        ("Witness rates", ", ".join(f"{100 * rate:g} %" for rate in facts["witness_rates"])),
        ("Draws x seeds", f"{facts['draws']} x {len(facts['mil_seeds'])}"),
        ("Bags", bags),
        ("Cells per bag", f"{facts['bag_size']:,}"),
        ("Normal classes", ", ".join(facts["normal"])),
        ("Abnormal classes", ", ".join(facts["positive"])),
    ]


def _slides_note(facts: dict[str, Any]) -> str:
    note = (
        f"{2 * facts['bags']['test']} test bags in each draw, half of them positive: with so many bags these "
        "figures take few values."
    )
    if facts["reuse_normals"]:
        note += " Bags of one split may share normal cells, so they are not independent."
    return note


def _table(summary: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    """Rows by witness rate, chance first."""
    groups = []
    for rate, chance in summary["chance"].items():
        rows = [
            _row(summary, cell, [spread(cell["metrics"][name], digits(name)) for name in columns])
            for cell in summary["cells"]
            if f"{cell['rate']:g}" == rate
        ]
        levels = [plain(chance.get(_chance_name(name)), digits(name)) for name in columns]
        groups.append({"rate": _percent(rate), "chance": levels, "rows": rows})
    return {"heads": list(columns.values()), "groups": groups, "first": "chance"}


def _differences(summary: dict[str, Any]) -> dict[str, Any]:
    groups = []
    for rate in summary["chance"]:
        rows = [
            _row(summary, cell, [_difference(cell["differences"][name]) for name in _COMPARED])
            for cell in summary["cells"]
            if f"{cell['rate']:g}" == rate and cell["differences"]
        ]
        if rows:
            groups.append({"rate": _percent(rate), "chance": [], "rows": rows})
    return {"heads": list(_COMPARED.values()), "groups": groups, "first": ""}


def _row(summary: dict[str, Any], cell: dict[str, Any], texts: list[Any]) -> dict[str, Any]:
    return {
        "arm": summary["facts"]["arms"].index(cell["arm"]),
        "collapsed": cell["collapsed"],
        "draws": cell["draws"],
        "texts": texts,
    }


def _difference(figure: dict[str, Any]) -> Any:
    if figure["mean"] is None:
        return "–"
    text = f"{figure['mean']:+.3f}"
    if figure["low"] is None:
        return text
    text += f" ± {figure['mean'] - figure['low']:.3f}"
    return text if figure["low"] <= 0 <= figure["high"] else Markup("<b>{}</b>").format(text)


def _chance_name(metric: str) -> str:
    """Name of the chance level of a figure of merit."""
    if metric == "bag_f1":
        return "bag_f1_all_positive"
    for key in RANKINGS:
        if metric.endswith(f"_{key}"):
            return f"{metric.removesuffix(key)}random"
    return metric


def _percent(rate: str) -> str:
    return f"{100 * float(rate):g} %"
