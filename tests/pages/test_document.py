"""A page is valid, escapes all text, fetches nothing, and can be read in light and dark."""

from __future__ import annotations

import re

import pytest
from markupsafe import Markup

from llmprune.pages.document import Section, card_row, folded, listed, page, preformatted
from llmprune.pages.style import DARK, LIGHT, NUM_SERIES, STYLE
from llmprune.pages.tables import facts, table
from tests.pages.conftest import Reader

HOSTILE = "</title></style><script>alert('x')</script>\"' onload=x &amp;"
LINES = Markup("<p>one</p>")


def luminance(colour: str) -> float:
    """Return the relative luminance of #rrggbb (WCAG 2.2)."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_as_the_recommendation_has_it() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
def test_text_and_series_stand_out(colours: dict[str, str]) -> None:
    for text in ("ink", "muted", "accent"):
        for ground in ("paper", "panel"):
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
    assert contrast(colours["ink"], colours["heat"]) >= 4.5
    for place in range(NUM_SERIES):
        assert contrast(colours[f"series-{place}"], colours["paper"]) >= 4.5, place
    assert LIGHT.keys() == DARK.keys()


def test_every_variable_that_the_style_uses_is_set() -> None:
    assert set(re.findall(r"var\(--([\w-]+)", STYLE)) - {"c"} <= LIGHT.keys()
    assert "{{" not in STYLE
    assert STYLE.count("{") == STYLE.count("}")


def test_a_page_has_its_sections_with_a_link_to_each() -> None:
    source = page("Title", [Section("One", LINES, "Lead"), Section("Two", LINES)], subtitle="Sub")
    reader = Reader(source)
    assert reader.of("h2") == ["One", "Two"]
    assert reader.of("a") == ["To the content", "One", "Two"]
    assert {"#one", "#two"} < set(reader.values("href"))
    assert ("html", "lang", "en") in reader.attributes
    assert ("p", "Lead") in reader.texts
    assert "width=device-width, initial-scale=1" in reader.values("content")
    (policy,) = [value for value in reader.values("content") if "default-src" in value]
    assert "default-src 'none'" in policy
    assert "script-src" not in policy
    assert "prefers-color-scheme:dark" in source


def test_sections_of_one_name_have_ids_of_their_own() -> None:
    titles = ["Speed", "speed!", "Main", "", "§"]
    Reader(page("x", [Section(title, LINES) for title in titles]))


@pytest.mark.parametrize("text", [HOSTILE, "{title}{0}{x.y}", "a & b < c"])
def test_text_is_shown_as_it_is_wherever_it_stands(text: str) -> None:
    body = Markup("").join(
        [
            preformatted(text, label=text),
            folded(text, LINES),
            listed([text]),
            card_row([(text, text)]),
            facts([(text, text)], caption=text),
            table((text, "b"), [(text, text)], caption=text),
        ]
    )
    reader = Reader(page(text, [Section(text, body, text)], subtitle=text))
    for tag in ("title", "h1", "h2", "p", "pre", "summary", "li", "b", "span", "td", "th"):
        assert text in reader.of(tag), tag


def test_a_body_that_is_not_markup_is_shown_as_text() -> None:
    source = page("x", [Section("One", "<script>")])  # type: ignore[arg-type]
    assert "&lt;script&gt;" in source
    assert "<script>" not in source


def test_a_column_of_numbers_is_set_to_the_right_and_one_of_words_is_not() -> None:
    rows = [("a", "1.5", "1", "", "12.0 ± 0.3"), ("b", "-2 %", "x", "3", "")]
    reader = Reader(page("x", [Section("One", table(tuple("vwxyz"), rows))]))
    heads = [tag for tag, name, _ in reader.attributes if name == "class" and tag in ("th", "td")]
    assert heads == ["th"] * 3 + ["td"] * 6  # columns w, y, z


def test_rows_that_do_not_fit_the_head_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        table(("a", "b"), [("1", "2", "3")])
