"""The grid: what is in it, that it continues, that work is shared, and what is said about it."""

import dataclasses
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch

from examples.slam_ags_cytology import sweep_work, sweep_workers
from examples.slam_ags_cytology.bags import BagsConfig
from examples.slam_ags_cytology.colour import MeanColours
from examples.slam_ags_cytology.embeddings import read_bags
from examples.slam_ags_cytology.errors import UserError
from examples.slam_ags_cytology.metrics import interval
from examples.slam_ags_cytology.mil import MilConfig
from examples.slam_ags_cytology.pretrain import PretrainConfig
from examples.slam_ags_cytology.report import ReportConfig
from examples.slam_ags_cytology.sharing import share_store
from examples.slam_ags_cytology.store import open_store
from examples.slam_ags_cytology.sweep import SweepConfig, sweep
from examples.slam_ags_cytology.sweep_report import sweep_report
from examples.slam_ags_cytology.sweep_summary import measured, summarise, sweep_table, sweep_text
from examples.slam_ags_cytology.sweep_units import run_folder
from examples.slam_ags_cytology.synthetic import SyntheticConfig, synthetic

from .test_report import Page


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    """A folder of cells, which tests only read."""
    out = tmp_path_factory.mktemp("cells")
    return synthetic(SyntheticConfig(out, normal=120, abnormal=60, size=16))


def tiny(out, cells, **changes):
    """A grid of two rates and two draws that takes a second per part."""
    here = SweepConfig(out).bags.out
    config = SweepConfig(
        out=out,
        arms=("random",),
        witness_rates=(0.1, 0.3),
        draws=2,
        workers=1,
        bags=BagsConfig(
            here,
            cells=cells,
            normal=("LYT", "MON", "NGS"),
            positive=("BLA", "PMO"),
            bag_size=10,
            train_bags=3,
            val_bags=1,
            test_bags=2,
            reuse_normals=True,
        ),
        pretrain=PretrainConfig(here, patch=16, crop=14, epochs=1, batch=16, hidden=8, outputs=8),
        mil=MilConfig(here, seeds=(0, 1), epochs=2, hidden=8),
        report=ReportConfig(here, bags=1, cells=3, normals=1),
    )
    return dataclasses.replace(config, **changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, cells):
    """A finished sweep, which tests only read."""
    out = tmp_path_factory.mktemp("sweep")
    assert sweep(tiny(out, cells)) == out / "report.html"
    return out


def test_the_table_has_every_cell_of_the_grid_once(finished):
    table = pd.read_csv(finished / "sweep.csv")
    keys = table[["arm", "rate", "draw", "seed", "split"]]
    assert not keys.duplicated().any()
    assert len(table) == 2 * 2 * 2 * 2 * 3
    assert list(table["rate"].unique()) == [0.3, 0.1]
    assert list(table["arm"].unique()) == ["random", "colour"]
    test = table[table["split"] == "test"]
    np.testing.assert_allclose(test["witness_rate"], test["rate"])
    # Draws differ in their bags, and seeds in their training.
    for column in ("draw", "seed"):
        assert (test.groupby(["rate", "arm", column])["bag_auroc"].mean().notna()).all()
    assert test.groupby("draw")["average_precision_distance"].mean().nunique() == 2


def test_the_summary_is_the_mean_over_draws_of_the_means_over_seeds(finished):
    table = pd.read_csv(finished / "sweep.csv")
    summary = json.loads((finished / "summary.json").read_text())
    assert len(summary["cells"]) == 4
    for cell in summary["cells"]:
        mine = table[(table["arm"] == cell["arm"]) & (table["rate"] == cell["rate"])]
        mine = mine[mine["split"] == "test"]
        draws = mine.groupby("draw")["average_precision_attention"].mean()
        found = cell["metrics"]["average_precision_attention"]
        assert found["mean"] == pytest.approx(draws.mean(), rel=1e-6)
        assert found["high"] == pytest.approx(interval(draws.tolist())["high"], rel=1e-6)
        assert cell["over"] == "draws"


def test_a_cell_of_the_grid_is_a_run_folder_with_a_page(finished):
    for rate in (0.3, 0.1):
        assert (run_folder(finished, rate, 0) / "report.html").exists()
    assert (finished / "report.html").read_text().count("draw-0/report.html") == 2


def test_the_same_command_again_works_on_nothing(finished, cells, monkeypatch):
    before = (finished / "sweep.csv").read_bytes()
    monkeypatch.setattr(sweep_workers, "do_unit", None)
    sweep(tiny(finished, cells))
    assert (finished / "sweep.csv").read_bytes() == before


def test_a_larger_grid_adds_what_is_missing(tmp_path, cells, monkeypatch):
    out = tmp_path / "grown"
    sweep(tiny(out, cells, witness_rates=(0.3,), draws=1, colour=False))
    done = []
    work = sweep_workers.do_unit

    def noted(config, unit):
        done.append((unit.arm, unit.draw, unit.rates))
        return work(config, unit)

    monkeypatch.setattr(sweep_workers, "do_unit", noted)
    sweep(tiny(out, cells, witness_rates=(0.3, 0.1), draws=1))
    assert done == [("colour", 0, (0.3,)), ("random", 0, (0.1,)), ("colour", 0, (0.1,))]
    done.clear()
    more = dataclasses.replace(tiny(out, cells).mil, seeds=(0, 1, 2))
    sweep(tiny(out, cells, witness_rates=(0.3,), draws=1, mil=more, colour=False))
    assert done == [("random", 0, (0.3,))]
    assert set(pd.read_csv(out / "sweep.csv")["seed"]) == {0, 1, 2}
    done.clear()
    other = dataclasses.replace(tiny(out, cells).mil, lr=1e-2)
    sweep(tiny(out, cells, witness_rates=(0.3,), draws=1, mil=other, colour=False))
    assert done == [("random", 0, (0.3,))]


def test_decoded_cells_are_shared_and_dropped(finished, cells, monkeypatch, tmp_path):
    assert (finished / "cells-16.npy").exists()
    assert not list(finished.glob("rate-*/draw-*/cells-16.*"))
    paths = [str(path) for path in sorted(cells.rglob("*.png"))]
    store = open_store(paths, 16, tmp_path / "all")
    some = [paths[7], paths[3], paths[7], paths[100]]
    (tmp_path / "some").mkdir()
    share_store(store, some, tmp_path / "some")
    times = [path.stat().st_mtime_ns for path in sorted((tmp_path / "some").glob("cells-16.n*"))]
    opened = open_store(some, 16, tmp_path / "some")
    fresh = open_store(some, 16, tmp_path / "fresh")
    assert opened.paths == fresh.paths == (paths[7], paths[3], paths[100])
    assert np.array_equal(opened.images, fresh.images)
    again = [path.stat().st_mtime_ns for path in sorted((tmp_path / "some").glob("cells-16.n*"))]
    assert times == again  # taken as it was, not decoded anew


def test_copies_of_a_file_are_known_to_a_shared_store(tmp_path, cells):
    paths = [str(path) for path in sorted(cells.rglob("*.png"))][:4]
    copy = tmp_path / "copy.png"
    shutil.copyfile(paths[1], copy)
    store = open_store([*paths, str(copy)], 16, tmp_path / "all")
    (tmp_path / "some").mkdir()
    share_store(store, [str(copy), paths[1], paths[0]], tmp_path / "some")
    assert open_store([str(copy), paths[1], paths[0]], 16, tmp_path / "some").copies == (
        (str(copy), paths[1]),
    )


def test_bags_that_repeat_one_another_are_warned_of(tmp_path, cells, capsys):
    """Twelve normal cells for validation: a bag of twelve takes them all."""
    bags = dataclasses.replace(tiny(tmp_path, cells).bags, bag_size=12, val_bags=2)
    for out, config in {
        "some": tiny(tmp_path / "some", cells, bags=bags, only_report=True, witness_rates=(0.1,)),
        "none": tiny(tmp_path / "none", cells, only_report=True),
    }.items():
        with pytest.raises(UserError, match="No part of the sweep is finished"):
            sweep(config)
        warning = "WARNING: 1 of 4 val bags repeat all cells of another"
        assert (warning in capsys.readouterr().out) == (out == "some")


def test_a_part_that_fails_does_not_stop_the_rest_and_is_tried_again(tmp_path, cells, monkeypatch):
    real = sweep_work.mil

    def failing(config):
        if config.arms == ("colour",):
            raise UserError("no colours today")
        return real(config)

    monkeypatch.setattr(sweep_work, "mil", failing)
    config = tiny(tmp_path, cells, witness_rates=(0.3,), draws=1)
    with pytest.raises(UserError, match=r"1 part.*colour at 30 %, draw 0.*no colours today"):
        sweep(config)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [cell["arm"] for cell in summary["cells"]] == ["random"]
    assert summary["facts"]["missing"] == 1
    assert "1 part of the grid is missing" in (tmp_path / "report.html").read_text()
    monkeypatch.undo()
    monkeypatch.setattr(sweep_workers, "do_unit", None)  # must not work
    (tmp_path / "sweep.csv").unlink()
    sweep(dataclasses.replace(config, only_report=True))
    assert set(pd.read_csv(tmp_path / "sweep.csv")["arm"]) == {"random"}
    other = dataclasses.replace(config, out=tmp_path / "other", only_report=True)
    with pytest.raises(UserError, match="No part of the sweep is finished"):
        sweep(other)
    monkeypatch.undo()
    sweep(config)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [cell["arm"] for cell in summary["cells"]] == ["random", "colour"]


@pytest.mark.parametrize("curriculum", [False, True])
def test_one_encoder_serves_all_rates_and_a_curriculum_starts_at_the_rate_above(
    tmp_path, cells, curriculum
):
    config = tiny(tmp_path, cells, draws=1, shared_encoder=not curriculum, curriculum=curriculum)
    sweep(config)
    high, low = (run_folder(tmp_path, rate, 0) for rate in (0.3, 0.1))
    encoders = [(out / "pretrain" / "random" / "encoder.pt").read_bytes() for out in (high, low)]
    assert encoders[0] == encoders[1]
    for out, starts in ((high, False), (low, curriculum)):
        for arm in ("random", "colour"):
            log = pd.read_csv(out / "mil" / arm / "seed0" / "log.csv")
            assert (log["epoch"].iloc[0] == 0) == starts, (out, arm)
    text = (tmp_path / "report.html").read_text()
    assert ("a curriculum that uses data" in text) == curriculum
    assert "serves all rates" in text


def test_freezing_begins_where_there_is_something_to_freeze(tmp_path, cells):
    config = tiny(tmp_path, cells, draws=1, curriculum=True, colour=False)
    mil = dataclasses.replace(config.mil, freeze=("embed",), freeze_epochs=2)
    sweep(dataclasses.replace(config, mil=mil))
    high, low = (
        torch.load(
            run_folder(tmp_path, rate, 0) / "mil" / "random" / "seed0" / "model.pt",
            weights_only=True,
        )["state"]
        for rate in (0.3, 0.1)
    )
    assert torch.equal(high["embed.1.weight"], low["embed.1.weight"])


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"arms": ()}, "arms must be some of"),
        ({"arms": ("best",)}, "arm must be one of .* Got .best."),
        ({"draws": 0}, "draws must be at least 1"),
        ({"workers": 0}, "workers must be at least 1"),
        ({"witness_rates": (0.1, 1.5)}, "witness_rates must be above 0"),
        ({"witness_rates": (0.1, 0.05, 0.01)}, "both put 1 abnormal"),
        ({"mil": MilConfig("x")}, "mil.out must not be set"),
    ],
)
def test_sweep_refuses(tmp_path, cells, changes, match):
    out = tmp_path / "new"
    with pytest.raises(UserError, match=match):
        sweep(tiny(out, cells, **changes))
    assert not out.exists()


def test_sweep_refuses_slides_and_starts(tmp_path, cells):
    config = tiny(tmp_path, cells)
    slides = dataclasses.replace(config.bags, cells=None, slides=tmp_path / "slides.csv")
    with pytest.raises(UserError, match="use `run` for them"):
        sweep(dataclasses.replace(config, bags=slides))
    start = dataclasses.replace(config.mil, start=tmp_path)
    with pytest.raises(UserError, match="use curriculum"):
        sweep(dataclasses.replace(config, mil=start))


# --- interruption --------------------------------------------------------------------------------


def command(out, cells):
    return [
        *(sys.executable, "-m", "examples.slam_ags_cytology", "sweep", "--out", str(out)),
        *("--arms", "random", "ags", "--witness-rates", "0.3", "0.1", "--draws", "1"),
        *("--workers", "2", "--no-colour", "--bags.cells", str(cells)),
        *("--bags.normal", "LYT", "MON", "NGS", "--bags.positive", "BLA", "PMO"),
        *("--bags.bag-size", "10", "--bags.train-bags", "3", "--bags.val-bags", "1"),
        *("--bags.test-bags", "2", "--pretrain.patch", "16", "--pretrain.crop", "14"),
        *("--pretrain.epochs", "2", "--pretrain.batch", "16", "--mil.seeds", "0", "1"),
        *("--mil.epochs", "3", "--pretrain.device", "cpu"),
    ]


def children(pid):
    """Processes that have `pid` as parent, from the process table."""
    table = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True)
    pairs = [line.split() for line in table.stdout.splitlines()]
    return [int(child) for child, parent in pairs if int(parent) == pid]


def alive(pid):
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_killed_sweep_leaves_no_workers_and_continues_to_the_same_table(tmp_path, cells):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(whole, cells), check=True, capture_output=True)
    process = subprocess.Popen(command(killed, cells), stdout=subprocess.PIPE, text=True)
    assert re.match(r"\[1/4\] ", process.stdout.readline())
    workers = children(process.pid)
    assert len(workers) >= 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 30
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not any(map(alive, workers))
    assert not (killed / "sweep.csv").exists()
    again = subprocess.run(command(killed, cells), check=True, capture_output=True, text=True)
    assert re.search(r"Continuing: [123] of 4 parts are finished", again.stdout)
    assert re.search(r"\[4/4\] .* about 0:00:00 left", again.stdout)
    pd.testing.assert_frame_equal(
        pd.read_csv(whole / "sweep.csv"), pd.read_csv(killed / "sweep.csv"), rtol=1e-4
    )


def test_a_gpu_each_or_a_core_each(monkeypatch, tmp_path, cells):
    config = tiny(tmp_path, cells, workers=None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    workers, devices = sweep_workers.resources(config, 100)
    assert workers == len(devices) == len(os.sched_getaffinity(0))
    assert set(devices) == {"auto"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert sweep_workers.resources(config, 100) == (3, ["cuda:0", "cuda:1", "cuda:2"])
    assert sweep_workers.resources(config, 2)[0] == 2  # no more processes than work
    pretrain = dataclasses.replace(config.pretrain, device="cuda:1")
    named = dataclasses.replace(config, pretrain=pretrain)
    assert sweep_workers.resources(named, 100) == (1, ["cuda:1"])
    twice = dataclasses.replace(config, workers=4)
    assert sweep_workers.resources(twice, 100)[1] == ["cuda:0", "cuda:1", "cuda:2", "cuda:0"]


# --- the summary ---------------------------------------------------------------------------------

FACTS = {"arms": ["sum", "ags"], "reference": "sum"}


def rows(value, arms=("sum", "ags"), draws=3, seeds=2, rate=0.1):
    """Rows whose every figure is `value(arm, draw, seed)`."""
    found = []
    for arm in arms:
        for draw in range(draws):
            for seed in range(seeds):
                for split in ("val", "test"):
                    names = [*measured(), "bag_f1_all_positive", "witness_rate", "bags"]
                    names += ["searched_bags", "capped_bags"]
                    names += [
                        name.replace("_distance", "_random")
                        for name in measured()
                        if name.endswith("_distance")
                    ]
                    row = dict.fromkeys(names, value(arm, draw, seed))
                    place = {"arm": arm, "rate": rate, "draw": draw, "seed": seed, "split": split}
                    found.append({**place, "collapsed": arm == "ags", "weak": False, **row})
    return found


def test_intervals_are_over_draws_and_differences_are_paired():
    # Draws differ much, arms within a draw by nearly the same amount.
    value = lambda arm, draw, seed: 10.0 * draw + seed + (arm == "ags") * (1 + 0.1 * draw)  # noqa: E731
    summary = summarise(sweep_table(rows(value), FACTS["arms"], [0.1]), FACTS)
    mine = {cell["arm"]: cell for cell in summary["cells"]}
    found = mine["sum"]["metrics"]["bag_auroc"]
    half = 4.302652729911275 * 10 / math.sqrt(3)  # draws 0.5, 10.5, 20.5: standard deviation 10
    assert found == pytest.approx({"mean": 10.5, "low": 10.5 - half, "high": 10.5 + half, "n": 3})
    assert mine["sum"]["differences"] == {}
    difference = mine["ags"]["differences"]["bag_auroc"]
    half = 4.302652729911275 * 0.1 / math.sqrt(3)
    assert difference == pytest.approx({"mean": 1.1, "low": 1.1 - half, "high": 1.1 + half, "n": 3})
    assert mine["ags"]["collapsed"] == 3
    assert "COLLAPSED 3/3" in sweep_text(summary)


def test_one_draw_gives_intervals_over_seeds_and_none_for_the_distance():
    value = lambda arm, draw, seed: float(seed)  # noqa: E731
    summary = summarise(sweep_table(rows(value, draws=1), FACTS["arms"], [0.1]), FACTS)
    cell = summary["cells"][0]
    assert cell["over"] == "seeds"
    assert cell["metrics"]["bag_auroc"]["n"] == 2
    assert cell["metrics"]["average_precision_distance"]["low"] is None
    assert "over 2 seeds" in sweep_text(summary)


def test_figures_that_do_not_exist_stay_away():
    value = lambda arm, draw, seed: None  # noqa: E731
    summary = summarise(sweep_table(rows(value), FACTS["arms"], [0.1]), FACTS)
    assert summary["cells"][0]["metrics"]["average_precision_attention"]["mean"] is None
    assert summary["default_ranking"] == "instance_score"
    json.dumps(summary, allow_nan=False)


# --- the page ------------------------------------------------------------------------------------


def test_the_page_is_safe_whole_and_loads_nothing(finished, tmp_path):
    summary = json.loads((finished / "summary.json").read_text())
    evil = "<script>alert(1)</script>"
    summary["facts"]["positive"] = [evil]
    summary["facts"]["arms"][0] = "ags"
    for cell in summary["cells"]:
        if cell["arm"] == "random":
            cell["arm"], cell["collapsed"] = "ags", 1
    table = pd.read_csv(finished / "sweep.csv")
    path = sweep_report(tmp_path, table, summary)
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "img"}
    assert "default-src 'none'" in text
    assert evil in page.text
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text)) <= set(ids)
    assert "2 of 4 pretrainings collapsed" in page.text
    assert "1 of 2 collapsed" in page.text
    for link in re.findall(r'href="([^"#]*)"', text):
        assert link.startswith("./"), link
    assert "Student's t over 2 draws" in page.text
    assert "chance" in page.text
    assert text.count("<svg") == 6


# --- colour --------------------------------------------------------------------------------------


def test_mean_colours_are_those_of_border_ring_and_middle():
    images = torch.zeros(1, 3, 16, 16)
    images[:, 0] = 1.0  # border: red
    images[:, 0, 2:14, 2:14], images[:, 1, 2:14, 2:14] = 0.0, 1.0  # ring: green
    images[:, 1, 4:12, 4:12], images[:, 2, 4:12, 4:12] = 0.0, 0.5  # middle: half blue
    assert MeanColours()(images).tolist() == [[1, 0, 0, 0, 1, 0, 0, 0, 0.5]]


def test_the_colours_of_a_run_are_those_of_its_cells(finished):
    from PIL import Image

    bag = read_bags(run_folder(finished, 0.3, 0) / "embed" / "colour")[0]
    assert bag.features.shape[1] == 9
    pixels = np.asarray(Image.open(bag.paths[3]).convert("RGB")) / 255
    np.testing.assert_allclose(bag.features[3, 6:], pixels[4:12, 4:12].mean((0, 1)), rtol=1e-4)
