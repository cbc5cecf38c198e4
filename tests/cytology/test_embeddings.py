"""Bag files and the step that makes them."""

import dataclasses
import os

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn

from examples.slam_ags_cytology import embed as embed_module
from examples.slam_ags_cytology.embed import EmbedConfig, embed, encode
from examples.slam_ags_cytology.embeddings import (
    Bag,
    bag_path,
    fingerprints,
    read_bag,
    read_bags,
    write_bag,
)
from examples.slam_ags_cytology.errors import UserError
from examples.slam_ags_cytology.networks import Pretrained, save_encoder


def make_bag(name="b1", label=1, split="train", n=3, d=4, **changes):
    rng = np.random.default_rng(0)
    bag = Bag(
        name,
        label,
        split,
        rng.normal(size=(n, d)).astype(np.float32),
        np.array([f"cells/ä {i}.png" for i in range(n)], object),
        np.array([-1, 0, 1] * n, np.int8)[:n],
        np.array(["", "LYT", "<b>"] * n, object)[:n],
    )
    return dataclasses.replace(bag, **changes)


def test_a_bag_comes_back_as_it_was_written(tmp_path):
    bag = make_bag()
    write_bag(tmp_path / "b1.h5", bag, fingerprint="f", source="s")
    found = read_bag(tmp_path / "b1.h5")
    for field in dataclasses.fields(Bag):
        assert np.array_equal(getattr(found, field.name), getattr(bag, field.name)), field.name
    assert found.features.dtype == np.float32
    assert found.instance_label.dtype == np.int8
    assert fingerprints(tmp_path / "b1.h5") == ("f", "s")


def test_other_software_finds_the_features_where_it_looks(tmp_path):
    write_bag(tmp_path / "b1.h5", make_bag())
    with h5py.File(tmp_path / "b1.h5") as file:
        assert file["features"].shape == (3, 4)
        assert file["features"].dtype == np.float32
        assert dict(file.attrs)["label"] == 1


def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path, monkeypatch):
    path = tmp_path / "b1.h5"
    write_bag(path, make_bag(), fingerprint="old")

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(h5py.Group, "create_dataset", fail)
    with pytest.raises(OSError, match="disk full"):
        write_bag(path, make_bag(), fingerprint="new")
    monkeypatch.undo()
    assert fingerprints(path)[0] == "old"
    assert os.listdir(tmp_path) == ["b1.h5"]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"features": np.zeros(3)}, r"\(n, d\)"),
        ({"features": np.zeros((0, 4))}, r"\(n, d\)"),
        ({"features": np.full((3, 4), np.nan)}, "finite"),
        ({"paths": np.array(["a"], object)}, "paths"),
        ({"instance_label": np.zeros(4, np.int8)}, "instance_label"),
    ],
)
def test_write_refuses(tmp_path, changes, match):
    with pytest.raises(ValueError, match=match):
        write_bag(tmp_path / "b1.h5", make_bag(**changes))
    assert not os.listdir(tmp_path)


def test_a_truncated_file_is_named_and_has_no_fingerprint(tmp_path):
    path = tmp_path / "b1.h5"
    write_bag(path, make_bag(), fingerprint="f")
    path.write_bytes(path.read_bytes()[:900])
    assert fingerprints(path) == ("", "")
    with pytest.raises(UserError, match=r"b1\.h5 must be a bag"):
        read_bag(path)


def test_reading_refuses_parts_that_do_not_agree(tmp_path):
    write_bag(tmp_path / "b1.h5", make_bag())
    with h5py.File(tmp_path / "b1.h5", "a") as file:
        del file["instance_label"]
        file["instance_label"] = np.zeros(2, np.int8)
    with pytest.raises(UserError, match=r"lengths \[2, 3\]"):
        read_bag(tmp_path / "b1.h5")


def test_a_folder_refuses_missing_mixed_and_non_finite_bags(tmp_path):
    with pytest.raises(UserError, match="embed step first"):
        read_bags(tmp_path)
    write_bag(tmp_path / "b1.h5", make_bag(), source="one")
    write_bag(tmp_path / "b2.h5", make_bag("b2"), source="two")
    with pytest.raises(UserError, match="one encoder"):
        read_bags(tmp_path)
    write_bag(tmp_path / "b2.h5", make_bag("b2", d=5), source="one")
    with pytest.raises(UserError, match=r"one width. Found \[4, 5\]"):
        read_bags(tmp_path)
    write_bag(tmp_path / "b2.h5", make_bag("b2"), source="one")
    with h5py.File(tmp_path / "b2.h5", "a") as file:
        file["features"][1, 2] = np.inf
    with pytest.raises(UserError, match=r"'b2'.* must be finite\. 1 of 3"):
        read_bags(tmp_path)


# --- the embed step ------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    """A run folder with four bags of three cells and one encoder."""
    rng = np.random.default_rng(0)
    rows = []
    for i, (split, label) in enumerate((s, y) for s in ("train", "val") for y in (0, 1)):
        for j in range(3):
            name = f"cells/c{i}{j}.png"
            (tmp_path / "cells").mkdir(exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)).save(tmp_path / name)
            truth = "" if j == 0 else int(label and j == 1)
            rows.append((name, f"bag{3 - i}", label, split, truth, "LYT"))
    columns = ["path", "bag", "label", "split", "instance_label", "class_name"]
    pd.DataFrame(rows, columns=columns).to_csv(tmp_path / "manifest.csv", index=False)
    save(tmp_path, seed=0)
    return tmp_path


def save(out, seed, arm="ags", **extra):
    torch.manual_seed(seed)
    folder = out / "pretrain" / arm
    folder.mkdir(parents=True, exist_ok=True)
    model = Pretrained("small", 16, 8, batch_norm=False)
    save_encoder(model, folder / "encoder.pt", **({"patch": 16, "crop": 12} | extra))
    return model


def times(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.h5")}


def test_features_are_those_of_the_encoder_in_the_order_of_the_manifest(run):
    model = save(run, seed=0).eval()
    embed(EmbedConfig(run, batch_size=2))
    bag = read_bag(run / "embed" / "ags" / "bag0.h5")
    assert list(bag.paths) == ["cells/c30.png", "cells/c31.png", "cells/c32.png"]
    assert bag.instance_label.tolist() == [-1, 1, 0]
    assert (bag.name, bag.label, bag.split) == ("bag0", 1, "val")
    for path, feature in zip(bag.paths, bag.features, strict=True):
        pixels = np.asarray(Image.open(run / path))[2:14, 2:14]  # central 12 x 12
        image = torch.tensor(pixels).permute(2, 0, 1)[None] / 255
        with torch.no_grad():
            expected = model.encoder(image)[0].numpy()
        np.testing.assert_allclose(feature, expected, rtol=1e-4, atol=1e-5)  # other batch size


def test_the_projector_can_be_asked_for(run):
    embed(EmbedConfig(run, level="projector"))
    assert read_bag(run / "embed" / "ags" / "bag0.h5").features.shape == (3, 8)


def test_complete_bags_are_kept_and_a_lost_or_damaged_one_is_made_again(run):
    folder = embed(EmbedConfig(run)) / "ags"
    before = times(folder)
    content = read_bag(folder / "bag1.h5").features
    (folder / "bag0.h5").unlink()
    (folder / "bag1.h5").write_bytes(b"half a file")
    (folder / ".bag2.h5.1.tmp").write_bytes(b"left by an interrupted run")
    embed(EmbedConfig(run))
    after = times(folder)
    assert sorted(after) == [f"bag{i}.h5" for i in range(4)]
    assert {name for name in after if after[name] != before[name]} == {"bag0.h5", "bag1.h5"}
    assert np.array_equal(read_bag(folder / "bag1.h5").features, content)
    assert len(read_bags(folder)) == 4


def test_a_run_stopped_in_the_middle_goes_on_where_it_was(run, monkeypatch):
    real, calls = embed_module.encode, []

    def stops(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(embed_module, "encode", stops)
    with pytest.raises(KeyboardInterrupt):
        embed(EmbedConfig(run))
    embed(EmbedConfig(run))
    assert len(calls) == 3 + 2  # two bags were complete


def test_another_encoder_makes_all_bags_anew(run):
    folder = embed(EmbedConfig(run)) / "ags"
    before = read_bag(folder / "bag0.h5").features
    save(run, seed=1)
    embed(EmbedConfig(run))
    assert not np.allclose(before, read_bag(folder / "bag0.h5").features)
    assert len(read_bags(folder)) == 4


def test_a_changed_picture_makes_only_its_bag_anew(run):
    folder = embed(EmbedConfig(run)) / "ags"
    before = times(folder)
    Image.new("RGB", (16, 16), (200, 10, 10)).save(run / "cells" / "c00.png")
    embed(EmbedConfig(run))
    after = times(folder)
    assert {name for name in after if after[name] != before[name]} == {"bag3.h5"}


def test_bags_that_left_the_manifest_leave_the_folder(run):
    folder = embed(EmbedConfig(run)) / "ags"
    frame = pd.read_csv(run / "manifest.csv")
    frame[frame["bag"] != "bag2"].to_csv(run / "manifest.csv", index=False)
    embed(EmbedConfig(run))
    assert sorted(times(folder)) == ["bag0.h5", "bag1.h5", "bag3.h5"]


def test_a_diverged_encoder_is_refused_and_writes_nothing(run):
    model = save(run, seed=0)
    with torch.no_grad():
        next(model.encoder.parameters()).fill_(torch.nan)
    save_encoder(model, run / "pretrain" / "ags" / "encoder.pt", patch=16, crop=12)
    with pytest.raises(UserError, match="'ags' must give finite features"):
        embed(EmbedConfig(run))
    assert not times(run / "embed" / "ags")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"arms": ("ags", "sum")}, "results of sum. Found ags"),
        ({"batch_size": 0}, "`batch_size` must be at least 1"),
        ({"crop": 17}, r"`crop` must be 1 to `patch` \(16\)"),
        ({"level": "head"}, "encoder or projector"),
        ({"device": "tpu9"}, "`device` must be usable"),
    ],
)
def test_embed_refuses(run, changes, match):
    with pytest.raises(UserError, match=match):
        embed(EmbedConfig(run, **changes))


def test_an_encoder_that_names_no_size_needs_one(run):
    torch.manual_seed(0)
    model = Pretrained("small", 16, 8, batch_norm=False)
    save_encoder(model, run / "pretrain" / "ags" / "encoder.pt")
    with pytest.raises(UserError, match="`patch` must be given"):
        embed(EmbedConfig(run))
    embed(EmbedConfig(run, patch=16))
    assert bag_path(run / "embed" / "ags", "bag0").exists()


def test_encoding_uses_evaluation_mode_keeps_the_last_single_cell_and_restores_the_mode():
    class Probe(nn.Module):
        def forward(self, images):
            assert not self.training
            return images.mean((2, 3))[:, :, None, None]  # as a network without a flatten

    encoder = Probe().train()
    pixels = np.random.default_rng(0).integers(0, 255, (5, 8, 8, 3), np.uint8)
    found = encode(encoder, pixels, 4, batch_size=2)
    expected = pixels[:, 2:6, 2:6].mean((1, 2)) / 255
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert found.dtype == np.float32
    assert encoder.training
