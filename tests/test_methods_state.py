"""What methods remember: by task name, through files and copies, and never anything that is not finite."""

import copy
import io
import pickle

import pytest
import torch

from agsurgery import AGS, GradientSurgery, PCGrad
from agsurgery.methods import NormRestored, Smoothed, solve
from agsurgery.methods._state import TaskState
from tests.samplers import random


def vector(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


EVERYWHERE = torch.tensor(True)


def test_state_follows_the_names_of_the_tasks_and_not_their_order():
    state, like = TaskState(x=(1, 0.5), pairs=(2, 0.0)), vector(0, 0)
    assert state.tensors() == {}
    assert state.read(("a", "b"), like)["x"].tolist() == [0.5, 0.5]
    pairs = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    state.write(("a", "b"), like, {"x": vector(1, 2), "pairs": pairs}, EVERYWHERE)
    reversed_ = state.read(("b", "a"), like)
    assert reversed_["x"].tolist() == [2.0, 1.0]
    assert reversed_["pairs"].tolist() == [[4.0, 3.0], [2.0, 1.0]]


def test_a_task_that_is_absent_keeps_its_state_and_a_new_one_starts_afresh():
    state = TaskState(x=(1, 0.0), pairs=(2, -1.0), total=(0, 7.0))
    state.write(("a", "b"), vector(0, 0), {"x": vector(1, 2)}, EVERYWHERE)
    state.write(("c", "a"), vector(0, 0), {"x": vector(5, 6)}, EVERYWHERE)
    assert state.read(("a", "b", "c"), vector(0, 0, 0))["x"].tolist() == [6.0, 2.0, 5.0]
    pairs = torch.arange(4, dtype=torch.float64).view(2, 2)
    state.write(("c", "a"), vector(0, 0), {"pairs": pairs}, EVERYWHERE)
    read = state.read(("a", "b", "c"), vector(0, 0, 0))
    assert read["pairs"].tolist() == [[3.0, -1.0, 2.0], [-1.0, -1.0, -1.0], [1.0, -1.0, 0.0]]
    assert read["total"] == 7.0


def test_blocks_have_states_of_their_own_and_only_the_chosen_ones_are_written():
    state, like = TaskState(x=(1, 0.0)), torch.zeros(3, 2, dtype=torch.float64)
    chosen = torch.tensor([True, False, True])
    state.write(("a", "b"), like, {"x": torch.ones_like(like)}, chosen)
    assert state.read(("a", "b"), like)["x"].tolist() == [[1.0, 1.0], [0.0, 0.0], [1.0, 1.0]]


def test_writing_keeps_the_tensors_that_a_captured_graph_would_hold():
    state = TaskState(x=(1, 0.0))
    before = state.read(("a", "b"), vector(0, 0))["x"]
    state.write(("a", "b"), vector(0, 0), {"x": vector(1, 2)}, EVERYWHERE)
    assert state.tensors()["x"] is before


def test_a_fresh_state_takes_over_a_used_one_and_ignores_that_of_another_kind():
    used, fresh, other = TaskState(x=(1, 0.0)), TaskState(x=(1, 0.0)), TaskState(y=(1, 0.0))
    used.write(("é", "b"), vector(0, 0), {"x": vector(1, 2)}, EVERYWHERE)
    fresh.load(used.tensors())
    assert fresh.read(("b", "é"), vector(0, 0))["x"].tolist() == [2.0, 1.0]
    fresh.write(("é", "b"), vector(0, 0), {"x": vector(8, 9)}, EVERYWHERE)
    assert used.read(("é", "b"), vector(0, 0))["x"].tolist() == [1.0, 2.0]
    other.load(used.tensors())
    other.load({})
    assert other.tensors() == {}


CONFLICT = torch.tensor([[1.0, -0.5], [-0.5, 1.0]], dtype=torch.float64)
CALM = torch.eye(2, dtype=torch.float64)


def test_smoothed_weights_are_the_moving_average_by_hand():
    method = Smoothed("pcgrad", momentum=0.9)
    assert method(CONFLICT).tolist() == [1.5, 1.5]
    torch.testing.assert_close(method(CALM), vector(1.45, 1.45))
    torch.testing.assert_close(method(CALM), vector(1.405, 1.405))


def test_smoothed_starts_a_new_task_from_its_own_weight():
    method = Smoothed("pcgrad", momentum=0.5)
    method.solve(CONFLICT, tasks=("a", "b"))
    weights = method.solve(CALM, tasks=("c", "a")).weights
    assert weights.tolist() == [1.0, 1.25]


def test_smoothed_weights_do_not_remember_gradients_that_are_not_finite():
    method = Smoothed("pcgrad", momentum=0.5)
    method(CONFLICT)
    broken = torch.tensor([[1.0, torch.inf], [torch.inf, 1.0]], dtype=torch.float64)
    assert solve(method, broken).weights.isnan().all()
    torch.testing.assert_close(method(CALM), vector(1.25, 1.25))


@pytest.mark.parametrize(
    "make",
    [PCGrad, AGS, lambda: Smoothed("ags"), lambda: NormRestored(Smoothed(Smoothed("pcgrad")))],
)
@pytest.mark.parametrize("way", ["state_dict", "deepcopy", "pickle", "file"])
def test_a_restored_method_goes_on_as_the_original_would(make, way):
    gramians = [rows @ rows.T for rows in (random(4, seed=seed) for seed in range(6))]
    original = make()
    for gramian in gramians[:3]:
        original(gramian)
    if way == "deepcopy":
        restored = copy.deepcopy(original)
    elif way == "pickle":
        restored = pickle.loads(pickle.dumps(original))
    else:
        restored, saved = make(), original.state_dict()
        if way == "file":
            file = io.BytesIO()
            torch.save(saved, file)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
        restored.load_state_dict(saved)
    for gramian in gramians[3:]:
        assert torch.equal(original(gramian), restored(gramian))


def test_wrappers_refuse_what_has_no_weights_and_settings_out_of_range():
    with pytest.raises(ValueError, match="at least 0 and below 1"):
        Smoothed("ags", momentum=1.0)
    with pytest.raises(ValueError, match="must be positive, or None"):
        NormRestored("pcgrad", max_scale=-1.0)
    with pytest.raises(ValueError, match="must be one of"):
        NormRestored("psgrad")


def train(optimizer, weight, steps):
    for step in steps:
        targets = random(3, 4, seed=step)
        losses = {name: (weight - t).square().sum() for name, t in zip("abc", targets, strict=True)}
        if step % 3 == 2:
            del losses["b"]  # absent from this batch
        optimizer.zero_grad()
        optimizer.backward(losses)
        optimizer.step()


@pytest.mark.parametrize("method", ["gradvac", "uw", "dwa", "famo", "rlw", "random", "smoothed"])
@pytest.mark.parametrize("load", ["wrapper", "base before wrapping"])
def test_an_optimizer_resumed_from_a_file_makes_identical_steps(method, load):
    make = (lambda: Smoothed("gradvac")) if method == "smoothed" else (lambda: method)
    weight = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer = GradientSurgery(torch.optim.SGD([weight], lr=0.1, momentum=0.5), make())
    train(optimizer, weight, range(5))
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "weight": weight.detach()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    resumed = torch.nn.Parameter(saved["weight"])
    base = torch.optim.SGD([resumed], lr=0.1, momentum=0.5)
    if load == "wrapper":
        other = GradientSurgery(base, make())
        other.load_state_dict(saved["optimizer"])
    else:
        base.load_state_dict(saved["optimizer"])
        other = GradientSurgery(base, make())
    train(optimizer, weight, range(5, 10))
    train(other, resumed, range(5, 10))
    assert torch.equal(weight, resumed)


def test_a_state_of_another_method_is_left_alone():
    weight = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))
    smoothed = GradientSurgery(torch.optim.SGD([weight], lr=0.1), Smoothed("gradvac"))
    train(smoothed, weight, range(3))
    vaccine = GradientSurgery(torch.optim.SGD([weight], lr=0.1), "gradvac")
    vaccine.load_state_dict(smoothed.state_dict())
    assert "target" not in vaccine.method.state()
    train(vaccine, weight, range(3))
    assert weight.isfinite().all()
