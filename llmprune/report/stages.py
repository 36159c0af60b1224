"""What each stage of a run gained: refined masks, updated weights, repaired blocks, allocation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from llmprune.base.text import ranges
from llmprune.engine.reckoning import target_text


def stages_line(data: Mapping[str, Any]) -> str:
    """Return the relative error of a linear's output after each stage, mean over all linears."""
    sums: dict[str, list[float]] = {}
    for row in _rows(data):
        stages = dict(row.get("stages", {}))
        if "zeroed" in stages:  # before a refinement, whose error is that of the mask it leaves
            stages = {"masked": stages.pop("zeroed")} | {
                stage: error for stage, error in stages.items() if stage != "masked"
            }
        for stage, error in stages.items():
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
        some = _some(len(degraded), "linear")
        text += f"; {some} degraded to Wanda's mask without an update ({degraded[0]})"
    damped = sorted({row["damping"] for row in _rows(data) if "damping" in row})
    if len(damped) > 1:
        text += f"; damping {damped[0]:.3g} to {damped[-1]:.3g}"
    return text


def ranks_line(data: Mapping[str, Any]) -> str:
    """Return what linears of low rank lose of their outputs, and what that saves."""
    rows = [row for row in _rows(data) if "lost_energy" in row]
    if not rows:
        return ""
    worst = max(rows, key=lambda row: float(row["lost_energy"]))
    mean = sum(float(row["lost_energy"]) for row in rows) / len(rows)
    how = "two linears in place of one"
    if data["form"] != "shrunk":
        how = "products in tensors of the same shape, which saves nothing"
    return (
        f"{len(rows)} linears, {how}; {100 * mean:.3g} % of an output's energy lost on average, "
        f"{100 * float(worst['lost_energy']):.3g} % at most ({worst['site']})"
    )


def repair_line(data: Mapping[str, Any]) -> str:
    """Return what a repair says of the blocks: the mean of each of its numbers."""
    found: dict[str, list[float]] = {}
    for block in data["blocks"]:
        for name, fact in block.get("repair", {}).items():
            if not isinstance(fact, str):
                found.setdefault(name, []).append(float(fact))
    means = {name: sum(each) / len(each) for name, each in found.items()}
    parts = []
    told = [name.removesuffix("error_before") for name in means if name.endswith("error_before")]
    for what in told:
        if f"{what}error_after" in means:
            before, kept = means[f"{what}error_before"], means.get(f"{what}accepted", 1.0)
            parts.append(
                (f"{what.rstrip('.')} " if len(told) > 1 else "")
                + f"{before:.4f} to {means[f'{what}error_after']:.4f}"
                + (f", kept in {100 * kept:.0f} % of the blocks" if kept < 1 else "")
            )
    text = "; ".join(parts) or ", ".join(f"{name} {mean:.4g}" for name, mean in means.items())
    return text and f"{data['repair']}: held-out error {text} (means over blocks)"


def verdict_line(data: Mapping[str, Any]) -> str:
    """Return what an allocation and equal shares did, where they were compared, or what it says of
    itself."""
    verdict = data.get("verdict")
    if not verdict:
        return ", ".join(f"{name} {value:.4g}" for name, value in data.get("facts", {}).items())
    scores = ", ".join(f"{value:.4g} {name}" for name, value in verdict["kl"].items())
    used = verdict["allocation"] if verdict["adopted"] else "uniform"
    apart = f"{_some(verdict['sequences'], 'sequence')} set apart"
    return f"KL to the dense model {scores}, on {apart}; {used} is used"


def target_line(data: Mapping[str, Any]) -> str:
    """Return how a target was met."""
    if found := data.get("reached"):
        return target_text(found)
    target = data.get("target")
    if not target:
        return ""
    reached = f", reached {target['reached']:.3f}" if "reached" in target else ""
    reached += "" if target.get("met", True) else ", which misses it"
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
        f"{_some(len(blocks), 'linear')} by {why} (blocks {ranges(sorted(set(blocks)))})"
        for why, blocks in whys.items()
    )


def _some(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _rows(data: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for block in data["blocks"]:
        yield from block["sites"]
