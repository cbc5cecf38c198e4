"""The command line: exit codes, messages, and one run from cells to report."""

import csv
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from examples.slam_ags_cytology import __main__ as cli
from examples.slam_ags_cytology.__main__ import STEPS, main
from examples.slam_ags_cytology.embeddings import read_bags
from examples.slam_ags_cytology.errors import UserError
from examples.slam_ags_cytology.pretrain import PretrainConfig
from examples.slam_ags_cytology.run import RunConfig, run
from examples.slam_ags_cytology.synthetic import SyntheticConfig, synthetic

CELLS = [
    *("--synthetic.normal", "300", "--synthetic.abnormal", "40", "--synthetic.size", "32"),
    *("--bags.bag-size", "10", "--bags.witness-rate", "0.2"),
    *("--bags.train-bags", "4", "--bags.val-bags", "1", "--bags.test-bags", "1"),
]
TINY = [
    *("--pretrain.patch", "32", "--pretrain.crop", "28", "--pretrain.epochs", "1"),
    *("--pretrain.batch", "16", "--pretrain.hidden", "16", "--pretrain.outputs", "8"),
    *("--mil.epochs", "3", "--mil.hidden", "16", "--mil.seeds", "0"),
    *("--report.bags", "1", "--report.cells", "4", "--report.normals", "2"),
]


def tiny_run(out, *more):
    return ["run", "--out", str(out), "--arms", "random", "ags", *CELLS, *TINY, *more]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole run, which tests only read."""
    out = tmp_path_factory.mktemp("finished") / "run"
    assert main(tiny_run(out)) == 0
    return out


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    """A folder of cells, which tests only read."""
    return synthetic(SyntheticConfig(tmp_path_factory.mktemp("c"), normal=90, abnormal=20, size=16))


def contents(folder):
    """Every file with its modification time and size."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.stat().st_size)
        for path in folder.rglob("*")
        if path.is_file()
    }


def refusal(arguments, capsys):
    """The message of a command that must be refused: one line, no traceback."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert "Traceback" not in message
    assert message.count("\n") == 1
    assert message.endswith("\n")
    return message


# --- a whole run ---------------------------------------------------------------------------------


def test_a_run_ends_with_a_report_and_its_numbers(finished):
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert page.lower().startswith("<!doctype html>")
    assert re.search(r"data:image/\w+;base64,", page)
    with (finished / "results.csv").open(encoding="utf-8", newline="") as file:
        rows = [*csv.DictReader(file)]
    assert {row["arm"] for row in rows} == {"random", "ags", "colour", "chance"}
    metrics = pd.read_csv(finished / "evaluate" / "metrics.csv")
    assert set(metrics["arm"]) == {"random", "ags", "colour"}
    test = metrics[metrics["split"] == "test"]
    assert test["precision_at_k_random"].tolist() == pytest.approx([0.2] * 3)  # the witness rate
    summary = json.loads((finished / "evaluate" / "summary.json").read_text(encoding="utf-8"))
    assert {*summary["arms"]} == {"random", "ags", "colour"}
    recorded = json.loads((finished / "run.json").read_text(encoding="utf-8"))
    assert recorded["pretrain"]["patch"] == 32


def test_synthetic_bags_hold_the_easy_classes(finished):
    manifest = pd.read_csv(finished / "manifest.csv")
    positive = manifest["instance_label"] == 1
    assert set(manifest.loc[~positive, "class_name"]) == {"LYT", "NGS"}
    assert set(manifest.loc[positive, "class_name"]) == {"BLA", "PMO"}


def test_the_same_command_again_keeps_all_results(finished, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    before = contents(out)
    monkeypatch.setattr("examples.slam_ags_cytology.training.Training.run", None)  # must not train
    monkeypatch.setattr("examples.slam_ags_cytology.mil.train_mil", None)
    capsys.readouterr()
    assert main(tiny_run(out)) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(out / "report.html")
    after = contents(out)
    assert after.keys() == before.keys()
    results = re.compile(r"pretrain/|mil/|embed/|manifest\.csv|bags\.json|^cells/")
    kept = {name for name in before if results.search(name)}
    assert len(kept) > 20
    assert {name for name in kept if after[name] != before[name]} == set()


def test_a_run_with_other_settings_in_the_same_folder_changes_nothing(finished, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    results = contents(out / "pretrain") | contents(out / "mil")
    for option, value, name in (
        ("--bags.seed", "5", "seed"),
        ("--synthetic.seed", "5", "seed"),
        ("--pretrain.lr", "0.5", "lr"),
    ):
        assert name in refusal(tiny_run(out, option, value), capsys)
    assert contents(out / "pretrain") | contents(out / "mil") == results


def test_classes_that_the_user_names_are_used_of_synthetic_cells_too(tmp_path, capsys, monkeypatch):
    drawn = {}
    monkeypatch.setattr(
        "examples.slam_ags_cytology.run.bags", lambda config: drawn.update(vars(config))
    )
    monkeypatch.setattr("examples.slam_ags_cytology.run.pretrain", _interrupt)
    few = ["--synthetic.normal", "3", "--synthetic.abnormal", "2", "--synthetic.size", "16"]
    named = ["--bags.normal", "MON", "--bags.positive", "PMO"]
    assert main(["run", "--out", str(tmp_path / "a"), *few, *named]) == 130
    assert (drawn["normal"], drawn["positive"]) == (("MON",), ("PMO",))
    assert main(["run", "--out", str(tmp_path / "b"), *few]) == 130
    assert (drawn["normal"], drawn["positive"]) == (("LYT", "NGS"), ("BLA", "PMO"))


# --- help and exit codes -------------------------------------------------------------------------

OPTIONS = {
    "synthetic": ["--normal", "--abnormal", "--size", "--seed", "--difficulty"],
    "bags": ["--cells", "--slides", "--positive", "--witness-rate", "--bag-size", "--split-csv"],
    "pretrain": [
        *("--arm", "--encoder", "--lr", "--similarity-share", "--statistics", "--device"),
        *("--paper", "--precision", "--workers", "--tensorboard"),
    ],
    "embed": ["--arms", "--level", "--batch-size"],
    "mil": ["--arms", "--seeds", "--epochs", "--distance", "--aggregator", "--start", "--freeze"],
    "evaluate": ["--arms", "--top-k"],
    "report": ["--arms", "--bags", "--thumbnail"],
    "sweep": ["--arms", "--witness-rates", "--draws", "--curriculum", "--workers", "--bags.cells"],
    "run": ["--arms", "--bags.cells", "--pretrain.epochs", "--mil.seeds", "--report.cells"],
}


@pytest.mark.parametrize("command", STEPS)
def test_help_names_and_describes_the_options(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for option in ["--out", *OPTIONS[command]]:
        assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w.-])", text), option
    assert "un folder" in text  # the description of --out


def test_help_names_all_commands(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert all(re.search(rf"\b{command}\b", text) for command in STEPS)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["train"],
        ["pretrain"],
        ["pretrain", "--out", "x", "--epochs", "many"],
        ["pretrain", "--out", "x", "--statistics", "some"],
        ["pretrain", "--out", "x", "--no-such-option", "1"],
    ],
)
def test_arguments_that_cannot_be_parsed_end_with_code_two(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def _interrupt(*args, **kwargs):
    raise KeyboardInterrupt


def _refuse(*args, **kwargs):
    raise UserError("the size must be positive.")


@pytest.mark.parametrize("command", STEPS)
def test_every_command_ends_with_130_when_interrupted_and_2_when_refused(
    command, capsys, monkeypatch, tmp_path
):
    config_class, _ = STEPS[command]
    monkeypatch.setitem(cli.STEPS, command, (config_class, _interrupt))
    assert main([command, "--out", str(tmp_path)]) == 130
    assert "The same command continues" in capsys.readouterr().err
    monkeypatch.setitem(cli.STEPS, command, (config_class, _refuse))
    message = refusal([command, "--out", tmp_path], capsys)
    assert message == "error: the size must be positive.\n"


def test_other_errors_are_not_swallowed(monkeypatch, tmp_path):
    def fail(config):
        raise ZeroDivisionError

    monkeypatch.setitem(cli.STEPS, "mil", (STEPS["mil"][0], fail))
    with pytest.raises(ZeroDivisionError):
        main(["mil", "--out", str(tmp_path)])


def test_the_module_is_a_program(tmp_path):
    command = [sys.executable, "-m", "examples.slam_ags_cytology", "pretrain", "--out", tmp_path]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=120)
    assert done.returncode == 2
    assert re.fullmatch(r"error: .*manifest\.csv.*\n", done.stderr)


# --- wrong input ---------------------------------------------------------------------------------


def drawing(out, cells, *more):
    """Arguments that draw bags from LYT (30 cells) and BLA (10 cells)."""
    small = ["--bag-size", "4", "--witness-rate", "0.25", "--train-bags", "1"]
    few = ["--val-bags", "0", "--test-bags", "1"]
    return ["bags", "--out", out, "--cells", cells, *small, *few, *more]


def test_the_recipe_of_the_refusals_works_when_nothing_is_wrong(tmp_path, cells):
    assert main([str(argument) for argument in drawing(tmp_path, cells)]) == 0
    assert (tmp_path / "manifest.csv").is_file()


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--positive", "BLX"], r"'BLX'.*BLA \(10\).*Did you mean 'BLA'"),
        (["--normal", "LYT", "HAC"], "'HAC'"),
        (["--witness-rate", "1.5"], "witness_rate.*1.5"),
        (["--witness-rate", "1", "--bag-size", "12"], "needs 12 positive cells, there are"),
        (["--bag-size", "400"], "needs .* normal cells, there are"),
        (["--split-fractions", "0.5", "0.5", "0.5"], "split_fractions"),
    ],
)
def test_bags_that_cannot_be_drawn_are_refused(tmp_path, cells, capsys, more, named):
    assert re.search(named, refusal(drawing(tmp_path / "out", cells, *more), capsys))
    assert not (tmp_path / "out").exists()


def test_a_missing_and_an_empty_folder_are_refused(tmp_path, capsys):
    message = refusal(drawing(tmp_path / "out", tmp_path / "nowhere"), capsys)
    assert str(tmp_path / "nowhere") in message
    (tmp_path / "empty").mkdir()
    message = refusal(drawing(tmp_path / "out", tmp_path / "empty"), capsys)
    assert str(tmp_path / "empty") in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["pretrain", "embed", "mil", "evaluate", "report"])
def test_a_step_before_its_turn_is_refused(command, tmp_path, capsys):
    out = tmp_path / "nothing yet"
    assert str(out) in refusal([command, "--out", out], capsys)
    assert not out.exists()


@pytest.mark.parametrize("command", STEPS)
def test_an_out_that_is_a_file_is_refused(command, tmp_path, cells, capsys):
    out = tmp_path / "file"
    out.write_text("mine", encoding="utf-8")
    more = ["--cells", cells] if command == "bags" else []
    assert str(out) in refusal([command, "--out", out, *more], capsys)
    assert out.read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--arms", "ags", "agz"], r"arm must be one of random, .* Got 'agz'"),
        (["--arms"], "arms must be some of .* Got none"),
        (["--pretrain.arm", "pcgrad"], r"pretrain\.arm must not be set"),
        (["--mil.arms", "ags"], r"mil\.arms must not be set"),
        (["--bags.out", "elsewhere"], r"bags\.out must not be set"),
    ],
)
def test_a_run_is_refused_before_any_work(tmp_path, capsys, more, named):
    assert re.search(named, refusal(["run", "--out", tmp_path / "out", *more], capsys))
    assert not (tmp_path / "out").exists()


def test_a_truncated_image_is_named_and_left_out(tmp_path, cells, capsys):
    mine = shutil.copytree(cells, tmp_path / "mine")
    out = tmp_path / "out"
    assert main([str(argument) for argument in drawing(out, mine)]) == 0
    manifest = pd.read_csv(out / "manifest.csv")
    broken = (out / manifest["path"][3]).resolve()
    image = io.BytesIO()
    Image.effect_noise((16, 16), 50).convert("RGB").save(image, "PNG")
    broken.write_bytes(image.getvalue()[:200])
    small = ["--batch", "8", "--patch", "16", "--crop", "16", "--epochs", "1"]
    assert main(["pretrain", "--out", str(out), *small]) == 0
    assert f"{broken.name} (OSError: image file is truncated)" in capsys.readouterr().out
    assert main(["embed", "--out", str(out)]) == 0
    embedded = [path for bag in read_bags(out / "embed" / "simclr") for path in bag.paths]
    assert len(embedded) == len(manifest) - 1
    assert manifest["path"][3] not in embedded


def test_a_manifest_with_a_wrong_column_is_named(finished, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    manifest = out / "manifest.csv"
    text = manifest.read_text(encoding="utf-8")
    manifest.write_text(text.replace("label", "lable", 1), encoding="utf-8")
    before = contents(out)
    for command in ("pretrain", "embed"):
        message = refusal([command, "--out", out], capsys)
        assert str(manifest) in message
        assert "label" in message
    assert contents(out) == before
    assert "manifest.csv" in refusal(tiny_run(out), capsys)


def test_an_encoder_that_is_none_is_named(finished, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    encoder = out / "pretrain" / "ags" / "encoder.pt"
    encoder.write_bytes(b"abc" * 50)
    before = contents(out / "embed")
    assert str(encoder) in refusal(["embed", "--out", out, "--arms", "ags"], capsys)
    assert contents(out / "embed") == before


@pytest.mark.slow
def test_the_default_arms_run_on_more_cells(tmp_path, capsys):
    out = tmp_path / "run"
    more = ["--synthetic.normal", "900", "--synthetic.abnormal", "120", "--bags.bag-size", "30"]
    assert main(["run", "--out", str(out), *CELLS, *TINY, *more, "--mil.seeds", "0", "1"]) == 0
    metrics = pd.read_csv(out / "evaluate" / "metrics.csv")
    assert set(metrics["arm"]) == {"random", "sil", "simclr", "sum", "ags", "colour"}
    assert set(metrics["seed"]) == {0, 1}


def test_run_can_be_called_from_python(finished, tmp_path, monkeypatch):
    monkeypatch.setattr("examples.slam_ags_cytology.run.synthetic", _interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(RunConfig(out=tmp_path))
    config = RunConfig(out=tmp_path, pretrain=PretrainConfig(out=finished))
    with pytest.raises(UserError, match=r"pretrain\.out must not be set"):
        run(config)
