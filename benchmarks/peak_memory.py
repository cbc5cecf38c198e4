"""How much memory does a training step with AGS need, beside the plain summed step?

Bytes in live tensors at the worst moment of a step: parameters, momentum, gradients, graph, and whatever the engine
keeps. By number of tasks on a transformer, and by number of parameters on an MLP with 4 heads, for each engine and
each peer. Counted at torch's allocator: the same on every run, however busy the machine is.

    python -m benchmarks.peak_memory --tasks 2 16
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks._arms import ARMS, OURS, PLAIN, ArmMaker, NotNeeded
from benchmarks._cases import Problem, heads_case, mlp, transformer
from benchmarks._cli import finish, new_parser, parse, provenance
from benchmarks._measure import Step, peak_bytes
from benchmarks.figures import peak_memory as figure

PACKAGES = ("torch", "torchjd", "pytorch_optimizer")
TASKS = (2, 4, 8, 16)
WIDTHS = (256, 512, 1024)
DEEP = 12  # layers of one more transformer; the others have 4
MLP_TASKS = 4


def builders(
    tasks: Sequence[int], widths: Sequence[int], device: torch.device
) -> dict[str, tuple[str, int, Callable[[], Problem]]]:
    """Title, number of tasks and maker of each problem, by a short name."""
    made: dict[str, tuple[str, int, Callable[[], Problem]]] = {}
    for k in tasks:
        made[f"transformer_{k}"] = (
            f"transformer of 4 layers, K = {k}",
            k,
            partial(transformer, k, device),
        )
    deep = max(tasks)
    build = partial(transformer, deep, device, layers=DEEP)
    made[f"deep_{deep}"] = (f"transformer of {DEEP} layers, K = {deep}", deep, build)
    for width in widths:
        trunk = partial(mlp, width, width, 4)
        mlp_of = partial(heads_case, trunk, (64, width), width, 10, MLP_TASKS, device)
        made[f"mlp_{width}"] = (f"4 x {width} MLP, K = {MLP_TASKS}", MLP_TASKS, mlp_of)
    return made


def measure(
    title: str, tasks: int, build: Callable[[], Problem], device: torch.device
) -> dict[str, Any]:
    """Peak bytes of every arm on one problem."""
    problem = build()
    arms: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    for name, make in ARMS.items():
        try:
            peak = peak_bytes(partial(_step, make, problem), device=device, steps=2)
        except (ImportError, NotNeeded) as error:
            skipped[name] = str(error)
        else:
            arms[name] = {"peak_bytes": peak}
    plain = arms[PLAIN]["peak_bytes"]
    for arm in arms.values():
        known = plain and arm["peak_bytes"]
        arm["over_plain"] = round(arm["peak_bytes"] / plain, 3) if known else None
    return {
        "title": title,
        "tasks": tasks,
        "parameters": sum(p.numel() for p in problem.model.parameters()),
        "arms": arms,
        "skipped": skipped,
    }


def _step(make: ArmMaker, problem: Problem) -> Step:
    return make(problem).step


def table(cases: dict[str, Any]) -> str:
    """One line for each arm, one column for each problem."""
    names = list(dict.fromkeys(name for case in cases.values() for name in case["arms"]))
    lines = [f"{'peak memory / plain sum':<28}" + "".join(f"{name:>16}" for name in cases)]
    for name in names:
        cells = [case["arms"].get(name, {}).get("over_plain") for case in cases.values()]
        shown = "".join(f"{'-':>16}" if cell is None else f"{cell:>16.2f}" for cell in cells)
        lines.append(f"{name:<28}{shown}")
    return "\n".join(lines)


def answer(cases: dict[str, Any]) -> str:
    """One sentence on all problems."""

    def span(name: str) -> str:
        values = [case["arms"][name]["over_plain"] for case in cases.values()]
        return f"{min(values):.2f} to {max(values):.2f}"

    most = max(cases.values(), key=lambda case: (case["tasks"], case["parameters"]))
    lean = most["arms"]["AGS, lean"]["over_plain"]
    default = most["arms"][OURS]["over_plain"]
    return (
        f"Answer: a step with AGS needs {span(OURS)} times the memory of the plain step with the default engine, "
        f'{span("AGS, lean")} times with engine="lean"; on the {most["title"]} {default:.2f} and {lean:.2f}.'
    )


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark with command line arguments; returns what the JSON file holds."""
    parser = new_parser(__doc__)
    parser.add_argument("--tasks", type=int, nargs="+", default=list(TASKS), help="K to try")
    parser.add_argument("--widths", type=int, nargs="+", default=list(WIDTHS), help="of the MLP")
    options = parse(parser, arguments, tasks=1, widths=1)
    device = torch.device(options.device)
    if options.quick:
        options.tasks, options.widths = [2, 4], [64]
    record = provenance(options, PACKAGES, __doc__)
    cases: dict[str, Any] = {}
    for name, problem in builders(options.tasks, options.widths, device).items():
        print(f"{problem[0]} ...", flush=True)  # takes minutes: the profiler sees every operation
        cases[name] = measure(*problem, device)
    print(table(cases))
    return finish(
        options, "peak_memory", {"answer": answer(cases), **record, "cases": cases}, figure.draw
    )


if __name__ == "__main__":
    main()
