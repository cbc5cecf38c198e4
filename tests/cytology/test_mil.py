"""Gated attention, its training, and the three scores of cells."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

from examples.slam_ags_cytology.attention import GatedAttention, NormalCells
from examples.slam_ags_cytology.embeddings import Bag, bag_path, write_bag
from examples.slam_ags_cytology.errors import UserError
from examples.slam_ags_cytology.metrics import RANKINGS, choose_threshold
from examples.slam_ags_cytology.mil import MilConfig, mil, train_mil
from examples.slam_ags_cytology.prototypes import Terms
from examples.slam_ags_cytology.results import read_fingerprint
from examples.slam_ags_cytology.single import SlideLabels

FAST = {"epochs": 12, "patience": 10, "lr": 4e-3, "hidden": 32}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Products this small only wait for a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_bags(shift=5.0, counts=(16, 8, 20), n=40, d=12, seed=0):
    """Bags of normal noise; in positive ones 10 % of the cells are shifted along one direction.

    Columns have means and scales of very different sizes, as the features of real encoders do.
    """
    rng = np.random.default_rng(seed)
    direction = rng.normal(size=d)
    direction /= np.linalg.norm(direction)
    scale, offset = np.exp(2 * rng.normal(size=d)), 10 * rng.normal(size=d)
    bags = []
    for split, count in zip(("train", "val", "test"), counts, strict=True):
        for i in range(count):
            truth = np.zeros(n, np.int8)
            truth[: (n // 10) * (i % 2)] = 1
            truth = rng.permutation(truth)
            x = rng.normal(size=(n, d)) + shift * truth[:, None] * direction
            features = (x * scale + offset).astype(np.float32)
            paths = np.array([f"cells/{split}{i}_{j}.png" for j in range(n)], object)
            classes = np.array(["BLA" if t else "LYT" for t in truth], object)
            bags.append(Bag(f"{split}-{i:02d}", i % 2, split, features, paths, truth, classes))
    return bags


def write_all(out, bags, arm="ags", source="s"):
    for bag in bags:
        write_bag(bag_path(out / "embed" / arm, bag.name), bag, source=source)


def results(out, arm="ags", seed=0):
    folder = out / "mil" / arm / f"seed{seed}"
    return pd.read_csv(folder / "bags.csv"), pd.read_csv(folder / "instances.csv")


def auroc_on_test(bags):
    test = bags[bags["split"] == "test"]
    return roc_auc_score(test["label"], test["probability"])


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A finished run on bags with a planted shift."""
    out = tmp_path_factory.mktemp("planted")
    write_all(out, make_bags())
    mil(MilConfig(out, seeds=(0, 1), **FAST))
    return out


@pytest.mark.parametrize("seed", [0, 1])
def test_a_planted_shift_at_ten_percent_is_learnt(planted, seed):
    bags, instances = results(planted, seed=seed)
    assert auroc_on_test(bags) > 0.9
    cells = instances[(instances["split"] == "test") & (instances["label"] == 1)]
    for score in ("instance_score", "slide_label", "distance"):
        found = [
            average_precision_score(bag["instance_label"], bag[score])
            for _, bag in cells.groupby("bag")
        ]
        assert np.mean(found) > 0.6, score  # chance is 0.14


def test_noise_is_not_learnt(tmp_path):
    # 60 test bags: an AUROC beyond 0.5 +- 0.25 has a probability below 0.001 by chance.
    write_all(tmp_path, make_bags(shift=0.0, counts=(16, 8, 60)))
    mil(MilConfig(tmp_path, seeds=(0,), **FAST | {"epochs": 6}))
    bags, instances = results(tmp_path)
    assert 0.25 < auroc_on_test(bags) < 0.75
    cells = instances[(instances["split"] == "test") & (instances["label"] == 1)]
    for score in ("attention", "instance_score", "slide_label", "distance"):
        assert abs(roc_auc_score(cells["instance_label"], cells[score]) - 0.5) < 0.15, score


def test_attention_of_a_bag_sums_to_one_and_all_columns_are_there(planted):
    bags, instances = results(planted)
    assert list(bags) == ["bag", "split", "label", "probability", "threshold"]
    assert list(instances) == [
        *("bag", "split", "label", "path", "instance_label", "class_name"),
        *("attention", "instance_score", "slide_label", "distance"),
    ]
    np.testing.assert_allclose(instances.groupby("bag")["attention"].sum(), 1, rtol=1e-6)
    assert set(instances["split"]) == {"train", "val", "test"}


def test_the_bag_logit_is_the_attention_weighted_mean_of_the_cell_scores(planted):
    bags, instances = results(planted)
    weighted = instances["attention"] * instances["instance_score"]
    logits = weighted.groupby(instances["bag"]).sum()
    expected = 1 / (1 + np.exp(-logits[bags["bag"]].to_numpy()))
    np.testing.assert_allclose(bags["probability"], expected, rtol=1e-4)


def test_a_cell_score_is_the_logit_of_a_bag_of_this_cell():
    torch.manual_seed(0)
    model = GatedAttention(torch.zeros(5), torch.ones(5), hidden=8).eval()
    features = torch.randn(4, 5)
    _, _, alone = model(features)
    for i in range(4):
        logit, attention, _ = model(features[i : i + 1])
        torch.testing.assert_close(logit, alone[i])
        assert attention.tolist() == [1.0]


def test_the_gated_attention_is_that_of_the_paper():
    torch.manual_seed(0)
    model = GatedAttention(torch.full((5,), 2.0), torch.full((5,), 3.0), hidden=8).eval()
    features = torch.randn(6, 5)
    h = torch.relu((features - 2) / 3 @ model.embed[1].weight.T + model.embed[1].bias)
    v = torch.tanh(h @ model.value.weight.T + model.value.bias)
    u = 1 / (1 + torch.exp(-(h @ model.gate.weight.T + model.gate.bias)))
    e = torch.exp((v * u) @ model.weigh.weight[0])  # the bias cancels in the softmax
    logit, attention, _ = model(features)
    torch.testing.assert_close(attention, e / e.sum())
    pooled = (attention[:, None] * h).sum(0)
    torch.testing.assert_close(logit, pooled @ model.classify.weight[0] + model.classify.bias[0])


def test_statistics_are_those_of_train_cells_and_travel_in_the_model(planted):
    train = np.concatenate([bag.features for bag in make_bags() if bag.split == "train"])
    state = torch.load(planted / "mil" / "ags" / "seed0" / "model.pt", weights_only=True)["state"]
    np.testing.assert_allclose(state["mean"], train.mean(0), rtol=1e-4)
    np.testing.assert_allclose(state["std"], train.std(0), rtol=1e-4)


def test_a_linear_change_of_units_changes_nothing(tmp_path):
    bags = make_bags(counts=(6, 4, 4))
    scaled = [dataclasses.replace(bag, features=bag.features * 64 + 32) for bag in bags]
    write_all(tmp_path, bags, "a")
    write_all(tmp_path, scaled, "b")
    mil(MilConfig(tmp_path, seeds=(0,), epochs=3))
    a, b = results(tmp_path, "a")[1], results(tmp_path, "b")[1]
    for score in ("attention", "instance_score", "slide_label", "distance"):
        np.testing.assert_allclose(a[score], b[score], rtol=2e-2, atol=2e-2)


def test_constant_features_of_a_collapsed_encoder_give_finite_equal_scores(tmp_path):
    bags = [
        dataclasses.replace(bag, features=np.full_like(bag.features, 0.1))
        for bag in make_bags(counts=(4, 4, 4))
    ]
    write_all(tmp_path, bags)
    mil(MilConfig(tmp_path, seeds=(0,), epochs=3))
    bags_found, instances = results(tmp_path)
    assert np.isfinite(instances[list(RANKINGS)]).all(axis=None)
    assert instances["distance"].nunique() == instances["slide_label"].nunique() == 1
    assert bags_found["probability"].nunique() == 1


# --- distance --------------------------------------------------------------------------------------


def test_the_distance_is_fitted_on_cells_of_negative_train_bags_only(tmp_path):
    bags = make_bags(counts=(6, 4, 4))
    write_all(tmp_path, bags, "a")
    moved = [
        # The train statistics must stay, hence cells of a positive train bag change places.
        dataclasses.replace(bag, features=bag.features[::-1].copy())
        if bag.split == "train" and bag.label
        else bag
        for bag in bags
    ]
    write_all(tmp_path, moved, "b")
    mil(MilConfig(tmp_path, seeds=(0,), epochs=1, distance="euclidean"))
    a, b = results(tmp_path, "a")[1], results(tmp_path, "b")[1]
    negative = (a["split"] == "train") & (a["label"] == 0)
    np.testing.assert_allclose(a.loc[negative, "distance"], b.loc[negative, "distance"], rtol=1e-6)
    train = np.concatenate([x.features for x in bags if x.split == "train"]).astype(float)
    normal = np.concatenate([x.features for x in bags if x.split == "train" and not x.label])
    centre = normal.astype(float).mean(0)
    last = next(bag for bag in bags if bag.name == "test-03")
    expected = np.linalg.norm((last.features - centre) / train.std(0), axis=1)
    np.testing.assert_allclose(a.loc[a["bag"] == "test-03", "distance"], expected, rtol=1e-5)


def test_mahalanobis_measures_in_units_of_the_normal_spread():
    rng = np.random.default_rng(0)
    normal = rng.normal(size=(20_000, 2)) * [1.0, 10.0] + [3.0, -3.0]
    probes = np.array([[4.0, -3.0], [3.0, 7.0]])  # one standard deviation away, either way
    found = NormalCells(normal, "mahalanobis").distance(probes)
    np.testing.assert_allclose(found, 1.0, rtol=0.05)  # a sample, and a little shrinkage
    plain = NormalCells(normal, "euclidean").distance(probes)
    np.testing.assert_allclose(plain, [1.0, 10.0], rtol=0.1)


def test_more_dimensions_than_normal_cells_give_a_finite_distance():
    rng = np.random.default_rng(0)
    cells = NormalCells(rng.normal(size=(20, 50)))
    far = cells.distance(rng.normal(size=(5, 50)) + 3)
    near = cells.distance(rng.normal(size=(5, 50)))
    assert np.isfinite(far).all()
    assert far.min() > near.max()


# --- slide labels for cells -------------------------------------------------------------------------


def test_slide_labels_point_from_normal_to_abnormal_cells_in_units_of_their_spread():
    # A tenth of the cells of positive bags is moved by `shift`; cells vary 20 times more along one axis than another.
    rng = np.random.default_rng(0)
    spread, shift = np.array([1.0, 20.0, 2.0]), np.array([2.0, 4.0, -1.0])
    bags, scaled = [], []
    for i in range(40):
        x = spread * rng.normal(size=(500, 3))
        x[:50] += shift * (i % 2)
        paths = np.array([""] * 500, object)
        bags.append(
            Bag(f"b{i}", i % 2, "train", x.astype(np.float32), paths, np.zeros(500, np.int8), paths)
        )
        scaled.append(x)
    found = SlideLabels(bags, scaled)
    # The rate times the shift, and the spread within the groups, to which the mixture adds a little.
    within = np.diag(spread**2) + 0.5 * 0.1 * 0.9 * np.outer(shift, shift)
    expected = np.linalg.solve(within, 0.1 * shift)
    cosine = found.weights @ expected / np.linalg.norm(found.weights) / np.linalg.norm(expected)
    assert cosine > 0.99
    assert np.linalg.norm(found.weights) == pytest.approx(np.linalg.norm(expected), rel=0.15)
    middle = 0.05 * shift
    assert abs(float(found.score(middle[None])[0])) < 0.02
    # Other splits play no part.
    bags[0] = dataclasses.replace(bags[0], split="test")
    without = SlideLabels(bags, [x + 1e3 * (i == 0) for i, x in enumerate(scaled)])
    np.testing.assert_allclose(without.weights, found.weights, rtol=0.2, atol=2e-3)


def test_labels_of_cells_play_no_part_in_any_score(tmp_path):
    bags = make_bags(counts=(4, 4, 2))
    write_all(tmp_path, bags, "a")
    blind = [dataclasses.replace(bag, instance_label=np.full(40, -1, np.int8)) for bag in bags]
    write_all(tmp_path, blind, "b")
    mil(MilConfig(tmp_path, seeds=(0,), epochs=2))
    a, b = results(tmp_path, "a")[1], results(tmp_path, "b")[1]
    for score in RANKINGS:
        assert np.array_equal(a[score], b[score]), score


# --- choice of epoch and threshold -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "probabilities", "expected"),
    [
        ([0, 0, 1, 1], [0.1, 0.2, 0.8, 0.9], 0.5),
        ([0, 0, 1, 1], [0.6, 0.7, 0.8, 0.9], 0.75),
        ([0, 1], [0.1, 0.3], 0.2),
        ([0, 1], [0.5, 0.5], 0.5),
        ([1, 0], [0.2, 0.8], 0.5),  # nothing helps: stay
    ],
)
def test_threshold_separates_validation_bags_and_stays_near_a_half(labels, probabilities, expected):
    assert choose_threshold(labels, probabilities) == pytest.approx(expected)


def fit(train_bags, val_bags, **changes):
    config = MilConfig(out=None, **(FAST | changes))
    parts = [
        ([torch.from_numpy(bag.features) for bag in bags], [bag.label for bag in bags])
        for bags in (train_bags, val_bags)
    ]
    cells = torch.cat(parts[0][0])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GatedAttention(cells.mean(0), cells.std(0), config.hidden, config.dropout)
    return model, train_mil(model, *parts, config, seed=0), parts


def split_of(bags, split):
    return [bag for bag in bags if bag.split == split]


def test_the_weights_kept_are_those_of_the_lowest_validation_loss():
    bags = make_bags(counts=(8, 8, 0))
    # Wrong labels in validation: the loss there rises while the train loss falls.
    wrong = [dataclasses.replace(bag, label=1 - bag.label) for bag in split_of(bags, "val")]
    model, log, (_, val) = fit(split_of(bags, "train"), wrong, patience=100)
    assert log["train_loss"].iloc[-1] < log["train_loss"].iloc[0]
    assert log["val_loss"].idxmin() < len(log) - 1
    model.eval()
    with torch.no_grad():
        logits = torch.stack([model(x)[0] for x in val[0]])
    loss = torch.nn.functional.binary_cross_entropy_with_logits(
        logits, torch.tensor(val[1]).float()
    )
    assert float(loss) == pytest.approx(log["val_loss"].min(), rel=1e-5)


def test_among_equal_epochs_the_earliest_wins_and_patience_ends_the_training():
    bags = make_bags(counts=(4, 4, 0))
    flat = [dataclasses.replace(b, features=np.zeros_like(b.features)) for b in bags]
    model, log, _ = fit(split_of(flat, "train"), split_of(flat, "val"), lr=1e-30, patience=4)
    assert log["val_loss"].nunique() == 1
    assert len(log) == 1 + 4
    assert model.classify.weight.requires_grad


def test_training_leaves_the_global_generator_alone_and_repeats_itself():
    bags = make_bags(counts=(4, 4, 0))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, log, _ = fit(split_of(bags, "train"), split_of(bags, "val"), epochs=2)
    torch.set_rng_state(before)
    torch.rand(7)  # another place in the global stream must not matter
    after = torch.get_rng_state()
    second, again, _ = fit(split_of(bags, "train"), split_of(bags, "val"), epochs=2)
    pd.testing.assert_frame_equal(log, again)
    assert torch.equal(first.classify.weight, second.classify.weight)
    assert torch.equal(torch.get_rng_state(), after)
    assert not torch.equal(before, after)


def test_seeds_differ_and_the_distance_does_not(planted):
    (_, first), (_, second) = results(planted, seed=0), results(planted, seed=1)
    assert not np.allclose(first["instance_score"], second["instance_score"])
    for score in ("distance", "slide_label"):
        assert np.array_equal(first[score], second[score])


# --- running again -----------------------------------------------------------------------------------


def model_times(out):
    return {p.parent.name: p.stat().st_mtime_ns for p in out.glob("mil/ags/seed*/model.pt")}


def test_what_is_current_is_kept_and_what_is_not_is_trained_again(tmp_path):
    bags = make_bags(counts=(4, 4, 2))
    write_all(tmp_path, bags)
    config = MilConfig(tmp_path, seeds=(0, 1), epochs=2)
    mil(config)
    first = model_times(tmp_path)
    mil(dataclasses.replace(config, seeds=(0, 1, 2)))
    second = model_times(tmp_path)
    assert {k: second[k] for k in first} == first
    assert set(second) == {"seed0", "seed1", "seed2"}
    (tmp_path / "mil" / "ags" / "seed0" / "instances.csv").unlink()
    (tmp_path / "mil" / "ags" / "seed1" / "model.pt").write_bytes(b"half")
    mil(dataclasses.replace(config, seeds=(0, 1, 2)))
    third = model_times(tmp_path)
    assert [third[k] != second[k] for k in sorted(third)] == [True, True, False]
    mil(dataclasses.replace(config, lr=1e-4))
    assert model_times(tmp_path)["seed0"] != third["seed0"]
    fingerprint = read_fingerprint(tmp_path / "mil" / "ags" / "seed0")
    write_all(tmp_path, [dataclasses.replace(bags[0], features=bags[0].features + 1)])
    mil(dataclasses.replace(config, lr=1e-4))
    assert read_fingerprint(tmp_path / "mil" / "ags" / "seed0") != fingerprint


def test_an_interrupted_training_is_not_taken_for_a_finished_one(tmp_path, monkeypatch):
    write_all(tmp_path, make_bags(counts=(4, 4, 2)))
    config = MilConfig(tmp_path, seeds=(0,), epochs=2)
    mil(config)

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        mil(dataclasses.replace(config, epochs=3))
    monkeypatch.undo()
    assert not model_times(tmp_path)  # new tables, and no old model that vouches for them
    mil(config)
    assert model_times(tmp_path)


# --- refusals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "match"),
    [
        (lambda bag: bag.split != "val", "val split of arm 'ags'.* Found no bags"),
        (lambda bag: bag.split != "val" or bag.label, r"val split .* Found labels \[1\]"),
        (lambda bag: bag.split != "train" or not bag.label, r"train split .* Found labels \[0\]"),
    ],
)
def test_mil_refuses_splits_without_both_labels(tmp_path, keep, match):
    write_all(tmp_path, [bag for bag in make_bags(counts=(4, 4, 2)) if keep(bag)])
    with pytest.raises(UserError, match=match):
        mil(MilConfig(tmp_path))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"lr": 0.0}, "`lr` must be positive"),
        ({"lr": float("nan")}, "`lr` must be positive"),
        ({"dropout": 1.0}, "`dropout` must be at least 0 and below 1"),
        ({"weight_decay": -1.0}, "`weight_decay`"),
        ({"epochs": 0}, "`epochs`"),
        ({"patience": 0}, "`patience`"),
        ({"hidden": 1}, "`hidden`"),
        ({"seeds": ()}, "`seeds`"),
        ({"seeds": (-1,)}, "`seeds`"),
        ({"distance": "cosine"}, "mahalanobis or euclidean"),
        ({"aggregator": "mean"}, "`aggregator` must be abmil or pamil"),
        ({"prototypes": 0}, "`prototypes` must be at least 1"),
        ({"prototype_init": "zeros"}, "kmeans or normal"),
        ({"terms": Terms(clustering=-1.0)}, "`terms` must be weights of 0 or more"),
        ({"terms": Terms(instances=0)}, "instances at least 1"),
        ({"freeze": ("trunk",), "aggregator": "pamil"}, "`freeze` must be some of prototypes"),
        ({"freeze": ("prototypes",)}, "only the aggregator pamil has"),
        ({"freeze": ("embed",)}, "must not hold random weights fixed. Without `start`, embed"),
        ({"freeze_epochs": -1}, "`freeze_epochs`"),
        ({"arms": ("sum",)}, "results of sum. Found ags"),
        ({"device": "tpu9"}, "`device`"),
        ({"lr": 1e30}, "validation loss must be finite"),
    ],
)
def test_mil_refuses(tmp_path, changes, match):
    write_all(tmp_path, make_bags(counts=(4, 4, 2)))
    with pytest.raises(UserError, match=match):
        mil(MilConfig(tmp_path, **({"epochs": 2} | changes)))


def test_mil_without_embeddings_says_what_to_run(tmp_path):
    with pytest.raises(UserError, match="Found nothing"):
        mil(MilConfig(tmp_path))
