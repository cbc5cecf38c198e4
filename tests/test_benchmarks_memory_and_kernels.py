"""The benchmarks of memory and of the two passes, on their smallest sizes."""

import json

import pytest
import torch

from benchmarks import kernels, overhead, peak_memory, reuse
from benchmarks._arms import OURS, PLAIN


def test_peak_memory_compares_every_engine_with_the_plain_step(tmp_path, monkeypatch, capsys):
    names = (PLAIN, OURS, "AGS, lean", "AGS, rows in bfloat16")
    monkeypatch.setattr(peak_memory, "ARMS", {name: peak_memory.ARMS[name] for name in names})
    monkeypatch.setattr(peak_memory, "DEEP", 6)
    out = tmp_path / "peak.json"
    peak_memory.main(["--tasks", "2", "6", "--widths", "1024", "--out", str(out)])
    result = json.loads(out.read_text(encoding="utf-8"))
    assert {"commit", "versions", "machine", "date"} <= set(result)
    assert set(result["cases"]) == {"transformer_2", "transformer_6", "deep_6", "mlp_1024"}
    ratios = {
        case: {name: arm["over_plain"] for name, arm in content["arms"].items()}
        for case, content in result["cases"].items()
    }
    for ratio in ratios.values():
        assert ratio[PLAIN] == 1
        assert ratio["AGS, rows in bfloat16"] < ratio[OURS]
    # The rows grow with K; without them the memory does not.
    assert ratios["transformer_6"][OURS] > ratios["transformer_2"][OURS] + 0.5
    assert ratios["deep_6"]["AGS, lean"] < 1.3
    assert ratios["mlp_1024"]["AGS, lean"] < 1.1
    assert capsys.readouterr().out.splitlines()[-1] == result["answer"]


def test_kernels_are_timed_beside_a_copy_and_checked_against_float64(tmp_path, capsys):
    out = tmp_path / "kernels.json"
    arguments = ["--tasks", "2", "5", "--columns", "9000", "--rounds", "1", "--out", str(out)]
    kernels.main(arguments)
    result = json.loads(out.read_text(encoding="utf-8"))
    assert len(result["cases"]) == 4
    for case in result["cases"].values():
        assert case["speed"]["copy"]["time_over_copy"]["median"] == 1
        for kernel in ("gramian", "combine"):
            assert case["speed"][kernel]["gigabytes_per_second"]["median"] > 0
        for error in case["error"].values():
            assert 0 <= error["ours"] < 1e-5
    assert capsys.readouterr().out.splitlines()[-1] == result["answer"]


def test_the_error_is_measured_on_the_cosines():
    exact = torch.tensor([[4.0, 1.0], [1.0, 9.0]], dtype=torch.float64)
    off = exact.clone()
    off[0, 1] += 0.6
    assert kernels._largest_error(off, exact) == pytest.approx(0.1)


@pytest.mark.parametrize("script", [peak_memory, kernels])
def test_sizes_that_are_not_positive_are_refused(script, capsys):
    with pytest.raises(SystemExit):
        script.main(["--tasks", "0"])
    assert "--tasks must be at least 1. Got 0." in capsys.readouterr().err


def test_reused_weights_are_compared_with_fresh_ones(tmp_path, capsys):
    out = tmp_path / "reuse.json"
    reuse.main(["--steps", "12", "--seeds", "1", "--out", str(out)])
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert rows["1"]["cosine"] == pytest.approx(1, abs=1e-4)
    assert rows["1"]["opposed"] == 0
    assert rows["1"]["final_over_fresh"] == 1
    assert rows["10"]["passes"] == pytest.approx((2 * 4 + 10) / 12, abs=1e-3)
    assert rows["10"]["cosine"] < rows["1"]["cosine"]
    assert capsys.readouterr().out.splitlines()[-1].startswith("Answer: ")


def test_the_parts_of_a_step_add_up_to_it_and_are_put_back(tmp_path, capsys):
    before = {
        name: getattr(owner, attribute) for name, (owner, attribute) in overhead.PARTS.items()
    }
    out = tmp_path / "overhead.json"
    overhead.main(["--steps", "3", "--out", str(out)])
    for name, (owner, attribute) in overhead.PARTS.items():
        assert getattr(owner, attribute) is before[name]
    for case in json.loads(out.read_text(encoding="utf-8"))["microseconds"].values():
        assert all(spent > 0 for spent in case.values())
        assert len(case) == len(overhead.PARTS) + 2
    assert capsys.readouterr().out.splitlines()[-1].startswith("Answer: ")


def test_a_part_inside_another_is_counted_once(monkeypatch):
    class Clock:
        now = 0.0

        def perf_counter(self):
            return self.now

    class Owner:
        def outer(self):
            clock.now += 2
            self.inner()
            clock.now += 1

        def inner(self):
            clock.now += 10

    clock = Clock()
    monkeypatch.setattr(overhead, "time", clock)
    monkeypatch.setattr(overhead, "PARTS", {"outer": (Owner, "outer"), "inner": (Owner, "inner")})
    seconds = {"outer": 0.0, "inner": 0.0}
    with overhead.timed(seconds):
        Owner().outer()
    assert seconds == {"outer": 3.0, "inner": 10.0}
