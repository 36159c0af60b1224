"""The plan that a command prints says all that a wish leads to, before anything is done."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.story.conftest import Command

Planned = Callable[..., str]
USUAL = ("--num-samples", 8, "--seq-len", 16)


@pytest.fixture
def planned(command: Command, source: Path, text_file: Path) -> Planned:
    """Plan a run on the small llama; the command must end well."""

    def plan(*wishes: object) -> str:
        ended = command("plan", "--model", source, "--calib", text_file, *USUAL, *wishes)
        assert ended.code == 0, ended
        return ended.out

    return plan


def line(text: str, name: str) -> str:
    """Return the plan's line of a name; empty where there is none."""
    found = re.search(rf"^{name} +(.*)$", text, re.MULTILINE)
    return found[1] if found else ""


def test_a_search_for_a_sparsity_is_in_the_plan(planned: Planned) -> None:
    text = planned("--target", "ppl=+10%")
    assert "ppl +10%: the highest sparsity up to 0.9" in line(text, "target")
    assert "3 rounds of 8 sparsities" in line(text, "target")
    assert "25 candidates" in line(text, "probes")
    assert "at most" in line(text, "removes") and "asked" not in line(text, "removes")
    assert set(re.findall(r"q_proj .* (\S+) +(\S+)$", text, re.MULTILINE)) == {("target", "target")}
    data = json.loads(planned("--target", "ppl=+10%", "--json"))
    assert data["target"] == {"ppl": "+10%"} and data["awaits_survey"]
    assert {site["removed"] for site in data["sites"].values()} == {None}


def test_stages_and_damping_are_in_the_plan(planned: Planned) -> None:
    text = planned("--pattern", "2:4", "--effort", "best", "--set", "prune.damp=diag")
    assert line(text, "stages") == "channels put in order, blocks trained by repair block"
    assert "updated by alps, damping 0.01 of each entry" in line(text, "method")
    text = planned("--sparsity", 0.5, "--method", "wanda++")
    assert "changed by the repair alone" in line(text, "method")
    assert line(planned("--sparsity", 0.5), "stages") == ""


@pytest.mark.parametrize(
    ("wishes", "says"),
    [
        (("--set", "prune.damp=diag"), "damp diag changes nothing: solver zero"),
        (("--set", "prune.damping=0.1"), "damping 0.1 changes nothing: solver zero"),
        (("--set", "prune.adopt=always"), "adopt always changes nothing: allocation uniform"),
        ((), ""),
    ],
)
def test_what_changes_nothing_is_said_to(
    planned: Planned, wishes: tuple[object, ...], says: str
) -> None:
    note = line(planned("--sparsity", 0.25, *wishes), "note")
    assert note.startswith(says) if says else not note


@pytest.mark.parametrize(
    ("wishes", "method"),
    [
        (("--pattern", "ffn-channels", "--effort", "fast"), "Wanda"),
        (("--pattern", "ffn-channels+heads", "--effort", "good"), "Compact"),
        (("--pattern", "sublayers", "--effort", "best"), "FinerCut"),
        (("--pattern", "blocks"), "FinerCut"),
    ],
)
def test_a_kind_of_unit_has_a_method_where_none_is_given(
    planned: Planned, wishes: tuple[object, ...], method: str
) -> None:
    assert line(planned("--sparsity", 0.25, *wishes), "method").startswith(f"{method}, pattern")


def test_shares_by_hand_take_the_place_of_an_efforts_allocation(planned: Planned) -> None:
    wishes = ("--sparsity", 0.5, "--effort", "good", "--set", 'prune.sparsities={"*o_proj": 0.1}')
    assert line(planned(*wishes), "allocation").startswith("manual: *o_proj 0.1")


def test_units_that_go_from_every_block_alike_are_in_the_plan(planned: Planned) -> None:
    text = planned("--pattern", "ffn-channels+heads", "--sparsity", 0.5, "--method", "wanda-struct")
    assert re.findall(r"^(ffn-channels|heads) .* (\d+) +(\S+)$", text, re.MULTILINE) == [
        ("ffn-channels", "32", "0.5000"),
        ("heads", "1", "0.5000"),
    ]
    assert "num_key_value_heads = 1" in line(text, "result") and "E0" in line(text, "result")
    assert line(text, "loads").startswith("stock")


def test_a_method_that_ranks_units_or_tries_them_awaits_its_survey(planned: Planned) -> None:
    for method in ("compact", "flap", "finercut"):
        data = json.loads(planned("--method", method, "--sparsity", 0.25, "--json"))
        assert data["awaits_survey"], method
        assert {site["removed"] for site in data["sites"].values()} == {None}


def test_a_target_of_size_is_reached_before_anything_is_read(planned: Planned) -> None:
    text = planned("--pattern", "ffn-channels", "--method", "wanda", "--target", "params=0.8x")
    assert line(text, "target").startswith("params 0.8x: at most ")
    asked, reached = re.findall(r"([\d,]+) (?:parameters|reached)", line(text, "target"))
    assert int(reached.replace(",", "")) <= int(asked.replace(",", ""))


def test_one_target_is_enough(command: Command) -> None:
    ended = command("plan", "--model", "demo", "--target", "ppl=+5%", "--target", "ppl=+9%")
    assert ended.code == 2 and "ppl is given twice, as +5% and +9%" in ended.err
