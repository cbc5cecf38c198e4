"""benchmarks/pinn.py: derivatives, equations and reference solutions, its intervals, and a quick run."""

import contextlib
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from agsurgery import GradientSurgery
from benchmarks import _pinn_equations, _pinn_networks, pinn
from benchmarks._intervals import Interval

CPU = torch.device("cpu")
BOTH = pytest.mark.parametrize("name", pinn.PROBLEMS)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def parameters_of(*seeds: int) -> torch.Tensor:
    """Networks with biases, so that these count too."""
    rows = torch.stack([_pinn_networks.initial(generator(seed)) for seed in seeds]).double()
    return rows + 0.1 * torch.randn(rows.shape, generator=generator(9), dtype=torch.float64)


def test_network_is_the_usual_one():
    parameters = parameters_of(0, 1)
    points = torch.randn(2, 7, 2, dtype=torch.float64)
    for run in range(2):
        modules: list[nn.Module] = []
        for weight, bias in _pinn_networks.layers(parameters):
            linear = nn.Linear(*weight.shape[1:]).double()
            linear.weight.data, linear.bias.data = weight[run].T, bias[run, 0]
            modules += [linear, nn.Tanh()]
        network = nn.Sequential(*modules[:-1])
        expected = network(points[run]).squeeze(-1)
        torch.testing.assert_close(pinn.values(parameters, points)[run], expected)
    assert sum(p.numel() for p in network.parameters()) == parameters.shape[1]


def test_initial_weights_are_those_of_xavier():
    weight = torch.stack(
        [_pinn_networks.layers(_pinn_networks.initial(generator(i))[None])[1][0] for i in range(50)]
    )
    assert weight.std().item() == pytest.approx(math.sqrt(2 / 40), rel=0.02)
    assert all(
        (bias == 0).all()
        for _, bias in _pinn_networks.layers(_pinn_networks.initial(generator())[None])
    )


def test_jet_carries_the_derivatives_that_autograd_finds():
    parameters = parameters_of(0, 1, 2)
    points = torch.randn(3, 7, 2, dtype=torch.float64, requires_grad=True)
    value = pinn.values(parameters, points)
    first = torch.autograd.grad(value.sum(), points, create_graph=True)[0].unbind(-1)
    second = [
        torch.autograd.grad(part.sum(), points, retain_graph=True)[0].select(-1, i)
        for i, part in enumerate(first)
    ]
    expected = _pinn_networks.Jet(value, (first[0], first[1]), (second[0], second[1]))
    torch.testing.assert_close(_pinn_networks.jet(parameters, points), expected)


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
    jet = _pinn_networks.Jet(
        torch.from_numpy(value),
        (torch.from_numpy(first[0]), torch.from_numpy(first[1])),
        (torch.from_numpy(second[0]), torch.from_numpy(second[1])),
    )
    residual = problem.residual(torch.from_numpy(points), jet)
    scale = max(np.abs(second).max() * (_pinn_equations.VISCOSITY if name == "burgers" else 1), 1)
    assert residual.abs().max() < 1e-3 * scale


@BOTH
def test_border_points_lie_on_the_border_with_the_values_of_the_reference(name):
    problem = pinn.PROBLEMS[name]
    points, values = problem.border(3, generator())
    assert points.shape == (3, _pinn_equations.BORDER, 2)
    low, high = torch.tensor(problem.low), torch.tensor(problem.high)
    at_edge = (points == low) | (points == high)
    if name == "burgers":
        at_edge[..., 1] = points[..., 1] == 0  # the end in time is free
    assert at_edge.any(-1).all()
    assert ((points >= low) & (points <= high)).all()
    expected = torch.from_numpy(problem.reference(points.view(-1, 2).double().numpy())).float()
    torch.testing.assert_close(values.view(-1), expected, rtol=1e-5, atol=2e-6)
    for step in range(3):
        sides = {
            (i, float(v)) for i in range(2) for v in points[step][at_edge[step][:, i], i].unique()
        }
        assert len(sides) == (3 if name == "burgers" else 4)
    assert not torch.equal(points[0], points[1])


@BOTH
def test_points_inside_fill_the_box(name):
    problem = pinn.PROBLEMS[name]
    points = problem.inside(50, generator()).view(-1, 2)
    assert points.amin(0).tolist() == pytest.approx(problem.low, abs=0.01)
    assert points.amax(0).tolist() == pytest.approx(problem.high, abs=0.01)
    assert points.mean(0).tolist() == pytest.approx(
        [(a + b) / 2 for a, b in zip(problem.low, problem.high, strict=True)], abs=0.05
    )


def test_burgers_quadrature_has_converged():
    grid = pinn.PROBLEMS["burgers"].grid(31)
    few, many = (_pinn_equations.burgers_reference(grid, nodes) for nodes in (200, 350))
    assert np.abs(few - many).max() < 1e-9
    start = grid[:, 1] == 0
    np.testing.assert_allclose(few[start], -np.sin(np.pi * grid[start, 0]), atol=1e-12)


@BOTH
def test_error_of_a_network_is_that_of_its_values(name):
    problem = pinn.PROBLEMS[name]
    parameters = torch.zeros(3, len(_pinn_networks.initial(generator())))
    parameters[:, -1] = torch.tensor([0.0, 1e6, math.nan])  # the bias of the output
    errors = pinn.relative_errors(problem, parameters)
    assert errors == pytest.approx([1, pinn.FAILED, pinn.FAILED])
    exact = problem.reference(problem.grid())
    parameters[:, -1] = 0.5
    expected = np.linalg.norm(exact - 0.5) / np.linalg.norm(exact)
    assert pinn.relative_errors(problem, parameters)[0] == pytest.approx(expected)


@BOTH
@pytest.mark.parametrize("method", ["AGS", "Sum", "ConFIG"])
def test_steps_are_those_of_the_wrapper(name, method, monkeypatch):
    """Two runs at once, each against GradientSurgery around Adam, with losses by autograd."""
    problem, make = pinn.PROBLEMS[name], pinn.METHODS[method][0]
    trials, seeds, steps = [pinn.Trial(1e-2), pinn.Trial(3e-3, 10.0)], [3, 4], 12
    ends: list[torch.Tensor] = []
    monkeypatch.setattr(
        pinn, "relative_errors", lambda _, parameters: ends.append(parameters.clone()) or [0.0, 0.0]
    )
    pinn.train(problem, make(), trials, seeds, steps, CPU)
    for run, (trial, seed) in enumerate(zip(trials, seeds, strict=True)):
        source = generator(seed)
        flat = nn.Parameter(_pinn_networks.initial(source)[None])
        start = flat.detach().clone()
        inside, (border, given) = problem.inside(steps, source), problem.border(steps, source)
        optimizer = GradientSurgery(torch.optim.Adam([flat], lr=trial.rate), make())
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for step in range(steps):
            found = pinn.losses_of(
                problem, flat, inside[step][None], border[step][None], given[step][None]
            )
            optimizer.zero_grad()
            optimizer.backward([found[0].sum(), trial.weight * found[1].sum()])
            optimizer.step()
            schedule.step()
        torch.testing.assert_close(ends[0][run], flat.detach()[0], rtol=0, atol=2e-4)
        assert (flat.detach() - start).abs().max() > 5e-3


def test_training_lowers_the_error_and_repeats_itself():
    problem, trial = pinn.PROBLEMS["burgers"], pinn.Trial(1e-2)
    method = pinn.METHODS["Sum"][0]()
    runs = [pinn.train(problem, method, [trial], [0], steps, CPU) for steps in (150, 150, 1)]
    assert runs[0].errors == runs[1].errors
    assert runs[0].errors[0] < 0.9 * runs[2].errors[0]
    assert 0 < runs[0].seen["conflict"] < 1


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


def test_a_trial_that_fails_with_one_of_the_tuning_seeds_is_not_chosen(monkeypatch):
    calls: list[list[tuple[float, int]]] = []

    def fake(problem, method, trials, seeds, steps, device):
        calls.append([(trial.rate, seed) for trial, seed in zip(trials, seeds, strict=True)])
        lucky = {(1e-1, 1000): 0.1, (1e-1, 1001): 1.0}
        errors = [lucky.get(call, 0.2 if call[0] == 3e-2 else 0.9) for call in calls[-1]]
        return pinn.Outcome(errors, {}, 0.0)

    monkeypatch.setattr(pinn, "train", fake)
    found = pinn.judge(pinn.PROBLEMS["burgers"], "AGS", pinn.Effort(1, 3, 4), CPU)
    assert found["chosen"] == {"rate": 3e-2, "weight": 1.0}
    assert [trial["error"] for trial in found["tried"]] == [0.9, 0.9, 0.2, 0.3162]
    assert found["errors"] == [0.2] * 3
    assert calls[1] == [(3e-2, 0), (3e-2, 1), (3e-2, 2)]  # none of the seeds it was chosen with


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
