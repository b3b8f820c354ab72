"""Charts: markup for a page, in its colours, small however long the run."""

import re

import numpy as np
import pytest

from reporting.charts import MOST_POINTS, STYLE, Line, histogram, line_chart, smooth, thin_out
from reporting.run_curves import loss_charts, other_charts


def test_a_chart_is_markup_of_its_own_in_the_colours_of_the_page():
    first, second = (line_chart("Loss <b>", "a & b", [Line("x", [1, 2], [1.0, 2.0])]) for _ in range(2))
    assert first.svg.startswith("<svg") and "&lt;b&gt;" in first.svg and "<b>" not in first.svg
    assert "var(--series-1)" in first.svg and not re.search(r"#0101|https?:|<style|<metadata", first.svg)
    ids = [set(re.findall(r'\sid="([^"]+)"', chart.svg)) for chart in (first, second)]
    assert not ids[0] & ids[1]
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', second.svg)) <= ids[1]


@pytest.mark.parametrize("values", [[0.0, 0.0], [-1.0, 5.0], [1e-9, 1.0], [3.0]])
def test_any_values_make_a_chart(values):
    assert "<svg" in line_chart("x", "", [Line("x", range(len(values)), values)]).svg


@pytest.fixture
def words_of(monkeypatch):
    """The texts of a chart's SVG, which the page has as paths."""
    monkeypatch.setitem(STYLE, "svg.fonttype", "none")
    return lambda make, *arguments: re.findall(r"<text[^>]*>([^<]*)</text>", make("x", "", *arguments).svg)


def test_a_histogram_shows_the_marks_that_are_near_its_values(words_of):
    marks = {75: "one chunk: 77", 225: "read: 225"}
    assert "read: 225" not in words_of(histogram, [3, 50], marks)
    assert "one chunk: 77" in words_of(histogram, [3, 50], marks)
    assert histogram("Lengths", "", [0], {75: "x"}).svg.count("<svg") == 1


def test_one_long_caption_does_not_squeeze_the_others(words_of):
    words = words_of(histogram, [20, 30, 3709], {75: "one chunk: 77", 225: "read: 225"})
    assert "read: 225" in words and "3,000" not in words and "400" in words


def test_the_axis_of_a_single_measure_has_its_step_once(words_of):
    assert words_of(line_chart, [Line("x", [4], [1.0])]).count("4") == 1


def test_a_long_run_keeps_its_course_in_few_points():
    steps = np.arange(1, 100_001)
    x, y = thin_out(steps, steps * 2.0)
    assert len(x) == MOST_POINTS and np.allclose(y, 2 * x)
    assert list(thin_out([1, 2], [3, 4])[1]) == [3, 4]
    assert np.allclose(smooth(np.full(100, 5.0)), 5) and len(smooth([1.0])) == 1


def test_a_skipped_step_has_no_place_in_the_curves_and_no_rows_make_none():
    rows = [
        {"step": 1, "train_loss": 1.0},
        {"step": 2, "train_loss": None, "skipped": True},
        {"step": 3, "train_loss": 2.0},
    ]
    assert [chart.title for chart in loss_charts(rows)] == ["Training loss"]
    assert loss_charts([]) == other_charts([]) == []
