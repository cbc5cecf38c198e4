"""benchmarks/against_peers.py and scaling.py: their measures and models on known answers, and quick runs."""

import contextlib
import io
import json
import math
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import _scaling_cells, _scaling_fits, _traps, against_peers, scaling
from benchmarks._scaling_model import (
    OF_SURGERY,
    Fit,
    Machine,
    Operations,
    exchanged,
    fit_exchange,
    predict_step,
)
from benchmarks._traps import Missing, Trap
from benchmarks.figures import scaling as figure

CPU = torch.device("cpu")
ROWS = torch.tensor([[1.0, 0.0], [-1.0, 1.0]], dtype=torch.float64)


def run(main, arguments: list[str]) -> list[str]:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        main(arguments)
    return printed.getvalue().splitlines()


# -- by how much a demand is broken --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("update", "expected"),
    [
        (lambda rows: rows[0], math.sqrt(0.5)),  # the cosine of the two
        (lambda rows: torch.tensor([0.0, 1.0]).double(), 0.0),
        (lambda rows: 1e-12 * rows[0], 0.0),  # rounding
        (lambda rows: math.nan * rows[0], math.inf),
    ],
)
def test_opposition_is_the_cosine_with_the_task_opposed_most(update, expected):
    assert _traps.opposes(update, [ROWS]) == pytest.approx(expected)


def test_shortest_combination_is_optimal_and_the_mean_is_not():
    shortest = torch.tensor([0.2, 0.4], dtype=torch.float64)  # 0.6 g_1 + 0.4 g_2
    assert _traps.not_optimal(lambda rows: shortest, [ROWS]) == pytest.approx(0)
    # The mean (0, 1/2): <g_1, d> = 0.
    assert _traps.not_optimal(lambda rows: rows.mean(0), [ROWS]) == pytest.approx(1)


@pytest.mark.parametrize(
    "measure",
    [
        lambda update: _traps.opposes(update, [ROWS]),
        lambda update: _traps.not_optimal(update, [ROWS]),
        lambda update: _traps.not_fair(update, [ROWS], 1.0),
        lambda update: _traps.unequal_projections(update, ROWS),
        lambda update: _traps.depends_on_order(update, ROWS, 2),
        lambda update: _traps.differs(update, ROWS, ROWS[0]),
    ],
)
def test_an_update_that_is_not_finite_keeps_no_demand(measure):
    assert measure(lambda rows: math.nan * rows[0]) == math.inf


def test_fair_weights_balance_gain_and_weight():
    # Orthogonal gradients: w_i^2 d_i^2 is the same for w = 1 / d.
    rows = torch.tensor([[1.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
    assert _traps.not_fair(lambda r: r[0] + r[1] / 4, [rows], 1.0) == pytest.approx(0)
    assert _traps.not_fair(lambda r: r.sum(0), [rows], 1.0) == pytest.approx(15 / 16)
    assert _traps.not_fair(lambda r: r[0] - r[1], [rows], 1.0) > 0.9


def test_equal_projections_and_order_are_measured():
    bisector = torch.tensor([math.tan(math.pi / 8), 1.0], dtype=torch.float64)
    assert _traps.unequal_projections(lambda rows: bisector, ROWS) == pytest.approx(0)
    assert _traps.unequal_projections(lambda rows: rows[0], ROWS) == pytest.approx(1.7071, abs=1e-4)
    assert _traps.depends_on_order(lambda rows: rows.sum(0), ROWS, 1) == 0
    assert _traps.depends_on_order(lambda rows: rows[0], ROWS, 1) > 1


def test_hidden_infinities_are_found_and_errors_do_not_count_as_hiding():
    def refuses(rows):
        raise ArithmeticError

    infinite = ROWS / torch.tensor([1.0, 0.0])
    assert _traps.hides(lambda rows: rows.nan_to_num().sum(0) * 0, infinite) == 1
    assert _traps.hides(lambda rows: rows.sum(0), infinite) == 0
    assert _traps.hides(refuses, infinite) == 0


def test_change_with_scale_is_relative():
    assert _traps.changes_with_scale(lambda: lambda rows: rows.sum(0), ROWS, 1e-6) < 1e-12
    cut = lambda: lambda rows: rows.sum(0) * (rows.norm() > 0.1)  # noqa: E731
    assert _traps.changes_with_scale(cut, ROWS, 1e-6) == 1


def test_projection_pattern_is_pcgrad_by_hand():
    assert _traps.project(ROWS, [(1,), (0,)]).tolist() == [0.5, 1.5]


def test_verdicts_tell_kept_broken_raised_and_missing_apart():
    def no_package():
        raise Missing("no such package")

    def broken():
        raise ArithmeticError("no answer")

    trap = Trap("t", "pattern", "g", "d", lambda version: version, lambda: 0.0, lambda: 0.5)
    assert against_peers.spring(trap)["reproduced"] is True
    assert against_peers.judge(trap, no_package).keeps(0.01) is None
    failed = against_peers.judge(trap, broken)
    assert failed.keeps(0.01) is False
    assert failed.to_dict(0.01)["error"] == "ArithmeticError: no answer"
    assert against_peers.judge(trap, lambda: math.inf).to_dict(0.01)["not_finite"]


# -- against peers -------------------------------------------------------------------------------------

KEPT = {"unused parameters", "reduction", "small gradients", "infinity"}
"""Of pytorch_optimizer: traps of other wrappers that it does not fall into."""


@pytest.fixture(scope="module")
def peers(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, list[str]]:
    out: Path = tmp_path_factory.mktemp("results") / "peers.json"
    lines = run(against_peers.main, ["--quick", "--out", str(out)])
    return json.loads(out.read_text(encoding="utf-8")), lines


def test_quick_run_answers_in_its_last_line_and_says_where_it_comes_from(peers):
    result, lines = peers
    assert lines[-1] == result["answer"]
    assert result["answer"].startswith("Answer: updates agree to ")
    assert {"commit", "dirty", "machine", "question"} <= set(result)
    assert result["versions"]["torchjd"]


def test_updates_agree_where_all_are_valid(peers):
    rows = [row for row in peers[0]["agreement"] if "missing" not in row]
    # All but TorchJD's NashMTL, where ecos is not installed; the oldest versions are tested without pytorch_optimizer.
    assert len(rows) >= (14 if find_spec("pytorch_optimizer") is None else 15)
    exact = {"Sum", "PCGrad", "GradVac", "ConFIG", "IMTLG", "AlignedMTL", "FairGrad", "NashMTL"}
    for row in rows:
        limit = 1e-4 if row["method"] in exact else 0.05
        assert max(row["difference"].values()) < limit, row


def test_ours_keeps_every_definition(peers):
    for row in peers[0]["traps"]:
        assert row["ours"]["satisfied"] is not False, row
        assert (row["ours"]["missing"] is None) == (
            row["title"].split(":")[0]
            not in ("Krum", "SeparateMomentumOperator", "MomentumLossRecorder")
        )


def test_traps_reproduce_but_for_those_that_the_peer_avoids(peers):
    for row in peers[0]["traps"]:
        kept = row["peer"] == "pytorch_optimizer" and row["title"].split(": ")[1] in KEPT
        if row["theirs"]["missing"] is None:
            assert row["reproduced"] is not kept, row


# -- the model of the cost -------------------------------------------------------------------------------


def test_fit_finds_the_coefficients_it_was_made_with():
    made = dict(zip(OF_SURGERY, (1e-3, 2e-4, 3e-9, 5e-10, 7e-12), strict=True))
    grid = [(k, n) for k in (2, 4, 16, 64) for n in (10**4, 10**5, 10**7)]
    tasks, sizes = zip(*grid, strict=True)
    seconds = np.array([Fit(made).predict(k, n) for k, n in grid])
    found = Fit.of(OF_SURGERY, tasks, sizes, seconds)
    assert found.coefficients == pytest.approx(made, rel=1e-6)
    assert found.predict(2, 1e9) == pytest.approx(1e-3 + 4e-4 + 3 + 1 + 28e-3)
    # A term that would have to be negative is left out.
    falling = Fit.of(OF_SURGERY, tasks, sizes, 1 / np.array(sizes))
    assert min(falling.coefficients.values()) == 0


def test_rates_of_the_exchange_are_found():
    messages, sizes = [3, 3, 9, 9], [1e5, 1e6, 1e5, 1e7]
    added = np.array([1e-4 * m + 2e-9 * b for m, b in zip(messages, sizes, strict=True)])
    rates = fit_exchange(messages, sizes, added, added + 0.01)
    assert rates == pytest.approx([1e-4, 2e-9])
    # A cell in which the exchange is lost in the noise does not decide.
    noisy = added - np.array([5e-4, 0, 0, 0])
    assert fit_exchange(messages, sizes, noisy, noisy + 0.01)[1] == pytest.approx(2e-9, rel=0.1)


def test_volume_is_that_of_the_documentation():
    ratio = {
        k: exchanged(k, 99, 4, "reduce_scatter") / exchanged(k, 99, 4, "all_reduce") for k in (2, 8)
    }
    assert ratio == pytest.approx({2: 0.75, 8: 0.5625})
    assert exchanged(3, 1000, 1, "all_reduce") == 0
    assert exchanged(3, 1000, 2, "all_reduce") == 4 * 3 * 1000


def test_predictions_follow_their_assumptions():
    operations = Operations(100, 2)
    slow = predict_step(Machine(network=1e9), 4, 10**8, 8, operations)["milliseconds"]
    fast = predict_step(Machine(network=2e9), 4, 10**8, 8, operations)["milliseconds"]
    assert slow["exchange"] == pytest.approx(2 * fast["exchange"], rel=1e-3)
    assert {k: v for k, v in slow.items() if k != "exchange"} == {
        k: v for k, v in fast.items() if k != "exchange"
    }
    assert slow["backward"] == pytest.approx(8 * slow["forward"], rel=1e-3)
    assert slow["operations"] == pytest.approx(1e3 * 5e-6 * 500)


def test_held_out_cells_lie_between_and_beyond_the_fitted_ones():
    parts = [[_scaling_fits.part_of(k, n, (2, 4), (10, 20)) for n in (10, 20, 90)] for k in (2, 4)]
    assert parts == [["fit", "between", "beyond"], ["between", "fit", "beyond"]]


def test_what_does_not_fit_in_memory_is_skipped_and_said(monkeypatch):
    monkeypatch.setattr(_scaling_fits, "LIMIT", 4 * 1000 * 7)
    cells, skipped = _scaling_fits.rank_cells((1, 2), (2, 8), (1000,))
    assert [(c["ranks"], c["tasks"]) for c in cells] == [(1, 2)]
    assert len(skipped) == 3


def test_added_operations_grow_with_the_tasks():
    few, many = _scaling_cells.operations(2), _scaling_cells.operations(8)
    assert 0 < few.base < many.base < 1000
    assert 0 <= few.per_tensor <= 4


@pytest.fixture(scope="module")
def scaled(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, list[str], Path]:
    out: Path = tmp_path_factory.mktemp("results") / "scaling.json"
    lines = run(scaling.main, ["--quick", "--out", str(out)])
    return json.loads(out.read_text(encoding="utf-8")), lines, out


def test_quick_scaling_measures_every_cell_and_predicts_those_it_was_not_fitted_on(scaled):
    result, lines, out = scaled
    assert lines[-1] == result["answer"]
    assert {"commit", "dirty", "versions", "machine"} <= set(result)
    assert {cell["part"] for cell in result["cells"]} == {"fit", "between", "beyond"}
    for cell in result["cells"]:
        assert cell["AGS"]["ms"] > 0
        assert cell["AGS"]["model_ms"] > 0
    errors = result["model"]["errors"]["AGS"]
    assert sum(part["cells"] for part in errors.values()) == len(result["cells"])
    assert "<dc:date>" not in out.with_suffix(".svg").read_text(encoding="utf-8")


def test_processes_send_what_the_documentation_says(scaled):
    rows = scaled[0]["ranks"]
    assert [row["ranks"] for row in rows] == [1, 2, 2]
    assert rows[0]["bytes"] == 0
    for row in rows[1:]:
        # Whole chunks of columns: nothing is padded; the rest are losses, K x K numbers and the comparison.
        assert 1 < row["bytes_over_formula"] < 1.01
    assert rows[1]["messages"] < rows[2]["messages"]


def test_figures_are_the_same_file_for_the_same_numbers(scaled, tmp_path):
    result, _, out = scaled
    figure.draw(result, tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_bytes() == out.with_suffix(".svg").read_bytes()


def test_stored_measurements_are_fitted_again_and_other_machines_predicted(scaled, tmp_path):
    result, _, out = scaled
    again = tmp_path / "again.json"
    lines = run(
        scaling.main, ["--refit", str(out), "--network", "1e9", "--quick", "--out", str(again)]
    )
    other = json.loads(again.read_text(encoding="utf-8"))
    assert lines[-1] == result["answer"]
    assert other["model"] == result["model"]
    assert other["predicted"]["assumed"]["network"] == 1e9
    assert other["predicted"]["steps"] != result["predicted"]["steps"]


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        (against_peers, ["--inputs", "0"]),
        (against_peers, ["--peers", "libmtl"]),
        (scaling, ["--rounds", "0"]),
        (scaling, ["--network", "0"]),
    ],
)
def test_wrong_arguments_are_refused(script, arguments):
    with pytest.raises(SystemExit):
        script.main(arguments)
