"""The report of a run: plain data that is written as report.json and read back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmprune import __version__
from llmprune.base.errors import CheckpointError
from llmprune.base.memory import anonymous_bytes
from llmprune.checkpoint.source import read_json
from llmprune.engine.reckoning import sizes_of_result, target_reached

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from llmprune.base.progress import Progress
    from llmprune.engine.plan import Plan
    from llmprune.engine.shipment import Shipment


@dataclass(frozen=True, repr=False)
class Report:
    """What a run did; `data` is report.json, `masks` the packed masks of a model in memory.

    `str(report)` is the table that the command prints.
    """

    data: Mapping[str, Any]
    masks: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: str | Path) -> Report:
        """Read the report of a result.

        Raises:
            CheckpointError: the folder was not written by llmprune, or its report is damaged.
        """
        path = Path(folder) / "llmprune" / "report.json"
        if not path.exists():
            raise CheckpointError(
                f"{folder} has no llmprune/report.json, so it is not a finished result of "
                "llmprune. Prune a model first: llmprune --model MODEL --sparsity 0.5 --out DIR."
            )
        from llmprune.report.recounting import with_moved_masks

        return cls(with_moved_masks(read_json(path), Path(folder)))

    @property
    def out(self) -> Path | None:
        """Return the folder of the result; none for a model in memory."""
        return Path(self.data["out"]) if self.data["out"] else None

    @property
    def sparsity(self) -> float:
        """Return the removed share of the eligible weights."""
        return float(self.data["sparsity"])

    @property
    def perplexity(self) -> tuple[float, float] | None:
        """Return (dense, pruned) perplexity, of the result as it is, where both were measured."""
        from llmprune.report.recoveries import sides

        found = {side.label: float(side.entry["value"]) for side in sides(self.data)}
        return (
            (found["dense"], list(found.values())[-1])
            if len(found) > 1 and "dense" in found
            else None
        )

    def table(self) -> str:
        """Return one line per site: weights, removed, sparsity, tokens."""
        from llmprune.base.text import columns

        rows = [
            (
                row["site"],
                f"{row['weights']:,}",
                f"{row['removed_weights']:,}",
                f"{row['sparsity']:.4f}",
                f"{row['tokens']:,}",
                "" if row["error"] is None else f"{row['error']:.4f}",
                row.get("fallback", ""),
            )
            for block in self.data["blocks"]
            for row in block["sites"]
        ]
        return columns(("site", "weights", "removed", "sparsity", "tokens", "error", ""), rows)

    def coverage(self) -> str:
        """Return one line per block with experts: the tokens they saw, and which saw too few."""
        from llmprune.report.coverage import coverage_text

        return coverage_text(self.data)

    def plot(self) -> Figure:
        """Return a figure: sparsity by block and kind of linear, output error by block, and the
        losses of each training.
        """
        from llmprune.report.plots import report_figure

        return report_figure(self.data)

    def __repr__(self) -> str:
        from llmprune.report.tables import report_text

        return report_text(self.data)

    def _repr_html_(self) -> str:
        from llmprune.report.page import report_html

        return report_html(self.data)


def layout_data(shipment: Shipment) -> dict[str, Any]:
    """Return what the blocks of a shrunk result are: the source's, their sizes, what they lack."""
    return {
        "blocks": [block.source for block in shipment.layout.blocks],
        "sizes": [dict(block.sizes) for block in shipment.layout.blocks],
        "without": [list(block.without) for block in shipment.layout.blocks],
    }


def report_data(
    plan: Plan,
    rows: list[dict[str, Any]],
    *,
    fixed: Mapping[str, Any],
    resumed_after: int | None = None,
    seconds: Mapping[str, float],
    progress: Progress,
) -> dict[str, Any]:
    """Return what report.json holds, without proof and perplexity."""
    removed = sum(row["removed_weights"] for block in rows for row in block["sites"])
    shrunk, shipment = plan.form == "shrunk", plan.shipment
    return {
        "llmprune": __version__,
        "out": plan.out,
        "model": plan.source_name,
        "method": plan.method.name,
        "pattern": plan.prune.pattern,
        "allocation": plan.allocation,
        "verdict": plan.verdict and dict(plan.verdict),
        "facts": dict(plan.facts),
        "target": plan.target and dict(plan.target),
        "solver": plan.method.solver,
        "refine": plan.method.refine,
        "repair": plan.method.repair,
        "permute": plan.prune.permute,
        "form": plan.form,
        "tier": shipment.tier if shipment else "E0",
        "tier_reasons": dict(shipment.reasons) if shipment else {},
        "layout": layout_data(shipment) if shipment and shrunk else None,
        "sizes": sizes_of_result(plan),
        "reached": target_reached(plan),
        "sparsity": removed / plan.eligible,
        "sparsity_asked": plan.prune.sparsity,
        "sparsity_of_all": removed / plan.num_params,
        "parameters_before": plan.num_params,
        "parameters_after": shipment.num_params if shipment and shrunk else plan.num_params,
        "run": dict(fixed),
        "resumed_after": resumed_after,
        "seconds": dict(seconds),
        "peak_memory": max([anonymous_bytes(), *(row["memory"] for row in rows)]),
        "blocks": rows,
        "skipped": [asdict(row) for row in plan.skipped],
        "warnings": list(progress.warnings),
    }
