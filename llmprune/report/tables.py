"""A report as text: what the end of a run prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmprune.base.progress import human_bytes, human_seconds
from llmprune.base.text import named_lines


def report_text(data: Mapping[str, Any]) -> str:
    """Return the final table of a run."""
    seconds = ", ".join(f"{name} {human_seconds(value)}" for name, value in data["seconds"].items())
    lines = {
        "result": f"{data['out'] or 'in memory'} ({data['form']})",
        "sparsity": (
            f"{data['sparsity']:.5f} of eligible weights, "
            f"{data['sparsity_of_all']:.5f} of all parameters"
        ),
        "parameters": _parameters(data),
        "error": _error(data),
        "perplexity": _perplexity(data.get("perplexity")),
        "proof": _proof(data.get("gate")),
        "resumed": _resumed(data.get("resumed_after")),
        "time": seconds,
        "memory": f"{human_bytes(data['peak_memory'])} at the end of a block, at most",
    }
    return named_lines([(name, text) for name, text in lines.items() if text])


def _parameters(data: Mapping[str, Any]) -> str:
    before, after = data["parameters_before"], data["parameters_after"]
    return "" if before == after else f"{before:,} before, {after:,} after"


def _error(data: Mapping[str, Any]) -> str:
    errors = [block["error"] for block in data["blocks"] if block["error"] is not None]
    if not errors:
        return ""
    return f"{errors[-1]:.4f} relative, output of the last block; largest {max(errors):.4f}"


def _perplexity(quality: Mapping[str, Any] | None) -> str:
    if not quality:
        return ""
    dense, pruned = quality["dense"], quality["pruned"]
    return (
        f"{dense['value']:.3f} dense, {pruned['value']:.3f} pruned ({pruned['num_windows']} "
        f"windows of {pruned['seq_len']} tokens of {pruned['data']})"
    )


def _proof(gate: Mapping[str, Any] | None) -> str:
    if not gate:
        return ""
    return (
        f"loaded in a fresh process, {gate['num_tensors']} tensors, logits within "
        f"{gate['agreement']['relative']:.1e} of the largest"
    )


def _resumed(block: int | None) -> str:
    return "" if block is None else f"after block {block}"
