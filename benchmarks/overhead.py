"""Where does the time of a surgery step go on models so small that computation does not matter?

Times the parts of `GradientSurgery.backward` with AGS from inside, on the toy models of `step_cost`, beside the K bare
backward passes. What is left when all backward passes are taken away is Python and the launching of small
operations: the price of looking at the graph in every step, of a solver in torch operations, and of a report.

On a GPU whole steps are timed until their work is done; the parts are not, since waiting in each would change the step:
they tell how long the processor takes to ask for the work.

    python -m benchmarks.overhead
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

import agsurgery.engine
import agsurgery.jacobian
import agsurgery.optimizer
import agsurgery.passes
import agsurgery.surgery
from benchmarks._arms import ARMS, FLOOR, OURS
from benchmarks._cases import CASES
from benchmarks._cli import finish, new_parser, parse, provenance, threads
from benchmarks._measure import waiter
from benchmarks.figures import overhead as figure

TOYS = ("toy_2", "toy_8")
WHOLE = "backward(losses)"

# Whose time is taken. A part that runs inside another one is taken from that one's time.
PARTS: dict[str, tuple[Any, str]] = {
    WHOLE: (agsurgery.optimizer.GradientSurgery, "backward"),
    "walk over the graph": (agsurgery.engine, "walk"),
    "shared and own parameters": (agsurgery.engine, "split"),
    "backward passes": (agsurgery.passes, "gradients"),
    "rows written": (agsurgery.jacobian.Rows, "write"),
    "Gramian": (agsurgery.jacobian.Rows, "gramian"),
    "weights": (agsurgery.surgery, "solve"),
    "update delivered": (agsurgery.jacobian.Rows, "deliver"),
    "heads delivered": (agsurgery.surgery, "deliver_own"),
    "losses read": (agsurgery.engine, "read_losses"),
    "losses for the report": (agsurgery.engine, "detached_losses"),
    "state kept in the optimizer": (agsurgery.optimizer.GradientSurgery, "_synchronise_state"),
}


@contextmanager
def timed(seconds: dict[str, float]) -> Iterator[None]:
    """While open, add the time that each part takes by itself."""
    inner = [0.0]  # time of the parts inside the one that runs

    def wrap(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def measured(*args: Any, **kwargs: Any) -> Any:
            outside, inner[0] = inner[0], 0.0
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent = time.perf_counter() - start
                seconds[name] += spent - inner[0]
                inner[0] = outside + spent

        return measured

    originals = {name: getattr(owner, attribute) for name, (owner, attribute) in PARTS.items()}
    for name, (owner, attribute) in PARTS.items():
        setattr(owner, attribute, wrap(name, originals[name]))
    try:
        yield
    finally:
        for name, (owner, attribute) in PARTS.items():
            setattr(owner, attribute, originals[name])


def profile(case: str, steps: int, device: torch.device) -> dict[str, Any]:
    """Median microseconds of each part of a step, and of a whole step with and without surgery."""
    problem, wait = CASES[case].build(device), waiter(device)
    ours, floor = (ARMS[name](problem) for name in (OURS, FLOOR))
    samples: dict[str, list[float]] = defaultdict(list)
    for _ in range(steps):
        for name, arm in ((FLOOR, floor), (OURS, ours)):
            arm.step()
            wait()
            start = time.perf_counter()
            arm.step()
            wait()
            samples[name].append(time.perf_counter() - start)
        found: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        with timed(found):
            ours.step()
        for name, spent in found.items():
            samples["everything else" if name == WHOLE else name].append(spent)
    return {name: round(1e6 * statistics.median(values), 1) for name, values in samples.items()}


def table(cases: dict[str, dict[str, Any]]) -> str:
    """One line for each part."""
    names = list(next(iter(cases.values())))
    lines = [f"{'microseconds':<30}" + "".join(f"{case:>10}" for case in cases)]
    lines += [
        f"{name:<30}" + "".join(f"{case[name]:>10.0f}" for case in cases.values()) for name in names
    ]
    return "\n".join(lines)


def answer(cases: dict[str, dict[str, Any]]) -> str:
    """One sentence."""
    said = []
    for name, case in cases.items():
        parts = {k: v for k, v in case.items() if k not in (FLOOR, OURS, "backward passes")}
        first, second, *_ = sorted(parts, key=lambda k: -parts[k])
        said.append(
            f"on {name} surgery adds {case[OURS] - case[FLOOR]:.0f} microseconds to {case[FLOOR]:.0f}, most in "
            f'"{first}" ({parts[first]:.0f}) and "{second}" ({parts[second]:.0f})'
        )
    return "Answer: " + "; ".join(said) + "."


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark with command line arguments; returns what the JSON file holds."""
    parser = new_parser(__doc__)
    parser.add_argument("--steps", type=int, default=1000, help="of each model (default: 1000)")
    options = parse(parser, arguments, steps=1)
    if options.quick:
        options.steps = 3
    with threads():
        record = provenance(options, ("torch",), __doc__)
        device = torch.device(options.device)
        cases = {case: profile(case, options.steps, device) for case in TOYS}
    print(table(cases))
    result = {"answer": answer(cases), "steps": options.steps, **record, "microseconds": cases}
    return finish(options, "overhead", result, figure.draw)


if __name__ == "__main__":
    main()
