"""benchmarks/solver_cost.py: its oracles, its count of conflicts, and a quick run."""

import json
import math

import pytest
import torch

from benchmarks import solver_cost

ROWS = torch.tensor([[1.0, 0.0], [-1.0, 1.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("oracle", "expected"),
    [  # by hand: cosine -1/sqrt 2, norms 1 and sqrt 2
        (solver_cost.oracle_upgrad, [0.5, 1.5]),
        (solver_cost.oracle_pcgrad, [0.5, 1.5]),
        (solver_cost.oracle_dualproj, [0.0, 1.0]),
        (solver_cost.oracle_mgda, [0.2, 0.4]),
        (solver_cost.oracle_equal_cosines, [1.0, 1 + math.sqrt(2)]),
        (solver_cost.oracle_nash, [1.0, 1 + math.sqrt(2)]),
    ],
)
def test_oracles_know_the_answer_by_hand(oracle, expected):
    direction = torch.tensor(expected, dtype=torch.float64)
    found = oracle(ROWS)
    torch.testing.assert_close(
        found / found.norm(), direction / direction.norm(), rtol=1e-5, atol=1e-5
    )


def test_aligned_oracle_leaves_orthonormal_gradients_alone():
    found = solver_cost.oracle_aligned(torch.eye(3, 5, dtype=torch.float64))
    assert found.tolist() == [1.0, 1.0, 1.0, 0.0, 0.0]


def test_share_of_conflicts_counts_opposed_and_failed_updates():
    def fails(rows):
        raise ArithmeticError

    assert solver_cost.opposed(lambda rows: -rows[0], 3, 10.0, 1.0, 5) == 1.0
    assert solver_cost.opposed(fails, 3, 10.0, 1.0, 5) == 1.0
    assert (
        solver_cost.opposed(lambda rows: torch.full_like(rows[0], torch.nan), 2, 10.0, 1.0, 5)
        == 1.0
    )
    assert solver_cost.opposed(lambda rows: rows[0], 1, 10.0, 1e-4, 5) == 0.0


def test_a_quick_run_writes_what_it_measured(tmp_path, capsys):
    out, threads = tmp_path / "cost.json", torch.get_num_threads()
    arguments = ["--quick", "--methods", "UPGrad", "AGS", "--out", str(out)]
    solver_cost.main(arguments)
    assert torch.get_num_threads() == threads
    stored = json.loads(out.read_text(encoding="utf-8"))
    assert stored["commit"]
    upgrad = stored["methods"]["UPGrad"]
    assert upgrad["time"]["2"]["peer_over_ours"]["median"] > 0
    assert upgrad["error"]["ours"] < 1e-6 < upgrad["error"]["peer"]
    assert all(cell["ours"] == 0 for cell in upgrad["conflicts"].values())
    assert "no_peer" in stored["methods"]["AGS"]["time"]["2"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == stored["answer"]
    assert lines[-1].startswith("Answer: ours is faster in")


@pytest.mark.parametrize(
    "arguments", [["--rounds", "0"], ["--methods", "Adam"], ["--inputs", "-1"]]
)
def test_wrong_arguments_are_refused(arguments):
    with pytest.raises(SystemExit):
        solver_cost.main(arguments)
