"""Pages that are made when the documentation is built, so that nothing is said in two places.

`write(folder)` makes one page for each method, from its docstring and what is said of it below, and the part of a page
with the question of every benchmark and its stored answer.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path

import agsurgery

ROOT = Path(__file__).parent.parent
METHODS, RESULTS = "methods", "_generated"
"""Folders that are made, beside this file."""

CHOOSE = {
    "Sum": "always first: it is the baseline, and with tuned weights in the losses hard to beat.",
    "Mean": "you compare with code that divides the losses by their number.",
    "Fixed": "you know how much each task counts, and want reports and a monitor with it.",
    "Random": "you need the baseline that any weighting has to beat.",
    "AGS": "two losses conflict, their gradients differ in length, and the sum's learning rate should stay right.",
    "PCGrad": "you want the usual method, or a paper used it. For more than two tasks `UPGrad` promises more.",
    "GradVac": "tasks are related, and gradients should be turned towards their usual cosine, conflict or not.",
    "CAGrad": "the average loss counts, and no task may fall far behind. c = 0 is the mean; c = 1 opposes no task.",
    "MGDA": "all tasks must gain alike, and slow progress is acceptable: the shortest gradient rules.",
    "UPGrad": "no task may get worse, however many there are and however unequal, and each should count by its scale.",
    "DualProj": "as `UPGrad`, but the update should stay as near to the plain sum as that allows.",
    "IMTLG": "projections on all gradients should be equal; look at the weights, which may be negative.",
    "NashMTL": "the scales of the losses mean nothing to you: the direction does not depend on them.",
    "FairGrad": "you want to choose between the sum of the gains (alpha near 0) and the least of them (large alpha).",
    "AlignedMTL": "one gradient, or a direction common to several, dominates the sum.",
    "ConFIG": "all tasks should have the same cosine with the update, as the losses of physics-informed networks.",
    "GradDrop": "signs in single coordinates matter to you, and a random choice between them is acceptable.",
    "TrimmedMean": "some of many comparable gradients are faulty. For tasks that differ by right, seldom.",
    "NormRestored": "you compare directions of methods at the same length of step.",
    "Smoothed": "batches are small, and the weights jump from step to step.",
    "UW": "losses have different units and positive values, and one backward pass is all there is time for.",
    "DWA": "tasks learn at different speeds over epochs.",
    "RLW": "you need the baseline that any weighting of losses has to beat.",
    "GLS": "losses are positive and should all fall by the same ratio.",
    "FAMO": "tasks should improve at the same rate in one backward pass; a second forward pass is the price.",
    "STCH": "the worst loss, relative to its ideal, is what counts.",
}
"""When to choose a method; the chooser of `methods.md` compares them."""

COSTS = {
    "gramian": "One backward pass for each loss, and two passes over the K gradients.",
    "rows": "One backward pass for each loss, and one pass over the K gradients, coordinate by coordinate.",
    "losses": "One backward pass of the weighted sum, as for the plain sum.",
}
"""By what a method looks at."""


def method_page(name: str, times: dict[str, float]) -> str:
    """The page of one method.

    Args:
        name: public.
        times: microseconds of a call by number of tasks; empty where none was measured.
    """
    method = getattr(agsurgery, name)
    uses = method.uses
    # A wrapper of another method looks at what that one looks at: `uses` is a property there.
    cost = COSTS[uses] if isinstance(uses, str) else "That of the method inside."
    calls = [call for call in ("end_epoch", "update") if call in vars(method)]
    members = f"   :members: {', '.join(calls)}\n" if calls else ""
    if times:
        measured = ", ".join(f"{value:.0f} µs for {tasks} tasks" for tasks, value in times.items())
        cost += f" The weights: {measured}, on a CPU ([`solver_cost`](../benchmarks.md))."
    return (
        f"# {name}\n\n**Choose it when** {CHOOSE[name]}\n\n**Cost.** {cost}\n\n"
        f"```{{eval-rst}}\n.. autoclass:: agsurgery.{name}\n{members}```\n\n"
        "What holds for it beside the others: [the table of laws](../methods.md#what-holds-for-which).\n"
    )


def solver_times() -> dict[str, dict[str, float]]:
    """Median microseconds of a call, by method and number of tasks, as stored."""
    path = ROOT / "benchmarks" / "results" / "solver_cost.json"
    stored = json.loads(path.read_text(encoding="utf-8"))["methods"]
    return {
        name: {tasks: cell["ours_us"]["median"] for tasks, cell in entry["time"].items()}
        for name, entry in stored.items()
    }


def questions() -> dict[str, str]:
    """First sentence of the docstring of every benchmark, by the name of its file."""
    found = {}
    for path in sorted((ROOT / "benchmarks").glob("[!_]*.py")):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        found[path.stem] = text.split("\n\n")[0].replace("\n", " ")
    return found


def stored_results(benchmark: str) -> list[Path]:
    """Files in which results of a benchmark are kept: of its name, or with a suffix to it."""
    folder = ROOT / "benchmarks" / "results"
    others = [name for name in questions() if name != benchmark and name.startswith(benchmark)]
    return [
        path
        for path in sorted(folder.glob(f"{benchmark}*.json"))
        if not any(path.stem.startswith(other) for other in others)
    ]


def provenance(result: dict[str, object]) -> str:
    """Where a result comes from: day, commit, torch and machine."""
    known = result.get("environment", result)
    assert isinstance(known, dict)
    machine = known["machine"]
    device = f"{machine['cpu']}, {machine['threads']} of {machine['cores']} threads"
    if str(result.get("device", "cpu")).startswith("cuda"):
        device = machine["gpu"]
    changed = " with changes" if known["dirty"] else ""
    torch = known["versions"]["torch"]
    note = f". {result['note']}" if "note" in result else ""
    stamp = f"{known['date'][:10]}, commit `{known['commit'][:7]}`{changed}"
    return f"{stamp}, torch {torch}, {device}{note}"


def benchmark_part() -> str:
    """Question, stored answer and origin of every benchmark."""
    lines = []
    for name, question in questions().items():
        lines += [f"## `{name}`", "", question, ""]
        paths = stored_results(name)
        for path in paths:
            result = json.loads(path.read_text(encoding="utf-8"))
            answer = result.get("answer", "The file has the numbers, and no answer in words.")
            lines += [f"> {answer.removeprefix('Answer: ')}", ">"]
            lines += [f"> `benchmarks/results/{path.name}`: {provenance(result)}", ""]
        if not paths:
            lines += [f"No result is stored. `python -m benchmarks.{name}` makes one.", ""]
    return "\n".join(lines)


def write(folder: Path) -> None:
    """Write all pages that are made into `folder`."""
    times = solver_times()
    pages = {
        Path(METHODS) / f"{name}.md": method_page(name, times.get(name, {})) for name in CHOOSE
    }
    pages[Path(RESULTS) / "benchmarks.md"] = benchmark_part()
    for place, text in pages.items():
        path = folder / place
        path.parent.mkdir(exist_ok=True)
        # Sphinx reads again what is newer.
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
