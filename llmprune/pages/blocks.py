"""What of a page goes by block: where weights went, how that compares with equal shares, errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmprune.pages.charts import heat_map, lines
from llmprune.pages.document import Section, folded, paragraph, side_by_side, together
from llmprune.pages.tables import table
from llmprune.report.coverage import coverage_rows
from llmprune.report.kinds import by_kind, site_rows
from llmprune.report.recoveries import last_wish
from llmprune.report.stages import accepted_line, repair_line, stages_line, verdict_line

NEAR = 5e-4  # shares that differ by less are equal but for rounding to whole weights


def sparsity_part(data: Mapping[str, Any]) -> Section | None:
    """Return the removed share of every block and kind of linear as a map and as tables."""
    kinds = by_kind(data)
    if not kinds:
        return None
    shares = shares_of(data)
    blocks = [f"{block['block']}" for block in data["blocks"]]
    names = [kind.name for kind in kinds]
    by_shape = [
        (k.name, k.where, f"{k.weights:,}", f"{k.removed:,}", f"{k.sparsity:.4f}") for k in kinds
    ]
    head = ("kind", "blocks", "weights", "removed", "sparsity")
    cells = [
        (block, *("" if share is None else f"{share:.4f}" for share in column))
        for block, column in zip(blocks, zip(*shares, strict=True), strict=True)
    ]
    experts = coverage_rows(data)
    parts = [
        heat_map(
            "Removed share by block and kind",
            *(names, blocks, shares),
            low=0.0,
            high=1.0,
            text=lambda share: f"{share:.2f}",
            column_label="block",
            note="Experts of a block are one kind; a dashed cell is a block without it",
        ),
        table(head, by_shape, caption="By kind"),
        folded("The numbers of the map", table(("block", *names), cells)),
    ]
    if experts[1]:
        parts.append(folded("Tokens that experts saw", table(*experts)))
    return Section("Where weights went", together(parts))


def allocation_part(data: Mapping[str, Any]) -> Section | None:
    """Return the removed share of every block beside the same share for all."""
    shares = [(block["block"], block["sparsity"]) for block in data["blocks"] if block["sites"]]
    if len(shares) < 2:
        return None
    whole = data["sparsity"]
    apart = max(abs(share - whole) for _, share in shares)
    name = str(data.get("allocation") or "this allocation")
    lead = (
        f"{name}: every block lost the same share."
        if apart < NEAR
        else f"{name}: blocks are up to {apart:.3f} from the share that uniform gives to all."
    )
    chart = lines(
        "Removed share by block",
        {name: shares, "the same for all": [(block, whole) for block, _ in shares]},
        x_label="block",
        y_label="removed share",
        zero=True,
    )
    told = verdict_line(data)
    verdict = paragraph(f"{told[0].upper()}{told[1:]}." if told else "")
    return Section("Allocation against uniform", together([chart, verdict]), lead)


def errors_part(data: Mapping[str, Any]) -> Section | None:
    """Return the relative error of every block's output, and of its linears by kind."""
    measured = [(b["block"], b["error"]) for b in data["blocks"] if b["error"] is not None]
    kinds = _errors_by_kind(data)
    told = [*map(str, (stages_line(data), accepted_line(data), repair_line(data)))]
    if not measured and not kinds:
        return None
    charts = []
    if measured:
        charts.append(
            lines(
                "Error of a block's output",
                {"error": measured},
                x_label="block",
                y_label="relative error",
                zero=True,
                note="Norm of the difference from the dense block's output over that output",
            )
        )
    if kinds:
        charts.append(
            lines(
                "Error of a linear's output, mean of its kind",
                kinds,
                x_label="block",
                y_label="relative error",
                zero=True,
            )
        )
    numbers = table(
        ("block", "removed", "error"),
        [(f"{b['block']}", f"{b['sparsity']:.4f}", _number(b["error"])) for b in data["blocks"]],
    )
    after = " of the cut; the model was trained since" if last_wish(data) else ""
    return Section(
        "Error by block",
        together(
            [side_by_side(*charts), *map(paragraph, filter(None, told)), folded("Numbers", numbers)]
        ),
        f"How far outputs are from the dense model's on calibration text, relative{after}.",
    )


def shares_of(data: Mapping[str, Any]) -> list[list[float | None]]:
    """Return the removed share by kind and block; None where a block has no such kind."""
    kinds = {kind.name: place for place, kind in enumerate(by_kind(data))}
    blocks = {block["block"]: place for place, block in enumerate(data["blocks"])}
    removed = [[0] * len(blocks) for _ in kinds]
    weights = [[0] * len(blocks) for _ in kinds]
    for block, kind, _, row in site_rows(data):
        removed[kinds[kind]][blocks[block]] += row["removed_weights"]
        weights[kinds[kind]][blocks[block]] += row["weights"]
    return [
        [gone / all_ if all_ else None for gone, all_ in zip(*pair, strict=True)]
        for pair in zip(removed, weights, strict=True)
    ]


def _errors_by_kind(data: Mapping[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """Return by kind of linear the mean error of its outputs in every block."""
    found: dict[str, dict[int, list[float]]] = {}
    for block, kind, _, row in site_rows(data):
        if row["error"] is not None:
            found.setdefault(kind, {}).setdefault(block, []).append(row["error"])
    return {
        kind: [(float(block), sum(each) / len(each)) for block, each in blocks.items()]
        for kind, blocks in found.items()
    }


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
