"""The promises of a torch optimizer, each as a check on what a wrapper makes of an AdamW."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import lr_scheduler as schedulers
from torch.optim.optimizer import register_optimizer_step_post_hook

from benchmarks._contract_subjects import Wrap


@dataclass
class Trial:
    """A model, its AdamW, and what is wrapped around that."""

    model: nn.Module
    base: torch.optim.Optimizer
    optimizer: Any

    @classmethod
    def of(cls, wrap: Wrap, *, fused: bool = False, seed: int = 0) -> Trial:
        """A fresh one; models of different seeds start from different values."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        base = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
        return cls(model, base, wrap(base))

    def give(self, seed: int, factor: float = 1.0) -> None:
        """Random gradients, times a factor."""
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.model.parameters():
            drawn = torch.randn(parameter.shape, generator=generator, device="cpu")
            parameter.grad = factor * drawn.to(parameter.device)

    def steps(self, *seeds: int) -> None:
        """Steps on random gradients."""
        for seed in seeds:
            self.give(seed)
            self.optimizer.step()

    def values(self) -> list[Tensor]:
        """Copies of the parameters."""
        return [parameter.detach().clone() for parameter in self.model.parameters()]

    def moves(self, action: Callable[[], Any]) -> bool:
        """Whether an action changes every parameter; an action that changes only some fails."""
        before = self.values()
        action()
        changed = [not torch.equal(a, b) for a, b in zip(before, self.values(), strict=True)]
        assert all(changed) or not any(changed), "only some parameters have moved"
        return all(changed)


def same(one: Trial, other: Trial) -> bool:
    """Whether the parameters are equal to the last bit."""
    return all(torch.equal(a, b) for a, b in zip(one.values(), other.values(), strict=True))


def through_a_file(content: Any) -> Any:
    """What `torch.save` wrote and the restricted `torch.load` reads."""
    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def is_an_optimizer(wrap: Wrap) -> None:
    """It is an instance of `torch.optim.Optimizer`."""
    assert isinstance(Trial.of(wrap).optimizer, torch.optim.Optimizer)


def _rates(wrap: Wrap, make: Callable[[Any], Any]) -> list[float]:
    trial = Trial.of(wrap)
    scheduler = make(trial.optimizer)
    rates = []
    for seed in range(5):
        trial.steps(seed)
        rates.append(trial.base.param_groups[0]["lr"])
        plateau = isinstance(scheduler, schedulers.ReduceLROnPlateau)
        scheduler.step(*([1.0] if plateau else []))
    return rates


def _drives(wrap: Wrap, make: Callable[[Any], Any]) -> None:
    rates = _rates(wrap, make)
    assert len(set(rates)) > 1, "the learning rate stayed"
    assert rates == _rates(lambda base: base, make)


def step_lr(wrap: Wrap) -> None:
    """`StepLR` on it drives the learning rate, without a warning."""
    _drives(wrap, lambda optimizer: schedulers.StepLR(optimizer, 2, gamma=0.5))


def one_cycle_lr(wrap: Wrap) -> None:
    """`OneCycleLR` on it drives the learning rate, without a warning."""
    _drives(wrap, lambda optimizer: schedulers.OneCycleLR(optimizer, 0.5, total_steps=6))


def plateau(wrap: Wrap) -> None:
    """`ReduceLROnPlateau` on it drives the learning rate, without a warning."""
    _drives(wrap, lambda optimizer: schedulers.ReduceLROnPlateau(optimizer, patience=1))


def scheduler_on_the_base(wrap: Wrap) -> None:
    """A scheduler made for the base before still drives its steps, without a warning."""
    trial = Trial.of(wrap)
    scheduler = schedulers.StepLR(trial.base, 1, gamma=0.0)
    assert trial.moves(lambda: trial.steps(0))
    scheduler.step()
    assert not trial.moves(lambda: trial.steps(1)), "the new learning rate had no effect"


def step_hooks(wrap: Wrap) -> None:
    """Step hooks registered on it fire exactly once a step."""
    trial, calls = Trial.of(wrap), []
    trial.optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    trial.optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    trial.steps(0)
    assert calls == ["pre", "post"], f"fired {calls}"


def global_step_hook(wrap: Wrap) -> None:
    """A hook for the steps of all optimizers fires exactly once."""
    trial, calls = Trial.of(wrap), []
    handle = register_optimizer_step_post_hook(lambda *_: calls.append("post"))
    try:
        trial.steps(0)
    finally:
        handle.remove()
    assert calls == ["post"], f"fired {len(calls)} times"


def state_dict_hooks(wrap: Wrap) -> None:
    """Hooks of `state_dict` and `load_state_dict` registered on it fire exactly once."""
    trial, calls = Trial.of(wrap), []
    trial.optimizer.register_state_dict_pre_hook(lambda *_: calls.append("save"))
    trial.optimizer.register_load_state_dict_post_hook(lambda *_: calls.append("load"))
    trial.optimizer.load_state_dict(trial.optimizer.state_dict())
    assert calls == ["save", "load"], f"fired {calls}"


def _goes_on(save: Wrap, load: Wrap) -> None:
    trial, other = Trial.of(save), Trial.of(load, seed=1)
    trial.steps(0, 1)
    saved = through_a_file(trial.optimizer.state_dict())
    other.model.load_state_dict(trial.model.state_dict())
    other.optimizer.load_state_dict(saved)
    trial.steps(2, 3)
    other.steps(2, 3)
    assert same(trial, other), "other steps"


def resumes(wrap: Wrap) -> None:
    """Saved and loaded with `weights_only`, a fresh one makes the same next steps."""
    _goes_on(wrap, wrap)


def _stops(trial: Trial) -> None:
    trial.optimizer.param_groups[0]["lr"] = 0.0
    assert not trial.moves(lambda: trial.steps(1)), "the new learning rate had no effect"


def edit_after_loading(wrap: Wrap) -> None:
    """After `load_state_dict`, an edit of `param_groups` still has its effect."""
    trial = Trial.of(wrap)
    trial.steps(0)
    trial.optimizer.load_state_dict(copy.deepcopy(trial.optimizer.state_dict()))
    _stops(trial)


def edit_after_loading_the_base(wrap: Wrap) -> None:
    """The same after the `load_state_dict` of the base."""
    trial = Trial.of(wrap)
    trial.steps(0)
    trial.base.load_state_dict(copy.deepcopy(trial.base.state_dict()))
    _stops(trial)


def loads_bare(wrap: Wrap) -> None:
    """It loads a checkpoint of the bare optimizer, and goes on as that does."""
    _goes_on(lambda base: base, wrap)


def bare_loads(wrap: Wrap) -> None:
    """The bare optimizer loads a checkpoint of it, and goes on as it does."""
    _goes_on(wrap, lambda base: base)


def state_is_visible(wrap: Wrap) -> None:
    """`optimizer.state[parameter]` is the state of the base."""
    trial = Trial.of(wrap)
    trial.steps(0)
    parameter = next(trial.model.parameters())
    assert trial.optimizer.state[parameter]["exp_avg"] is trial.base.state[parameter]["exp_avg"]


def _copied(wrap: Wrap, duplicate: Callable[[Any], Any], *, scheduled: bool = False) -> None:
    trial = Trial.of(wrap)
    trial.steps(0)
    if scheduled:
        schedulers.StepLR(trial.optimizer, 1)
    clone = duplicate(trial.optimizer)
    theirs = [p for group in clone.param_groups for p in group["params"]]
    before = [p.detach().clone() for p in theirs]
    generator = torch.Generator().manual_seed(1)
    for parameter in theirs:
        drawn = torch.randn(parameter.shape, generator=generator, device="cpu")
        parameter.grad = drawn.to(parameter.device)
    assert not trial.moves(clone.step), "a step of the copy moved the original"
    trial.steps(1)
    for old, moved, expected in zip(before, theirs, trial.model.parameters(), strict=True):
        assert not torch.equal(old, moved), "the copy does not step"
        assert torch.equal(moved, expected), "the copy steps elsewhere"


def deep_copy(wrap: Wrap) -> None:
    """A deep copy makes the same steps on parameters of its own."""
    _copied(wrap, copy.deepcopy)


def pickled(wrap: Wrap) -> None:
    """So does what `pickle` brings back."""
    _copied(wrap, lambda optimizer: pickle.loads(pickle.dumps(optimizer)))


def copy_with_scheduler(wrap: Wrap) -> None:
    """So does a copy made after a scheduler was attached; the original stays where it is."""
    _copied(wrap, copy.deepcopy, scheduled=True)


def added_group(wrap: Wrap) -> None:
    """A group added to it is stepped by the base."""
    trial = Trial.of(wrap)
    extra = nn.Parameter(torch.ones(2))
    trial.optimizer.add_param_group({"params": [extra], "lr": 0.5})
    assert trial.base.param_groups[1]["params"][0] is extra
    extra.grad = torch.ones(2)
    trial.steps(0)
    assert not torch.equal(extra, torch.ones(2)), "not stepped"


def zero_grad(wrap: Wrap) -> None:
    """`zero_grad` sets gradients to None by default, and to zero on request."""
    trial = Trial.of(wrap)
    trial.give(0)
    trial.optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for p in trial.model.parameters())
    trial.optimizer.zero_grad()
    assert all(p.grad is None for p in trial.model.parameters())


def closure(wrap: Wrap) -> None:
    """`step(closure)` computes the gradients by it and returns its loss."""
    trial = Trial.of(wrap)

    def compute() -> float:
        trial.give(0)
        return 3.5

    losses: list[Any] = []
    assert trial.moves(lambda: losses.append(trial.optimizer.step(compute)))
    assert losses == [3.5], f"returned {losses[0]}"


def _scaler() -> torch.amp.GradScaler:
    scaler = torch.amp.GradScaler(torch.get_default_device().type, init_scale=1024.0)
    scaler.scale(torch.ones(()))  # a scaler starts with its first use
    return scaler


def scaler_unscales(wrap: Wrap) -> None:
    """`GradScaler`: after `unscale_` and clipping it makes the step of the bare optimizer."""
    trial, bare, scaler = Trial.of(wrap), Trial.of(lambda base: base), _scaler()
    for seed in range(2):
        trial.give(seed, factor=1024.0)
        scaler.unscale_(trial.optimizer)
        nn.utils.clip_grad_norm_(trial.model.parameters(), 0.5)
        scaler.step(trial.optimizer)
        scaler.update()
        bare.give(seed)
        nn.utils.clip_grad_norm_(bare.model.parameters(), 0.5)
        bare.optimizer.step()
    assert same(trial, bare), "other steps"


def scaler_skips(wrap: Wrap) -> None:
    """`GradScaler`: an infinity skips the step and halves the scale."""
    trial, scaler = Trial.of(wrap), _scaler()
    trial.give(0)
    next(trial.model.parameters()).grad[0, 0] = torch.inf
    assert not trial.moves(lambda: scaler.step(trial.optimizer)), "stepped"
    scaler.update()
    assert scaler.get_scale() == 512.0
    trial.give(1)
    assert trial.moves(lambda: scaler.step(trial.optimizer)), "does not step afterwards"


def scaler_with_fused_base(wrap: Wrap) -> None:
    """`GradScaler` with a fused base: its moments are those of the unscaled gradients."""
    trial, bare, scaler = Trial.of(wrap, fused=True), Trial.of(lambda base: base), _scaler()
    trial.give(0, factor=1024.0)
    scaler.step(trial.optimizer)
    bare.steps(0)
    for one, two in zip(trial.model.parameters(), bare.model.parameters(), strict=True):
        moments = trial.base.state[one]["exp_avg_sq"], bare.base.state[two]["exp_avg_sq"]
        factor = float((moments[0] / moments[1]).mean())
        assert abs(factor - 1) < 1e-4, f"second moments {factor:.0f} times too large"


def distributed_checkpoint(wrap: Wrap) -> None:
    """A distributed checkpoint restores a fresh one, which makes the same next steps."""
    trial, other = Trial.of(wrap), Trial.of(wrap, seed=1)
    trial.steps(0, 1)
    saved = through_a_file(get_optimizer_state_dict(trial.model, trial.optimizer))
    other.model.load_state_dict(trial.model.state_dict())
    set_optimizer_state_dict(other.model, other.optimizer, saved)
    trial.steps(2, 3)
    other.steps(2, 3)
    assert same(trial, other), "other steps"


CHECKS: tuple[Callable[[Wrap], None], ...] = (
    is_an_optimizer,
    step_lr,
    one_cycle_lr,
    plateau,
    scheduler_on_the_base,
    step_hooks,
    global_step_hook,
    state_dict_hooks,
    resumes,
    edit_after_loading,
    edit_after_loading_the_base,
    loads_bare,
    bare_loads,
    state_is_visible,
    deep_copy,
    pickled,
    copy_with_scheduler,
    added_group,
    zero_grad,
    closure,
    scaler_unscales,
    scaler_skips,
    scaler_with_fused_base,
    distributed_checkpoint,
)
