"""Schedulers drive the wrapper as they drive its base, and every hook fires exactly once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler as schedulers
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from tests._optimizer_cases import (
    BASES,
    FourTasks,
    every_base,
    make,
    same,
    step_with_given_gradients,
    train,
    values,
)

# -- learning rate schedulers ----------------------------------------------------------------------

SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "StepLR": lambda o: schedulers.StepLR(o, step_size=2, gamma=0.5),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, max_lr=0.1, total_steps=10),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, T_max=5),
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda epoch: 0.9**epoch),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=1),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.ConstantLR(o, 0.1, 2), schedulers.ExponentialLR(o, 0.7)], milestones=[3]
    ),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=0.2, anneal_epochs=3),
}


def _rates(optimizer: torch.optim.Optimizer, scheduler: Any, steps: int = 6) -> list[list[Any]]:
    """Learning rate and momenta before each of some steps."""
    seen = []
    for _ in range(steps):
        optimizer.step()
        group = optimizer.param_groups[0]
        seen.append([group["lr"], group.get("momentum"), group.get("betas")])
        plateau = isinstance(scheduler, schedulers.ReduceLROnPlateau)
        scheduler.step(*([1.0] if plateau else []))
    return seen


@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize("where", ["wrapper", "base"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_drives_the_learning_rate_without_a_warning(name, where, base):
    bare = BASES[base](FourTasks().parameters())
    expected = _rates(bare, SCHEDULERS[name](bare))
    _, optimizer = make(base)
    target = optimizer if where == "wrapper" else optimizer.base_optimizer
    assert _rates(optimizer, SCHEDULERS[name](target)) == expected
    assert len({rate for rate, *_ in expected}) > 1


def test_a_scheduler_patches_step_once_and_the_patched_step_still_steps():
    model, optimizer = make("sgd")
    schedulers.StepLR(optimizer, 1)
    patched = optimizer.step
    schedulers.StepLR(optimizer, 1)
    assert optimizer.step is patched
    before = values(model)
    train(model, optimizer, range(1))
    assert optimizer._opt_called
    assert not same(before, model.parameters())


def test_a_scheduler_stepped_before_the_wrapper_warns_as_it_does_for_any_optimizer():
    _, optimizer = make("sgd")
    scheduler = schedulers.StepLR(optimizer, 1)
    with pytest.warns(UserWarning, match=r"before `optimizer.step\(\)`"):
        scheduler.step()


def test_an_averaged_model_follows_training_with_surgery():
    model, optimizer = make("sgd")
    averaged = torch.optim.swa_utils.AveragedModel(model)
    seen = []
    for batch in range(3):
        train(model, optimizer, [batch])
        averaged.update_parameters(model)
        seen.append(values(model))
    for mean, *steps in zip(averaged.module.parameters(), *seen, strict=True):
        torch.testing.assert_close(mean.detach(), torch.stack(steps).mean(0))


# -- hooks -----------------------------------------------------------------------------------------


@every_base
@pytest.mark.parametrize("scheduled", [False, True])
def test_step_hooks_fire_once_around_the_step_and_receive_the_wrapper(base, scheduled):
    model, optimizer = make(base)
    if scheduled:
        schedulers.StepLR(optimizer, 1)
        schedulers.StepLR(optimizer.base_optimizer, 1)
    before, calls = values(model), []

    def record(name: str) -> Callable[..., None]:
        return lambda *args: calls.append((name, args, same(before, model.parameters())))

    optimizer.register_step_pre_hook(record("pre"))
    optimizer.register_step_post_hook(record("post"))
    step_with_given_gradients(model, optimizer, seed=0)
    assert calls == [
        ("pre", (optimizer, (optimizer,), {}), True),
        ("post", (optimizer, (optimizer,), {}), False),
    ]


def test_a_removed_step_hook_no_longer_fires():
    _, optimizer = make("sgd")
    calls = []
    handle = optimizer.register_step_post_hook(lambda *args: calls.append(args))
    handle.remove()
    optimizer.step()
    assert calls == []


@pytest.mark.parametrize("keyword", [False, True])
def test_a_step_pre_hook_can_change_the_arguments(keyword):
    _, optimizer = make("sgd")
    seen = []

    def give_another_closure(_optimizer: Any, args: Any, _kwargs: Any) -> Any:
        other = _seven
        return (args[:1], {"closure": other}) if keyword else ((args[0], other), {})

    optimizer.register_step_pre_hook(give_another_closure)
    optimizer.register_step_post_hook(lambda *call: seen.append(call))
    assert optimizer.step(lambda: 3.0) == 7.0
    expected = ((optimizer,), {"closure": _seven}) if keyword else ((optimizer, _seven), {})
    assert seen == [(optimizer, *expected)]


def _seven() -> float:
    return 7.0


@every_base
@pytest.mark.parametrize("scheduled", [False, True])
def test_global_step_hooks_fire_exactly_once(base, scheduled):
    _, optimizer = make(base)
    if scheduled:
        schedulers.StepLR(optimizer, 1)
    optimizer._patch_step_function()  # as `Optimizer.__setstate__` of a subclass or a proxy does
    copy.deepcopy(optimizer)
    calls = []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: calls.append("pre")),
        register_optimizer_step_post_hook(lambda *_: calls.append("post")),
    ]
    try:
        optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    assert calls == ["pre", "post"]


def test_hooks_registered_on_the_base_fire_once_and_receive_the_base():
    _, optimizer = make("sgd")
    calls = []
    optimizer.base_optimizer.register_step_pre_hook(lambda o, *_: calls.append(o))
    optimizer.base_optimizer.register_step_post_hook(lambda o, *_: calls.append(o))
    optimizer.step()
    assert calls == [optimizer.base_optimizer] * 2


def test_state_dict_hooks_fire_once_in_order_and_can_replace_the_result():
    _, optimizer = make("sgd")
    calls = []
    optimizer.register_state_dict_pre_hook(lambda o: calls.append(("pre", o)))
    optimizer.register_state_dict_post_hook(lambda o, d: calls.append(("second", o)))
    optimizer.register_state_dict_post_hook(lambda o, d: {**d, "note": 1}, prepend=True)
    assert optimizer.state_dict()["note"] == 1
    assert calls == [("pre", optimizer), ("second", optimizer)]


def test_load_state_dict_hooks_fire_once_in_order_and_can_replace_what_is_loaded():
    _, optimizer = make("sgd")
    saved = optimizer.state_dict()
    calls = []

    def change(_optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        groups = [{**group, "lr": 9.0} for group in state_dict["param_groups"]]
        state_dict["note"] = 1  # a shallow copy: the caller's dict must not see this
        return {**state_dict, "param_groups": groups}

    optimizer.register_load_state_dict_pre_hook(lambda o, d: calls.append(("pre", o, "note" in d)))
    optimizer.register_load_state_dict_pre_hook(change, prepend=True)
    optimizer.register_load_state_dict_post_hook(
        lambda o: calls.append(("post", o, o.param_groups[0]["lr"]))
    )
    optimizer.load_state_dict(saved)
    assert calls == [("pre", optimizer, True), ("post", optimizer, 9.0)]
    assert "note" not in saved
