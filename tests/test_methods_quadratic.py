"""Dual cone, simplex and conflict-averse problems: optimality conditions, a conic solver, closed forms, TorchJD."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from agsurgery import CAGrad, PCGrad
from agsurgery.methods import MGDA, DualProj, UPGrad
from agsurgery.methods import _quadratic as quadratic
from agsurgery.methods._cosine import cosines
from tests import references
from tests.samplers import SAMPLERS, imbalanced, low_rank, pair, random

SIZES = (1, 2, 3, 8, 9, 32)  # 8 is the last that is enumerated


def many_opposite_pairs(tasks: int, seed: int = 0) -> Tensor:
    """Each gradient of the first half has an exactly opposite one in the second, up to a million times longer."""
    rows = random(tasks, 20, seed)
    half = tasks // 2
    rows[:half] = -rows[half : 2 * half] * torch.logspace(0, -6, half, dtype=torch.float64)[:, None]
    return rows


def imbalanced_low_rank(tasks: int, seed: int = 0) -> Tensor:
    """More tasks than the three dimensions, and a million to one."""
    return imbalanced(tasks, 1e6, 3, seed)


HARD = SAMPLERS | {
    "opposite pairs": many_opposite_pairs,
    "imbalanced, low rank": imbalanced_low_rank,
}


def sample(sampler: str, tasks: int, seed: int = 0) -> Tensor:
    if tasks == 1 and sampler == "opposite":
        pytest.skip("needs two tasks")
    return HARD[sampler](tasks, seed=seed)


def units(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows, dim=1)


every_sampler = pytest.mark.parametrize("sampler", HARD)
every_size = pytest.mark.parametrize("tasks", SIZES)


@every_sampler
@every_size
@pytest.mark.parametrize("seed", range(3))
def test_dual_projection_satisfies_its_optimality_conditions(sampler, tasks, seed):
    rows = sample(sampler, tasks, seed)
    weights = DualProj()(rows @ rows.T)
    present = rows.norm(dim=1) > 0
    largest = rows.norm(dim=1).max().clamp(min=1e-300)
    added = (weights - 1) * rows.norm(dim=1) / largest  # z, in units of the longest gradient
    gain = units(rows) @ (weights @ rows) / largest
    assert added.min() >= -1e-12
    assert gain.min() >= -1e-8
    assert torch.minimum(added, gain)[present].abs().amax() <= 1e-8 if present.any() else True


@every_sampler
@every_size
@pytest.mark.parametrize("seed", range(3))
def test_shortest_combination_satisfies_its_optimality_conditions(sampler, tasks, seed):
    rows = sample(sampler, tasks, seed)
    rows = rows[rows.norm(dim=1) > 0]
    if not len(rows):
        pytest.skip("no gradient at all")
    weights = MGDA(reduction="mean")(rows @ rows.T)
    torch.testing.assert_close(weights.sum(), torch.ones((), dtype=torch.float64))
    assert weights.min() >= 0
    step = weights @ rows
    # <g_i, d> >= |d|^2, with equality where the weight is positive; in units of the shortest gradient and cosines.
    shortest = rows.norm(dim=1).min()
    share = weights * rows.norm(dim=1) / (weights * rows.norm(dim=1)).max()
    excess = units(rows) @ step / shortest - step.square().sum() / shortest / rows.norm(dim=1)
    assert excess.min() >= -1e-8
    assert torch.minimum(share, excess).abs().max() <= 1e-8


@every_sampler
@every_size
def test_upgrad_is_the_sum_of_single_dual_projections(sampler, tasks):
    rows = sample(sampler, tasks)
    gramian = rows @ rows.T
    # A preference close to one task alone, taken to its limit by the linearity that is tested here.
    singles = torch.zeros_like(rows[0])
    split = cosines(gramian)
    for i in range(tasks):
        share = torch.zeros(tasks, dtype=torch.float64)
        share[i] = split.norms[i]
        matrix = split.matrix + torch.diag(1 - split.present)
        projected = share + quadratic.minimise(matrix, (share @ split.matrix)[None])[0]
        singles += (projected * split.reciprocals) @ rows
    update = UPGrad()(gramian) @ rows
    assert (update - singles).norm() <= 1e-7 * rows.norm(dim=1).max()


@every_sampler
@every_size
@pytest.mark.parametrize("method", [UPGrad, DualProj, MGDA, lambda: CAGrad(1.0)])
def test_update_opposes_no_task_at_any_scale(sampler, tasks, method):
    for scale in (1e-8, 1.0, 1e8):
        rows = scale * sample(sampler, tasks, 7)
        update = method()(rows @ rows.T) @ rows
        assert (units(rows) @ update).min() >= -1e-9 * rows.norm(dim=1).max()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    tasks=st.integers(2, 12),
    columns=st.integers(1, 12),
    log_ratio=st.floats(0, 6),
    log_scale=st.floats(-8, 8),
    seed=st.integers(0, 2**31),
)
def test_update_opposes_no_task_of_arbitrary_gramians(tasks, columns, log_ratio, log_scale, seed):
    rows = 10**log_scale * imbalanced(tasks, 10**log_ratio, columns, seed)
    gramian = rows @ rows.T
    for method in (UPGrad(), DualProj(), MGDA()):
        update = method(gramian) @ rows
        assert (units(rows) @ update).min() >= -1e-9 * rows.norm(dim=1).max()


def conic(rows: Tensor, lower: Tensor) -> Tensor:
    """The combination with weights of at least `lower` that is shortest, by Clarabel on the unit gradients."""
    import cvxpy

    triangle = torch.linalg.qr(units(rows).T)[1].numpy()
    point = cvxpy.Variable(len(rows))
    problem = cvxpy.Problem(
        cvxpy.Minimize(cvxpy.sum_squares(triangle @ point)), [point >= lower.numpy()]
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Solution may be inaccurate")
        problem.solve(solver=cvxpy.CLARABEL, tol_gap_abs=1e-12, tol_gap_rel=1e-12, tol_feas=1e-12)
    return torch.from_numpy(point.value) @ units(rows)


@pytest.mark.parametrize("tasks", [2, 5, 8, 12, 24])
@pytest.mark.parametrize("columns", [4, 64])
def test_dual_projection_equals_the_answer_of_a_conic_solver(tasks, columns):
    rows = imbalanced(tasks, 100.0, columns, seed=tasks)
    longest = rows.norm(dim=1).max()
    expected = longest * conic(rows, rows.norm(dim=1) / longest)
    update = DualProj()(rows @ rows.T) @ rows
    assert (update - expected).norm() <= 1e-6 * longest


@pytest.mark.parametrize("tasks", [2, 5, 8, 12])
def test_upgrad_equals_the_answer_of_a_conic_solver(tasks):
    rows = imbalanced(tasks, 100.0, 64, seed=tasks)
    norms = rows.norm(dim=1)
    corners = torch.eye(tasks, dtype=torch.float64)
    expected = sum(norm * conic(rows, corner) for norm, corner in zip(norms, corners, strict=True))
    update = UPGrad()(rows @ rows.T) @ rows
    assert (update - expected).norm() <= 1e-6 * norms.max()


@pytest.mark.parametrize("tasks", [2, 5, 8, 12, 32])
@pytest.mark.parametrize("ratio", [1.0, 1e3])
def test_shortest_combination_is_no_longer_than_that_of_a_conic_solver(tasks, ratio):
    import cvxpy

    rows = imbalanced(tasks, ratio, 64, seed=tasks)
    weights = cvxpy.Variable(tasks)
    triangle = torch.linalg.qr(rows.T)[1].numpy() / rows.norm(dim=1).min().item()
    problem = cvxpy.Problem(
        cvxpy.Minimize(cvxpy.norm(triangle @ weights)), [weights >= 0, cvxpy.sum(weights) == 1]
    )
    problem.solve(solver=cvxpy.CLARABEL)
    shortest = (MGDA(reduction="mean")(rows @ rows.T) @ rows).norm() / rows.norm(dim=1).min()
    assert shortest <= problem.value * (1 + 1e-6)


@pytest.mark.parametrize("cosine", [-0.999, -0.5, 0.0, 0.8])
@pytest.mark.parametrize("ratio", [1.0, 3.0, 1e6])
def test_two_tasks_have_their_closed_forms(cosine, ratio):
    rows = pair(cosine, 1.0, ratio)
    gramian = rows @ rows.T
    (a, b), (_, c) = gramian.tolist()
    torch.testing.assert_close(UPGrad()(gramian), PCGrad()(gramian), rtol=1e-9, atol=0)
    first = min(max((c - b) / (a + c - 2 * b), 0.0), 1.0)
    expected = torch.tensor([first, 1 - first], dtype=torch.float64)
    torch.testing.assert_close(
        MGDA(reduction="mean")(gramian), expected, rtol=1e-9, atol=1e-9 / ratio
    )
    # The projection of the sum takes from it the component against one task at most.
    total = rows.sum(0)
    for row in rows:
        total = total - min(torch.dot(total, row).item(), 0.0) / torch.dot(row, row) * row
    torch.testing.assert_close(DualProj()(gramian) @ rows, total, rtol=1e-9, atol=1e-9 * ratio)


@pytest.mark.parametrize("method", ["UPGrad", "DualProj"])
def test_agrees_with_torchjd_on_balanced_gradients(method):
    import torchjd.aggregation
    import torchjd.linalg

    projector = torchjd.linalg.QuadprogProjector(norm_eps=0.0, reg_eps=1e-12)
    peer = getattr(torchjd.aggregation, f"{method}Weighting")(projector=projector)
    ours = {"UPGrad": UPGrad, "DualProj": DualProj}[method](reduction="mean")
    for seed in range(20):
        rows = random(5, 20, seed)
        gramian = rows @ rows.T
        torch.testing.assert_close(ours(gramian), peer(gramian), rtol=1e-5, atol=1e-6)


def test_preference_weighs_the_tasks_by_place_or_by_name():
    rows = torch.eye(3, dtype=torch.float64)
    gramian = rows @ rows.T
    assert UPGrad(preference=[1.0, 2.0, 3.0])(gramian).tolist() == [1.0, 2.0, 3.0]
    named = DualProj(preference={"b": 2.0, "a": 1.0, "c": 3.0})
    assert named.solve(gramian, tasks=("c", "a", "b")).weights.tolist() == [3.0, 1.0, 2.0]


def test_normalisations_of_mgda_solve_for_the_divided_gradients():
    rows, losses = imbalanced(4, 30.0), torch.tensor([2.0, 0.5, 1.0, 4.0], dtype=torch.float64)
    norms = rows.norm(dim=1)
    for normalization, divisor in (
        ("norm", norms),
        ("loss", losses),
        ("loss+norm", losses * norms),
    ):
        divided = rows / divisor[:, None]
        expected = MGDA()(divided @ divided.T)
        found = MGDA(normalization=normalization).solve(rows @ rows.T, losses).weights
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("sampler", ["opposite pairs", "imbalanced, low rank"])
@pytest.mark.parametrize("tasks", [3, 8, 12])
@pytest.mark.parametrize("c", [0.3, 2.0])
def test_cagrad_serves_the_worst_task_as_well_as_a_conic_solver(sampler, tasks, c):
    rows = sample(sampler, tasks)
    gramian, total = rows @ rows.T, rows.sum(0)
    update, expected = CAGrad(c)(gramian) @ rows, references.cagrad(rows, c)
    assert (update - total).norm() <= (1 + 1e-9) * c * total.norm()
    shortest = rows.norm(dim=1).min()
    worst, reference = (rows @ update).min() / shortest, (rows @ expected).min() / shortest
    assert worst >= reference - 1e-6 * (reference.abs() + 1e-1 * total.norm())


@pytest.mark.parametrize("method", [UPGrad(), DualProj(), MGDA(), CAGrad(0.5)])
@pytest.mark.parametrize("tasks", [3, 10])
def test_blocks_are_solved_one_by_one(method, tasks):
    gramians = torch.stack(
        [rows @ rows.T for rows in (random(tasks), low_rank(tasks), 1e3 * random(tasks, seed=1))]
    )
    together, single = method(gramians), torch.stack([method(g) for g in gramians])
    # Weights of dependent gradients are not unique; the update is, and so are its products with the gradients.
    gains = (gramians @ (together - single).unsqueeze(-1)).abs().amax((1, 2))
    assert (gains <= 1e-8 * gramians.abs().amax((1, 2))).all()


def test_enumeration_and_interior_point_find_the_same_solutions(monkeypatch):
    rows = [imbalanced(6, 1e3, 8, seed) for seed in range(10)]
    enumerated = [DualProj()(r @ r.T) @ r for r in rows]
    conflict_averse = [CAGrad(0.5)(r @ r.T) @ r for r in rows]
    monkeypatch.setattr(quadratic, "ENUMERATED", 0)
    monkeypatch.setattr("agsurgery.methods._conflict_averse.ENUMERATED", 0)
    for r, expected, averse in zip(rows, enumerated, conflict_averse, strict=True):
        torch.testing.assert_close(DualProj()(r @ r.T) @ r, expected)
        torch.testing.assert_close(CAGrad(0.5)(r @ r.T) @ r, averse)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: MGDA(normalization="l2"), ValueError, "Got 'l2'"),
        (lambda: MGDA(normalization="loss")(torch.eye(2)), ValueError, "needs the losses"),
        (lambda: UPGrad(preference=[1.0, 0.0]), ValueError, "finite and positive"),
        (lambda: UPGrad(preference=[]), ValueError, "Got none"),
        (lambda: UPGrad(preference=3.0), TypeError, "Got float"),
        (lambda: UPGrad(preference=[1.0])(torch.eye(2)), ValueError, "Got 1 for 2 tasks"),
        (
            lambda: DualProj(preference={"a": 1.0}).solve(torch.eye(2), tasks=("a", "b")),
            ValueError,
            r"none for \['b'\]",
        ),
    ],
)
def test_wrong_settings_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
