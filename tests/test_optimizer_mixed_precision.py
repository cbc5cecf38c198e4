"""`GradScaler` on the wrapper: the scale drops out exactly, and an infinity in one task skips the step."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests._optimizer_cases import every_base, losses, make, same, train, values


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


def test_a_disabled_scaler_changes_nothing():
    model, optimizer = make("sgd")
    twin, reference = make("sgd")
    optimizer.backward(losses(model), scaler=_scaler(enabled=False))
    reference.backward(losses(twin))
    assert same([p.grad for p in model.parameters()], [p.grad for p in twin.parameters()])


@pytest.mark.parametrize("scaler", [None, _scaler()], ids=["plain", "scaler"])
def test_a_model_frozen_as_a_whole_is_refused_with_an_explanation(scaler):
    model, optimizer = make("sgd")
    model.requires_grad_(False)
    x = torch.ones(2, 5, dtype=torch.float64, requires_grad=True)
    with pytest.raises(ValueError, match="must reach at least one of the parameters"):
        optimizer.backward([output.sum() for output in model(x)], scaler=scaler)
