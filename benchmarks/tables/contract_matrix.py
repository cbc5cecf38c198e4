"""Which promise is kept by which wrapper."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks._markdown import bold, table


def tables(result: Mapping[str, Any]) -> dict[str, str]:
    """A row for each promise, a column for each wrapper, and how many each keeps."""
    subjects, promises = result["subjects"], result["promises"]
    rows = [
        [words, *("✗" if check in found["failures"] else "✓" for found in subjects.values())]
        for check, words in promises.items()
    ]
    kept = [bold(str(found["kept"])) for found in subjects.values()]
    rows.append([f"of {len(promises)}", *kept])
    return {"": table(["promise", *subjects], rows, others=":-:")}
