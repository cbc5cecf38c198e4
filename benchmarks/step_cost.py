"""What does a whole training step with AGS cost, beside the plain summed step?

A step is zero_grad, forward, backward with or without surgery, and the step of SGD with momentum. Beside AGS stand

- the plain summed step, the unit of every ratio;
- K backward passes without surgery, summed into `.grad`: the least that one pass per loss can cost;
- AGS with the other engines, and at the features (a surrogate);
- PCGrad and UPGrad of torchjd, as its documentation calls them, and PCGrad with its passes one by one;
- PCGrad of pytorch_optimizer.

All arms start from the same weights and see the same data. They are timed in turn, in many rounds; a ratio compares
two times of one round.

    python -m benchmarks.step_cost --cases toy_2 toy_8

Needs torchvision for the ResNet, torchjd and pytorch_optimizer for their arms; what is missing is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks._arms import (
    ARMS,
    FLOOR,
    OURS,
    PLAIN,
    Arm,
    ArmMaker,
    NotNeeded,
    check_gradients,
    plain_sum,
)
from benchmarks._cases import CASES, Case, Problem
from benchmarks._cli import finish, new_parser, parse, provenance, threads
from benchmarks._measure import Sample, Spread, Step, interleaved, peak_bytes, waiter
from benchmarks.figures import step_cost as figure

PACKAGES = ("torch", "torchvision", "torchjd", "pytorch_optimizer", "quadprog", "numpy")
BLOCK_SECONDS, WARMUP = 0.1, 2
QUICK_CASES = ("toy_2", "toy_8")


def measure(case: Case, device: torch.device, rounds: int, block_seconds: float) -> dict[str, Any]:
    """Times, ratios and peak memory of all arms on one case, as they go into the JSON file.

    Raises:
        ImportError: the case needs a package that is not installed.
    """
    problem = case.build(device)
    arms: dict[str, Arm] = {}
    skipped: dict[str, str] = {}
    for name, make in ARMS.items():
        try:
            arms[name] = make(problem)
        except (ImportError, NotNeeded) as error:
            skipped[name] = str(error)
        else:
            check_gradients(name, arms[name], plain_sum(problem))
    samples = interleaved(
        {name: arm.step for name, arm in arms.items()},
        rounds=rounds,
        block_seconds=block_seconds,
        warmup=WARMUP,
        synchronise=waiter(device),
    )
    peaks = {name: peak_bytes(_stepper(ARMS[name], problem), device=device) for name in arms}
    return {
        "title": case.title,
        "tasks": case.tasks,
        "parameters": sum(p.numel() for p in problem.model.parameters()),
        "trunk_parameters": sum(p.numel() for p in problem.model.trunk.parameters()),
        "arms": {name: _summary(name, samples, peaks) for name in arms},
        "skipped": skipped,
    }


def _stepper(make: ArmMaker, problem: Problem) -> Callable[[], Step]:
    return lambda: make(problem).step


def _summary(
    name: str, samples: dict[str, list[Sample]], peaks: dict[str, int | None]
) -> dict[str, Any]:
    own = samples[name]

    def ratio(to: str, cpu: bool = False) -> dict[str, float]:
        pairs = zip(own, samples[to], strict=True)
        return Spread.of([a.cpu / b.cpu if cpu else a.wall / b.wall for a, b in pairs]).to_dict()

    peak, plain_peak = peaks[name], peaks[PLAIN]
    return {
        "milliseconds": Spread.of([1e3 * sample.wall for sample in own]).to_dict(),
        "cpu_milliseconds": Spread.of([1e3 * sample.cpu for sample in own]).to_dict(),
        "over_plain": ratio(PLAIN),
        "over_passes": ratio(FLOOR),
        "over_ags": ratio(OURS),
        "cpu_over_plain": ratio(PLAIN, cpu=True),
        "cpu_over_passes": ratio(FLOOR, cpu=True),
        "peak_bytes": peak,
        "peak_over_plain": None if peak is None or not plain_peak else round(peak / plain_peak, 3),
    }


# -- report ---------------------------------------------------------------------------------------


def table(result: dict[str, Any]) -> str:
    """The lines of one case."""
    lines = [
        f"{result['title']} ({result['parameters']:,} parameters)",
        f"  {'arm':<27} {'ms':>9}  {'/ plain sum':>11}  {'quartiles':>13}  {'cpu':>5}"
        f"  {'/ K passes':>10}  {'memory':>6}",
    ]
    for name, arm in result["arms"].items():
        over = arm["over_plain"]
        quartiles = f"{over['q25']:.2f} - {over['q75']:.2f}"
        memory = "-" if arm["peak_over_plain"] is None else f"{arm['peak_over_plain']:.2f}"
        lines.append(
            f"  {name:<27} {arm['milliseconds']['median']:>9.3f}  {over['median']:>11.2f}"
            f"  {quartiles:>13}  {arm['cpu_over_plain']['median']:>5.2f}"
            f"  {arm['over_passes']['median']:>10.2f}  {memory:>6}"
        )
    lines += [f"  {name:<27} left out: {reason}" for name, reason in result["skipped"].items()]
    return "\n".join(lines)


LEGEND = """\
ms: median step by the clock. Ratios: medians over the rounds. cpu: processor time, / plain sum.
memory: peak of live tensors (model, optimizer state, graph, buffers), / plain sum."""


def busy(cases: dict[str, Any]) -> bool:
    """Whether a single-threaded step waited for the processor for more than a fifth of its time."""
    plain = [case["arms"][PLAIN] for case in cases.values()]
    return any(
        arm["milliseconds"]["median"] > 1.2 * arm["cpu_milliseconds"]["median"] for arm in plain
    )


def answer(cases: dict[str, Any]) -> str:
    """One sentence on all cases."""
    if not cases:
        return "Answer: no case could be measured."

    each = ", ".join(
        f"{case['arms'][OURS]['over_plain']['median']:.2f} ({name})" for name, case in cases.items()
    )
    floor = [case["arms"][OURS]["over_passes"]["median"] for case in cases.values()]
    sentence = (
        f"Answer: a whole training step with AGS costs {each} times the plain summed step, "
        f"{min(floor):.2f} to {max(floor):.2f} times K backward passes without any surgery"
    )
    ratios = [
        arm["over_ags"]["median"]
        for case in cases.values()
        for name, arm in case["arms"].items()
        if name not in (PLAIN, FLOOR) and not name.startswith(OURS)
    ]
    if ratios:
        sentence += f"; the peers take {min(ratios):.2f} to {max(ratios):.2f} times the time of AGS"
    return sentence + "."


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark with command line arguments; returns what the JSON file holds."""
    parser = new_parser(__doc__)
    parser.add_argument("--cases", nargs="+", choices=CASES, help="default: all")
    parser.add_argument("--rounds", type=int, default=15, help="samples per arm (default: 15)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch (default: 1)")
    options = parse(parser, arguments, rounds=1, threads=1)
    device = torch.device(options.device)
    names = options.cases or (QUICK_CASES if options.quick else tuple(CASES))
    rounds, block_seconds = (1, 0.005) if options.quick else (options.rounds, BLOCK_SECONDS)
    cases: dict[str, Any] = {}
    with threads(options.threads):
        record = provenance(options, PACKAGES, __doc__)
        for name in names:
            try:
                cases[name] = measure(CASES[name], device, rounds, block_seconds)
            except ImportError as error:
                print(f"{CASES[name].title}\n  left out: {error}\n")
                continue
            print(table(cases[name]) + "\n", flush=True)
    print(LEGEND)
    counts = {"rounds": rounds, "block_seconds": block_seconds}
    result = {"answer": answer(cases), **counts, **record, "cases": cases}
    return finish(options, "step_cost", result, figure.draw)


if __name__ == "__main__":
    main()
