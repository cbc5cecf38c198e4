"""Tables of the documents: those of the stored results, in marked places, with markers that are checked."""

import json
import re

import pytest

from benchmarks._cli import RESULTS
from benchmarks._documents import DOCUMENTS, END, ROOT, filled, marked, rendered, rewrite
from benchmarks._markdown import LEADING, interval, method, number, plain, table
from benchmarks._plots import COLOURS
from benchmarks.tables import TABLES

BOTH = {"a": "| x |\n|---|\n| 1 |", "b other": "| y |\n|---|\n| 2 |"}


def document(*names: str) -> str:
    places = [f"Of {name}:\n\n<!-- table: {name} -->\nold\n{END}\n" for name in names]
    return "\n".join(["# Title\n", *places])


@pytest.fixture(scope="module")
def tables() -> dict[str, str]:
    return rendered(RESULTS)


WITH_TABLES = [p for p in DOCUMENTS if "<!-- table" in p.read_text(encoding="utf-8")]
EVERY = pytest.mark.parametrize("page", WITH_TABLES, ids=lambda page: str(page.relative_to(ROOT)))


@EVERY
def test_marked_tables_are_those_of_the_stored_results(page, tables):
    """After a new result `python -m benchmarks` writes them."""
    shown = marked(page.read_text(encoding="utf-8"))
    assert set(shown) <= set(tables)
    assert shown == {name: tables[name] for name in shown}


def test_every_table_is_shown_once(tables):
    pages = [marked(path.read_text(encoding="utf-8")) for path in DOCUMENTS]
    assert sorted(name for shown in pages for name in shown) == sorted(tables)


@pytest.mark.parametrize("stem", TABLES)
def test_every_table_shows_the_numbers_of_its_file(stem, tables, tmp_path):
    """All measured numbers three times as large, as in a later run: rendered anew, each table is another."""
    for path in RESULTS.glob("*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        new = larger(content) if path.stem == stem else content
        (tmp_path / path.name).write_text(json.dumps(new), encoding="utf-8")
    after = rendered(tmp_path)
    changed = {name for name in tables if after[name] != tables[name]}
    assert changed == {name for name in tables if name.split()[0] == stem}


def larger(value):
    """The same with every measured number three times as large; counts, rates and names stay, but for promises kept."""
    if isinstance(value, dict):
        return {
            key: 3 * v if key == "kept" else v if key == "rate" else larger(v)
            for key, v in value.items()
        }
    if isinstance(value, list):
        return [larger(inner) for inner in value]
    return 3 * value if isinstance(value, float) else value


@EVERY
def test_a_changed_number_in_a_copy_of_a_document_is_found_and_mended(page, tables, tmp_path):
    text = page.read_text(encoding="utf-8")
    for name, content in marked(text).items():
        *_, last = re.finditer(r"\d", content)
        digit = str((int(last[0]) + 1) % 10)
        wrong = content[: last.start()] + digit + content[last.end() :]
        copy = tmp_path / "copy.md"
        copy.write_text(text.replace(content, wrong), encoding="utf-8")
        assert marked(copy.read_text(encoding="utf-8"))[name] != tables[name]
        assert rewrite([copy], tables) == [copy]
        assert copy.read_text(encoding="utf-8") == text
        assert rewrite([copy], tables) == []


def test_only_what_stands_between_the_markers_is_replaced():
    text = document("a", "b other")
    expected = text.replace("old", BOTH["a"], 1).replace("old", BOTH["b other"], 1)
    assert filled(text, BOTH) == expected
    assert marked(expected) == BOTH
    without = "# No table\r\n\n<!-- a comment -->\n"
    assert filled(without, BOTH) == without


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (document("c"), "must name a table of `benchmarks.tables`. Got 'c'. There are a, b other"),
        (document("a").replace(END, ""), f"must end with '{END}'. That of 'a' does not"),
        (document("a") + END, "must be '<!-- table: NAME -->'. Line 8 is"),
        (document("a", "b other").replace(END, "", 1), "must be '.*' for 'a'. Line 11 is '.* b o"),
        (document("a", "a"), "must stand once. Line 11 marks 'a' again"),
        (document("a").replace("table: a", "table:a"), "must be '<!-- table: NAME -->'. Line 5"),
        (document("a").replace("<!-- table", "  <!-- table"), "must be '<!-- table: NAME -->'"),
        (document("a").replace(END, "<!-- end of the table -->"), f"must be '{END}' for 'a'"),
    ],
)
def test_a_wrong_marker_is_refused_with_its_document(text, message, tmp_path):
    wrong, right = tmp_path / "wrong.md", tmp_path / "right.md"
    wrong.write_text(text, encoding="utf-8")
    right.write_text(document("a"), encoding="utf-8")
    with pytest.raises(ValueError, match=f"wrong.md: .*{message}"):
        rewrite([right, wrong], BOTH)
    # All or nothing.
    assert right.read_text(encoding="utf-8") == document("a")


def test_cells_are_written_as_markdown_has_them():
    found = table(["", "b", "c"], [["x", "", "1"]], others=":-:")
    assert found == "| | b | c |\n|---|:-:|:-:|\n| x | | 1 |"
    with pytest.raises(ValueError, match=r"must have 2 cells, as the header. Got 1: \['x'\]"):
        table(["a", "b"], [["x"]])
    assert number(None, ".2f") == interval(None, ".2f") == "–"
    assert number(1234.5, ",.0f") == "1,234"
    ends = {"mean": 0.94, "low": 0.9, "high": 1.0}
    assert interval(ends, ".2g", between=" to ") == "0.94 (0.9 to 1)"
    assert interval(ends, ".1f") == "0.9 (0.9, 1.0)"
    assert plain("<g, d> >= |d|") == r"&lt;g, d> >= \|d\|"


def test_methods_that_lead_every_figure_lead_every_table():
    assert tuple(COLOURS) == LEADING
    assert [method(name) for name in ("AGS", "UW")] == ["**AGS**", "UW"]
