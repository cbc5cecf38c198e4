"""What all benchmarks share: their options, how they wait for a device, how they end."""

import argparse
import importlib
import json
from pathlib import Path

import pytest
import torch

from benchmarks import _cli, _measure, overhead

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(path.stem for path in (ROOT / "benchmarks").glob("[!_]*.py"))


def options(*arguments: str) -> argparse.Namespace:
    return _cli.parse(_cli.new_parser("Which?\n\nThat."), arguments)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_benchmark_takes_a_device_and_says_where_there_is_none(script, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(f"benchmarks.{script}").main(["--device", "cuda"])
    assert stopped.value.code == 2
    assert "--device cuda needs a GPU that torch can use. Found none." in capsys.readouterr().err


def test_a_device_that_is_there_is_taken_and_names_the_file(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    chosen = options("--device", "cuda")
    assert chosen.device == "cuda"
    assert _cli.result_path(chosen, "kernels") == _cli.RESULTS / "kernels-cuda.json"
    assert _cli.result_path(options(), "kernels") == _cli.RESULTS / "kernels.json"


@pytest.mark.parametrize(("given", "found"), [(["3", "0", "2"], 0), (["-4"], -4)])
def test_each_number_of_an_option_must_be_large_enough(given, found, capsys):
    parser = _cli.new_parser(None)
    parser.add_argument("--tasks", type=int, nargs="+")
    with pytest.raises(SystemExit):
        _cli.parse(parser, ["--tasks", *given], tasks=1)
    assert f"--tasks must be at least 1. Got {found}." in capsys.readouterr().err


def test_a_gpu_is_waited_for_and_a_processor_is_not(monkeypatch):
    seen = []
    monkeypatch.setattr(torch.cuda, "synchronize", seen.append)
    _measure.waiter(torch.device("cpu"))()
    assert seen == []
    _measure.waiter(torch.device("cuda", 1))()
    assert seen == [torch.device("cuda", 1)]


def test_the_clock_is_read_only_when_the_device_is_done(monkeypatch):
    """A device that works for a second after each step: all of it is counted, and in the right block."""
    now, queued = [0.0], [0.0]
    monkeypatch.setattr(_measure.time, "perf_counter", lambda: now[0])

    def wait() -> None:
        now[0] += queued[0]
        queued[0] = 0.0

    def step(seconds: float) -> None:
        now[0] += 0.25  # to ask for it
        queued[0] += seconds

    steps = {"short": lambda: step(1.0), "long": lambda: step(3.0)}
    found = _measure.interleaved(steps, rounds=3, block_seconds=0, warmup=1, synchronise=wait)
    assert [sample.wall for sample in found["short"]] == [1.25] * 3
    assert [sample.wall for sample in found["long"]] == [3.25] * 3


def test_whole_steps_of_the_overhead_are_timed_until_the_device_is_done(monkeypatch):
    waits = []
    monkeypatch.setattr(overhead, "waiter", lambda device: lambda: waits.append(device))
    overhead.profile("toy_2", 3, torch.device("cpu"))
    assert len(waits) == 3 * 2 * 2  # before and after a step of either arm


def test_threads_are_put_back_after_an_error():
    before = torch.get_num_threads()
    inside = []

    def fail() -> None:
        inside.append(torch.get_num_threads())
        raise KeyError

    with pytest.raises(KeyError), _cli.threads(before + 1):
        fail()
    assert inside == [before + 1]
    assert torch.get_num_threads() == before


def test_a_result_is_stored_with_its_figure_and_answered_last(tmp_path, capsys):
    out, drawn = tmp_path / "x.json", []
    result = {"answer": "Answer: 42.", "numbers": [1, 2]}
    found = _cli.finish(
        options("--out", str(out)), "x", result, lambda r, p: drawn.append((r, p.name))
    )
    assert found == json.loads(out.read_text(encoding="utf-8")) == result
    assert drawn == [(result, "x.svg")]
    assert capsys.readouterr().out == "Answer: 42.\n"


def test_a_quick_run_without_a_file_stores_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(_cli, "RESULTS", tmp_path)
    _cli.finish(options("--quick"), "x", {"answer": "Answer."}, lambda *_: pytest.fail("drawn"))
    assert list(tmp_path.iterdir()) == []
    _cli.finish(options(), "x", {"answer": "Answer."})
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_the_question_is_the_first_paragraph_in_one_line():
    record = _cli.provenance(options(), ("torch",), "How\nmuch?\n\nMore.")
    assert record["question"] == "How much?"
    assert record["device"] == "cpu"
    assert {"date", "commit", "dirty", "versions", "machine"} <= set(record)
    assert set(record["versions"]) == {"torch", "agsurgery"}
