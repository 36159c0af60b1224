"""What training there is to ask for, as tables of text: methods, schedules, masks, teachers."""

from __future__ import annotations

from llmprune.base.text import columns
from llmprune.recovery.distillation import DISTILLATIONS
from llmprune.recovery.methods import RECOVERIES
from llmprune.recovery.regrowth import REGROWTHS
from llmprune.recovery.schedules import SCHEDULES
from llmprune.recovery.soft import SOFT_MASKS
from llmprune.recovery.types import Recovery


def recovery_tables() -> str:
    """Return the tables of all keys of a recovery that take a name, with where each comes from."""
    tables = [columns(("recover.method", "trains", "zeros stay", "paper"), _methods())]
    tables.append(
        columns(
            ("recover.schedule", "sparsity rises", "paper"),
            [(name, row.summary, row.paper) for name, row in SCHEDULES.items()],
        )
    )
    others = {
        "recover.regrow": {name: row.paper for name, row in REGROWTHS.items()},
        "recover.soft": {name: row.paper for name, row in SOFT_MASKS.items()},
        "recover.distill": {name: row.paper for name, row in DISTILLATIONS.items()},
    }
    tables += [columns((key, "paper"), rows.items()) for key, rows in others.items()]
    return "\n\n".join(tables)


def zeros_stay(row: Recovery) -> str:
    """Return whether what was removed stays so when a training is done."""
    if row.fills:
        return "no: for smaller tensors"
    return "yes, cut at the merge" if row.adapter == "lora-prune" else "yes"


def _methods() -> list[tuple[str, ...]]:
    return [(name, row.summary, zeros_stay(row), row.paper) for name, row in RECOVERIES.items()]
