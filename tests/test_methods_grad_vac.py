"""GradVac against its definition on explicit vectors, against PCGrad and TorchJD, and what it remembers."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import Tensor

from agsurgery.methods import PCGrad, solve
from agsurgery.methods._random import random_orders, stream
from agsurgery.methods.grad_vac import GradVac
from tests.samplers import SAMPLERS, aligned, duplicated, imbalanced, low_rank, pair, random

SIZES = (1, 2, 3, 9, 32)


def gramian(rows: Tensor) -> Tensor:
    return rows @ rows.T


def next_orders(method: GradVac, tasks: int) -> list[list[int]]:
    """The orders that the method will draw next."""
    if tasks == 2:
        return [[1], [0]]
    state = method.state_dict()
    return random_orders(stream(state["seed"], state["draws"] + 1), tasks).tolist()


def targets_of(method: GradVac) -> Tensor:
    return method.state()["target"]


def reference(rows: Tensor, targets: Tensor, orders: list[list[int]], beta: float) -> Tensor:
    """Algorithm 1 of the paper, word for word; `targets` are changed in place."""
    update = torch.zeros_like(rows[0])
    for i, gradient in enumerate(rows):
        current = gradient.clone()
        for j in orders[i]:
            other, target = rows[j], targets[i, j].item()
            cosine = (torch.dot(current, other) / (current.norm() * other.norm())).item()
            if cosine < target:
                sine, wanted = math.sqrt(1 - cosine**2), math.sqrt(1 - target**2)
                factor = current.norm() * (target * sine - cosine * wanted)
                current = current + factor / (other.norm() * wanted) * other
            targets[i, j] = (1 - beta) * target + beta * cosine
        update = update + current
    return update


def correlated(tasks: int, step: int) -> Tensor:
    """Gradients that mostly agree, so that targets become positive, and sometimes do not."""
    shared = random(1, 12, seed=1000 + step)
    return random(tasks, 12, seed=step) + (1.5 if step % 3 else 0.2) * shared


@pytest.mark.parametrize("tasks", [2, 3, 5, 16])
@pytest.mark.parametrize("beta", [0.01, 0.5, 1.0])
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_update_and_targets_equal_those_of_explicit_vectors_over_several_steps(tasks, beta, scale):
    method, targets = GradVac(beta, seed=3), torch.zeros(tasks, tasks, dtype=torch.float64)
    raised = 0
    for step in range(12):
        rows = scale * correlated(tasks, step)
        expected = reference(rows, targets, next_orders(method, tasks), beta)
        update = method(gramian(rows)) @ rows
        raised += (expected - rows.sum(0)).norm() > 1e-6 * scale
        torch.testing.assert_close(update / scale, expected / scale, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(targets_of(method), targets, rtol=1e-9, atol=1e-12)
    assert raised >= 2  # or the comparison would say little


@pytest.mark.parametrize("ratio", [1.0, 1e3, 1e6])
def test_imbalanced_gradients_are_raised_to_the_same_cosines(ratio):
    method, targets = GradVac(0.5), torch.zeros(4, 4, dtype=torch.float64)
    for step in range(6):
        rows = imbalanced(4, ratio, seed=step)
        expected = reference(rows, targets, next_orders(method, 4), 0.5)
        update = method(gramian(rows)) @ rows
        assert (update - expected).norm() <= 1e-9 * expected.norm()
        torch.testing.assert_close(targets_of(method), targets, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("tasks", [2, 3, 6])
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5])
def test_weights_equal_those_of_torchjd_in_the_same_orders(tasks, beta, monkeypatch):
    from torchjd.aggregation import GradVacWeighting

    ours, theirs = GradVac(beta), GradVacWeighting(beta=beta, eps=0.0)
    for step in range(6):
        matrix = gramian(correlated(tasks, step))
        orders = iter(next_orders(ours, tasks))
        task = iter(range(tasks))

        def given(count, orders=orders, task=task):
            i = next(task)
            return torch.tensor([j - (j > i) for j in next(orders)])

        with monkeypatch.context() as patched:
            patched.setattr(torch, "randperm", given)
            expected = theirs(matrix)
        torch.testing.assert_close(ours(matrix), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("tasks", SIZES[1:])
def test_with_targets_that_stay_zero_it_is_pcgrad_to_the_last_bit(sampler, tasks):
    method, pcgrad = GradVac(beta=0.0, seed=5), PCGrad(seed=5)
    for step in range(3):
        matrix = gramian(SAMPLERS[sampler](tasks, seed=step))
        assert torch.equal(method(matrix), pcgrad(matrix))
    assert not targets_of(method).any()


@pytest.mark.parametrize("cosine", [-0.9, -0.3, 0.0, 0.5])
@pytest.mark.parametrize("target", [-0.2, 0.3, 0.9, 0.99])
@pytest.mark.parametrize("ratio", [1.0, 1e6])
def test_two_tasks_are_raised_to_their_target_and_not_lowered(cosine, target, ratio):
    method = GradVac(beta=1.0)
    method(gramian(pair(target)))  # the targets are now those cosines
    rows = pair(cosine, 1.0, ratio)
    weights = method(gramian(rows))
    # The share of the other gradient in the weight that each one has: by hand, tan of the wanted angle.
    needed = max(target / math.sqrt(1 - target**2) * math.sqrt(1 - cosine**2) - cosine, 0.0)
    expected = torch.tensor([1 + needed * ratio, 1 + needed / ratio], dtype=torch.float64)
    torch.testing.assert_close(weights, expected, rtol=1e-8, atol=1e-12)
    raised = rows[0] + (weights[1] - 1) * rows[1]
    reached = torch.nn.functional.cosine_similarity(raised, rows[1], dim=0)
    assert math.isclose(reached, max(cosine, target), abs_tol=1e-9)


def test_targets_are_the_moving_average_of_all_cosines_by_hand():
    method = GradVac(beta=0.5)
    for cosine, target in [(0.8, 0.4), (-0.6, -0.1), (0.0, -0.05)]:
        method(gramian(pair(cosine)))
        expected = torch.tensor([[0, target], [target, 0]], dtype=torch.float64)
        torch.testing.assert_close(targets_of(method), expected, rtol=1e-12, atol=1e-15)


def test_a_negative_target_leaves_a_usual_conflict_alone():
    method = GradVac(beta=1.0)
    method(gramian(pair(-0.8)))
    assert method(gramian(pair(-0.5))).tolist() == [1.0, 1.0]


def test_first_step_is_the_plain_sum_where_nothing_conflicts():
    for tasks in SIZES:
        assert GradVac()(gramian(aligned(tasks))).tolist() == [1.0] * tasks


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("tasks", SIZES)
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_weights_stay_finite_and_targets_cosines_over_many_steps(sampler, tasks, scale):
    if tasks == 1 and sampler == "opposite":
        pytest.skip("needs two tasks")
    method = GradVac(beta=0.5)
    for step in range(10):
        assert method(gramian(scale * SAMPLERS[sampler](tasks, seed=step))).isfinite().all()
    if tasks > 1:
        assert targets_of(method).abs().max() <= 1


@pytest.mark.parametrize("scale", [1e-8, 1e8])
@pytest.mark.parametrize("tasks", [2, 5])
def test_multiplying_all_losses_multiplies_the_update(tasks, scale):
    plain, scaled = GradVac(0.5), GradVac(0.5)
    for step in range(5):
        rows = correlated(tasks, step)
        torch.testing.assert_close(
            scaled(gramian(scale * rows)), plain(gramian(rows)), rtol=1e-7, atol=1e-9
        )


def test_relabelling_two_tasks_relabels_the_weights_whatever_they_remember():
    method, relabelled = GradVac(0.5), GradVac(0.5)
    for step in range(5):
        rows = correlated(2, step)
        one = method.solve(gramian(rows), tasks=("a", "b")).weights
        other = relabelled.solve(gramian(rows.flip(0)), tasks=("b", "a")).weights
        torch.testing.assert_close(one, other.flip(0))


@pytest.mark.parametrize("tasks", [2, 3, 5])
def test_equal_gradients_with_the_error_of_the_kernel_stay_the_plain_sum(tasks):
    """Cosines and targets are 1 up to rounding: the formula divides the rounding of one by that of the other."""
    method = GradVac(beta=0.5)
    for step in range(60):
        rows = random(1, 1000, seed=step).expand(tasks, -1) * torch.linspace(1, 3, tasks).unsqueeze(
            1
        )
        noise = 1 + 2e-7 * (random(tasks, tasks, seed=step).clamp(-1, 1))
        weights = method(gramian(rows) * (noise + noise.T) / 2)
        torch.testing.assert_close(weights, torch.ones_like(weights), rtol=0, atol=1e-5)


@pytest.mark.parametrize("direction", [-1, 1])
def test_cosines_beyond_one_are_taken_for_one(direction):
    method = GradVac(beta=1.0)
    over = direction * (1 + 1e-7)
    matrix = torch.tensor([[1.0, over], [over, 1.0]], dtype=torch.float64)
    for _ in range(3):
        assert method(matrix).isfinite().all()
    assert targets_of(method)[0, 1] == direction


@pytest.mark.parametrize("target", [0.0, 0.9, 1.0])
def test_noise_left_by_opposite_gradients_is_not_blown_up(target):
    method = GradVac(beta=1.0)
    method(gramian(pair(target)))
    rows = pair(-1.0, 1.0, 0.1)
    matrix = gramian(rows)
    matrix[0, 1] = matrix[1, 0] = matrix[0, 1] * (
        1 - 1e-7
    )  # the error that a float32 Gramian makes
    assert (method(matrix) @ rows).norm() < 1e-3


def test_noise_left_by_opposite_gradients_enters_no_target():
    """Task 0 is cancelled by task 1; its cosine with task 2 means nothing unless measured first."""
    rows = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.6, 0.8]], dtype=torch.float64)
    method = GradVac(beta=1.0)
    matrix = gramian(rows)
    matrix[0, 1] = matrix[1, 0] = matrix[0, 1] * (1 - 1e-8)
    for _ in range(20):
        orders = next_orders(method, 3)
        before = method.state_dict().get("target", torch.zeros(3, 3, dtype=torch.float64))
        method(matrix)
        if orders[0] == [1, 2]:
            assert targets_of(method)[0, 2] == before[0, 2]
        else:
            assert targets_of(method)[0, 2] == 0.6


def trained(tasks: int) -> GradVac:
    method = GradVac(beta=0.3)
    for step in range(4):
        method(gramian(correlated(tasks, step) + 1))
    return method


@pytest.mark.parametrize("absent", [0, 1, 3])
def test_an_absent_task_changes_nothing_but_keeps_its_targets_and_is_not_changed(absent):
    method = trained(4)
    before, orders = targets_of(method).clone(), next_orders(method, 4)
    rows = random(4, seed=9)
    rows[absent] = 0
    others = [i for i in range(4) if i != absent]
    without = [[others.index(j) for j in orders[i] if j != absent] for i in others]
    targets = before[others][:, others].clone()
    expected = reference(rows[others], targets, without, 0.3)
    weights = method(gramian(rows))
    torch.testing.assert_close(weights @ rows, expected, rtol=1e-9, atol=1e-12)
    assert weights[absent] == 1
    after = targets_of(method)
    assert (before > 0.05).sum() > 6  # targets that an absent task could be raised to
    assert torch.equal(after[absent], before[absent])
    assert torch.equal(after[:, absent], before[:, absent])
    torch.testing.assert_close(after[others][:, others], targets)


def test_all_gradients_absent_leave_weights_of_one_and_the_targets():
    method = trained(3)
    before = targets_of(method).clone()
    assert method(torch.zeros(3, 3, dtype=torch.float64)).tolist() == [1.0] * 3
    assert torch.equal(targets_of(method), before)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [(0, 0), (0, 2)])
def test_gradients_that_are_not_finite_enter_no_target(poison, place):
    method = trained(3)
    before = targets_of(method).clone()
    matrix = gramian(random(3))
    matrix[place] = matrix[place[::-1]] = poison
    assert solve(method, matrix).weights.isnan().all()
    assert torch.equal(targets_of(method), before)


def test_targets_are_kept_by_name_while_tasks_come_go_and_change_places():
    method = GradVac(beta=1.0)
    method.solve(gramian(pair(0.8)), tasks=("a", "b"))
    method.solve(gramian(pair(0.1)), tasks=("c", "a"))
    # Target of a and b is still 0.8: 0.8 / 0.6.
    weights = method.solve(gramian(pair(0.0)), tasks=("b", "a")).weights
    torch.testing.assert_close(weights, torch.full((2,), 1 + 4 / 3, dtype=torch.float64))


@pytest.mark.parametrize("tasks", [1, 2, 4])
def test_blocks_have_targets_of_their_own(tasks):
    together, alone = GradVac(0.5), [GradVac(0.5) for _ in range(3)]
    for step in range(4):
        blocks = [correlated(tasks, step), low_rank(tasks, seed=step), duplicated(tasks, seed=step)]
        solution = together.solve(torch.stack([gramian(rows) for rows in blocks]))
        assert solution.scale.tolist() == [1.0] * 3
        for weights, rows, method in zip(solution.weights, blocks, alone, strict=True):
            torch.testing.assert_close(weights, method(gramian(rows)), rtol=1e-9, atol=1e-9)


def test_a_block_that_is_not_finite_leaves_the_targets_of_the_others_their_news():
    method = GradVac(beta=1.0)
    good, bad = gramian(pair(0.8)), torch.full((2, 2), torch.nan, dtype=torch.float64)
    method(torch.stack([good, bad]))
    assert targets_of(method)[:, 0, 1].tolist() == pytest.approx([0.8, 0.0])


@pytest.mark.parametrize("way", ["state_dict", "deepcopy", "pickle", "file", "used"])
def test_a_restored_method_goes_on_as_the_original_would(way):
    original = trained(4)
    if way == "deepcopy":
        restored = copy.deepcopy(original)
    elif way == "pickle":
        restored = pickle.loads(pickle.dumps(original))
    else:
        restored = GradVac(beta=0.3, seed=8)
        if way == "used":
            restored.solve(gramian(random(2)), tasks=("x", "y"))
        file = io.BytesIO()
        torch.save(original.state_dict(), file)
        file.seek(0)
        saved = torch.load(file) if way == "file" else original.state_dict()
        restored.load_state_dict(saved)
    assert set(restored.state()) == {"seed", "draws", "target", "tasks"}
    for step in range(4):
        matrix = gramian(correlated(4, step))
        assert torch.equal(original(matrix), restored(matrix))


def test_the_state_of_a_method_without_a_step_makes_another_one_start_afresh():
    used, fresh = trained(4), GradVac(beta=0.3)
    assert set(fresh.state()) == {"seed", "draws"}
    used.load_state_dict(fresh.state_dict())
    matrix = gramian(random(4))
    assert torch.equal(used(matrix), fresh(matrix))


@pytest.mark.parametrize("missing", ["seed", "draws"])
@pytest.mark.parametrize("fresh", [True, False])
def test_a_state_without_its_draws_is_refused_and_changes_nothing(missing, fresh):
    saved = trained(3).state_dict()
    del saved[missing]
    method = GradVac() if fresh else trained(4)
    before = method.state_dict()
    with pytest.raises(KeyError, match=f"GradVac needs the state '{missing}'"):
        method.load_state_dict(saved)
    after = method.state_dict()
    assert before.keys() == after.keys()
    assert "target" not in before or torch.equal(before["target"], after["target"])


@pytest.mark.parametrize("beta", [-0.1, 1.1, math.nan])
def test_beta_is_a_weight(beta):
    with pytest.raises(ValueError, match=r"`beta` must be between 0 and 1\. Got"):
        GradVac(beta)


def test_reduction_mean_divides_by_the_number_of_tasks():
    total, mean = GradVac(0.5), GradVac(0.5, reduction="mean")
    for step in range(3):
        matrix = gramian(correlated(3, step))
        torch.testing.assert_close(total(matrix), 3 * mean(matrix))


def test_traced_without_reading_a_device_value():
    """Under a fake device, any `.item()` or branch on a tensor raises."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    for tasks in (1, 2, 4, 10):
        method = GradVac()
        with FakeTensorMode(allow_non_fake_inputs=True):
            matrix = torch.empty(tasks, tasks, dtype=torch.float64, device="cuda")
            for _ in range(2):
                weights = solve(method, matrix).weights
        assert weights.device.type == "cuda"


@pytest.mark.parametrize("tasks", [1, 2, 3])
def test_compiled_as_one_graph(tasks):
    eager, compiled = GradVac(0.5), GradVac(0.5)
    torch._dynamo.reset()
    traced = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for step in range(4):  # later calls see the state of the first
        matrix = gramian(correlated(tasks, step))
        torch.testing.assert_close(traced(matrix), eager(matrix))
