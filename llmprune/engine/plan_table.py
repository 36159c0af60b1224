"""A plan as text and as plain data: what --dry-run and `llmprune plan` print."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from llmprune.allocation import ALLOCATIONS
from llmprune.arch.anatomy import split_index
from llmprune.arch.couplings import EXPERT_CHANNELS
from llmprune.base.markup import html_facts, html_folded, html_table
from llmprune.base.progress import human_count
from llmprune.base.text import columns, named_lines, ranges
from llmprune.calibration.selection import (
    calibration_texts,
    evaluation_data,
    name_of,
)
from llmprune.engine.plan_cost import cost_lines
from llmprune.engine.ranks import DENSE, rank_notes, ranks_line
from llmprune.engine.reckoning import sizes_of_result, target_notes, target_reached, target_text
from llmprune.engine.target import ROUNDS, SPLITS
from llmprune.engine.whole import TRUNK
from llmprune.mask.pattern import LowRank, Tiles, Units, Unstructured
from llmprune.score import RANK_SCORES

if TYPE_CHECKING:
    from llmprune.engine.plan import Plan

SITES = ("site", "blocks", "units", "removed", "share")
SKIPPED = ("not pruned", "parameters", "of model", "why")


def plan_text(plan: Plan) -> str:
    """Return the plan as aligned lines: what, where, how much, how long, and how it will load."""
    rest = [columns(SKIPPED, rows)] if (rows := _skipped(plan)) else []
    return "\n\n".join([named_lines(_lines(plan)), _sites(plan), *rest])


def plan_html(plan: Plan) -> str:
    """Return the plan for a notebook: the same lines and tables, the long ones folded."""
    return (
        html_facts(_lines(plan), caption="Plan")
        + html_folded(f"{len(plan.sites):,} sites", html_table(SITES, _kinds(plan)))
        + html_folded("not pruned", html_table(SKIPPED, _skipped(plan)))
    )


def _lines(plan: Plan) -> list[tuple[str, str]]:
    """Return what is decided, each with its name; what a plan does not have is left out."""
    lines = [
        ("model", _model(plan)),
        ("method", _method(plan)),
        ("stages", _stages(plan)),
        ("allocation", _allocation(plan)),
        ("target", _target(plan)),
        ("removes", _removes(plan)),
        ("result", _result(plan)),
        ("ranks", ranks_line(plan)),
        *cost_lines(plan),
        ("loads", _loads(plan)),
        *(("note", note) for note in _all_notes(plan)),
    ]
    return [(name, text) for name, text in lines if text]


def _all_notes(plan: Plan) -> list[str]:
    """Return what a reader of the plan may not expect."""
    return [*plan.notes, *rank_notes(plan), *target_notes(plan), *_idle(plan)]


def _model(plan: Plan) -> str:
    params = human_count(plan.num_params)
    return f"{plan.source_name}: {len(plan.groups)} blocks, {params} parameters"


def _method(plan: Plan) -> str:
    pattern = f"pattern {plan.prune.pattern}{_group(plan)}"
    return f"{plan.method.title}, {pattern}, {_solver(plan)}"


def _allocation(plan: Plan) -> str:
    match plan.allocation:
        case "uniform" if plan.whole is not None:
            return f"{plan.whole.kept:,} of {plan.whole.site.num_units:,} in the whole model"
        case "uniform" if isinstance(plan.pattern, Units):
            return "uniform: equally many units of each kind in every block"
        case "uniform":
            return "uniform: every linear loses the same share"
        case "manual":
            wished = (plan.prune.sparsities or {}).items()
            named = ", ".join(f"{glob} {share:g}" for glob, share in wished)
            return f"manual: {named}; linears not named share what is left"
    what = "counts follow from a survey of all weights"
    if ALLOCATIONS[plan.allocation].judged:
        what = "counts follow from a survey"
        what += (
            "; equal shares are used where they are no further from the dense model"
            if plan.prune.adopt == "better"
            else ", whether they are better than equal shares or not"
        )
    return f"{plan.allocation}: {what}" if plan.counts is None else plan.allocation


def _stages(plan: Plan) -> str:
    """Return what is done beside cutting and updating, in its order."""
    method = plan.method
    steps = ["channels put in order"] if plan.prune.permute else []
    steps += [f"masks refined by {method.refine}"] if method.refine else []
    steps += [f"blocks trained by repair {method.repair}"] if method.repair else []
    return ", ".join(steps)


def _target(plan: Plan) -> str:
    """Return how the sparsity is looked for, where a target is to be met."""
    if not plan.prune.target:
        return ""
    found = target_reached(plan)
    if found is not None:
        return target_text(found)
    return (
        f"ppl {plan.prune.target['ppl']}: the highest sparsity up to {plan.prune.sparsity:g} that "
        f"keeps it, {ROUNDS} rounds of {SPLITS} sparsities, equal shares, "
        f"on {plan.eval_windows} windows of {plan.seq_len} tokens"
    )


def _idle(plan: Plan) -> list[str]:
    """Return what the recipe asks for and no part of the run looks at."""
    step, notes = plan.prune, []
    asked = [
        f"{key} {getattr(step, key)}"
        for key in ("damping", "damp")
        if getattr(step, key) != type(step).model_fields[key].default
    ]
    factored = isinstance(plan.pattern, LowRank)
    if asked and plan.method.solver == "zero" and not factored:
        notes.append(f"{' and '.join(asked)} changes nothing: solver zero updates no weights")
    if step.adopt == "always" and not ALLOCATIONS[plan.allocation].judged:
        notes.append(f"adopt always changes nothing: allocation {plan.allocation} is not judged")
    return notes


def plan_data(plan: Plan) -> dict[str, Any]:
    """Return the plan as plain data: the recipe, the counts, what is skipped, the cost."""
    return {
        "recipe": plan.recipe.to_dict(),
        "model": plan.source_name,
        "out": plan.out,
        "form": plan.form,
        "forward": plan.forward,
        "needs": list(plan.parts.names),
        "solver": plan.method.solver,
        "refine": plan.method.refine,
        "repair": plan.method.repair,
        "permute": plan.prune.permute,
        "target": dict(plan.prune.target) if plan.prune.target else None,
        "reached": target_reached(plan),
        "sizes": sizes_of_result(plan),
        "notes": _all_notes(plan),
        "calibration": name_of(calibration_texts(plan.recipe)) if plan.forward else None,
        "statistics": plan.given.hash if plan.given is not None else None,
        "evaluation": evaluation_data(plan.recipe) if plan.eval_windows else None,
        "allocation": plan.allocation,
        "awaits_survey": bool(_awaited(plan)),
        "device": str(plan.device),
        "dtype": plan.dtype_name,
        "sparsity": plan.sparsity,
        "eligible": plan.eligible,
        "parameters": plan.num_params,
        "tier": plan.shipment.tier if plan.shipment else None,
        "config_changes": dict(plan.config_changes),
        "eval_windows": plan.eval_windows,
        "sites": {
            site.name: {
                "units": site.num_units,
                "removed": None if _awaited(plan) else (plan.counts or {})[site.name],
            }
            for site in plan.sites
        },
        "skipped": [asdict(row) for row in plan.skipped],
        "estimate": asdict(plan.estimate),
    }


def _group(plan: Plan) -> str:
    if isinstance(plan.pattern, Tiles):
        kind = "matrix" if plan.group == "matrix" else "row of tiles"
        return f" (tiles compete within their {kind})"
    if not isinstance(plan.pattern, Unstructured):
        return ""
    if plan.group == "mass":
        return " (every row loses the same share of its scores' sum)"
    return f" (weights compete within their {plan.group})"


def _solver(plan: Plan) -> str:
    """Return what happens to the weights that stay."""
    if plan.whole is not None:
        return plan.whole.score.says
    if isinstance(plan.pattern, LowRank):
        says = RANK_SCORES[plan.method.score].says
        return f"linears keep {says}, damping {plan.prune.damping:g}"
    if plan.method.solver == "zero":
        alone = "changed by the repair alone" if plan.method.repair else "not changed"
        return f"weights that stay are {alone}"
    damp = "" if plan.prune.damp == "mean" else " of each entry"
    return (
        f"weights that stay updated by {plan.method.solver}, damping {plan.prune.damping:g}{damp}"
    )


def _awaited(plan: Plan) -> str:
    """Return what the counts follow from before the cut; empty where they are known."""
    return "target" if plan.searches else "survey" if plan.counts is None else ""


def _removes(plan: Plan) -> str:
    total = plan.removed / plan.num_params
    if plan.searches:
        return (
            f"at most {human_count(plan.removed)} of {human_count(plan.eligible)} eligible "
            f"weights: sparsity up to {plan.sparsity:.5f} ({100 * total:.1f} % of all parameters)"
        )
    asked = f"{plan.prune.sparsity:g}" if not plan.prune.target else f"{plan.asked_share:.5f}"
    return (
        f"{human_count(plan.removed)} of {human_count(plan.eligible)} eligible weights: sparsity "
        f"{plan.sparsity:.5f}, asked {asked} ({100 * total:.1f} % of all parameters)"
    )


def _result(plan: Plan) -> str:
    where = plan.out or "the model in memory"
    if plan.form == "masked":
        return f"{where}, masked: tensors of the same shape with exact zeros"
    if plan.form == DENSE:
        return f"{where}, dense: products of factors in tensors of the same shape (tier E0)"
    shipment = plan.shipment
    if isinstance(plan.pattern, LowRank) and shipment is not None:
        pairs = sum(1 for site in plan.sites if (plan.counts or {})[site.name])
        return (
            f"{where}, shrunk: {pairs} of {len(plan.sites)} linears as two each; "
            f"{shipment.num_params:,} parameters, were {plan.num_params:,} (tier {shipment.tier})"
        )
    if shipment is None:
        return f"{where}, shrunk: smaller tensors; how they are stored follows from the survey"
    changes = ", ".join(f"{key} = {value}" for key, value in plan.config_changes.items())
    return f"{where}, shrunk: {changes or 'blocks of unequal sizes'} (tier {shipment.tier})"


def _loads(plan: Plan) -> str:
    """Return how the result will load, and why not more simply."""
    shipment = plan.shipment
    if shipment is None:
        return (
            "as the lowest tier that holds what the survey leaves: stock (E0), or with code that "
            "comes with it (E2, E3)"
        )
    why = "".join(f"; not {name}: {reason}" for name, reason in shipment.reasons)
    if shipment.code:
        return (
            f"tier {shipment.tier}: from_pretrained(..., trust_remote_code=True), by code in the "
            f"folder, checked in a fresh process{why}"
        )
    return "stock: AutoModelForCausalLM.from_pretrained, checked in a fresh process"


def _sites(plan: Plan) -> str:
    """Return one line per kind of site."""
    rows = _kinds(plan)
    return columns(SITES, rows[:40]) + (
        f"\n... and {len(rows) - 40} more kinds" if len(rows) > 40 else ""
    )


def _kinds(plan: Plan) -> list[tuple[str, ...]]:
    """Return a row per kind of site: blocks joined, and the experts of a block as one."""
    awaited = _awaited(plan)
    kinds: dict[str, tuple[list[int], int, int | None]] = {}
    for site in plan.sites:
        prefix = next((p for p in plan.prefixes if site.name.startswith(p)), "")
        name, _ = split_index(site.name.removeprefix(prefix))
        if name.startswith(EXPERT_CHANNELS):
            name = EXPERT_CHANNELS
        count = None if awaited else (plan.counts or {})[site.name]
        key = f"{name} {site.num_units} {count}"
        blocks, units, removed = kinds.get(key, ([], 0, 0))
        if blocks[:1] in ([], [site.block]):  # units are those of one block
            units += site.num_units
            removed = None if count is None else (removed or 0) + count
        blocks = blocks if site.block in blocks[-1:] else [*blocks, site.block]
        kinds[key] = (blocks, units, removed)
    return [
        (key.split(" ")[0], _blocks(blocks), f"{units:,}", *_removed(count, units, awaited))
        for key, (blocks, units, count) in kinds.items()
    ]


def _blocks(blocks: list[int]) -> str:
    """Return the blocks of a kind of site as ranges; what lies in no block alone is in all."""
    return "all" if blocks == [TRUNK] else ranges(blocks)


def _removed(count: int | None, units: int, awaited: str) -> tuple[str, str]:
    """Return a count and its share, or what they follow from."""
    return (awaited, awaited) if count is None else (f"{count:,}", f"{count / units:.4f}")


def _skipped(plan: Plan) -> list[tuple[str, ...]]:
    """Return a row per part of the model that stays as it is."""
    return [
        (
            row.what,
            f"{row.num_params:,}",
            f"{100 * row.num_params / plan.num_params:.1f} %",
            row.reason,
        )
        for row in plan.skipped
        if row.num_params
    ]
