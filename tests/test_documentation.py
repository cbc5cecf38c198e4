"""Code in the README, the docs and the docstrings runs, and prints what it says."""

import doctest
import importlib
import importlib.util
import io
import json
import pkgutil
import re
import runpy
from contextlib import redirect_stdout
from pathlib import Path

import pytest

import agsurgery
from agsurgery.methods import Method
from tests.method_laws import markdown

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
spec = importlib.util.spec_from_file_location("pages", ROOT / "docs" / "pages.py")
pages = importlib.util.module_from_spec(spec)  # docs is no package
spec.loader.exec_module(pages)
MODULES = [m.name for m in pkgutil.walk_packages(agsurgery.__path__, "agsurgery.")]


@pytest.mark.parametrize("module", ["agsurgery", *MODULES])
def test_examples_in_docstrings_print_what_they_say(module):
    assert doctest.testmod(importlib.import_module(module)).failed == 0


BLOCK = re.compile(r"(prints[^\n]*\n\n)?```(python|text)\n(.*?)```", flags=re.DOTALL)
"""A block of a page, and whether it is the output of those before."""

NUMBER = re.compile(r"[-+]?\d+\.?\d*")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_blocks_of_a_page_run_in_order_and_print_what_it_shows(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # for the files they write
    text = page.read_text(encoding="utf-8")
    for package in sorted(set(re.findall(r"^(?:from|import) (\w+)", text, flags=re.MULTILINE))):
        pytest.importorskip(package)  # pages about other libraries need these
    namespace: dict[str, object] = {}
    printed = io.StringIO()
    for is_output, language, content in BLOCK.findall(text):
        if language == "python":
            with redirect_stdout(printed):
                exec(compile(content, page.name, "exec"), namespace)
        elif is_output:
            _assert_alike(printed.getvalue(), content)
        if language == "text":
            printed = io.StringIO()
    found = [language for _, language, _ in BLOCK.findall(text)]
    assert found.count("python") == text.count("```python")
    assert found.count("text") == text.count("```text")


def _assert_alike(printed: str, shown: str) -> None:
    """Numbers may differ in the last digit on another machine; the words may not."""
    assert NUMBER.sub("#", printed).split() == NUMBER.sub("#", shown).split()
    values = [[float(n) for n in NUMBER.findall(output)] for output in (printed, shown)]
    assert values[0] == pytest.approx(values[1], rel=0.05, abs=0.02)


@pytest.mark.parametrize(
    "page", ["README.md", "docs/quickstart.md", "docs/diagnostics.md", "docs/faq.md"]
)
def test_pages_show_what_their_examples_print(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert any(is_output for is_output, _, _ in BLOCK.findall(text))


def test_methods_page_prints_the_table_of_laws():
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    shown = re.search(r"<!-- laws -->\n(.*?)\n<!-- end of laws -->", text, flags=re.DOTALL).group(1)
    # `python -m tests.method_laws` prints what belongs there.
    assert shown.strip() == markdown()


def test_every_method_has_a_page_and_its_line_in_the_tables():
    methods = {name for name in agsurgery.__all__ if _is_method(getattr(agsurgery, name))}
    assert set(pages.CHOOSE) == methods
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert [name for name in sorted(methods) if f"(methods/{name}.md)" not in text] == []
    assert [name for name in sorted(methods) if f"[`{name}(" not in text] == []


def _is_method(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, Method)


def test_made_pages_hold_what_is_stored(tmp_path):
    pages.write(tmp_path)
    written = {path.name for path in (tmp_path / "methods").iterdir()}
    assert written == {f"{name}.md" for name in pages.CHOOSE}
    text = (tmp_path / "_generated" / "benchmarks.md").read_text(encoding="utf-8")
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        assert f"benchmarks/results/{path.name}`" in text
        answer = json.loads(path.read_text(encoding="utf-8")).get("answer", "")
        assert answer.removeprefix("Answer: ") in text
    for path in (ROOT / "benchmarks").glob("[!_]*.py"):
        assert f"## `{path.stem}`" in text


def test_the_origin_of_a_result_is_read_from_the_old_layout_and_the_new():
    machine = {"cpu": "Abacus", "threads": 1, "cores": 2, "gpu": "Loom"}
    record = {"date": "2026-11-25T03:12:44", "commit": "ea6c0588", "dirty": True}
    record |= {"versions": {"torch": "2.13.0"}, "machine": machine}
    expected = "2026-11-25, commit `ea6c058` with changes, torch 2.13.0, "
    for result in (record, {"environment": record}):
        assert pages.provenance(result) == expected + "Abacus, 1 of 2 threads"
        assert pages.provenance({"device": "cuda", **result}) == expected + "Loom"
        noted = pages.provenance({"note": "At 1234567.", **result})
        assert noted == expected + "Abacus, 1 of 2 threads. At 1234567."


def test_relative_links_of_the_pages_lead_to_something(tmp_path):
    pages.write(tmp_path)
    missing = []
    for page in PAGES:
        prose = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.S)
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", prose):
            made = page.parent == ROOT / "docs" and (tmp_path / target).exists()
            if "://" not in target and not (page.parent / target).exists() and not made:
                missing.append((page.name, target))
    assert missing == []


def test_the_version_is_the_same_everywhere():
    version = agsurgery.__version__
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## {version} (" in changelog
    assert f"version: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_oldest_versions_are_those_that_the_package_asks_for():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    lists = re.findall(
        r"^(?:dependencies|examples|test) = \[.*?(?:\"\]|\n\])", project, flags=re.M | re.S
    )
    asked = re.findall(r'"([\w-]+)(?:\[\w+\])?>=([\d.]+)"', "".join(lists))
    text = (ROOT / "constraints-min.txt").read_text(encoding="utf-8")
    held = dict(re.findall(r"^([\w-]+)==([\d.]+)$", text, flags=re.M))
    assert len(lists) == 3
    beside = {"pyparsing"}  # of matplotlib's time: a newer one makes the oldest matplotlib warn
    assert {name for name, _ in asked} == set(held) - beside
    wrong = [name for name, version in asked if not f"{held[name]}.".startswith(f"{version}.")]
    assert wrong == []


def test_quickstart_prints_both_methods(capsys):
    runpy.run_module("examples.quickstart", run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["Sum", "AGS"]
    assert all("nan" not in line for line in lines)
