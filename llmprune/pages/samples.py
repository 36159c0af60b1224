"""What of a page the models wrote: the same prompts continued by the dense and the pruned one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from llmprune.pages.document import Section, paragraph, side_by_side, together

_SAMPLE = Markup('<pre class="wrap" tabindex="0" role="region" aria-label="{}">{}<b>{}</b></pre>')


def samples_part(data: Mapping[str, Any]) -> Section:
    """Return what both models wrote, or why there is nothing of it."""
    found = data.get("samples") or {}
    if not found.get("texts"):
        why = str(found.get("why") or "none was asked for.")
        return Section("Samples", paragraph(f"There are none: {why}"))
    parts = []
    for sample in found["texts"]:
        parts.append(Markup("<h3>{}</h3>").format(sample["prompt"]))
        written = (
            Markup("<div>{}{}</div>").format(
                paragraph(side, kind="note"),
                _SAMPLE.format(f"Text of {side}", sample["prompt"], sample[side]),
            )
            for side in found["models"]
        )
        parts.append(side_by_side(*written))
    if found.get("why"):
        parts.append(paragraph(str(found["why"]), kind="note"))
    lead = (
        f"Each model went on from the same prompts with at most {found['new_tokens']} tokens, the "
        "likeliest one each time. A few texts say little of quality; they show what breaks."
    )
    return Section("Samples", together(parts), lead)
