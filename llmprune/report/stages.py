"""What each stage of a run gained: refined masks, updated weights, repaired blocks, allocation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from llmprune.base.text import ranges


def stages_line(data: Mapping[str, Any]) -> str:
    """Return the relative error of a linear's output after each stage, mean over all linears."""
    sums: dict[str, list[float]] = {}
    for row in _rows(data):
        for stage, error in row.get("stages", {}).items():
            sums.setdefault(stage, []).append(error)
    found = {stage: sum(errors) / len(errors) for stage, errors in sums.items()}
    steps = ", ".join(f"{error:.4f} {stage}" for stage, error in found.items())
    return steps and f"{steps} (error of a linear's output, mean)"


def accepted_line(data: Mapping[str, Any]) -> str:
    """Return the share of rows whose update was kept, and where less was done than asked."""
    shares = [(row["accepted"], row["weights"]) for row in _rows(data) if "accepted" in row]
    if not shares:
        return ""
    share = sum(a * w for a, w in shares) / sum(w for _, w in shares)
    text = f"{100 * share:.1f} % of rows kept their update"
    degraded = [row["site"] for row in _rows(data) if row.get("degraded")]
    if degraded:
        text += f"; {len(degraded)} linears degraded to Wanda's mask ({degraded[0]})"
    damped = sorted({row["damping"] for row in _rows(data) if "damping" in row})
    if len(damped) > 1:
        text += f"; damping {damped[0]:.3g} to {damped[-1]:.3g}"
    return text


def repair_line(data: Mapping[str, Any]) -> str:
    """Return what a repair says of the blocks: the mean of each of its numbers."""
    found: dict[str, list[float]] = {}
    for block in data["blocks"]:
        for name, fact in block.get("repair", {}).items():
            if not isinstance(fact, str):
                found.setdefault(name, []).append(float(fact))
    means = ", ".join(f"{name} {sum(each) / len(each):.4g}" for name, each in found.items())
    return means and f"{data['repair']}: {means} (means over blocks)"


def verdict_line(data: Mapping[str, Any]) -> str:
    """Return what an allocation and equal shares did, where they were compared."""
    verdict = data.get("verdict")
    if not verdict:
        return ""
    scores = ", ".join(f"{value:.4f} {name}" for name, value in verdict["kl"].items())
    used = verdict["allocation"] if verdict["adopted"] else "uniform"
    return f"KL to the dense model {scores}, on {verdict['sequences']} sequences; {used} is used"


def target_line(data: Mapping[str, Any]) -> str:
    """Return how a target was met."""
    target = data.get("target")
    if not target:
        return ""
    reached = f", reached {target['reached']:.3f}" if "reached" in target else ""
    return (
        f"ppl {target['asked']['ppl']}: at most {target['limit']:.3f}; sparsity "
        f"{target['sparsity']:.4f} expected to give {target['expected']:.3f}{reached}"
    )


def fallback_line(data: Mapping[str, Any]) -> str:
    """Return which linears were cut by a simpler rule, and why."""
    whys: dict[str, list[int]] = {}
    for block in data["blocks"]:
        for row in block["sites"]:
            if row.get("fallback"):
                whys.setdefault(str(row["fallback"]).split(" (")[0], []).append(block["block"])
    return ", ".join(
        f"{len(blocks)} linears by {why} (blocks {ranges(sorted(set(blocks)))})"
        for why, blocks in whys.items()
    )


def _rows(data: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for block in data["blocks"]:
        yield from block["sites"]
