"""Does gradient surgery help on multi-task problems, beside plain and weighted sums that are tuned as well?

Two problems on pictures that scikit-learn brings along, so that nothing is downloaded: two overlaid digits (which is
at the left, which at the right?), and four questions about one digit, on very unequal scales. MultiMNIST, MultiFashion
and the superclasses of CIFAR-100 run where their files are (`--data-root`).

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
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from scipy import stats
from torch import Tensor
from torch.nn import functional as F

import agsurgery
from benchmarks._cli import new_parser, parse, result_path
from benchmarks._intervals import Interval
from benchmarks._measure import environment, write_json
from benchmarks._multitask_data import (
    BUNDLED,
    NOT_ASKED,
    PROBLEMS,
    Examples,
    MissingDataError,
    Problem,
    Task,
)
from benchmarks._optimizers import SGD, Adam, Optimizer
from benchmarks._plots import dots, new_figure, save_svg

PACKAGES = ("torch", "numpy", "scipy", "scikit-learn", "matplotlib")
HIDDEN = (64, 32)  # widths of the trunk
STEPS, SEEDS = 600, 8
RATES = (2.5e-3, 5e-3, 1e-2, 2e-2, 4e-2, 8e-2)
SGD_RATES = tuple(5e-4 * 2**power for power in range(12))  # to 1
TUNING_SEEDS = (1000, 1001, 1002, 1003)
FAILED = -1.0  # R2 is cut off here: a constant has 0
WATCHED = 20  # every n-th step is looked at for conflicts
LEVEL = 0.05


class Kind(NamedTuple):
    """An optimizer, the learning rates to try with it, and with how many of the tuning seeds."""

    make: Callable[[Tensor, Tensor], Optimizer]
    rates: tuple[float, ...]
    tuning_seeds: int


OPTIMIZERS = {"adam": Kind(Adam, RATES, 2), "sgd": Kind(SGD, SGD_RATES, 4)}


# -- methods --------------------------------------------------------------------------------------


class Trial(NamedTuple):
    """A learning rate, and the weights of the losses where they are tuned."""

    rate: float
    weights: tuple[float, ...] | None = None


class Entry(NamedTuple):
    """How to make a method from a seed.

    A method that draws at random or looks at losses or coordinates has an instance for each run (`apart`), the others
    take all runs as one batch of Gramians.
    """

    make: Callable[[int], Any]
    apart: bool = False
    least: int = 1  # tasks


PLAIN, WEIGHTED = "Sum", "weighted sum"
METHODS: dict[str, Entry] = {
    "AGS": Entry(lambda seed: agsurgery.AGS(seed=seed), apart=True),
    "PCGrad": Entry(lambda seed: agsurgery.PCGrad(seed=seed), apart=True),
    "CAGrad": Entry(lambda _: agsurgery.CAGrad()),
    PLAIN: Entry(lambda _: agsurgery.Sum()),
    WEIGHTED: Entry(lambda _: None, apart=True),  # `Fixed` with the weights of the trial
    "UPGrad": Entry(lambda _: agsurgery.UPGrad()),
    "DualProj": Entry(lambda _: agsurgery.DualProj()),
    "MGDA": Entry(lambda _: agsurgery.MGDA()),
    "NashMTL": Entry(lambda _: agsurgery.NashMTL()),
    "FairGrad(2)": Entry(lambda _: agsurgery.FairGrad(2.0)),
    "IMTLG": Entry(lambda _: agsurgery.IMTLG()),
    "ConFIG": Entry(lambda _: agsurgery.ConFIG()),
    "AlignedMTL": Entry(lambda _: agsurgery.AlignedMTL()),
    "GradVac": Entry(lambda seed: agsurgery.GradVac(seed=seed), apart=True),
    "NormRestored(UPGrad)": Entry(lambda _: agsurgery.NormRestored(agsurgery.UPGrad())),
    "Smoothed(UPGrad)": Entry(lambda _: agsurgery.Smoothed(agsurgery.UPGrad())),
    "GradDrop": Entry(lambda seed: agsurgery.GradDrop(seed=seed), apart=True),
    "TrimmedMean": Entry(lambda _: agsurgery.TrimmedMean(), apart=True, least=3),
    "UW": Entry(lambda _: agsurgery.UW(), apart=True),
    "DWA": Entry(lambda _: agsurgery.DWA(), apart=True),
    "RLW": Entry(lambda seed: agsurgery.RLW(seed=seed), apart=True),
    "GLS": Entry(lambda _: agsurgery.GLS(), apart=True),
    "FAMO": Entry(lambda _: agsurgery.FAMO(), apart=True),
    "STCH": Entry(lambda _: agsurgery.STCH(), apart=True),
    "Random": Entry(lambda seed: agsurgery.Random(seed=seed), apart=True),
}


def trials_of(name: str, problem: Problem, rates: Sequence[float] = RATES) -> list[Trial]:
    """What a method may try: as many trials for each.

    The weighted sum tries its weightings with the middle ones of the rates; with one at least, however few there are.
    """
    if name != WEIGHTED:
        return [Trial(rate) for rate in rates]
    count = max(1, len(rates) // len(problem.weightings))
    first = (len(rates) - count + 1) // 2
    pairs = itertools.product(rates[first : first + count], problem.weightings)
    return [Trial(rate, weights) for rate, weights in pairs]


def instances(entry: Entry, trials: Sequence[Trial], seeds: Sequence[int]) -> list[Any]:
    """One method for all runs, or one for each."""
    if not entry.apart:
        return [entry.make(0)]
    made = []
    for trial, seed in zip(trials, seeds, strict=True):
        fixed = trial.weights is not None
        made.append(agsurgery.Fixed(trial.weights) if fixed else entry.make(seed))
    return made


def combine(methods: Sequence[Any], rows: Tensor, losses: Tensor, gramians: Tensor) -> Tensor:
    """`(R, n)` updates of R runs from `(R, K, n)` task gradients, `(R, K)` losses and `(R, K, K)` Gramians."""
    if methods[0].uses == "rows":
        return torch.stack([method(row) for method, row in zip(methods, rows, strict=True)])
    if methods[0].uses == "losses":
        weights = torch.stack([m(values) for m, values in zip(methods, losses, strict=True)])
    elif len(methods) == 1:
        weights = methods[0](gramians)
    else:
        weights = torch.stack([m(gramian) for m, gramian in zip(methods, gramians, strict=True)])
    return (weights.to(rows).unsqueeze(1) @ rows).squeeze(1)


# -- networks -------------------------------------------------------------------------------------


class Networks:
    """R networks: linear layers with ReLU that all tasks share, and one linear head per task.

    Attributes:
        flat: `(R, n + h)` parameters, those of the trunk first; `trunk` and `heads` are views of it.
        shared: n.
        trunk: weights `(R, before, after)` and biases `(R, 1, after)` by turns.
        heads: the same for each task.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        tasks: Sequence[Task],
        generators: Sequence[torch.Generator],
        device: torch.device,
    ) -> None:
        pairs = [*itertools.pairwise(sizes), *((sizes[-1], task.outputs) for task in tasks)]
        # Bounds as in torch.nn.Linear.
        bounds = [before**-0.5 for before, after in pairs for _ in range((before + 1) * after)]
        drawn = torch.stack([torch.rand(len(bounds), generator=g) for g in generators])
        self.flat = ((2 * drawn - 1) * torch.tensor(bounds)).to(device)
        views, start = [], 0
        for before, after in pairs:
            for rows in (before, 1):
                view = self.flat.narrow(1, start, rows * after).view(-1, rows, after)
                views.append(view.detach().requires_grad_())
                start += rows * after
        depth = 2 * (len(sizes) - 1)
        self.trunk, rest = views[:depth], views[depth:]
        self.heads = [rest[i : i + 2] for i in range(0, len(rest), 2)]
        self.shared = sum(view[0].numel() for view in self.trunk)

    def __call__(self, inputs: Tensor) -> list[Tensor]:
        """`(R, n, outputs)` for each task, from `(R, n, d)` inputs."""
        for weight, bias in zip(self.trunk[::2], self.trunk[1::2], strict=True):
            inputs = torch.relu(torch.baddbmm(bias, inputs, weight))
        return [torch.baddbmm(bias, inputs, weight) for weight, bias in self.heads]

    def gradients(self, losses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """`(R, K, n)` gradients of the trunk, and `(R, h)` of the heads, each from its own loss."""
        rows, own = [], []
        for place, (loss, head) in enumerate(zip(losses, self.heads, strict=True)):
            keep = place + 1 < len(losses)
            # The sum over the runs has the gradients of all of them.
            found = torch.autograd.grad(loss.sum(), [*self.trunk, *head], retain_graph=keep)
            flat = torch.cat([part.flatten(1) for part in found], 1)
            rows.append(flat[:, : self.shared])
            own.append(flat[:, self.shared :])
        return torch.stack(rows, 1), torch.cat(own, 1)


def losses_of(tasks: Sequence[Task], outputs: Sequence[Tensor], targets: Tensor) -> list[Tensor]:
    """`(R,)` losses for each task: cross-entropy over the examples it is asked about, or mean square."""
    found = []
    for task, output, target in zip(tasks, outputs, targets.unbind(-1), strict=True):
        if not task.classes:
            found.append((output.squeeze(-1) - target).square().mean(1))
            continue
        classes = target.long()
        loss = F.cross_entropy(
            output.mT, classes, reduction="none", ignore_index=NOT_ASKED
        )  # (R, n)
        found.append(loss.sum(1) / (classes != NOT_ASKED).sum(1).clamp(min=1))
    return found


# -- training -------------------------------------------------------------------------------------


class Trained(NamedTuple):
    """R networks, the share of steps in which two gradients conflict, the usual imbalance, and seconds of a run.

    The imbalance is the median of longest over shortest gradient norm.
    """

    networks: Networks
    conflict: float
    imbalance: float
    seconds: float


def batches(count: int, batch: int, steps: int, generators: Sequence[torch.Generator]) -> Tensor:
    """`(R, steps or more, batch)` places of examples: epoch after epoch in random order, what remains left out."""
    epoch = count // batch
    orders = [
        torch.stack([torch.randperm(count, generator=g)[: epoch * batch] for g in generators])
        for _ in range(-(-steps // epoch))
    ]
    return torch.cat(orders, 1).unflatten(1, (-1, batch))


def train(
    problem: Problem,
    entry: Entry,
    trials: Sequence[Trial],
    seeds: Sequence[int],
    steps: int,
    make_optimizer: Callable[[Tensor, Tensor], Optimizer] = Adam,
) -> Trained:
    """Some runs at once; seed for seed the same initial weights and batches for every method."""
    begin = time.perf_counter()
    examples = problem.train
    device, count = examples.inputs.device, len(examples.inputs)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    sizes = (examples.inputs.shape[1], *HIDDEN)
    networks = Networks(sizes, problem.tasks, generators, device)
    batch = min(problem.batch, count)
    order = batches(count, batch, steps, generators).to(device)
    rates = torch.tensor([trial.rate for trial in trials], device=device)
    optimizer = make_optimizer(networks.flat, rates)
    methods = instances(entry, trials, seeds)
    gramians_seen = []
    for step in range(steps):
        chosen = order[:, step]
        inputs, targets = examples.inputs[chosen], examples.targets[chosen]
        losses = losses_of(problem.tasks, networks(inputs), targets)
        rows, own = networks.gradients(losses)
        gramians = rows.double() @ rows.double().mT
        if step % WATCHED == 0:
            gramians_seen.append(gramians)
        values = torch.stack(losses, 1).detach().double()
        update = torch.cat([combine(methods, rows, values, gramians), own], 1)
        optimizer.step(networks.flat, update, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        for method in methods:
            if isinstance(method, agsurgery.DWA) and (step + 1) % (count // batch) == 0:
                method.end_epoch()
        if isinstance(methods[0], agsurgery.FAMO):
            with torch.no_grad():
                after = losses_of(problem.tasks, networks(inputs), targets)
            for method, improved in zip(methods, torch.stack(after, 1).double(), strict=True):
                method.update(improved)
    conflict, imbalance = conflicts(torch.cat(gramians_seen))
    return Trained(networks, conflict, imbalance, (time.perf_counter() - begin) / len(seeds))


def conflicts(gramians: Tensor) -> tuple[float, float]:
    """Share of `(S, K, K)` Gramians with a negative entry, and median ratio of the longest norm to the shortest."""
    negative = (gramians < 0).flatten(1).any(1).double().mean()
    norms = gramians.diagonal(dim1=1, dim2=2).sqrt()
    ratio = norms.amax(1) / norms.amin(1)
    return float(negative), float(ratio.nanmedian())


# -- judging --------------------------------------------------------------------------------------


def metrics_of(problem: Problem, networks: Networks, examples: Examples) -> Tensor:
    """`(R, K)` on the CPU: accuracy, or 1 - mean squared error over the variance of the target."""
    runs = len(networks.flat)
    with torch.no_grad():
        outputs = networks(examples.inputs.expand(runs, -1, -1))
    found = []
    for task, output, target in zip(
        problem.tasks, outputs, examples.targets.unbind(-1), strict=True
    ):
        if task.classes:
            asked = target != NOT_ASKED
            right = output.argmax(-1) == target
            found.append(right[:, asked].double().mean(1))
        else:
            error = (output.squeeze(-1) - target).double().square().mean(1)
            explained = 1 - error / target.double().var(correction=0)
            found.append(torch.where(explained > FAILED, explained, FAILED))
    return torch.stack(found, 1).cpu()


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


def p_value(differences: Sequence[float]) -> float:
    """Of Student's t test, that paired differences have mean zero; 1 where all are zero."""
    interval = Interval.of(differences)
    reach = interval.high - interval.mean
    if reach == 0:
        return 1.0 if interval.mean == 0 else 0.0
    freedom = len(differences) - 1
    statistic = interval.mean / reach * float(stats.t.ppf(0.975, freedom))
    return float(2 * stats.t.sf(abs(statistic), freedom))


def holm(p_values: dict[str, float]) -> dict[str, float]:
    """Adjusted p-values, by name: below `LEVEL` all are right at once with 95 % confidence (Holm, 1979)."""
    adjusted, running = {}, 0.0
    ordered = sorted(p_values, key=p_values.__getitem__)
    for place, name in enumerate(ordered):
        running = max(running, min(1.0, (len(ordered) - place) * p_values[name]))
        adjusted[name] = running
    return adjusted


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


def draw(problems: dict[str, Any], path: Path) -> None:
    """The delta_m of every run as a dot, with the mean as a bar."""
    figure = new_figure(7.5 * len(problems), 4.2)
    panels = figure.subplots(1, len(problems), squeeze=False)[0]
    for axes, found in zip(panels, problems.values(), strict=True):
        methods = found["methods"].items()
        changes = {name: method["delta_m_by_seed"] for name, method in methods}
        dots(axes, changes, {name: method["delta_m"]["mean"] for name, method in methods})
        axes.axhline(0, color="0.6", linewidth=1)
        # Single methods that fail must not hide the differences between the others.
        axes.set_yscale("symlog", linthresh=10)
        axes.set(title=found["title"], ylabel="delta_m in %, lower is better")
    save_svg(figure, path)


class Progress:
    """Lines on stderr: what is done, and about how long the rest takes."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.begin = total, 0, time.perf_counter()

    def __call__(self, what: str) -> None:
        """One more is done."""
        self.done += 1
        left = (time.perf_counter() - self.begin) / self.done * (self.total - self.done)
        print(
            f"{self.done}/{self.total}, about {left / 60:.0f} min left: {what}",
            file=sys.stderr,
            flush=True,
        )


def names_for(problem: Problem, names: Sequence[str]) -> list[str]:
    """The methods that work for so many tasks."""
    return [name for name in names if METHODS[name].least <= len(problem.tasks)]


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark with command line arguments; returns what the JSON file holds."""
    assert __doc__ is not None
    parser = new_parser(__doc__.splitlines()[0])
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(BUNDLED))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adam")
    parser.add_argument("--data-root", type=Path, help="folder of torchvision's data sets")
    parser.add_argument(
        "--rates",
        nargs="+",
        type=float,
        help="learning rates to try (default: those of the optimizer); with a single one, all methods run with that",
    )
    parser.add_argument("--steps", type=int, default=STEPS, help=f"(default: {STEPS})")
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"(default: {SEEDS})")
    options = parse(parser, arguments, steps=1, seeds=2)
    device, threads = torch.device(options.device), torch.get_num_threads()
    kind = OPTIMIZERS[options.optimizer]
    if options.rates:
        kind = kind._replace(rates=tuple(options.rates))
    effort = Effort(options.steps, options.seeds, kind)
    if options.quick:
        effort = Effort(3, 2, kind._replace(rates=kind.rates[:2]))
    try:
        loaded = {key: PROBLEMS[key](options.data_root).to(device) for key in options.problems}
    except MissingDataError as error:
        parser.error(str(error))
    todo = {key: names_for(problem, options.methods) for key, problem in loaded.items()}
    progress = Progress(sum(len(todo[key]) + len(loaded[key].tasks) for key in loaded))
    torch.set_num_threads(1)
    problems: dict[str, Any] = {}
    try:
        record = environment(device, PACKAGES)
        record["versions"]["agsurgery"] = agsurgery.__version__
        for key, problem in loaded.items():
            baseline = single_tasks(problem, effort, progress)
            methods: dict[str, Any] = {}
            for name in todo[key]:
                methods[name] = judge(problem, name, baseline, effort)
                progress(f"{problem.title}: {name}")
            compare(methods)
            problems[key] = {
                "title": problem.title,
                "ags_minus_pcgrad": lengths(methods),
                "single": baseline.record,
                "methods": methods,
            }
            lines = [row(name, found, problem.tasks) for name, found in methods.items()]
            print("\n".join([problem.title, header(problem.tasks), *lines]), flush=True)
    finally:
        torch.set_num_threads(threads)
    summary = answer(problems)
    result = {
        "question": __doc__.splitlines()[0],
        "answer": summary,
        "device": options.device,
        "optimizer": options.optimizer,
        "steps": effort.steps,
        "seeds": effort.seeds,
        "trials": len(effort.kind.rates),
        "tuning_seeds": effort.kind.tuning_seeds,
        **record,
        "problems": problems,
    }
    out = result_path(options, "multitask" if options.optimizer == "adam" else "multitask_sgd")
    if out is not None:
        write_json(out, result)
        draw(problems, out.with_suffix(".svg"))
    print(LEGEND)
    print(summary)
    return result


if __name__ == "__main__":
    main()
