"""Which law holds for which method: a check for each cell of the table."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import agsurgery
from agsurgery import AGS, CAGrad, PCGrad
from agsurgery.methods import MGDA, DualProj, UPGrad, solve
from tests.method_laws import ANY, INDEPENDENT, NEVER, PAIRS, SOLVABLE, TABLE
from tests.samplers import SAMPLERS, aligned, imbalanced, opposite, pair, random

TASKS = (1, 2, 3, 9, 32)


def promised(where: str, tasks: int, rows: Tensor | None = None) -> bool:
    """Whether a law holds for this number of tasks, and for these gradients."""
    if where == NEVER:
        return False
    if where == PAIRS:
        return tasks <= 2
    if where in (INDEPENDENT, SOLVABLE):
        assert rows is not None
        units = torch.nn.functional.normalize(rows[rows.norm(dim=1) > 0], dim=1)
        return len(units) <= rows.shape[1] and (torch.linalg.svdvals(units) > 1e-2).all()
    assert where == ANY
    return True


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
    if not promised(TABLE[name].relabels, tasks):
        pytest.skip("depends on the random order")
    rows = sample(sampler, tasks)
    order = torch.randperm(tasks)
    update = weights(name, rows) @ rows
    relabelled = weights(name, rows[order]) @ rows[order]
    assert (update - relabelled).norm() <= 1e-7 * rows.norm(dim=1).sum()


@every_method
@every_size
def test_update_is_the_plain_sum_where_nothing_conflicts(name, tasks):
    if not promised(TABLE[name].plain, tasks):
        pytest.skip("not promised")
    torch.testing.assert_close(
        weights(name, aligned(tasks)), torch.ones(tasks, dtype=torch.float64), rtol=1e-12, atol=0
    )


@every_method
@every_sampler
@every_size
def test_update_has_the_norm_of_the_plain_sum(name, sampler, tasks):
    rows = sample(sampler, tasks)
    if not promised(TABLE[name].norm, tasks, rows):
        pytest.skip("not promised")
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
    for seed in range(3):
        rows = sample(sampler, tasks, seed)
        if not promised(TABLE[name].opposes_none, tasks, rows):
            pytest.skip("not promised")
        update = weights(name, rows) @ rows
        units = torch.nn.functional.normalize(rows, dim=1)
        # Beside the plain sum, because the best update may be zero.
        assert (units @ update).min() >= -1e-5 * rows.sum(0).norm()


@pytest.mark.parametrize("method", [PCGrad, AGS, lambda: AGS(max_scale=None), lambda: CAGrad(1.0)])
@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    cosine=st.floats(-0.9999, 1.0),
    log_ratio=st.floats(-6, 6),
    log_scale=st.floats(-8, 8),
)
def test_update_opposes_neither_of_two_tasks(method, cosine, log_ratio, log_scale):
    rows = pair(cosine, 10**log_scale, 10 ** (log_scale + log_ratio))
    update = method()(gramian(rows)) @ rows
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
    if not promised(TABLE[name].absent, tasks + (tasks > 1)):
        pytest.skip("not promised")
    rows = random(tasks)
    padded = torch.cat((rows, torch.zeros(1, rows.shape[1], dtype=torch.float64)))
    torch.testing.assert_close(
        weights(name, padded) @ padded, weights(name, rows) @ rows, rtol=1e-5, atol=1e-9
    )


@pytest.mark.parametrize("method", [AGS, PCGrad, CAGrad, MGDA, UPGrad, DualProj])
def test_reduction_mean_divides_by_the_number_of_tasks(method):
    matrix = gramian(random(4))
    ratio = method(reduction="sum")(matrix) / method(reduction="mean")(matrix)
    torch.testing.assert_close(ratio, torch.full((4,), 4.0, dtype=torch.float64))


@pytest.mark.parametrize("name", TABLE)
def test_imbalance_of_a_million_to_one_leaves_the_small_task_its_say(name):
    rows = pair(-0.9, 1e6, 1.0)
    if not promised(TABLE[name].opposes_none, 2, rows):
        pytest.skip("not promised")
    update = weights(name, rows) @ rows
    assert torch.dot(update, rows[1]) >= -1e-9 * update.norm()


@pytest.mark.parametrize("name", TABLE)
def test_traced_without_reading_a_device_value(name):
    """Under a fake device, any `.item()` or branch on a tensor raises."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    for tasks in (1, 2, 4, 10):
        method = TABLE[name].make()
        with FakeTensorMode(allow_non_fake_inputs=True):
            matrix = torch.empty(tasks, tasks, dtype=torch.float64, device="cuda")
            solution = solve(method, matrix)
        assert solution.weights.device.type == "cuda"


@every_method
def test_compiled_as_one_graph(name):
    matrix = gramian(random(3))
    eager, compiled = TABLE[name].make(), TABLE[name].make()
    torch._dynamo.reset()
    traced = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for _ in range(2):  # the second call sees the state of the first
        torch.testing.assert_close(traced(matrix), eager(matrix))


@every_method
@pytest.mark.parametrize("tasks", [2, 4, 10])
def test_blocks_are_solved_one_by_one(name, tasks):
    samplers = (SAMPLERS[name] for name in ("random", "low rank", "zero row"))
    blocks = [sampler(tasks, seed=1) for sampler in samplers]
    together = TABLE[name].make()(torch.stack([gramian(rows) for rows in blocks]))
    for weight, rows in zip(together, blocks, strict=True):
        torch.testing.assert_close(weight @ rows, weights(name, rows) @ rows)


@every_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_16_bits_are_weighed_in_full_precision(name, dtype):
    rows = random(3).to(dtype)
    parameter = torch.zeros(rows.shape[1], dtype=dtype, requires_grad=True)
    report = agsurgery.backward([row @ parameter for row in rows], [parameter], TABLE[name].make())
    expected = TABLE[name].make()(gramian(rows.double()))
    torch.testing.assert_close(report.weights, expected, rtol=1e-4, atol=1e-5)
    update = expected @ rows.double()
    assert (parameter.grad.double() - update).norm() <= 0.01 * update.norm()


@pytest.mark.parametrize("name", [name for name, laws in TABLE.items() if laws.opposes_none == ANY])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    tasks=st.integers(2, 7),
    columns=st.integers(8, 16),
    log_ratio=st.floats(0, 6),
    log_scale=st.floats(-8, 8),
    seed=st.integers(0, 2**31),
)
def test_update_opposes_no_task_of_arbitrary_gramians(
    name, tasks, columns, log_ratio, log_scale, seed
):
    rows = 10**log_scale * imbalanced(tasks, 10**log_ratio, columns, seed)
    update = weights(name, rows) @ rows
    units = torch.nn.functional.normalize(rows, dim=1)
    assert (units @ update).min() >= -1e-9 * rows.norm(dim=1).sum()


def test_opposed_gradients_are_the_hard_case_of_the_samplers():
    """The samplers hold what their names say, or the laws above would prove nothing."""
    assert torch.allclose(opposite(4)[1], -0.3 * opposite(4)[0])
    norms = imbalanced(4, 1e6).norm(dim=1)
    assert norms[-1] / norms[0] > 1e5
