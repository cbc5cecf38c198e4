"""`ConflictMonitor` against a slow reference on explicit gradients, and what it promises about the device."""

import copy
import csv
import io
import json
import math
import pickle
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import agsurgery
from agsurgery import AGS, ConflictMonitor, GradDrop, GradientSurgery, Sum, SurgeryReport
from agsurgery.monitor import BUCKETS
from agsurgery.series import Series
from tests.samplers import imbalanced, random

Step = dict[str, np.ndarray]


def report_of(
    step: Step, weights: dict[str, float] | None = None, scale: float = 1.0
) -> SurgeryReport:
    """A report on explicit gradients by task name."""
    rows = torch.from_numpy(np.stack(list(step.values())))
    chosen = torch.tensor([1.0 if weights is None else weights[t] for t in step], dtype=rows.dtype)
    losses = torch.tensor([float(np.abs(g).sum()) for g in step.values()], dtype=rows.dtype)
    one = torch.tensor(scale, dtype=torch.float64)
    return SurgeryReport(tuple(step), losses, rows @ rows.T, chosen, one)


def gathered(*reports: SurgeryReport, history: int = 200) -> ConflictMonitor:
    monitor = ConflictMonitor(history=history)
    for report in reports:
        monitor.update(report)
    return monitor


# -- reference --------------------------------------------------------------------------------------


def reference(steps: list[tuple[Step, dict[str, float]]]) -> dict[str, float]:
    """The numbers of `to_dict`, one by one, from gradient vectors."""
    seen: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        seen.setdefault(name, []).append(value)

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    names: list[str] = []
    for step, weights in steps:
        names += [t for t in step if t not in names]
        active = {t: g for t, g in step.items() if np.linalg.norm(g) > 0}
        plain = sum(step.values())
        update = sum(weights[t] * g for t, g in step.items())
        note("sum_cosine", cosine(plain, update))
        note("norm_ratio", math.log(np.linalg.norm(update) / np.linalg.norm(plain)))
        note("scale", 1.0)
        rises = [float(g @ plain < -1e-9) for g in step.values()]
        note("sum_raises", max(rises))
        note("update_raises", max(float(g @ update < -1e-9) for g in step.values()))
        for task, gradient in step.items():
            note(f"loss/{task}", float(np.abs(gradient).sum()))
        for task, gradient in active.items():
            note(f"weight/{task}", weights[task])
            note(f"norm/{task}", math.log(np.linalg.norm(gradient)))
            note(f"sum_raises/{task}", float(gradient @ plain < -1e-9))
            note(f"update_raises/{task}", float(gradient @ update < -1e-9))
            note(f"cosine_with_sum/{task}", cosine(gradient, plain))
            note(f"cosine_with_update/{task}", cosine(gradient, update))
        conflicts = []
        for i, task in enumerate(names):
            for other in names[:i]:
                if task in active and other in active:
                    value = cosine(active[task], active[other])
                    note(f"cosine/{task}/{other}", value)
                    note(f"conflict/{task}/{other}", float(value < 0))
                    lengths = [np.linalg.norm(active[t]) for t in (task, other)]
                    note(f"norm_ratio/{task}/{other}", math.log(lengths[0] / lengths[1]))
                    conflicts.append(value < 0)
        if conflicts:
            note("conflict", float(any(conflicts)))
            lengths = [np.linalg.norm(g) for g in active.values()]
            note("imbalance", math.log(max(lengths) / min(lengths)))
    flat = {name: sum(values) / len(values) for name, values in seen.items()}
    for name in flat:
        if name.startswith(("norm", "imbalance")):
            flat[name] = math.exp(flat[name])
    return flat


def changing_steps(count: int, seed: int = 0) -> list[tuple[Step, dict[str, float]]]:
    """Tasks that join late, are absent, have no gradient, and come in any order."""
    draw = np.random.default_rng(seed)
    steps = []
    for i in range(count):
        names = ["a", "b"] if i < 3 else ["a", "b", "c", "d"]
        present = [t for t in names if i < 3 or draw.random() < 0.7] or ["c"]
        draw.shuffle(present)
        step = {t: draw.normal(size=6) * 10.0 ** draw.uniform(-3, 3) for t in present}
        if i % 5 == 4 and len(present) > 1:
            step[present[0]] = np.zeros(6)
        steps.append((step, {t: draw.uniform(-0.5, 2) for t in present}))
    return steps


def without_quantiles(flat: dict[str, float]) -> dict[str, float]:
    return {k: v for k, v in flat.items() if not k.startswith(("cosine_q", "steps", "measured"))}


@pytest.mark.parametrize("history", [2, 8, 200])
@pytest.mark.parametrize("count", [1, 4, 50])
def test_numbers_are_those_of_the_gradients(count, history):
    steps = changing_steps(count)
    monitor = gathered(*(report_of(*step) for step in steps), history=history)
    flat = monitor.to_dict()
    assert flat["steps"] == flat["measured"] == count
    expected = reference(steps)
    assert without_quantiles(flat).keys() == expected.keys()
    assert without_quantiles(flat) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_quantiles_of_a_cosine_are_good_to_the_width_of_a_bucket():
    draw = np.random.default_rng(3)
    steps = [{t: draw.normal(size=3) for t in "ab"} for _ in range(500)]
    flat = gathered(*map(report_of, steps)).to_dict()
    cosines = [s["a"] @ s["b"] / np.linalg.norm(s["a"]) / np.linalg.norm(s["b"]) for s in steps]
    for share in (10, 50, 90):
        found = flat[f"cosine_q{share}/b/a"]
        assert found == pytest.approx(np.percentile(cosines, share), abs=2 / BUCKETS)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_quantiles_reach_both_ends(sign):
    flat = gathered(*[report_of({"a": np.ones(2), "b": sign * np.ones(2)})] * 5).to_dict()
    assert flat["cosine_q50/b/a"] == pytest.approx(sign, abs=2 / BUCKETS)


def test_a_step_without_a_gramian_counts_for_losses_and_weights_only():
    seen = report_of({"a": np.array([1.0, 2.0]), "b": np.array([1.0, -1.0])})
    blank = torch.full((2, 2), torch.nan, dtype=torch.float64)
    weights = torch.tensor([3.0, 5.0], dtype=torch.float64)
    unseen = SurgeryReport(("a", "b"), torch.tensor([7.0, 9.0]), blank, weights, weights.sum())
    alone, both = gathered(seen).to_dict(), gathered(unseen, seen, unseen).to_dict()
    assert both["steps"] == 3
    assert both["measured"] == 1
    changed = {k for k in both if both[k] != alone[k]}
    assert changed == {"steps", "loss/a", "loss/b", "weight/a", "weight/b"}
    assert both["loss/a"] == pytest.approx((7 + 7 + 3) / 3)
    assert both["weight/b"] == pytest.approx((5 + 5 + 1) / 3)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_entry_that_is_not_finite_spoils_only_its_step(bad):
    seen = report_of({t: np.random.default_rng(ord(t)).normal(size=4) for t in "abc"})
    gramian = seen.gramian.clone()
    gramian[2, 2] = bad
    spoilt = SurgeryReport(seen.tasks, seen.losses, gramian, seen.weights, seen.scale)
    expected, found = gathered(seen).to_dict(), gathered(spoilt, seen).to_dict()
    assert {**found, "steps": 1} == pytest.approx(expected)


def test_blocks_are_summed():
    torch.manual_seed(4)
    first, second = (nn.Parameter(torch.randn(5, dtype=torch.float64)) for _ in range(2))
    matrices = torch.randn(3, 2, 5, dtype=torch.float64)
    losses = {
        t: (a @ first).square() + b @ second for t, (a, b) in zip("abc", matrices, strict=True)
    }
    parts = [torch.autograd.grad(v, [first, second], retain_graph=True) for v in losses.values()]
    report = agsurgery.backward(losses, [first, second], AGS(), granularity="parameter")
    flat = gathered(report).to_dict()
    whole = {t: torch.cat(part) for t, part in zip("abc", parts, strict=True)}
    update, plain = torch.cat([first.grad, second.grad]), sum(whole.values())
    assert isinstance(plain, Tensor)
    cosine = torch.nn.functional.cosine_similarity
    assert flat["sum_cosine"] == pytest.approx(cosine(update, plain, dim=0).item())
    assert flat["norm_ratio"] == pytest.approx((update.norm() / plain.norm()).item())
    assert flat["cosine/b/a"] == pytest.approx(cosine(whole["a"], whole["b"], dim=0).item())
    for i, (task, gradient) in enumerate(whole.items()):
        assert flat[f"norm/{task}"] == pytest.approx(gradient.norm().item())
        assert flat[f"cosine_with_update/{task}"] == pytest.approx(
            cosine(gradient, update, dim=0).item()
        )
        assert flat[f"update_raises/{task}"] == float(gradient @ update < 0)
        squares = torch.stack([part.square().sum() for part in parts[i]])
        weight = (report.weights[:, i] * squares).sum() / squares.sum()
        assert flat[f"weight/{task}"] == pytest.approx(weight.item())
    assert flat["scale"] == pytest.approx(report.scale.mean().item())


@pytest.mark.parametrize("factor", [1e-8, 1e8])
def test_the_scale_of_the_losses_does_not_matter(factor):
    steps = changing_steps(20)
    scaled = [({t: factor * g for t, g in step.items()}, w) for step, w in steps]
    plain = gathered(*(report_of(*s) for s in steps)).to_dict()
    found = gathered(*(report_of(*s) for s in scaled)).to_dict()
    for key, value in plain.items():
        unit = factor if key.split("/")[0] in ("norm", "loss") else 1
        assert found[key] == pytest.approx(unit * value, rel=1e-5), key


def test_orthogonal_up_to_float32_is_not_called_a_rise():
    """The update is a projection off the second gradient; the float32 Gramian is only good to 2e-7."""
    negative = 0
    for seed in range(50):
        rows = imbalanced(2, 1000.0, seed=seed)
        weights = torch.stack([torch.tensor(1.0), -rows[0] @ rows[1] / rows[1].square().sum()])
        gramian = (rows.float() @ rows.float().T).double()
        report = SurgeryReport(("a", "b"), torch.ones(2), gramian, weights, torch.ones(()).double())
        negative += (report.descent[1] < 0).item()
        assert gathered(report).to_dict()["update_raises"] == 0
    assert negative > 10  # what would be counted without a tolerance


@pytest.mark.parametrize("apart", [0.0, 1e-4])
def test_opposite_gradients_leave_no_direction_to_compare_with(apart):
    """What is left of the sum is as small as the rounding of a float32 Gramian."""
    opposite = {"a": np.array([1.0, 0.0]), "b": np.array([-1.0, apart])}
    flat = gathered(report_of(opposite, {"a": 1.0, "b": 0.5})).to_dict()
    assert "sum_cosine" not in flat
    assert "cosine_with_sum/a" not in flat
    assert flat["cosine_with_update/a"] == pytest.approx(1)
    assert flat["conflict"] == 1
    assert flat["sum_raises"] == 0
    assert flat["update_raises"] == 1


def test_the_history_covers_all_steps_with_equal_means():
    steps = changing_steps(50)
    monitor = gathered(*(report_of(*step) for step in steps), history=8)
    rows = monitor.rows()
    assert [row["steps"] for row in rows] == [8, 16, 24, 32, 40, 48, 50]
    start = 0
    for row in rows:
        part = reference(steps[start : int(row["steps"])])
        start = int(row["steps"])
        found = {k: v for k, v in row.items() if k != "steps"}
        # The order of names within a pair is that of the whole run.
        for key, value in found.items():
            name, *of = key.split("/")
            twin = "/".join([name, *reversed(of)])
            if key in part:
                assert value == pytest.approx(part[key], rel=1e-9, abs=1e-9)
            else:
                inverse = 1 / part[twin] if name == "norm_ratio" else part[twin]
                assert value == pytest.approx(inverse, rel=1e-9, abs=1e-9)
        assert len(found) == len(part)
    assert [row["steps"] for row in monitor.rows(3)] == [24, 48, 50]


def test_memory_does_not_grow():
    step = report_of({t: np.random.default_rng(ord(t)).normal(size=4) for t in "abc"})

    def size(monitor: ConflictMonitor) -> int:
        states = monitor.state_dict().values()
        return sum(t.numel() for state in states for t in state["totals"])

    assert size(gathered(*[step] * 5, history=4)) == size(gathered(*[step] * 500, history=4))


# -- the device ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [None, ("0", "1")])
def test_update_neither_waits_for_the_device_nor_copies_to_it(blocks):
    """Under a fake device, any `.item()` or branch on a tensor raises."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from tests.test_methods_spectral import HostTensors

    monitor = ConflictMonitor(history=4)
    with FakeTensorMode(), HostTensors() as host:
        for step in range(30):
            names = [("a", "b"), ("b", "a"), ("c",), ("d", "a", "b", "c")][step % 4]
            size, batch = len(names), [] if blocks is None else [len(blocks)]
            losses, gramian, weights, scale = (
                torch.empty(shape, dtype=torch.float64, device="cuda")
                for shape in ([size], [*batch, size, size], [*batch, size], batch)
            )
            report = SurgeryReport(names, losses, gramian, weights, scale, blocks)
            monitor.update(report)
    assert monitor.steps == 30
    assert monitor.tasks == ("a", "b", "c", "d")
    assert {t.device.type for t in monitor.state_dict()["series"]["totals"]} == {"cuda"}
    assert host.seen == []


@pytest.mark.parametrize("tasks", [2, 20])
def test_update_takes_about_a_hundred_operations_for_any_number_of_tasks(tasks):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counter(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            views = [a for a in args if isinstance(a, Tensor) and isinstance(result, Tensor)]
            self.count += not any(a.data_ptr() == result.data_ptr() for a in views)
            return result

    report = report_of({str(i): row.numpy() for i, row in enumerate(random(tasks))})
    monitor = gathered(report)
    with Counter() as counter:
        monitor.update(report)
    assert 80 < counter.count < 130


def test_update_leaves_no_graph_and_changes_no_report():
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    report = agsurgery.backward(
        {"a": weight.sum(), "b": weight[0] - 4 * weight[1]}, [weight], "ags"
    )
    before = copy.deepcopy(report)
    monitor = gathered(report)
    for name in ("gramian", "weights", "losses", "scale"):
        assert torch.equal(getattr(report, name), getattr(before, name))
    totals = monitor.state_dict()["series"]["totals"]
    assert not any(total.requires_grad for total in totals)


# -- what it says -------------------------------------------------------------------------------------


def pairs_at(cosine: float, ratio: float = 1.0) -> Step:
    return {
        "a": np.array([1.0, 0.0]),
        "b": ratio * np.array([cosine, math.sqrt(1 - cosine**2)]),
    }


def pcgrad(step: Step) -> dict[str, float]:
    """PCGrad for two conflicting gradients."""
    a, b = step.values()
    return {"a": 1 - a @ b / (a @ a), "b": 1 - a @ b / (b @ b)}


SITUATIONS: dict[str, tuple[str, Any]] = {
    "few steps": ("unknown", lambda i: report_of(pairs_at(-0.5)) if i < 29 else None),
    "no conflict": ("no conflict", lambda i: report_of(pairs_at(0.1))),
    "rare conflict": ("no conflict", lambda i: report_of(pairs_at(-0.1 if i % 25 == 0 else 0.1))),
    "weak conflict": ("sum suffices", lambda i: report_of(pairs_at(-0.5))),
    "the sum itself": ("same direction", lambda i: report_of(pairs_at(-0.5, 9))),
    "a multiple of the sum": (
        "same direction",
        lambda i: report_of(pairs_at(-0.5, 9), {"a": 0.5, "b": 0.5}),
    ),
    "conflict resolved": (
        "worth trying",
        lambda i: report_of(pairs_at(-0.5, 9), pcgrad(pairs_at(-0.5, 9))),
    ),
    "wrong way": ("no gain", lambda i: report_of(pairs_at(-0.5, 9), {"a": -1.0, "b": 1.0})),
    "nothing shared": (
        "nothing shared",
        lambda i: report_of({"a": np.zeros(2), "b": np.zeros(2)}),
    ),
    "one at a time": (
        "nothing shared",
        lambda i: report_of({"ab"[i % 2]: np.array([1.0, 2.0])}),
    ),
}


@pytest.mark.parametrize("name", SITUATIONS)
def test_the_verdict_follows_the_documented_rule(name):
    verdict, make = SITUATIONS[name]
    reports = [make(i) for i in range(100)]
    summary = gathered(*(r for r in reports if r is not None)).summary()
    assert summary.verdict == verdict
    words = {
        "unknown": "Not known",
        "nothing shared": "No: in no step",
        "no conflict": "No: gradients conflict",
        "sum suffices": "Hardly",
        "same direction": "Not with this method",
        "no gain": "Not with this method",
        "worth trying": "Perhaps",
    }
    assert summary.answer.startswith(f"Is surgery worth it here? {words[verdict]}")
    assert str(summary).replace("\n", " ").endswith(summary.answer)


def test_the_summary_names_who_gains_and_who_pays():
    step = pairs_at(-0.5, 9)
    summary = gathered(*[report_of(step, pcgrad(step))] * 40).summary()
    assert summary.gaining == ("a",)
    assert summary.paying == ("b",)
    assert "a (100% -> 0%)" in summary.answer
    plain, update = step["a"] + step["b"], sum(pcgrad(step)[t] * step[t] for t in "ab")
    cosines = [
        v @ step["b"] / np.linalg.norm(v) / np.linalg.norm(step["b"]) for v in (plain, update)
    ]
    assert f"b (cosine {cosines[0]:+.2f} -> {cosines[1]:+.2f})" in summary.answer


def test_the_summary_of_many_tasks_stays_short():
    plain = {f"small {i}": np.array([1.0, 0.0]) for i in range(14)} | {
        "big": np.array([-99.0, 1.0])
    }
    weights = dict.fromkeys(plain, 1.0) | {"big": 0.0}
    summary = gathered(*[report_of(plain, weights)] * 30).summary()
    assert len(summary.gaining) == 14
    assert "small 9 (100% -> 0%); and 4 more." in summary.answer


def test_a_method_without_weights_is_not_judged():
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    monitor = ConflictMonitor()
    for _ in range(40):
        losses = {"a": weight.sum(), "b": weight[0] - 4 * weight[1]}
        monitor.update(agsurgery.backward(losses, [weight], GradDrop()))
    summary = monitor.summary()
    assert summary.verdict == "unknown"
    assert "has no weights" in summary.answer
    assert summary.values["sum_raises"] == 1
    assert "weight/a" not in summary.values


def test_a_method_of_the_losses_has_no_gramian_to_judge_by():
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    monitor = ConflictMonitor()
    for _ in range(40):
        losses = {"a": weight.square().sum(), "b": weight.exp().sum()}
        monitor.update(agsurgery.backward(losses, [weight], "rlw"))
    summary = monitor.summary()
    assert summary.verdict == "unknown"
    assert "0 steps had a Gramian" in summary.answer
    assert summary.values["weight/a"] > 0


def test_an_empty_monitor_says_so():
    summary = ConflictMonitor().summary()
    assert summary.verdict == "unknown"
    assert str(summary).startswith("0 steps")
    assert ConflictMonitor().to_dict() == {"steps": 0, "measured": 0}


def test_the_table_shows_the_most_conflicting_pairs_of_many_tasks():
    rows = random(8, 3).numpy()
    report = report_of({f"task {i}": row for i, row in enumerate(rows)})
    lines = str(gathered(report).summary()).splitlines()
    assert sum(line.startswith("task ") and ", task" in line for line in lines) == 10
    assert "and 18 pairs that conflict less often" in lines
    assert all(len(line) <= 100 for line in lines)


# -- where it goes --------------------------------------------------------------------------------------


@pytest.fixture
def monitor() -> ConflictMonitor:
    return gathered(*(report_of(*step) for step in changing_steps(50)), history=8)


def test_the_flat_numbers_are_json(monitor):
    flat = monitor.to_dict()
    assert json.loads(json.dumps(flat, allow_nan=False)) == flat


def test_the_csv_holds_the_history(monitor, tmp_path):
    path = tmp_path / "conflicts.csv"
    monitor.to_csv(path)
    with open(path, encoding="utf-8", newline="") as file:
        read = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
    assert read == monitor.rows()
    ConflictMonitor().to_csv(path)
    assert path.read_text(encoding="utf-8") == "steps\n"


def test_tensorboard_gets_every_number(monitor):
    class Writer:
        def __init__(self) -> None:
            self.seen: dict[str, tuple[float, int | None]] = {}

        def add_scalar(self, tag: str, scalar_value: float, global_step: int | None = None) -> None:
            self.seen[tag] = (scalar_value, global_step)

    writer = Writer()
    monitor.add_to(writer, 7)
    assert writer.seen == {f"surgery/{k}": (v, 7) for k, v in monitor.to_dict().items()}


def test_copies_and_checkpoints_go_on_alike(monitor):
    more = [report_of(*step) for step in changing_steps(20, seed=9)]
    loaded = ConflictMonitor(history=8)
    stored = io.BytesIO()
    torch.save(monitor.state_dict(), stored)
    stored.seek(0)
    loaded.load_state_dict(torch.load(stored, weights_only=True))
    twins = [loaded, copy.deepcopy(monitor), pickle.loads(pickle.dumps(monitor))]
    before = monitor.to_dict()
    for report in more:
        monitor.update(report)
    for twin in twins:
        assert twin.to_dict() == before  # apart from the original
        for report in more:
            twin.update(report)
        assert twin.to_dict() == monitor.to_dict()
        assert twin.rows() == monitor.rows()


def test_a_state_of_another_length_is_refused(monitor):
    with pytest.raises(ValueError, match=r"same `history`. Got tensors of shapes \[\(8, 2, 7\)"):
        ConflictMonitor(history=10).load_state_dict(monitor.state_dict())


def test_reset_forgets_everything(monitor):
    monitor.reset()
    assert monitor.tasks == ()
    assert monitor.to_dict() == ConflictMonitor().to_dict()


@pytest.mark.parametrize("history", [0, 1, 3, -2, 2.0, True])
def test_a_history_that_cannot_be_halved_is_refused(history):
    with pytest.raises(ValueError, match=r"`history` must be an even number >= 2\. Got"):
        ConflictMonitor(history=history)


def test_series_counts_only_what_is_finite():
    series = Series((("x",), ("y",), ()), 2)
    for value in (1.0, math.nan, 5.0, math.inf):
        series.add(["a"], [torch.tensor([value]), torch.tensor([[value]]), torch.zeros(0, 1, 1)])
    (sums, counts), (by_task, _), _ = series.total()
    assert (sums.tolist(), counts.tolist(), by_task.tolist()) == ([6], [2], [[6]])


def test_it_watches_a_real_training_run():
    torch.manual_seed(0)
    x = torch.randn(64, 8)
    trunk, heads = nn.Linear(8, 2), nn.ModuleList(nn.Linear(2, 1) for _ in range(2))
    optimizer = GradientSurgery(
        torch.optim.SGD([*trunk.parameters(), *heads.parameters()], lr=0.1), Sum()
    )
    monitor, conflicts, risen = ConflictMonitor(), 0, 0
    for _ in range(40):
        features = torch.tanh(trunk(x))
        losses = [(heads[i](features) - (i + 1) * x[:, i::2]).square().mean() for i in range(2)]
        rows = [
            torch.cat([g.flatten() for g in torch.autograd.grad(v, [*trunk.parameters()], retain_graph=True)])
            for v in losses
        ]  # fmt: skip
        conflicts += (rows[0] @ rows[1] < 0).item()
        risen += any((row @ sum(rows) < 0).item() for row in rows)
        optimizer.zero_grad()
        monitor.update(optimizer.backward(losses))
        optimizer.step()
    flat = monitor.to_dict()
    assert 0 < conflicts < 40 or risen
    assert flat["conflict"] == conflicts / 40
    assert flat["sum_raises"] == flat["update_raises"] == risen / 40
    assert flat["sum_cosine"] == pytest.approx(1)


# -- figures ------------------------------------------------------------------------------------------


def test_the_figure_draws_the_numbers(monitor, tmp_path):
    figure = monitor.plot()
    path = tmp_path / "conflicts.png"
    figure.savefig(path)
    assert path.stat().st_size > 10_000
    shares, cosines, weights, matrix = figure.axes[:4]
    rows, total = monitor.rows(), monitor.to_dict()
    drawn = {line.get_label(): line for line in shares.lines}
    assert drawn["any pair conflicts"].get_ydata().tolist() == [r["conflict"] for r in rows]
    assert drawn["any pair conflicts"].get_xdata().tolist() == [r["steps"] for r in rows]
    assert len([line for line in cosines.lines if " - " in str(line.get_label())]) == 6
    assert [line.get_label() for line in weights.lines] == list(monitor.tasks)
    image = matrix.images[0].get_array()
    assert image[1, 0] == image[0, 1] == total["cosine/b/a"]
    assert np.ma.is_masked(image[0, 0]) or math.isnan(image[0, 0])
    assert f"{total['conflict/b/a']:.0%}" in {t.get_text().split("\n")[-1] for t in matrix.texts}


def test_the_figure_copes_with_many_tasks_one_step_and_no_gramian(tmp_path):
    rows = random(30, 5).numpy()
    many = gathered(report_of({f"a/task with a long name {i}": r for i, r in enumerate(rows)}))
    figure = many.plot()
    figure.savefig(tmp_path / "many.png")
    labels = [str(line.get_label()) for line in figure.axes[1].lines]
    assert sum(" - " in label for label in labels) == 10
    assert all(label.count("a/task") == 2 for label in labels if " - " in label)
    blank = torch.full((2, 2), torch.nan, dtype=torch.float64)
    ones = torch.ones(2, dtype=torch.float64)
    gathered(SurgeryReport(("a", "b"), ones, blank, ones, ones.sum())).plot().savefig(
        tmp_path / "blank.png"
    )


def test_a_figure_of_nothing_is_refused():
    with pytest.raises(RuntimeError, match="at least one step"):
        ConflictMonitor().plot()


def test_without_matplotlib_the_error_says_what_to_install(monitor, monkeypatch):
    for name in [m for m in sys.modules if m.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install agsurgery\[plot\]"):
        monitor.plot()
    assert monitor.to_dict()["steps"] == 50


def test_what_is_not_a_report_is_refused():
    with pytest.raises(TypeError, match=r"must be a SurgeryReport\. Got None.*last micro-batch"):
        ConflictMonitor().update(None)
