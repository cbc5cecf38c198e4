"""Which wrappers of an optimizer keep the promises of a torch optimizer, and which break which?

Each check is one promise that schedulers, scalers, checkpoints, hooks and copies rely on, tried on a bare AdamW and on
the same AdamW inside a wrapper: ours, those of others, and the usual ways to write one.

    python -m benchmarks.contract_matrix
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks._cli import finish, new_parser, parse, provenance
from benchmarks._contract_promises import CHECKS
from benchmarks._contract_subjects import SUBJECTS, Wrap

PACKAGES = ("torch", "pytorch_optimizer", "timm", "accelerate", "lightning")
BARE, OURS = "bare AdamW", "GradientSurgery"


def promise(check: Callable[[Wrap], None]) -> str:
    """What a check tries, in words."""
    return (check.__doc__ or "").strip().rstrip(".")


def failure(check: Callable[[Wrap], None], wrap: Wrap) -> str | None:
    """Why a wrapper fails a check; None if it passes."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Of torch's distributed checkpoint about itself.
        warnings.filterwarnings("ignore", category=FutureWarning)
        try:
            check(wrap)
        except Exception as error:
            lines = str(error).splitlines() or [""]
            return f"{type(error).__name__}: {lines[0]}"[:160].rstrip(": ")
    return None


def matrix(
    names: Sequence[str] | None = None, device: str = "cpu"
) -> tuple[dict[str, Any], dict[str, str]]:
    """Results of all subjects, or of some, and the reasons for those that could not be tried."""
    results: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    for name, make in SUBJECTS.items():
        if names is not None and name not in names:
            continue
        try:
            wrap = make()
        except ImportError as error:
            skipped[name] = str(error)
            continue
        with torch.device(device):  # where the models of the checks are made
            found = {check.__name__: failure(check, wrap) for check in CHECKS}
        kept = sum(reason is None for reason in found.values())
        results[name] = {"kept": kept, "failures": {k: v for k, v in found.items() if v}}
    return results, skipped


def answer(results: dict[str, Any]) -> str:
    """The last line."""
    total = len(CHECKS)
    ours = results.get(OURS, {"kept": 0})["kept"]
    others = {
        name: result["kept"]
        for name, result in results.items()
        if name != BARE and OURS not in name
    }
    line = f"Answer: GradientSurgery keeps {ours} of the {total} promises"
    if BARE in results:
        line += f", the bare optimizer {results[BARE]['kept']}"
    if others:
        best = max(others, key=lambda name: others[name])
        worst = min(others, key=lambda name: others[name])
        line += f", other wrappers {others[worst]} ({worst}) to {others[best]} ({best})"
    return line + "."


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Try all, store the result, and answer."""
    parser = new_parser(__doc__)
    parser.add_argument("--subjects", nargs="+", choices=list(SUBJECTS), help="only these")
    options = parse(parser, arguments)
    record = provenance(options, PACKAGES, __doc__)
    names = [BARE, OURS] if options.quick else options.subjects
    results, skipped = matrix(names, options.device)
    width = max(len(name) for name in results)
    for name, result in results.items():
        print(f"{name:<{width}}  {result['kept']:>2} of {len(CHECKS)}")
        for check, reason in result["failures"].items():
            print(f"{'':<{width}}    ✗ {check}: {reason}")
    for name, reason in skipped.items():
        print(f"{name:<{width}}  skipped: {reason}")
    promises = {check.__name__: promise(check) for check in CHECKS}
    content = {"promises": promises, "subjects": results, "skipped": skipped}
    return finish(options, "contract_matrix", {"answer": answer(results), **record, **content})


if __name__ == "__main__":
    main()
