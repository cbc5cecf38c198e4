"""Does gradient surgery help on multi-task problems, beside plain and weighted sums that are tuned as well?

Two problems on pictures that scikit-learn brings along, so that nothing is downloaded: two overlaid digits (which is
at the left, which at the right?), and four questions about one digit, on very unequal scales. MultiMNIST, MultiFashion
and the superclasses of CIFAR-100 run where their files are (`--data-root`); their results go to files of their own.

What is equal for all methods: a network of linear layers with one linear head per task; initial weights and batches,
seed by seed; the optimizer with a cosine schedule; the scale of the sum; every head gets the gradient of its own loss;
the number of trials. Six learning rates are tried with two seeds, and the one with the best validation examples wins;
the weighted sum has three rates for each of two weightings instead. With the chosen trial a method runs on fresh seeds,
and only then are the test examples looked at. `Mean` has no row: it is `Sum` with another learning rate.

The optimizer is Adam, under which the length of an update hardly matters, or SGD with momentum, under which it does:
that length is the one difference between AGS and PCGrad. SGD tries twelve rates with four seeds, since the lengths of
the methods span two decades, and since the best rate lies next to those that diverge.

The metric of a classification is its accuracy, that of a regression the share of variance it explains (R2). Over the
tasks stands the mean relative change against networks with one task, which are tuned in the same way (Liu et al., 2021;
Navon et al., 2022):

    delta_m = 100 % / K * sum over the tasks k of (-1)^h_k (M_k - B_k) / |B_k|

with M_k the metric of the method, B_k the median over seeds of the networks with task k only (a single one that dies
would flatter all methods), and h_k = 1 where higher is better, as it is for all metrics here. **Lower is better**,
below zero is better than one network for each task.

The runs of a method go through one batch of networks, as in `pinn`; the tests hold the steps against
`GradientSurgery`.

    python -m benchmarks.multitask
    python -m benchmarks.multitask --optimizer sgd
    python -m benchmarks.multitask --problems multimnist --data-root data
    python -m benchmarks.multitask --methods AGS PCGrad CAGrad Sum UW --rates 2e-2 --out same_rate.json
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks._cli import finish, new_parser, parse, provenance, threads
from benchmarks._intervals import Interval, holm, p_value
from benchmarks._multitask_data import BUNDLED, PROBLEMS, Problem, Task
from benchmarks._multitask_files import DataError
from benchmarks._multitask_methods import METHODS, PLAIN, WEIGHTED, Entry, Trial, trials_of
from benchmarks._multitask_networks import metrics_of
from benchmarks._multitask_training import OPTIMIZERS, Kind, train
from benchmarks._progress import Progress
from benchmarks.figures import multitask as figure

PACKAGES = ("torch", "numpy", "scipy", "scikit-learn", "matplotlib")
STEPS, SEEDS = 600, 8
TUNING_SEEDS = (1000, 1001, 1002, 1003)
LEVEL = 0.05


# -- judging --------------------------------------------------------------------------------------


def delta_m(metrics: Tensor, baseline: Tensor) -> Tensor:
    """`(R,)` mean relative changes in percent of `(R, K)` metrics against `(K,)` of single tasks; lower is better.

    Raises:
        ValueError: a metric of the single tasks is zero.
    """
    if (baseline == 0).any():
        raise ValueError(
            f"The metrics of the single tasks must not be zero. Got {baseline.tolist()}."
        )
    return -100 * ((metrics - baseline) / baseline.abs()).mean(1)


class Effort(NamedTuple):
    """The learning rates that a method may try, and how often it runs then; `kind` has the rates of all methods."""

    steps: int
    seeds: int
    kind: Kind


class Tuned(NamedTuple):
    """The trials with their scores, the best of them, and its mean `(K,)` validation metrics."""

    tried: list[dict[str, Any]]
    best: Trial
    validation: Tensor


def tune(
    problem: Problem,
    entry: Entry,
    trials: Sequence[Trial],
    cost: Callable[[Tensor], Tensor],
    effort: Effort,
) -> Tuned:
    """Try all trials with the tuning seeds; the lowest mean cost of the validation metrics wins."""
    known = TUNING_SEEDS[: effort.kind.tuning_seeds]
    chosen, seeds = zip(*itertools.product(trials, known), strict=True)
    run = train(problem, entry, chosen, seeds, effort.steps, effort.kind.make)
    metrics = metrics_of(problem, run.networks, problem.validation)
    costs = cost(metrics).view(len(trials), -1).mean(1)
    best = int(costs.argmin())
    tried = [
        {**trial._asdict(), "validation": digits(value)}
        for trial, value in zip(trials, costs.tolist(), strict=True)
    ]
    return Tuned(tried, trials[best], metrics.view(len(trials), len(known), -1)[best].mean(0))


def digits(value: float) -> float:
    """Four of them."""
    return float(f"{value:.4g}")


class Baseline(NamedTuple):
    """Networks with one task: `(K,)` means over the tuning seeds and medians over the others, and the record."""

    validation: Tensor
    test: Tensor
    record: dict[str, Any]


def single_tasks(problem: Problem, effort: Effort, progress: Callable[[str], None]) -> Baseline:
    """One network for each task, tuned and run like the methods."""
    record, validation, test = {}, [], []
    for place, task in enumerate(problem.tasks):
        alone = problem.only(place)
        trials = trials_of(PLAIN, alone, effort.kind.rates)
        tuned = tune(alone, METHODS[PLAIN], trials, lambda m: -m[:, 0], effort)
        seeds = range(effort.seeds)
        trials = [tuned.best] * len(seeds)
        run = train(alone, METHODS[PLAIN], trials, seeds, effort.steps, effort.kind.make)
        metrics = metrics_of(alone, run.networks, alone.test)[:, 0]
        validation.append(tuned.validation[0])
        test.append(metrics.quantile(0.5))
        record[task.name] = {
            "tried": tuned.tried,
            "chosen": tuned.best._asdict(),
            "metric": digits(float(test[-1])),
            "metric_by_seed": [digits(value) for value in metrics.tolist()],
        }
        progress(f"{problem.title}: {task.name} alone")
    return Baseline(torch.stack(validation), torch.stack(test), record)


def judge(problem: Problem, name: str, baseline: Baseline, effort: Effort) -> dict[str, Any]:
    """Tune a method on the validation examples, then run it on fresh seeds and look at the test examples."""
    tasks, entry = problem.tasks, METHODS[name]
    trials = trials_of(name, problem, effort.kind.rates)
    tuned = tune(problem, entry, trials, lambda m: delta_m(m, baseline.validation), effort)
    seeds = range(effort.seeds)
    trials = [tuned.best] * len(seeds)
    run = train(problem, entry, trials, seeds, effort.steps, effort.kind.make)
    metrics = metrics_of(problem, run.networks, problem.test)
    change = delta_m(metrics, baseline.test).tolist()
    columns = {task.name: column.tolist() for task, column in zip(tasks, metrics.T, strict=True)}
    return {
        "tried": tuned.tried,
        "chosen": tuned.best._asdict(),
        "metrics": {key: Interval.of(values).to_dict() for key, values in columns.items()},
        "mean": Interval.of(metrics.mean(1).tolist()).to_dict(),
        "delta_m": Interval.of(change).to_dict(),
        "delta_m_by_seed": [digits(value) for value in change],
        "conflict": digits(run.conflict),
        "imbalance": digits(run.imbalance) if math.isfinite(run.imbalance) else None,
        "seconds": round(run.seconds, 2),
    }


def lengths(methods: dict[str, Any]) -> dict[str, float] | None:
    """What the norm of the sum changes: delta_m of AGS minus that of PCGrad, seed by seed, with its p-value.

    The one comparison that was planned, so that there is nothing to correct it for.
    """
    if not {"AGS", "PCGrad"} <= set(methods):
        return None
    pairs = zip(*(methods[name]["delta_m_by_seed"] for name in ("AGS", "PCGrad")), strict=True)
    differences = [a - b for a, b in pairs]
    return {**Interval.of(differences).to_dict(), "p": digits(p_value(differences))}


def compare(methods: dict[str, Any]) -> None:
    """Add the difference in delta_m to both sums, seed by seed, with adjusted p-values."""
    for key, rival in (("over_sum", PLAIN), ("over_weighted_sum", WEIGHTED)):
        if rival not in methods:
            continue
        differences = {}
        for name, found in methods.items():
            if name != rival:
                pairs = zip(
                    found["delta_m_by_seed"], methods[rival]["delta_m_by_seed"], strict=True
                )
                differences[name] = [a - b for a, b in pairs]
        adjusted = holm({name: p_value(values) for name, values in differences.items()})
        for name, values in differences.items():
            methods[name][key] = {
                **Interval.of(values).to_dict(),
                "p_adjusted": digits(adjusted[name]),
            }


# -- report ---------------------------------------------------------------------------------------

SHOWN = 4  # tasks with a column of their own


def header(tasks: Sequence[Task]) -> str:
    """First line of the table."""
    names = "".join(f"{task.name:>10}" for task in tasks) if len(tasks) <= SHOWN else ""
    return (
        f"  {'method':<21} {'lr':<8}{names}{'mean':>8}  {'delta_m %':<22} {'- Sum':<22} "
        f"{'- weighted sum':<22} {'conflict':>8} {'seconds':>8}"
    )


LEGEND = (
    "task columns: test accuracy or R2; mean: of these; delta_m: mean relative change against networks with one task, "
    "lower is better; differences by seed; 95 % intervals over the seeds, * where the difference stands after Holm's "
    "correction over the methods; conflict: share of steps in which two gradients oppose each other; seconds: of a run"
)


def cell(interval: dict[str, float] | None) -> str:
    """Mean and interval."""
    if interval is None:
        return "-"
    star = "*" if interval.get("p_adjusted", 1.0) < LEVEL else ""
    return "{mean:.2f} ({low:.2f}, {high:.2f})".format(**interval) + star


def row(name: str, found: dict[str, Any], tasks: Sequence[Task]) -> str:
    """One line of the table."""
    columns = (
        "".join(f"{found['metrics'][task.name]['mean']:>10.4f}" for task in tasks)
        if len(tasks) <= SHOWN
        else ""
    )
    return (
        f"  {name:<21} {found['chosen']['rate']:<8g}{columns}{found['mean']['mean']:>8.4f}  "
        f"{cell(found['delta_m']):<22} {cell(found.get('over_sum')):<22} "
        f"{cell(found.get('over_weighted_sum')):<22} {found['conflict']:>8.0%} {found['seconds']:>8.1f}"
    )


def beyond_chance(methods: dict[str, Any], key: str) -> str:
    """Which methods are better, which worse, after correction."""
    sure = {
        name: found[key]["mean"]
        for name, found in methods.items()
        if key in found and found[key]["p_adjusted"] < LEVEL
    }
    better = ", ".join(name for name, mean in sure.items() if mean < 0) or "none"
    worse = ", ".join(name for name, mean in sure.items() if mean > 0) or "none"
    return f"better {better}; worse {worse}"


def answer(problems: dict[str, Any]) -> str:
    """The result in a few sentences."""
    parts = []
    for found in problems.values():
        methods = found["methods"]
        first = [n for n in ("AGS", "PCGrad", "CAGrad", PLAIN, WEIGHTED) if n in methods]
        told = ", ".join(f"{name} {methods[name]['delta_m']['mean']:+.1f} %" for name in first)
        sentence = f"{found['title']}: delta_m (lower is better) {told}"
        if found["ags_minus_pcgrad"] is not None:
            sentence += "; AGS minus PCGrad " + cell(found["ags_minus_pcgrad"])
        for key, rival in (("over_sum", "plain"), ("over_weighted_sum", "weighted")):
            if any(key in method for method in methods.values()):
                sentence += (
                    f"; beyond chance against the {rival} sum: {beyond_chance(methods, key)}"
                )
        parts.append(sentence)
    return f"Answer: {'. '.join(parts)}."


def names_for(problem: Problem, names: Sequence[str]) -> list[str]:
    """The methods that work for so many tasks."""
    return [name for name in names if METHODS[name].least <= len(problem.tasks)]


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark with command line arguments; returns what the JSON file holds."""
    parser = new_parser(__doc__)
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(BUNDLED))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adam")
    parser.add_argument(
        "--data-root", type=Path, help="folder of data sets, as torchvision stores them"
    )
    parser.add_argument(
        "--rates",
        nargs="+",
        type=float,
        help="learning rates to try (default: those of the optimizer); with a single one, all methods run with that",
    )
    parser.add_argument("--steps", type=int, default=STEPS, help=f"(default: {STEPS})")
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"(default: {SEEDS})")
    options = parse(parser, arguments, steps=1, seeds=2)
    device, kind = torch.device(options.device), OPTIMIZERS[options.optimizer]
    if options.rates:
        kind = kind._replace(rates=tuple(options.rates))
    effort = Effort(options.steps, options.seeds, kind)
    if options.quick:
        effort = Effort(3, 2, kind._replace(rates=kind.rates[:2]))
    try:
        loaded = {key: PROBLEMS[key](options.data_root).to(device) for key in options.problems}
    except DataError as error:
        parser.error(str(error))
    todo = {key: names_for(problem, options.methods) for key, problem in loaded.items()}
    progress = Progress(sum(len(todo[key]) + len(loaded[key].tasks) for key in loaded))
    problems: dict[str, Any] = {}
    with threads():
        record = provenance(options, PACKAGES, __doc__)
        for key, problem in loaded.items():
            baseline = single_tasks(problem, effort, progress)
            methods: dict[str, Any] = {}
            for name in todo[key]:
                methods[name] = judge(problem, name, baseline, effort)
                progress(f"{problem.title}: {name}")
            compare(methods)
            problems[key] = {
                "title": problem.title,
                **({"files": problem.files} if problem.files else {}),
                "ags_minus_pcgrad": lengths(methods),
                "single": baseline.record,
                "methods": methods,
            }
            lines = [row(name, found, problem.tasks) for name, found in methods.items()]
            print("\n".join([problem.title, header(problem.tasks), *lines]), flush=True)
    print(LEGEND)
    result = {
        "answer": answer(problems),
        "optimizer": options.optimizer,
        "steps": effort.steps,
        "seeds": effort.seeds,
        "trials": len(effort.kind.rates),
        "tuning_seeds": kind.tuning_seeds,
        **record,
        "problems": problems,
    }
    return finish(options, result_name(options.optimizer, options.problems), result, figure.draw)


def result_name(optimizer: str, problems: Sequence[str]) -> str:
    """Of the file: an optimizer and problems other than those one gets unasked are named."""
    named = [] if optimizer == "adam" else [optimizer]
    return "_".join(["multitask", *named, *(problems if {*problems} != {*BUNDLED} else ())])


if __name__ == "__main__":
    main()
