"""One page for a cytologist and a statistician: OUT/report.html, with OUT/results.csv and OUT/results.json.

The page is a single file without scripts: pictures and curves are inside it, nothing is loaded from
elsewhere, and a content security policy says so to the browser. Text from outside (names of files,
classes, bags, arms) reaches it through the template's escaping only. The same run gives the same page.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from .colour import COLOUR
from .errors import UserError
from .figures import COLOURS, MAP_CELLS, RANKING_NAMES, curves, maps, overview, spreads
from .files import replacing, write_text
from .galleries import Thumbnails, bags_to_show, dots, first_seed, normals, search
from .manifest import read_manifest
from .metrics import BAG_METRICS, RANKINGS, RETRIEVAL_METRICS
from .results import seed_folders

__all__ = [
    "BAG_NAMES",
    "CELL_NAMES",
    "ReportConfig",
    "digits",
    "plain",
    "report",
    "spread",
    "write_page",
]

BAG_NAMES = {
    "bag_f1": "F1",
    "bag_auroc": "AUROC",
    "bag_balanced_accuracy": "Balanced accuracy",
    "bag_accuracy": "Accuracy",
}
CELL_NAMES = {
    "average_precision": "Average precision",
    "cell_auroc": "AUROC",
    "r_precision": "Precision at m",
    "enrichment": "Enrichment at m",
    "recall_at_k": "Recall at K",
    "precision_at_k": "Precision at K",
    "first_positive": "Rank of the first",
}


@dataclass(frozen=True)
class ReportConfig:
    """Write the results as one page: OUT/report.html."""

    out: Path
    """Run folder; reads the results of all steps, writes OUT/report.html, OUT/results.csv and OUT/results.json."""
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
    thumbs = Thumbnails(config.out, config.thumbnail)
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
        "overview": overview(summary, split, arms),
        "curves": curves(config.out, arms),
        "spreads": spreads(config.out, arms, split),
        "maps": maps(config.out, arms, split),
        "map_cells": f"{MAP_CELLS:,}",
        "colour": COLOUR in summary["arms"],
        "thumbs": thumbs,
        "n_shown": config.cells,
        "first_arm": _first_arm(arms, summary),
        "shared_cells": _shared_cells(config.out),
        "seeds": _range(len(seed_folders(config.out, arm["name"])) for arm in arms),
    }
    with replacing(config.out / "results.csv") as part:
        _results(summary, arms).to_csv(part, index=False, float_format="%.9g")
    content = {"facts": dict(context["facts"]), **summary}
    write_text(config.out / "results.json", json.dumps(content, indent=1, allow_nan=False) + "\n")
    return write_page("report.html.j2", context, config.out / "report.html")


def write_page(template: str, context: dict[str, Any], path: Path) -> Path:
    """Fill in a template, with everything escaped that is not marked as safe."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(template).render(context)
    with replacing(path) as part:
        # A file name may hold bytes that are no text; the page shows a mark in their place.
        part.write_text(page, encoding="utf-8", errors="replace")
    return path


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


def _first_arm(arms: list[dict[str, Any]], summary: dict[str, Any]) -> int:
    """Index of the arm whose cells are open at first: trained, not collapsed, and best on validation."""
    metric = f"average_precision_{summary['default_ranking']}"

    def merit(arm: dict[str, Any]) -> tuple[bool, bool, float, int]:
        found = summary["arms"][arm["name"]]["metrics"].get("val", {}).get(metric)
        value = None if found is None else found["mean"]
        merit = -1.0 if value is None else value
        trained = arm["name"] not in ("random", COLOUR)
        return (not arm["collapsed"], trained, merit, -arm["index"])

    best: int = max(arms, key=merit)["index"]
    return best


def _shared_cells(out: Path) -> bool:
    """Whether some cell is in several bags of one split."""
    frame = read_manifest(out / "manifest.csv", training=False, check_files=False)
    return bool(frame.duplicated(["split", "path"]).any())


def _arms(
    config: ReportConfig, summary: dict[str, Any], split: str, thumbs: Thumbnails
) -> list[dict[str, Any]]:
    results = {arm: first_seed(config.out, arm, split) for arm in summary["arms"]}
    shown = bags_to_show(results, config.bags)
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
                "dots": dots(config.out, name, split),
                "threshold": float(bags["threshold"].iloc[0]),
                "bags": [search(cells, bags.loc[bag], bag, config.cells, thumbs) for bag in shown],
                "normals": {key: normals(cells, key, config.normals, thumbs) for key in RANKINGS},
            }
        )
    return arms


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


def spread(figure: dict[str, Any], places: int = 3) -> str:
    """Mean and half the interval as text."""
    if figure["mean"] is None:
        return "–"
    text = f"{figure['mean']:.{places}f}"
    half = "" if figure["low"] is None else f" ± {figure['mean'] - figure['low']:.{places}f}"
    return text + half


def plain(value: float | None, places: int = 3) -> str:
    """A number as text."""
    return "–" if value is None else f"{value:.{places}f}"


def digits(metric: str) -> int:
    """Decimal places that a figure of merit deserves."""
    return 1 if metric.startswith(("first_positive", "enrichment")) else 3


def _bag_table(summary: dict[str, Any], split: str, arms: list[dict[str, Any]]) -> dict[str, Any]:
    chance = summary["splits"][split]
    always = chance["bag_f1_all_positive"]
    return {
        "heads": [BAG_NAMES[name] for name in BAG_METRICS],
        "chance": [plain(always), "0.500", "0.500", "–"],
        "rows": [
            (arm, [spread(summary["arms"][arm["name"]]["metrics"][split][m]) for m in BAG_METRICS])
            for arm in arms
        ],
    }


def _cell_table(
    summary: dict[str, Any], split: str, arms: list[dict[str, Any]], ranking: str
) -> dict[str, Any]:
    chance = summary["splits"][split]
    names = list(CELL_NAMES)
    return {
        "heads": [CELL_NAMES[name] for name in names],
        "chance": [plain(chance[f"{name}_random"], digits(name)) for name in names],
        "rows": [
            (
                arm,
                [
                    spread(
                        summary["arms"][arm["name"]]["metrics"][split][f"{name}_{ranking}"],
                        digits(name),
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
