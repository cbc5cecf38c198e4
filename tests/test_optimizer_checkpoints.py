"""Saving, loading and copying: training goes on as if nothing had happened, with or without surgery."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import lr_scheduler as schedulers

from agsurgery import (
    AGS,
    DWA,
    FAMO,
    UW,
    CAGrad,
    GradientSurgery,
    GradVac,
    NormRestored,
    PCGrad,
    Smoothed,
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

every_random_method = pytest.mark.parametrize("method", [PCGrad, AGS])


def _through_a_file(content: Any) -> Any:
    """What `torch.save` wrote and the restricted `torch.load` reads."""
    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def _resumed(model: nn.Module, seed: int = 1) -> FourTasks:
    """Another model, with other initial values, that then loads those of `model`."""
    other = FourTasks(seed)
    other.load_state_dict(_through_a_file(model.state_dict()))
    return other


def test_the_random_order_of_four_tasks_matters_here():
    # Otherwise the tests below could not see a random state that got lost.
    after = []
    for method in (PCGrad(seed=0), PCGrad(seed=1)):
        model, optimizer = make("sgd", method)
        train(model, optimizer, range(3))
        after.append(values(model))
    assert not same(*after)


# -- save and load ---------------------------------------------------------------------------------


@every_base
@every_random_method
def test_training_resumed_from_a_file_makes_identical_steps(base, method):
    model, optimizer = make(base, method(seed=5))
    train(model, optimizer, range(3))
    saved = _through_a_file(optimizer.state_dict())
    other = _resumed(model)
    resumed = GradientSurgery(BASES[base](other.parameters()), method(seed=6))
    resumed.load_state_dict(saved)
    train(model, optimizer, range(3, 6))
    train(other, resumed, range(3, 6))
    assert same(model.parameters(), other.parameters())
    assert optimizer.method.state()["draws"] == resumed.method.state()["draws"] == 6
    assert resumed.method.state()["seed"] == 5


@every_random_method
def test_a_file_loaded_into_the_base_brings_the_random_order_along(method):
    model, optimizer = make("adamw", method(seed=5))
    train(model, optimizer, range(3))
    saved = _through_a_file(optimizer.state_dict())
    other = _resumed(model)
    resumed = GradientSurgery(BASES["adamw"](other.parameters()), method(seed=6))
    resumed.base_optimizer.load_state_dict(saved)
    train(model, optimizer, range(3, 6))
    train(other, resumed, range(3, 6))
    assert same(model.parameters(), other.parameters())


def test_a_base_that_loaded_a_file_before_it_was_wrapped_brings_the_random_order_along():
    model, optimizer = make("adamw", PCGrad(seed=5))
    train(model, optimizer, range(3))
    saved = _through_a_file(optimizer.state_dict())
    other = _resumed(model)
    base = BASES["adamw"](other.parameters())
    base.load_state_dict(saved)
    resumed = GradientSurgery(base, PCGrad(seed=6))
    train(model, optimizer, range(3, 6))
    train(other, resumed, range(3, 6))
    assert same(model.parameters(), other.parameters())


def test_loading_an_earlier_state_repeats_the_steps_that_followed_it():
    model, optimizer = make("sgd", PCGrad(seed=5))
    train(model, optimizer, range(2))
    weights = copy.deepcopy(model.state_dict())
    saved = copy.deepcopy(optimizer.state_dict())
    outcomes = []
    for _ in range(3):
        model.load_state_dict(weights)
        optimizer.load_state_dict(copy.deepcopy(saved))
        train(model, optimizer, range(2, 5))
        outcomes.append(values(model))
    assert same(outcomes[0], outcomes[1])
    assert same(outcomes[0], outcomes[2])


def test_training_goes_on_without_changing_a_loaded_state():
    model, optimizer = make("sgd", PCGrad(seed=5))
    saved = _through_a_file(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    train(model, optimizer, range(2))
    assert saved["param_groups"][0]["agsurgery_draws"] == 0
    assert optimizer.state_dict()["param_groups"][0]["agsurgery_draws"] == 2


@every_base
def test_a_bare_checkpoint_loads_into_the_wrapper_and_both_go_on_identically(base):
    model = FourTasks()
    bare = BASES[base](model.parameters())
    for seed in range(3):
        step_with_given_gradients(model, bare, seed)
    other = _resumed(model)
    wrapper = GradientSurgery(BASES[base](other.parameters()), PCGrad(seed=5))
    wrapper.load_state_dict(_through_a_file(bare.state_dict()))
    for seed in range(3, 6):
        step_with_given_gradients(model, bare, seed)
        step_with_given_gradients(other, wrapper, seed)
    assert same(model.parameters(), other.parameters())
    train(other, wrapper, range(2))  # and surgery works from here on
    assert wrapper.state_dict()["param_groups"][0]["agsurgery_draws"] == 2


@every_base
def test_a_checkpoint_of_the_wrapper_loads_into_the_bare_optimizer_and_both_go_on_identically(base):
    model, wrapper = make(base, AGS(seed=5))
    train(model, wrapper, range(3))
    other = _resumed(model)
    bare = BASES[base](other.parameters())
    bare.load_state_dict(_through_a_file(wrapper.state_dict()))
    for seed in range(3):
        step_with_given_gradients(model, wrapper, seed)
        step_with_given_gradients(other, bare, seed)
    assert same(model.parameters(), other.parameters())


@pytest.mark.parametrize("loaded", [AGS, PCGrad, CAGrad])
@pytest.mark.parametrize("saved", [AGS, PCGrad, CAGrad])
def test_a_checkpoint_loads_whatever_the_method_was(saved, loaded):
    model, optimizer = make("adamw", saved())
    train(model, optimizer, range(2))
    other = _resumed(model)
    resumed = GradientSurgery(BASES["adamw"](other.parameters()), loaded())
    resumed.load_state_dict(_through_a_file(optimizer.state_dict()))
    train(other, resumed, range(2, 4))
    assert resumed.state[other.trunk.weight]["step"] == 4


@pytest.mark.parametrize("where", ["wrapper", "base"])
def test_an_edit_of_the_learning_rate_still_counts_after_loading(where):
    model, optimizer = make("sgd")
    scheduler = schedulers.StepLR(optimizer, step_size=1, gamma=0.0)
    target = optimizer if where == "wrapper" else optimizer.base_optimizer
    target.load_state_dict(_through_a_file(optimizer.state_dict()))
    train(model, optimizer, [0])
    scheduler.step()  # to zero
    before = values(model)
    train(model, optimizer, [1])
    assert same(before, model.parameters())
    optimizer.param_groups[0]["lr"] = 1.0
    train(model, optimizer, [2])
    assert not same(before, model.parameters())


# -- distributed checkpoint ------------------------------------------------------------------------


@every_base
@pytest.mark.parametrize("flat", [False, True])
def test_a_distributed_checkpoint_restores_a_fresh_wrapper(base, flat):
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, optimizer = make(base, PCGrad(seed=5))
    train(model, optimizer, range(3))
    saved = _through_a_file(get_optimizer_state_dict(model, optimizer, options=options))
    other = _resumed(model)
    fresh = GradientSurgery(BASES[base](other.parameters()), PCGrad(seed=6))
    before = values(other)
    set_optimizer_state_dict(other, fresh, saved, options=options)
    assert same(before, other.parameters())
    train(model, optimizer, range(3, 6))
    train(other, fresh, range(3, 6))
    assert same(model.parameters(), other.parameters())


@every_base
def test_a_distributed_checkpoint_can_be_taken_before_any_surgery(base):
    model, optimizer = make(base, PCGrad(seed=5))
    saved = _through_a_file(get_optimizer_state_dict(model, optimizer))
    other = _resumed(model)
    fresh = GradientSurgery(BASES[base](other.parameters()), PCGrad(seed=6))
    set_optimizer_state_dict(other, fresh, saved)
    train(model, optimizer, range(3))
    train(other, fresh, range(3))
    assert same(model.parameters(), other.parameters())


@pytest.mark.parametrize("wrapped", [(False, True), (True, False)])
def test_a_distributed_checkpoint_is_interchangeable_with_that_of_the_bare_optimizer(wrapped):
    models = [FourTasks(0), FourTasks(1)]
    optimizers = [
        GradientSurgery(base) if wrap else base
        for base, wrap in zip(
            (BASES["adamw"](model.parameters()) for model in models), wrapped, strict=True
        )
    ]
    for seed in range(2):
        step_with_given_gradients(models[0], optimizers[0], seed)
    saved = _through_a_file(get_optimizer_state_dict(models[0], optimizers[0]))
    models[1].load_state_dict(models[0].state_dict())
    set_optimizer_state_dict(models[1], optimizers[1], saved)
    for seed in range(2, 4):
        for model, optimizer in zip(models, optimizers, strict=True):
            step_with_given_gradients(model, optimizer, seed)
    assert same(models[0].parameters(), models[1].parameters())


REMEMBERING: dict[str, Callable[[], dict[str, Any]]] = {
    "GradVac": lambda: {"method": GradVac(beta=0.5)},
    "UW": lambda: {"method": UW()},
    "DWA": lambda: {"method": DWA()},
    "FAMO": lambda: {"method": FAMO()},
    "Smoothed": lambda: {"method": Smoothed(CAGrad())},
    "NormRestored": lambda: {"method": NormRestored(GradVac(beta=0.5))},
    "every": lambda: {"method": AGS(), "every": 4},
    "blocks": lambda: {"method": GradVac(beta=0.5), "granularity": "parameter"},
}
"""What a wrapper remembers by the names of the tasks."""


@pytest.mark.parametrize("wrapper", REMEMBERING.values(), ids=REMEMBERING)
@pytest.mark.parametrize("flat", [False, True])
def test_a_distributed_checkpoint_on_disk_restores_a_wrapper_that_knows_its_tasks(
    wrapper, flat, tmp_path
):
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model = FourTasks()
    optimizer = GradientSurgery(BASES["adamw"](model.parameters()), **wrapper())
    train(model, optimizer, range(3))
    # One process saves and loads without a process group, and torch says so.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checkpoint.save(
            get_optimizer_state_dict(model, optimizer, options=options), checkpoint_id=tmp_path
        )
        other = _resumed(model)
        tasks = optimizer.report.tasks
        fresh = GradientSurgery(BASES["adamw"](other.parameters()), tasks=tasks, **wrapper())
        content = get_optimizer_state_dict(other, fresh, options=options)
        checkpoint.load(content, checkpoint_id=tmp_path)
    set_optimizer_state_dict(other, fresh, content, options=options)
    train(model, optimizer, range(3, 7))
    train(other, fresh, range(3, 7))
    assert same(model.parameters(), other.parameters())


def test_naming_the_tasks_changes_no_step():
    for wrapper in REMEMBERING.values():
        models = [FourTasks(0), FourTasks(0)]
        names = None
        for model in models:
            tasks = {} if names is None else {"tasks": names}
            optimizer = GradientSurgery(BASES["sgd"](model.parameters()), **wrapper(), **tasks)
            train(model, optimizer, range(5))
            names = optimizer.report.tasks
        assert same(models[0].parameters(), models[1].parameters())


@pytest.mark.parametrize(
    ("tasks", "error"), [("depth", TypeError), ([1, 2], TypeError), (["a", "a"], ValueError)]
)
def test_names_of_tasks_that_are_none_are_refused(tasks, error):
    with pytest.raises(error, match="names"):
        make("sgd", AGS(), tasks=tasks)


# -- copies ----------------------------------------------------------------------------------------


def _pickled(content: Any) -> Any:
    return pickle.loads(pickle.dumps(content))


def _saved_whole(content: Any) -> Any:
    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": _pickled,
    "torch.save": _saved_whole,
}
every_copy = pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


@every_copy
@every_base
@pytest.mark.parametrize("scheduled", ["nothing", "wrapper", "base", "both"])
def test_a_copy_steps_its_own_parameters_and_not_those_of_the_original(duplicate, base, scheduled):
    model, optimizer = make(base)
    train(model, optimizer, range(2))
    if scheduled in ("wrapper", "both"):
        schedulers.StepLR(optimizer, 1)
    if scheduled in ("base", "both"):
        schedulers.StepLR(optimizer.base_optimizer, 1)
    clone = duplicate(optimizer)
    assert isinstance(clone, GradientSurgery)
    assert type(clone.base_optimizer) is type(optimizer.base_optimizer)
    assert same(_parameters(clone), _parameters(optimizer))
    before = values(model)
    for parameter in _parameters(clone):
        parameter.grad = torch.ones_like(parameter)
    clone.step()
    assert same(before, model.parameters())
    assert not any(torch.equal(a, b) for a, b in zip(before, _parameters(clone), strict=True))


@every_copy
@every_base
def test_a_model_copied_with_its_optimizer_trains_on_identically_and_independently(duplicate, base):
    model, optimizer = make(base, PCGrad(seed=5))
    train(model, optimizer, range(3))
    twin, clone = duplicate((model, optimizer))
    assert all(a is b for a, b in zip(twin.parameters(), _parameters(clone), strict=True))
    train(twin, clone, range(3, 6))
    after = values(twin)
    assert optimizer.method.state()["draws"] == 3
    train(model, optimizer, range(3, 6))
    assert same(after, model.parameters())
    assert same(after, twin.parameters())


@every_copy
def test_a_copy_knows_a_random_state_that_only_the_base_has_loaded(duplicate):
    model, optimizer = make("sgd", PCGrad(seed=5))
    train(model, optimizer, range(3))
    other, resumed = make("sgd", PCGrad(seed=6))
    resumed.base_optimizer.load_state_dict(_through_a_file(optimizer.state_dict()))
    _, clone = duplicate((other, resumed))
    state = clone.state_dict()["param_groups"][0]
    assert (state["agsurgery_seed"], state["agsurgery_draws"]) == (5, 3)
    assert clone.method.state()["seed"] == 5


@every_copy
def test_named_shared_parameters_are_those_of_the_copied_model(duplicate):
    model = FourTasks()
    optimizer = GradientSurgery(BASES["sgd"](model.parameters()), shared=[model.trunk.bias])
    twin, clone = duplicate((model, optimizer))
    train(model, optimizer, range(2))
    train(twin, clone, range(2))
    assert clone.report.gramian.diagonal().min() > 0
    assert same(model.parameters(), twin.parameters())


def test_a_copy_carries_no_hooks_as_in_torch_and_takes_new_ones():
    _, optimizer = make("sgd")
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append("original"))
    clone = copy.deepcopy(optimizer)
    clone.register_step_post_hook(lambda *_: calls.append("copy"))
    clone.step()
    assert calls == ["copy"]
    optimizer.step()
    assert calls == ["copy", "original"]


def test_a_scheduler_can_be_attached_to_a_copy():
    model, optimizer = make("sgd")
    schedulers.StepLR(optimizer, 1, gamma=0.5)
    twin, clone = copy.deepcopy((model, optimizer))
    scheduler = schedulers.StepLR(clone, 1, gamma=0.5)
    train(twin, clone, [0])
    scheduler.step()
    assert clone.param_groups[0]["lr"] == 0.025
    assert optimizer.param_groups[0]["lr"] == 0.05
