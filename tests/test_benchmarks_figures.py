"""Figures of the benchmarks: from the stored numbers, readable, the same file for the same numbers."""

import copy
import importlib
import itertools
import json
import re

import pytest
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.text import Text

from benchmarks.__main__ import FIGURES, main, redraw
from benchmarks._cli import RESULTS
from benchmarks._documents import ROOT
from benchmarks._plots import COLOURS, in_order


def family(name: str) -> str:
    return max((key for key in FIGURES if name.startswith(key)), key=len)


def load(name: str) -> dict:
    found: dict = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


STORED = sorted(path.stem for path in RESULTS.glob("*.json"))
DRAWN = [name for name in STORED if name.startswith(tuple(FIGURES))]


@pytest.fixture
def figure_of(monkeypatch):
    """Makes the figure of a result without a file."""

    def make(name: str):
        kept = []
        module = importlib.import_module(f"benchmarks.figures.{family(name)}")
        monkeypatch.setattr(module, "save_svg", lambda figure, path: kept.append(figure))
        FIGURES[family(name)](load(name), RESULTS / "unused.svg")
        [figure] = kept
        return figure

    return make


def test_every_figure_of_a_stored_result_is_stored():
    drawn = [name for name in STORED if name.startswith(tuple(FIGURES))]
    assert {family(name) for name in drawn} == set(FIGURES)
    assert [name for name in drawn if not (RESULTS / f"{name}.svg").is_file()] == []


@pytest.mark.parametrize("name", DRAWN)
def test_labels_do_not_overlap(name, figure_of):
    figure = figure_of(name)
    canvas = FigureCanvasSVG(figure)
    figure.draw_without_rendering()
    renderer = canvas.figure._get_renderer()
    texts = [
        text
        for text in figure.findobj(Text)
        if text.get_visible() and text.get_text().strip() and text.get_rotation() in (0, 90)
    ]
    for axes in figure.axes:
        if not axes.get_visible():
            texts = [text for text in texts if text.axes is not axes]
            continue
        # Ticks beyond the limits are there, but not drawn.
        for axis, (low, high) in (
            (axes.xaxis, sorted(axes.get_xlim())),
            (axes.yaxis, sorted(axes.get_ylim())),
        ):
            for tick in axis.get_major_ticks():
                outside = not low <= tick.get_loc() <= high
                for text in (tick.label1, tick.label2):
                    if outside and text in texts:
                        texts.remove(text)
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in texts]
    over = [
        (a, b)
        for (a, one), (b, two) in itertools.combinations(boxes, 2)
        if one.width and two.width and one.padded(-1).overlaps(two.padded(-1))
    ]
    assert over == []


@pytest.mark.parametrize("name", DRAWN)
def test_axes_say_what_they_show(name, figure_of):
    """Every panel, or the figure or the panel it shares an axis with, names both quantities."""
    figure = figure_of(name)
    shown = [axes for axes in figure.axes if axes.get_visible()]
    for axis in ("x", "y"):
        labels = [getattr(axes, f"get_{axis}label")() for axes in shown]
        whole = getattr(figure, f"get_sup{axis}label")()
        ticks = [tick for axes in shown for tick in getattr(axes, f"get_{axis}ticklabels")()]
        # An axis of names needs no label.
        texts = [tick.get_text() for tick in ticks if not tick.get_text().startswith("$")]
        named = any(len(re.findall("[A-Za-z]", text)) > 1 for text in texts)
        assert any(labels) or whole or named


@pytest.mark.parametrize("name", DRAWN)
def test_the_same_numbers_make_the_same_file_and_others_another(name, tmp_path):
    result, draw = load(name), FIGURES[family(name)]
    paths = [tmp_path / f"{i}.svg" for i in range(3)]
    draw(result, paths[0])
    draw(result, paths[1])
    draw(changed(copy.deepcopy(result)), paths[2])
    one, two, three = (path.read_text(encoding="utf-8") for path in paths)
    assert one == two != three
    assert "<dc:date>" not in one


def changed(value):
    """The same with every measured number a little larger; counts and names stay."""
    if isinstance(value, dict):
        return {key: changed(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [changed(inner) for inner in value]
    return 1.2 * value if isinstance(value, float) else value


def test_methods_that_lead_every_table_lead_every_figure(figure_of):
    assert list(in_order(dict.fromkeys(["UW", "Sum", "AGS"], 0))) == ["AGS", "Sum", "UW"]
    [first, *_] = figure_of("step_cost").axes
    assert first.get_yticklabels()[0].get_text() == "AGS"
    titles = [axes.get_title().splitlines()[0] for axes in figure_of("solver_cost").axes]
    assert titles[:3] == ["AGS", "PCGrad", "CAGrad"]
    for name in ("multitask", "multitask_sgd", "pinn"):
        for axes in figure_of(name).axes:
            names = [label.get_text() for label in axes.get_xticklabels()]
            assert names[:4] == list(COLOURS)
    legend = figure_of("cytology_real").legends[0]
    assert legend.get_texts()[0].get_text() == "AGS"


def test_step_cost_shows_the_medians_of_its_cases(figure_of):
    cases = load("step_cost")["cases"]
    for axes, case in zip(figure_of("step_cost").axes, cases.values(), strict=True):
        shown = {line.get_xdata()[0] for line in axes.get_lines() if len(line.get_xdata()) == 1}
        assert shown == {
            arm["over_plain"]["median"] for name, arm in case["arms"].items() if name != "plain sum"
        }


def test_one_command_redraws_all_and_measures_nothing(tmp_path, monkeypatch, capsys):
    before = {path: path.read_bytes() for path in RESULTS.glob("*.json")}
    drawn = redraw(RESULTS, tmp_path)
    assert [path.stem for path in drawn] == DRAWN
    assert all(path.read_text(encoding="utf-8").startswith("<?xml") for path in drawn)
    assert {path: path.read_bytes() for path in RESULTS.glob("*.json")} == before
    monkeypatch.setattr("benchmarks.__main__.redraw", lambda *folders: drawn[:1])
    monkeypatch.setattr("benchmarks.__main__.rewrite", lambda *given: [ROOT / "docs" / "a.md"])
    main([])
    assert capsys.readouterr().out == f"{drawn[0].name}\ndocs/a.md: tables have changed\n"
