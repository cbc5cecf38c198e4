"""Features, reuse of weights, granularity, storage dtype and task(), against explicit gradients."""

import io

import pytest
import torch
import torch._functorch.config
from torch import nn

import agsurgery
from agsurgery import AGS, GradDrop, GradientSurgery, PCGrad, UPGrad
from tests._engine_cases import (
    CASES,
    MLP,
    Case,
    Conv,
    NamedShared,
    Scales,
    Tied,
    Transformer,
    check,
    copy_of,
    inner,
    make,
    reference,
    task_gradients,
)
from tests.test_engines import method


def sgd(model: nn.Module, *arguments, **options) -> GradientSurgery:
    return GradientSurgery(torch.optim.SGD(model.parameters(), lr=1e-3), *arguments, **options)


# -- gradients that are copied as they arrive ---------------------------------------------------------


@pytest.fixture
def all_large(monkeypatch):
    """Every parameter counts as large."""
    monkeypatch.setattr("agsurgery.jacobian.LARGE", 1)


@pytest.mark.usefixtures("all_large")
@pytest.mark.parametrize("engine", ["grad", "reweight", "lean"])
@pytest.mark.parametrize("case", CASES)
def test_gradients_that_are_copied_as_they_arrive_are_the_same(case, engine):
    model = make(case)
    gramian, _, expected = reference(model, method)
    options = {"shared": model.shared()} if isinstance(model, NamedShared) else {}
    report = agsurgery.backward(
        model.losses(), model.parameters(), method, engine=engine, **options
    )
    torch.testing.assert_close(report.gramian, gramian, rtol=1e-6, atol=1e-9)
    check(model, expected, **({"rtol": 1e-5, "atol": 1e-6} if case.__name__ == "Complex" else {}))


@pytest.mark.usefixtures("all_large")
def test_a_row_left_by_a_pass_that_failed_does_not_reach_the_next_step():
    """One task fails halfway, after some of its gradients were copied; then it does not reach them at all."""
    first, second = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = GradientSurgery(torch.optim.SGD([first, second], lr=0.1), "sum")

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise ValueError("broken")

    both = (first * 2 + second).sum()
    with pytest.raises(ValueError, match="broken"):
        optimizer.backward([both, 5 * first.sum() + (Broken.apply(second)).sum() + second.sum()])
    optimizer.backward([(first * 2 + second).sum(), second.sum(), first.sum()])
    assert first.grad.tolist() == [3.0] * 3
    assert second.grad.tolist() == [2.0] * 3


@pytest.mark.usefixtures("all_large")
def test_users_hooks_see_every_gradient_before_it_is_taken():
    model, seen = make(MLP), []
    weight = model.trunk[0].weight
    weight.register_hook(lambda gradient: seen.append(gradient.clone()))
    rows = task_gradients(make(MLP), lambda twin: twin.losses())
    agsurgery.backward(model.losses(), model.parameters(), method)
    assert len(seen) == 4
    for gradient, row in zip(seen, rows, strict=True):
        torch.testing.assert_close(gradient, row[0])


# -- features -------------------------------------------------------------------------------------


@pytest.mark.parametrize("large", [1, 1 << 16])
@pytest.mark.parametrize("heads", ["own", "weighted"])
@pytest.mark.parametrize("engine", ["grad", "reweight"])
@pytest.mark.parametrize("case", [MLP, Scales, Conv, Transformer])
def test_two_stages_over_features_give_the_same(monkeypatch, case, engine, heads, large):
    monkeypatch.setattr("agsurgery.jacobian.LARGE", large)
    model = make(case)
    gramian, _, expected = reference(model, method, heads=heads)
    losses = model.losses()
    report = agsurgery.backward(
        losses,
        model.parameters(),
        method,
        engine=engine,
        heads=heads,
        features=model.features,
    )
    torch.testing.assert_close(report.gramian, gramian)
    check(model, expected)


def at_features(model: Case, losses, weigh):
    """Weights from the flattened gradients at the features, and what every parameter must receive, explicitly."""
    features = model.features if isinstance(model.features, tuple) else (model.features,)
    rows = [torch.autograd.grad(loss, features, retain_graph=True) for loss in losses]
    gramian = torch.stack([torch.stack([inner(a, b) for b in rows]) for a in rows])
    weights = weigh(gramian)
    update = [
        sum(w * row[i] for w, row in zip(weights, rows, strict=True)) for i in range(len(features))
    ]
    return gramian, weights, features, update


@pytest.mark.parametrize("heads", ["own", "weighted"])
@pytest.mark.parametrize("case", [MLP, Conv, Transformer])
def test_surgery_at_the_features_is_one_pass_of_the_weighted_cotangents(case, heads):
    twin = copy_of(make(case))
    losses = twin.losses()
    gramian, weights, features, update = at_features(twin, losses, method)
    scaled = weights if heads == "weighted" else torch.ones_like(weights)
    for loss, factor in zip(losses, scaled, strict=True):
        (factor * loss).backward(inputs=list(twin.heads.parameters()), retain_graph=True)
    trunk = [p for n, p in twin.named_parameters() if not n.startswith(("heads", "idle"))]
    torch.autograd.backward(features, update, inputs=trunk)
    model = make(case)
    losses = model.losses()
    report = agsurgery.backward(
        losses,
        model.parameters(),
        method,
        heads=heads,
        features=model.features,
        level="features",
    )
    torch.testing.assert_close(report.gramian, gramian)
    torch.testing.assert_close(report.weights, weights)
    check(model, [p.grad for p in twin.parameters()])


def test_a_method_of_coordinates_works_on_the_coordinates_of_the_features():
    twin, model = copy_of(make(MLP)), make(MLP)
    losses = twin.losses()
    rows = torch.stack(
        [torch.autograd.grad(loss, twin.features, retain_graph=True)[0] for loss in losses]
    )
    drop = GradDrop(seed=3)
    drop.begin(torch.device("cpu"))
    update = drop.combine(rows.view(len(losses), -1), 0).view(twin.features.shape)
    trunk = list(twin.trunk.parameters())
    torch.autograd.backward([twin.features], [update], inputs=trunk)
    agsurgery.backward(
        model.losses(),
        model.parameters(),
        GradDrop(seed=3),
        features=model.features,
        level="features",
    )
    check(model.trunk, [p.grad for p in trunk])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"level": "features"}, ValueError, "needs `features=`"),
        ({"level": "trunk", "features": "given"}, ValueError, "`level` must be one of"),
        ({"features": []}, ValueError, "at least one tensor"),
        ({"features": [3.0]}, TypeError, r"`features\[0\]` must be a tensor"),
        ({"features": torch.ones(2)}, ValueError, "must be computed from parameters"),
        ({"features": nn.Parameter(torch.ones(2)) * 2}, ValueError, "None of them passes through"),
    ],
)
def test_features_that_cannot_serve_are_refused_and_nothing_is_lost(options, error, message):
    model = make(MLP)
    losses = model.losses()
    if options.get("features") == "given":
        options = options | {"features": model.features}
    with pytest.raises(error, match=message):
        agsurgery.backward(losses, model.parameters(), method, **options)
    assert all(p.grad is None for p in model.parameters())


def test_surgery_at_features_refuses_shared_parameters_that_lie_elsewhere():
    model = make(Tied)
    hidden = torch.tanh(model.trunk(model.table(torch.tensor([1, 2, 3]))))
    losses = [
        (hidden @ model.table.weight.T).sum(),
        hidden.square().sum(),
        (hidden @ model.table.weight.T).exp().sum(),
    ]
    with pytest.raises(ValueError, match="must lie below"):
        agsurgery.backward(losses, model.parameters(), method, features=hidden, level="features")


# -- every ----------------------------------------------------------------------------------------


class Counting:
    """A method that counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, gramian):
        self.calls += 1
        return method(gramian)


@pytest.mark.parametrize("heads", ["own", "weighted"])
@pytest.mark.parametrize("engine", ["grad", "lean", "reweight", "accumulate"])
def test_weights_serve_several_steps_and_are_then_computed_anew(engine, heads):
    model, count = make(MLP), Counting()
    optimizer = sgd(model, count, every=3, engine=engine, heads=heads)
    kept = None
    for step in range(7):
        if step % 3 == 0:
            _, kept, _ = reference(model, method, heads=heads)
        _, _, expected = reference(model, lambda g, w=kept: w, heads=heads)
        optimizer.zero_grad()
        report = optimizer.backward(model.losses())
        assert count.calls == step // 3 + 1
        torch.testing.assert_close(report.weights, kept)
        assert bool(report.gramian.isnan().all()) == (step % 3 != 0)
        check(model, expected)
        optimizer.step()


def test_between_two_computations_one_backward_pass_is_made():
    passes = []

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            passes.append(1)
            return gradient

    weight = nn.Parameter(torch.ones(3))
    optimizer = GradientSurgery(torch.optim.SGD([weight], lr=0.1), "upgrad", every=2)
    counts = []
    for _ in range(4):
        shared = Counted.apply(weight)
        optimizer.backward([shared.sum(), shared[0] - shared[1], shared.square().sum()])
        counts.append(len(passes))
        passes.clear()
    assert counts == [3, 1, 3, 1]


def test_other_tasks_than_before_get_weights_of_their_own_at_once():
    model, count = make(MLP), Counting()
    optimizer = sgd(model, count, every=10)
    a, b, c, _ = model.losses()
    optimizer.backward({"a": a, "b": b, "c": c})
    a, b, c, _ = model.losses()
    optimizer.backward({"c": c, "a": a, "b": b})  # another order is not another set
    assert count.calls == 1
    a, b, _, _ = model.losses()
    optimizer.backward({"a": a, "b": b})
    assert count.calls == 2
    a, b, _, _ = model.losses()
    optimizer.backward({"b": b, "gone": torch.zeros(()), "a": a})
    assert count.calls == 2


def test_kept_weights_follow_the_names_of_the_tasks():
    model = make(MLP)
    optimizer = sgd(model, method, every=2)
    a, b, c, _ = model.losses()
    first = optimizer.backward({"a": a, "b": b, "c": c}).weights
    a, b, c, _ = model.losses()
    second = optimizer.backward({"c": c, "a": a, "b": b}).weights
    torch.testing.assert_close(second, first[torch.tensor([2, 0, 1])])


def test_weights_of_a_step_that_was_not_finite_are_not_kept():
    model = make(MLP)
    optimizer = sgd(model, method, every=2)
    good = optimizer.backward(model.losses()).weights
    optimizer.backward(model.losses())
    bad = model.losses()
    bad[1] = bad[1] * torch.nan
    assert optimizer.backward(bad).weights.isnan().all()
    torch.testing.assert_close(optimizer.backward(model.losses()).weights, good)


def test_kept_weights_survive_a_checkpoint():
    model = make(MLP)
    optimizer = sgd(model, AGS(), every=3)
    optimizer.backward(model.losses())
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    twin = make(MLP)
    resumed = sgd(twin, AGS(), every=3)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    for each, owner in ((optimizer, model), (resumed, twin)):
        assert each.backward(owner.losses()).gramian.isnan().all()
    torch.testing.assert_close(optimizer.report.weights, resumed.report.weights)


# -- granularity ------------------------------------------------------------------------------------


def blockwise(model: Case, blocks: list[list[nn.Parameter]], weigh=method):
    """What each shared parameter must receive if every block is weighed by itself."""
    gradients = task_gradients(model, lambda twin: twin.losses())
    parameters = list(model.parameters())
    expected = [None] * len(parameters)
    gramians = []
    for block in blocks:
        places = [i for i, p in enumerate(parameters) if any(p is q for q in block)]
        rows = [[row[i] for i in places] for row in gradients]
        gramian = torch.stack([torch.stack([inner(a, b) for b in rows]) for a in rows])
        gramians.append(gramian)
        weights = weigh(gramian)
        for position, i in enumerate(places):
            expected[i] = sum(
                w.item() * row[position] for w, row in zip(weights, rows, strict=True)
            )
    for i, _ in enumerate(parameters):
        own = [row[i] for row in gradients if row[i] is not None]
        if expected[i] is None and own:
            expected[i] = sum(own)
    return torch.stack(gramians), expected


def partitions(model: Conv) -> dict[str, tuple[object, list[list[nn.Parameter]], list[str]]]:
    trunk = list(model.trunk.parameters())
    return {
        "list": ([trunk[:3], trunk[3:]], [trunk[:3], trunk[3:]], ["0", "1"]),
        "dict": ({"low": trunk[2:4]}, [trunk[2:4], trunk[:2] + trunk[4:]], ["low", "rest"]),
        "interleaved": (
            {"even": trunk[::2], "odd": trunk[1::2]},
            [trunk[::2], trunk[1::2]],
            ["even", "odd"],
        ),
    }


@pytest.mark.parametrize("engine", ["grad", "accumulate"])
@pytest.mark.parametrize("kind", ["list", "dict", "interleaved"])
def test_each_block_of_a_partition_is_weighed_by_itself(kind, engine):
    model = make(Conv)
    granularity, blocks, names = partitions(model)[kind]
    gramians, expected = blockwise(model, blocks)
    report = agsurgery.backward(
        model.losses(), model.parameters(), method, engine=engine, granularity=granularity
    )
    assert list(report.blocks)[: len(names)] == names
    torch.testing.assert_close(report.gramian[: len(names)], gramians)
    check(model, expected)


def test_every_parameter_tensor_can_be_a_block():
    model = make(Conv)
    blocks = [[p] for p in model.trunk.parameters()]
    gramians, expected = blockwise(model, blocks)
    report = agsurgery.backward(model.losses(), model.parameters(), method, granularity="parameter")
    torch.testing.assert_close(report.gramian[: len(blocks)], gramians)
    check(model, expected)


def test_every_parameter_group_can_be_a_block():
    model = make(MLP)
    low, high = list(model.trunk[0].parameters()), list(model.trunk[2].parameters())
    _, expected = blockwise(model, [low, high])
    rest = [p for p in model.parameters() if not any(p is q for q in low + high)]
    base = torch.optim.SGD([{"params": low}, {"params": high}, {"params": rest}], lr=0.1)
    report = GradientSurgery(base, method, granularity="group").backward(model.losses())
    assert report.blocks == ("0", "1", "2")
    check(model, expected)


def test_blocks_are_solved_at_once_and_not_one_by_one(monkeypatch):
    model, shapes = make(Conv), []
    solver = UPGrad()
    original = UPGrad._solve_sum

    def spy(self, problem):
        shapes.append(tuple(problem.gramian.shape))
        return original(self, problem)

    monkeypatch.setattr(UPGrad, "_solve_sum", spy)
    parameters = list(model.parameters())
    agsurgery.backward(model.losses(), parameters, solver, granularity="parameter")
    assert shapes == [(len(parameters), 3, 3)]


def test_a_block_is_solved_like_the_whole_when_there_is_but_one():
    left, right = make(Conv), make(Conv)
    for chosen in (PCGrad, AGS):
        agsurgery.backward(left.losses(), left.parameters(), chosen())
        whole = [list(right.trunk.parameters())]
        agsurgery.backward(right.losses(), right.parameters(), chosen(), granularity=whole)
        check(right, [p.grad for p in left.parameters()])


# -- dtype of the rows ------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["global", "parameter"])
def test_rows_in_bfloat16_round_but_gradients_keep_their_dtype(granularity):
    exact, rounded = make(Transformer).float(), make(Transformer).float()
    report = agsurgery.backward(exact.losses(), exact.parameters(), method, granularity=granularity)
    low = agsurgery.backward(
        rounded.losses(),
        rounded.parameters(),
        method,
        granularity=granularity,
        buffer_dtype=torch.bfloat16,
    )
    assert (low.cosines - report.cosines).abs().max() < 2e-2
    unequal = 0
    for left, right in zip(exact.parameters(), rounded.parameters(), strict=True):
        assert right.grad.dtype == torch.float32
        assert (left.grad - right.grad).norm() <= 2e-2 * left.grad.norm() + 1e-6
        unequal += int((left.grad != right.grad).any())
    assert unequal


def test_rows_in_bfloat16_take_half_the_memory():
    from benchmarks._measure import peak_bytes

    def step(dtype):
        def build():
            weight = nn.Parameter(torch.ones(1 << 22))
            optimizer = GradientSurgery(torch.optim.SGD([weight], lr=0.1), buffer_dtype=dtype)
            return lambda: optimizer.backward([(weight * i).sum() for i in range(1, 9)])

        return peak_bytes(build, device=torch.device("cpu"))

    saved = step(None) - step(torch.bfloat16)
    assert saved > 0.8 * 8 * (1 << 22) * 2


# -- task by task -------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["global", "parameter"])
@pytest.mark.parametrize("case", [MLP, Conv, Tied])
def test_gradients_taken_task_by_task_are_those_of_one_call(case, granularity):
    whole, single = make(case), make(case)
    left = sgd(whole, method, granularity=granularity)
    expected = left.backward(whole.losses())
    optimizer = sgd(single, method, granularity=granularity)
    for name, loss in enumerate(single.losses()):
        with optimizer.task(name):
            loss.backward(retain_graph=True)
    report = optimizer.combine()
    torch.testing.assert_close(report.gramian, expected.gramian)
    assert report.losses.isnan().all()
    check(single, [p.grad for p in whole.parameters()])


@torch._functorch.config.patch(donated_buffer=False)
def test_the_lean_engine_takes_a_compiled_trunk_one_task_after_the_other():
    model = make(MLP)
    gramian, _, expected = reference(model, method)
    model.trunk = torch.compile(model.trunk, backend="aot_eager")
    with pytest.warns(UserWarning, match="no batching rule"):
        report = agsurgery.backward(model.losses(), model.parameters(), method, engine="lean")
    torch.testing.assert_close(report.gramian, gramian)
    check(model, expected)
