"""Inputs on which versions of a method differ, and what its definition demands there.

Each trap measures by how much a function breaks the demand: 0 where it keeps it, infinity where it raises or gives
numbers that are not finite. The functions are ours, a peer's, or a pattern of public code written anew.
"""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy import optimize
from torch import Tensor

import agsurgery
from agsurgery import GradientSurgery
from benchmarks.solver_cost import random_rows

CPU = torch.device("cpu")

Update = Callable[[Tensor], Tensor]
"""From `(K, n)` gradients to the `(n,)` update."""


class Missing(Exception):
    """There is nothing to compare: a package is not installed, or does not offer it."""


def module(name: str) -> Any:
    """A peer's module.

    Raises:
        Missing: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Missing(str(error)) from error


# -- how an update is made ----------------------------------------------------------------------------


def ours(method: str, *, device: torch.device = CPU, **options: Any) -> Callable[[], Update]:
    """A method of this package on the gradients themselves; its K x K problem is solved on `device`."""

    def make() -> Update:
        made = getattr(agsurgery, method)(**options)
        return lambda rows: made((rows @ rows.T).to(device)).to(rows.device) @ rows

    return make


def torchjd(method: str, **options: Any) -> Callable[[], Update]:
    """An aggregator of TorchJD."""

    def make() -> Update:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns of its own NashMTL
            try:
                made: Update = getattr(module("torchjd.aggregation"), method)(**options)
            except ImportError as error:
                raise Missing(str(error)) from error
        return made

    return make


def unregularised(method: str) -> Callable[[], Update]:
    """One of TorchJD's projections on the dual cone without the ridge that costs it its guarantee."""

    def make() -> Update:
        projector = module("torchjd.linalg").QuadprogProjector(norm_eps=0.0, reg_eps=0.0)
        return torchjd(method, projector=projector)()

    return make


def conflictfree(operator: str) -> Callable[[], Update]:
    """An operator of conflictfree."""

    def make() -> Update:
        made = getattr(module("conflictfree.grad_operator"), operator)()
        update: Update = made.calculate_gradient
        return update

    return make


class LinearLosses:
    """K linear losses of one vector of parameters: their gradients are the rows that were given."""

    def __init__(self, rows: Tensor) -> None:
        self.point = torch.nn.Parameter(torch.zeros(rows.shape[1], dtype=rows.dtype))
        self.losses = [row @ self.point for row in rows]


def pytorch_optimizer_pcgrad(reduction: str = "sum") -> Callable[[], Update]:
    """PCGrad of pytorch_optimizer on parameters that all losses share."""

    def make() -> Update:
        library = module("pytorch_optimizer")

        def update(rows: Tensor) -> Tensor:
            problem = LinearLosses(rows)
            base = torch.optim.SGD([problem.point], lr=0.1)
            library.PCGrad(base, reduction=reduction).pc_backward(problem.losses)
            assert problem.point.grad is not None
            return problem.point.grad

        return update

    return make


# -- patterns of public code, written anew --------------------------------------------------------------


def project(rows: Tensor, orders: Sequence[Sequence[int]], eps: float = 0.0) -> Tensor:
    """PCGrad's sum: task i is projected in the order `orders[i]`; `eps` under the fraction."""
    total = torch.zeros_like(rows[0])
    for i, order in enumerate(orders):
        current = rows[i].clone()
        for j in order:
            inner = current @ rows[j]
            if j != i and inner < 0:
                current -= inner / (rows[j] @ rows[j] + eps) * rows[j]
        total += current
    return total


def fixed_order() -> Update:
    """The order of the tasks in place of a random one."""
    return lambda rows: project(rows, [range(len(rows))] * len(rows))


def absolute_epsilon(eps: float) -> Callable[[], Update]:
    """A constant against division by zero."""
    return lambda: lambda rows: project(rows, [range(len(rows))] * len(rows), eps)


def cleaned_gradients() -> Update:
    """What is not finite becomes zero before the surgery."""
    return lambda rows: project(
        torch.nan_to_num(rows, 0.0, 0.0, 0.0), [range(len(rows))] * len(rows)
    )


def mean_called_sum() -> Update:
    """A reduction that is named sum and divides by K."""
    return lambda rows: project(rows, [range(len(rows))] * len(rows)) / len(rows)


def cagrad_by_slsqp(c: float = 0.5) -> Callable[[], Update]:
    """CAGrad's objective as it stands in SLSQP, whose tolerance is absolute."""

    def update(rows: Tensor) -> Tensor:
        gramian, tasks = (rows @ rows.T).numpy(), len(rows)
        uniform = np.full(tasks, 1 / tasks)
        radius = c * math.sqrt(uniform @ gramian @ uniform)

        def objective(v: Any) -> float:
            return float(v @ gramian @ uniform + radius * math.sqrt(max(v @ gramian @ v, 0.0)))

        found = optimize.minimize(
            objective,
            uniform,
            method="SLSQP",
            bounds=[(0, 1)] * tasks,
            constraints={"type": "eq", "fun": lambda v: v.sum() - 1},
        ).x
        weights = uniform + radius / math.sqrt(found @ gramian @ found) * found
        return torch.from_numpy(tasks * weights) @ rows

    return lambda: update


NOTHING = 1e-8
"""Length, over that of the longest gradient, of an update that counts as zero: the only one that opposes no task where
the gradients leave no such direction."""


# -- what definitions demand: by how much an update breaks it ---------------------------------------------


def opposes(update: Update, inputs: Sequence[Tensor]) -> float:
    """Cosine, below zero, with the task that is opposed most; an update that is only rounding has none."""
    worst = 0.0
    for rows in inputs:
        found = update(rows)
        if not bool(found.isfinite().all()):
            return math.inf
        units = torch.nn.functional.normalize(rows, dim=1, eps=0)
        length = float(found.norm())
        if length > NOTHING * float(rows.norm(dim=1).max()):
            worst = max(worst, -float((units @ (found / length)).min()))
    return worst


def changes_with_scale(update: Callable[[], Update], rows: Tensor, scale: float) -> float:
    """Relative difference of f(s J) / s from f(J), each from a fresh state."""
    expected, found = update()(rows), update()(scale * rows) / scale
    return _relative(found, expected)


def not_optimal(update: Update, inputs: Sequence[Tensor]) -> float:
    """How far d is from the shortest convex combination, where <g_i, d> >= |d|^2 for all i; on the mean's scale."""
    worst = 0.0
    for rows in inputs:
        found = update(rows)
        if not bool(found.isfinite().all()):
            return math.inf
        squared = float(found @ found)
        worst = max(worst, 1 - float((rows @ found).min()) / squared)
    return worst


def not_fair(update: Update, inputs: Sequence[Tensor], alpha: float) -> float:
    """Spread of (G w)_i w_i^(1 / alpha) over the largest; w by least squares from the update."""
    worst = 0.0
    for rows in inputs:
        found = update(rows)
        if not bool(found.isfinite().all()):
            return math.inf
        units = torch.nn.functional.normalize(rows, dim=1)
        solved = torch.linalg.lstsq(units.T, found.unsqueeze(1)).solution.squeeze(1)
        weights = (solved / rows.norm(dim=1)).clamp(min=0)
        balance = (rows @ found) * weights ** (1 / alpha)
        worst = max(worst, float((balance.max() - balance.min()) / balance.abs().max()))
    return worst


def unequal_projections(update: Update, rows: Tensor) -> float:
    """Largest difference of the cosines of the update with the tasks; 0 for a zero update."""
    found = update(rows)
    if not bool(found.isfinite().all()):
        return math.inf
    length = float(found.norm())
    if length <= NOTHING * float(rows.norm()):
        return 0.0
    cosines = torch.nn.functional.normalize(rows, dim=1) @ (found / length)
    return float(cosines.max() - cosines.min())


def depends_on_order(update: Update, rows: Tensor, draws: int) -> float:
    """Relative difference of mean updates before and after the tasks were renumbered."""
    order = list(range(len(rows) - 1, -1, -1))
    first = torch.stack([update(rows) for _ in range(draws)]).mean(0)
    return _relative(torch.stack([update(rows[order]) for _ in range(draws)]).mean(0), first)


def hides(update: Update, rows: Tensor) -> float:
    """1 where gradients that are not finite give an update that is; an error does not hide them."""
    try:
        return float(bool(update(rows).isfinite().all()))
    except Exception:
        return 0.0


def differs(update: Update, rows: Tensor, expected: Tensor) -> float:
    """Relative difference from the known answer."""
    return _relative(update(rows), expected)


def _relative(found: Tensor, expected: Tensor) -> float:
    if not bool(found.isfinite().all()):
        return math.inf
    return float((found - expected).norm() / expected.norm())


# -- the same with heads, on a model --------------------------------------------------------------------


class Heads:
    """A trunk of 6 numbers, 3 of each head, and one that no loss reaches; two losses with given gradients.

    Args:
        draw: seed of the gradients; those of the trunk conflict.
        larger: length of the heads' gradients, about, over that of the trunk's.
    """

    def __init__(self, draw: int = 0, larger: float = 3.0) -> None:
        generator = torch.Generator().manual_seed(draw)

        def some(count: int) -> Tensor:
            return torch.randn(count, generator=generator, dtype=torch.float64)

        base, noise = some(6), some(6)
        self.trunk_rows = torch.stack([base, -base + 0.6 * noise])
        self.head_rows = larger * torch.stack([some(3), some(3)])
        self.trunk = torch.nn.Parameter(torch.zeros(6, dtype=torch.float64))
        self.heads = [torch.nn.Parameter(torch.zeros(3, dtype=torch.float64)) for _ in range(2)]
        self.unused = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.parameters = [self.trunk, *self.heads, self.unused]

    def losses(self) -> list[Tensor]:
        """Two losses, each with a graph of its own that a second pass needs kept."""
        parts = zip(self.trunk_rows, self.head_rows, self.heads, strict=True)
        return [((self.trunk + 1) ** 2 / 2) @ g + head @ h for g, h, head in parts]


Fill = Callable[[Heads], list[Tensor]]
"""Fills `.grad` by PCGrad; returns the losses."""


def fill_ours() -> Fill:
    """`GradientSurgery` with PCGrad."""

    def fill(model: Heads) -> list[Tensor]:
        optimizer = GradientSurgery(torch.optim.SGD(model.parameters, lr=0.1), agsurgery.PCGrad())
        losses = model.losses()
        optimizer.backward(losses)
        return losses

    return fill


def fill_pytorch_optimizer() -> Fill:
    """PCGrad of pytorch_optimizer."""
    library = module("pytorch_optimizer")

    def fill(model: Heads) -> list[Tensor]:
        base = torch.optim.SGD(model.parameters, lr=0.1)
        losses = model.losses()
        library.PCGrad(base, reduction="sum").pc_backward(losses)
        return losses

    return fill


def fill_mixed() -> Fill:
    """Inner products of whole gradients, heads and all."""

    def fill(model: Heads) -> list[Tensor]:
        losses = model.losses()
        parameters = model.parameters
        rows = []
        for loss in losses:
            parts = torch.autograd.grad(
                loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            rows.append(torch.cat([part.flatten() for part in parts]))
        flat = project(torch.stack(rows), [range(len(rows))] * len(rows))
        sizes = [p.numel() for p in parameters]
        for parameter, part in zip(parameters, flat.split(sizes), strict=True):
            parameter.grad = part.view_as(parameter)  # the one that no loss reaches, too
        return losses

    return fill


DRAWS = 20


# -- the same with linear layers, which TorchJD's other engine asks for -----------------------------------


Layers = tuple[torch.nn.Linear, torch.nn.Linear, torch.nn.Linear]


def _layer_losses(layers: Layers) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 4, generator=generator)
    target = 10 * torch.randn(16, 1, generator=generator)
    features = layers[0](x)
    # The heads want opposite things of the trunk.
    return [
        (layers[1](features) - target).square().mean(),
        3 * (layers[2](features) + target).square().mean(),
    ]


def layers_ours() -> Callable[[Layers], None]:
    """`GradientSurgery` with PCGrad."""

    def fill(layers: Layers) -> None:
        parameters = [p for layer in layers for p in layer.parameters()]
        optimizer = GradientSurgery(torch.optim.SGD(parameters, lr=0.1), agsurgery.PCGrad())
        optimizer.backward(_layer_losses(layers))

    return fill


def layers_autogram() -> Callable[[Layers], None]:
    """Gramian by `torchjd.autogram`, weights by its PCGrad, one backward pass of the weighted losses."""
    autogram, aggregation = module("torchjd.autogram"), module("torchjd.aggregation")

    def fill(layers: Layers) -> None:
        engine = autogram.Engine(layers[0], batch_dim=None)
        losses = torch.stack(_layer_losses(layers))
        weights = aggregation.PCGradWeighting()(engine.compute_gramian(losses))
        losses.backward(weights)

    return fill


def layer_heads_differ(fill: Callable[[Layers], None]) -> float:
    """Largest relative difference of a head's gradient from that of its own loss."""
    torch.manual_seed(0)
    layers = (torch.nn.Linear(4, 2), torch.nn.Linear(2, 1), torch.nn.Linear(2, 1))
    layers[2].load_state_dict(layers[1].state_dict())
    fill(layers)
    worst = 0.0
    for head, loss in zip(layers[1:], _layer_losses(layers), strict=True):
        (own,) = torch.autograd.grad(loss, head.weight)
        assert head.weight.grad is not None
        worst = max(worst, _relative(head.weight.grad, own))
    return worst


def heads_differ(fill: Fill) -> float:
    """Largest relative difference of a head's gradient from that of its own loss."""
    worst = 0.0
    for draw in range(DRAWS):
        model = Heads(draw)
        fill(model)
        for head, own in zip(model.heads, model.head_rows, strict=True):
            worst = max(worst, math.inf if head.grad is None else _relative(head.grad, own))
    return worst


def trunk_differs(fill: Fill) -> float:
    """Largest relative difference of the trunk's gradient from the closed form for two tasks."""
    worst = 0.0
    for draw in range(DRAWS):
        model = Heads(draw)
        fill(model)
        expected = project(model.trunk_rows, [(1,), (0,)])
        assert model.trunk.grad is not None
        worst = max(worst, _relative(model.trunk.grad, expected))
    return worst


def trunk_opposes(fill: Fill) -> float:
    """Cosine, below zero, of the trunk's gradient with the task it opposes most."""
    worst = 0.0
    for draw in range(DRAWS):
        model = Heads(draw)
        fill(model)
        assert model.trunk.grad is not None
        grad = model.trunk.grad
        worst = max(worst, opposes(lambda _, grad=grad: grad, [model.trunk_rows]))
    return worst


def unused_gets_gradient(fill: Fill) -> float:
    """1 where a parameter that no loss reaches has a gradient, which weight decay and momentum would act on."""
    model = Heads()
    fill(model)
    return float(model.unused.grad is not None)


def drops_earlier_gradients(fill: Fill) -> float:
    """Relative difference of `.grad` after two calls from twice that after one."""
    model = Heads()
    fill(model)
    assert model.trunk.grad is not None
    once = model.trunk.grad.clone()
    fill(model)
    return _relative(model.trunk.grad, 2 * once)


def keeps_graph(fill: Fill) -> float:
    """1 where all losses' graphs still hold their memory afterwards."""
    losses = fill(Heads())
    try:
        losses[-1].backward()  # type: ignore[no-untyped-call]
    except RuntimeError:
        return 0.0
    return 1.0


# -- the table ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trap:
    """One demand of a definition, and two versions of it.

    Args:
        title: of the row.
        peer: package, or "pattern".
        given: the input, in words.
        demands: the equality or inequality, in words.
        measure: by how much a version breaks it.
        ours: makes our version; None where we have none.
        theirs: makes the other version.
        tolerance: what still counts as kept.
    """

    title: str
    peer: str
    given: str
    demands: str
    measure: Callable[[Any], float]
    ours: Callable[[], Any] | None
    theirs: Callable[[], Any]
    tolerance: float = 0.01


def spread(ratio: float, tasks: Sequence[int], inputs: int, columns: int = 8) -> list[Tensor]:
    """Random gradients whose norms are spread from 1 to `ratio`."""
    return [random_rows(k, ratio, columns, seed) for k in tasks for seed in range(inputs)]


def pair(cosine: float, ratio: float) -> Tensor:
    """Two gradients in three dimensions, the second `ratio` times as long."""
    second = [cosine, math.sqrt(1 - cosine**2), 0.0]
    return torch.tensor([[1.0, 0.0, 0.0], [ratio * x for x in second]], dtype=torch.float64)


def _rows(*rows: Sequence[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


THREE = _rows([1.0, 0.2, 0.0], [-0.6, 0.8, 0.3], [0.1, -0.9, 0.5])
"""Three tasks, each in conflict with another."""
INFINITE = _rows([math.inf, 1.0, 0.0], [-1.0, 1.0, 1.0])


def krum_not_least(select: Update) -> float:
    """Share of inputs for which the row with the least sum of squared distances to its K - 2 nearest is not chosen."""
    wrong = 0
    for seed in range(200):
        rows = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        squared = torch.cdist(rows, rows).square().sort(1).values[:, 1 : 6 - 1 - 2 + 1]
        wrong += not torch.equal(select(rows), rows[int(squared.sum(1).argmin())])
    return wrong / 200


def crashes(run: Callable[[], Any]) -> float:
    """1 where it raises."""
    try:
        run()
    except Exception:
        return 1.0
    return 0.0


def _separate_momentum() -> Callable[[], Any]:
    operators = module("conflictfree.momentum_operator")
    return lambda: operators.SeparateMomentumOperator(2)


def _momentum_losses() -> Callable[[], Any]:
    recorder = module("conflictfree.loss_recorder")
    return lambda: recorder.MomentumLossRecorder(2).record_loss([0, 1], [1.0, 2.0])


def _equivariant(rows: Tensor, scale: float) -> Callable[[Callable[[], Update]], float]:
    return lambda make: changes_with_scale(make, rows, scale)


def _maker(make: Callable[[], Any]) -> Callable[[], Any]:
    """For measures that make the version themselves, with a first try that finds out whether it is there."""

    def checked() -> Any:
        make()
        return make

    return checked


NON_OPPOSING = "<g_i, d> >= 0 for all i"
EQUIVARIANT = "f(s J) = s f(J)"


Ours = Callable[..., Callable[[], Update]]
"""`ours`, on some device."""


def _dual_cone(method: str, our: Ours) -> list[Trap]:
    imbalanced = spread(100.0, (2, 3, 5), 40)
    wide = spread(10.0, (6,), 10, columns=2)
    return [
        Trap(
            f"{method}: small tasks",
            "torchjd",
            "120 random gradients, norms 1 to 100, K = 2, 3, 5",
            NON_OPPOSING,
            lambda f: opposes(f, imbalanced),
            our(method),
            torchjd(method),
        ),
        Trap(
            f"{method}: small gradients",
            "torchjd",
            "two gradients, cosine -0.9, norms 1e-3 and 3e-3",
            NON_OPPOSING,
            lambda f: opposes(f, [1e-3 * pair(-0.9, 3.0)]),
            our(method),
            torchjd(method),
        ),
        Trap(
            f"{method}: dependent gradients, no ridge",
            "torchjd",
            "10 x 6 random gradients in 2 dimensions, reg_eps = 0",
            NON_OPPOSING,
            lambda f: opposes(f, wide),
            our(method),
            unregularised(method),
        ),
    ]


def _of_torchjd(our: Ours) -> list[Trap]:
    ten = spread(100.0, (10,), 10, columns=64)
    three = spread(100.0, (3,), 10, columns=64)
    opposite = _rows([1.0, 2.0], [-2.0, -4.0])
    return [
        *_dual_cone("UPGrad", our),
        *_dual_cone("DualProj", our),
        Trap(
            "CAGrad: small gradients",
            "torchjd",
            "two gradients, cosine -0.6, norms 1; s = 1e-3",
            EQUIVARIANT,
            _equivariant(pair(-0.6, 1.0), 1e-3),
            _maker(our("CAGrad", c=0.5)),
            _maker(torchjd("CAGrad", c=0.5)),
        ),
        Trap(
            "MGDA: shortest combination",
            "torchjd",
            "10 x 10 random gradients, norms 1 to 100",
            "<g_i, d> >= |d|^2 for all i",
            lambda f: not_optimal(f, ten),
            our("MGDA", reduction="mean"),
            torchjd("MGDA"),
        ),
        Trap(
            "GradVac: small gradients",
            "torchjd",
            "two gradients, cosine -0.6, norms 1; s = 1e-4",
            EQUIVARIANT,
            _equivariant(pair(-0.6, 1.0), 1e-4),
            _maker(our("GradVac")),
            _maker(torchjd("GradVac")),
        ),
        Trap(
            "IMTL-G: opposite gradients",
            "torchjd",
            "(1, 2) and (-2, -4)",
            "<g_i, d> / |g_i| equal, or d = 0",
            lambda f: unequal_projections(f, opposite),
            our("IMTLG"),
            torchjd("IMTLG"),
        ),
        *(
            Trap(
                f"FairGrad, alpha = {alpha:g}: small gradients",
                "torchjd",
                "two gradients, cosine -0.6, norms 1e-3 and 2e-3",
                "(G w)_i w_i^(1/alpha) equal for all i",
                lambda f, a=alpha: not_fair(f, [1e-3 * pair(-0.6, 2.0)], a),
                our("FairGrad", alpha=alpha),
                torchjd("FairGrad", alpha=alpha),
            )
            for alpha in (1.0, 2.0)
        ),
        Trap(
            "NashMTL: imbalance",
            "torchjd",
            "10 x 3 random gradients, norms 1 to 100",
            "(G w)_i w_i equal for all i",
            lambda f: not_fair(f, three, 1.0),
            our("NashMTL"),
            torchjd("NashMTL", n_tasks=3),
        ),
        Trap(
            "NashMTL: the sum opposes a task",
            "torchjd",
            "two gradients, cosine -0.6, norms 1 and 2",
            "(G w)_i w_i equal for all i",
            lambda f: not_fair(f, [pair(-0.6, 2.0)], 1.0),
            our("NashMTL"),
            torchjd("NashMTL", n_tasks=2),
        ),
        Trap(
            "NashMTL: one task",
            "torchjd",
            "K = 1",
            "d along g",
            lambda f: opposes(f, [pair(0.5, 1.0)[:1]]),
            our("NashMTL"),
            torchjd("NashMTL", n_tasks=1),
        ),
        Trap(
            "Krum: squared distances",
            "torchjd",
            "200 x 6 random gradients, f = 1",
            "the row chosen has the least sum of squared distances to its K - f - 2 nearest",
            krum_not_least,
            None,
            torchjd("Krum", n_byzantine=1),
            tolerance=0.0,
        ),
        Trap(
            "weighted losses: heads",
            "torchjd",
            "Gramian by autogram, then one backward pass of the weighted losses, as documented",
            "a head gets the gradient of its own loss",
            layer_heads_differ,
            layers_ours,
            layers_autogram,
        ),
    ]


def _of_conflictfree(our: Ours) -> list[Trap]:
    first = _rows([1.0, 2.0])
    traps = [
        Trap(
            f"ConFIG: {name}",
            "conflictfree",
            f"(1, 2) and {second}",
            demand,
            measure,
            our("ConFIG"),
            conflictfree("ConFIGOperator"),
        )
        for name, second, demand, measure in (
            (
                "parallel gradients",
                "(2, 4)",
                "d = g_1 + g_2",
                lambda f: differs(f, _rows([1.0, 2.0], [2.0, 4.0]), 3 * first[0]),
            ),
            (
                "opposite gradients",
                "(-2, -4)",
                "equal cosines: d = 0",
                lambda f: unequal_projections(f, _rows([1.0, 2.0], [-2.0, -4.0])),
            ),
            (
                "a zero gradient",
                "(0, 0)",
                "d = g_1",
                lambda f: differs(f, _rows([1.0, 2.0], [0.0, 0.0]), first[0]),
            ),
        )
    ]
    traps += [
        Trap(
            "ConFIG: float64",
            "conflictfree",
            "three gradients in float64",
            "an update of equal cosines",
            lambda f: unequal_projections(f, THREE),
            our("ConFIG"),
            conflictfree("ConFIGOperator"),
        ),
        Trap(
            "PCGrad: order of tasks",
            "conflictfree",
            "three gradients, 200 draws",
            "the mean update does not depend on how tasks are numbered",
            lambda f: depends_on_order(f, THREE, 200),
            our("PCGrad"),
            conflictfree("PCGradOperator"),
            tolerance=0.05,
        ),
        Trap(
            "SeparateMomentumOperator",
            "conflictfree",
            "made for two tasks",
            "no error",
            crashes,
            None,
            _separate_momentum,
        ),
        Trap(
            "MomentumLossRecorder",
            "conflictfree",
            "two losses recorded",
            "no error",
            crashes,
            None,
            _momentum_losses,
        ),
    ]
    return traps


HEADS_GIVEN = "20 draws: two heads with long gradients on conflicting trunks"


def _with_heads(peer: str, theirs: Callable[[], Fill]) -> list[Trap]:
    rows: list[tuple[str, str, str, Callable[[Any], float]]] = [
        ("heads", HEADS_GIVEN, "a head gets the gradient of its own loss", heads_differ),
        ("trunk", HEADS_GIVEN, "the trunk gets PCGrad of its own gradients", trunk_differs),
        ("conflict left", HEADS_GIVEN, NON_OPPOSING, trunk_opposes),
        (
            "unused parameters",
            "a parameter that no loss reaches",
            "its grad is None",
            unused_gets_gradient,
        ),
    ]
    return [
        Trap(f"PCGrad: {title}", peer, given, demands, measure, fill_ours, theirs)
        for title, given, demands, measure in rows
    ]


def _of_pytorch_optimizer(our: Ours) -> list[Trap]:
    rows = pair(-0.6, 2.0)
    peer, theirs = "pytorch_optimizer", fill_pytorch_optimizer
    return [
        *_with_heads(peer, theirs),
        Trap(
            "PCGrad: gradients accumulate",
            peer,
            "two calls without zero_grad",
            "`.grad` is the sum of both, as backward() leaves it",
            drops_earlier_gradients,
            fill_ours,
            theirs,
        ),
        Trap(
            "PCGrad: the graph is freed",
            peer,
            "one call",
            "a second backward pass is refused, as after backward()",
            keeps_graph,
            fill_ours,
            theirs,
        ),
        Trap(
            "PCGrad: reduction",
            peer,
            "two gradients, cosine -0.6, reduction='sum'",
            "the sum of the projected gradients",
            lambda f: differs(f, rows, project(rows, [(1,), (0,)])),
            our("PCGrad"),
            pytorch_optimizer_pcgrad("sum"),
        ),
        Trap(
            "PCGrad: small gradients",
            peer,
            "two gradients, cosine -0.6; s = 1e-8",
            EQUIVARIANT,
            _equivariant(rows, 1e-8),
            _maker(our("PCGrad")),
            _maker(pytorch_optimizer_pcgrad()),
        ),
        Trap(
            "PCGrad: infinity",
            peer,
            "an infinite entry",
            "the update is not finite",
            lambda f: hides(f, INFINITE),
            our("PCGrad"),
            pytorch_optimizer_pcgrad(),
        ),
    ]


def _patterns(our: Ours) -> list[Trap]:
    rows = pair(-0.8, 1.0)
    return [
        *_with_heads("pattern", fill_mixed),
        Trap(
            "PCGrad in a fixed order",
            "pattern",
            "three gradients, 200 draws",
            "the mean update does not depend on how tasks are numbered",
            lambda f: depends_on_order(f, THREE, 200),
            our("PCGrad"),
            fixed_order,
            tolerance=0.05,
        ),
        *(
            Trap(
                f"PCGrad with {eps:g} under the fraction",
                "pattern",
                f"two gradients, cosine -0.8; s = {scale:g}",
                EQUIVARIANT,
                _equivariant(rows, scale),
                _maker(our("PCGrad")),
                _maker(absolute_epsilon(eps)),
            )
            for eps, scale in ((1e-5, 1e-3), (1e-8, 1e-4))
        ),
        Trap(
            "CAGrad by SLSQP, not normalised",
            "pattern",
            "three gradients of norms 1, 3 and 0.3; s = 1e-3",
            EQUIVARIANT,
            _equivariant(THREE * torch.tensor([[1.0], [3.0], [0.3]], dtype=torch.float64), 1e-3),
            _maker(our("CAGrad", c=0.5)),
            _maker(cagrad_by_slsqp()),
        ),
        Trap(
            "infinity replaced by zero",
            "pattern",
            "an infinite entry",
            "the update is not finite",
            lambda f: hides(f, INFINITE),
            our("PCGrad"),
            cleaned_gradients,
        ),
        Trap(
            "a mean called sum",
            "pattern",
            "two gradients, cosine -0.8",
            "the sum of the projected gradients",
            lambda f: differs(f, rows, project(rows, [(1,), (0,)])),
            our("PCGrad"),
            mean_called_sum,
        ),
    ]


def all_traps(device: torch.device = CPU) -> list[Trap]:
    """Every row, by peer; our K x K problems are solved on `device`."""
    our = partial(ours, device=device)
    return [
        *_of_torchjd(our),
        *_of_conflictfree(our),
        *_of_pytorch_optimizer(our),
        *_patterns(our),
    ]
