"""Metrics against hand-computed cases, exhaustive enumeration and scikit-learn; the evaluate step."""

import itertools
import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score

from examples.slam_ags_cytology.errors import UserError
from examples.slam_ags_cytology.evaluate import EvaluateConfig, evaluate
from examples.slam_ags_cytology.metrics import (
    RANKINGS,
    RETRIEVAL_METRICS,
    bag_metrics,
    interval,
    retrieval,
)


def by_enumeration(scores, labels, top_k):
    """Mean of the plain figures over all orders that the scores allow: slow, and obvious."""
    n, m = len(labels), sum(labels)
    k = min(top_k, n)
    totals = []
    for order in itertools.permutations(range(n)):
        ranked = [scores[i] for i in order]
        if ranked != sorted(ranked, reverse=True):
            continue
        found = [labels[i] for i in order]
        at = [i for i in range(n) if found[i]]
        totals.append(
            [
                sum((j + 1) / (i + 1) for j, i in enumerate(at)) / m,
                sum(not found[j] for i in at for j in range(i, n)) / (m * (n - m))
                if m < n
                else math.nan,
                sum(found[:m]) / m,
                sum(found[:m]) / m / (m / n),
                sum(found[:k]) / m,
                sum(found[:k]) / k,
                sum(found[:k]) / k / (m / n),
                at[0] + 1,
            ]
        )
    return dict(zip(RETRIEVAL_METRICS, np.mean(totals, axis=0), strict=True))


@pytest.mark.parametrize(
    ("scores", "labels", "top_k", "expected"),
    [
        # ranked 1 0 1 0
        ([4, 3, 2, 1], [1, 0, 1, 0], 2, (5 / 6, 3 / 4, 1 / 2, 1.0, 1 / 2, 1 / 2, 1.0, 1)),
        # ranked 0 0 1 1
        ([1, 2, 3, 4], [1, 1, 0, 0], 3, (5 / 12, 0.0, 0.0, 0.0, 1 / 2, 1 / 3, 2 / 3, 3)),
        # the reader looks at more cells than there are
        ([1, 2, 3, 4], [1, 1, 0, 0], 400, (5 / 12, 0.0, 0.0, 0.0, 1.0, 1 / 2, 1.0, 3)),
        # perfect
        ([9, 8, 1, 0, 0], [1, 1, 0, 0, 0], 1, (1.0, 1.0, 1.0, 5 / 2, 1 / 2, 1.0, 5 / 2, 1)),
    ],
)
def test_retrieval_of_small_bags_is_what_one_computes_by_hand(scores, labels, top_k, expected):
    found = retrieval(scores, labels, top_k)
    assert tuple(found) == RETRIEVAL_METRICS
    assert tuple(found.values()) == pytest.approx(expected)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1)), min_size=1, max_size=6),
    st.integers(1, 8),
)
def test_ties_count_as_the_mean_over_all_orders(cells, top_k):
    scores, labels = [s for s, _ in cells], [y for _, y in cells]
    if not any(labels):
        labels[0] = 1
    expected = by_enumeration(scores, labels, top_k)
    assert retrieval(scores, labels, top_k) == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize(("n", "m"), [(5, 2), (7, 1), (6, 6), (100, 1), (1000, 5)])
def test_constant_scores_give_the_analytic_chance_level(n, m):
    labels = np.zeros(n, int)
    labels[:m] = 1
    k = max(1, n // 3)
    found = retrieval(np.zeros(n), labels, k)
    harmonic = sum(1 / i for i in range(1, n + 1))
    slope = (m - 1) / (n - 1)
    assert found["recall_at_k"] == pytest.approx(k / n)
    assert found["precision_at_k"] == pytest.approx(m / n)
    assert found["enrichment"] == found["enrichment_at_k"] == pytest.approx(1)
    assert found["cell_auroc"] == pytest.approx(0.5 if m < n else math.nan, nan_ok=True)
    assert found["r_precision"] == pytest.approx(m / n)
    assert found["first_positive"] == pytest.approx((n + 1) / (m + 1))
    assert found["average_precision"] == pytest.approx((slope * (n - harmonic) + harmonic) / n)


def test_the_order_in_which_cells_are_stored_does_not_help():
    first, last = np.r_[1, 1, np.zeros(8)], np.r_[np.zeros(8), 1, 1]
    scores = np.r_[np.ones(5), np.zeros(5)]
    assert retrieval(np.zeros(10), first) == retrieval(np.zeros(10), last)
    assert retrieval(scores, first) != retrieval(scores, last)


@pytest.mark.parametrize("seed", range(5))
def test_average_precision_and_auroc_are_those_of_scikit_learn(seed):
    rng = np.random.default_rng(seed)
    scores, labels = rng.normal(size=200), (rng.random(200) < 0.1).astype(int)
    expected = average_precision_score(labels, scores)
    assert retrieval(scores, labels)["average_precision"] == pytest.approx(expected, rel=1e-12)
    tied = scores.round(1)  # scikit-learn gives half a pair for a tie as well
    expected = roc_auc_score(labels, tied)
    assert retrieval(tied, labels)["cell_auroc"] == pytest.approx(expected, rel=1e-12)


def test_chance_is_the_mean_over_simulated_random_orders():
    labels = np.zeros(60, int)
    labels[:4] = 1
    rng = np.random.default_rng(0)
    found = pd.DataFrame([retrieval(rng.random(60), labels, 15) for _ in range(4000)])
    chance = retrieval(np.zeros(60), labels, 15)
    error = found.std() / math.sqrt(len(found))
    for name in RETRIEVAL_METRICS:  # a wrong formula is off by far more than four standard errors
        assert abs(found[name].mean() - chance[name]) < 4 * error[name], name
        assert error[name] < 0.05 * chance[name], name


@pytest.mark.parametrize(
    ("scores", "labels", "top_k", "match"),
    [
        ([1, math.nan], [1, 0], 1, "1 are NaN"),
        ([1, 2], [0, 0], 1, "at least one 1"),
        ([1, 2], [1, -1], 1, "0 or 1"),
        ([1, 2], [1], 1, r"must be \(n,\)"),
        ([[1, 2]], [[1, 0]], 1, r"must be \(n,\)"),
        ([1, 2], [1, 0], 0, "`top_k` must be at least 1"),
    ],
)
def test_retrieval_refuses(scores, labels, top_k, match):
    with pytest.raises(ValueError, match=match):
        retrieval(scores, labels, top_k)


def test_bag_metrics_of_a_small_case():
    # called 0 1 1 1: two true positives, one false positive, no miss
    found = bag_metrics([0, 0, 1, 1], [0.2, 0.6, 0.5, 0.9], 0.5)
    assert found["bag_f1"] == pytest.approx(4 / 5)
    assert found["bag_auroc"] == pytest.approx(3 / 4)
    assert found["bag_balanced_accuracy"] == pytest.approx(3 / 4)
    assert found["bag_accuracy"] == pytest.approx(3 / 4)
    assert found["bag_f1_all_positive"] == pytest.approx(2 / 3)


def test_bags_of_one_label_have_no_auroc():
    found = bag_metrics([1, 1], [0.2, 0.6], 0.5)
    assert math.isnan(found["bag_auroc"])
    assert math.isnan(found["bag_balanced_accuracy"])
    assert found["bag_accuracy"] == 0.5


def test_interval_is_students_t():
    found = interval([1.0, 2.0, 3.0, math.nan])
    half = 4.302652729911275 / math.sqrt(3)  # t table: two degrees of freedom, 97.5 %
    assert found == pytest.approx({"mean": 2.0, "low": 2 - half, "high": 2 + half, "n": 3})
    assert interval([0.5]) == {"mean": 0.5, "low": None, "high": None, "n": 1}
    assert interval([math.nan]) == {"mean": None, "low": None, "high": None, "n": 0}


# --- the step ------------------------------------------------------------------------------------------


def write_results(out, arm="ags", seed=0, truth=True, fingerprint="f", bags=("n", "p"), value=None):
    """Results of four bags of four cells in val and test; cell 0 of positive bags is abnormal."""
    folder = out / "mil" / arm / f"seed{seed}"
    folder.mkdir(parents=True)
    rows, cells = [], []
    for split in ("val", "test"):
        for i, name in enumerate(bags):
            bag = f"{split}-{name}"
            rows.append((bag, split, i, 0.3 + 0.4 * i, 0.5))
            for j in range(4):
                label = int(j == 0 and i == 1) if truth else -1
                # attention finds it last, instance_score first, the others cannot tell
                scores = (j / 6, 1.0 - j, 7.0, 7.0) if value is None else (value,) * 4
                cells.append((bag, split, i, f"cells/{bag}{j}.png", label, "NA", *scores))
    columns = ["bag", "split", "label", "probability", "threshold"]
    pd.DataFrame(rows, columns=columns).to_csv(folder / "bags.csv", index=False)
    columns = [*columns[:3], "path", "instance_label", "class_name", *RANKINGS]
    pd.DataFrame(cells, columns=columns).to_csv(folder / "instances.csv", index=False)
    torch.save({"fingerprint": fingerprint}, folder / "model.pt")


def write_status(out, arm, text):
    folder = out / "pretrain" / arm
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "status.json").write_text(text)


def read(out):
    summary = json.loads((out / "evaluate" / "summary.json").read_text())
    return summary, pd.read_csv(out / "evaluate" / "metrics.csv")


def test_every_arm_seed_and_split_has_a_row_with_chance_beside_it(tmp_path):
    for arm, seed in itertools.product(("ags", "sum"), (0, 1)):
        write_results(tmp_path, arm, seed)
    assert evaluate(EvaluateConfig(tmp_path)) == tmp_path / "evaluate" / "summary.json"
    summary, metrics = read(tmp_path)
    assert len(metrics) == 2 * 2 * 2
    row = metrics[metrics["split"] == "test"].iloc[0]
    assert row["bag_auroc"] == row["bag_f1"] == 1
    assert row["average_precision_attention"] == 0.25
    assert row["average_precision_instance_score"] == row["recall_at_k_instance_score"] == 1
    assert row["average_precision_distance"] == row["average_precision_random"]
    assert row["average_precision_random"] == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4) / 4)
    assert row["r_precision_random"] == row["precision_at_k_random"] == row["witness_rate"] == 0.25
    assert row["recall_at_k_random"] == row["capped_bags"] == 1  # 400 cells are more than there are
    assert row["first_positive_random"] == 2.5
    assert row["enrichment_instance_score"] == 4
    found = summary["arms"]["ags"]["metrics"]["test"]["average_precision_attention"]
    assert found == {"mean": 0.25, "low": 0.25, "high": 0.25, "n": 2}
    assert summary["default_ranking"] == "instance_score"


def test_rankings_that_ignore_the_seed_have_no_interval(tmp_path):
    for seed in (0, 1, 2):
        write_results(tmp_path, seed=seed)
    evaluate(EvaluateConfig(tmp_path))
    found = read(tmp_path)[0]["arms"]["ags"]["metrics"]["test"]
    repetitions = {key: found[f"average_precision_{key}"]["n"] for key in RANKINGS}
    assert repetitions == {"attention": 3, "instance_score": 3, "slide_label": 1, "distance": 1}
    assert found["average_precision_distance"]["low"] is None


def test_a_collapsed_arm_is_marked_in_the_summary_and_in_print(tmp_path, capsys):
    for arm in ("ags", "random", "sum"):
        write_results(tmp_path, arm)
    write_status(tmp_path, "ags", '{"collapsed": false, "reason": "", "std": NaN}')
    write_status(tmp_path, "sum", '{"collapsed": true, "reason": "contrast at chance."}')
    evaluate(EvaluateConfig(tmp_path))
    summary, _ = read(tmp_path)
    assert {k: v["collapsed"] for k, v in summary["arms"].items()} == {
        "ags": False,
        "random": None,  # pretraining left no word
        "sum": True,
    }
    assert summary["arms"]["sum"]["reason"] == "contrast at chance."
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("sum COLLAPSED ") for line in lines)
    assert "COLLAPSED: sum: contrast at chance." in lines[-1]
    assert not any("COLLAPSED" in line for line in lines if line.startswith(("ags", "random")))


def test_without_labels_of_cells_rankings_have_no_figures_and_bags_still_do(tmp_path, capsys):
    write_results(tmp_path, truth=False)
    evaluate(EvaluateConfig(tmp_path))
    summary, metrics = read(tmp_path)
    assert metrics[[f"average_precision_{r}" for r in RANKINGS]].isna().all(axis=None)
    assert (metrics["bag_auroc"] == 1).all()
    assert summary["splits"]["test"]["average_precision_random"] is None
    assert summary["arms"]["ags"]["metrics"]["test"]["recall_at_k_attention"]["mean"] is None
    assert summary["default_ranking"] == "instance_score"
    assert " - " in capsys.readouterr().out


def test_a_bag_with_some_unknown_cells_is_left_out_of_the_searches(tmp_path):
    write_results(tmp_path)
    path = tmp_path / "mil" / "ags" / "seed0" / "instances.csv"
    frame = pd.read_csv(path, keep_default_na=False)
    frame.loc[(frame["bag"] == "test-p").idxmax() + 2, "instance_label"] = -1
    frame.to_csv(path, index=False)
    evaluate(EvaluateConfig(tmp_path))
    _, metrics = read(tmp_path)
    assert metrics.set_index("split")["searched_bags"].to_dict() == {"val": 1, "test": 0}


def test_top_k_is_capped_at_the_bag_and_both_ks_are_given(tmp_path):
    write_results(tmp_path)
    evaluate(EvaluateConfig(tmp_path, top_k=3))
    summary, metrics = read(tmp_path)
    assert (metrics["recall_at_k_attention"] == 0).all()  # the abnormal cell is the last of four
    assert summary["splits"]["test"]["capped_bags"] == 0
    evaluate(EvaluateConfig(tmp_path))
    summary, metrics = read(tmp_path)
    assert summary["splits"]["test"]["capped_bags"] == 1
    assert (metrics["recall_at_k_attention"] == 1).all()
    assert (metrics["recall_at_k_random"] == 1).all()
    assert (metrics["r_precision_attention"] == 0).all()
    assert summary["top_k"] == 400


def test_the_default_ranking_is_chosen_without_test_bags(tmp_path):
    write_results(tmp_path)
    path = tmp_path / "mil" / "ags" / "seed0" / "instances.csv"
    frame = pd.read_csv(path, keep_default_na=False)
    test = frame["split"] == "test"
    frame.loc[test, "attention"] = -frame.loc[test, "attention"]  # now best, on test bags only
    frame.loc[test, "instance_score"] = -frame.loc[test, "instance_score"]
    frame.to_csv(path, index=False)
    evaluate(EvaluateConfig(tmp_path))
    assert read(tmp_path)[0]["default_ranking"] == "instance_score"


def break_nothing(out):
    """Nothing is wrong but the setting."""


def other_fingerprint(out):
    write_results(out, seed=1, fingerprint="g")


def other_bags(out):
    write_results(out, "sum", bags=("n", "q"))


def nan_score(out):
    write_results(out, "sum", value=math.nan)


def infinite_score(out):
    write_results(out, "sum", value=math.inf)


def no_table(out):
    (out / "mil" / "ags" / "seed0" / "bags.csv").unlink()


def no_column(out):
    path = out / "mil" / "ags" / "seed0" / "instances.csv"
    pd.read_csv(path).drop(columns="distance").to_csv(path, index=False)


def broken_status(out):
    write_status(out, "ags", '{"reason": "?"}')


@pytest.mark.parametrize(
    ("damage", "changes", "match"),
    [
        (break_nothing, {"top_k": 0}, "`top_k` must be at least 1"),
        (break_nothing, {"arms": ("sum",)}, "results of sum. Found ags"),
        (other_fingerprint, {}, "All seeds of arm 'ags'"),
        (other_bags, {}, "same bags. sum, seed 0 and ags, seed 0 differ in 4"),
        (nan_score, {}, "must be finite"),
        (infinite_score, {}, "must be finite"),
        (no_table, {}, r"bags\.csv must be a table"),
        (no_column, {}, r"instances\.csv must be a table"),
        (broken_status, {}, "must say whether pretraining collapsed"),
    ],
)
def test_evaluate_refuses(tmp_path, damage, changes, match):
    write_results(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=match):
        evaluate(EvaluateConfig(tmp_path, **changes))
