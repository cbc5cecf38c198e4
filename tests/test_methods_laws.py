"""Which law holds for which method: the table, and the checks of each of its cells."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agsurgery import AGS, CAGrad, Mean, PCGrad, Sum
from agsurgery.methods import Method, solve
from tests.samplers import SAMPLERS, aligned, imbalanced, opposite, pair, random

TASKS = (1, 2, 3, 32)


@dataclass(frozen=True)
class Row:
    """A method and the laws that it promises to obey."""

    make: Callable[[], Method]
    sums_when_aligned: bool  # equals the plain sum, exactly, where nothing conflicts
    keeps_norm: bool  # of the plain sum
    never_opposes: tuple[int, ...]  # numbers of tasks for which no task's loss rises to first order
    permutes: tuple[
        int, ...
    ]  # numbers of tasks for which relabelling the tasks relabels the weights
    scale: float = 1.0  # weights on gradients that do not conflict are these, for the mean 1 / K


TABLE = {
    "Sum": Row(Sum, True, True, (1,), TASKS),
    "Mean": Row(Mean, False, False, (1,), TASKS),
    "PCGrad": Row(PCGrad, True, False, (1, 2), (1, 2)),
    "AGS": Row(AGS, True, True, (1, 2), (1, 2)),
    "AGS uncapped": Row(lambda: AGS(max_scale=None), True, True, (1, 2), (1, 2)),
    "CAGrad 0.5": Row(lambda: CAGrad(0.5), False, False, (1,), TASKS),
    "CAGrad 1": Row(lambda: CAGrad(1.0), False, False, TASKS, TASKS),
    "CAGrad 0": Row(lambda: CAGrad(0.0), True, True, (1,), TASKS),
}

every_method = pytest.mark.parametrize("name", TABLE)
every_sampler = pytest.mark.parametrize("sampler", SAMPLERS)
every_size = pytest.mark.parametrize("tasks", TASKS)


def gramian(rows: Tensor) -> Tensor:
    return rows @ rows.T


def weights(name: str, rows: Tensor) -> Tensor:
    return solve(TABLE[name].make(), gramian(rows)).weights


def sample(sampler: str, tasks: int, seed: int = 0) -> Tensor:
    if tasks == 1 and sampler == "opposite":
        pytest.skip("needs two tasks")
    return SAMPLERS[sampler](tasks, seed=seed)


@every_method
@every_sampler
@every_size
def test_weights_are_finite_float64_one_per_task(name, sampler, tasks):
    result = weights(name, sample(sampler, tasks))
    assert result.shape == (tasks,)
    assert result.dtype == torch.float64
    assert torch.isfinite(result).all()


@every_method
@every_sampler
@pytest.mark.parametrize("factor", [1e-8, 1e8])
@every_size
def test_multiplying_all_losses_multiplies_the_update(name, sampler, factor, tasks):
    rows = sample(sampler, tasks)
    update = weights(name, rows) @ rows
    scaled = weights(name, factor * rows) @ (factor * rows) / factor
    # Rank-one and opposite rows may leave nothing but rounding of the parts: compare with these.
    size = rows.norm(dim=1).sum()
    assert (update - scaled).norm() <= 1e-6 * size


@every_method
@every_sampler
@every_size
def test_relabelling_the_tasks_relabels_the_weights(name, sampler, tasks):
    if tasks not in TABLE[name].permutes:
        pytest.skip("depends on the random order")
    if name == "CAGrad 1" and sampler == "opposite":
        pytest.skip(
            "every step across the two opposite gradients serves the worst task equally well"
        )
    rows = sample(sampler, tasks)
    order = torch.randperm(tasks)
    update = weights(name, rows) @ rows
    relabelled = weights(name, rows[order]) @ rows[order]
    # 1e-5: where some combination of the gradients vanishes, CAGrad is solved to its square root only.
    assert (update - relabelled).norm() <= 1e-5 * rows.norm(dim=1).sum()


@every_method
@every_size
def test_update_is_the_plain_sum_where_nothing_conflicts(name, tasks):
    if not TABLE[name].sums_when_aligned:
        pytest.skip("not promised")
    assert weights(name, aligned(tasks)).tolist() == [1.0] * tasks


@every_method
@every_sampler
@every_size
def test_update_has_the_norm_of_the_plain_sum(name, sampler, tasks):
    if not TABLE[name].keeps_norm:
        pytest.skip("not promised")
    rows = sample(sampler, tasks)
    solution = solve(TABLE[name].make(), gramian(rows))
    update, plain = solution.weights @ rows, rows.sum(0)
    noise = (
        1e-3 * (solution.weights.abs() * rows.norm(dim=1)).sum()
    )  # only rounding is left to stretch
    if update.norm() <= 1.01 * noise or solution.scale >= 10:
        assert update.norm() <= plain.norm() + noise
    else:
        torch.testing.assert_close(update.norm(), plain.norm(), rtol=1e-6, atol=0)


@every_method
@every_sampler
@every_size
def test_update_opposes_no_task(name, sampler, tasks):
    if tasks not in TABLE[name].never_opposes:
        pytest.skip("not promised")
    for seed in range(3):
        rows = sample(sampler, tasks, seed)
        update = weights(name, rows) @ rows
        units = torch.nn.functional.normalize(rows, dim=1)
        # Beside the plain sum, because the best update may be zero. Exactly opposite gradients are where CAGrad gives
        # up digits, so that it stays bounded under the rounding of float32 Gramians.
        slack = 1e-3 if name.startswith("CAGrad") and sampler == "opposite" else 1e-5
        assert (units @ update).min() >= -slack * rows.sum(0).norm()


@pytest.mark.parametrize("name", ["PCGrad", "AGS", "AGS uncapped", "CAGrad 1"])
@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    cosine=st.floats(-0.9999, 1.0),
    log_ratio=st.floats(-6, 6),
    log_scale=st.floats(-8, 8),
)
def test_update_opposes_neither_of_two_tasks(name, cosine, log_ratio, log_scale):
    rows = pair(cosine, 10**log_scale, 10 ** (log_scale + log_ratio))
    update = weights(name, rows) @ rows
    units = torch.nn.functional.normalize(rows, dim=1)
    assert (units @ update).min() >= -1e-9 * update.norm()


@every_method
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@every_size
def test_no_finite_answer_to_a_gramian_that_is_not_finite(name, poison, tasks):
    matrix = gramian(random(tasks))
    matrix[0, -1] = matrix[-1, 0] = poison
    assert torch.isnan(weights_of(name, matrix)).all()


def weights_of(name: str, matrix: Tensor) -> Tensor:
    return solve(TABLE[name].make(), matrix).weights


@every_method
def test_all_zero_gradients_give_finite_weights(name):
    assert torch.isfinite(weights_of(name, torch.zeros(3, 3, dtype=torch.float64))).all()


@every_method
@every_size
def test_an_absent_task_changes_nothing_for_the_others(name, tasks):
    if tasks not in TABLE[name].permutes or name == "Mean":
        pytest.skip("depends on the number of tasks by definition")
    rows = random(tasks)
    padded = torch.cat((rows, torch.zeros(1, rows.shape[1], dtype=torch.float64)))
    if tasks + 1 not in TABLE[name].permutes and tasks > 1:
        pytest.skip("depends on the random order")
    torch.testing.assert_close(
        weights(name, padded) @ padded, weights(name, rows) @ rows, rtol=1e-5, atol=1e-9
    )


@pytest.mark.parametrize("method", [AGS, PCGrad, CAGrad])
def test_reduction_mean_divides_by_the_number_of_tasks(method):
    matrix = gramian(random(4))
    ratio = method(reduction="sum")(matrix) / method(reduction="mean")(matrix)
    torch.testing.assert_close(ratio, torch.full((4,), 4.0, dtype=torch.float64))


@pytest.mark.parametrize("name", TABLE)
def test_imbalance_of_a_million_to_one_leaves_the_small_task_its_say(name):
    if 2 not in TABLE[name].never_opposes:
        pytest.skip("not promised")
    rows = pair(-0.9, 1e6, 1.0)
    update = weights(name, rows) @ rows
    assert torch.dot(update, rows[1]) >= -1e-9 * update.norm()


@pytest.mark.parametrize("name", TABLE)
def test_traced_without_reading_a_device_value(name):
    """Under a fake device, any `.item()` or branch on a tensor raises."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    for tasks in (2, 4):
        method = TABLE[name].make()
        with FakeTensorMode(allow_non_fake_inputs=True):
            matrix = torch.empty(tasks, tasks, dtype=torch.float64, device="cuda")
            solution = solve(method, matrix)
        assert solution.weights.device.type == "cuda"


def test_opposed_gradients_are_the_hard_case_of_the_samplers():
    """The samplers hold what their names say, or the laws above would prove nothing."""
    assert torch.allclose(opposite(4)[1], -0.3 * opposite(4)[0])
    norms = imbalanced(4, 1e6).norm(dim=1)
    assert norms[-1] / norms[0] > 1e5
