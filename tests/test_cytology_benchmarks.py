"""The benchmarks of the cytology example run, and say what they found where they should."""

import contextlib
import io
import json

import numpy as np
import pytest
import torch

from benchmarks import balance, collapse, cytology, loader
from benchmarks._cli import question
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


FEW = {
    cytology: ["--arms", "simclr", "ags"],
    collapse: ["--settings", "random encoder", "published, AGS"],
    balance: ["--normal", *NORMAL_CLASSES, "--positive", *ABNORMAL_CLASSES],
    loader: ["--geometries", "small encoder at 56"],
}
"""Options with which a quick run of a script is short."""


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory, cells):
    """What a script stored, what it printed, and its file: run once for all tests."""
    found = {}

    def run(script):
        if script not in found:
            out = tmp_path_factory.mktemp("quick") / "result.json"
            arguments = ["--quick", "--out", str(out), *FEW[script]]
            if script in (balance, loader):
                arguments += ["--cells", str(cells)]
            if script is cytology:
                arguments += ["--work", str(out.with_name("work"))]
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                returned = script.main(arguments)
            result = json.loads(out.read_text(encoding="utf-8"))
            assert returned == result
            found[script] = result, printed.getvalue().splitlines(), out
        return found[script]

    return run


@pytest.mark.parametrize("script", FEW, ids=lambda script: script.__name__.split(".")[-1])
def test_quick_run_answers_in_its_last_line_and_says_where_it_comes_from(script, quick_run):
    result, printed, _ = quick_run(script)
    assert printed[-1] == result["answer"]
    assert result["answer"].startswith("Answer: ")
    assert result["question"] == question(script.__doc__)
    assert {"device", "date", "commit", "dirty", "machine"} <= set(result)
    assert set(result["versions"]) == {*script.PACKAGES, "agsurgery"}
    assert result["versions"]["torch"] == torch.__version__


def test_the_loader_benchmark_measures_every_arm(quick_run):
    result, _, _ = quick_run(loader)
    assert result["files"]["count"] == 40
    arms = result["loaders"]["small encoder at 56"]
    assert set(arms) == {
        *(loader.OURS, loader.OURS_PAPER, loader.PUBLISHED, loader.NETWORK, loader.NETWORK_ROWS)
    }
    assert arms[loader.NETWORK]["over_network"]["median"] == 1
    assert all(arm["images_per_second"]["median"] > 0 for arm in arms.values())
    assert len(result["decoding_images_per_cpu_second"]) == 12


def test_the_cytology_benchmark_has_a_row_for_every_arm_and_rate(quick_run):
    result, _, out = quick_run(cytology)
    assert result["facts"]["witness_rates"] == [0.3]
    assert set(result["chance"]) == {"0.3"}
    assert [row["arm"] for row in result["rows"]] == ["simclr", "ags", "colour"]
    ags = result["rows"][1]
    assert set(ags["differences"]) == set(cytology.SHOWN)
    assert ags["draws"] == 2
    for name in cytology.SHOWN:
        values = [ags["by_draw"][draw][name] for draw in ("0", "1")]
        assert np.mean(values) == pytest.approx(ags["metrics"][name]["mean"], abs=1e-4)
    assert "of ags against simclr: 30 %: " in result["answer"]
    assert out.with_suffix(".svg").read_text(encoding="utf-8").startswith("<?xml")


def test_a_sweep_of_the_example_is_stored_as_it_is(quick_run, tmp_path, monkeypatch, capsys):
    first, _, out = quick_run(cytology)
    monkeypatch.setattr(cytology, "sweep", None)  # nothing runs
    again = tmp_path / "again.json"
    work = out.with_name("work")
    arguments = ["--from-sweep", str(work), "--out", str(again)]
    cytology.main([*arguments, "--note", "At commit 1234567."])
    stored = json.loads(again.read_text(encoding="utf-8"))
    assert stored["note"] == "At commit 1234567."
    same = ("facts", "chance", "rows", "answer")
    assert {key: stored[key] for key in same} == {key: first[key] for key in same}
    with pytest.raises(SystemExit):
        cytology.main(arguments)
    assert "needs a --note that says at which commit" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cytology.main(["--from-sweep", str(tmp_path), "--note", "x", "--out", str(again)])
    assert "must be the --out of a sweep. Found no summary.json" in capsys.readouterr().err


def test_the_collapse_benchmark_has_a_row_for_every_setting(quick_run):
    result, _, _ = quick_run(collapse)
    assert [row["setting"] for row in result["rows"]] == ["random encoder", "published, AGS"]
    assert result["epochs"] == 1


def test_more_cells_in_a_batch_than_there_are_is_refused(cells, capsys):
    """It would be waited for without end."""
    with pytest.raises(SystemExit):
        loader.main(["--count", "30", "--cells", str(cells)])
    assert "must be at least 48, the cells of a batch. Got 30." in capsys.readouterr().err


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


@pytest.fixture
def measured(monkeypatch):
    """Settings of the balance benchmark that were measured, with figures that nobody computed."""
    names = []

    def measure(setting, task, rate, seed, folder):
        names.append(setting.arm)
        return {"collapsed": False, "weak": False} | dict.fromkeys(balance.MEASURES, 0.5)

    monkeypatch.setattr(balance, "measure", measure)
    return names


def test_the_balance_benchmark_continues_a_file_of_the_old_layout(measured, tmp_path, capsys):
    out = tmp_path / "balance.json"
    arguments = ["--cells", "cells", "--out", str(out), "--rates", "0.05", "--seeds", "0"]
    balance.main([*arguments, "--settings", "random"])
    new = json.loads(out.read_text(encoding="utf-8"))
    facts = ("judge", "normal", "positive", "rows", "answer")
    old = {"environment": {"commit": "of old"}, **{key: new[key] for key in facts}}
    out.write_text(json.dumps(old, indent=1) + "\n", encoding="utf-8")
    before = out.read_bytes()
    balance.main([*arguments, "--settings", "random"])
    assert measured == ["random"]
    assert out.read_bytes() == before  # nothing was measured: date and commit stay
    assert capsys.readouterr().out.splitlines()[-1] == old["answer"]
    balance.main([*arguments, "--settings", "random", "SimCLR"])
    assert measured == ["random", "simclr"]
    result = json.loads(out.read_text(encoding="utf-8"))
    assert result["rows"][0] == new["rows"][0]
    assert [row["setting"] for row in result["rows"]] == ["random encoder", "SimCLR"]
    assert set(result) == set(new)
    assert result["commit"] == new["commit"]


def test_a_quick_run_of_the_balance_benchmark_stores_nothing_without_a_file(measured, monkeypatch):
    monkeypatch.setattr(balance, "write_json", lambda *_: pytest.fail("stored"))
    result = balance.main(["--cells", "cells", "--quick"])
    assert len(result["rows"]) == len(measured) == 2


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (["--positive", "BLA"], "must hold rows of the same task. It has {'positive': "),
        (["--judge", "test"], "It has {'judge': 'val'}. Name another --out."),
        (["--settings", "nothing"], "--settings must have a word that is in the name of a setting"),
    ],
)
def test_the_balance_benchmark_refuses(changes, match, measured, tmp_path, capsys):
    arguments = ["--cells", "cells", "--out", str(tmp_path / "balance.json"), "--quick"]
    balance.main(arguments)
    before = (tmp_path / "balance.json").read_bytes()
    with pytest.raises(SystemExit):
        balance.main([*arguments, *changes])
    assert match in capsys.readouterr().err
    assert (tmp_path / "balance.json").read_bytes() == before
