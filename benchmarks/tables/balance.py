"""Average precision of the abnormal cells by setting of the pretraining."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks._markdown import table

SETTINGS = {
    "random encoder": "random encoder",
    "slide labels": "slide labels (`sil`)",
    "SimCLR": "SimCLR",
    "sum, share 0.1 from a third on": "sum, share 0.1 after a third of the steps",
    "ags, share 0.1 from a third on": "**AGS, share 0.1 after a third (default balance)**",
    "priority, share 0.1 from a third on": "`priority`, share 0.1 after a third",
    "cagrad, share 0.1 from a third on": "CAGrad, share 0.1 after a third",
    "sum, share by progress": "sum, share by progress",
    "sum, similarity weighted 0.05": "sum, similarity weighted 0.05",
    "sum, similarity weighted 0.1": "sum, similarity weighted 0.1",
    "ags, similarity weighted 0.02": "AGS, similarity weighted 0.02",
    "ags, similarity weighted 0.05": "AGS, similarity weighted 0.05",
    "priority, similarity weighted 0.05": "`priority`, similarity weighted 0.05",
    "ags-labels, no limit": "`ags-labels`: contrast on all cells, and slide labels",
    "priority-labels, no limit": "`priority-labels`: the same two",
    "ags, share 0.1, two passes": "AGS, BatchNorm of each side (two passes)",
    "ags, share 0.1, four passes": "AGS, BatchNorm of each view (four, as published)",
}
"""Those that are shown, and how; what was tried with one seed only is in the file."""

MEASURES = {
    "ap_distance": "distance to normal",
    "ap_score": "cell score",
    "ap_distance_projector": "distance, projector",
    "ap_score_projector": "cell score, projector",
}


def tables(result: Mapping[str, Any]) -> dict[str, str]:
    """A table for each witness rate: means over the seeds, and in brackets the range."""
    found = {}
    for rate in dict.fromkeys(row["rate"] for row in result["rows"]):
        lines = []
        for setting, words in SETTINGS.items():
            mine = [
                row for row in result["rows"] if (row["rate"], row["setting"]) == (rate, setting)
            ]
            if mine:
                lines.append([words, str(len(mine)), *(_range(mine, key) for key in MEASURES)])
        name = f"{100 * rate:g} %"
        found[name] = table([f"witness rate {name}", "seeds", *MEASURES.values()], lines)
    return found


def _range(rows: list[dict[str, Any]], key: str) -> str:
    values = [row[key] for row in rows]
    mean = f"{sum(values) / len(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.2f}-{max(values):.2f})"
