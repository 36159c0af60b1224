"""Plans and reports show themselves in notebooks, whatever their names hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

import llmprune
from llmprune import Report
from llmprune.base.markup import html_facts, html_table
from llmprune.engine.plan import Plan
from tests.conftest import Pico
from tests.report.conftest import Result


class Reader(HTMLParser):
    """Collects text and tags, and checks that every tag is closed in its order."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text: list[str] = []
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def check_neutral(reader: Reader) -> None:
    """Check that nothing is fetched or run, and that colours are the reader's."""
    assert not {"script", "img", "link", "style", "iframe"} & set(reader.tags)
    assert {name for name, _ in reader.attributes} <= {"style", "scope"}
    styles = ";".join(str(value) for name, value in reader.attributes if name == "style")
    assert "#" not in styles
    assert "url(" not in styles


@pytest.fixture
def plan(pico: Pico, tmp_path: Path) -> Plan:
    return llmprune.plan(
        str(pico("llama")), sparsity=0.5, out=tmp_path / "out", num_samples=4, seq_len=16
    )


def test_a_plan_is_a_table_with_all_its_lines(plan: Plan) -> None:
    reader = Reader(plan._repr_html_())
    check_neutral(reader)
    for line in repr(plan).split("\n\n")[0].splitlines():
        assert line.split("  ")[0] in reader.text
    assert "self_attn.q_proj" in reader.text


def test_a_report_is_a_table_with_all_its_lines(result: Result) -> None:
    report = Report.read(result("mixtral"))
    reader = Reader(report._repr_html_())
    check_neutral(reader)
    for line in repr(report).splitlines():
        assert line.split("  ")[0] in reader.text
    assert "mlp.experts.*.up_proj" in reader.text


def test_names_cannot_smuggle_markup(plan: Plan, result: Result) -> None:
    name = "<script>alert(1)</script>&"
    check_neutral(Reader(replace(plan, source_name=name)._repr_html_()))
    data = dict(Report.read(result("llama")).data) | {"out": name}
    reader = Reader(Report(data)._repr_html_())
    check_neutral(reader)
    assert any(name in text for text in reader.text)


@pytest.mark.parametrize("make", [html_facts, lambda rows: html_table(("a", "b"), rows)])
def test_cells_are_escaped(make: Callable[[list[tuple[str, str]]], str]) -> None:
    assert "&lt;b&gt;" in make([("<b>", '"quoted" & more')])
    Reader(make([("<b>", "</td>")]))
