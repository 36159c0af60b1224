"""The page from its first line to its last."""

from __future__ import annotations

from eval.methods_page.dial import dial, target
from eval.methods_page.methods import overview, section, unit_overview
from eval.methods_page.parts import allocations, patterns, refinements, repairs, solvers
from eval.methods_page.questions import vocabulary
from eval.methods_page.recoveries import (
    distillations,
    recoveries,
    regrowths,
    schedules,
    soft_masks,
)
from eval.methods_page.results import results
from eval.methods_page.text import item, names, says
from eval.methods_page.units import (
    compensations,
    low_rank,
    tiers,
    unit_allocations,
    unit_scores,
    units,
)
from llmprune.catalog import METHODS
from llmprune.stats import STATISTICS

HEAD = """\
# Methods

Made by `make docs` from the tables in `llmprune/`. Do not edit this page: edit
`llmprune/catalog/` and the docstrings of the parts, then run `make docs`.

A method is a row of names: a *score* says how much each weight matters (higher = keep), an
*allocation* how much to remove where, a *refinement* exchanges weights of the mask, a *solver*
decides what happens to the weights that stay, a *repair* improves the block as a whole. All but the
score can be asked for by themselves: `prune.allocation`, `prune.refine`, `prune.solver`,
`prune.repair`. Methods for [whole units](#units) have scores, solvers and allocations of their own
kind. Training of the whole model after a cut, or around it, is a [recovery](#recovery). Shapes: O
outputs, I inputs of a linear, U units.
"""


def page() -> str:
    """Return the whole page."""
    sections = [
        HEAD,
        vocabulary(),
        overview(),
        unit_overview(),
        results(),
        dial(),
        target(),
        patterns(),
        allocations(),
        refinements(),
        solvers(),
        repairs(),
        units(),
        unit_scores(),
        unit_allocations(),
        compensations(),
        tiers(),
        low_rank(),
        recoveries(),
        schedules(),
        regrowths(),
        soft_masks(),
        distillations(),
        *map(section, METHODS.values()),
        statistics(),
    ]
    return "\n".join(filter(None, sections))


def statistics() -> str:
    """Return what calibration learns for these methods."""
    places = {
        "tap": "activations of the block that is cut, or of the dense one in a survey",
        "backward": "gradients of the dense model's loss, sequence by sequence, block by block in "
        "reverse before the first cut",
        "residual": "what a block is given and what it gives back",
        "routing": "what a router does with the tokens, and what experts answer",
        "block_gradient": "gradients of the norm of the block's own output, sequence by sequence",
    }
    alike: dict[tuple[str, str, str], list[str]] = {}
    for name, row in STATISTICS.items():
        alike.setdefault((row.shape, row.observe, says(row.accumulator)), []).append(name)
    lines = [
        item(f"{names(each)}, shape {shape}, by {observe}: {text}")
        for (shape, observe, text), each in alike.items()
    ]
    where = [item(f"by {place}: {text}.") for place, text in places.items()]
    return "## Statistics\n\nWhat the methods need of the calibration text.\n\n" + "\n".join(
        [*lines, *where, ""]
    )
