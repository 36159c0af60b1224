"""Rows sum seeds up; the front is what nothing beats; tables say what rows hold."""

from __future__ import annotations

import csv
import io
import math
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmprune.comparison.pareto import front
from llmprune.comparison.result import Comparison
from llmprune.comparison.rows import rows_of
from llmprune.comparison.writing import leak_text, shared_text

DENSE: dict[str, Any] = {
    "parameters": 100,
    "loss": math.log(10),
    "perplexity": 10.0,
    "tasks": {"cloze acc": [0.5, 0.1]},
}


def cell(method: str, asked: str, perplexity: float, kept: int, seed: int = 0) -> dict[str, Any]:
    return {
        "name": f"{method}-{asked}-seed{seed}",
        "method": method,
        "asked": asked,
        "seed": seed,
        "sparsity": 1 - kept / 100,
        "parameters": 100,
        "kept": kept,
        "loss": math.log(perplexity),
        "perplexity": perplexity,
        "tasks": {"cloze acc": [0.25, 0.05]},
        "seconds": 2.0,
        "memory": 5_000_000,
    }


@pytest.fixture
def comparison() -> Comparison:
    failed = {**cell("c", "0.5", 1, 1), "error": {"message": "no | room", "code": 2}}
    return Comparison(
        {
            "model": "demo",
            "dense": DENSE,
            "cells": [
                cell("a", "0.5", 12.0, 50),
                cell("a", "0.5", 14.0, 50, seed=1),
                cell("b", "0.5", 20.0, 50),
                cell("a", "0.7", 40.0, 30),
                failed,
            ],
            "skipped": [{"name": "d-2of4-seed0", "why": "has none"}],
            "shared": [{"what": "dense baseline", "seconds": 3.0, "made": 1, "used": 4}],
            "protocol": {
                **{"model": "demo", "calibration": "c", "evaluation": "e", "leak": {"0": 0.0}},
                **{"tasks": "", "settings": [], "dtype": "float32", "device": "cpu"},
                **{"threads": 1, "versions": {"torch": "2"}, "seeds": [0, 1]},
            },
        }
    )


def test_the_front_by_hand() -> None:
    # (1, 3), (2, 2) and (3, 1) beat the rest; (2, 2) comes twice, and the first stands for both
    assert front([(3, 1), (1, 3), (2, 2), (3, 2), (2, 2), (4, 1)]) == [1, 2, 0]
    assert front([]) == []


points = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=12)


@settings(max_examples=60)
@given(points)
def test_the_front_is_what_no_pair_by_pair_comparison_finds_beaten(
    found: list[tuple[int, int]],
) -> None:
    def beaten(i: int) -> bool:
        return any(
            (p[0] <= found[i][0] and p[1] <= found[i][1] and p != found[i])
            or (p == found[i] and j < i)
            for j, p in enumerate(found)
        )

    slow = [place for place in range(len(found)) if not beaten(place)]
    assert sorted(front(found)) == slow


def test_seeds_become_mean_and_spread(comparison: Comparison) -> None:
    a, b, c = comparison.rows
    assert (a.method, a.num_seeds, b.num_seeds) == ("a", 2, 1)
    assert a.perplexity.mean == 13.0
    assert a.perplexity.deviation == pytest.approx(math.sqrt(2))
    assert b.perplexity.deviation is None
    # by losses: sqrt(12 * 14) / 10
    assert a.ratio == pytest.approx(math.sqrt(168) / 10)
    assert a.gap == pytest.approx(0.5 * math.log(168) - math.log(10))
    assert [row.marks for row in (a, b, c)] == ["best, Pareto", "", "Pareto"]


def test_a_row_that_the_dense_model_beats_is_not_on_the_front() -> None:
    (row,) = rows_of([cell("a", "0", 11.0, 100)], DENSE)
    assert not row.front and not row.best


def test_all_forms_have_the_same_numbers(comparison: Comparison, tmp_path: Any) -> None:
    for line in ("a       0.5", "13.000 ± 1.414", "0.2500 ± 0.0500"):
        assert line in comparison.table()
    written = {path.name for path in comparison.save(tmp_path)}
    assert {path.name for path in tmp_path.iterdir()} == written
    assert written == {
        *(f"comparison.{kind}" for kind in ("json", "csv", "md", "html")),
        *("pareto.png", "pareto.svg"),
    }
    text = (tmp_path / "comparison.csv").read_text()
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [(row["method"], row["kept"], row["pareto"]) for row in rows] == [
        *(("dense", "100", "0"), ("a", "50", "1"), ("b", "50", "0"), ("a", "30", "1")),
    ]
    assert float(rows[1]["perplexity_std"]) == pytest.approx(math.sqrt(2))
    page = (tmp_path / "comparison.html").read_text()
    markdown = (tmp_path / "comparison.md").read_text()
    for form in (page, markdown, comparison._repr_html_(), str(comparison)):
        assert "13.000 ± 1.414" in form
        assert "no | room" in form
        assert "d-2of4-seed0" in form
        assert "9.0 s saved" in form
    assert page.count("<svg") >= 3
    widths = {len(re.findall(r"(?<!\\)\|", row)) for row in markdown.splitlines() if row[:1] == "|"}
    assert len(widths) == 1
    assert Comparison.read(tmp_path).rows == comparison.rows


def test_exit_codes_say_whose_fault_it_was(comparison: Comparison) -> None:
    assert comparison.exit_code == 2
    assert comparison.failed == {"c-0.5-seed0": "no | room"}
    ours = {**cell("e", "0.5", 1, 1), "error": {"message": "a bug", "code": 1}}
    cells = [*comparison.data["cells"], ours]
    assert Comparison({**comparison.data, "cells": cells}).exit_code == 1
    assert Comparison({**comparison.data, "cells": cells[:4]}).exit_code == 0


def test_a_leak_and_what_was_shared_are_told() -> None:
    assert "flatter" in leak_text({"0": 0.0, "1": 0.02})
    assert "flatter" not in leak_text({"0": 0.001})
    assert "not checked" in leak_text({"0": None})
    told = shared_text([{"what": "windows", "seconds": 4.0, "made": 2, "used": 6}])
    assert told == "windows made 2 times for 6 cells (2.0 s each time; 8.0 s saved)"
