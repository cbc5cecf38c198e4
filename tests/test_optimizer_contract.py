"""`GradientSurgery` is its base optimizer in every respect, can be found inside other wrappers, and refuses misuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from agsurgery import AGS, GradientSurgery, PCGrad, unwrap
from tests._optimizer_cases import (
    BASES,
    FourTasks,
    every_base,
    losses,
    make,
    same,
    train,
    values,
)

VARIANTS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    **BASES,
    "adamw_foreach": lambda params: torch.optim.AdamW(params, lr=0.01, foreach=True),
    "adamw_single_tensor": lambda params: torch.optim.AdamW(params, lr=0.01, foreach=False),
    "adamw_not_capturable": lambda params: torch.optim.AdamW(params, lr=0.01, capturable=False),
    "adamw_amsgrad": lambda params: torch.optim.AdamW(params, lr=0.01, amsgrad=True),
    "sgd_foreach": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, foreach=True),
    "sgd_fused": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, fused=True),
    "adagrad_fused": lambda params: torch.optim.Adagrad(params, lr=0.05, fused=True),
    "rmsprop_foreach": lambda params: torch.optim.RMSprop(params, lr=0.01, foreach=True),
}


# -- the same object in all but name ---------------------------------------------------------------


@every_base
def test_the_wrapper_is_a_torch_optimizer_with_the_groups_state_and_defaults_of_its_base(base):
    model, optimizer = make(base)
    train(model, optimizer, range(2))
    inner = optimizer.base_optimizer
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups is inner.param_groups
    assert optimizer.state is inner.state
    assert optimizer.defaults is inner.defaults


def test_groups_state_and_defaults_set_on_the_wrapper_arrive_in_the_base():
    _, optimizer = make("sgd")
    groups, state, defaults = list(optimizer.param_groups), {}, {"lr": 1.0}
    optimizer.param_groups, optimizer.state, optimizer.defaults = groups, state, defaults
    inner = optimizer.base_optimizer
    assert inner.param_groups is groups
    assert inner.state is state
    assert inner.defaults is defaults


def test_the_state_of_a_parameter_is_visible_on_the_wrapper():
    model, optimizer = make("adamw")
    train(model, optimizer, range(3))
    state = optimizer.state[model.trunk.weight]
    assert state["step"] == 3
    assert state["exp_avg"].shape == model.trunk.weight.shape


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_equals_that_of_the_bare_optimizer_given_the_same_gradients(variant):
    model, optimizer = make(VARIANTS[variant])
    twin = FourTasks()
    bare = VARIANTS[variant](twin.parameters())
    start = values(model)
    for batch in range(4):
        optimizer.zero_grad()
        optimizer.backward(losses(model, batch))
        for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
            other.grad = parameter.grad.clone()
        optimizer.step()
        bare.step()
    assert same(model.parameters(), twin.parameters())
    assert not any(torch.equal(a, b) for a, b in zip(start, values(model), strict=True))


def test_each_parameter_group_keeps_its_own_learning_rate():
    model = FourTasks()
    groups = [{"params": model.trunk.parameters(), "lr": 0.5}, {"params": model.heads.parameters()}]
    optimizer = GradientSurgery(torch.optim.SGD(groups, lr=0.25))
    before = values(model)
    optimizer.backward(losses(model))
    optimizer.step()
    rates = [0.5 if name.startswith("trunk") else 0.25 for name, _ in model.named_parameters()]
    for rate, old, parameter in zip(rates, before, model.parameters(), strict=True):
        torch.testing.assert_close(old - parameter.detach(), rate * parameter.grad)


def test_repr_names_the_method_and_the_base():
    _, optimizer = make("adamw", AGS(max_scale=3.0))
    text = repr(optimizer)
    assert text.startswith("GradientSurgery(AGS(")
    assert "max_scale=3.0" in text
    assert "AdamW" in text


# -- the other methods of an optimizer -------------------------------------------------------------


def _adagrad_takes_an_added_group() -> bool:
    first, second = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    bare = torch.optim.Adagrad([first])
    bare.add_param_group({"params": [second]})
    second.grad = torch.ones(1)
    try:
        bare.step()
    except KeyError:
        return False
    return True


@every_base
def test_an_added_group_reaches_the_base_and_takes_part_in_the_surgery(base):
    model = FourTasks()
    if base == "adagrad" and not _adagrad_takes_an_added_group():
        pytest.skip("in this version of torch Adagrad itself fails at a group that was added")
    optimizer = GradientSurgery(BASES[base](model.heads.parameters()), "ags")
    optimizer.add_param_group({"params": list(model.trunk.parameters()), "lr": 0.125})
    assert optimizer.base_optimizer.param_groups[1]["lr"] == 0.125
    before = values(model)
    report = optimizer.backward(losses(model))
    optimizer.step()
    assert report.gramian.diagonal().min() > 0  # the trunk is what the tasks share
    assert not any(torch.equal(a, b) for a, b in zip(before, values(model), strict=True))


@every_base
def test_zero_grad_sets_gradients_to_none_by_default_and_to_zero_on_request(base):
    model, optimizer = make(base)
    optimizer.backward(losses(model))
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    optimizer.backward(losses(model))
    optimizer.zero_grad(False)  # positional, as in torch
    assert all(p.grad is not None for p in model.parameters())


@every_base
def test_step_with_a_closure_returns_its_loss_and_makes_one_step(base):
    model, optimizer = make(base)
    twin, reference = make(base)

    def closure() -> float:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        return float(optimizer.backward(losses(model)).losses.sum())

    expected = torch.stack(losses(model)).sum().item()
    assert optimizer.step(closure) == pytest.approx(expected, rel=1e-12)
    assert optimizer.step(closure=closure) < expected
    train(twin, reference, [0, 0])
    assert same(model.parameters(), twin.parameters())


def test_a_step_without_a_closure_returns_none():
    _, optimizer = make("sgd")
    assert optimizer.step() is None
    assert optimizer.step(None) is None


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_lbfgs_minimises_with_closures_that_call_backward(line_search):
    model, optimizer = make(
        lambda p: torch.optim.LBFGS(list(p), max_iter=5, line_search_fn=line_search), "sum"
    )
    twin = FourTasks()
    bare = torch.optim.LBFGS(list(twin.parameters()), max_iter=5, line_search_fn=line_search)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        return optimizer.backward(losses(model)).losses.sum()

    def bare_closure() -> torch.Tensor:
        bare.zero_grad()
        loss = torch.stack(losses(twin)).sum()
        loss.backward()
        return loss

    for _ in range(3):
        found, expected = optimizer.step(closure), bare.step(bare_closure)
        torch.testing.assert_close(found, expected.detach())
    assert float(closure()) < float(found)
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


class ScheduleFree(torch.optim.SGD):
    """A base with methods of its own, as schedule-free optimizers have."""

    mode = "train"

    def eval(self) -> str:
        self.mode = "eval"
        return "reached the base"


def test_methods_that_only_the_base_has_are_found_on_the_wrapper():
    _, optimizer = make(lambda p: ScheduleFree(p, lr=0.1))
    assert optimizer.eval() == "reached the base"
    assert optimizer.mode == "eval"
    assert optimizer.base_optimizer.mode == "eval"


@pytest.mark.parametrize("name", ["train", "no_such_thing", "__no_such_dunder__"])
def test_a_name_that_neither_has_is_an_attribute_error(name):
    _, optimizer = make("sgd")
    assert not hasattr(optimizer, name)
    with pytest.raises(AttributeError, match=name):
        getattr(optimizer, name)


def test_an_unfinished_wrapper_raises_attribute_errors_instead_of_recursing():
    blank = GradientSurgery.__new__(GradientSurgery)
    for name in ("base_optimizer", "param_groups", "anything"):
        with pytest.raises(AttributeError, match="base_optimizer"):
            getattr(blank, name)


# -- the method and wrappers around the wrapper -----------------------------------------------------


def test_a_name_and_an_instance_name_the_same_method():
    assert isinstance(make("sgd", "PCGrad")[1].method, PCGrad)
    bare = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    assert type(GradientSurgery(bare).method) is AGS
    method = PCGrad()
    assert make("sgd", method)[1].method is method


class Accelerated(torch.optim.Optimizer):
    """Keeps what it wraps under `optimizer`, and forwards nothing else."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer


class Proxy:
    """Becomes an instance of the wrapped class without running its `__init__`."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        name = f"Proxy{type(optimizer).__name__}"
        self.__class__ = type(name, (Proxy, type(optimizer)), {})

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_optimizer"], name)

    def step(self, closure: Any = None) -> Any:
        return self._optimizer.step(closure)


class Lookahead:
    """Keeps what it wraps under `base_optimizer`."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.base_optimizer = optimizer


@pytest.mark.parametrize(
    "layers",
    [(), (Accelerated,), (Proxy,), (Lookahead,), (Proxy, Accelerated), (Accelerated, Lookahead)],
    ids=lambda layers: "-".join(layer.__name__ for layer in layers) or "none",
)
def test_unwrap_finds_the_wrapper_inside_those_of_frameworks(layers):
    _, optimizer = make("sgd")
    wrapped: Any = optimizer
    for layer in layers:
        wrapped = layer(wrapped)
    assert unwrap(wrapped) is optimizer


def test_unwrap_refuses_a_wrapper_that_leads_back_to_itself():
    loop = Lookahead(None)
    loop.base_optimizer = Accelerated(loop)
    with pytest.raises(TypeError, match="Got Lookahead"):
        unwrap(loop)


def test_surgery_through_a_proxy_of_our_class_changes_the_real_wrapper():
    model, optimizer = make("adamw", PCGrad())
    twin, reference = make("adamw", PCGrad())
    proxy = Proxy(optimizer)
    assert isinstance(proxy, GradientSurgery)
    train(model, proxy, range(3))
    train(twin, reference, range(3))
    assert same(model.parameters(), twin.parameters())
    assert proxy.report is optimizer.report is not None
    assert optimizer.method.state()["draws"] == 3
    assert set(vars(proxy)) == {"_optimizer"}
