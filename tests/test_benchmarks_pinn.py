"""benchmarks/pinn.py: derivatives, equations and reference solutions, its intervals, and a quick run."""

import contextlib
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import pinn
from benchmarks._intervals import Interval

CPU = torch.device("cpu")
BOTH = pytest.mark.parametrize("name", pinn.PROBLEMS)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def autograd_jet(network: pinn.Network, points: torch.Tensor) -> pinn.Jet:
    points = points.clone().requires_grad_()
    value = network(points)
    first = torch.autograd.grad(value.sum(), points, create_graph=True)[0].unbind(1)
    second = [
        torch.autograd.grad(part.sum(), points, retain_graph=True)[0].select(1, i)
        for i, part in enumerate(first)
    ]
    return pinn.Jet(value, first, (second[0], second[1]))


def test_jet_carries_the_derivatives_that_autograd_finds():
    network = pinn.Network(generator()).double()
    for layer in network.layers:
        torch.nn.init.normal_(layer.bias, generator=generator(1))
    points = torch.randn(7, 2, dtype=torch.float64, generator=generator(2))
    torch.testing.assert_close(network.jet(points), autograd_jet(network, points))


@BOTH
def test_reference_solves_the_equation_by_finite_differences(name):
    problem = pinn.PROBLEMS[name]
    draw = np.random.default_rng(0)
    low, high = np.array(problem.low) + 0.02, np.array(problem.high) - 0.02
    points = low + (high - low) * draw.random((200, 2))
    step = 1e-3
    u = problem.reference
    value = u(points)
    first, second = [], []
    for axis in np.eye(2) * step:
        up, down = u(points + axis), u(points - axis)
        first.append((up - down) / (2 * step))
        second.append((up - 2 * value + down) / step**2)
    jet = pinn.Jet(
        torch.from_numpy(value),
        (torch.from_numpy(first[0]), torch.from_numpy(first[1])),
        (torch.from_numpy(second[0]), torch.from_numpy(second[1])),
    )
    residual = problem.residual(torch.from_numpy(points), jet)
    scale = max(np.abs(second).max() * (pinn.VISCOSITY if name == "burgers" else 1), 1)
    assert residual.abs().max() < 1e-3 * scale


@BOTH
def test_border_points_lie_on_the_border_with_the_values_of_the_reference(name):
    problem = pinn.PROBLEMS[name]
    points, values = problem.border(101, generator())
    low, high = torch.tensor(problem.low), torch.tensor(problem.high)
    at_edge = (points == low) | (points == high)
    if name == "burgers":
        at_edge[:, 1] = points[:, 1] == 0  # the end in time is free
    assert at_edge.any(1).all()
    assert ((points >= low) & (points <= high)).all()
    expected = torch.from_numpy(problem.reference(points.double().numpy())).float()
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=2e-6)
    sides = {(i, float(v)) for i in range(2) for v in points[at_edge[:, i], i]}
    assert len(sides) == (3 if name == "burgers" else 4)


def test_burgers_quadrature_has_converged():
    grid = pinn.PROBLEMS["burgers"].grid(31)
    few, many = (pinn.burgers_reference(grid, nodes) for nodes in (200, 350))
    assert np.abs(few - many).max() < 1e-9
    start = grid[:, 1] == 0
    np.testing.assert_allclose(few[start], -np.sin(np.pi * grid[start, 0]), atol=1e-12)


@BOTH
def test_error_of_a_network_is_that_of_its_values(name):
    problem = pinn.PROBLEMS[name]
    network = pinn.Network(generator())
    for layer in network.layers:
        torch.nn.init.zeros_(layer.weight)
    assert pinn.relative_error(problem, network, CPU) == 1
    network.layers[-1].bias.data.fill_(1e6)
    assert pinn.relative_error(problem, network, CPU) == pinn.FAILED
    network.layers[-1].bias.data.fill_(math.nan)
    assert pinn.relative_error(problem, network, CPU) == pinn.FAILED


def test_training_lowers_the_error_and_repeats_itself():
    problem, trial = pinn.PROBLEMS["burgers"], pinn.Trial(1e-2)
    runs = [pinn.train(problem, "sum", trial, 0, steps, CPU) for steps in (150, 150, 1)]
    assert runs[0].error == runs[1].error < 0.9 * runs[2].error


def test_the_weight_of_the_boundary_loss_counts():
    problem = pinn.PROBLEMS["helmholtz"]
    light, heavy = (
        pinn.train(problem, "sum", pinn.Trial(1e-2, weight), 0, 100, CPU)
        for weight in (1.0, 1000.0)
    )
    assert heavy.losses["boundary"] < 0.5 * light.losses["boundary"]


def test_every_method_has_as_many_trials():
    assert {len(trials) for _, trials in pinn.METHODS.values()} == {len(pinn.RATES)}
    assert list(pinn.METHODS)[:4] == ["AGS", "PCGrad", "CAGrad", "Sum"]


def test_intervals_are_those_of_students_t():
    values = [1.0, 2.0, 4.0]
    found = Interval.of(values)
    reach = 4.302653 * np.std(values, ddof=1) / math.sqrt(3)  # from a printed table, two degrees
    assert found.mean == pytest.approx(7 / 3)
    assert found.high - found.mean == pytest.approx(reach, rel=1e-6)
    assert found.mean - found.low == pytest.approx(reach, rel=1e-6)
    geometric = Interval.geometric([math.exp(v) for v in values])
    assert math.log(geometric.low) == pytest.approx(found.low)


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, str, Path]:
    out: Path = tmp_path_factory.mktemp("results") / "pinn.json"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        pinn.main(["--quick", "--out", str(out)])
    return json.loads(out.read_text(encoding="utf-8")), printed.getvalue(), out


def test_quick_run_answers_in_its_last_line_and_says_where_it_comes_from(quick_run):
    result, printed, out = quick_run
    assert printed.splitlines()[-1] == result["answer"]
    assert result["answer"].startswith("Answer: Burgers: error over that of the plain sum: AGS ")
    assert {"commit", "dirty", "versions", "machine", "question"} <= set(result)
    svg = out.with_suffix(".svg").read_text(encoding="utf-8")
    assert svg.startswith("<?xml")
    assert "<dc:date>" not in svg


def test_quick_run_chooses_the_best_trial_and_compares_seed_by_seed(quick_run):
    result, _, _ = quick_run
    for problem in result["problems"].values():
        methods = problem["methods"]
        assert list(methods) == list(pinn.METHODS)
        for name, found in methods.items():
            best = min(found["tried"], key=lambda trial: trial["error"])
            assert {k: best[k] for k in ("rate", "weight")} == found["chosen"]
            if name == "Sum":
                assert "over_sum" not in found
                continue
            ratios = [a / b for a, b in zip(found["errors"], methods["Sum"]["errors"], strict=True)]
            assert found["over_sum"]["mean"] == pytest.approx(
                math.prod(ratios) ** (1 / len(ratios)), rel=1e-3
            )


def test_the_answer_names_only_what_is_beyond_chance():
    def method(low: float, high: float) -> dict:
        ratio = {"mean": (low + high) / 2, "low": low, "high": high}
        return {"over_sum": ratio, "over_weighted_sum": ratio}

    methods = {
        "AGS": method(0.5, 0.9), "PCGrad": method(0.9, 1.1), "CAGrad": method(1.2, 1.4),
        "Sum": {"over_weighted_sum": {"mean": 1.0, "low": 1.0, "high": 1.0}},
        "weighted sum": {"over_sum": {"mean": 0.8, "low": 0.7, "high": 0.9}},
    }  # fmt: skip
    said = pinn.answer({"x": {"title": "X", "methods": methods}})
    assert "beyond chance better: AGS, weighted sum, worse: CAGrad" in said
    assert said.endswith("better than the weighted sum: AGS, worse: CAGrad.")


def test_a_single_seed_is_refused(capsys):
    with pytest.raises(SystemExit):
        pinn.main(["--seeds", "1"])
    assert "--seeds must be at least 2. Got 1." in capsys.readouterr().err
