"""Drawn cells: reproducible, resumable, and no easier than a stand-in for real cells may be."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from examples.slam_ags_cytology import drawing
from examples.slam_ags_cytology import synthetic as module
from examples.slam_ags_cytology.drawing import draw_cells
from examples.slam_ags_cytology.errors import UserError
from examples.slam_ags_cytology.synthetic import (
    ABNORMAL_CLASSES,
    NORMAL_CLASSES,
    SyntheticConfig,
    synthetic,
)

CLASSES = NORMAL_CLASSES + ABNORMAL_CLASSES
SMALL = {"normal": 100, "abnormal": 5, "size": 16}


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("class_name", CLASSES)
@pytest.mark.parametrize("size", [16, 37, 64])
def test_patches_are_uint8_rgb_of_the_size_asked_for(class_name: str, size: int) -> None:
    patches = draw_cells(class_name, 3, size, generator())
    assert patches.shape == (3, size, size, 3)
    assert patches.dtype == np.uint8


@pytest.mark.parametrize("class_name", CLASSES)
def test_the_same_seed_draws_the_same_cells_and_another_seed_others(class_name: str) -> None:
    first = draw_cells(class_name, 4, 32, generator(0))
    assert np.array_equal(first, draw_cells(class_name, 4, 32, generator(0)))
    assert not np.array_equal(first, draw_cells(class_name, 4, 32, generator(1)))
    assert len({patch.tobytes() for patch in first}) == 4


def test_two_calls_draw_what_one_call_draws() -> None:
    """21 and 16 patches end in the middle of a block, 37 do not end where either of them does."""
    assert drawing.BLOCK not in (21, 37)
    shared = generator()
    parts = [draw_cells("MON", count, 64, shared) for count in (21, 16)]
    assert np.array_equal(np.concatenate(parts), draw_cells("MON", 37, 64, generator()))


def test_the_size_of_a_block_changes_no_pixel(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = draw_cells("PMO", 9, 64, generator())
    monkeypatch.setattr(drawing, "BLOCK", 4)
    assert np.array_equal(draw_cells("PMO", 9, 64, generator()), expected)


def test_difficulty_changes_the_cells_and_leaves_the_background_alone() -> None:
    easy = draw_cells("NGS", 8, 64, generator(), difficulty=0.0)
    hard = draw_cells("NGS", 8, 64, generator(), difficulty=1.0)
    changed = (easy != hard).any(3).mean(0)
    assert changed[32, 32] > 0.5
    assert changed[0].mean() < 0.1  # the first row shows other cells, plasma and red cells


def test_a_nucleus_is_violet_and_darker_than_its_surroundings() -> None:
    for class_name in CLASSES:
        patches = draw_cells(class_name, 64, 64, generator()).astype(float)
        order = np.sort(patches.sum(3).reshape(64, -1), 1)
        assert (order[:, 200] < 0.75 * order[:, -200]).mean() > 0.95
        red, green, blue = patches[:, 22:42, 22:42].mean((0, 1, 2))
        assert green < red < blue


def test_a_run_writes_one_folder_per_class_and_a_record(tmp_path: Path) -> None:
    config = SyntheticConfig(tmp_path / "run", normal=100, abnormal=5, size=16)
    folder = synthetic(config)
    assert folder == tmp_path / "run" / "cells"
    counts = {path.name: len(list(path.iterdir())) for path in folder.iterdir()}
    assert counts == {"LYT": 34, "MON": 33, "NGS": 33, "BLA": 3, "PMO": 2}
    with Image.open(folder / "BLA" / "BLA_00001.png") as image:
        assert (image.mode, image.size) == ("RGB", (16, 16))
    record = json.loads((tmp_path / "run" / "cells.json").read_text())
    assert record["complete"] is True
    assert record["cells"] == counts
    assert record["config"]["normal"] == 100


def test_more_cells_begin_with_the_same_cells(tmp_path: Path) -> None:
    few = contents(synthetic(SyntheticConfig(tmp_path / "few", normal=9, abnormal=2, size=16)))
    many = contents(synthetic(SyntheticConfig(tmp_path / "many", normal=300, abnormal=9, size=16)))
    assert few.items() <= many.items()
    assert len(set(many.values())) == 309  # no cell is drawn twice, in a chunk or across chunks


def test_no_file_repeats_the_pixels_of_another_class_or_seed(tmp_path: Path) -> None:
    """Rows at the top show the background only, which one shared stream would repeat."""
    rows = []
    for seed in (0, 1):
        config = SyntheticConfig(tmp_path / str(seed), normal=3, abnormal=2, size=32, seed=seed)
        for path in sorted(synthetic(config).rglob("*.png")):
            with Image.open(path) as image:
                rows.append(np.asarray(image)[0].astype(float).ravel())
    assert len(rows) == 10
    gaps = np.abs(np.array(rows)[:, None] - np.array(rows)).mean(2)
    assert gaps[~np.eye(10, dtype=bool)].min() > 3


def test_an_interrupted_run_continues_to_identical_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = SyntheticConfig(tmp_path / "whole", **SMALL)
    broken = dataclasses.replace(whole, out=tmp_path / "broken")
    synthetic(whole)
    written = []

    def replace_or_stop(source: Path, target: Path) -> None:
        if len(written) == 50:
            raise KeyboardInterrupt
        written.append(target)
        real_replace(source, target)

    real_replace = os.replace
    monkeypatch.setattr(os, "replace", replace_or_stop)
    with pytest.raises(KeyboardInterrupt):
        synthetic(broken)
    monkeypatch.undo()
    assert json.loads((broken.out / "cells.json").read_text())["complete"] is False
    kept = written[-1].stat().st_mtime_ns
    synthetic(broken)
    assert written[-1].stat().st_mtime_ns == kept  # what was there is not written again
    assert contents(broken.out) == contents(whole.out)


def test_a_finished_run_writes_no_cell_again_and_restores_a_lost_one(tmp_path: Path) -> None:
    config = SyntheticConfig(tmp_path / "run", **SMALL)
    folder = synthetic(config)
    before = contents(config.out)
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*.png")}
    lost = folder / "LYT" / "LYT_00002.png"
    lost.unlink()
    del times[lost]
    synthetic(config)
    assert contents(config.out) == before
    assert {path: path.stat().st_mtime_ns for path in times} == times


REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"normal": 0}, "`normal` must be at least 1. Got 0"),
    ({"abnormal": -3}, "`abnormal` must be at least 1. Got -3"),
    ({"size": 15}, "`size` must be at least 16 pixels. Got 15"),
    ({"seed": -1}, "`seed` must not be negative. Got -1"),
    ({"difficulty": 1.5}, "`difficulty` must lie between 0 and 1. Got 1.5"),
    ({"difficulty": float("nan")}, "`difficulty` must lie between 0 and 1. Got nan"),
]


@pytest.mark.parametrize(("change", "message"), REFUSALS)
def test_settings_out_of_range_are_refused_before_anything_is_written(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    config = SyntheticConfig(tmp_path / "run", **{**SMALL, **change})
    with pytest.raises(UserError, match=message):
        synthetic(config)
    assert not config.out.exists()


@pytest.mark.parametrize("name", ["run", "run/cells"])
def test_a_file_in_the_place_of_a_folder_is_refused(tmp_path: Path, name: str) -> None:
    place = tmp_path / name
    place.parent.mkdir(exist_ok=True)
    place.write_text("a file")
    with pytest.raises(UserError, match="Choose another folder"):
        synthetic(SyntheticConfig(tmp_path / "run", **SMALL))
    assert place.read_text() == "a file"


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"size": 17}, {"normal": 101}, {"abnormal": 6}, {"difficulty": 0.6}],
    ids=lambda change: next(iter(change)),
)
def test_cells_of_other_settings_are_not_mixed(tmp_path: Path, change: dict[str, Any]) -> None:
    config = SyntheticConfig(tmp_path / "run", **SMALL)
    synthetic(config)
    before = contents(config.out)
    (name, value), *_ = change.items()
    with pytest.raises(UserError, match=rf"{name} was .*, now {value}\. Choose .* or delete"):
        synthetic(dataclasses.replace(config, **change))
    assert contents(config.out) == before


def test_cells_of_another_recipe_are_not_mixed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SyntheticConfig(tmp_path / "run", **SMALL)
    synthetic(config)
    monkeypatch.setattr(module, "RECIPE", module.RECIPE + 1)
    with pytest.raises(UserError, match="recipe was"):
        synthetic(config)


@pytest.mark.parametrize("text", ["", "{}", "[]", "3"])
def test_an_unreadable_record_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "cells.json").write_text(text)
    with pytest.raises(UserError, match="must be a record of drawn cells"):
        synthetic(SyntheticConfig(tmp_path, **SMALL))


def test_a_folder_with_other_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / "mine.png").write_bytes(b"precious")
    with pytest.raises(UserError, match="must be empty or made by this step"):
        synthetic(SyntheticConfig(tmp_path, **SMALL))
    assert contents(tmp_path) == {"cells/mine.png": b"precious"}


DRAWING_REFUSALS: list[tuple[tuple[Any, ...], type[Exception], str]] = [
    (("XYZ", 1, 64, generator()), ValueError, "`class_name` must be one of LYT.* Got 'XYZ'"),
    (("LYT", 0, 64, generator()), ValueError, "`count` must be at least 1. Got 0"),
    (("LYT", 1, 8, generator()), ValueError, "`size` must be at least 16"),
    (("LYT", 1, 64, 0), TypeError, "`generator` must be .* Got int"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), DRAWING_REFUSALS)
def test_impossible_drawings_are_refused(
    arguments: tuple[Any, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        draw_cells(*arguments)


# How hard it is to tell abnormal from normal cells ------------------------------------------------


def labelled(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Patches with half of them abnormal, types in even shares, and their labels."""
    patches, labels = [], []
    for label, names in enumerate((NORMAL_CLASSES, ABNORMAL_CLASSES)):
        share = count // 2 // len(names)
        for name in names:
            stream = np.random.default_rng((seed, CLASSES.index(name)))
            patches.append(draw_cells(name, share, 64, stream))
            labels += [label] * share
    return np.concatenate(patches), np.array(labels)


def probe_auc(
    train: np.ndarray, labels: np.ndarray, test: np.ndarray, truth: np.ndarray, strength: float
) -> float:
    """Test AUC of a logistic regression on standardised features."""
    scaler = StandardScaler().fit(train)
    model = LogisticRegression(C=strength, max_iter=500).fit(scaler.transform(train), labels)
    return float(roc_auc_score(truth, model.decision_function(scaler.transform(test))))


def mean_colour(patches: np.ndarray) -> np.ndarray:
    return patches.mean((1, 2))


def border_colour(patches: np.ndarray) -> np.ndarray:
    sides = (patches[:, 0], patches[:, -1], patches[:, :, 0], patches[:, :, -1])
    return np.concatenate([side.mean(1) for side in sides], 1)


def coarse_pixels(patches: np.ndarray) -> np.ndarray:
    """Means over squares of 8 pixels, the resolution at which a linear probe does best."""
    return patches.reshape(len(patches), 8, 8, 8, 8, 3).mean((2, 4)).reshape(len(patches), -1)


# Standard error of an AUC of 300 against 300 cells: about 0.024. The bounds leave two of them.
@pytest.mark.parametrize(
    ("features", "bound"), [(mean_colour, 0.70), (border_colour, 0.60)], ids=["mean", "border"]
)
def test_colour_alone_hardly_tells_abnormal_cells(features: Any, bound: float) -> None:
    train, labels = labelled(600, seed=1)
    test, truth = labelled(600, seed=2)
    assert probe_auc(features(train), labels, features(test), truth, 1.0) < bound


@pytest.mark.slow
def test_a_trained_encoder_tells_what_pixels_do_not() -> None:
    """The reason for pretraining: a linear probe on an encoder is far better than one on pixels."""
    train, labels = labelled(1800, seed=3)
    test, truth = labelled(900, seed=4)
    pixels = max(
        probe_auc(coarse_pixels(train), labels, coarse_pixels(test), truth, strength)
        for strength in (1e-4, 1e-3, 1e-2, 1e-1)
    )
    encode = trained_encoder(train, labels, epochs=14)
    encoder = probe_auc(encode(train), labels, encode(test), truth, 1e-2)
    assert 0.60 < pixels < 0.80
    assert encoder > 0.85
    assert encoder > pixels + 0.10


def trained_encoder(patches: np.ndarray, labels: np.ndarray, epochs: int) -> Any:
    """Function from patches to features of a small network that was trained with the labels."""
    torch = pytest.importorskip("torch")
    nn = torch.nn

    def block(inputs: int, outputs: int) -> Any:
        convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())

    def tensor(array: np.ndarray) -> Any:
        return torch.from_numpy(array).permute(0, 3, 1, 2).float() / 127.5 - 1

    with torch.random.fork_rng(devices=[]):  # leaves the generator of other tests alone
        torch.manual_seed(0)
        pool = nn.MaxPool2d(2)
        layers = (block(3, 16), pool, block(16, 32), pool, block(32, 32), pool, block(32, 48))
        body, head = nn.Sequential(*layers), nn.Linear(96, 1)

        def embed(images: Any) -> Any:
            maps = body(images)
            return torch.cat([maps.mean((2, 3)), maps.amax((2, 3))], 1)

        images, targets = tensor(patches), torch.tensor(labels).float()
        steps = epochs * (len(images) // 50)
        optimizer = torch.optim.AdamW([*body.parameters(), *head.parameters()], lr=3e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
        for step in range(steps):
            if step % (len(images) // 50) == 0:
                order = torch.randperm(len(images)).view(-1, 50)
            chosen = order[step % len(order)]
            batch = images[chosen].rot90(int(torch.randint(4, ())), (2, 3))
            batch = batch * (1 + 0.15 * torch.randn(len(batch), 3, 1, 1))
            logits = head(embed(batch)).squeeze(1)
            loss = nn.functional.binary_cross_entropy_with_logits(logits, targets[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    body.eval()

    def encode(array: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            parts = [embed(tensor(array[i : i + 100])) for i in range(0, len(array), 100)]
        return torch.cat(parts).numpy()

    return encode
