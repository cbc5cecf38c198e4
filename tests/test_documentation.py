"""Code in the README, the docs and the docstrings runs, and prints what it says."""

import doctest
import importlib
import io
import pkgutil
import re
import runpy
from contextlib import redirect_stdout
from pathlib import Path

import pytest

import agsurgery
from tests.method_laws import markdown

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MODULES = [m.name for m in pkgutil.walk_packages(agsurgery.__path__, "agsurgery.")]


@pytest.mark.parametrize("module", ["agsurgery", *MODULES])
def test_examples_in_docstrings_print_what_they_say(module):
    assert doctest.testmod(importlib.import_module(module)).failed == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_blocks_of_a_page_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # for the files they write
    namespace: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for block in blocks:
        exec(compile(block, page.name, "exec"), namespace)
    assert len(blocks) == len(re.findall("```python", page.read_text(encoding="utf-8")))


@pytest.mark.parametrize("page", ["README.md", "docs/diagnostics.md"])
def test_a_page_shows_the_output_of_its_first_example(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", text, flags=re.DOTALL).group(1)
    shown = re.search(r"```text\n(.*?)```", text, flags=re.DOTALL).group(1)
    printed = io.StringIO()
    with redirect_stdout(printed):
        exec(compile(code, page, "exec"), {})
    number = re.compile(r"[-+]?\d+\.?\d*")
    # Numbers may differ in the last digit on another machine; the words may not.
    assert number.sub("#", printed.getvalue()).split() == number.sub("#", shown).split()
    values = [[float(n) for n in number.findall(output)] for output in (printed.getvalue(), shown)]
    assert values[0] == pytest.approx(values[1], rel=0.05, abs=0.02)


def test_methods_page_prints_the_table_of_laws():
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    shown = re.search(r"<!-- laws -->\n(.*?)\n<!-- end of laws -->", text, flags=re.DOTALL).group(1)
    # `python -m tests.method_laws` prints what belongs there.
    assert shown.strip() == markdown()


def test_methods_page_names_every_method():
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    others = {
        "ConflictMonitor",
        "GradientSurgery",
        "Replicas",
        "SurgeryReport",
        "backward",
        "unwrap",
    }
    names = set(agsurgery.__all__) - others
    assert [name for name in sorted(names) if f"`{name}(" not in text] == []


def test_quickstart_prints_both_methods(capsys):
    runpy.run_module("examples.quickstart", run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["Sum", "AGS"]
    assert all("nan" not in line for line in lines)
