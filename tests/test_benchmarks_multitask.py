"""benchmarks/multitask.py: its data, formulas and choices, its steps beside the wrapper, and a quick run."""

import contextlib
import io
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.datasets import load_digits
from sklearn.metrics import accuracy_score, r2_score
from torch import nn
from torch.nn import functional as F

import agsurgery
from agsurgery import GradientSurgery
from benchmarks import _intervals, multitask
from benchmarks import _multitask_data as data
from benchmarks import _multitask_methods as methods_of
from benchmarks import _multitask_networks as networks_of
from benchmarks import _multitask_training as training
from benchmarks._multitask_data import Examples, Problem, Task
from benchmarks._multitask_methods import METHODS, Trial

CPU = torch.device("cpu")


def toy(examples: int = 40) -> Problem:
    """Random numbers with all kinds of tasks, one of them asked about half of the examples."""
    generator = torch.Generator().manual_seed(0)

    def pool() -> Examples:
        inputs = torch.randn(examples, 5, generator=generator)
        classes = torch.randint(3, (examples, 2), generator=generator).float()
        classes[::2, 1] = data.NOT_ASKED
        number = inputs[:, :1] * 3 + 0.1 * torch.randn(examples, 1, generator=generator)
        return Examples(inputs, torch.cat([classes, number], 1), torch.zeros(examples, 1))

    tasks = (Task("a", 3), Task("b", 3), Task("c"))
    return Problem("Toy", tasks, pool(), pool(), pool(), ((1.0, 0.5, 0.1), (0.5, 1.0, 0.1)), 8)


# -- steps ----------------------------------------------------------------------------------------------


def modules_of(networks: networks_of.Networks, run: int, tasks: int) -> tuple[nn.Module, list]:
    """One of the networks, as torch has it."""
    pairs = [*zip(networks.trunk[::2], networks.trunk[1::2], strict=True), *networks.heads]
    linears = []
    for weight, bias in pairs:
        linear = nn.Linear(*weight.shape[1:])
        linear.weight.data, linear.bias.data = weight[run].detach().T.clone(), bias[run, 0].clone()
        linears.append(linear)
    hidden, heads = linears[:-tasks], linears[-tasks:]
    return nn.Sequential(*(m for linear in hidden for m in (linear, nn.ReLU()))), heads


def torch_sgd(parameters: list, lr: float) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9)


@pytest.mark.parametrize(
    # Adam divides by the gradient, and so turns its rounding into steps; SGD moves less in so few steps.
    ("kind", "theirs", "off", "moved"),
    [("adam", torch.optim.Adam, 2e-4, 5e-3), ("sgd", torch_sgd, 1e-5, 1e-3)],
)
@pytest.mark.parametrize(
    "name", ["AGS", "CAGrad", "Sum", "weighted sum", "GradVac", "UW", "DWA", "FAMO", "GradDrop"]
)
def test_steps_are_those_of_the_wrapper(name, kind, theirs, off, moved):
    """Two runs at once, each against GradientSurgery around torch's own, with batches of the same seed."""
    problem, entry, seeds, steps = toy(), METHODS[name], [3, 4], 12
    weights = [None, None] if name != "weighted sum" else list(problem.weightings)
    trials = [Trial(1e-2, weights[0]), Trial(5e-3, weights[1])]
    make = training.OPTIMIZERS[kind].make
    trained = training.train(problem, entry, trials, seeds, steps, make).networks
    for run, (trial, seed) in enumerate(zip(trials, seeds, strict=True)):
        source = torch.Generator().manual_seed(seed)
        start = networks_of.Networks((5, *training.HIDDEN), problem.tasks, [source], CPU)
        trunk, heads = modules_of(start, 0, 3)
        [method] = methods_of.instances(entry, [trial], [seed])
        parameters = [p for module in (trunk, *heads) for p in module.parameters()]
        inner = theirs(parameters, lr=trial.rate)
        optimizer = GradientSurgery(inner, method, heads="own")
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        order = torch.cat([torch.randperm(40, generator=source) for _ in range(3)]).view(-1, 8)
        for step in range(steps):
            inputs, targets = problem.train.inputs[order[step]], problem.train.targets[order[step]]

            def losses(inputs=inputs, targets=targets, trunk=trunk, heads=heads) -> list:
                outputs = [head(trunk(inputs)) for head in heads]
                asked = targets[:, 1] >= 0
                return [
                    F.cross_entropy(outputs[0], targets[:, 0].long()),
                    F.cross_entropy(outputs[1][asked], targets[asked, 1].long()),
                    F.mse_loss(outputs[2].squeeze(1), targets[:, 2]),
                ]

            optimizer.zero_grad()
            optimizer.backward(losses())
            optimizer.step()
            schedule.step()
            if isinstance(method, agsurgery.DWA) and step % 5 == 4:
                method.end_epoch()
            if isinstance(method, agsurgery.FAMO):
                method.update(losses())
        found_trunk, found_heads = modules_of(trained, run, 3)
        found = [p for module in (found_trunk, *found_heads) for p in module.parameters()]
        begun_trunk, begun_heads = modules_of(start, 0, 3)
        begun = [p for module in (begun_trunk, *begun_heads) for p in module.parameters()]
        for ours, expected, before in zip(found, parameters, begun, strict=True):
            torch.testing.assert_close(ours, expected, rtol=0, atol=off)
            assert (expected - before).abs().max() > moved


# -- data -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", data.BUNDLED)
def test_no_picture_is_in_two_pools(name):
    pools = data.PROBLEMS[name](None).pools()
    sources = {key: set(pool.sources.flatten().tolist()) for key, pool in pools.items()}
    assert list(sources) == ["train", "validation", "test"]
    assert not sources["train"] & sources["validation"]
    assert not sources["train"] & sources["test"]
    assert not sources["validation"] & sources["test"]
    assert set().union(*sources.values()) == set(range(1797))


def test_overlaid_digits_show_the_left_and_the_right_one_that_they_name():
    problem = data.overlaid_digits()
    found = load_digits()
    for pool in problem.pools().values():
        labels = torch.from_numpy(found.target)[pool.sources].float()
        assert torch.equal(pool.targets, labels)
    pictures = torch.from_numpy(found.images / 16).float()
    for canvas, sources in zip(problem.test.inputs[:20], problem.test.sources[:20], strict=True):
        left, right = pictures[sources]
        shown = [
            torch.maximum(
                F.pad(left, (c, 4 - c, r, 2 - r)), F.pad(right, (4 - d, d, s, 2 - s))
            ).flatten()
            for r, s, c, d in itertools.product(range(3), range(3), range(2), range(2))
        ]
        assert any(torch.equal(canvas, one) for one in shown)


def test_four_questions_are_what_their_names_say():
    problem = data.four_questions()
    found = load_digits()
    train = problem.train.sources[:, 0].numpy()
    for pool in problem.pools().values():
        index = pool.sources[:, 0].numpy()
        images = found.images[index] / 16
        assert pool.targets[:, 0].tolist() == found.target[index].tolist()
        assert pool.targets[:, 1].tolist() == (found.target[index] % 2).tolist()
        ink = np.corrcoef(images.sum((1, 2)), pool.targets[:, 2])[0, 1]
        uneven = np.abs(images - images[:, :, ::-1]).sum((1, 2))
        assert ink == pytest.approx(1)
        assert np.corrcoef(uneven, pool.targets[:, 3])[0, 1] == pytest.approx(-1)
    assert len(train) == 1000
    assert problem.train.targets[:, 2].std().item() == pytest.approx(10, rel=1e-4)
    assert problem.train.targets[:, 3].std().item() == pytest.approx(0.1, rel=1e-4)


def test_the_test_pool_takes_no_part_in_the_scale_of_a_target(monkeypatch):
    expected = data.four_questions()
    pictures = data.digits()
    values = pictures.values.clone()
    values[pictures.test] = 100.0
    monkeypatch.setattr(data, "digits", lambda: pictures._replace(values=values))
    assert torch.equal(data.four_questions().train.targets, expected.train.targets)


# -- formulas -------------------------------------------------------------------------------------------


def test_delta_m_by_hand():
    metrics = torch.tensor([[0.5, 0.9], [0.8, 0.6], [0.4, 0.3]], dtype=torch.float64)
    single = torch.tensor([0.8, 0.6], dtype=torch.float64)
    # (-37.5 % + 50 %) / 2 better; the same; half of both lost
    assert multitask.delta_m(metrics, single).tolist() == pytest.approx([-6.25, 0, 50])
    below = torch.tensor([-0.5], dtype=torch.float64)  # of a network worse than a constant
    assert multitask.delta_m(torch.tensor([[-0.25]]), below).tolist() == pytest.approx([-50])


def test_delta_m_refuses_a_single_task_that_is_worth_nothing():
    with pytest.raises(ValueError, match=r"must not be zero. Got \[0.0\]"):
        multitask.delta_m(torch.ones(1, 1), torch.zeros(1))


def test_metrics_are_those_of_scikit_learn():
    problem = toy()
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    networks = networks_of.Networks((5, *training.HIDDEN), problem.tasks, generators, CPU)
    found = networks_of.metrics_of(problem, networks, problem.test)
    assert found.shape == (2, 3)
    inputs, targets = problem.test.inputs, problem.test.targets.numpy()
    for run in range(2):
        trunk, heads = modules_of(networks, run, 3)
        a, b, c = (head(trunk(inputs)).detach().numpy() for head in heads)
        asked = targets[:, 1] >= 0
        assert asked.sum() == 20
        assert found[run].tolist() == pytest.approx(
            [
                accuracy_score(targets[:, 0], a.argmax(1)),
                accuracy_score(targets[asked, 1], b.argmax(1)[asked]),
                max(networks_of.FAILED, r2_score(targets[:, 2], c[:, 0])),
            ],
            abs=1e-5,
        )


@pytest.mark.parametrize("value", [1e6, math.nan])
def test_a_failed_regression_counts_as_much_as_any_other(value):
    problem = toy().only(2)
    networks = networks_of.Networks((5, 2), problem.tasks, [torch.Generator()], CPU)
    networks.flat[:, -1] = value
    assert networks_of.metrics_of(problem, networks, problem.test).tolist() == [
        [networks_of.FAILED]
    ]


def test_p_values_are_those_of_scipy_and_corrected_by_hand():
    values = [0.3, -0.1, 0.5, 0.4]
    expected = stats.ttest_1samp(values, 0).pvalue
    assert _intervals.p_value(values) == pytest.approx(expected)
    assert _intervals.p_value([0.0, 0.0]) == 1
    assert _intervals.p_value([1.0, 1.0]) == 0
    # smallest times 3; the next times 2; the largest not below the one before it
    adjusted = _intervals.holm({"a": 0.01, "b": 0.04, "c": 0.03})
    assert adjusted == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})
    assert _intervals.holm({"a": 0.7, "b": 0.8}) == pytest.approx({"a": 1.0, "b": 1.0})


def test_conflicts_are_counted_over_gramians():
    gramians = torch.tensor([[[1.0, -0.1], [-0.1, 4.0]], [[1.0, 0.1], [0.1, 9.0]]])
    assert training.conflicts(gramians) == (0.5, 2.0)  # torch's median is the lower one


# -- choices --------------------------------------------------------------------------------------------


def judged(problem: Problem, name: str = "Sum") -> dict:
    kind = training.OPTIMIZERS["adam"]._replace(rates=training.RATES[:4])
    effort = multitask.Effort(15, 2, kind)
    baseline = multitask.single_tasks(problem, effort, lambda what: None)
    return {"single": baseline.record, "method": multitask.judge(problem, name, baseline, effort)}


def test_tuning_looks_at_validation_examples_only():
    problem = toy()
    expected = judged(problem)
    turned = problem.test._replace(targets=problem.test.targets.flip(0))
    found = judged(replace(problem, test=turned))
    assert found["method"]["tried"] == expected["method"]["tried"]
    assert found["method"]["chosen"] == expected["method"]["chosen"]
    for task, record in found["single"].items():
        assert record["tried"] == expected["single"][task]["tried"]
    assert found["method"]["metrics"] != expected["method"]["metrics"]
    turned = problem.validation._replace(targets=problem.validation.targets.flip(0))
    found = judged(replace(problem, validation=turned))
    assert found["method"]["tried"] != expected["method"]["tried"]


@pytest.mark.parametrize("name", ["Sum", "weighted sum"])
def test_the_best_trial_is_chosen(name):
    found = judged(toy(), name)
    best = min(found["method"]["tried"], key=lambda trial: trial["validation"])
    assert {key: best[key] for key in ("rate", "weights")} == found["method"]["chosen"]
    for record in found["single"].values():
        best = min(record["tried"], key=lambda trial: trial["validation"])  # minus the metric
        assert best["rate"] == record["chosen"]["rate"]


def test_every_method_has_as_many_trials():
    for problem in (data.overlaid_digits(), data.four_questions(), toy()):
        found = {name: methods_of.trials_of(name, problem, training.RATES) for name in METHODS}
        assert {len(trials) for trials in found.values()} == {len(training.RATES)}
        assert {trial.weights for trial in found["weighted sum"]} == set(problem.weightings)
    assert {t.rate for t in methods_of.trials_of("weighted sum", toy(), training.RATES)} == {
        1e-2,
        2e-2,
        4e-2,
    }


def test_with_one_rate_all_methods_have_that():
    for name in ("AGS", "weighted sum"):
        trials = methods_of.trials_of(name, toy(), [0.1])
        assert {trial.rate for trial in trials} == {0.1}


def test_tuning_and_judging_share_no_seed():
    assert not set(multitask.TUNING_SEEDS) & set(range(multitask.SEEDS))


def test_every_method_of_the_package_has_a_row():
    public = {name for name in agsurgery.__all__ if hasattr(getattr(agsurgery, name), "uses")}
    listed = {name.split("(")[0] for name in METHODS}
    assert public - listed == {"Mean", "Fixed"}  # the sum, and the weighted sum
    assert list(METHODS)[:4] == ["AGS", "PCGrad", "CAGrad", "Sum"]


@pytest.mark.parametrize("name", ["AGS", "PCGrad", "GradVac", "GradDrop", "RLW", "Random"])
def test_runs_at_once_draw_on_their_own(name):
    """With draws in common the seeds would not be independent, and the intervals too narrow."""
    one = torch.tensor([[1.0, -1.0, 0.2], [-1.0, 1.5, 0.3], [0.1, -2.0, -1.0]], dtype=torch.float64)
    rows = torch.stack([one, one])
    methods = methods_of.instances(METHODS[name], [Trial(1e-2)] * 2, [0, 1])
    losses = torch.ones(2, 3, dtype=torch.float64)
    drawn = [methods_of.combine(methods, rows, losses, rows @ rows.mT) for _ in range(20)]
    assert not all(torch.equal(*both) for both in drawn)


# -- running --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, str, str, Path]:
    out: Path = tmp_path_factory.mktemp("results") / "multitask.json"
    with (
        contextlib.redirect_stdout(io.StringIO()) as printed,
        contextlib.redirect_stderr(io.StringIO()) as progress,
    ):
        multitask.main(["--quick", "--out", str(out)])
    result = json.loads(out.read_text(encoding="utf-8"))
    return result, printed.getvalue(), progress.getvalue(), out


def test_quick_run_answers_in_its_last_line_and_says_where_it_comes_from(quick_run):
    result, printed, progress, out = quick_run
    assert printed.splitlines()[-1] == result["answer"]
    assert result["answer"].startswith("Answer: Two overlaid digits: delta_m (lower is better) AGS")
    assert {"commit", "dirty", "versions", "machine", "question", "device"} <= set(result)
    total = sum(len(METHODS) for _ in data.BUNDLED) - 1 + 2 + 4  # TrimmedMean needs three tasks
    assert progress.splitlines()[-1].startswith(
        f"{total}/{total}, about 0 min left: Four questions"
    )
    svg = out.with_suffix(".svg").read_text(encoding="utf-8")
    assert svg.startswith("<?xml")
    assert "<dc:date>" not in svg


def test_quick_run_compares_seed_by_seed(quick_run):
    result, _, _, _ = quick_run
    for problem in result["problems"].values():
        methods = problem["methods"]
        assert list(methods)[:4] == ["AGS", "PCGrad", "CAGrad", "Sum"]
        assert "over_sum" not in methods["Sum"]
        assert "over_weighted_sum" not in methods["weighted sum"]
        for key, rival in (("over_sum", "Sum"), ("over_weighted_sum", "weighted sum")):
            others = methods[rival]["delta_m_by_seed"]
            for name, found in methods.items():
                if name != rival:
                    pairs = zip(found["delta_m_by_seed"], others, strict=True)
                    mean = sum(a - b for a, b in pairs) / 2
                    assert found[key]["mean"] == pytest.approx(mean, rel=1e-3, abs=1e-9)


def test_quick_run_takes_delta_m_from_the_metrics(quick_run):
    result, _, _, _ = quick_run
    for problem in result["problems"].values():
        single = {task: found["metric"] for task, found in problem["single"].items()}
        for found in problem["methods"].values():
            changes = [
                (found["metrics"][task]["mean"] - value) / abs(value)
                for task, value in single.items()
            ]
            expected = -100 * sum(changes) / len(changes)
            assert found["delta_m"]["mean"] == pytest.approx(expected, rel=0.02, abs=0.5)


def test_training_improves_on_chance_and_repeats_itself():
    problem, entry = data.overlaid_digits(), METHODS["Sum"]
    runs = [training.train(problem, entry, [Trial(1e-2)], [0], 120) for _ in range(2)]
    found = [networks_of.metrics_of(problem, run.networks, problem.test) for run in runs]
    assert torch.equal(*found)
    assert found[0].min() > 0.3
    assert 0 < runs[0].conflict < 1


def test_the_answer_names_only_what_is_beyond_chance():
    def method(change: float, mean: float, p: float) -> dict:
        both = {"mean": mean, "low": mean - 1, "high": mean + 1, "p_adjusted": p}
        return {"delta_m": {"mean": change}, "over_sum": both, "over_weighted_sum": both}

    methods = {
        "AGS": method(1.0, -2.0, 0.01), "PCGrad": method(2.0, -1.0, 0.06),
        "Random": method(9.0, 3.0, 0.04), "Sum": {"delta_m": {"mean": 3.0}},
    }  # fmt: skip
    lengths = {"mean": -0.5, "low": -1.0, "high": 0.0}
    said = multitask.answer({"x": {"title": "X", "ags_minus_pcgrad": lengths, "methods": methods}})
    assert "; AGS minus PCGrad -0.50 (-1.00, 0.00); beyond" in said
    assert said.startswith("Answer: X: delta_m (lower is better) AGS +1.0 %, PCGrad +2.0 %, Sum")
    assert "against the plain sum: better AGS; worse Random;" in said
    row = multitask.row("A", {**methods["AGS"], **SHORT}, ())
    assert row.count("*") == 2


SHORT = {
    "chosen": {"rate": 0.1}, "metrics": {}, "conflict": 0.5, "seconds": 1.0, "mean": {"mean": 0.5},
    "delta_m": {"mean": 1.0, "low": 0.0, "high": 2.0},
}  # fmt: skip


def test_a_single_seed_is_refused(capsys):
    with pytest.raises(SystemExit):
        multitask.main(["--seeds", "1"])
    assert "--seeds must be at least 2. Got 1." in capsys.readouterr().err
