"""What does a whole training step with AGS cost, beside the plain summed step?

A step is zero_grad, forward, backward with or without surgery, and the step of SGD with momentum. Beside AGS stand

- the plain summed step, the unit of every ratio;
- K backward passes without surgery, summed into `.grad`: the least that one pass per loss can cost;
- PCGrad and UPGrad of torchjd, as its documentation calls them, and PCGrad with its passes one by one;
- PCGrad of pytorch_optimizer.

All arms start from the same weights and see the same data. They are timed in turn, in many rounds; a ratio compares
two times of one round.

    python -m benchmarks.step_cost --cases toy_2 toy_8

Needs torchvision for the ResNet, torchjd and pytorch_optimizer for their arms; what is missing is left out.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import agsurgery
from agsurgery import AGS, GradientSurgery
from benchmarks._measure import (
    Sample,
    Spread,
    Step,
    environment,
    interleaved,
    peak_bytes,
    write_json,
)
from examples.torchvision_import import import_torchvision

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("torch", "torchvision", "torchjd", "pytorch_optimizer", "quadprog", "numpy")
LR, MOMENTUM = 1e-3, 0.9  # small, so that the losses do not run to zero while the clock runs
BLOCK_SECONDS, WARMUP = 0.1, 2
PLAIN, FLOOR, OURS = "plain sum", "K passes", "AGS"


# -- cases ----------------------------------------------------------------------------------------


class MultiTask(nn.Module):
    """A shared trunk, and one head per task; without heads the trunk is all there is."""

    def __init__(self, trunk: nn.Module, heads: Sequence[nn.Module]) -> None:
        super().__init__()
        self.trunk = trunk
        self.heads = nn.ModuleList(heads)

    def reached(self, task: int) -> list[nn.Parameter]:
        """Parameters that the loss of `task` depends on."""
        head = self.heads[task].parameters() if len(self.heads) else ()
        return [*self.trunk.parameters(), *head]


class Outcome(NamedTuple):
    """K scalar losses, and the features all heads read; None if each loss had a forward pass of its own."""

    losses: list[Tensor]
    features: Tensor | None


Forward = Callable[[MultiTask], Outcome]


class Problem(NamedTuple):
    """A model with its initial weights, and the forward pass on fixed data."""

    model: MultiTask
    forward: Forward


@dataclass(frozen=True)
class Case:
    """One row of the table; `build` makes its `Problem` on a device, the same at each call."""

    title: str
    tasks: int
    build: Callable[[torch.device], Problem]


def heads_case(
    trunk: Callable[[], nn.Module],
    shape: tuple[int, ...],
    features: int,
    outputs: int,
    tasks: int,
    device: torch.device,
) -> Problem:
    """K linear heads on the features of one trunk; with one output the loss is binary cross-entropy."""
    torch.manual_seed(0)
    model = MultiTask(trunk(), [nn.Linear(features, outputs) for _ in range(tasks)]).to(device)
    inputs = torch.randn(shape).to(device)
    if outputs == 1:
        targets = torch.rand(tasks, shape[0], 1).round().to(device)
        loss: Callable[..., Tensor] = F.binary_cross_entropy_with_logits
    else:
        targets = torch.randint(outputs, (tasks, shape[0])).to(device)
        loss = F.cross_entropy

    def forward(model: MultiTask) -> Outcome:
        shared = model.trunk(inputs)
        pairs = zip(model.heads, targets, strict=True)
        return Outcome([loss(head(shared), target) for head, target in pairs], shared)

    return Problem(model, forward)


def disjoint_resnet(device: torch.device, batch: int = 16, pixels: int = 64) -> Problem:
    """Two losses on ResNet-18, each on a batch of its own: classes of one, likeness within the other."""
    resnet18 = import_torchvision().models.resnet18
    torch.manual_seed(0)
    model = MultiTask(resnet18(num_classes=128), []).to(device)
    first, second = torch.randn(2, batch, 3, pixels, pixels).to(device)
    classes = torch.randint(128, (batch,)).to(device)

    def forward(model: MultiTask) -> Outcome:
        contrast = F.cross_entropy(model.trunk(first), classes)
        unit = F.normalize(model.trunk(second))
        return Outcome([contrast, 1 - (unit @ unit.T).mean()], None)

    return Problem(model, forward)


def mlp(inputs: int, width: int, layers: int) -> nn.Module:
    """Linear layers, each followed by a ReLU."""
    sizes = [inputs] + [width] * layers
    pairs = itertools.pairwise(sizes)
    return nn.Sequential(*(m for a, b in pairs for m in (nn.Linear(a, b), nn.ReLU())))


def convolutions() -> nn.Module:
    """Four convolutions with batch norm, 3 to 128 channels, averaged over the picture."""
    channels = (3, 32, 64, 128, 128)
    blocks = [
        nn.Sequential(nn.Conv2d(a, b, 3, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
        for a, b in itertools.pairwise(channels)
    ]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def _wide(tasks: int) -> Case:
    build = partial(heads_case, partial(mlp, 1024, 1024, 4), (64, 1024), 1024, 10, tasks)
    return Case(f"4 x 1024 MLP, batch 64, {tasks} heads", tasks, build)


def _toy(tasks: int) -> Case:
    build = partial(heads_case, partial(mlp, 20, 64, 2), (32, 20), 64, 1, tasks)
    return Case(f"toy MLP (20-64-64), batch 32, {tasks} heads", tasks, build)


CASES: dict[str, Case] = {
    "resnet18": Case("ResNet-18, 64 px, two batches of 16, 2 disjoint losses", 2, disjoint_resnet),
    "mlp_2": _wide(2),
    "mlp_8": _wide(8),
    "conv_40": Case(
        "4 convolutions, 64 px, batch 32, 40 heads",
        40,
        partial(heads_case, convolutions, (32, 3, 64, 64), 128, 1, 40),
    ),
    "toy_2": _toy(2),
    "toy_8": _toy(8),
}
QUICK_CASES = ("toy_2", "toy_8")


# -- arms -----------------------------------------------------------------------------------------


class Arm(NamedTuple):
    """A model of its own with its optimizer, and the pass that fills `.grad` (forward and backward)."""

    model: MultiTask
    optimizer: torch.optim.Optimizer
    fill: Callable[[], None]

    def step(self) -> None:
        """One whole training step."""
        self.optimizer.zero_grad()
        self.fill()
        self.optimizer.step()


ArmMaker = Callable[[Problem], Arm]


def _sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)


def plain_sum(problem: Problem) -> Arm:
    """The step everybody knows: one backward pass of the sum of the losses."""
    model = copy.deepcopy(problem.model)

    def fill() -> None:
        torch.stack(problem.forward(model).losses).sum().backward()  # type: ignore[no-untyped-call]

    return Arm(model, _sgd(model), fill)


def k_passes(problem: Problem) -> Arm:
    """One backward pass per loss, the gradients summed: no surgery, no copies."""
    model = copy.deepcopy(problem.model)

    def fill() -> None:
        losses, features = problem.forward(model)
        for task, loss in enumerate(losses):
            reached = model.reached(task)
            keep = features is not None and task + 1 < len(losses)
            gradients = torch.autograd.grad(loss, reached, retain_graph=keep)
            sums: list[Tensor] = []
            terms: list[Tensor] = []
            for parameter, gradient in zip(reached, gradients, strict=True):
                if parameter.grad is None:
                    parameter.grad = gradient
                else:
                    sums.append(parameter.grad)
                    terms.append(gradient)
            if sums:
                torch._foreach_add_(sums, terms)

    return Arm(model, _sgd(model), fill)


def ags(problem: Problem) -> Arm:
    """AGS of this package."""
    model = copy.deepcopy(problem.model)
    optimizer = GradientSurgery(_sgd(model), AGS())

    def fill() -> None:
        optimizer.backward(problem.forward(model).losses)

    return Arm(model, optimizer, fill)


def torchjd(problem: Problem, aggregator: str, chunk: int | None = None) -> Arm:
    """An aggregator of torchjd, by `mtl_backward` where there are heads and `backward` where there are none.

    Args:
        problem: the model and its forward pass.
        aggregator: name of a class of `torchjd.aggregation`.
        chunk: losses differentiated at a time; None, the default of torchjd: all at once, by vmap.

    Raises:
        ImportError: torchjd, or a package the aggregator needs, is not installed.
    """
    autojac: Any = importlib.import_module("torchjd.autojac")
    combine = getattr(importlib.import_module("torchjd.aggregation"), aggregator)()
    model = copy.deepcopy(problem.model)
    trunk = list(model.trunk.parameters())

    def fill() -> None:
        losses, features = problem.forward(model)
        if features is None:
            autojac.backward(losses, parallel_chunk_size=chunk)
        else:
            autojac.mtl_backward(losses, features=features, parallel_chunk_size=chunk)
        autojac.jac_to_grad(trunk, combine)

    return Arm(model, _sgd(model), fill)


def pytorch_optimizer(problem: Problem) -> Arm:
    """PCGrad of pytorch_optimizer, which treats trunk and heads alike.

    Raises:
        ImportError: pytorch_optimizer is not installed.
    """
    library: Any = importlib.import_module("pytorch_optimizer")
    model = copy.deepcopy(problem.model)
    optimizer = library.PCGrad(_sgd(model), reduction="sum")

    def fill() -> None:
        optimizer.pc_backward(problem.forward(model).losses)

    return Arm(model, optimizer, fill)


ARMS: dict[str, ArmMaker] = {
    PLAIN: plain_sum,
    FLOOR: k_passes,
    OURS: ags,
    "torchjd PCGrad": partial(torchjd, aggregator="PCGrad"),
    "torchjd PCGrad, one by one": partial(torchjd, aggregator="PCGrad", chunk=1),
    "torchjd UPGrad": partial(torchjd, aggregator="UPGrad"),
    "pytorch_optimizer PCGrad": pytorch_optimizer,
}


# -- guard ----------------------------------------------------------------------------------------


def check_gradients(name: str, arm: Arm, reference: Arm) -> None:
    """Make sure that what will be timed does its work: run both arms' pass and compare.

    Every parameter must have a finite gradient. K passes must give the plain sum; AGS must give the heads their plain
    gradients and the trunk a gradient as long as the plain one.

    Args:
        name: of `arm`, as in `ARMS`.
        arm: has not made a step yet.
        reference: the plain sum, likewise.

    Raises:
        RuntimeError: it does not.
    """
    for each in (arm, reference):
        each.optimizer.zero_grad()
        each.fill()
    for key, parameter in arm.model.named_parameters():
        if parameter.grad is None or not bool(parameter.grad.isfinite().all()):
            raise RuntimeError(f"{name}: the gradient of `{key}` must be finite. It is not.")

    def same(first: nn.Module, second: nn.Module) -> bool:
        a, b = _flat_gradient(first), _flat_gradient(second)
        return bool((a - b).norm() <= 1e-3 * b.norm())  # float32, in other orders of summation

    def as_long(first: nn.Module, second: nn.Module) -> bool:
        a, b = _flat_gradient(first).norm(), _flat_gradient(second).norm()
        return bool((a - b).abs() <= 1e-3 * b)

    trunk, heads = arm.model.trunk, arm.model.heads
    right = True
    if name == FLOOR:
        right = same(trunk, reference.model.trunk) and same(heads, reference.model.heads)
    if name == OURS:
        right = as_long(trunk, reference.model.trunk) and same(heads, reference.model.heads)
    if not right:
        raise RuntimeError(f"{name}: gradients must agree with the plain sum. They do not.")


def _flat_gradient(module: nn.Module) -> Tensor:
    gradients = [p.grad.double().flatten() for p in module.parameters() if p.grad is not None]
    return torch.cat(gradients) if gradients else torch.zeros(1)


# -- measurement ----------------------------------------------------------------------------------


def measure(case: Case, device: torch.device, rounds: int, block_seconds: float) -> dict[str, Any]:
    """Times, ratios and peak memory of all arms on one case, as they go into the JSON file.

    Raises:
        ImportError: the case needs a package that is not installed.
    """
    synchronise: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else _nothing
    problem = case.build(device)
    arms: dict[str, Arm] = {}
    skipped: dict[str, str] = {}
    for name, make in ARMS.items():
        try:
            arms[name] = make(problem)
        except ImportError as error:
            skipped[name] = str(error)
        else:
            check_gradients(name, arms[name], plain_sum(problem))
    samples = interleaved(
        {name: arm.step for name, arm in arms.items()},
        rounds=rounds,
        block_seconds=block_seconds,
        warmup=WARMUP,
        synchronise=synchronise,
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


def _nothing() -> None:
    pass


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
        if name not in (PLAIN, FLOOR, OURS)
    ]
    if ratios:
        sentence += f"; the peers take {min(ratios):.2f} to {max(ratios):.2f} times the time of AGS"
    return sentence + "."


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, help="default: all")
    parser.add_argument("--rounds", type=int, default=15, help="samples per arm (default: 15)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch (default: 1)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--out", type=Path, help="JSON file (default: benchmarks/results/step_cost[-cuda].json)"
    )
    parser.add_argument("--quick", action="store_true", help=argparse.SUPPRESS)  # for the tests
    options = parser.parse_args(arguments)
    for name in ("rounds", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1. Got {getattr(options, name)}.")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU that torch can use. Found none.")
    return options


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the chosen cases, print table and answer, write the file."""
    device = torch.device(options.device)
    names = options.cases or (QUICK_CASES if options.quick else tuple(CASES))
    rounds, block_seconds = (1, 0.005) if options.quick else (options.rounds, BLOCK_SECONDS)
    record = environment(device, PACKAGES)  # before anything runs: the load is that of others
    record["versions"]["agsurgery"] = agsurgery.__version__
    cases: dict[str, Any] = {}
    for name in names:
        try:
            cases[name] = measure(CASES[name], device, rounds, block_seconds)
        except ImportError as error:
            print(f"{CASES[name].title}\n  left out: {error}\n")
            continue
        print(table(cases[name]) + "\n", flush=True)
    summary = answer(cases)
    result = {
        "question": (__doc__ or "").splitlines()[0],
        "answer": summary,
        "device": options.device,
        "rounds": rounds,
        "block_seconds": block_seconds,
        **record,
        "cases": cases,
    }
    out = options.out or RESULTS / f"step_cost{'-cuda' if device.type == 'cuda' else ''}.json"
    if options.out or not options.quick:
        write_json(out, result)
    print(
        "ms: median step; ratios: medians over the rounds; memory: peak of live tensors, / plain sum"
    )
    print(summary)
    return result


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark with command line arguments; returns what the JSON file holds."""
    options = _arguments(arguments)
    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        return run(options)
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    main()
