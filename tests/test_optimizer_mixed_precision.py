"""`GradScaler`, autocast and 16-bit parameters: the scale drops out exactly, an infinity leaves no trace."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import agsurgery
from agsurgery import DWA, FAMO, UW, GradientSurgery, GradVac, NormRestored, PCGrad, Smoothed
from tests._optimizer_cases import FourTasks, every_base, losses, make, same, train, values


def _scaler(**options: Any) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=2.0**12, **options)


def _state(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """All numbers of the base's state: Adam forgives a wrong scale in its steps, but not here."""
    return [torch.as_tensor(v) for entry in optimizer.state.values() for v in entry.values()]


@every_base
@pytest.mark.parametrize("method", ["ags", "pcgrad", "cagrad", "sum"])
def test_scaled_training_with_clipping_equals_the_unscaled_one(base, method):
    model, optimizer = make(base, method)
    twin, reference = make(base, method)
    scaler = _scaler()
    for batch in range(3):
        optimizer.zero_grad()
        scaled = optimizer.backward(losses(model, batch), scaler=scaler)
        gradient = model.trunk.weight.grad.clone()
        scaler.unscale_(optimizer)
        torch.testing.assert_close(gradient, model.trunk.weight.grad * 2.0**12)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()

        reference.zero_grad()
        plain = reference.backward(losses(twin, batch))
        assert norm == nn.utils.clip_grad_norm_(twin.parameters(), 0.5) > 0.5
        reference.step()
        for name in ("gramian", "weights", "losses", "scale"):
            assert torch.equal(getattr(scaled, name), getattr(plain, name))
    assert same(model.parameters(), twin.parameters())
    assert same(_state(optimizer), _state(reference))


@every_base
def test_the_wrapper_asks_the_scaler_to_unscale_whatever_the_base_supports(base):
    _, optimizer = make(base)
    assert optimizer._step_supports_amp_scaling is False
    fused = getattr(optimizer.base_optimizer, "_step_supports_amp_scaling", False)
    assert fused is (base == "adamw_fused")


@every_base
def test_a_scaled_step_without_unscaling_by_hand_equals_the_unscaled_one(base):
    model, optimizer = make(base)
    twin, reference = make(base)
    scaler = _scaler()
    for batch in range(3):
        optimizer.zero_grad()
        optimizer.backward(losses(model, batch), scaler=scaler)
        scaler.step(optimizer)
        scaler.update()
    train(twin, reference, range(3))
    assert same(model.parameters(), twin.parameters())
    assert same(_state(optimizer), _state(reference))


@every_base
@pytest.mark.parametrize("method", ["ags", "pcgrad", "cagrad", "sum"])
@pytest.mark.parametrize("where", ["trunk", "head"])
def test_an_infinity_in_one_task_skips_the_step_and_halves_the_scale(where, method, base):
    model, optimizer = make(base, method)
    scaler = _scaler()
    before = values(model)
    terms = losses(model)
    if where == "trunk":
        terms[2] = terms[2] * math.inf
    else:
        terms[2] = terms[2] + (model.heads[2].bias * math.inf).sum()
    report = optimizer.backward(terms, scaler=scaler)
    if where == "head":
        assert model.trunk.weight.grad.isfinite().all()
    else:  # no finite answer to a question that is not finite
        assert not report.weights.isfinite().any()
    scaler.step(optimizer)
    scaler.update()
    assert same(before, model.parameters())
    assert scaler.get_scale() == 2.0**11
    optimizer.zero_grad()
    optimizer.backward(losses(model), scaler=scaler)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**11
    assert not same(before, model.parameters())
    assert all(parameter.isfinite().all() for parameter in model.parameters())


ADAPTIVE: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "GradVac": (lambda: GradVac(beta=0.3), {}),
    "Smoothed": (lambda: Smoothed("cagrad"), {}),
    "NormRestored": (lambda: NormRestored(GradVac(beta=0.3)), {}),
    "UW": (lambda: UW(), {}),
    "DWA": (lambda: DWA(), {}),
    "FAMO": (lambda: FAMO(), {}),
    "every": (lambda: "cagrad", {"every": 3}),
    "lean": (lambda: GradVac(beta=0.3), {"engine": "lean"}),
    "reweight": (lambda: GradVac(beta=0.3), {"engine": "reweight"}),
    "accumulate": (lambda: GradVac(beta=0.3), {"engine": "accumulate"}),
    "tasks": (lambda: GradVac(beta=0.3), {"accumulation": "tasks"}),
}


@pytest.mark.parametrize("name", ADAPTIVE)
@pytest.mark.parametrize("poison", [math.inf, math.nan])
def test_an_infinity_leaves_what_the_method_remembers_as_it_was(poison, name):
    method, options = ADAPTIVE[name]
    model, optimizer = make("sgd", method(), **options)
    scaler = _scaler()
    train(model, optimizer, range(3))  # with `every=3`, the next step computes weights anew
    remembered = copy.deepcopy(optimizer._engine.state())
    before = values(model)
    terms = losses(model, 3)
    terms[1] = terms[1] * poison
    optimizer.zero_grad()
    optimizer.backward(terms, scaler=scaler)
    scaler.step(optimizer)
    scaler.update()
    assert same(before, model.parameters())
    assert scaler.get_scale() == 2.0**11
    after = optimizer._engine.state()
    assert after.keys() == remembered.keys()
    assert len(after) > 1
    for entry, value in remembered.items():
        # A number that was drawn stays drawn; how long weights have served is a count of steps.
        if not entry.endswith(("draws", "age")):
            assert torch.equal(torch.as_tensor(after[entry]), torch.as_tensor(value)), entry
    optimizer.zero_grad()
    optimizer.backward(losses(model, 3), scaler=scaler)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_weightings_of_losses_do_not_see_an_overflow_of_gradients_alone():
    """A known limit, as the integration page says: the step is skipped, but the weights move on."""
    model, optimizer = make("sgd", UW())
    scaler = _scaler()
    train(model, optimizer, range(2))
    before, remembered = values(model), optimizer.method.state()["value"].clone()
    model.trunk.weight.register_hook(lambda gradient: gradient * math.inf)
    optimizer.zero_grad()
    optimizer.backward(losses(model, 2), scaler=scaler)
    scaler.step(optimizer)
    assert same(before, model.parameters())
    assert not torch.equal(optimizer.method.state()["value"], remembered)
    assert optimizer.method.state()["value"].isfinite().all()


# -- 16 bits ---------------------------------------------------------------------------------------


def _train_under_autocast(
    dtype: torch.dtype, init_scale: float, steps: int = 40
) -> tuple[FourTasks, GradientSurgery, torch.amp.GradScaler, int]:
    model = FourTasks().float()
    base = torch.optim.SGD(model.parameters(), lr=0.02)
    optimizer = GradientSurgery(base, GradVac(beta=0.1))
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, enabled=dtype == torch.float16)
    skipped = 0
    for batch in range(steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            terms = _float_losses(model, batch % 4)
        optimizer.backward(terms, scaler=scaler)
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        before = values(model)
        scaler.step(optimizer)
        scaler.update()
        skipped += same(before, model.parameters())
    return model, optimizer, scaler, skipped


def _float_losses(model: FourTasks, batch: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn(8, 5, generator=generator)
    targets = torch.randn(4, 8, generator=generator)
    return [
        (output.float() - target).square().mean()
        for output, target in zip(model(x), targets, strict=True)
    ]


def _distance(one: nn.Module, other: nn.Module, start: nn.Module) -> float:
    """Distance between two trained models, relative to how far training went."""
    gap = torch.cat([(a - b).flatten() for a, b in zip(values(one), values(other), strict=True)])
    way = torch.cat([(a - b).flatten() for a, b in zip(values(other), values(start), strict=True)])
    return float(gap.norm() / way.norm())


def test_training_in_bfloat16_autocast_follows_full_precision():
    exact, *_ = _train_under_autocast(torch.float32, 1.0)
    model, *_ = _train_under_autocast(torch.bfloat16, 1.0)
    assert 0 < _distance(model, exact, FourTasks().float()) < 0.03


def test_training_in_float16_autocast_finds_a_scale_and_follows_full_precision():
    # 2**40 is far too much for float16 gradients: steps are skipped until the scale fits.
    model, optimizer, scaler, skipped = _train_under_autocast(torch.float16, 2.0**40, steps=80)
    assert skipped > 10
    assert scaler.get_scale() == 2.0 ** (40 - skipped)
    assert all(value.isfinite().all() for value in optimizer._engine.state().values())
    _, reference, *_ = _train_under_autocast(torch.float32, 1.0, steps=80 - skipped)
    twin = FourTasks().float()
    # The batches of the skipped steps were lost, so compare one more gradient at the same place.
    twin.load_state_dict(model.state_dict())
    method = lambda gramian: torch.ones_like(gramian.diagonal())  # noqa: E731
    plain = agsurgery.backward(_float_losses(twin, 0), twin.parameters(), method)
    with torch.autocast("cpu", torch.float16):
        terms = _float_losses(model, 0)
    optimizer.zero_grad()
    report = optimizer.backward(terms, scaler=scaler)
    error = (report.gramian - plain.gramian).abs() / plain.norms.outer(plain.norms)
    assert error.max() < 0.01
    total = float(report.losses.sum())
    assert float(reference.report.losses.sum()) == pytest.approx(total, rel=0.2)


@pytest.mark.parametrize("engine", ["grad", "accumulate"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_what_separate_backward_passes_under_autocast_give(dtype, engine):
    model, twin = FourTasks().float(), FourTasks().float()
    with torch.autocast("cpu", dtype):
        terms = _float_losses(model, 0)
    report = agsurgery.backward(terms, model.parameters(), "pcgrad", engine=engine)
    rows = []
    for task in range(4):
        with torch.autocast("cpu", dtype):
            loss = _float_losses(twin, 0)[task]
        gradients = torch.autograd.grad(loss, list(twin.trunk.parameters()))
        rows.append(torch.cat([g.flatten() for g in gradients]).double())
    stacked = torch.stack(rows)
    torch.testing.assert_close(report.gramian, stacked @ stacked.T, rtol=1e-5, atol=1e-6)
    expected = (report.weights @ stacked).float()
    got = torch.cat([p.grad.flatten() for p in model.trunk.parameters()])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("base", ["sgd", "adamw", "adamw_fused"])
def test_a_model_of_bfloat16_parameters_steps_as_its_base_does_on_the_same_gradients(base):
    model, optimizer = make(base, PCGrad(seed=0))
    twin, reference = make(base, PCGrad(seed=0))
    model.bfloat16()
    twin.bfloat16()
    for batch in range(5):
        terms = [loss.float() for loss in _bfloat16_losses(model, batch)]
        optimizer.zero_grad()
        optimizer.backward(terms)
        for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
            assert parameter.grad.dtype == torch.bfloat16
            other.grad = parameter.grad.clone()
        optimizer.step()
        reference.base_optimizer.step()
    assert same(model.parameters(), twin.parameters())
    end = torch.stack(_bfloat16_losses(model, 0)).sum()
    assert end < torch.stack(_bfloat16_losses(FourTasks().bfloat16(), 0)).sum()


def _bfloat16_losses(model: FourTasks, batch: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(batch % 2)
    x = torch.randn(8, 5, generator=generator).bfloat16()
    targets = torch.randn(4, 8, generator=generator)
    return [
        (output.float() - target).square().mean()
        for output, target in zip(model(x), targets, strict=True)
    ]


@pytest.mark.parametrize("given", [True, False])
def test_the_function_takes_a_scaler_as_the_wrapper_does(given):
    scaler = _scaler()
    model, optimizer = make("sgd", "pcgrad")
    wrapped = optimizer.backward(losses(model), scaler=scaler)
    expected = [p.grad.clone() for p in model.parameters()]
    optimizer.zero_grad()
    params = list(model.parameters()) if given else None
    report = agsurgery.backward(losses(model), params, "pcgrad", scaler=scaler)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), expected, strict=True))
    torch.testing.assert_close(report.gramian, wrapped.gramian)
    # Not so without it: the scale is in the gradients, and not in the report.
    optimizer.zero_grad()
    plain = agsurgery.backward(losses(model), params, "pcgrad")
    torch.testing.assert_close(report.gramian, plain.gramian)
    scale = scaler.get_scale()
    for p, g in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(scale * p.grad, g)


def test_a_disabled_scaler_changes_nothing():
    model, optimizer = make("sgd")
    twin, reference = make("sgd")
    optimizer.backward(losses(model), scaler=_scaler(enabled=False))
    reference.backward(losses(twin))
    assert same([p.grad for p in model.parameters()], [p.grad for p in twin.parameters()])
