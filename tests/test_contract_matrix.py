"""The matrix of promises: ours keeps them all, no check is empty, and the README says what was stored."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import pytest
import torch

from benchmarks import contract_matrix
from benchmarks._cli import RESULTS
from benchmarks._contract_promises import CHECKS
from benchmarks._contract_subjects import SUBJECTS
from benchmarks.contract_matrix import BARE, OURS, failure, promise

README = Path(__file__).parent.parent / "README.md"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, str]:
    out = tmp_path_factory.mktemp("results") / "contract_matrix.json"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        contract_matrix.main(["--subjects", BARE, OURS, "--out", str(out)])
    return json.loads(out.read_text(encoding="utf-8")), printed.getvalue()


def test_the_wrapper_keeps_every_promise_that_the_bare_optimizer_keeps(run):
    record, _ = run
    for name in (BARE, OURS):
        assert record["subjects"][name] == {"kept": len(CHECKS), "failures": {}}


def test_the_answer_is_the_last_line_and_the_record_says_where_it_comes_from(run):
    record, printed = run
    assert printed.splitlines()[-1] == record["answer"]
    assert record["answer"].startswith(f"Answer: GradientSurgery keeps {len(CHECKS)} of the")
    assert record["versions"]["torch"] == torch.__version__
    assert {"commit", "dirty", "date", "machine"} <= record.keys()


def rebuilt(base: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Another optimizer on the same parameters, which knows nothing of the first."""
    return torch.optim.AdamW(base.param_groups[0]["params"], lr=base.defaults["lr"])


HOME_MADE = ("plain object", "with `pc_backward`", "`__getattr__` proxy", "subclass")


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_every_promise_is_broken_by_some_wrapper(check):
    assert any(failure(check, wrap) for wrap in [rebuilt, *(SUBJECTS[n]() for n in HOME_MADE)])


def test_every_promise_has_words_and_is_made_once():
    words = [promise(check) for check in CHECKS]
    assert all(words)
    assert len(set(words)) == len(words)


def test_the_stored_matrix_has_all_promises_and_wrappers():
    stored = json.loads((RESULTS / "contract_matrix.json").read_text(encoding="utf-8"))
    assert stored["promises"] == {check.__name__: promise(check) for check in CHECKS}
    assert list(stored["subjects"]) == list(SUBJECTS)


def test_the_readme_says_what_was_stored():
    subjects = json.loads((RESULTS / "contract_matrix.json").read_text(encoding="utf-8"))[
        "subjects"
    ]
    kept = [s["kept"] for name, s in subjects.items() if name != BARE and OURS not in name]
    text = " ".join(README.read_text(encoding="utf-8").split())
    assert f"[all {subjects[OURS]['kept']} promises]" in text
    assert f"other wrappers keep {min(kept)} to {max(kept)}." in text
