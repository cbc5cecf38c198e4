"""The page: what it shows, that it is safe and whole, and the table beside it."""

import html.parser
import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from examples.slam_ags_cytology.arms import ARMS
from examples.slam_ags_cytology.colour import COLOUR
from examples.slam_ags_cytology.embeddings import Bag, bag_path, write_bag
from examples.slam_ags_cytology.errors import UserError
from examples.slam_ags_cytology.evaluate import EvaluateConfig, evaluate
from examples.slam_ags_cytology.figures import COLOURS
from examples.slam_ags_cytology.report import ReportConfig, report

EVIL = "<script>alert(1)</script>"


class Page(html.parser.HTMLParser):
    """Tags, links, titles and visible text of a page; complains about tags that do not match."""

    VOID = ("meta", "input", "br", "img", "link", "hr")

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.titles, self.texts, self.open = [], [], [], [], []
        self.feed(text)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.texts))


def make_run(out, arms=("ags", "sum"), seeds=(0, 1), truth=True):
    """Six bags of five cells, with names that try to become markup."""
    rng = np.random.default_rng(0)
    rows, cells, manifest = [], [], []
    (out / "cells").mkdir(parents=True)
    for split in ("train", "val", "test"):
        for label in (0, 1):
            bag = f"{split} {label} & co"
            rows.append((bag, split, label))
            for j in range(5):
                name = f"cells/{split}{label}{j}"
                name += " #1?<i>'\".png" if j == 0 else ".png"
                abnormal = int(label == 1 and j < 2)
                truth_text = "" if not truth and label else abnormal
                class_name = EVIL if abnormal else "LYT"
                Image.fromarray(rng.integers(0, 255, (24, 24, 3), np.uint8)).save(
                    out / name, format="PNG"
                )
                manifest.append((name, bag, label, split, truth_text, class_name))
                known = abnormal if truth or not label else -1
                cells.append((bag, split, label, name, known, class_name))
    columns = ["path", "bag", "label", "split", "instance_label", "class_name"]
    pd.DataFrame(manifest, columns=columns).to_csv(out / "manifest.csv", index=False)
    for arm in arms:
        for seed in seeds:
            folder = out / "mil" / arm / f"seed{seed}"
            folder.mkdir(parents=True)
            frame = pd.DataFrame(rows, columns=["bag", "split", "label"])
            frame["probability"] = 0.2 + 0.5 * frame["label"] + 0.01 * seed
            frame["threshold"] = 0.5
            frame.to_csv(folder / "bags.csv", index=False)
            columns = ["bag", "split", "label", "path", "instance_label", "class_name"]
            frame = pd.DataFrame(cells, columns=columns)
            place = np.tile(np.arange(5.0), 6)
            frame["attention"] = (place + 1) / 15
            frame["instance_score"] = 2 - place
            frame["slide_label"] = 2 - place
            frame["distance"] = 5 + place
            frame.to_csv(folder / "instances.csv", index=False)
            torch.save({"fingerprint": arm}, folder / "model.pt")
    for arm in arms:
        folder = out / "pretrain" / arm
        folder.mkdir(parents=True)
        step = np.arange(60.0)
        log = {"step": step, "loss_contrastive": 4 - step / 60, "loss_similarity": 1 - step / 60}
        log |= {"cosine": -0.1, "conflict": 1.0, "scale": 1.0, "effective_rank": 3.0}
        pd.DataFrame(log).to_csv(folder / "log.csv", index=False)
        status = {"collapsed": False, "reason": "", "chance": 4.0}
        (folder / "status.json").write_text(json.dumps(status))
        (folder / "config.json").write_text(json.dumps({"config": {"arm": arm, "lr": 0.125}}))


def embed(out, arm="ags", constant=False):
    """Embeddings of the cells of the run, in which abnormal ones lie apart."""
    rng = np.random.default_rng(0)
    manifest = pd.read_csv(out / "manifest.csv")
    for name, part in manifest.groupby("bag"):
        truth = part["instance_label"].fillna(-1).to_numpy(np.int8)
        features = rng.normal(size=(len(part), 6)) + 9 * (truth[:, None] == 1)
        write_bag(
            bag_path(out / "embed" / arm, name),
            Bag(
                name,
                int(part["label"].iloc[0]),
                part["split"].iloc[0],
                (0 * features if constant else features).astype(np.float32),
                part["path"].to_numpy(object),
                truth,
                part["class_name"].to_numpy(object),
            ),
        )


def collapse(out, arm, reason="contrast stayed at chance"):
    status = {"collapsed": True, "reason": reason, "chance": 4.0}
    (out / "pretrain" / arm / "status.json").write_text(json.dumps(status))


def make(out, **changes):
    evaluate(EvaluateConfig(out))
    path = report(ReportConfig(out, **changes))
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


@pytest.fixture
def run(tmp_path):
    make_run(tmp_path)
    for arm in ("ags", "sum"):
        embed(tmp_path, arm)
    return tmp_path


def test_the_page_holds_everything_and_loads_nothing(run):
    text, page = make(run)
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "iframe", "object", "img"}
    assert "default-src 'none'" in text
    urls = re.findall(r"url\(([^)#][^)]*)\)", text)
    assert urls
    assert all(url.startswith("data:image/jpeg;base64,") for url in urls)
    for _, attributes in page.tags:
        assert "src" not in attributes
        assert not any(name.startswith("on") for name in attributes)
        link = attributes.get("href") or ""
        assert not re.match(r"(?i)\s*(https?:|//|javascript:|data:)", link), link


def test_names_of_classes_files_bags_arms_and_reasons_are_escaped(tmp_path):
    make_run(tmp_path, arms=("ags", "<b>$x_1^{$"))
    collapse(tmp_path, "<b>$x_1^{$", EVIL)
    text, page = make(tmp_path)
    assert "<script" not in text
    assert "<b>" not in text
    assert "<i>'" not in text
    assert EVIL in page.text  # as text, for the reader
    assert "test 1 & co" in page.text
    assert any(EVIL in (attributes.get("title") or "") for _, attributes in page.tags)


def test_a_collapsed_arm_raises_an_alarm_and_is_marked_wherever_it_appears(run):
    _, page = make(run)
    assert not any(attributes.get("role") == "alert" for _, attributes in page.tags)
    assert "collapsed" not in page.text.replace("A collapsed", "")
    collapse(run, "sum")
    text, page = make(run)
    assert any(attributes.get("role") == "alert" for _, attributes in page.tags)
    assert "1 of 2 pretrainings collapsed" in page.text
    assert "sum : contrast stayed at chance" in page.text
    assert "sum (collapsed)" in text  # in the figure
    rows = re.findall(r"<tr[^>]*>.*?</tr>", text, re.DOTALL)
    of_sum = [row for row in rows if "</span>sum" in row]
    assert len(of_sum) == 5  # four rankings and the bags
    assert all('class="fallen"' in row and "badge" in row for row in of_sum)
    assert not any("fallen" in row for row in rows if "</span>ags" in row)


def test_the_arm_shown_first_is_one_that_did_not_collapse(run):
    collapse(run, "ags")
    text, _ = make(run)
    assert re.findall(r'id="(a-\d)" checked', text) == ["a-1"]


def test_chance_and_intervals_stand_beside_the_figures(run):
    _, page = make(run)
    assert "Chance" in page.text
    assert "1.000 ± 0.000" in page.text
    assert "(n = 2)" in page.text
    # random order of 5 cells, 2 of them abnormal: (1/4 (5 - H5) + H5) / 5
    harmonic = 1 + 1 / 2 + 1 / 3 + 1 / 4 + 1 / 5
    assert f"{((5 - harmonic) / 4 + harmonic) / 5:.3f}" in page.text


def test_one_seed_is_said_to_give_no_interval(tmp_path):
    make_run(tmp_path, seeds=(3,))
    _, page = make(tmp_path)
    assert "hence there are no intervals" in page.text
    assert "seed 3" in page.text
    assert "± 0" not in page.text


def gallery(text, arm, ranking):
    """Titles of the ranked cells of an arm's first bag, in order."""
    part = text[text.index(f'<div class="by-arm a-{arm}">') :]
    part = part[part.index('<div class="bag">') :]
    part = part[part.index(f'<div class="by-ranking r-{ranking}">') :]
    return re.findall(r'class="cell t\d+ (\w+)[^"]*" href="([^"]*)"', part[: part.index("</ol>")])


def test_cells_are_shown_most_suspicious_first_with_their_truth_and_link(run):
    text, _ = make(run, cells=3)
    assert gallery(text, 0, "instance_score") == [
        ("abnormal", "./cells/test10%20%231%3F%3Ci%3E%27%22.png"),
        ("abnormal", "./cells/test11.png"),
        ("normal", "./cells/test12.png"),
    ]
    assert [truth for truth, _ in gallery(text, 0, "distance")] == ["normal"] * 3


def test_reference_cells_are_the_least_suspicious_of_negative_bags(run):
    text, _ = make(run, normals=2)
    start = text.index('<ol class="cells reference">')
    found = re.findall(r'href="([^"]*)"', text[start : text.index("</ol>", start)])
    assert found == ["./cells/test00%20%231%3F%3Ci%3E%27%22.png", "./cells/test01.png"]  # attention


def test_each_picture_is_in_the_page_once(run):
    text, _ = make(run)
    shown = set(re.findall(r"class=\"cell (t\d+) ", text))
    rules = re.findall(r"\.(t\d+)\{background-image", text)
    assert len(rules) == len(set(rules))
    assert set(rules) == shown


def test_a_lost_picture_leaves_a_gap_and_not_an_error(run):
    (run / "cells" / "test11.png").unlink()
    (run / "cells" / "test12.png").write_bytes(b"no image")
    text, page = make(run)
    assert "no picture" in page.text
    assert "test11.png" in text


def test_unknown_truth_is_grey_and_without_a_count(tmp_path):
    make_run(tmp_path, truth=False)
    text, page = make(tmp_path)
    assert {truth for truth, _ in gallery(text, 0, "attention")} == {"unknown"}
    assert "abnormal cells among the first" not in page.text
    assert "cannot be scored" in page.text


def test_the_ranking_shown_first_is_the_one_chosen_on_validation(run):
    text, _ = make(run)
    assert len(re.findall(r'name="ranking"[^>]* checked', text)) == 1
    assert re.search(r'id="r-instance_score" checked', text)


def test_the_same_run_gives_the_same_bytes_anywhere(run, tmp_path_factory):
    text, _ = make(run)
    again, _ = make(run)
    other = tmp_path_factory.mktemp("elsewhere") / "moved"
    shutil.copytree(run, other)
    moved, _ = make(other)
    assert text == again == moved
    assert str(run) not in text


def test_curves_have_names_of_their_own(run):
    text, page = make(run)
    # overview, panels, and for each arm: attention, embeddings, probabilities
    assert text.count("<svg") == 1 + 6 + 3 * 2
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text))
    assert used <= set(ids)


def test_maps_and_spreads_are_of_the_cells_of_the_test_bags(run):
    text, page = make(run)
    assert "Maps of the embeddings" in page.text
    assert re.search(r"\d+ % of the variance of 6 features", page.text)
    assert "data:image/png;base64," in text  # points as a picture, not one by one
    # Attention of 1/15 to 5/15 in bags of 5: one third to five thirds of an equal share.
    assert "×0.5" in text
    assert "×1" in text
    embed(run, "sum", constant=True)
    _, page = make(run)
    assert "there is nothing to draw" in page.text


def test_a_run_without_embeddings_has_no_maps(tmp_path):
    make_run(tmp_path)
    _, page = make(tmp_path)
    assert "Maps of the embeddings" not in page.text
    assert "Where attention goes" in page.text


def test_k_beyond_the_bags_is_said_to_be_capped(run):
    _, page = make(run)
    assert "K = 400 cells; 1 of 1 bags hold fewer" in page.text
    evaluate(EvaluateConfig(run, top_k=3))
    page = Page(report(ReportConfig(run)).read_text(encoding="utf-8"))
    assert "K = 3 cells." in page.text


def test_the_figures_lie_beside_the_page_as_json(run):
    make(run)
    content = json.loads((run / "results.json").read_text(encoding="utf-8"))
    assert content["facts"]["Cells"] == "30"
    figure = content["arms"]["ags"]["metrics"]["test"]["average_precision_instance_score"]
    assert figure == {"mean": 1.0, "low": 1.0, "high": 1.0, "n": 2}


def test_arms_without_a_log_have_no_curves(run):
    for arm in ("ags", "sum"):
        (run / "pretrain" / arm / "log.csv").unlink()
    _, page = make(run)
    assert "How pretraining went" not in page.text


def test_results_csv_has_a_row_per_arm_split_and_metric(run):
    collapse(run, "sum")
    make(run)
    table = pd.read_csv(run / "results.csv")
    assert set(table["arm"]) == {"chance", "ags", "sum"}
    row = table[
        (table["arm"] == "ags")
        & (table["split"] == "test")
        & (table["metric"] == "average_precision_instance_score")
    ]
    assert row[["mean", "low", "high", "n"]].to_numpy().tolist() == [[1, 1, 1, 2]]
    assert set(table.loc[table["arm"] == "sum", "collapsed"].astype(str)) == {"True"}


def test_settings_are_shown_without_folders(run):
    _, page = make(run)
    assert '"lr": 0.125' in page.text
    assert str(run) not in page.text


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"bags": 0}, "`bags` must be at least 1"),
        ({"cells": 0}, "`cells` must be at least 1"),
        ({"normals": -1}, "`normals` must be at least 0"),
        ({"thumbnail": 8}, "`thumbnail` must be at least 16"),
        ({"arms": ("cagrad",)}, "cagrad were not"),
    ],
)
def test_report_refuses(run, changes, match):
    evaluate(EvaluateConfig(run))
    with pytest.raises(UserError, match=match):
        report(ReportConfig(run, **changes))
    assert not (run / "report.html").exists()


def test_report_refuses_a_missing_or_damaged_summary(run):
    with pytest.raises(UserError, match="Run the evaluate step first"):
        report(ReportConfig(run))
    evaluate(EvaluateConfig(run))
    (run / "evaluate" / "summary.json").write_text("{")
    with pytest.raises(UserError, match="Run the evaluate step again"):
        report(ReportConfig(run))


def test_report_refuses_results_that_went_away(run):
    evaluate(EvaluateConfig(run))
    shutil.rmtree(run / "mil" / "sum")
    with pytest.raises(UserError, match="must hold the evaluated results"):
        report(ReportConfig(run))


def test_each_arm_worth_naming_has_a_colour_of_its_own():
    assert len(set(COLOURS)) == len(COLOURS) >= len({*ARMS, COLOUR})


def test_arms_stand_in_the_order_that_was_asked_for(tmp_path):
    asked = ("sum", "random", "ags")
    make_run(tmp_path, arms=sorted(asked))
    evaluate(EvaluateConfig(tmp_path, arms=asked))
    metrics = pd.read_csv(tmp_path / "evaluate" / "metrics.csv")
    assert tuple(metrics["arm"].unique()) == asked
    summary = json.loads((tmp_path / "evaluate" / "summary.json").read_text())
    assert tuple(summary["arms"]) == asked
    for arms, expected in (((), asked), (("ags", "sum"), ("ags", "sum"))):
        text = report(ReportConfig(tmp_path, arms=arms)).read_text(encoding="utf-8")
        assert tuple(re.findall(r'aria-label="Show (\w+)"', text))[: len(expected)] == expected
        results = pd.read_csv(tmp_path / "results.csv")
        assert tuple(results["arm"].unique())[1:] == expected  # the first is chance
