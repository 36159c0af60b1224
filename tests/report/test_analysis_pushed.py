"""An analysis goes with a result: named in its card, without paths or a private text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import llmprune
from llmprune.analysis.types import finding_from
from llmprune.pages.analysis_result import Analysis
from llmprune.pushing import package_of
from llmprune.report import publishing
from tests.report.conftest import Result
from tests.story.conftest import Command, command

__all__ = ["command"]
HOME = "llmprune/analysis"


@pytest.fixture
def analysed(result: Result, text_file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A result that was analysed on a text of one's own."""
    monkeypatch.setattr(publishing, "_picture", lambda report: b"a picture")
    folder = result()
    found = llmprune.analyze(
        folder, data=text_file, only=["pq", "worst", "dead"], num_windows=2, seq_len=24
    )
    found.save(folder / HOME)
    return folder


def test_what_analyze_wrote_is_sent_and_named(analysed: Path, text_file: Path) -> None:
    package = package_of(analysed, "me/small")
    sent = {name.removeprefix(f"{HOME}/") for name in package.texts if name.startswith(HOME)}
    wrote = {path.name for path in (analysed / HOME).iterdir()}
    assert sent == wrote - {"worst.csv", "worst.png"}
    assert {"analysis.html", "analysis.json", "pq.csv", "pq.png"} <= sent
    assert not package.left
    for name in ("pq.csv", "pq.png"):
        assert package.texts[f"{HOME}/{name}"] == (analysed / HOME / name).read_bytes()
    assert f"[analysis.html]({HOME}/analysis.html)" in package.card
    assert 'href="analysis/analysis.html"' in package.texts["llmprune/report.html"].decode()
    page = package.texts[f"{HOME}/analysis.html"].decode()
    assert page.count("<svg") == (analysed / HOME / "analysis.html").read_text().count("<svg") - 1
    told = package.texts[f"{HOME}/analysis.json"].decode()
    for text in (page, told):
        assert str(text_file) not in text and str(analysed) not in text
        assert "quotes a text of one" in text and text_file.name in text

    told = json.loads((analysed / HOME / "analysis.json").read_text(encoding="utf-8"))
    again = Analysis(
        model=told["model"],
        settings=told["settings"],
        findings={name: finding_from(name, each) for name, each in told["findings"].items()},
        command=told["command"],
    )
    assert again.page() == (analysed / HOME / "analysis.html").read_text(encoding="utf-8")


def test_limits_and_what_is_not_private(
    analysed: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = analysed / HOME / "analysis.json"
    told = json.loads(path.read_text(encoding="utf-8"))
    told["settings"]["data"] = "wikitext2"  # whose words may go
    path.write_text(json.dumps(told), encoding="utf-8")
    texts = package_of(analysed, "me/small").texts
    kept = (analysed / HOME / "worst.csv").read_bytes()
    assert texts[f"{HOME}/worst.csv"] == kept and kept.count(b"\n") > 2

    limit = sum(len(content) for name, content in texts.items() if name.startswith(HOME))
    picture = analysed / HOME / "pq.png"
    picture.write_bytes(picture.read_bytes() + bytes(1000))
    monkeypatch.setattr(publishing, "ANALYSIS_BYTES", limit)
    package = package_of(analysed, "me/small")
    assert package.left == (f"{HOME}/worst.png",)
    assert f"{HOME}/pq.png" in package.texts
    ended = command("push", analysed, "me/small", "--dry-run")
    assert ended.out.endswith(f"note: {HOME}/worst.png is too large to go\n")

    shutil.rmtree(analysed / HOME)  # never analysed
    package = package_of(analysed, "me/small")
    assert not any("analysis" in name for name in package.sizes)
    assert "analysis.html" not in package.card
