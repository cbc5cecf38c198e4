"""GradVac against explicit vectors, PCGrad, TorchJD, and what its targets remember."""

import math

import pytest
import torch
from torch import Tensor

from agsurgery import PCGrad
from agsurgery.methods import GradVac, solve
from agsurgery.methods._random import random_orders, stream
from tests.samplers import imbalanced, opposite, pair, random


def explicit(rows: Tensor, orders: list[list[int]], targets: Tensor, beta: float) -> Tensor:
    """The definition, on gradient vectors; changes `targets`."""
    update = torch.zeros_like(rows[0])
    for i, gradient in enumerate(rows):
        turned = gradient.clone()
        for j in orders[i]:
            cosine = torch.nn.functional.cosine_similarity(turned, rows[j], dim=0).item()
            target = targets[i, j].item()
            if cosine < target:
                missing = target * math.sqrt(1 - cosine**2) - cosine * math.sqrt(1 - target**2)
                factor = turned.norm() * missing / (rows[j].norm() * math.sqrt(1 - target**2))
                turned = turned + factor * rows[j]
            targets[i, j] = (1 - beta) * target + beta * cosine
        update = update + turned
    return update


@pytest.mark.parametrize("tasks", [3, 5, 12])
@pytest.mark.parametrize("beta", [0.01, 0.5, 1.0])
def test_updates_of_many_steps_equal_those_of_explicit_vectors(tasks, beta):
    method, targets = GradVac(beta), torch.zeros(tasks, tasks, dtype=torch.float64)
    common = random(1, 30)
    for step in range(8):
        rows = (
            imbalanced(tasks, 100.0, 30, seed=step) + common
        )  # mostly aligned, so that targets rise
        state = method.state_dict()
        orders = random_orders(stream(state["seed"], state["draws"] + 1), tasks).tolist()
        update = method(rows @ rows.T) @ rows
        torch.testing.assert_close(
            update, explicit(rows, orders, targets, beta), rtol=1e-8, atol=1e-9
        )
    torch.testing.assert_close(method.state()["target"], targets)


def test_without_learning_it_is_pcgrad():
    for tasks in (2, 4, 9):
        vaccine, surgery = GradVac(0.0, seed=3), PCGrad(seed=3)
        for step in range(3):
            rows = imbalanced(tasks, 1e3, seed=step)
            torch.testing.assert_close(vaccine(rows @ rows.T), surgery(rows @ rows.T))


def test_raises_a_cosine_exactly_to_its_target():
    method = GradVac(1.0)
    method(pair(0.5) @ pair(0.5).T)
    rows = pair(-0.3, 1.0, 4.0)
    target = method.state_dict()["target"]
    weights = method(rows @ rows.T)
    for i, j in ((0, 1), (1, 0)):
        share = (weights[j] - 1) if j != i else 0.0  # what task i received of gradient j
        turned = rows[i] + share * rows[j]
        cosine = torch.nn.functional.cosine_similarity(turned, rows[j], dim=0)
        torch.testing.assert_close(cosine, target[i, j])


def test_agrees_with_torchjd_for_two_tasks():
    import torchjd.aggregation

    peer, ours = torchjd.aggregation.GradVacWeighting(beta=0.5), GradVac(0.5)
    for step in range(10):
        rows = random(2, 20, step) + random(1, 20, 99)
        torch.testing.assert_close(ours(rows @ rows.T), peer(rows @ rows.T), rtol=1e-6, atol=1e-8)


def test_targets_follow_the_names_of_the_tasks():
    method = GradVac(1.0)
    rows = random(3, 5)
    method.solve(rows @ rows.T, tasks=("a", "b", "c"))
    first = method.state()["target"].clone()
    swapped = torch.eye(2, dtype=torch.float64)
    weights = method.solve(swapped, tasks=("c", "a")).weights
    expected = [0.0, 0.0]
    for i, (task, other) in enumerate(((2, 0), (0, 2))):
        target = first[task, other].item()
        expected[1 - i] = max(target, 0.0) / math.sqrt(1 - target**2)
    torch.testing.assert_close(weights - 1, torch.tensor(expected, dtype=torch.float64))


def test_a_zero_gradient_changes_nothing_and_teaches_nothing():
    method, alone = GradVac(0.5), GradVac(0.5)
    for step in range(3):
        rows = random(2, 6, step)
        padded = torch.cat((rows, torch.zeros(1, 6, dtype=torch.float64)))
        torch.testing.assert_close(method(padded @ padded.T) @ padded, alone(rows @ rows.T) @ rows)
    assert method.state()["target"][2].tolist() == [0.0, 0.0, 0.0]
    assert method.state()["target"][:, 2].tolist() == [0.0, 0.0, 0.0]


def test_gradients_that_are_not_finite_teach_nothing():
    method = GradVac(0.5)
    rows = random(3)
    method(rows @ rows.T)
    before = method.state()["target"].clone()
    broken = rows @ rows.T
    broken[0, 1] = broken[1, 0] = torch.nan
    assert solve(method, broken).weights.isnan().all()
    assert torch.equal(method.state()["target"], before)


@pytest.mark.parametrize("target", [-1.0, 1.0])
def test_extreme_cosines_leave_the_weights_finite(target):
    method = GradVac(1.0)
    for _ in range(3):
        method(pair(target) @ pair(target).T)
    for rows in (opposite(2), random(2), pair(1.0), pair(-1.0)):
        assert method(rows @ rows.T).isfinite().all()


@pytest.mark.parametrize("beta", [-0.1, 1.1, math.nan])
def test_rates_out_of_range_are_refused(beta):
    with pytest.raises(ValueError, match="between 0 and 1"):
        GradVac(beta)


def test_a_state_without_its_seed_is_refused():
    with pytest.raises(KeyError, match="seed"):
        GradVac().load_state_dict({})
