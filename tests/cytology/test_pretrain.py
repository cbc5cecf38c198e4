"""Pretraining of all arms on tiny synthetic cells: what it writes, repeats, continues and refuses."""

import dataclasses
import inspect
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from itertools import chain

import numpy as np
import pandas as pd
import pytest
import torch

from examples.slam_ags_cytology import pretrain as module
from examples.slam_ags_cytology import training as loop
from examples.slam_ags_cytology.errors import UserError
from examples.slam_ags_cytology.indicators import Verdict
from examples.slam_ags_cytology.networks import load_encoder
from examples.slam_ags_cytology.objectives import TASKS
from examples.slam_ags_cytology.pretrain import ARMS, PretrainConfig, pretrain
from examples.slam_ags_cytology.pretrain_config import PUBLISHED, published
from examples.slam_ags_cytology.store import open_store
from examples.slam_ags_cytology.views import RandomViews
from tests.cytology._tiny import draw_tiny

COLUMNS = (
    *("step", "epoch", "lr", "loss_contrastive", "loss_similarity", "loss_slide_label"),
    *("cosine", "conflict", "scale", "norm_contrastive", "norm_similarity", "norm_slide_label"),
    *("weight_contrastive", "weight_similarity", "weight_slide_label", "std", "effective_rank"),
)
CELLS = 40  # of each side: 4 training bags of 10 cells; also steps = 80 / 16 = 5
STEPS = 5
TINY = PretrainConfig(
    out=None, arm="ags", patch=32, crop=28, epochs=2, batch=16, hidden=16, outputs=8, lr=0.02
)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A run folder with cells, manifest and decoded store, never written to by a test."""
    return draw_tiny(tmp_path_factory.mktemp("drawn"))


@pytest.fixture
def out(drawn, tmp_path):
    """A copy of that folder."""
    return shutil.copytree(drawn, tmp_path / "run")


def tiny(out, **changes):
    return dataclasses.replace(TINY, out=out, **changes)


def weights(path):
    return load_encoder(path, level="projector")[0].state_dict()


def same(first, second):
    """Whether two saved encoders agree bit by bit."""
    a, b = weights(first), weights(second)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def log_of(path):
    return pd.read_csv(path.parent / "log.csv")


def status_of(path):
    """The status, as a strict reader of JSON finds it."""

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    text = (path.parent / "status.json").read_text(encoding="utf-8")
    return json.loads(text, parse_constant=refuse)


def files(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


# --- what a run writes ---------------------------------------------------------------------------


OTHERS = ("upgrad", "gradvac", "nashmtl", "nashmtl-labels")  # all but one have a state of their own


def tasks_of(arm):
    """Names of the losses of an arm, the one that it is judged by in front."""
    single = {"simclr": ("contrastive",), "sil": ("slide_label",)}
    second = "slide_label" if arm.endswith("-labels") else "similarity"
    return single.get(arm, ("contrastive", second))


@pytest.mark.parametrize("arm", [arm for arm in (*ARMS, *OTHERS) if arm != "random"])
def test_each_arm_trains_and_records_what_it_did(out, arm):
    path = pretrain(tiny(out, arm=arm))
    assert path == out / "pretrain" / arm / "encoder.pt"
    assert {*files(path.parent)} == {"encoder.pt", "log.csv", "status.json", "config.json"}
    log = log_of(path)
    assert tuple(log.columns) == COLUMNS
    assert log["step"].tolist() == [*range(2 * STEPS)]
    assert log["epoch"].tolist() == [0] * STEPS + [1] * STEPS
    tasks = tasks_of(arm)
    pair = len(tasks) == 2
    status = status_of(path)
    last = log.iloc[-1]
    for task in TASKS:
        assert log[f"loss_{task}"].notna().all() == (task in tasks)
        if task in tasks:
            assert log[f"loss_{task}"].between(0, 20).all()
            assert status[f"final_{task}"] == last[f"loss_{task}"]
        else:
            assert status[f"final_{task}"] is None
        for column in (f"norm_{task}", f"weight_{task}"):
            assert log[column].notna().all() == (pair and task in tasks)
            assert log[column].isna().all() == (not (pair and task in tasks))
    assert status["steps"] == 2 * STEPS
    assert status["effective_rank"] == last["effective_rank"]
    if pair:
        assert status["conflict_rate"] == pytest.approx(log["conflict"].mean())
        assert status["mean_cosine"] == pytest.approx(log["cosine"].mean())
        second = log[f"weight_{tasks[1]}"]
        # Similarity is switched on after a third of the steps, labels are there from the first.
        first = 4 if tasks[1] == "similarity" else 0
        assert (second[: max(0, first - 1)] == 0).all()
        assert (second[first:] > 0).all()
    else:
        assert log[["cosine", "conflict"]].isna().all(axis=None)
        assert status["conflict_rate"] is None
    assert status["mean_scale"] == pytest.approx(log["scale"].mean())
    everyone = arm == "simclr" or tasks[-1] == "slide_label"
    patches = 2 * CELLS // STEPS if everyone else CELLS // STEPS
    expected = math.log(2) if arm == "sil" else math.log(2 * patches - 1)
    assert status["chance"] == pytest.approx(expected)
    settings = json.loads((path.parent / "config.json").read_text(encoding="utf-8"))
    assert (settings["arm"], settings["lr"], settings["similarity_share"]) == (arm, 0.02, 0.1)
    network, extra = load_encoder(path)
    assert extra == {"arm": arm, "crop": 28, "patch": 32}
    assert network(torch.rand(2, 3, 28, 28)).shape == (2, 128)


def test_the_random_arm_is_the_untrained_start_of_the_others(out, monkeypatch):
    path = pretrain(tiny(out, arm="random"))
    assert {*files(path.parent)} == {"encoder.pt", "status.json", "config.json"}
    assert status_of(path) == {"collapsed": False, "weak": False, "reason": "", "steps": 0}
    begun = {}

    def remember(training, folder):
        begun.update({key: value.clone() for key, value in training.model.state_dict().items()})
        raise KeyboardInterrupt

    monkeypatch.setattr(loop.Training, "run", remember)
    with pytest.raises(KeyboardInterrupt):
        pretrain(tiny(out, arm="ags"))
    torch.testing.assert_close(weights(path), begun, rtol=0, atol=0)


def test_colours_are_standardised_by_the_training_cells(out):
    path = pretrain(tiny(out, arm="random"))
    manifest = pd.read_csv(out / "manifest.csv")
    paths = [str(out / name) for name in manifest["path"]]
    store = open_store(paths, 32, out)
    pixels = store.images[(manifest["split"] == "train").to_numpy()] / 255
    found = weights(path)
    assert found["encoder.mean"].flatten().tolist() == pytest.approx(pixels.mean((0, 1, 2)))
    expected = pixels.std((0, 1, 2), ddof=1)
    assert found["encoder.std"].flatten().tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("arm", ["ags", "simclr"])
def test_every_training_cell_is_seen_once_per_epoch_on_its_own_side(out, monkeypatch, arm):
    seen = []
    original = loop.Training._read

    def spy(training, batch):
        seen.extend([training.store.paths[row] for row in rows] for rows in batch)
        return original(training, batch)

    monkeypatch.setattr(loop.Training, "_read", spy)
    pretrain(tiny(out, arm=arm))
    seen = [[str(path) for path in batch] for batch in seen]
    manifest = pd.read_csv(out / "manifest.csv")
    manifest = manifest[manifest["split"] == "train"]
    assert len(seen) == 2 * STEPS * 2  # sides, steps, epochs: a positive batch, then a negative one
    orders = []
    for first in (0, 2 * STEPS):
        for side, label in ((0, 1), (1, 0)):
            batches = seen[first + side : first + 2 * STEPS : 2]
            cells = [str(out / name) for name in manifest.loc[manifest["label"] == label, "path"]]
            assert Counter(chain(*batches)) == Counter(cells)
            assert {len(batch) for batch in batches} == {CELLS // STEPS}
            orders.append([*chain(*batches)])
    assert orders[0] != orders[2]
    assert orders[1] != orders[3]


def test_a_side_that_cannot_be_divided_evenly_is_still_seen_as_a_whole():
    side = loop.Side(np.arange(100, 123))
    batches = side.batches(5, np.random.default_rng(0))
    assert sorted(len(batch) for batch in batches) == [4, 4, 5, 5, 5]
    assert sorted(np.concatenate(batches)) == [*range(100, 123)]


def test_the_learning_rate_rises_linearly_and_falls_as_a_cosine(out):
    log = log_of(pretrain(tiny(out, epochs=4, warmup=0.2, lr=0.01)))
    rise = [0.01 * (step + 1) / 4 for step in range(4)]
    fall = [0.005 * (1 + math.cos(math.pi * step / 16)) for step in range(16)]
    assert log["lr"].tolist() == pytest.approx(rise + fall)


def test_similarity_has_no_effect_before_its_start(out, tmp_path):
    # Only the length of the similarity gradient differs, and nothing limits it.
    settings = {"similarity_share": None, "similarity_start": 0.5}
    first = log_of(pretrain(tiny(out, similarity_temperature=0.1, **settings)))
    other = shutil.copytree(out, tmp_path / "other", ignore=shutil.ignore_patterns("pretrain"))
    second = log_of(pretrain(tiny(other, similarity_temperature=1.0, **settings)))
    equal = first["loss_contrastive"] == second["loss_contrastive"]
    assert equal.tolist() == [True] * (STEPS + 1) + [False] * (STEPS - 1)  # loss before the step


# --- repeating and continuing --------------------------------------------------------------------


def test_the_seed_decides_the_encoder(out, tmp_path):
    first = pretrain(tiny(out))
    again = pretrain(tiny(shutil.copytree(out, tmp_path / "a", ignore=_no_results)))
    other = pretrain(tiny(shutil.copytree(out, tmp_path / "b", ignore=_no_results), seed=1))
    assert same(first, again)
    assert (first.parent / "log.csv").read_bytes() == (again.parent / "log.csv").read_bytes()
    assert not same(first, other)


_no_results = shutil.ignore_patterns("pretrain")


class _Interruption:
    """Stands in for a function, and is interrupted at its call number `at`."""

    def __init__(self, function, at):
        self.function, self.at, self.calls = function, at, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt
        return self.function(*args, **kwargs)

    def __get__(self, instance, owner):
        return lambda *args, **kwargs: self(instance, *args, **kwargs)


def _forbidden(*args, **kwargs):
    raise AssertionError("nothing was left to do here")


VIEWS = 4 * STEPS  # drawn in an epoch: two of each side in a step


@pytest.mark.parametrize(
    ("arm", "at", "epochs_done"),
    [
        ("ags", VIEWS // 2, 0),
        ("ags", 2 * VIEWS - 3, 1),
        ("cagrad", VIEWS + 1, 1),
        ("gradvac", VIEWS + 1, 1),  # remembers
        ("sil", VIEWS + 1, 1),  # has a classifier beside the model
        ("simclr", 2 * VIEWS, 1),
    ],
)
def test_an_interrupted_run_ends_as_if_it_had_not_been(
    out, tmp_path, monkeypatch, capsys, arm, at, epochs_done
):
    whole = pretrain(tiny(shutil.copytree(out, tmp_path / "whole"), arm=arm))
    with monkeypatch.context() as patch:
        patch.setattr(RandomViews, "forward", _Interruption(RandomViews.forward, at))
        with pytest.raises(KeyboardInterrupt):
            pretrain(tiny(out, arm=arm))
    folder = out / "pretrain" / arm
    assert (folder / "checkpoint.pt").exists() == (epochs_done > 0)
    assert not (folder / "encoder.pt").exists()
    capsys.readouterr()
    path = pretrain(tiny(out, arm=arm))
    message = f"Continuing after epoch {epochs_done} of 2."
    assert (message in capsys.readouterr().out) == (epochs_done > 0)
    assert same(path, whole)
    assert (folder / "log.csv").read_bytes() == (whole.parent / "log.csv").read_bytes()
    a, b = status_of(path), status_of(whole)
    assert {**a, "seconds": 0} == {**b, "seconds": 0}
    assert not (folder / "checkpoint.pt").exists()


KILLED = """
import os, pickle, signal, sys
from examples.slam_ags_cytology import training
from examples.slam_ags_cytology.pretrain import pretrain
original, calls = training.Training._step, []
def step(*arguments):
    calls.append(arguments)
    if len(calls) == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments)
training.Training._step = step
pretrain(pickle.loads(bytes.fromhex(sys.argv[1])))
"""


@pytest.mark.parametrize("precision", ["fp32", pytest.param("fp16", marks=pytest.mark.slow)])
def test_a_killed_run_ends_as_if_it_had_not_been(out, tmp_path, capsys, precision):
    changes = {"arm": "gradvac", "precision": precision, "workers": 1}
    whole = pretrain(tiny(shutil.copytree(out, tmp_path / "whole"), **changes))
    settings = pickle.dumps(tiny(out, **changes)).hex()
    # One thread, as here: sums in another order would differ in the last bit.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLED, settings]
    ended = subprocess.run(command, env=environment, check=False)
    assert ended.returncode == -signal.SIGKILL
    path = pretrain(tiny(out, **changes))
    assert "Continuing after epoch 1 of 2." in capsys.readouterr().out
    assert same(path, whole)
    assert (path.parent / "log.csv").read_bytes() == (whole.parent / "log.csv").read_bytes()


def test_a_run_interrupted_at_its_very_end_trains_no_more(out, tmp_path, monkeypatch):
    whole = pretrain(tiny(shutil.copytree(out, tmp_path / "whole")))
    with monkeypatch.context() as patch:
        patch.setattr(module, "save_encoder", _Interruption(module.save_encoder, 1))
        with pytest.raises(KeyboardInterrupt):
            pretrain(tiny(out))
    monkeypatch.setattr(RandomViews, "forward", _forbidden)
    assert same(pretrain(tiny(out)), whole)


def test_a_checkpoint_of_another_version_is_refused_and_left_alone(out, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(module, "save_encoder", _Interruption(module.save_encoder, 1))
        with pytest.raises(KeyboardInterrupt):
            pretrain(tiny(out))
    path = out / "pretrain" / "ags" / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    del state["format"]  # as the first version wrote it
    torch.save(state, path)
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"must be a checkpoint of this version .* Delete .*ags to"):
        pretrain(tiny(out))
    assert path.read_bytes() == before


def test_a_finished_run_is_kept(out, monkeypatch, capsys):
    path = pretrain(tiny(out))
    before = files(path.parent)
    monkeypatch.setattr(module, "open_store", _forbidden)
    assert pretrain(tiny(out)) == path
    assert files(path.parent) == before
    assert "kept" in capsys.readouterr().out


def test_a_run_with_other_settings_is_refused_and_changes_nothing(out):
    path = pretrain(tiny(out))
    before = files(path.parent)
    with pytest.raises(UserError, match=r"pretrain.ags must .*It differs in epochs, lr\."):
        pretrain(tiny(out, epochs=3, lr=0.5))
    with (out / "manifest.csv").open("a", encoding="utf-8") as file:
        file.write("\n")
    with pytest.raises(UserError, match=r"It differs in manifest\."):
        pretrain(tiny(out))
    assert files(path.parent) == before


def test_a_half_finished_run_with_other_settings_is_refused(out, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(RandomViews, "forward", _Interruption(RandomViews.forward, VIEWS + 1))
        with pytest.raises(KeyboardInterrupt):
            pretrain(tiny(out))
    with pytest.raises(UserError, match=r"It differs in seed\."):
        pretrain(tiny(out, seed=7))


def test_after_a_refusal_a_corrected_setting_is_accepted(out):
    with pytest.raises(UserError, match="at least 2 patches of each side"):
        pretrain(tiny(out, batch=2))
    with pytest.raises(UserError, match="size must be between"):
        pretrain(tiny(out, patch=5000))
    with pytest.raises(UserError, match="encoder must be one of"):
        pretrain(tiny(out, encoder="vgg"))
    assert pretrain(tiny(out)).is_file()


# --- settings ------------------------------------------------------------------------------------


def test_the_published_settings_run(out):
    published = {
        **{"similarity_share": None, "similarity_start": 0.0, "lr": 0.001, "temperature": 0.07},
        **{"statistics": "separate", "encoder": "resnet18", "jitter": 0.1, "epochs": 1},
        **{"projector_batch_norm": False, "hidden": 512, "outputs": 512},
    }
    path = pretrain(tiny(out, **published))
    assert log_of(path)[["loss_contrastive", "loss_similarity"]].gt(0).all(axis=None)
    assert load_encoder(path)[0](torch.rand(2, 3, 28, 28)).shape == (2, 512)


def test_the_paper_switch_sets_every_published_value_and_keeps_what_was_set_by_hand(tmp_path):
    config = published(PretrainConfig(tmp_path, paper=True, epochs=3, temperature=0.5))
    for name, value in PUBLISHED.items():
        if name not in ("epochs", "temperature"):
            assert getattr(config, name) == value, name
    assert (config.epochs, config.temperature) == (3, 0.5)
    assert config.arm == "ags"
    assert published(PretrainConfig(tmp_path, paper=True, arm="sum")).arm == "sum"
    ours = published(PretrainConfig(tmp_path, epochs=3))
    assert ours == PretrainConfig(tmp_path, arm="simclr", epochs=3)
    # Every setting whose help names a value of the paper is one of them.
    source = inspect.getsource(PretrainConfig)
    told = re.findall(r'^    (\w+):[^\n]*\n    """((?:(?!""").)*)"""', source, re.M | re.S)
    named = {name for name, text in told if "paper:" in text.lower() and name != "paper"}
    assert named <= {*PUBLISHED}
    assert {*PUBLISHED} - named <= {
        "similarity_share",
        "max_scale",
        "encoder",
        "augmentation",
        "colours",
    }


def test_the_paper_switch_trains_as_the_published_settings_one_by_one(out, tmp_path):
    small = {"patch": 32, "crop": 28, "epochs": 1, "batch": 16, "hidden": 16, "outputs": 8}
    paper = PretrainConfig(out, arm="sum", paper=True, **small)
    by_hand = {**PUBLISHED, **small}
    other = shutil.copytree(out, tmp_path / "other")
    first, second = pretrain(paper), pretrain(PretrainConfig(other, arm="sum", **by_hand))
    assert same(first, second)
    settings = json.loads((first.parent / "config.json").read_text())
    assert settings["similarity_share"] is None
    assert settings["statistics"] == "views"
    mean = weights(first)["encoder.mean"].flatten().tolist()
    assert mean == pytest.approx([0.6009, 0.5513, 0.7394])


def test_the_published_schedule_moves_once_per_epoch(out):
    settings = {"schedule": "epochs", "epochs": 6, "warmup": 0.34, "lr": 0.01}
    log = log_of(pretrain(tiny(out, arm="sum", **settings)))
    by_epoch = log.groupby("epoch")["lr"]
    assert by_epoch.nunique().eq(1).all()
    rise, fall = [0.1, 0.55], [0.5 * (1 + math.cos(math.pi * k / 4)) for k in range(4)]
    assert by_epoch.first().tolist() == pytest.approx([0.01 * value for value in rise + fall])


@pytest.mark.parametrize(("statistics", "passes"), [("shared", 1), ("separate", 2), ("views", 4)])
def test_statistics_are_the_number_of_forward_passes(out, monkeypatch, statistics, passes):
    sizes = []
    original = loop.Pretrained.forward

    def count(model, images):
        sizes.append(len(images))
        return original(model, images)

    monkeypatch.setattr(loop.Pretrained, "forward", count)
    pretrain(tiny(out, epochs=1, statistics=statistics))
    assert sizes == [4 * CELLS // STEPS // passes] * passes * STEPS


SLOW = pytest.mark.slow  # no convolutions in fp16 on most CPUs: they are emulated


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=SLOW)])
@pytest.mark.parametrize("arm", ["ags", "simclr", "sil"])
def test_lower_precision_trains_close_to_full_precision(out, tmp_path, arm, precision):
    settings = {"arm": arm, "epochs": 1, "lr": 0.002}  # small steps: errors do not grow
    full = log_of(pretrain(tiny(shutil.copytree(out, tmp_path / "full"), **settings)))
    log = log_of(pretrain(tiny(out, precision=precision, **settings)))
    name = "loss_slide_label" if arm == "sil" else "loss_contrastive"
    assert log[name].iloc[0] != full[name].iloc[0]
    assert log[name].tolist() == pytest.approx(full[name].tolist(), rel=0.02)


def test_channels_last_changes_speed_only(out, tmp_path):
    other = shutil.copytree(out, tmp_path / "other")
    logs = [
        log_of(pretrain(tiny(folder, channels_last=last, epochs=1)))
        for folder, last in ((out, True), (other, False))
    ]
    column = "loss_contrastive"
    assert logs[0][column].tolist() == pytest.approx(logs[1][column].tolist(), rel=1e-4)


def test_rows_of_the_log_can_be_rare(out, tmp_path):
    whole = pretrain(tiny(shutil.copytree(out, tmp_path / "whole")))
    path = pretrain(tiny(out, log_every=4))
    assert log_of(path)["step"].tolist() == [0, 4, 8, 9]  # and the last
    assert status_of(path)["steps"] == 2 * STEPS
    assert same(path, whole)


def test_granularity_part_reconciles_encoder_and_projector_apart(out, tmp_path):
    settings = {"arm": "pcgrad", "similarity_share": None, "similarity_start": 0.0, "epochs": 1}
    paths = {
        granularity: pretrain(
            tiny(shutil.copytree(out, tmp_path / granularity), granularity=granularity, **settings)
        )
        for granularity in ("global", "part", "parameter")
    }
    assert not same(paths["global"], paths["part"])
    assert not same(paths["part"], paths["parameter"])
    assert all(log_of(path).notna().any().loc["cosine"] for path in paths.values())


def test_the_limit_of_the_norm_restoring_factor_reaches_ags(out):
    settings = {"similarity_share": None, "similarity_start": 0.0}
    log = log_of(pretrain(tiny(out, max_scale=0.5, **settings)))
    assert log["scale"].le(0.5).all()


def test_by_progress_the_share_is_how_far_the_contrastive_loss_has_fallen(out, monkeypatch):
    shares = []
    original = loop.Training._set_balance

    def spy(training, losses):
        original(training, losses)
        expected = max(0.0, 1 - float(losses["contrastive"].detach()) / training._chance())
        shares.append((float(training.method.share), expected))

    monkeypatch.setattr(loop.Training, "_set_balance", spy)
    pretrain(tiny(out, similarity_share="progress", similarity_start=0.0, epochs=3))
    found, expected = zip(*shares, strict=True)
    assert found == pytest.approx(expected, abs=1e-6)
    assert max(found) > 0.01


def test_methods_without_a_gramian_run_without_a_limit(out):
    free = {"similarity_share": None, "similarity_start": 0.0, "epochs": 1}
    for arm in ("rlw", "graddrop"):
        log = log_of(pretrain(tiny(out, arm=arm, **free)))
        assert log[["loss_contrastive", "loss_similarity"]].notna().all(axis=None)


def test_cells_that_cannot_be_read_are_left_out(out, monkeypatch):
    frame = pd.read_csv(out / "manifest.csv")
    train = frame[frame["split"] == "train"]
    bad = [out / train.loc[train["label"] == label, "path"].iloc[0] for label in (0, 1)]
    for path in bad:
        path.write_bytes(b"damaged")
    seen = set()
    original = loop.Training._read

    def spy(training, batch):
        seen.update(training.store.paths[row] for rows in batch for row in rows)
        return original(training, batch)

    monkeypatch.setattr(loop.Training, "_read", spy)
    pretrain(tiny(out, epochs=1))
    assert len(seen) == 2 * CELLS - 2
    assert not seen & {str(path) for path in bad}
    assert pd.read_csv(out / "unreadable.csv")["path"].tolist() == [str(path) for path in bad]


def test_tensorboard_holds_the_finite_columns_of_the_log(out):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    path = pretrain(tiny(out, tensorboard=True))
    events = EventAccumulator(str(path.parent / "tensorboard"))
    events.Reload()
    log = log_of(path)
    columns = [
        name for name in COLUMNS if name not in ("step", "epoch") and log[name].notna().any()
    ]
    assert sorted(events.Tags()["scalars"]) == sorted(columns)
    values = [event.value for event in events.Scalars("loss_contrastive")]
    assert values == pytest.approx(log["loss_contrastive"].tolist())


def test_a_log_file_is_told_how_long_it_will_take(out, capsys):
    pretrain(tiny(out, epochs=3))
    lines = [line for line in capsys.readouterr().out.splitlines() if "minutes left" in line]
    assert [line.split(",")[0] for line in lines] == [
        f"pretrain ags: epoch {epoch} of 3" for epoch in (1, 2, 3)
    ]


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("statistics", ["separate", "shared", "views"])
def test_statistics_decide_whether_negative_patches_reach_the_contrastive_loss(
    out, monkeypatch, statistics, batch_norm
):
    found = []

    def probe(training, folder):
        """Losses of one batch of positive patches beside two batches of negative ones."""
        training.model.train()
        positive, negative = (side.rows[:8] for side in training.sides)
        for other in (negative, training.sides[1].rows[8:16]):
            torch.manual_seed(0)
            losses, _ = training._losses(training._read((positive, other)))
            found.append({name: loss.item() for name, loss in losses.items()})
        raise KeyboardInterrupt

    monkeypatch.setattr(loop.Training, "run", probe)
    with pytest.raises(KeyboardInterrupt):
        pretrain(tiny(out, statistics=statistics, projector_batch_norm=batch_norm))
    first, second = found
    assert first["similarity"] != second["similarity"]
    separated = first["contrastive"] == pytest.approx(second["contrastive"], abs=1e-5)
    assert separated == (statistics != "shared")


@pytest.mark.parametrize("seed", [0, 1])
def test_unlimited_similarity_collapses_and_says_so(out, capsys, seed):
    # The plain sum of the published losses, the similarity divided by 0.07, at a learning rate that does something.
    settings = {"similarity_share": None, "similarity_start": 0.0, "lr": 0.3, "epochs": 4}
    path = pretrain(tiny(out, arm="sum", seed=seed, **settings))
    status = status_of(path)
    assert status["collapsed"]
    assert status["effective_rank"] < 1.1
    assert status["final_contrastive"] > 0.98 * status["chance"]
    assert "WARNING: pretraining sum COLLAPSED: all cells look alike" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("verdict", "message"),
    [((True, False, "R"), "ags COLLAPSED: R."), ((False, True, "R"), "ags ended weak: R.")],
)
def test_a_bad_verdict_is_printed_and_stored(out, monkeypatch, capsys, verdict, message):
    monkeypatch.setattr(loop, "verdict", lambda *_: Verdict(*verdict))
    status = status_of(pretrain(tiny(out, epochs=1)))
    assert (status["collapsed"], status["weak"], status["reason"]) == verdict
    assert f"WARNING: pretraining {message}" in capsys.readouterr().out


def test_a_good_verdict_prints_no_warning(out, monkeypatch, capsys):
    monkeypatch.setattr(loop, "verdict", lambda *_: Verdict(False, False, ""))
    status = status_of(pretrain(tiny(out, epochs=1)))
    assert not status["collapsed"]
    assert "WARNING" not in capsys.readouterr().out


@pytest.mark.parametrize("arm", ["ags", "simclr"])
def test_a_training_that_diverges_ends_as_collapsed(out, capsys, arm):
    path = pretrain(tiny(out, arm=arm, lr=1e30))
    status = status_of(path)
    assert status["collapsed"]
    assert status["reason"] == "the loss is not finite"
    assert status["final_contrastive"] is None
    assert "COLLAPSED: the loss is not finite" in capsys.readouterr().out


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arm": "sgd"}, r"arm must be one of random, .*another method .*mgda.* Got 'sgd'"),
        ({"arm": "random-labels"}, r"arm must be .*, with -labels behind .* Got 'random-labels'"),
        ({"arm": "dwa"}, r"arm 'dwa' looks at losses, .* Set similarity_share to None and"),
        ({"arm": "graddrop"}, r"arm 'graddrop' looks at rows"),
        (
            {"similarity_share": "much"},
            r"similarity_share must be .* progress, or None\. Got 'much'",
        ),
        ({"max_scale": 0.0}, r"max_scale must be positive, or None\. Got 0\.0"),
        ({"log_every": 0}, r"log_every must be positive\. Got 0"),
        ({"encoder": "vgg"}, r"encoder must be one of small, resnet18\. Got 'vgg'"),
        ({"crop": 33}, r"crop must be between 8 and patch \(32\)\. Got 33"),
        ({"crop": 4}, r"crop must be between 8 .* Got 4"),
        ({"patch": 5000}, r"size must be between 8 and 4096 pixels\. Found 5000"),
        ({"lr": -0.1}, r"lr must be positive\. Got -0\.1"),
        ({"lr": math.nan}, r"lr must be positive\. Got nan"),
        ({"epochs": 0}, r"epochs must be positive\. Got 0"),
        ({"batch": 0}, r"batch must be positive\. Got 0"),
        ({"temperature": 0.0}, r"temperature must be positive\. Got 0\.0"),
        ({"similarity_temperature": -1.0}, r"similarity_temperature must be positive"),
        ({"hidden": 0}, r"hidden must be positive\. Got 0"),
        ({"outputs": -1}, r"outputs must be positive\. Got -1"),
        ({"warmup": 1.0}, r"warmup must be .* below 1\. Got 1\.0"),
        ({"warmup": -0.1}, r"warmup must be .* Got -0\.1"),
        ({"momentum": 1.0}, r"momentum must be at least 0 and below 1\. Got 1\.0"),
        ({"momentum": -0.5}, r"momentum must be .* Got -0\.5"),
        ({"weight_decay": -1e-4}, r"weight_decay must not be negative\. Got -0\.0001"),
        ({"weight_decay": math.nan}, r"weight_decay must not be negative\. Got nan"),
        ({"similarity_share": 0.0}, r"similarity_share must be positive, or None\. Got 0\.0"),
        ({"similarity_share": math.nan}, r"similarity_share must be positive, or None\. Got nan"),
        ({"similarity_start": 1.0}, r"similarity_start must be at least 0 and below 1\. Got 1\.0"),
        ({"jitter": -0.1}, r"jitter must be a range .* between 0 and 1\. Got -0\.1"),
        ({"jitter": math.nan}, r"jitter must be a range .* Got nan"),
        ({"stain": 1.5}, r"stain must be a range .* Got 1\.5"),
        ({"seed": -1}, r"seed must be at least 0 .* Got -1"),
        ({"seed": 2**62}, r"seed must be .* below 2\*\*32"),
        ({"device": "cuda:99"}, r"`device` must be usable here\. Got 'cuda:99'"),
        ({"device": "abacus"}, r"`device` must be usable here\. Got 'abacus'"),
        ({"batch": 200}, r"at least 2 patches of each side.* 40 .* 40 .*batches of 200"),
        ({"batch": 3}, r"at least 2 patches of each side.* 40 .* 40 .*batches of 3 on 1 proc"),
    ],
    ids=lambda value: (
        "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else ""
    ),
)
def test_settings_that_cannot_work_are_refused_before_anything_is_written(out, changes, message):
    with pytest.raises(UserError, match=message):
        pretrain(tiny(out, **changes))
    assert not (out / "pretrain").exists()


def test_a_folder_without_manifest_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"manifest\.csv"):
        pretrain(tiny(tmp_path))
    assert [*tmp_path.iterdir()] == []
