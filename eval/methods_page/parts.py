"""What parts there are for single weights: patterns, allocations, refinements, solvers, repairs."""

from __future__ import annotations

from typing import Any

import torch

from eval.methods_page.text import cited, described, filled, item, names, says, table, tells, values
from llmprune.allocation import ALLOCATIONS
from llmprune.arch.types import Site, Span
from llmprune.catalog import METHODS
from llmprune.catalog.types import LOW_RANK, UNITS
from llmprune.engine.amounts import survey_cost
from llmprune.engine.parts import needs_of
from llmprune.mask.pattern import LowRank, NofM, Tiles, Units, Unstructured
from llmprune.recipe.pruning import PruneStep
from llmprune.repair import REPAIRS
from llmprune.solver import REFINEMENTS, SOLVERS

GROUPS = {
    "row": "within each row (one output)",
    "matrix": "within the whole matrix",
    "mass": "so that every row loses the same share of its scores' sum",
}
RANKED = "with all weights of the model"
PATTERNS = {
    "unstructured": Unstructured,
    "N:M": NofM,
    "HxW": Tiles,
}
LINEARS = {
    "self_attn.q_proj": (256, 256),
    "self_attn.k_proj": (128, 256),
    "self_attn.v_proj": (128, 256),
    "self_attn.o_proj": (256, 256),
    "mlp.gate_proj": (768, 256),
    "mlp.up_proj": (768, 256),
    "mlp.down_proj": (256, 768),
}
BLOCKS = 6  # with these linears: the demo
COUNTING = (
    "Ask for one with `--pattern`. Counts are whole numbers and exact: sparsity is read as a "
    "decimal fraction of the units, and of equal scores the first is pruned, on every device."
)


def patterns() -> str:
    """Return what each pattern removes."""
    lines = [item(f"`{name}`: {says(kind)}") for name, kind in PATTERNS.items()]
    kinds = names(UNITS)
    lines.append(item(f"{kinds}: {says(Units)} See [units](#units)."))
    lines.append(item(f"`{LOW_RANK}`: {says(LowRank)} See [low rank](#low-rank)."))
    lines.append(
        item(
            "Weights and tiles compete in the method's group, which `prune.group` changes: "
            + "; ".join(f"`{name}`, {text}" for name, text in GROUPS.items())
            + ". The groups of N:M are its own, M consecutive inputs. Tiles know `row` (of tiles) "
            "and `matrix`."
        )
    )
    return f"## Patterns\n\n{filled(COUNTING)}\n\n" + "\n".join([*lines, ""])


def allocations() -> str:
    """Return how each allocation spreads the sparsity."""
    text = (
        "Ask for one with `--set prune.allocation=NAME`; the default is the method's own. `manual` "
        "follows from `prune.sparsities`, which maps globs on linears to shares. N:M fixes the "
        "shares and takes `uniform` alone; whole units have [their own](#unit-allocations)."
    )
    reading = (
        "What is to be known before the first cut is learnt in a survey. *Walks* says how often "
        f"it reads the checkpoint for a model of {len(sites())} linears such as the demo, in "
        "float32 and by default; `prune.max_reads` refuses more. *Trials* are candidates whose "
        "next-token distributions are compared with the dense model's (KL), all of a round in one "
        "walk where memory allows, on an eighth of the calibration text set apart, 16 sequences at "
        "most. They are masked by the method's score from statistics of the dense model; weights "
        "are not updated, and scores that need a solver or a block's gradients are stood in for "
        "by Wanda's. An allocation that is *judged* is compared with equal shares in the same way, "
        "and used where it is nearer to the dense model; with `prune.adopt=always` in any case."
    )
    head = ("allocation", "profile of", "walks", "trials", "judged", "options")
    of_weights = {name: row for name, row in ALLOCATIONS.items() if not row.units}
    rows = []
    for name, row in of_weights.items():
        cost = survey(name)
        reads = needs_of(METHODS["magnitude"], name).survey
        rows.append(
            (
                f"`{name}`",
                names(reads) if reads else "weights" if row.profile else "",
                str(cost.num_reads + len(cost.rounds) if cost else 0),
                str(sum(cost.rounds) if cost else 0),
                "yes" if row.judged else "no",
                values(row.options),
            )
        )
    lines = [item(f"`{name}`: {allocation(name)}") for name in of_weights]
    ranking = (
        "Rankings of the whole model compare scores of one scale only: magnitudes and chance, not "
        "scores that grow with activations. `prune.min_keep` changes what stays in any case."
    )
    return (
        f"## Allocations\n\n{filled(text)}\n\n{filled(reading)}\n\n{table(head, rows)}\n"
        + "\n".join([*lines, item(ranking), ""])
    )


def allocation(name: str) -> str:
    """Return what an allocation does, what it compares, and where it comes from."""
    row = ALLOCATIONS[name]
    facts = [tells(row.fn)]
    if row.profile is not None:
        kind = "What is compared" if row.profile.ranked else f"Profile of a {row.profile.level}"
        what = f"{kind}: {says(row.profile.normalise or row.profile.fn)}"
        moves = "Profile of a block: how far it moves what passes through it, `residual`."
        facts.append(moves if row.profile.level == "residual" else what)
    if row.profile is not None and row.profile.ranked:
        stays = f"{float(row.min_keep):g}" if row.min_keep else "one unit"
        facts.append(f"Stays whatever its rank: {stays} of each linear.")
        if row.profile.among is not None:
            facts.append(f"Classes: {says(row.profile.among)}")
    return " ".join([*facts, *cited(row.paper)])


def survey(name: str) -> Any:
    """Return what an allocation costs before the first cut of such a model, if anything."""
    row = ALLOCATIONS[name]
    awaited = row.profile is not None or row.judged
    needs = needs_of(METHODS["magnitude"], name)
    step = PruneStep(sparsity=0.5)
    return survey_cost(step, name, Unstructured(), sites(), needs, torch.float32, awaited)


def sites() -> list[Site]:
    """Return the linears of a model like the demo."""
    return [
        Site(
            name=f"model.layers.{block}.{linear}",
            block=block,
            spans=(Span(linear=linear, axis="weight"),),
            num_units=shape[0] * shape[1],
            unit_cost=1,
            shape=shape,
        )
        for block in range(BLOCKS)
        for linear, shape in LINEARS.items()
    ]


def refinements() -> str:
    """Return how each refinement changes a mask."""
    text = (
        "Ask for one with `--set prune.refine=NAME`, and for none, where a method has one, with "
        "`none`. Kept and pruned weights of a row, of N:M within their M inputs, are exchanged, so "
        "that counts stay. A mask that a solver chooses while it updates is chosen first, then "
        "refined, then solved for."
    )
    lines = [described(name, row) for name, row in REFINEMENTS.items()]
    return f"## Refinements\n\n{filled(text)}\n\n" + "\n".join([*lines, ""])


def solvers() -> str:
    """Return what each solver does with the weights that stay."""
    text = (
        "Ask for one with `--set prune.solver=NAME`, whatever the method: a mask of Wanda's with "
        "SparseGPT's update is `--method wanda --set prune.solver=columnwise`. Updates lower the "
        "error of the linear's output by the Gram matrix of its inputs, with `prune.damping` on "
        "its diagonal. They are judged row by row as they will be stored: a row whose output moves "
        "further than by zeroing is zeroed only, and the report says which share was accepted. "
        "Where a linear saw fewer tokens than it has inputs, nothing is updated."
    )
    lines = []
    for name, row in SOLVERS.items():
        facts = [f"Needs {names(row.needs)}."] if row.needs else []
        lines.append(described(name, row, *facts))
    return f"## Solvers\n\n{filled(text)}\n\n" + "\n".join([*lines, ""])


def repairs() -> str:
    """Return how each repair improves a block."""
    text = (
        "Ask for one with `--set prune.repair=NAME`, and for none, where a method has one, with "
        "`none`. A block is repaired after its linears are cut and before it is stored, on what "
        "its stored predecessors give (`propagate: pruned`). One in eight micro-batches is held "
        "out, one at least; a repair that does not lower the error on these is taken back. Pruned "
        "weights are 0 at the end."
    )
    head = ("repair", "options", "walks the dense model alongside")
    rows = [
        (f"`{name}`", values(row.options), "yes" if row.dense else "no")
        for name, row in REPAIRS.items()
    ]
    lines = [described(name, row) for name, row in REPAIRS.items()]
    return f"## Repairs\n\n{filled(text)}\n\n{table(head, rows)}\n" + "\n".join([*lines, ""])
