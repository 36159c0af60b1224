"""A plan as text and as plain data: what --dry-run and `llmprune plan` print."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from llmprune.base.progress import human_bytes, human_count, human_seconds
from llmprune.base.text import columns, named_lines, ranges
from llmprune.engine.cost import LIBRARIES

if TYPE_CHECKING:
    from llmprune.engine.plan import Plan


def plan_text(plan: Plan) -> str:
    """Return the plan as aligned lines: what, where, how much, how long, and how it will load."""
    cost = plan.estimate
    lines = [
        ("model", _model(plan)),
        ("method", _method(plan)),
        ("removes", _removes(plan)),
        ("result", _result(plan)),
        ("walks", _walks(plan)),
        ("reads", f"the checkpoint once ({human_bytes(cost.read_bytes)}), and again for the proof"),
        ("memory", _memory(plan)),
        ("disk", _disk(plan)),
        ("time", f"about {human_seconds(cost.cut_seconds)} to cut"),
        ("resume", _resume(plan)),
        ("perplexity", _perplexity(plan)),
        ("loads", "stock: AutoModelForCausalLM.from_pretrained, checked in a fresh process"),
    ]
    return "\n\n".join([named_lines(lines), _sites(plan), _skipped(plan)])


def _model(plan: Plan) -> str:
    params = human_count(plan.num_params)
    return f"{plan.source_name}: {len(plan.groups)} blocks, {params} parameters"


def _method(plan: Plan) -> str:
    pattern = f"pattern {plan.prune.pattern}{_group(plan)}"
    return f"{plan.method.title}, {pattern}, {_solver(plan)}"


def _memory(plan: Plan) -> str:
    host, device = plan.estimate.host_peak, plan.estimate.device_peak
    return f"{human_bytes(host)} on the host, {human_bytes(LIBRARIES)} of them the libraries" + (
        f"; {human_bytes(device)} on {plan.device}" if device else ""
    )


def _disk(plan: Plan) -> str:
    disk, out = plan.estimate.disk_bytes, plan.estimate.out_bytes
    return f"{human_bytes(disk)} ({human_bytes(out)} of them the result)"


def plan_data(plan: Plan) -> dict[str, Any]:
    """Return the plan as plain data: the recipe, the counts, what is skipped, the cost."""
    return {
        "recipe": plan.recipe.to_dict(),
        "model": plan.source_name,
        "out": plan.out,
        "form": plan.form,
        "tier": plan.tier,
        "forward": plan.forward,
        "needs": list(plan.cut_needs),
        "device": str(plan.device),
        "dtype": plan.dtype_name,
        "sparsity": plan.sparsity,
        "eligible": plan.eligible,
        "parameters": plan.num_params,
        "config_changes": dict(plan.config_changes),
        "eval_windows": plan.eval_windows,
        "sites": {
            site.name: {"units": site.num_units, "removed": plan.counts[site.name]}
            for site in plan.sites
        },
        "skipped": [asdict(row) for row in plan.skipped],
        "estimate": asdict(plan.estimate),
    }


def _group(plan: Plan) -> str:
    unstructured = plan.prune.pattern == "unstructured"
    return f" (weights compete within their {plan.group})" if unstructured else ""


def _solver(plan: Plan) -> str:
    return (
        "weights that stay are not changed" if plan.method.solver == "zero" else plan.method.solver
    )


def _removes(plan: Plan) -> str:
    total = plan.removed / plan.num_params
    return (
        f"{human_count(plan.removed)} of {human_count(plan.eligible)} eligible weights: sparsity "
        f"{plan.sparsity:.5f}, asked {plan.prune.sparsity:g} ({100 * total:.1f} % of all "
        "parameters)"
    )


def _result(plan: Plan) -> str:
    where = plan.out or "the model in memory"
    if plan.form == "masked":
        return f"{where}, masked: tensors of the same shape with exact zeros"
    changes = ", ".join(f"{key} = {value}" for key, value in plan.config_changes.items())
    return f"{where}, shrunk: smaller tensors, {changes} (tier {plan.tier}: equal in all blocks)"


def _walks(plan: Plan) -> str:
    if not plan.forward:
        return "1 over the weights; no forward, no calibration"
    cost = plan.estimate
    return (
        "1 forward, each block observed then passed: "
        f"{plan.num_samples} x {plan.seq_len} tokens in micro-batches of {cost.micro_batch}, "
        f"{plan.dtype_name} on {plan.device}, "
        f"hidden states on {cost.place} ({human_bytes(cost.hidden_bytes)})"
    )


def _resume(plan: Plan) -> str:
    if not plan.forward:
        return "finished blocks are kept"
    seconds = human_seconds(plan.estimate.resume_seconds)
    return f"finished blocks are kept; at most {seconds} to walk through them"


def _perplexity(plan: Plan) -> str:
    if not plan.eval_windows:
        return f"not measured; ask with: llmprune eval {plan.out or 'OUT'} --perplexity demo"
    return (
        f"dense and pruned, {plan.eval_windows} windows of {plan.seq_len} tokens, about "
        f"{human_seconds(plan.estimate.evaluate_seconds)}"
    )


def _sites(plan: Plan) -> str:
    """Return one line per kind of site, blocks joined."""
    kinds: dict[tuple[str, int, int], list[int]] = {}
    for site in plan.sites:
        prefix = next(p for p in plan.prefixes if site.name.startswith(p))
        kind = (site.name.removeprefix(prefix), site.num_units, plan.counts[site.name])
        kinds.setdefault(kind, []).append(site.block)
    rows = [
        (name, ranges(blocks), f"{units:,}", f"{count:,}", f"{count / units:.4f}")
        for (name, units, count), blocks in kinds.items()
    ]
    return columns(("site", "blocks", "units", "removed", "share"), rows[:40]) + (
        f"\n... and {len(rows) - 40} more kinds" if len(rows) > 40 else ""
    )


def _skipped(plan: Plan) -> str:
    rows = [
        (
            row.what,
            f"{row.num_params:,}",
            f"{100 * row.num_params / plan.num_params:.1f} %",
            row.reason,
        )
        for row in plan.skipped
        if row.num_params
    ]
    return columns(("not pruned", "parameters", "of model", "why"), rows)
