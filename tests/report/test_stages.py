"""What a report says of the stages of a run is what its rows hold, in plain words."""

from __future__ import annotations

from typing import Any

from llmprune.report.stages import (
    accepted_line,
    fallback_line,
    repair_line,
    stages_line,
    target_line,
    verdict_line,
)


def report_of(*rows: dict[str, Any], **facts: Any) -> dict[str, Any]:
    """Return a report of one block with these rows."""
    sites = [{"site": f"a.{i}", "weights": 10} | row for i, row in enumerate(rows)]
    return {"blocks": [{"block": 3, "sites": sites, "repair": facts.pop("found", {})}]} | facts


def test_errors_of_stages_are_means_over_linears() -> None:
    rows = [
        {"stages": {"masked": 0.2, "updated": 0.1}},
        {"stages": {"masked": 0.4, "updated": 0.2}},
    ]
    assert stages_line(report_of(*rows)).startswith("0.3000 masked, 0.1500 updated (")
    assert stages_line(report_of({})) == ""


def test_a_refined_mask_is_not_told_twice() -> None:
    row = {"stages": {"zeroed": 0.4, "swaps": 0.3, "masked": 0.3, "updated": 0.1}}
    assert stages_line(report_of(row)).startswith("0.4000 masked, 0.3000 swaps, 0.1000 updated (")


def test_a_repair_says_from_where_to_where_and_how_often() -> None:
    found = {
        f"{half}.{name}": value
        for half in ("attention", "ffn")
        for name, value in (("error_before", 0.5), ("error_after", 0.25), ("accepted", True))
    }
    line = repair_line(report_of(found=found, repair="halves"))
    halves = "attention 0.5000 to 0.2500; ffn 0.5000 to 0.2500"
    assert line == f"halves: held-out error {halves} (means over blocks)"
    refused = {"block.error_before": 0.5, "block.error_after": 0.5, "block.accepted": False}
    line = repair_line(report_of(found=refused, repair="block"))
    assert "block: held-out error 0.5000 to 0.5000, kept in 0 % of the blocks" in line
    assert repair_line(report_of(repair=None)) == ""


def test_the_share_of_rows_is_weighted_and_degraded_linears_are_named() -> None:
    rows = [
        {"accepted": 1.0, "weights": 30, "damping": 0.01},
        {"accepted": 0.5, "weights": 10, "damping": 0.1, "degraded": True},
    ]
    line = accepted_line(report_of(*rows))
    assert line.startswith("87.5 % of rows kept their update; 1 linear degraded to Wanda's mask")
    assert "(a.1)" in line and line.endswith("damping 0.01 to 0.1")


def test_one_is_not_many() -> None:
    verdict = {"allocation": "owl", "kl": {"uniform": 0.2, "owl": 0.1}, "adopted": False}
    one, many = (verdict_line({"verdict": verdict | {"sequences": n}}) for n in (1, 16))
    assert "on 1 sequence set apart; uniform is used" in one and "on 16 sequences" in many
    rows = [{"fallback": "wanda (too few tokens)"}, {"fallback": "wanda (too few tokens)"}]
    assert fallback_line(report_of(*rows)) == "2 linears by wanda (blocks 3)"
    assert fallback_line(report_of(rows[0])) == "1 linear by wanda (blocks 3)"


def test_a_target_that_is_missed_is_said_to_be() -> None:
    target = {"asked": {"ppl": "+5%"}, "limit": 21.0, "sparsity": 0.5, "expected": 20.9}
    met = target | {"reached": 20.8, "met": True}
    assert target_line({"target": met}).endswith("reached 20.800")
    assert target_line({"target": met | {"reached": 22.0, "met": False}}).endswith("misses it")
    assert "reached" not in target_line({"target": target})
