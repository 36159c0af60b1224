"""Charts put marks where the numbers are, and say what they show."""

from __future__ import annotations

import math
import re

import pytest
from markupsafe import Markup

from llmprune.pages.axes import Axis, axis_over, powers, short, steps
from llmprune.pages.charts import bars, heat_map, lines, scatter
from llmprune.pages.document import Section, page
from tests.pages.conftest import Reader

NAME = 'a<b>"&'


def shown(chart: Markup) -> Reader:
    return Reader(page("x", [Section("One", chart)]))


def test_an_axis_lays_values_over_its_stretch() -> None:
    assert Axis(low=2, high=4, start=10, end=20).place(2.5) == 12.5
    assert Axis(low=0, high=10, start=200, end=100).place(1) == 190
    assert Axis(low=0.01, high=100, start=0, end=4, log=True).place(10) == pytest.approx(3)


@pytest.mark.parametrize(
    ("values", "log", "zero"),
    [
        *([(v, False, z) for v in ([], [3.0], [0.0], [-2.0], [1.0, 9.0]) for z in (False, True)]),
        *([(v, True, False) for v in ([], [3.0], [0.0, -1.0], [1e-9, 1e9], [2.0, 3.0])]),
        ([math.inf, math.nan, 1.0], False, True),
        ([math.inf, math.nan, 1.0], True, False),
    ],
)
def test_an_axis_holds_all_that_can_be_drawn_and_has_a_length(
    values: list[float], log: bool, zero: bool
) -> None:
    axis = axis_over(values, 0, 100, log=log, zero=zero)
    assert axis.low < axis.high
    for value in values:
        if math.isfinite(value) and (value > 0 or not log):
            assert -1e-9 <= axis.place(value) <= 100 + 1e-9
    assert all(-1e-6 <= axis.place(tick) <= 100 + 1e-6 for tick in axis.ticks())
    assert not zero or axis.low <= 0 <= axis.high


def test_marked_numbers_are_round() -> None:
    assert steps(0.03, 0.27) == [0.05, 0.1, 0.15, 0.2, 0.25]
    assert steps(-7, 31) == [0, 10, 20, 30]
    assert powers(1e-7, 1e7) == pytest.approx([1e-6, 1e-3, 1, 1e3, 1e6])
    assert [short(x) for x in (0, 1000, 0.001, 1.5e-5, -2.5)] == [
        "0",
        "1000",
        "0.001",
        "1.5e-5",
        "-2.5",
    ]


def test_a_line_goes_through_its_points_and_stops_where_there_is_none() -> None:
    rows = [(0.0, 0.0), (1.0, 1.0), (2.0, math.nan), (3.0, 1.0), (4.0, 0.0)]
    chart = lines("T", {"one": rows}, x_label="x", y_label="y", zero=True)
    reader = shown(chart)
    first, second = reader.values("points")
    (x0, y0), (x1, y1) = (map(float, pair.split(",")) for pair in first.split())
    assert x0 < x1
    assert y0 > y1  # up is a lower y
    assert len(second.split()) == 2
    assert "one: 4 values from 0 to 1" in reader.text
    assert '<ul class="legend">' not in chart  # of one series


def test_series_are_told_apart_without_colour() -> None:
    rows = {name: [(1.0, 2.0), (2.0, 3.0)] for name in ("one", "two", NAME)}
    reader = shown(lines(NAME, rows, x_label=NAME, y_label=NAME))
    dashes = [v for t, n, v in reader.attributes if n == "stroke-dasharray" and t == "polyline"]
    assert len(set(dashes)) == 3
    assert reader.of("li")[-1] == NAME
    assert reader.of("figcaption") == [NAME]


def test_what_has_no_logarithm_is_left_out() -> None:
    chart = scatter(
        "T", {"one": [(0.0, 1.0), (10.0, 1.0), (100.0, -1.0), (1000.0, 2.0)]},
        x_label="x", y_label="y", log_x=True, log_y=True,
        names={"one": ["a", "b", "c", NAME]},
    )  # fmt: skip
    assert shown(chart).of("title")[1:] == ["b: 10, 1", f"{NAME}: 1000, 2"]


def test_bars_begin_at_zero_and_are_as_long_as_their_values() -> None:
    values = {"dense": [1.0, 4.0, None], "pruned": [2.0, math.inf, 0.0]}
    reader = shown(bars("T", ["a", "b", NAME], values))
    widths = [
        float(value)
        for (tag, name, value) in reader.attributes
        if tag == "rect" and name == "width" and value not in ("14",)
    ]
    assert [w / widths[0] for w in widths] == pytest.approx([1, 2, 4, 0], abs=0.01)
    assert [t for t in reader.of("text")] == ["a", "1", "2", "b", "4", NAME, "0"]


def test_a_map_is_deeper_where_values_are_higher_and_empty_where_there_are_none() -> None:
    chart = heat_map("T", ["q", NAME], ["0", "1"], [[0.0, 0.5], [1.0, None]], low=0.0, high=1.0)
    reader = shown(chart)
    shades = [float(v) for v in reader.values("fill-opacity")]
    assert shades == [0.06, 0.53, 1.0, 0.0]
    assert reader.of("title")[1:] == ["q, 0: 0", "q, 1: 0.5", f"{NAME}, 0: 1", f"{NAME}, 1: none"]
    assert "0 is pale, 1 is deep" in reader.text


def test_a_map_of_many_columns_keeps_its_cells_wide_enough() -> None:
    chart = heat_map("T", ["q"], [str(i) for i in range(80)], [[0.5] * 80])
    (width,) = (int(w) for w in re.findall(r'<svg [^>]*class="fixed" width="(\d+)"', chart))
    assert width > 80 * 15
    assert len(shown(chart).of("text")) < 45  # not a number in every cell, nor over every column


@pytest.mark.parametrize(
    "chart",
    [
        lines("T", {}, x_label="x", y_label="y"),
        lines("T", {"one": []}, x_label="x", y_label="y", log_x=True),
        scatter("T", {"one": [(math.nan, 1.0)]}, x_label="x", y_label="y"),
        bars("T", [], {}),
        heat_map("T", [], [], []),
        heat_map("T", ["q"], ["0"], [[None]]),
        heat_map("T", ["q"], ["0"], [[0.5]], low=0.5, high=0.5),
    ],
)
def test_a_chart_of_nothing_is_still_one(chart: Markup) -> None:
    assert "nan" not in chart
    assert shown(chart).of("figcaption") == ["T"]
