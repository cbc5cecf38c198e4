"""benchmarks/landscape.py: gradients, Pareto sets and predicted ends against something independent, and a quick run."""

import contextlib
import copy
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import optimize
from torch import Tensor, nn

from agsurgery import GradientSurgery
from benchmarks import _landscape_quadratics, _landscape_toy, landscape
from benchmarks.__main__ import redraw
from benchmarks._landscape_quadratics import Pair
from benchmarks.figures import landscape as figure
from benchmarks.landscape import METHODS

CPU = torch.device("cpu")
EVERY = pytest.mark.parametrize("name", METHODS)


def losses_by_the_papers(points: Tensor) -> list[Tensor]:
    """The two losses as the papers print them, term by term."""
    x, y = points.unbind(-1)
    c1, c2 = torch.tanh(0.5 * y).clamp(min=0), torch.tanh(-0.5 * y).clamp(min=0)
    f1 = (0.5 * (-x - 7) - torch.tanh(-y)).abs().clamp(min=0.000005).log() + 6
    f2 = (0.5 * (-x + 3) + torch.tanh(-y) + 2).abs().clamp(min=0.000005).log() + 6
    g1 = ((-x + 7) ** 2 + 0.1 * (-y - 8) ** 2) / 10 - 20
    g2 = ((-x - 7) ** 2 + 0.1 * (-y - 8) ** 2) / 10 - 20
    return [0.1 * (c1 * f1 + c2 * g1), c1 * f2 + c2 * g2]


def somewhere(count: int = 200) -> Tensor:
    points = 20 * torch.rand(count, 2, dtype=torch.float64) - 10
    # In the valley itself, under the floor of the logarithm; and the starts, one of them at y = 0.
    valley = torch.tensor([[-7 + 2 * math.tanh(5.0), 5.0]], dtype=torch.float64)
    return torch.cat([points, valley, torch.tensor(_landscape_toy.STARTS, dtype=torch.float64)])


def test_landscape_is_that_of_the_papers():
    points = somewhere().requires_grad_()
    both = _landscape_toy.toy(points.detach())
    for i, loss in enumerate(losses_by_the_papers(points)):
        torch.testing.assert_close(both.values[:, i], loss.detach())
        (gradient,) = torch.autograd.grad(loss.sum(), points, retain_graph=True)
        torch.testing.assert_close(both.gradients[:, i], gradient)


def test_gradients_of_the_landscape_are_those_of_finite_differences():
    points = 20 * torch.rand(100, 2, dtype=torch.float64) - 10
    gradients = _landscape_toy.toy(points).gradients
    for axis, unit in enumerate(torch.eye(2, dtype=torch.float64) * 1e-7):
        change = _landscape_toy.toy(points + unit).values - _landscape_toy.toy(points - unit).values
        torch.testing.assert_close(gradients[..., axis], change / 2e-7, rtol=1e-4, atol=1e-4)


def test_no_point_of_a_fine_grid_dominates_the_pareto_set():
    axis = torch.linspace(-12, 12, 801, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).view(-1, 2)
    values = _landscape_toy.toy(grid).values
    for point in _landscape_toy.toy(torch.from_numpy(_landscape_toy.toy_pareto_set(41))).values:
        assert not (values < point - 1e-9).all(1).any()
    # And the grid gets near: it would dominate what lies beside the set.
    beside = torch.tensor([[0.0, -8.0], [0.0, -9.0], [8.0, -8.4], [-8.0, -8.4], [3.0, 5.0]])
    for point in _landscape_toy.toy(beside.double()).values:
        assert (values < point).all(1).any()


def test_points_of_the_pareto_set_are_stationary_for_some_weights():
    points = torch.from_numpy(_landscape_toy.toy_pareto_set(21))
    first, second = _landscape_toy.toy(points).gradients.unbind(1)
    cosine = torch.nn.functional.cosine_similarity(first, second)
    torch.testing.assert_close(cosine[1:-1], -torch.ones(19, dtype=torch.float64))


def test_distance_to_a_curve_is_that_to_its_nearest_segment():
    curve = np.array([[0.0, 0.0], [2.0, 0.0], [2.0, 2.0]])
    for point, expected in (((1, 1), 1), ((-3, 4), 5), ((3, 1.5), 1), ((2, 5), 3)):
        assert _landscape_toy.distance_to_curve(np.array(point), curve) == pytest.approx(expected)


# -- quadratics ---------------------------------------------------------------------------------------


@pytest.fixture(params=_landscape_quadratics.LARGER)
def pair(request) -> Pair:
    return Pair.draw(0, request.param)


def values_of(pair: Pair, point: np.ndarray) -> np.ndarray:
    apart = point - pair.centres
    return np.array([a @ m @ a / 2 for a, m in zip(apart, pair.matrices, strict=True)])


def test_gradients_of_a_pair_are_those_of_finite_differences(pair):
    point = _landscape_quadratics.start_of(pair)
    for axis in range(_landscape_quadratics.DIMENSIONS):
        unit = 1e-5 * np.eye(_landscape_quadratics.DIMENSIONS)[axis]
        change = (values_of(pair, point + unit) - values_of(pair, point - unit)) / 2e-5
        np.testing.assert_allclose(pair.gradients(point)[:, axis], change, rtol=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
def test_pareto_points_are_minima_found_by_another_solver(pair, share):
    def weighted(point: np.ndarray) -> float:
        return float(np.array([share, 1 - share]) @ values_of(pair, point))

    found = optimize.minimize(
        weighted, np.zeros(_landscape_quadratics.DIMENSIONS), method="BFGS", tol=1e-12
    )
    np.testing.assert_allclose(pair.best(share), found.x, atol=1e-5)
    assert pair.distance(pair.best(share)) < 1e-6


def test_distance_to_the_pareto_set_is_the_least_over_many_weights(pair):
    point = _landscape_quadratics.start_of(pair)
    shares = 1 / (1 + np.exp(-np.linspace(-14, 14, 20_001)))
    least = min(float(np.linalg.norm(pair.best(s) - point)) for s in shares)
    assert pair.distance(point) == pytest.approx(least, rel=1e-6)


@pytest.mark.parametrize("name", _landscape_quadratics.FLOWS)
def test_formulas_for_two_vectors_are_those_of_the_methods(name):
    draw = np.random.default_rng(1)
    for _ in range(50):
        rows = draw.normal(size=(2, 3)) * 10.0 ** draw.uniform(-1, 1, size=(2, 1))
        found = landscape.updates(METHODS[name](), torch.from_numpy(rows)).numpy()
        np.testing.assert_allclose(
            _landscape_quadratics.FLOWS[name](*rows), found, rtol=1e-6, atol=1e-9
        )


@pytest.mark.parametrize("name", ["AGS", "PCGrad", "CAGrad", "Sum", "MGDA", "ConFIG", "DualProj"])
def test_steps_end_where_they_must(name):
    ends = landscape.measure_quadratics(name, 1.0, 3000, CPU)
    assert ends["to_predicted"] is not None
    assert ends["to_predicted"] < 2e-3
    assert (ends["to_sum"] < 1e-3) == (name in _landscape_quadratics.OF_THE_SUM)


# -- running --------------------------------------------------------------------------------------------


@EVERY
def test_steps_are_those_of_the_wrapper(name):
    found = landscape.measure_toy(name, 5, 1, CPU)["ends"]
    points = [nn.Parameter(torch.tensor(s, dtype=torch.float64)) for s in _landscape_toy.STARTS]
    adam = torch.optim.Adam(points, lr=landscape.RATE)
    optimizer = GradientSurgery(adam, METHODS[name](), granularity=[[p] for p in points])
    for _ in range(5):
        optimizer.zero_grad()
        losses = losses_by_the_papers(torch.stack(points))
        optimizer.backward([loss.sum() for loss in losses])
        optimizer.step()
    torch.testing.assert_close(
        torch.tensor(found, dtype=torch.float64), torch.stack(points).detach(), rtol=0, atol=1e-4
    )
    start = torch.tensor(_landscape_toy.STARTS, dtype=torch.float64)
    assert (torch.stack(points).detach() - start).abs().max() > 4e-3


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, str, Path]:
    out: Path = tmp_path_factory.mktemp("results") / "landscape.json"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        landscape.main(["--quick", "--out", str(out)])
    return json.loads(out.read_text(encoding="utf-8")), printed.getvalue(), out


def test_quick_run_answers_in_its_last_line_and_says_where_it_comes_from(quick_run):
    result, printed, out = quick_run
    assert printed.splitlines()[-1] == result["answer"]
    assert result["answer"].startswith("Answer: of 5 starts on the landscape reach the Pareto set:")
    assert list(result["methods"]) == list(METHODS)
    assert list(METHODS)[:4] == ["AGS", "PCGrad", "CAGrad", "Sum"]
    assert {"commit", "dirty", "versions", "machine", "question"} <= set(result)
    assert "<dc:date>" not in out.with_suffix(".svg").read_text(encoding="utf-8")


def test_quick_run_has_hardly_moved(quick_run):
    result, _, _ = quick_run
    curve = _landscape_toy.toy_pareto_set()
    for found in result["methods"].values():
        ends = np.array(found["landscape"]["ends"])
        assert np.abs(ends - np.array(_landscape_toy.STARTS)).max() < 0.05
        distances = [_landscape_toy.distance_to_curve(end, curve) for end in ends]
        assert found["landscape"]["distance"] == pytest.approx(distances, rel=1e-3, abs=1e-3)
        assert found["landscape"]["reached"] == 0


def test_paths_lead_from_the_starts_to_the_ends(quick_run):
    result, _, _ = quick_run
    for found in result["methods"].values():
        paths = np.array(found["landscape"]["path"])
        assert paths.shape == (len(_landscape_toy.STARTS), 2, 6)
        np.testing.assert_array_equal(paths[..., 0], _landscape_toy.STARTS)
        np.testing.assert_allclose(paths[..., -1], found["landscape"]["ends"], atol=1e-3)


def test_the_figure_can_be_drawn_anew_from_the_file(quick_run, tmp_path):
    result, _, out = quick_run
    [drawn] = redraw(out.parent, tmp_path)
    assert drawn.read_bytes() == out.with_suffix(".svg").read_bytes()
    other = copy.deepcopy(result)
    other["methods"]["AGS"]["landscape"]["path"].pop()
    figure.draw(other, tmp_path / "other.svg")
    assert (tmp_path / "other.svg").read_bytes() != drawn.read_bytes()
