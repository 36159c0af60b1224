"""docs/METHODS.md is what its generator makes of the tables."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from eval.methods_page.page import page
from eval.methods_page.parts import BLOCKS, LINEARS
from eval.methods_page.results import results
from eval.methods_page.text import linked
from eval.methods_page.units import DEMO_HEADS, TIERS, UNITS
from llmprune.allocation import ALLOCATIONS
from llmprune.arch.couplings import heads_of
from llmprune.catalog import METHODS
from llmprune.catalog.types import UNITS as KINDS
from llmprune.delivery.heterogeneous import TIERS as KNOWN_TIERS
from llmprune.recipe.effort import stages
from llmprune.recovery.distillation import DISTILLATIONS
from llmprune.recovery.methods import RECOVERIES
from llmprune.recovery.regrowth import REGROWTHS
from llmprune.recovery.schedules import SCHEDULES
from llmprune.recovery.soft import SOFT_MASKS
from llmprune.repair import REPAIRS
from llmprune.score import RANK_SCORES, SCORES, UNIT_SCORES, WHOLE_SCORES
from llmprune.solver import COMPENSATIONS, REFINEMENTS, SOLVERS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "METHODS.md").read_text(encoding="utf-8")


def part_lines(title: str) -> str:
    """Return what stands under a heading."""
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def part_of_page(title: str) -> str:
    """Return what stands under a heading, on one line."""
    return " ".join(part_lines(title).split())


def test_the_committed_page_is_the_generated_one() -> None:
    assert page() == PAGE, "run `make docs`"


def test_the_page_has_a_section_for_every_method() -> None:
    for method in METHODS.values():
        assert f"\n## {method.title}\n" in PAGE
        assert f"`--method {method.name}`" in part_of_page(method.title)


def test_every_link_within_the_page_has_a_heading() -> None:
    seen: dict[str, int] = {}
    anchors = set()
    for heading in re.findall(r"^#+ (.*)$", PAGE, re.MULTILINE):
        plain = re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
        count = seen[plain] = seen.get(plain, -1) + 1
        anchors.add(f"{plain}-{count}" if count else plain)
    links = set(re.findall(r"\]\(#([^)]*)\)", PAGE))
    assert {"wanda", "wanda-1"} <= links <= anchors


@pytest.mark.parametrize(
    ("title", "table"),
    [
        ("Allocations", {name: row for name, row in ALLOCATIONS.items() if not row.units}),
        ("Unit allocations", {name: row for name, row in ALLOCATIONS.items() if row.units}),
        ("Unit scores", UNIT_SCORES),
        ("Compensations", COMPENSATIONS),
        ("Refinements", REFINEMENTS),
        ("Solvers", SOLVERS),
        ("Repairs", REPAIRS),
        ("Recovery", RECOVERIES),
        ("Schedules", SCHEDULES),
        ("Regrowth", REGROWTHS),
        ("Soft masks", SOFT_MASKS),
        ("Distillation", DISTILLATIONS),
    ],
)
def test_every_part_is_described_with_its_numbers(title: str, table: dict[str, Any]) -> None:
    text = part_of_page(title)
    for name, row in table.items():
        assert f"- `{name}`: " in text, name
        for option, value in getattr(row, "options", {}).items():
            assert f"`{option}` {value:g}" in text


def test_every_recovery_says_what_it_trains_and_whether_zeros_stay() -> None:
    lines = re.findall(
        r"^\| `([\w-]+)` \| (.*?) \| (.*?) \| ", part_lines("Recovery"), re.MULTILINE
    )
    found = {name: (trains, zeros) for name, trains, zeros in lines}
    assert found.keys() == RECOVERIES.keys()
    for name, row in RECOVERIES.items():
        assert found[name][0] == row.summary
        assert found[name][1].startswith("no" if row.fills else "yes")
        assert f"Paper: {linked(row.paper)}." in part_of_page("Recovery")


def test_a_method_names_the_options_of_its_score_and_its_repair() -> None:
    for method in METHODS.values():
        repair = REPAIRS[method.repair].options if method.repair else {}
        score = {**SCORES, **UNIT_SCORES, **WHOLE_SCORES, **RANK_SCORES}[method.score].options
        for option, value in {**score, **repair}.items():
            assert f"`{option}` {value:g}" in part_of_page(method.title)


@pytest.mark.parametrize("effort", ["fast", "good", "best"])
def test_the_dial_shows_what_an_effort_stands_for(effort: str) -> None:
    (line,) = re.findall(rf"^\| `{effort}` \|.*$", PAGE, re.MULTILINE)
    cells = line.split(" | ")
    columns = {1: ("unstructured", 0.5), 3: ("unstructured", 0.7), 4: ("2:4", None)}
    for column, what in columns.items():
        keys = dict(stages(effort, *what))
        assert f"`{keys.pop('method', '')}`" in cells[column]
        assert all(f"`{key}: " in cells[column] for key in keys)


def test_costs_are_those_of_the_demo() -> None:
    config = LlamaConfig.from_pretrained(ROOT / "llmprune/demo/model")
    assert config.num_hidden_layers == BLOCKS
    assert LINEARS["mlp.up_proj"] == (config.intermediate_size, config.hidden_size)
    assert LINEARS["self_attn.k_proj"][0] == DEMO_HEADS.head_dim * DEMO_HEADS.num_groups
    assert heads_of(config) == DEMO_HEADS


def test_every_kind_of_unit_has_a_line_with_its_weights() -> None:
    assert set(UNITS) == set(KINDS)
    lines = re.findall(r"^\| `([\w-]+)` \|.*\| ([\d,]*) ?\|$", part_lines("Units"), re.MULTILINE)
    weights = dict(lines)
    assert set(weights) == set(KINDS)
    assert weights["ffn-channels"] == "768"  # 3 x 256
    assert weights["heads"] == "49,152"  # (2 x 2 + 2) x 32 x 256
    assert weights["query-heads"] == "16,384"  # 2 x 32 x 256
    assert weights["experts"] == ""  # the demo has none


def test_every_tier_says_what_loads_it() -> None:
    assert [name for name, _ in TIERS] == [*KNOWN_TIERS]
    lines = re.findall(r"^\| (E\d) \|.*$", part_lines("Tiers"), re.MULTILINE)
    assert lines == [*KNOWN_TIERS]


def test_results_are_a_line_per_method_and_a_column_per_amount(
    tmp_path: Path,
) -> None:
    rows = [
        {"method": "dense", "amount": "50 %", "perplexity": 4},
        {"method": "wanda", "amount": "50 %", "perplexity": 5.125, "seconds": 61.7},
        {"method": "wanda", "amount": "2:4", "perplexity": 6.5, "settings": "prune.permute=true"},
        {"method": "best", "amount": "2:4", "perplexity": 5.5},
    ]
    (tmp_path / "demo.json").write_text(json.dumps(rows))
    lines = results(tmp_path / "demo.json").splitlines()
    assert lines[0] == "## Results"
    assert lines[-6:] == [
        "| method | set | 50 % | 2:4 |",
        "|---|---|---|---|",
        "| dense | | 4.00 | |",
        "| [Wanda](#wanda) | | 5.12 (62 s) | |",
        "| [Wanda](#wanda) | `prune.permute=true` | | 6.50 |",
        "| [`--effort best`](#the-dial) | | | 5.50 |",
    ]


def test_without_results_there_is_no_section(tmp_path: Path) -> None:
    assert results(tmp_path / "none.json") == ""


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"method": "wanda", "amount": "50 %"}, "has not the keys"),
        ({"method": "wanda", "amount": "50 %", "perplexity": 5, "ppl": 5}, "or more than"),
        ({"method": "wanda", "amount": 0.5, "perplexity": 5}, "amount is no"),
        ({"method": "wnada", "amount": "50 %", "perplexity": 5}, "no method or effort 'wnada'"),
        ("wanda", "has not the keys"),
    ],
)
def test_a_row_of_results_that_cannot_be_read_is_named(
    row: Any, message: str, tmp_path: Path
) -> None:
    (tmp_path / "demo.json").write_text(json.dumps([row]))
    with pytest.raises(ValueError, match=message):
        results(tmp_path / "demo.json")


def test_two_results_of_one_thing_are_refused(tmp_path: Path) -> None:
    row = {"method": "wanda", "amount": "50 %", "perplexity": 5}
    (tmp_path / "demo.json").write_text(json.dumps([row, row]))
    with pytest.raises(ValueError, match="second row"):
        results(tmp_path / "demo.json")
