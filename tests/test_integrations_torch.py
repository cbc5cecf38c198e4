"""Compiled and checkpointed models, averaged weights, and optimizers of other packages as the base."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import agsurgery
import examples.integrations  # noqa: F401  # timm imports torchvision: see there
from agsurgery import AGS, GradientSurgery, unwrap
from tests._engine_cases import MLP, Conv, Transformer, check, reference
from tests._engine_cases import make as make_case
from tests._optimizer_cases import FourTasks, losses, same, train, values


def method(gramian: Tensor) -> Tensor:
    """Weights that differ between tasks and depend on the whole Gramian."""
    return gramian.sum(1) / gramian.diagonal().max() + torch.arange(1.0, len(gramian) + 1)


# -- compiled models -------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]  # half a minute, cold
every_backend = pytest.mark.parametrize("backend", BACKENDS)
# On its way, torch's compiler looks at `.grad` of every tensor, and imports what it calls deprecated itself.
compiler_warns = [
    "ignore:The .grad attribute of a Tensor that is not a leaf",
    "ignore:.torch.jit.script_method. is deprecated",
]
pytestmark = [pytest.mark.filterwarnings(warning) for warning in compiler_warns]


@pytest.mark.usefixtures("fresh_compiler")
@every_backend
@pytest.mark.parametrize("engine", ["grad", "accumulate", "reweight"])
@pytest.mark.parametrize("case", [MLP, Conv, Transformer])
def test_a_compiled_trunk_gives_what_explicit_gradients_give(case, engine, backend):
    model = make_case(case)
    gramian, _, expected = reference(model, method)
    name = "blocks" if case is Transformer else "trunk"
    setattr(model, name, torch.compile(getattr(model, name), backend=backend))
    for _ in range(2):  # the first call compiles
        model.zero_grad()
        report = agsurgery.backward(model.losses(), model.parameters(), method, engine=engine)
        if case is not Conv:  # batch norm has moved on, gradients have not
            torch.testing.assert_close(report.gramian, gramian)
        check(model, expected)


@pytest.mark.usefixtures("fresh_compiler")
@every_backend
def test_a_model_compiled_as_a_whole_needs_to_be_told_what_is_shared(backend):
    model, twin = FourTasks(), FourTasks()
    x = torch.ones(3, 5, dtype=torch.float64)
    goals = [3.0, -2.0, 1.0, 5.0]

    def all_losses(module: FourTasks, x: Tensor) -> tuple[Tensor, ...]:
        outputs = module(x)
        return tuple((o - g).square().mean() for o, g in zip(outputs, goals, strict=True))

    compiled = torch.compile(all_losses, backend=backend)
    told = agsurgery.backward(
        compiled(model, x), model.parameters(), "cagrad", shared=model.trunk.parameters()
    )
    eager = agsurgery.backward(all_losses(twin, x), twin.parameters(), "cagrad")
    torch.testing.assert_close(told.gramian, eager.gramian)
    for one, two in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad)
    model.zero_grad()
    untold = agsurgery.backward(compiled(model, x), model.parameters(), "cagrad")
    assert (untold.gramian.diagonal() > 1.01 * eager.gramian.diagonal()).all()  # heads got in


@pytest.mark.usefixtures("fresh_compiler")
def test_a_model_compiled_for_one_backward_pass_is_refused_with_the_remedy():
    model = make_case(MLP)
    model.trunk = torch.compile(model.trunk, backend="aot_eager")
    torch.stack(model.losses()).sum().backward()  # compiles a backward pass that frees its graph
    model.zero_grad()
    optimizer = GradientSurgery(torch.optim.SGD(model.parameters(), lr=0.1), method)
    with pytest.raises(RuntimeError, match=r"donated_buffer = False` before compiling"):
        optimizer.backward(model.losses())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.usefixtures("fresh_compiler")
@torch._functorch.config.patch(donated_buffer=False)
def test_the_remedy_helps():
    model = make_case(MLP)
    _, _, expected = reference(model, method)
    model.trunk = torch.compile(model.trunk, backend="aot_eager")
    torch.stack(model.losses()).sum().backward()
    model.zero_grad()
    optimizer = GradientSurgery(torch.optim.SGD(model.parameters(), lr=0.1), method)
    optimizer.backward(model.losses())
    check(model, expected)


# -- activation checkpoints ------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("accumulation", ["gradients", "tasks"])
def test_training_with_activation_checkpoints_equals_training_without(reentrant, accumulation):
    model, twin = FourTasks(), FourTasks()
    optimizer = GradientSurgery(
        torch.optim.AdamW(model.parameters(), lr=0.01), AGS(seed=1), accumulation=accumulation
    )
    plain = GradientSurgery(torch.optim.AdamW(twin.parameters(), lr=0.01), AGS(seed=1))
    trunk = model.trunk.forward

    def checkpointed(x: Tensor) -> Tensor:
        return checkpoint(trunk, x.requires_grad_(), use_reentrant=reentrant)

    model.trunk.forward = checkpointed
    train(model, optimizer, range(3))
    train(twin, plain, range(3))
    torch.testing.assert_close(optimizer.report.gramian, plain.report.gramian)
    for one, two in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, two)


# -- averaged weights ------------------------------------------------------------------------------


def test_an_exponential_average_follows_training_with_surgery():
    model = FourTasks()
    optimizer = GradientSurgery(torch.optim.SGD(model.parameters(), lr=0.05))
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.75))
    expected: list[Tensor] = []
    for batch in range(4):
        train(model, optimizer, [batch])
        average.update_parameters(model)
        new = values(model)
        old = expected or new
        expected = [0.75 * a + 0.25 * b for a, b in zip(old, new, strict=True)]
    for mean, wanted in zip(average.module.parameters(), expected, strict=True):
        torch.testing.assert_close(mean.detach(), wanted)
    outputs = average(torch.ones(2, 5, dtype=torch.float64))  # and it is a model of its own
    assert not any(
        o.equal(m) for o, m in zip(outputs, model(torch.ones(2, 5).double()), strict=True)
    )


# -- optimizers of other packages as the base ------------------------------------------------------


def _timm_lookahead(params: Any) -> torch.optim.Optimizer:
    pytest.importorskip("timm")
    from timm.optim import Lookahead

    return Lookahead(torch.optim.AdamW(params, lr=0.05), alpha=0.5, k=2)


def _po_lookahead(params: Any) -> torch.optim.Optimizer:
    package = pytest.importorskip("pytorch_optimizer")
    return package.Lookahead(torch.optim.AdamW(params, lr=0.05), alpha=0.5, k=2)


def _schedule_free(params: Any) -> torch.optim.Optimizer:
    package = pytest.importorskip("schedulefree")
    return package.AdamWScheduleFree(params, lr=0.05, warmup_steps=2)


BASES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "timm Lookahead": _timm_lookahead,
    "pytorch_optimizer Lookahead": _po_lookahead,
    "schedulefree": _schedule_free,
}
every_foreign_base = pytest.mark.parametrize("base", BASES)


@every_foreign_base
def test_a_foreign_base_steps_as_it_does_alone_on_the_same_gradients(base):
    model, twin = FourTasks(), FourTasks()
    optimizer = GradientSurgery(BASES[base](list(model.parameters())))
    alone = BASES[base](list(twin.parameters()))
    if base == "schedulefree":
        optimizer.train()  # found on the base
        alone.train()
    start = values(model)
    for batch in range(5):
        optimizer.zero_grad()
        optimizer.backward(losses(model, batch))
        for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
            other.grad = parameter.grad.clone()
        optimizer.step()
        alone.step()
    assert same(model.parameters(), twin.parameters())
    if base == "schedulefree":
        trained = values(model)
        optimizer.eval()
        alone.eval()
        assert same(model.parameters(), twin.parameters())
        assert not same(model.parameters(), trained)
    assert not any(torch.equal(a, b) for a, b in zip(start, values(model), strict=True))


@every_foreign_base
def test_training_with_a_foreign_base_resumes_from_its_checkpoint(base):
    import copy

    def build(seed: int) -> tuple[FourTasks, GradientSurgery]:
        model = FourTasks(seed)
        optimizer = GradientSurgery(BASES[base](list(model.parameters())), AGS(seed=seed))
        if base == "schedulefree":
            optimizer.train()
        return model, optimizer

    (model, optimizer), (other, resumed) = build(0), build(1)
    train(model, optimizer, range(3))
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, range(3, 6))
    train(other, resumed, range(3, 6))
    assert same(model.parameters(), other.parameters())


@pytest.mark.parametrize("base", ["timm Lookahead", "pytorch_optimizer Lookahead"])
def test_lookahead_can_be_outside_too(base):
    model, twin = FourTasks(), FourTasks()
    if base == "timm Lookahead":
        pytest.importorskip("timm")
        from timm.optim import Lookahead
    else:
        Lookahead = pytest.importorskip("pytorch_optimizer").Lookahead
    inner = GradientSurgery(torch.optim.AdamW(model.parameters(), lr=0.05), AGS(seed=1))
    outside = Lookahead(inner, alpha=0.5, k=2)
    assert unwrap(outside) is inner
    inside = GradientSurgery(BASES[base](list(twin.parameters())), AGS(seed=1))
    for batch in range(5):
        outside.zero_grad()
        unwrap(outside).backward(losses(model, batch))
        outside.step()
    train(twin, inside, range(5))
    assert same(model.parameters(), twin.parameters())


def _sharpened(model: FourTasks, batch: int, rho: float, lr: float) -> None:
    """A step of sharpness-aware minimisation by hand, with surgery at both places."""
    surgery = lambda: agsurgery.backward(losses(model, batch), model.parameters(), "cagrad")  # noqa: E731
    surgery()
    before = values(model)
    norm = torch.stack([parameter.grad.norm() for parameter in model.parameters()]).norm()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += rho * parameter.grad / norm
    model.zero_grad()
    surgery()
    with torch.no_grad():
        for parameter, old in zip(model.parameters(), before, strict=True):
            parameter.copy_(old - lr * parameter.grad)
    model.zero_grad()


@pytest.mark.parametrize("style", ["closure", "two steps"])
def test_sharpness_aware_minimisation_does_surgery_at_both_places(style):
    package = pytest.importorskip("pytorch_optimizer")
    model, twin = FourTasks(), FourTasks()
    sam = package.SAM(list(model.parameters()), torch.optim.SGD, rho=0.5, lr=0.05)
    optimizer = GradientSurgery(sam, "cagrad")
    for batch in range(3):
        optimizer.zero_grad()
        optimizer.backward(losses(model, batch))
        if style == "closure":

            def closure() -> Tensor:
                return optimizer.backward(losses(model, batch)).losses.sum()  # noqa: B023

            optimizer.step(closure)
        else:
            optimizer.first_step(zero_grad=True)
            optimizer.backward(losses(model, batch))
            optimizer.second_step(zero_grad=True)
        _sharpened(twin, batch, rho=0.5, lr=0.05)
    for one, two in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, two)
    assert not same(model.parameters(), FourTasks().parameters())


# -- clipping --------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", ["norm", "value"])
def test_clipping_sees_the_combined_gradient(clip):
    model, twin = FourTasks(), FourTasks()
    optimizer = GradientSurgery(torch.optim.SGD(model.parameters(), lr=0.1), "cagrad")
    optimizer.backward(losses(model))
    agsurgery.backward(losses(twin), twin.parameters(), "cagrad")
    gradients = [parameter.grad.clone() for parameter in twin.parameters()]
    if clip == "norm":
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.25)
        total = torch.stack([gradient.norm() for gradient in gradients]).norm()
        torch.testing.assert_close(norm, total)
        expected = [gradient * 0.25 / total for gradient in gradients]
    else:
        nn.utils.clip_grad_value_(model.parameters(), 0.01)
        expected = [gradient.clamp(-0.01, 0.01) for gradient in gradients]
    before = values(model)
    optimizer.step()
    for old, parameter, wanted in zip(before, model.parameters(), expected, strict=True):
        torch.testing.assert_close(old - parameter, 0.1 * wanted, rtol=1e-5, atol=1e-9)
