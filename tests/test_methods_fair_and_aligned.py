"""NashMTL, FairGrad, ConFIG, IMTLG and AlignedMTL: their equations, conic solvers, closed forms, other packages."""

import math
import warnings

import pytest
import torch
from torch import Tensor

from agsurgery.methods import IMTLG, AlignedMTL, ConFIG, FairGrad, NashMTL
from agsurgery.methods._spectral import jacobi_svd, svd
from tests.samplers import SAMPLERS, imbalanced, opposite, pair, random

SOLVABLE = ["random", "imbalanced 1e3", "imbalanced 1e6", "aligned", "duplicated", "zero row"]
SIZES = (1, 2, 3, 8, 16)  # samplers have 20 columns: beyond, no update need serve all tasks


def relative_error_of_the_equation(rows: Tensor, weights: Tensor, alpha: float) -> Tensor:
    present = rows.norm(dim=1) > 0
    gains = (rows @ (weights @ rows))[present]
    return (gains * weights[present] ** (1 / alpha) - 1).abs().max() if present.any() else 0.0


@pytest.mark.parametrize("sampler", SOLVABLE)
@pytest.mark.parametrize("tasks", SIZES)
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_nash_solves_its_equation_for_each_task(sampler, tasks, scale):
    rows = scale * SAMPLERS[sampler](tasks)
    weights = NashMTL(length="exact")(rows @ rows.T)
    assert relative_error_of_the_equation(rows, weights, 1.0) <= 1e-8
    present = (rows.norm(dim=1) > 0).sum()
    torch.testing.assert_close(
        (weights * (rows.norm(dim=1) > 0) @ rows).norm(), present.double().sqrt()
    )


@pytest.mark.parametrize("sampler", ["random", "imbalanced 1e3", "duplicated", "aligned"])
@pytest.mark.parametrize("tasks", SIZES)
@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0, 5.0])
def test_fairgrad_solves_its_equation_for_each_task(sampler, tasks, alpha):
    rows = 1e-3 * SAMPLERS[sampler](tasks)
    weights = FairGrad(alpha, length="exact")(rows @ rows.T)
    assert relative_error_of_the_equation(rows, weights, alpha) <= 1e-8


@pytest.mark.parametrize("tasks", [2, 5, 12])
@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_fairgrad_equals_the_answer_of_a_conic_solver(tasks, alpha):
    import cvxpy

    rows = imbalanced(tasks, 10.0, 30, seed=tasks)
    weights = cvxpy.Variable(tasks, pos=True)
    power = 1 - 1 / alpha
    utility = cvxpy.sum(cvxpy.power(weights, power) / power if power else cvxpy.log(weights))
    triangle = torch.linalg.qr(rows.T)[1].numpy()
    problem = cvxpy.Problem(cvxpy.Minimize(cvxpy.sum_squares(triangle @ weights) / 2 - utility))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it asks for more digits than it can prove
        problem.solve(solver=cvxpy.CLARABEL, tol_gap_abs=1e-11, tol_gap_rel=1e-11, tol_feas=1e-11)
    theirs = torch.from_numpy(weights.value)
    ours = FairGrad(alpha, length="exact")(rows @ rows.T)

    def objective(w):
        gained = w.pow(power).sum() / power if power else w.log().sum()
        return (w @ rows).square().sum() / 2 - gained

    # Both minimise the same strictly convex function; the solver's last digits differ between processors.
    assert objective(ours) <= objective(theirs) + 1e-9 * objective(theirs).abs()
    assert (ours @ rows - theirs @ rows).norm() <= 1e-4 * (theirs @ rows).norm()


@pytest.mark.parametrize("cosine", [-0.999, -0.5, 0.0, 0.9])
@pytest.mark.parametrize("ratio", [1.0, 1e6])
def test_nash_of_two_tasks_has_its_closed_form(cosine, ratio):
    rows = pair(cosine, 1.0, ratio)
    share = 1 / math.sqrt(1 + cosine)  # y (1 + c) y = 1 on the unit gradients
    expected = torch.tensor([share, share / ratio], dtype=torch.float64)
    torch.testing.assert_close(NashMTL(length="exact")(rows @ rows.T), expected)


def test_fairgrad_tends_to_the_plain_sum_for_small_alpha_and_is_nash_for_one():
    rows = random(3)
    gramian = rows @ rows.T
    torch.testing.assert_close(FairGrad(1.0)(gramian), NashMTL()(gramian))
    aligned = SAMPLERS["aligned"](3)
    weights = FairGrad(0.02)(aligned @ aligned.T)
    torch.testing.assert_close(
        weights / weights.mean(), torch.ones(3, dtype=torch.float64), rtol=0.1, atol=0
    )


def test_fairgrad_agrees_with_torchjd_on_balanced_gradients():
    import torchjd.aggregation

    for alpha in (0.5, 1.0, 2.0):
        for seed in range(5):
            rows = random(4, seed=seed)
            peer = torchjd.aggregation.FairGradWeighting(alpha=alpha)(rows @ rows.T) @ rows
            ours = FairGrad(alpha)(rows @ rows.T) @ rows
            torch.testing.assert_close(ours / ours.norm(), peer / peer.norm(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", [NashMTL(), FairGrad(2.0), ConFIG(), IMTLG()])
def test_nothing_is_done_where_gradients_are_opposite(method):
    for rows in (opposite(2), opposite(2).float().double()):
        assert (method(rows @ rows.T) @ rows).norm() <= 1e-6 * rows.norm()


@pytest.mark.parametrize("tasks", [2, 3, 8, 16])
@pytest.mark.parametrize("ratio", [1.0, 1e6])
def test_config_has_the_same_cosine_with_every_gradient_and_imtlg_the_same_projection(tasks, ratio):
    rows = imbalanced(tasks, ratio)
    units = torch.nn.functional.normalize(rows, dim=1)
    for method in (ConFIG(), IMTLG()):
        projections = units @ (method(rows @ rows.T) @ rows)
        torch.testing.assert_close(projections, projections.mean().expand(tasks), rtol=1e-8, atol=0)
    torch.testing.assert_close(IMTLG(reduction="mean")(rows @ rows.T).sum().item(), 1.0)


def test_preference_of_config_sets_the_ratio_of_the_cosines():
    rows = random(3)
    weights = ConFIG(preference=[1.0, 2.0, 3.0])(rows @ rows.T)
    cosines = torch.nn.functional.normalize(rows, dim=1) @ (weights @ rows)
    torch.testing.assert_close(
        cosines / cosines[0], torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    )


@pytest.mark.parametrize(
    ("length", "peer"),
    [
        ("projection", "ProjectionLength"),
        ("min", "TrackMinimum"),
        ("max", "TrackMaximum"),
        ("harmonic", "TrackHarmonicAverage"),
        ("arithmetic", "TrackArithmeticAverage"),
        ("geometric", "TrackGeometricAverage"),
    ],
)
def test_config_agrees_with_the_reference_package(length, peer):
    import conflictfree.grad_operator
    import conflictfree.length_model

    for seed in range(5):
        rows = imbalanced(3, 5.0, seed=seed)
        expected = conflictfree.grad_operator.ConFIG_update(
            rows.float(), length_model=getattr(conflictfree.length_model, peer)()
        )
        update = ConFIG(length=length)(rows @ rows.T) @ rows
        torch.testing.assert_close(update, expected.double(), rtol=1e-4, atol=1e-5)


def test_imtlg_agrees_with_torchjd_and_with_the_formula_of_the_paper():
    import torchjd.aggregation

    for seed in range(5):
        rows = imbalanced(3, 5.0, seed=seed)
        weights = IMTLG(reduction="mean")(rows @ rows.T)
        peer = torchjd.aggregation.IMTLGWeighting()(rows @ rows.T)
        torch.testing.assert_close(weights, peer, rtol=1e-6, atol=1e-8)
        units = torch.nn.functional.normalize(rows, dim=1)
        differences, unit_differences = rows[0] - rows[1:], units[0] - units[1:]
        others = rows[0] @ unit_differences.T @ torch.linalg.inv(differences @ unit_differences.T)
        torch.testing.assert_close(weights[1:], others)


@pytest.mark.parametrize("tasks", [2, 3, 8, 16])
@pytest.mark.parametrize("ratio", [1.0, 1e3, 1e6])
@pytest.mark.parametrize("scale", ["min", "median", "rmse"])
def test_aligned_gradients_are_orthogonal_and_equally_long(tasks, ratio, scale):
    rows = imbalanced(tasks, ratio)
    gramian = rows @ rows.T
    # Column i of B: what the weights gain from one more unit of preference for task i.
    ones, base = torch.ones(tasks, dtype=torch.float64), AlignedMTL(scale=scale)(gramian)
    columns = [
        AlignedMTL(scale=scale, preference=(ones + torch.eye(tasks)[i]).tolist())(gramian) - base
        for i in range(tasks)
    ]
    aligned = torch.stack(columns) @ rows
    products = aligned @ aligned.T
    sigma = products.diagonal().mean()
    torch.testing.assert_close(
        products / sigma, torch.eye(tasks, dtype=torch.float64), rtol=0, atol=1e-8
    )
    values = torch.linalg.svdvals(rows).square()
    expected = {"min": values[-1], "median": values[tasks // 2], "rmse": values.mean()}[scale]
    torch.testing.assert_close(sigma, expected, rtol=1e-8, atol=0)


@pytest.mark.parametrize("mode", ["min", "median", "rmse"])
def test_aligned_agrees_with_torchjd_on_balanced_gradients(mode):
    import torchjd.aggregation

    for seed in range(5):
        rows = random(5, seed=seed)
        peer = torchjd.aggregation.AlignedMTLWeighting(scale_mode=mode)(rows @ rows.T)
        torch.testing.assert_close(AlignedMTL(scale=mode, reduction="mean")(rows @ rows.T), peer)


def test_aligned_opposes_the_shorter_of_two_gradients_exactly_as_its_docstring_says():
    for cosine in (-0.5, -0.82, -0.95):
        for ratio in (1.0, 2.0, 5.0, 20.0, 1e3):
            rows = pair(cosine, 1.0, ratio)
            gain = rows[0] @ (AlignedMTL()(rows @ rows.T) @ rows)
            assert (gain < 0) == (1 + ratio * math.sqrt(1 - cosine**2) < -ratio * cosine)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 33])
@pytest.mark.parametrize("grade", [1.0, 1e6])
def test_jacobi_decomposes_like_lapack_and_keeps_the_digits_of_small_columns(size, grade):
    scales = torch.logspace(0, math.log10(grade), size, dtype=torch.float64)
    matrix = random(size, size, seed=size) + 3 * torch.eye(size)
    graded = matrix * scales
    left, values, right = jacobi_svd(graded)
    torch.testing.assert_close((left * values) @ right, graded, rtol=1e-12, atol=1e-12 * grade)
    identity = torch.eye(size, dtype=torch.float64)
    torch.testing.assert_close(left.mT @ left, identity, rtol=0, atol=1e-10)
    torch.testing.assert_close(right @ right.mT, identity, rtol=0, atol=1e-12)
    assert (values.diff() <= 0).all()
    # The product of all singular values is known to all digits from the ungraded matrix.
    log_determinant = torch.linalg.slogdet(matrix)[1] + scales.log().sum()
    torch.testing.assert_close(values.log().sum(), log_determinant, rtol=1e-12, atol=1e-11)
    if grade == 1.0:
        torch.testing.assert_close(values, svd(graded)[1])


@pytest.mark.parametrize("method", [AlignedMTL(), AlignedMTL(scale="median"), ConFIG(), IMTLG()])
@pytest.mark.parametrize(
    "sampler", ["random", "imbalanced 1e3", "duplicated", "zero row", "low rank"]
)
@pytest.mark.parametrize("tasks", [2, 3, 7])
def test_an_accelerator_gets_the_same_update(monkeypatch, method, sampler, tasks):
    rows = SAMPLERS[sampler](tasks)
    expected = method(rows @ rows.T) @ rows
    monkeypatch.setattr("agsurgery.methods.aligned_mtl.svd", jacobi_svd)
    monkeypatch.setattr("agsurgery.methods._spectral.symmetric", lambda m: jacobi_svd(m)[:2])
    update = method(rows @ rows.T) @ rows
    torch.testing.assert_close(update, expected, rtol=1e-7, atol=1e-7 * rows.norm().item())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: FairGrad(0.0), "positive and finite"),
        (lambda: FairGrad(math.inf), "positive and finite"),
        (lambda: NashMTL(length="unit"), "Got 'unit'"),
        (lambda: ConFIG(length="median"), "Got 'median'"),
        (lambda: AlignedMTL(scale="mean"), "Got 'mean'"),
    ],
)
def test_wrong_settings_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
