"""What a result has in comparison with its source, and what of a target it reaches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llmprune.arch.couplings import HEADS
from llmprune.engine.budgets import UNITS, cache_left, most_of, target_of, unpriced
from llmprune.mask.pattern import Units

if TYPE_CHECKING:
    from llmprune.engine.plan import Plan

UNSTEADY = 0.1


def sizes_of_result(plan: Plan) -> dict[str, dict[str, int]]:
    """Return parameters, bytes of tensors and, where it is known, the values of key and value that
    a token leaves in the cache: before, and after where that is decided."""
    before = {"params": plan.num_params, "size": plan.stored_bytes}
    before |= {"kv": sum(plan.cache)} if plan.cache else {}
    found = {key: {"before": value} for key, value in before.items()}
    if plan.shipment is None:
        return found
    shrunk = plan.form == "shrunk"
    params = plan.shipment.num_params if shrunk else plan.num_params
    found["params"]["after"] = params
    found["size"]["after"] = plan.stored_bytes - (plan.num_params - params) * plan.stored.itemsize
    if plan.cache:
        found["kv"]["after"] = _cache_left(plan) if shrunk else before["kv"]
    return found


def _cache_left(plan: Plan) -> int:
    """Return the values that a token leaves in the result's cache, zeros of padding among them."""
    shipment = plan.shipment
    assert shipment is not None and plan.cache is not None
    filled = shipment.widths.get(HEADS)
    if filled is None:
        return cache_left(plan.sites, plan.cache, plan.counts or {})
    there = [site for site in plan.sites if site.block in shipment.places]
    return cache_left(there, plan.cache, plan.counts or {}, filled)


def target_reached(plan: Plan) -> dict[str, Any] | None:
    """Return what a target of size or speed asked for, and what is reached; None without one.

    `most` is what the result may have and `reached` what it has, in `unit`; `reached` is absent
    until the counts are decided.
    """
    key, text = target_of(plan.prune)
    if key in ("", "ppl"):
        return None
    found: dict[str, Any] = {"key": key, "asked": text, "unit": UNITS.get(key, "seconds")}
    if key == "latency":
        facts = dict(plan.budget.facts)
        return found | {"most": plan.budget.most, "reached": facts["expected"], **facts}
    sizes = sizes_of_result(plan)[key]
    found |= {"most": most_of(key, text, sizes["before"]), "dense": sizes["before"]}
    found |= {"reached": sizes["after"]} if "after" in sizes else {}
    return found


def target_notes(plan: Plan) -> list[str]:
    """Return what a reader of a plan with a target may not expect."""
    notes = []
    left = unpriced(plan.budget, plan.groups)
    if left:
        notes.append(f"without keys and values, and so left as it is: {', '.join(left)}")
    if "latency" in (plan.prune.target or {}):
        notes.append(
            f"the plan has measured the latency for {plan.budget.facts['seconds']:g} s; a resumed "
            "run keeps the number of weights that came of it"
        )
        if plan.budget.facts["unsteady"] > UNSTEADY:
            notes.append(
                f"measurements contradict each other by {plan.budget.facts['unsteady']:.0%} of a "
                "token's time, as on a busy machine; plan again when it is idle"
            )
    in_blocks = isinstance(plan.pattern, Units) and plan.whole is None
    channels = any("channels" in site.kind for site in plan.sites)
    if plan.prune.multiple and in_blocks and not channels:
        notes.append(f"multiple {plan.prune.multiple} changes nothing: it is for channels")
    return notes


def target_text(found: Mapping[str, Any]) -> str:
    """Return what a target asked for and what is reached, in a line."""
    asked = f"{found['key']} {found['asked']}"
    if found["key"] == "latency":
        dense, reached = found["dense"], found["reached"]
        return (
            f"{asked}: a token takes {1000 * dense:.3g} ms dense, {1000 * reached:.3g} ms expected "
            f"({reached / dense:.3f}x), measured on {found['on']}"
        )
    reached = "what is reached follows from the survey"
    if "reached" in found:
        reached = f"{found['reached']:,} reached ({found['reached'] / found['dense']:.4f}x)"
    return f"{asked}: at most {found['most']:,} {found['unit']}, {reached}"
