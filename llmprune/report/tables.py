"""A report as text: what the end of a run prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmprune.base.progress import human_bytes, human_seconds
from llmprune.base.text import named_lines
from llmprune.base.timeline import WAITS
from llmprune.report.coverage import coverage_line
from llmprune.report.recoveries import cut_method, is_pruned, last_wish, recovery_lines, sides
from llmprune.report.stages import (
    accepted_line,
    fallback_line,
    ranks_line,
    repair_line,
    stages_line,
    target_line,
    verdict_line,
)
from llmprune.report.unmeasured import unmeasured_text


def report_text(data: Mapping[str, Any]) -> str:
    """Return the final table of a run."""
    return named_lines(report_lines(data))


def report_lines(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what there is to say about a run, each with its name."""
    seconds = ", ".join(f"{name} {human_seconds(value)}" for name, value in data["seconds"].items())
    lines = {
        "result": f"{data['out'] or 'in memory'} ({_form(data)})",
        "method": _method(data) if is_pruned(data) else "",
        "sparsity": _sparsity(data) if is_pruned(data) else "",
        "parameters": _parameters(data),
        "bytes": _bytes(data),
        "KV cache": _cache(data),
        "tier": _tier(data),
        "target": _of_the_cut(target_line(data), data),
        "allocation": verdict_line(data),
        "stages": stages_line(data),
        "updates": accepted_line(data),
        "ranks": ranks_line(data),
        "repair": repair_line(data),
        "fallbacks": fallback_line(data),
        "error": _of_the_cut(_error(data), data),
        **recovery_lines(data),
        "perplexity": _perplexity(data) or _per_byte(data) or unmeasured_text(data),
        "experts": _experts(data),
        "proof": _proof(data.get("gate")),
        "resumed": _resumed(data.get("resumed_after")),
        "time": seconds,
        "profile": profile_line(data.get("profile")),
        "memory": _memory(data),
    }
    return [(name, text) for name, text in lines.items() if text]


def _form(data: Mapping[str, Any]) -> str:
    """Return how the result is stored; of a model that another tool pruned, that its zeros stay."""
    held = (last_wish(data) or {}).get("masks") == "zeros"
    return "its zeros held" if held and not is_pruned(data) else str(data["form"])


def _sparsity(data: Mapping[str, Any]) -> str:
    return (
        f"{data['sparsity']:.5f} of eligible weights, "
        f"{data['sparsity_of_all']:.5f} of all parameters"
    )


def _of_the_cut(text: str, data: Mapping[str, Any]) -> str:
    """Return what was measured when a model was cut; one that was trained since is another."""
    return (
        f"{text} (when it was cut)" if text and data.get("recovery") and last_wish(data) else text
    )


def _memory(data: Mapping[str, Any]) -> str:
    when = "at the end" if last_wish(data) else "at the end of a block, at most"
    return f"{human_bytes(data['peak_memory'])} {when}"


def _method(data: Mapping[str, Any]) -> str:
    allocation = f"{data['allocation']} allocation" if "allocation" in data else ""
    parts: list[str | None] = ["permute"] if data.get("permute") else []
    parts += [data.get(part) for part in ("refine", "solver", "repair")]
    used = " + ".join(part for part in parts if part and part != "zero")
    return ", ".join(filter(None, (cut_method(data), data.get("pattern"), allocation, used)))


def _parameters(data: Mapping[str, Any]) -> str:
    before, after = data.get("parameters_before"), data.get("parameters_after")
    return "" if before == after else f"{before:,} before, {after:,} after"


def _bytes(data: Mapping[str, Any]) -> str:
    sizes = data.get("sizes", {}).get("size", {})
    if sizes.get("after") in (None, sizes.get("before")):
        return ""
    return f"{human_bytes(sizes['before'])} of tensors before, {human_bytes(sizes['after'])} after"


def _cache(data: Mapping[str, Any]) -> str:
    """Return what a token leaves in the cache, where tensors have become smaller."""
    sizes = data.get("sizes", {}).get("kv", {})
    if "after" not in sizes or data["form"] != "shrunk":
        return ""
    if sizes["after"] == sizes["before"]:
        return f"{sizes['before']:,} values of key and value per token, as before"
    return f"{sizes['before']:,} values of key and value per token before, {sizes['after']:,} after"


def _tier(data: Mapping[str, Any]) -> str:
    """Return how a shrunk result loads, and why not more simply."""
    if data["form"] != "shrunk" or "tier" not in data:
        return ""
    how = {"E0": "a stock model", "E1": "a stock model, filled up with zeros"}
    text = f"{data['tier']}, {how.get(data['tier'], 'with code beside the weights')}"
    return text + "".join(f"; not {k}: {why}" for k, why in data.get("tier_reasons", {}).items())


def _error(data: Mapping[str, Any]) -> str:
    errors = [block["error"] for block in data["blocks"] if block["error"] is not None]
    if not errors:
        return ""
    return f"{errors[-1]:.4f} relative, output of the last block; largest {max(errors):.4f}"


def _perplexity(data: Mapping[str, Any]) -> str:
    """Return what each model scores: the dense one where it is there, before and after training."""
    found = sides(data)
    if not found:
        return ""
    values, own = ", ".join(f"{s.entry['value']:.3f} {s.label}" for s in found), found[-1].entry
    return (
        f"{values} ({own['num_windows']} windows of {own['seq_len']} tokens of "
        f"{own['data']}{_unlike_the_papers(own)})"
    )


def _per_byte(data: Mapping[str, Any]) -> str:
    """Return what compares models that read a text in unequal tokens; of a cut, not of training."""
    quality = data.get("rolling")
    if not quality or last_wish(data):
        return ""
    dense, pruned = quality["dense"], quality["pruned"]
    return (
        f"per byte {dense['byte_perplexity']:.4f} dense, {pruned['byte_perplexity']:.4f} pruned "
        f"({pruned['num_bytes']:,} bytes of {pruned['data']}, "
        f"{dense['num_tokens']:,} tokens dense, "
        f"{pruned['num_tokens']:,} pruned, whose perplexities per token do not compare)"
    )


def _unlike_the_papers(found: Mapping[str, Any]) -> str:
    stride = f", stride {found['stride']}" if found.get("stride") else ""
    bos = ", BOS first" if found["bos"] else ""
    dtype = found.get("dtype", "float32")
    return f"{stride}{bos}" + ("" if dtype == "float32" else f", {dtype}")


def profile_line(profile: Mapping[str, Any] | None) -> str:
    """Return what the main thread of a run waited for and did, in percent of the time."""
    if not profile or not profile["wall"]:
        return ""
    main = dict(profile["seconds"].get("main", {}))
    waits = [100 * main.pop(name, 0.0) / profile["wall"] for name in WAITS]
    done = sorted(main.items(), key=lambda item: -item[1])[:6]
    shares = ", ".join(f"{name} {100 * value / profile['wall']:.0f} %" for name, value in done)
    return f"waited for reads {waits[0]:.1f} %, for writes {waits[1]:.1f} %; {shares}"


def _experts(data: Mapping[str, Any]) -> str:
    found = coverage_line(data)
    return found and f"{found}; see report.coverage() or llmprune show --coverage"


def _proof(gate: Mapping[str, Any] | None) -> str:
    if not gate:
        return ""
    return (
        f"loaded in a fresh process, {gate['num_tensors']} tensors, logits within "
        f"{gate['agreement']['relative']:.1e} of the largest"
    )


def _resumed(block: int | None) -> str:
    return "" if block is None else f"after block {block}"
