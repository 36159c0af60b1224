"""Why a run has no perplexity, in a line, with what to type for one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

WARNED = "perplexity is not measured: "  # how a warning of a run begins


def unmeasured_text(data: Mapping[str, Any]) -> str:
    """Return why a report holds no perplexity.

    >>> steps = [{"prune": {}}, {"evaluate": {"perplexity": False}}]
    >>> unmeasured_text({"out": "small", "run": {"wish": {"steps": steps}}, "warnings": []})
    'not measured, as asked; llmprune eval small --perplexity demo does'
    """
    if data["out"] is None:
        return "not measured of a model in memory; llmprune.perplexity(MODEL, TOKENIZER) does"
    measure = f"llmprune eval {data['out']} --perplexity demo does"
    for warning in data.get("warnings", ()):
        if str(warning).startswith(WARNED):
            return f"not measured: {str(warning).removeprefix(WARNED)}"
    steps = data["run"].get("wish", {}).get("steps", ())
    wishes = [step["evaluate"] for step in steps if step.get("evaluate") is not None]
    if not wishes:
        return f"not measured: the recipe has no step `evaluate`; {measure}"
    if wishes[0].get("perplexity") is False:
        return f"not measured, as asked; {measure}"
    return (
        "not measured: it would have taken long beside the cut; "
        f"--set evaluate.perplexity=true insists, and {measure}"
    )
