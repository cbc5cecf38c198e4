"""The benchmarks of the cytology example run, and say what they found where they should."""

import contextlib
import io
import json

import numpy as np
import pytest
import torch

from benchmarks import balance, loader
from examples.slam_ags_cytology.arms import check_arm
from examples.slam_ags_cytology.pretrain_config import PretrainConfig, check_config
from examples.slam_ags_cytology.synthetic import (
    ABNORMAL_CLASSES,
    NORMAL_CLASSES,
    SyntheticConfig,
    synthetic,
)


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    return synthetic(
        SyntheticConfig(tmp_path_factory.mktemp("cells"), normal=420, abnormal=200, size=32)
    )


@pytest.mark.slow
def test_the_loader_benchmark_answers_and_records_where_its_numbers_come_from(cells, tmp_path):
    out = tmp_path / "loader.json"
    few = ["--count", "100", "--rounds", "2", "--block-seconds", "0"]
    only = ["--geometries", "small encoder at 56"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        loader.main(["--cells", str(cells), *few, *only, "--out", str(out)])
    result = json.loads(out.read_text(encoding="utf-8"))
    assert printed.getvalue().splitlines()[-1] == result["answer"]
    assert {"question", "date", "commit", "dirty", "versions", "machine"} <= set(result)
    assert result["versions"]["torch"] == torch.__version__
    assert result["files"]["count"] == 100
    arms = result["loaders"]["small encoder at 56"]
    assert set(arms) == {
        *(loader.OURS, loader.OURS_PAPER, loader.PUBLISHED, loader.NETWORK, loader.NETWORK_ROWS)
    }
    assert arms[loader.NETWORK]["over_network"]["median"] == 1
    assert all(arm["images_per_second"]["median"] > 0 for arm in arms.values())
    assert len(result["decoding_images_per_cpu_second"]) == 12


def test_batches_of_the_loader_benchmark_hold_every_cell_once_per_round():
    stream = loader.batches(10, 3)
    rows = np.concatenate([next(stream) for _ in range(3)])
    assert len(set(rows.tolist())) == 9


def test_every_setting_of_the_balance_benchmark_can_be_trained(tmp_path):
    for name, setting in balance.SETTINGS.items():
        check_arm(setting.arm, limited=True)
        check_config(PretrainConfig(tmp_path, arm=setting.arm, **setting.changes))
        assert setting.arm in name or setting.arm in ("random", "sil", "simclr")


@pytest.mark.slow
def test_the_balance_benchmark_keeps_test_cells_out_and_continues(cells, tmp_path, monkeypatch):
    split, out = tmp_path / "split.csv", tmp_path / "balance.json"
    files = sorted(path.relative_to(cells).as_posix() for path in cells.rglob("*.png"))
    parts = ["test" if number % 5 == 0 else "train" for number in range(len(files))]
    lines = [f"{file},{part}" for file, part in zip(files, parts, strict=True)]
    split.write_text("\n".join(["file,split", *lines]) + "\n")
    judged = []
    original = balance.open_store

    def spy(paths, *arguments):
        judged.append(paths := list(paths))
        return original(paths, *arguments)

    monkeypatch.setattr(balance, "open_store", spy)
    arguments = [
        *("--cells", str(cells), "--split-csv", str(split), "--out", str(out), "--epochs", "1"),
        *("--normal", *NORMAL_CLASSES, "--positive", *ABNORMAL_CLASSES, "--rates", "0.05"),
        *("--patch", "32", "--crop", "28", "--seeds", "0"),
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        balance.main([*arguments, "--settings", "random"])
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        balance.main([*arguments, "--settings", "random", "priority, share 0.1 from a"])
    result = json.loads(out.read_text(encoding="utf-8"))
    assert [row["setting"] for row in result["rows"]] == [
        *("random encoder", "priority, share 0.1 from a third on")
    ]
    assert len(judged) == 4  # two levels of two settings: the first setting was kept
    held_out = {
        str(cells / file) for file, part in zip(files, parts, strict=True) if part == "test"
    }
    assert held_out
    assert not held_out & {path for paths in judged for path in paths}
    assert printed.getvalue().splitlines()[-1] == result["answer"]
    for row in result["rows"]:
        assert all(0 < row[name] <= 1 for name in balance.MEASURES)
