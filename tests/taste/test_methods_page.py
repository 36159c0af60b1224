"""docs/METHODS.md is what its generator makes of the catalogue."""

from __future__ import annotations

import runpy
from pathlib import Path

from llmprune.catalog import METHODS

ROOT = Path(__file__).parents[2]


def test_the_committed_page_is_the_generated_one() -> None:
    made = runpy.run_path(str(ROOT / "eval" / "make_methods_page.py"))["page"]()
    assert (ROOT / "docs" / "METHODS.md").read_text(encoding="utf-8") == made, "run `make docs`"


def test_the_page_has_a_section_for_every_method() -> None:
    page = (ROOT / "docs" / "METHODS.md").read_text(encoding="utf-8")
    for method in METHODS.values():
        assert f"\n## {method.title}\n" in page
        assert f"`--method {method.name}`" in page
