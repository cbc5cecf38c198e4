"""Every engine against explicit gradients, on models that share their parameters in every way."""

import pytest
import torch
from torch import nn

import agsurgery
from agsurgery import AGS, GradientSurgery, PCGrad
from tests._engine_cases import (
    CASES,
    MLP,
    Case,
    Conv,
    Disjoint,
    NamedShared,
    Tied,
    Transformer,
    check,
    make,
    reference,
)

ENGINES = ["grad", "lean", "accumulate", "reweight"]


def method(gramian):
    """Weights that depend on the whole Gramian, differ between tasks, and are smooth."""
    norms = gramian.diagonal().sqrt()
    return (gramian / norms.max() ** 2).sum(1) + torch.arange(1.0, len(norms) + 1)


def options_of(model: Case) -> dict:
    return {"shared": model.shared()} if isinstance(model, NamedShared) else {}


@pytest.mark.parametrize("heads", ["own", "weighted"])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", CASES)
def test_every_engine_gives_what_explicit_gradients_give(case, engine, heads):
    model = make(case)
    gramian, weights, expected = reference(model, method, heads=heads)
    report = agsurgery.backward(
        model.losses(), model.parameters(), method, engine=engine, heads=heads, **options_of(model)
    )
    torch.testing.assert_close(report.gramian, gramian, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(report.weights, weights, rtol=1e-6, atol=1e-9)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if case.__name__ == "Complex" else {}
    check(model, expected, **tolerance)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", [MLP, Conv, Tied, Disjoint])
def test_every_engine_adds_to_what_is_there_and_frees_the_graphs(case, engine):
    model = make(case)
    _, _, expected = reference(model, method)
    for times in (1, 2):
        losses = model.losses()
        agsurgery.backward(losses, model.parameters(), method, engine=engine)
        if case is not Conv:  # batch norm has moved on, gradients have not
            check(model, [None if g is None else times * g for g in expected])
    with pytest.raises(RuntimeError, match="second time"):
        agsurgery.backward(losses, model.parameters(), method, engine=engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_can_leave_the_graphs(engine):
    model = make(MLP)
    _, _, expected = reference(model, method)
    losses = model.losses()
    for times in (1, 2):
        agsurgery.backward(
            losses, model.parameters(), method, engine=engine, retain_graph=times == 1
        )
        check(model, [None if g is None else times * g for g in expected])


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_takes_absent_and_single_tasks(engine):
    model = make(MLP)

    def with_absent(twin):
        first, second, *_ = twin.losses()
        return [first, second]

    _, _, expected = reference(model, lambda g: method(g), make_losses=with_absent)
    first, second, *_ = model.losses()
    losses = {"a": first, "gone": torch.zeros(()), "b": second}

    def middle(gramian):
        assert gramian[1].abs().max() == 0
        kept = torch.tensor([0, 2])
        return torch.zeros(3, dtype=torch.float64).index_copy(
            0, kept, method(gramian[kept][:, kept])
        )

    agsurgery.backward(losses, model.parameters(), middle, engine=engine)
    check(model, expected)
    single = make(MLP)
    agsurgery.backward(single.losses()[:1], single.parameters(), engine=engine)
    alone = make(MLP)
    alone.losses()[0].backward()
    check(single, [p.grad for p in alone.parameters()])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_loss_that_is_not_finite_reaches_gradients_through_every_engine(engine, poison):
    model = make(MLP)
    first, *rest = model.losses()
    agsurgery.backward([first * poison, *rest], model.parameters(), AGS(), engine=engine)
    assert all(not p.grad.isfinite().all() for p in model.trunk.parameters())


@pytest.mark.parametrize("engine", ENGINES)
def test_leaves_outside_keep_their_gradient_and_are_refused_if_they_are_parameters(engine):
    weight, other = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    points = torch.ones(3, requires_grad=True)
    points.grad = torch.full((3,), 7.0)
    call = {"method": "sum", "engine": engine}
    losses = lambda: [(weight * points).sum(), (weight * other).sum()]  # noqa: E731
    with pytest.raises(ValueError, match='outside="ignore"'):
        agsurgery.backward(losses(), [weight], **call)
    agsurgery.backward(losses(), [weight], outside="ignore", **call)
    assert other.grad is None
    assert points.grad.tolist() == [7.0] * 3
    assert weight.grad.tolist() == [2.0] * 3


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_serves_a_grad_scaler(engine):
    plain, scaled = make(MLP).float(), make(MLP).float()
    once = GradientSurgery(torch.optim.SGD(plain.parameters(), lr=0.1), method, engine=engine)
    report = once.backward(plain.losses())
    optimizer = GradientSurgery(torch.optim.SGD(scaled.parameters(), lr=0.1), method, engine=engine)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    other = optimizer.backward(scaled.losses(), scaler=scaler)
    torch.testing.assert_close(other.gramian, report.gramian)
    scaler.unscale_(optimizer)
    for left, right in zip(plain.parameters(), scaled.parameters(), strict=True):
        if left.grad is not None:
            torch.testing.assert_close(left.grad, right.grad)


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_trains_16_bit_parameters(engine):
    model = make(Transformer)
    gramian, _, expected = reference(model, method)
    low = make(Transformer).bfloat16()
    report = agsurgery.backward(low.losses(), low.parameters(), method, engine=engine)
    error = (report.gramian - gramian).abs() / report.norms.outer(report.norms)
    assert error.max() < 0.05
    for parameter, wanted in zip(low.parameters(), expected, strict=True):
        assert parameter.grad.dtype == torch.bfloat16
        assert (parameter.grad - wanted).norm() < 0.1 * wanted.norm() + 0.1


@pytest.mark.parametrize("engine", ENGINES)
def test_gradient_hooks_of_tensors_act_on_every_task(engine):
    """A hook that scales the gradient of one parameter scales it in the Gramian and in the result."""
    model, twin = make(MLP), make(MLP)
    for each in (model, twin):
        each.trunk[0].weight.register_hook(lambda gradient: 3 * gradient)
    expected = agsurgery.backward(twin.losses(), twin.parameters(), method)
    report = agsurgery.backward(model.losses(), model.parameters(), method, engine=engine)
    torch.testing.assert_close(report.gramian, expected.gramian)
    torch.testing.assert_close(model.trunk[0].weight.grad, twin.trunk[0].weight.grad)


def test_no_hook_of_an_engine_stays_behind():
    model = make(Transformer)
    for engine in ENGINES:
        losses = model.losses()
        agsurgery.backward(losses, model.parameters(), method, engine=engine, retain_graph=True)
        for parameter in model.parameters():
            assert not parameter._backward_hooks
            parameter.grad = None
        torch.stack(losses).sum().backward()
        expected = [p.grad for p in make_gradients(model)]
        check(model, expected)
        model.zero_grad()


def make_gradients(model):
    twin = make(Transformer)
    twin.load_state_dict(model.state_dict())
    torch.stack(twin.losses()).sum().backward()
    return list(twin.parameters())


@pytest.mark.parametrize("engine", ENGINES)
def test_ags_and_pcgrad_agree_between_engines(engine):
    for chosen in (AGS(), PCGrad()):
        left, right = make(Conv), make(Conv)
        agsurgery.backward(left.losses(), left.parameters(), chosen.__class__())
        agsurgery.backward(right.losses(), right.parameters(), chosen.__class__(), engine=engine)
        check(right, [p.grad for p in left.parameters()])
