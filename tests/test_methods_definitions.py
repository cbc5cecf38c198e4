"""Each method against something independent: explicit vectors, closed forms, published values, a conic solver."""

import itertools
import math

import pytest
import torch

import agsurgery
from agsurgery import AGS, CAGrad, PCGrad
from agsurgery.kernels import gramian
from agsurgery.methods import resolve, solve
from agsurgery.methods._random import random_orders, stream
from tests import references
from tests.samplers import imbalanced, low_rank, pair, random


def drawn_orders(method: PCGrad, tasks: int) -> list[list[int]]:
    """The orders that the method will draw next."""
    state = method.state_dict()
    return random_orders(stream(state["seed"], state["draws"] + 1), tasks).tolist()


@pytest.mark.parametrize("tasks", [2, 3, 5, 16])
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("method", "reference"), [(PCGrad, references.pcgrad), (AGS, references.ags)]
)
def test_update_equals_that_of_explicit_vectors(method, reference, tasks, seed):
    rows = random(tasks, seed=seed)
    surgery = method()
    orders = drawn_orders(surgery, tasks)
    update = surgery(rows @ rows.T) @ rows
    torch.testing.assert_close(update, reference(rows, orders), rtol=1e-9, atol=1e-12)


def test_pcgrad_of_two_tasks_has_its_closed_form():
    rows = pair(-0.6, 2.0, 0.5)
    matrix = rows @ rows.T
    expected = [1 - matrix[0, 1] / matrix[0, 0], 1 - matrix[0, 1] / matrix[1, 1]]
    torch.testing.assert_close(PCGrad()(matrix), torch.stack(expected))


@pytest.mark.parametrize(
    ("first", "second", "cosine", "plain", "projected", "scale"),
    [  # closed form of two conflicting tasks, evaluated by hand
        (1, 1, -0.5, 1.0, 1.5, 0.6667),
        (1, 1, -0.9, 0.4472, 0.8497, 0.5263),
        (1, 0.5, -0.9, 0.5916, 0.6391, 0.9256),
        (1, 0.5, -0.99, 0.5099, 0.2111, 2.415),
        (1, 0.1, -0.9, 0.9110, 0.4755, 1.916),
        (1, 0.1, -0.99, 0.9011, 0.1550, 5.81),
        (1, 0.1, -0.9999, 0.9, 0.0156, 57.9),
    ],
)
def test_ags_has_the_golden_values_of_its_closed_form(
    first, second, cosine, plain, projected, scale
):
    rows = pair(cosine, first, second)
    solution = solve(AGS(max_scale=None), rows @ rows.T)
    assert math.isclose((solution.weights @ rows).norm(), plain, rel_tol=2e-3)
    assert math.isclose((PCGrad()(rows @ rows.T) @ rows).norm(), projected, rel_tol=5e-3)
    assert math.isclose(solution.scale, scale, rel_tol=2e-3)


@pytest.mark.parametrize("cosine", [-1 + 1e-4, -0.9, -0.5, -0.01, 0.0, 0.7, 1.0])
def test_ags_of_two_tasks_of_equal_norm_is_the_plain_sum(cosine):
    rows = pair(cosine, 3.0, 3.0)
    torch.testing.assert_close(
        AGS()(rows @ rows.T), torch.ones(2, dtype=torch.float64), rtol=1e-9, atol=0
    )


def test_ags_limits_its_scale():
    rows = pair(-0.9999, 1.0, 0.1)
    solution = solve(AGS(max_scale=2.0), rows @ rows.T)
    assert solution.scale == 2.0
    torch.testing.assert_close(solution.weights, 2 * PCGrad()(rows @ rows.T))


def test_ags_does_not_stretch_rounding_noise():
    rows = pair(-1.0, 1.0, 0.1)
    matrix = rows @ rows.T
    matrix[0, 1] = matrix[1, 0] = matrix[0, 1] * (1 - 1e-8)  # the error of a float32 Gramian
    update = AGS(max_scale=None)(matrix) @ rows
    assert update.norm() < 1e-6


def test_default_limit_of_ags_leaves_ordinary_conflicts_alone():
    generator = torch.Generator().manual_seed(0)
    scales = []
    for seed in range(500):
        ratio = 10 ** (2 * torch.rand((), generator=generator, dtype=torch.float64).item())
        rows = random(2, 8, seed) * torch.tensor([[1.0], [ratio]], dtype=torch.float64)
        scales.append(solve(AGS(max_scale=None), rows @ rows.T).scale)
    assert torch.stack(scales).max() < AGS().max_scale


def test_orders_are_permutations_of_the_other_tasks_and_all_occur():
    seed, counts = torch.tensor(7), {}
    for draw in range(600):
        orders = random_orders(stream(seed, torch.tensor(draw)), 4)
        for task, order in enumerate(orders.tolist()):
            assert sorted(order) == [j for j in range(4) if j != task]
            key = (task, *order)
            counts[key] = counts.get(key, 0) + 1
    assert len(counts) == 4 * 6
    # 600 draws over 6 orders: 100 expected each, standard deviation 9.
    assert all(60 < count < 140 for count in counts.values())


def test_orders_differ_from_step_to_step_and_repeat_with_the_seed():
    matrix = imbalanced(6, 30.0) @ imbalanced(6, 30.0).T
    first, again, other = PCGrad(seed=1), PCGrad(seed=1), PCGrad(seed=2)
    run = [first(matrix) for _ in range(4)]
    assert all(torch.equal(a, again(matrix)) for a in run)
    assert any(not torch.equal(a, b) for a, b in itertools.pairwise(run))
    assert any(not torch.equal(a, other(matrix)) for a in run)


@pytest.mark.parametrize("tasks", [2, 3, 12])
@pytest.mark.parametrize("c", [0.2, 0.5, 1.5])
@pytest.mark.parametrize("ratio", [1.0, 100.0])
def test_cagrad_equals_the_answer_of_a_conic_solver(tasks, c, ratio):
    rows = imbalanced(tasks, ratio, columns=30, seed=tasks)
    update = CAGrad(c)(rows @ rows.T) @ rows
    expected = references.cagrad(rows, c)
    # The conic solver is good to about 1e-12 in the objective, hence to its root in the solution.
    assert (update - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("tasks", [3, 6])
def test_cagrad_is_solved_where_some_combination_of_the_gradients_vanishes(tasks):
    rows = low_rank(tasks, seed=3)
    assert torch.linalg.matrix_rank(rows) < tasks
    update = CAGrad(0.5)(rows @ rows.T) @ rows
    expected = references.cagrad(rows, 0.5)
    torch.testing.assert_close((rows @ update).min(), (rows @ expected).min(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("tasks", "rank"), [(3, 1), (4, 2), (8, 4), (32, 8)])
@pytest.mark.parametrize("c", [0.5, 1.0, 2.0])
def test_cagrad_stays_in_its_ball_for_dependent_gradients_with_the_rounding_of_float32(
    tasks, rank, c
):
    """The Gramian of dependent float32 gradients is not exactly singular: what is left must not be divided by."""
    for seed in range(10):
        rows = low_rank(tasks, rank, seed).float()
        update = CAGrad(c)(gramian(rows.repeat(1, 16 // rank))) @ rows.double()
        total = rows.double().sum(0)
        assert (update - total).norm() <= (1 + 1e-3) * c * total.norm()


@pytest.mark.parametrize("scale", [1e-8, 1e-3, 1.0, 1e8])
def test_cagrad_does_not_fall_back_to_equal_weights_for_small_gradients(scale):
    rows = scale * imbalanced(3, 10.0)
    result = CAGrad(0.5)(rows @ rows.T)
    assert result.max() / result.min() > 1.5


@pytest.mark.parametrize(
    ("rescale", "divisor"), [("none", 1.0), ("quadratic", 1.25), ("linear", 1.5)]
)
def test_cagrad_rescales_as_its_options_say(rescale, divisor):
    matrix = random(3) @ random(3).T
    torch.testing.assert_close(CAGrad(0.5, rescale=rescale)(matrix) * divisor, CAGrad(0.5)(matrix))


def test_methods_are_found_by_name():
    assert isinstance(resolve("ags"), AGS)
    assert isinstance(resolve("PCGrad"), PCGrad)


def test_every_method_that_needs_no_arguments_has_a_name():
    classes = [getattr(agsurgery, name) for name in agsurgery.__all__]
    methods = [
        c for c in classes if isinstance(c, type) and issubclass(c, agsurgery.methods.Method)
    ]
    needy = {agsurgery.Fixed, agsurgery.NormRestored, agsurgery.Smoothed}
    assert {type(resolve(m.__name__.lower())) for m in methods if m not in needy} == set(
        methods
    ) - needy


@pytest.mark.parametrize("name", ["UPGrad", "DualProj", "PCGrad", "MGDA", "AlignedMTL", "IMTLG"])
def test_weightings_of_torchjd_are_methods(name):
    import torchjd.aggregation

    weighting = getattr(torchjd.aggregation, f"{name}Weighting")()
    rows = random(3, 6)
    x = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    report = agsurgery.backward([row @ x for row in rows], [x], weighting)
    torch.testing.assert_close(x.grad, report.weights @ rows)
    restored = agsurgery.NormRestored(weighting)
    assert restored(rows @ rows.T).isfinite().all()


def test_any_callable_from_gramian_to_weights_is_a_method():
    solution = solve(lambda matrix: matrix.diagonal().float(), torch.eye(3, dtype=torch.float64))
    assert solution.weights.tolist() == [1.0, 1.0, 1.0]
    assert solution.weights.dtype == torch.float64


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: resolve("agd"), ValueError, "must be one of.*'ags'.*Got 'agd'"),
        (lambda: resolve(AGS), TypeError, r"write AGS\(\)"),
        (lambda: resolve(3), TypeError, "Got int"),
        (lambda: AGS(max_scale=0.0), ValueError, "must be positive, or None"),
        (lambda: AGS(max_scale=math.nan), ValueError, "Got nan"),
        (lambda: PCGrad(reduction="total"), ValueError, '"sum" or "mean"'),
        (lambda: CAGrad(-1.0), ValueError, "finite and not negative"),
        (lambda: CAGrad(math.inf), ValueError, "finite and not negative"),
        (lambda: PCGrad(seed=1.5), TypeError, r"`seed` must be an integer\. Got 1\.5"),
        (lambda: CAGrad(rescale="cubic"), ValueError, "Got 'cubic'"),
        (lambda: solve(lambda g: g, torch.eye(2)), ValueError, r"returned shape \(2, 2\)"),
        (lambda: PCGrad().load_state_dict({}), KeyError, "needs the state 'seed'"),
    ],
)
def test_wrong_settings_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
