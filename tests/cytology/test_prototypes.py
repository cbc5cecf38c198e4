"""Attention to prototypes (PAMIL), starts from other models, and freezing."""

import dataclasses
import math

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.metrics import average_precision_score
from torch.nn import functional as F

from examples.slam_ags_cytology.errors import UserError
from examples.slam_ags_cytology.metrics import RANKINGS
from examples.slam_ags_cytology.mil import MilConfig, mil, train_mil
from examples.slam_ags_cytology.prototypes import PrototypeAttention, Terms, first_prototypes

from .test_mil import FAST, auroc_on_test, make_bags, model_times, one_thread, results, write_all

__all__ = ["one_thread"]

D, P, H = 5, 3, 8


def make_model(seed=0, **terms):
    torch.manual_seed(seed)
    prototypes = torch.randn(P, D)
    mean, std = torch.full((D,), 2.0), torch.full((D,), 3.0)
    return PrototypeAttention(mean, std, prototypes, H, 0.0, Terms(**terms)).double().eval()


def by_hand(model, x):
    """Attention rows, logits of both branches, affinity: one number after the other."""
    weight = dict(model.named_parameters())
    n = len(x)

    def unit(v):
        h = torch.relu(weight["embed.0.weight"] @ v + weight["embed.0.bias"])
        return h / h.norm()

    cells = [unit((row - 2) / 3) for row in x]
    prototypes = [unit(row) for row in model.prototypes]
    affinity = torch.zeros(n, P, dtype=torch.float64)
    for i, h in enumerate(cells):
        gate = torch.sigmoid(weight["of_cell.weight"] @ h + weight["of_cell.bias"])
        for k, q in enumerate(prototypes):
            value = torch.tanh(weight["of_prototype.weight"] @ q + weight["of_prototype.bias"])
            affinity[i, k] = gate @ value
    rows, bag = [], []
    for c in (0, 1):
        raw = [weight["attend.weight"][c] @ a for a in affinity]  # the bias cancels
        e = torch.stack(raw).exp()
        rows.append(e / e.sum())
        pooled = sum(a * h for a, h in zip(rows[c], cells, strict=True))
        head = model.classify[c]
        direction = head.weight[0]
        bag.append(direction @ (pooled / pooled.norm()) + head.bias[0])
    score = torch.stack([affinity[:, k].max() for k in range(P)]).exp()
    mixed = sum(s * q for s, q in zip(score / score.sum(), prototypes, strict=True))
    branch = weight["by_prototypes.weight"] @ mixed + weight["by_prototypes.bias"]
    return torch.stack(rows), torch.stack(bag), branch, affinity, torch.stack(cells)


@pytest.mark.parametrize("branch", [0.0, 0.1])
def test_the_forward_pass_is_that_of_the_definition(branch):
    model = make_model(prototype=branch)
    x = 3 * torch.randn(6, D, dtype=torch.float64) + 2
    rows, bag, prototype, _, _ = by_hand(model, x)
    logits = (bag + prototype) / 2 if branch else bag
    logit, attention, _ = model(x)
    torch.testing.assert_close(attention, rows[1])
    torch.testing.assert_close(logit, logits[1] - logits[0])


@pytest.mark.parametrize("branch", [0.0, 0.1])
def test_a_cell_score_is_the_logit_of_a_bag_of_this_cell(branch):
    model = make_model(prototype=branch)
    x = torch.randn(4, D, dtype=torch.float64)
    _, _, alone = model(x)
    for i in range(4):
        logit, attention, _ = model(x[i : i + 1])
        torch.testing.assert_close(logit, alone[i])
        assert attention.tolist() == [1.0]


@pytest.mark.parametrize("label", [0, 1])
def test_each_term_of_the_loss_is_that_of_the_definition(label):
    x = 3 * torch.randn(7, D, dtype=torch.float64) + 2
    target = torch.tensor(float(label), dtype=torch.float64)
    terms = {"clustering": 0.3, "prototype": 0.7, "instance": 0.5, "instances": 2}
    model = make_model(**terms)
    rows, bag, prototype, affinity, cells = by_hand(model, x)
    mixed = (bag + prototype) / 2
    expected = F.cross_entropy(mixed[None], torch.tensor([label]))
    share = affinity.softmax(1)
    expected += 0.3 * (1 - share.max(1).values.mean() + 1 - share.max(0).values.mean())
    p, q = prototype.softmax(0), bag.softmax(0)
    expected += 0.7 * (p * (p / q).log()).sum()
    order = rows[label].argsort(descending=True)  # the row of its own class
    head = model.by_cell[label]
    ends = [F.cross_entropy(head(cells[i])[None], torch.tensor([1])) for i in order[:2]]
    ends += [F.cross_entropy(head(cells[i])[None], torch.tensor([0])) for i in order[-2:]]
    expected += 0.5 * torch.stack(ends).mean()
    torch.testing.assert_close(model.loss(x, target), expected)


def test_the_order_of_prototypes_is_kept_when_all_scores_are_negative():
    model = make_model(prototype=0.1)
    with torch.no_grad():
        model.of_prototype.bias.fill_(-3.0)  # tanh near -1: all affinities below 0
        model.of_prototype.weight.mul_(0.2)
    found, prototypes = model._pass(torch.randn(6, D, dtype=torch.float64))
    assert (found.affinity < 0).all()
    highest = found.affinity.amax(0)
    weights = highest.softmax(0)
    assert weights.argmax() == highest.argmax()
    branch = model.by_prototypes(weights @ prototypes)
    torch.testing.assert_close(found.prototype, branch)
    published = (highest / highest.max()).softmax(0)
    assert published.argmax() != highest.argmax()  # the error that is avoided


def test_first_prototypes_are_centres_of_clusters():
    rng = np.random.default_rng(0)
    centres = np.array([[10.0, 0], [0, 10], [-10, -10]])
    cells = np.concatenate([c + rng.normal(size=(50, 2)) for c in centres])
    found = first_prototypes(cells, 3, seed=0).numpy()
    expected = KMeans(3, n_init=4, random_state=5).fit(cells).cluster_centers_
    np.testing.assert_allclose(np.sort(found, 0), np.sort(expected, 0), rtol=1e-5)
    assert first_prototypes(np.zeros((20, 2)), 3, seed=0).tolist() == [[0, 0]] * 3  # collapsed


def test_pamil_learns_a_planted_shift_and_repeats_itself(tmp_path):
    write_all(tmp_path, make_bags())
    config = MilConfig(tmp_path, seeds=(0,), aggregator="pamil", **FAST | {"epochs": 25})
    mil(config)
    bags, instances = results(tmp_path)
    assert auroc_on_test(bags) > 0.9
    cells = instances[(instances["split"] == "test") & (instances["label"] == 1)]
    found = [
        average_precision_score(bag["instance_label"], bag["instance_score"])
        for _, bag in cells.groupby("bag")
    ]
    assert np.mean(found) > 0.5  # chance is 0.14
    before = instances.copy()
    (tmp_path / "mil" / "ags" / "seed0" / "model.pt").unlink()
    mil(config)
    pd.testing.assert_frame_equal(results(tmp_path)[1], before)


def test_pamil_with_all_terms_on_constant_features_is_finite(tmp_path):
    bags = [
        dataclasses.replace(bag, features=np.full_like(bag.features, 0.1))
        for bag in make_bags(counts=(4, 4, 4))
    ]
    write_all(tmp_path, bags)
    terms = Terms(prototype=0.1, instance=0.5)
    mil(MilConfig(tmp_path, seeds=(0,), epochs=2, aggregator="pamil", terms=terms))
    _, instances = results(tmp_path)
    assert np.isfinite(instances[list(RANKINGS)]).all(axis=None)


# --- freezing --------------------------------------------------------------------------------------


def fit(freeze, epochs, freeze_epochs, start="anywhere"):
    """Every parameter before and after a training, by the name of its part."""
    bags = make_bags(counts=(4, 4, 0), d=D)
    parts = []
    for split in ("train", "val"):
        mine = [bag for bag in bags if bag.split == split]
        parts.append(([torch.from_numpy(b.features) for b in mine], [b.label for b in mine]))
    torch.manual_seed(0)
    terms = Terms(prototype=0.1, instance=0.5, clustering=0.1)
    model = PrototypeAttention(torch.zeros(D), torch.ones(D), torch.randn(P, D), H, 0.1, terms)
    before = {k: [p.clone() for p in ps] for k, ps in model.parts.items()}
    config = MilConfig(
        None,
        aggregator="pamil",
        start=start,
        freeze=freeze,
        freeze_epochs=freeze_epochs,
        epochs=epochs,
        patience=99,
        lr=1e-2,
        weight_decay=0.5,
    )
    log = train_mil(model, *parts, config, seed=0)
    return before, model, log


@pytest.mark.parametrize("freeze", [("prototypes",), ("embed",), ("attention", "classifier")])
def test_what_is_frozen_stays_bit_for_bit_and_nothing_else_does(freeze, monkeypatch):
    # Without this the best epoch may be the start itself, in which nothing has changed.
    losses = iter(np.arange(100.0, 0, -1))
    monkeypatch.setattr(
        "examples.slam_ags_cytology.mil._validate", lambda *_: (float(next(losses)), 0.5)
    )
    before, model, _ = fit(freeze, epochs=3, freeze_epochs=3)
    for name, parameters in model.parts.items():
        same = [torch.equal(a, b) for a, b in zip(before[name], parameters, strict=True)]
        # The bias of the class attention has no effect, and so no gradient; decay moves it all the same.
        assert all(same) if name in freeze else not any(same), name
    assert all(p.requires_grad for p in model.parameters())
    before, model, _ = fit(freeze, epochs=3, freeze_epochs=2)
    for name in freeze:
        assert not any(
            torch.equal(a, b) for a, b in zip(before[name], model.parts[name], strict=True)
        )


def test_every_parameter_has_a_part_and_only_one():
    model = make_model()
    named = [p for parameters in model.parts.values() for p in parameters]
    assert len(named) == len({id(p) for p in named})
    assert {id(p) for p in named} == {id(p) for p in model.parameters()}


def test_the_start_itself_is_kept_when_training_makes_it_worse(monkeypatch):
    losses = iter(np.arange(1.0, 100.0))
    monkeypatch.setattr(
        "examples.slam_ags_cytology.mil._validate", lambda *_: (float(next(losses)), 0.5)
    )
    before, model, log = fit((), epochs=3, freeze_epochs=0)
    assert log["epoch"].tolist() == [0, 1, 2, 3]
    assert math.isnan(log["train_loss"][0])
    for name, parameters in model.parts.items():
        assert all(torch.equal(a, b) for a, b in zip(before[name], parameters, strict=True))


# --- curriculum ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def easy(tmp_path_factory):
    """A finished run to start from."""
    out = tmp_path_factory.mktemp("easy")
    write_all(out, make_bags(shift=6.0, counts=(6, 4, 2)), source="encoder 1")
    for arm, aggregator in (("abmil", "abmil"), ("pamil", "pamil")):
        write_all(out, make_bags(shift=6.0, counts=(6, 4, 2)), arm, source="encoder 1")
        mil(MilConfig(out, arms=(arm,), seeds=(0, 1), epochs=4, aggregator=aggregator))
    return out


@pytest.mark.parametrize("aggregator", ["abmil", "pamil"])
def test_a_start_gives_its_weights_and_its_standardisation(tmp_path, easy, aggregator):
    write_all(tmp_path, make_bags(shift=3.0, counts=(4, 4, 2), seed=1), aggregator, "encoder 1")
    config = MilConfig(
        tmp_path, seeds=(0, 1), start=easy, aggregator=aggregator, epochs=1, lr=1e-30
    )
    mil(dataclasses.replace(config, weight_decay=0.0))
    for seed in ("seed0", "seed1"):
        ours, theirs = (
            torch.load(out / "mil" / aggregator / seed / "model.pt", weights_only=True)["state"]
            for out in (tmp_path, easy)
        )
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    log = pd.read_csv(tmp_path / "mil" / aggregator / "seed0" / "log.csv")
    assert log["epoch"].tolist() == [0, 1]


def test_another_start_is_another_training_and_the_same_is_kept(tmp_path, easy):
    write_all(tmp_path, make_bags(shift=3.0, counts=(4, 4, 2), seed=1), "abmil", "encoder 1")
    config = MilConfig(tmp_path, seeds=(0,), epochs=1)
    times = []
    for start in (None, easy, easy, None):
        mil(dataclasses.replace(config, start=start))
        (time,) = [p.stat().st_mtime_ns for p in tmp_path.glob("mil/abmil/seed*/model.pt")]
        times.append(time)
    assert times[0] != times[1] == times[2] != times[3]


def another_encoder(out, easy):
    write_all(out, make_bags(counts=(4, 4, 2)), "abmil", "encoder 2")


def no_source(out, easy):
    write_all(out, make_bags(counts=(4, 4, 2)), "abmil", "")


def damaged(out, easy):
    """A copy of the start whose model is half a file."""
    (out / "start" / "mil" / "abmil" / "seed0").mkdir(parents=True)
    (out / "start" / "mil" / "abmil" / "seed0" / "model.pt").write_bytes(b"half")


@pytest.mark.parametrize(
    ("prepare", "changes", "match"),
    [
        (None, {"seeds": (7,)}, "`start` must hold a model of arm 'abmil' and seed 7"),
        (None, {"start": "nowhere"}, "`start` must hold a model"),
        (another_encoder, {}, "with the same encoder"),
        (no_source, {}, "with the same encoder"),
        (damaged, {"start": "start"}, "must be a model of the mil step"),
        (None, {"hidden": 64}, "models of the same shape"),
        (None, {"aggregator": "pamil"}, "must be of aggregator pamil. It is abmil"),
    ],
)
def test_a_start_that_cannot_be_one_is_refused(tmp_path, easy, prepare, changes, match):
    write_all(tmp_path, make_bags(counts=(4, 4, 2)), "abmil", "encoder 1")
    if prepare:
        prepare(tmp_path, easy)
    if "start" in changes:
        changes = {"start": tmp_path / changes["start"]}
    config = MilConfig(tmp_path, seeds=(0,), start=easy, epochs=1)
    with pytest.raises(UserError, match=match):
        mil(dataclasses.replace(config, **changes))
    assert not model_times(tmp_path)
