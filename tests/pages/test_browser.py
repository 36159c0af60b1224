"""A real browser shows the page of a report within its window, wide or narrow, light or dark."""

from __future__ import annotations

import copy
import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from markupsafe import Markup

import llmprune
from llmprune import Report
from llmprune.pages.document import Section, page
from llmprune.pages.result import report_page
from tests.pages.conftest import Reader

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next((path for name in NAMES if (path := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(NAMES)} is installed")
WIDTHS = (1280, 390)
OUTER = """<!DOCTYPE html><meta charset="utf-8"><body style="margin:0">{frames}
<script>
addEventListener("load", () => {{
  const found = [...document.querySelectorAll("iframe")].map(frame => {{
    const page = frame.contentDocument, root = page.documentElement;
    page.querySelectorAll("details").forEach(one => one.open = true);
    const scrolls = one => one.closest(".scroll, pre, nav ul, .skip");
    const width = root.clientWidth;
    return {{
      width, whole: root.scrollWidth, body: page.body.scrollWidth,
      beyond: [...page.body.querySelectorAll("*")].filter(
        one => !scrolls(one) && one.getBoundingClientRect().right > width + 1
      ).map(one => one.tagName + " " + one.textContent.slice(0, 40)),
      headings: [...page.querySelectorAll("h1, h2")].map(one => one.textContent),
      charts: [...page.querySelectorAll("svg[role=img]")].map(one => one.clientWidth),
      ink: getComputedStyle(page.body).color,
      paper: getComputedStyle(page.body).backgroundColor,
    }};
  }});
  document.body.textContent = JSON.stringify(found);
}});
</script>"""


def browse(source: str, tmp_path: Path, *flags: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Return what a browser makes of a page in windows of all widths, and what it logs."""
    frames = "".join(
        f'<iframe style="border:0;width:{width}px;height:900px" srcdoc="{html.escape(source)}">'
        "</iframe>"
        for width in WIDTHS
    )
    outer = tmp_path / "outer.html"
    outer.write_text(OUTER.format(frames=frames), encoding="utf-8")
    ended = subprocess.run(
        [
            *(str(BROWSER), "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom"),
            *("--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}", *flags),
            *("--virtual-time-budget=2000", outer.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    body = re.search(r"<body[^>]*>(.*?)</body>", ended.stdout, re.DOTALL)
    assert body is not None, ended.stderr
    logged = [line for line in ended.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(html.unescape(body[1])), logged


def brightness(colour: str) -> int:
    return sum(map(int, re.findall(r"\d+", colour)[:3]))


@pytest.fixture(scope="module")
def source(make_model: Callable[..., Any], tokens: Any) -> str:
    """The page of a report with many blocks, long names, long texts and long numbers."""
    report = llmprune.prune(make_model("llama"), sparsity=0.5, calib=tokens, quiet=True)
    data: dict[str, Any] = copy.deepcopy(dict(report.data))
    first = data["blocks"][0]
    data["blocks"] = [copy.deepcopy(first) | {"block": index} for index in range(40)]
    long = "a_name_without_any_place_to_break" * 12
    data |= {"model": long, "warnings": [long, "a warning " * 60], "files": {long: "0f" * 32}}
    text = {"prompt": long, "dense": "word " * 90, "pruned": long}
    data["samples"] = {"texts": [text], "models": ["dense", "pruned"], "new_tokens": 32}
    data["skipped"] = [{"what": long, "num_params": 10**12, "reason": "a reason " * 20}]
    entry = {"num_windows": 4, "seq_len": 8, "data": long, "bos": False}
    data["perplexity"] = {"dense": entry | {"value": 5.0}, "pruned": entry | {"value": 1e6}}
    return report_page(Report(data).data)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_report_fits_its_window(source: str, tmp_path: Path, scheme: str) -> None:
    flags = ("--blink-settings=preferredColorScheme=0",) if scheme == "dark" else ()
    found, logged = browse(source, tmp_path, *flags)
    assert not logged
    reader = Reader(source)
    for width, seen in zip(WIDTHS, found, strict=True):
        assert width - 20 <= seen["width"] <= width  # less a scroll bar
        assert seen["whole"] <= seen["width"]
        assert seen["body"] <= seen["width"]
        assert seen["beyond"] == []
        assert seen["headings"] == [*reader.of("h1"), *reader.of("h2")]
        assert len(seen["charts"]) > 5
        assert min(seen["charts"]) > 150
        is_dark = brightness(seen["paper"]) < brightness(seen["ink"])
        assert is_dark == (scheme == "dark")


def test_what_is_too_wide_or_forbidden_is_noticed(tmp_path: Path) -> None:
    wide = Markup('<div style="width:3000px">wide</div><img src="https://example.org/x.png">')
    found, logged = browse(page("x", [Section("One", wide)]), tmp_path)
    assert all(seen["whole"] >= 3000 and seen["beyond"] for seen in found)
    assert "Content Security Policy" in " ".join(logged)
