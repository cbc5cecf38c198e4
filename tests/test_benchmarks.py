import contextlib
import io
import json
from pathlib import Path

import pytest
import torch

from benchmarks import step_cost
from benchmarks._measure import Sample, Spread, interleaved, peak_bytes

CPU = torch.device("cpu")


@pytest.fixture
def toy() -> step_cost.Problem:
    return step_cost.CASES["toy_2"].build(CPU)


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, str]:
    out: Path = tmp_path_factory.mktemp("results") / "step_cost.json"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        step_cost.main(["--quick", "--out", str(out)])
    return json.loads(out.read_text(encoding="utf-8")), printed.getvalue()


def test_step_cost_records_where_its_numbers_come_from(quick_run: tuple[dict, str]) -> None:
    result, _ = quick_run
    assert {"question", "answer", "date", "commit", "dirty", "versions", "machine"} <= set(result)
    assert result["versions"]["torch"] == torch.__version__
    assert {"cpu", "cores", "threads"} <= set(result["machine"])
    assert result["machine"]["threads"] == 1


def test_step_cost_measures_or_skips_every_arm_of_every_case(quick_run: tuple[dict, str]) -> None:
    result, _ = quick_run
    assert set(result["cases"]) == set(step_cost.QUICK_CASES)
    for case in result["cases"].values():
        assert set(case["arms"]) | set(case["skipped"]) == set(step_cost.ARMS)
        assert {step_cost.PLAIN, step_cost.FLOOR, step_cost.OURS} <= set(case["arms"])


def test_step_cost_ratios_are_positive_and_the_plain_sum_is_one(
    quick_run: tuple[dict, str],
) -> None:
    result, _ = quick_run
    for case in result["cases"].values():
        for arm in case["arms"].values():
            for key in ("over_plain", "over_passes", "over_ags", "cpu_over_plain", "milliseconds"):
                assert 0 < arm[key]["q25"] <= arm[key]["median"] <= arm[key]["q75"]
            assert arm["peak_over_plain"] is None or arm["peak_over_plain"] > 0
        plain = case["arms"][step_cost.PLAIN]
        assert plain["over_plain"]["median"] == 1
        assert case["arms"][step_cost.FLOOR]["over_passes"]["median"] == 1


def test_step_cost_answers_in_its_last_line(quick_run: tuple[dict, str]) -> None:
    result, printed = quick_run
    assert printed.splitlines()[-1] == result["answer"]
    assert result["answer"].startswith("Answer: ")


def test_step_cost_leaves_the_number_of_threads_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_cost, "ARMS", _own_arms())
    before = torch.get_num_threads()
    other = 2 if before == 1 else 1
    arguments = ["--quick", "--cases", "toy_2", "--threads", str(other)]
    step_cost.main([*arguments, "--out", str(tmp_path / "out.json")])
    assert torch.get_num_threads() == before


def test_missing_peer_is_skipped_with_its_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(problem: step_cost.Problem) -> step_cost.Arm:
        raise ImportError("No module named 'peer'")

    monkeypatch.setattr(step_cost, "ARMS", {**_own_arms(), "peer": missing})
    result = step_cost.measure(step_cost.CASES["toy_2"], CPU, 1, 0.001)
    assert result["skipped"] == {"peer": "No module named 'peer'"}
    assert "left out: No module named 'peer'" in step_cost.table(result)


def test_arms_start_from_equal_weights_and_do_not_share_them(toy: step_cost.Problem) -> None:
    initial = [p.detach().clone() for p in toy.model.parameters()]
    for make in _own_arms().values():
        arm = make(toy)
        for parameter, start in zip(arm.model.parameters(), initial, strict=True):
            torch.testing.assert_close(parameter, start, rtol=0, atol=0, check_dtype=True)
        arm.step()
    for parameter, start in zip(toy.model.parameters(), initial, strict=True):
        assert torch.equal(parameter, start)


def test_guard_accepts_the_arms_of_this_file(toy: step_cost.Problem) -> None:
    for name, make in _own_arms().items():
        step_cost.check_gradients(name, make(toy), step_cost.plain_sum(toy))


def test_guard_refuses_an_arm_without_gradients(toy: step_cost.Problem) -> None:
    idle = step_cost.plain_sum(toy)._replace(fill=lambda: None)
    with pytest.raises(RuntimeError, match=r"idle: the gradient of `trunk.0.weight` must be"):
        step_cost.check_gradients("idle", idle, step_cost.plain_sum(toy))


@pytest.mark.parametrize("name", [step_cost.FLOOR, step_cost.OURS])
@pytest.mark.parametrize("part", ["trunk", "heads"])
def test_guard_refuses_gradients_of_another_length(
    toy: step_cost.Problem, name: str, part: str
) -> None:
    arm = step_cost.ARMS[name](toy)

    def fill() -> None:
        arm.fill()
        for parameter in getattr(arm.model, part).parameters():
            assert parameter.grad is not None
            parameter.grad.mul_(1.01)

    with pytest.raises(RuntimeError, match="must agree with the plain sum"):
        step_cost.check_gradients(name, arm._replace(fill=fill), step_cost.plain_sum(toy))


def test_spread_holds_median_and_quartiles() -> None:
    assert Spread.of([4.0, 1.0, 3.0, 2.0, 5.0]) == Spread(3.0, 2.0, 4.0)
    assert Spread.of([2.0]) == Spread(2.0, 2.0, 2.0)


def test_interleaved_times_every_step_once_per_round_in_rotating_order() -> None:
    seen: list[str] = []

    def busy_wait(name: str) -> None:
        seen.append(name)
        sum(range(1000))

    steps = {name: (lambda name=name: busy_wait(name)) for name in "abc"}
    # Blocks of no length hold one step each, so that `seen` shows the order.
    samples = interleaved(steps, rounds=3, block_seconds=0, warmup=1, synchronise=lambda: None)
    assert "".join(seen) == "aabbcc" + "abc" + "bca" + "cab"
    assert {name: len(values) for name, values in samples.items()} == {"a": 3, "b": 3, "c": 3}
    assert all(isinstance(s, Sample) and s.wall > 0 for values in samples.values() for s in values)


def test_peak_bytes_counts_what_is_alive_at_the_same_time() -> None:
    size = 1_000_000

    def build():
        kept = torch.zeros(size, dtype=torch.uint8)

        def step() -> None:
            first = torch.zeros(2 * size, dtype=torch.uint8)
            del first
            second = torch.zeros(3 * size, dtype=torch.uint8)
            kept.copy_(second[:size])

        return step

    peak = peak_bytes(build, device=CPU)
    assert peak is not None
    assert 4 * size <= peak < 4.1 * size


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "--rounds must be at least 1. Got 0"),
        (["--threads", "-1"], "--threads must be at least 1. Got -1"),
        (["--cases", "unknown"], "invalid choice: 'unknown'"),
    ],
)
def test_wrong_arguments_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        step_cost.main(arguments)
    assert message in capsys.readouterr().err


def _own_arms() -> dict[str, step_cost.ArmMaker]:
    names = (step_cost.PLAIN, step_cost.FLOOR, step_cost.OURS)
    return {name: step_cost.ARMS[name] for name in names}
