"""Whole units: what moves together, what judges them, what makes up for them, where they go."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from eval.methods_page.parts import BLOCKS, LINEARS, allocation
from eval.methods_page.text import cited, described, filled, item, names, table, tells, values
from llmprune.allocation import ALLOCATIONS
from llmprune.arch.anatomy import Anatomy, anatomy_of
from llmprune.arch.table import FAMILIES
from llmprune.arch.types import Heads
from llmprune.catalog import METHODS, Method
from llmprune.engine.amounts import survey_cost
from llmprune.engine.budgets import Budget
from llmprune.engine.parts import needs_of
from llmprune.engine.sites import Group, groups_of
from llmprune.engine.unit_amounts import EQUAL
from llmprune.mask.pattern import Units, parse_pattern
from llmprune.recipe.pruning import PruneStep
from llmprune.score import UNIT_SCORES, WHOLE_SCORES
from llmprune.solver import COMPENSATIONS
from llmprune.solver.low_rank import dropped_error, low_rank_dense, low_rank_factors, rank_for

DEMO_HEADS = Heads(num_heads=8, num_groups=4, head_dim=32)
LEGEND = (
    "D hidden size, L blocks, F channels of an FFN (or of one expert), H query heads, G key/value "
    "heads, g = H / G, d values of a head, V rows of the vocabulary, E experts of which a token "
    "visits k, t tokens in the cache"
)
# kind: what goes, its weights, operations per token, numbers in the cache per token
UNITS: dict[str, tuple[str, str, str, str]] = {
    "ffn-channels": (
        "a row of gate and up, a column of down (without a gate: of the two linears)",
        "3D (2D)",
        "6D (4D)",
        "0",
    ),
    "heads": (
        "a key/value head with its g query heads: rows of query, key, value, columns of output",
        "(2g + 2)dD",
        "(4g + 4)dD + 4gdt",
        "2d",
    ),
    "query-heads": (
        "a query head, as many in every group: rows of query, columns of output",
        "2dD",
        "4dD + 4dt",
        "0",
    ),
    "experts": ("all of an expert, its row of the router and its bias there", "3FD", "2D", "0"),
    "expert-channels": (
        "a channel of an expert, as many in every expert of a block",
        "3D",
        "6Dk/E",
        "0",
    ),
    "attention": (
        "the attention half with its norm",
        "(2H + 2G)dD",
        "(4H + 4G)dD + 4Hdt",
        "2Gd",
    ),
    "ffn": ("the other half with its norm", "3FD", "6FD", "0"),
    "sublayers": ("either half", "of the half", "of the half", "of the half"),
    "blocks": ("both halves", "the sum", "the sum", "2Gd"),
    "hidden": (
        "a channel of the residual stream: of every matrix its row or column, of the embeddings, "
        "the head and the norms its entry",
        "L((2H + 2G)d + 3F)",
        "twice that, and 2V",
        "0",
    ),
    "vocabulary": ("a token: its rows of embeddings and head", "none in blocks", "2D", "0"),
}
TIERS = (
    ("E0", "blocks are alike: equal widths, whole blocks, hidden size, vocabulary, experts"),
    ("E1", "widths differ; every block is filled up with zeros to the widest, which saves nothing"),
    (
        "E2",
        "FFN widths differ (multiples of 256), attention halves are gone from block 1 on; Llama, "
        "Mistral, Qwen2 whose heads are as wide as the model",
    ),
    ("E3", "anything else of a family that transformers knows"),
)
LOW_RANK = (low_rank_factors, rank_for, dropped_error, low_rank_dense)
LOADERS = {
    "E0": ("as it is", "after `llmprune export --to gguf`"),
    "E1": ("as it is", "after `llmprune export --to gguf`"),
    "E2": ("with `trust_remote_code=True`", "not run"),
    "E3": ("with `trust_remote_code=True`", "no"),
}


def units() -> str:
    """Return what moves together when a unit goes, and what that saves."""
    text = (
        "A unit has parts in several linears, which go together, biases with their rows: what is "
        "left computes what the whole model would with the unit's output at zero. Kinds join with "
        "a plus (`ffn-channels+heads`) where they do not lie across each other, and then share one "
        f"budget of weights. {LEGEND}. *Operations* are multiplications and additions per token "
        "in one block (of `hidden` and `vocabulary` in the model); *cache* is in numbers per token "
        "and block, of 2 bytes in bfloat16. The last column is the demo's, in weights of blocks."
    )
    head = ("pattern", "what goes", "weights", "operations", "cache", "demo")
    costs = demo_costs()
    rows = [(f"`{kind}`", *row, costs.get(kind, "")) for kind, row in UNITS.items()]
    notes = (
        "A model without an expert computes as much per token as before, and takes less memory.",
        "Heads keep their size d, and rotary angles with it; the config says `head_dim` where it "
        "did not.",
        "Halves and blocks that go take their norms along; blocks that stay are numbered anew.",
        "Sparsity counts weights of linears in blocks, by which a channel and a head compare. Of "
        "`vocabulary` it is the share of rows.",
    )
    return f"## Units\n\n{filled(text)}\n\n{table(head, rows)}\n" + "\n".join(
        [*map(item, notes), ""]
    )


def unit_scores() -> str:
    """Return how each score judges whole units."""
    text = (
        "A unit's score comes from a method's score of weights, pooled, or from one of these, "
        "which look at the unit at once. Units of one kind compete within their block, unless the "
        "allocation ranks them all."
    )
    lines = [
        item(f"`{name}`: {tells(row.fn)}{options(row)} {' '.join(cited(row.paper))}")
        for name, row in UNIT_SCORES.items()
    ]
    lines += [
        item(
            f"`{name}` of `{row.kind}`: {row.says}. Reads {names(row.needs)}. "
            + " ".join(cited(row.paper))
        )
        for name, row in WHOLE_SCORES.items()
    ]
    return f"## Unit scores\n\n{filled(text)}\n\n" + "\n".join([*lines, ""])


def options(row: Any) -> str:
    """Return the numbers of a score."""
    return f" Options: {values(row.options)}." if row.options else ""


def compensations() -> str:
    """Return what is done with the linear that read the units that went."""
    text = (
        "`prune.solver` names for whole units what happens to the linear that read them: `zero`, "
        "which leaves it alone, or one of these. As with solvers, a row that a fit does not bring "
        "nearer to what it gave is left alone. A bias needs a place in the model: where a family "
        "has none, a run that asks for one is refused, because loading would drop it."
    )
    lines = [
        described(name, row, f"Needs {names(row.needs)}.") for name, row in COMPENSATIONS.items()
    ]
    return f"## Compensations\n\n{filled(text)}\n\n" + "\n".join([*lines, ""])


def unit_allocations() -> str:
    """Return which allocations decide about whole units, and what they cost."""
    text = (
        "`uniform` takes equal shares of every kind from every block. The others decide which "
        "units go where; *walks* and *trials* are as [above](#allocations), for the demo at 0.25 "
        "and the pattern named, and trials are masked by the method's score without compensation. "
        "*Blocks* says whether all keep the same widths, so that tier E0 holds the result."
    )
    head = ("allocation", "of", "walks", "trials", "blocks", "options")
    rows = [row_of(name) for name, row in ALLOCATIONS.items() if row.units]
    lines = [
        item(f"`{name}`: {allocation(name)}") for name, row in ALLOCATIONS.items() if row.units
    ]
    return f"## Unit allocations\n\n{filled(text)}\n\n{table(head, rows)}\n" + "\n".join(
        [*lines, ""]
    )


def row_of(name: str) -> tuple[str, ...]:
    """Return the line of an allocation of units."""
    method = example(name)
    pattern = parse_pattern(method.pattern)
    step = PruneStep(method=method.name, sparsity=0.25, allocation=name)
    groups = demo_groups(method.pattern)
    sites = [site for group in groups for site in group.sites]
    needs = needs_of(method, name, pattern=pattern)
    row = ALLOCATIONS[name]
    awaited = row.profile is not None or "probe" in row.needs
    asked = sum(rows * columns for rows, columns in LINEARS.values()) * BLOCKS // 4
    budget = Budget(asked=asked, weights=asked)
    cost = survey_cost(step, name, pattern, sites, needs, torch.float32, awaited, budget)
    deep = isinstance(pattern, Units) and pattern.deep
    return (
        f"`{name}`",
        f"`{method.pattern}`",
        str(cost.num_reads + len(cost.rounds) if cost else 0),
        str(sum(cost.rounds) if cost else 0),
        "alike"
        if name in EQUAL or method.pattern == "blocks"
        else "lose halves"
        if deep
        else "differ",
        values(row.options),
    )


def example(name: str) -> Method:
    """Return a method that an allocation comes with, or one for channels and heads."""
    return next(
        (row for row in METHODS.values() if row.allocation == name),
        replace(METHODS["flap"], allocation=name),
    )


def tiers() -> str:
    """Return how shrunk results are stored, and what has loaded them."""
    text = (
        "`prune.tier` says how far a shrunk result travels. `auto` takes E0 where blocks are "
        "alike, else E2 where it fits, else E3; the plan names the tier and why lower ones "
        "do not fit. E1 is taken on demand. Code for E2 and E3 lies in the result, imports torch "
        "and transformers alone, and refuses to load without `trust_remote_code`."
    )
    head = ("tier", "holds", "transformers", "llama.cpp", "vLLM")
    rows = [(name, holds, *LOADERS[name], "not run") for name, holds in TIERS]
    run = (
        "Transformers: every result is loaded by the gate, in a process of its own. llama.cpp: "
        "GGUF files of Llama, Mistral, Qwen2 and Qwen3 were run. vLLM was not run on any tier: E0 "
        "and E1 are stock architectures, and E2 was written by what its class for DeciLM reads."
    )
    return f"## Tiers\n\n{filled(text)}\n\n{table(head, rows)}\n{filled(run)}\n"


def low_rank() -> str:
    """Return what a form of low rank is, what it costs and what becomes of it."""
    text = (
        "With `--pattern low-rank` a linear becomes two, one after the other, with few values "
        "between them: R (O + I) weights in place of O I, fewer where R is below O I / (O + I). "
        "Sparsity is the share of weights that this saves; the plan names every rank, and a little "
        "more goes than is asked for, since a rank is a whole number. Linears that lose no rank "
        "stay as they are: those of `prune.skip`, and those that `prune.sparsities` gives a share "
        "of 0. So do parts of fused parameters and experts in stacks, which are no module of "
        "their own. There are no masks, and the report says which share of its output's energy "
        "each linear loses, on the weights that are stored. `prune.damping` times the mean of the "
        "Gram matrix' diagonal is added to it, which matters where inputs were few."
    )
    more = (
        "No stock class has such linears, so the result is of tier E3 and brings its class: it "
        "loads with `trust_remote_code=True`. Its factors are linears like others, `q_proj.left` "
        "and `q_proj.right`: `llmprune recover` trains them, and a second run prunes their "
        "weights. With `prune.tier: E0`, the only one for a model in memory, the product is "
        "written into the old tensor: stock, as large and as slow as before. Made of: "
    )
    lines = [item(f"`{part.__name__}`: {tells(part)}") for part in LOW_RANK]
    return f"## Low rank\n\n{filled(text)}\n\n{filled(more)}\n\n" + "\n".join([*lines, ""])


def demo_costs() -> dict[str, str]:
    """Return the weights of a unit of each kind that the demo has, from the table of couplings."""
    found = {"blocks": "block"} | {
        kind: kind for kind in UNITS if kind not in ("sublayers", "blocks", "hidden", "vocabulary")
    }
    anatomy = demo_anatomy()
    costs: dict[str, str] = {}
    for kind, name in found.items():
        if anatomy.coupling(name) is not None:
            (group,) = groups_of(parse_pattern(kind), anatomy, block=0, prefix="", skip=())
            costs[kind] = f"{group.sites[0].unit_cost:,}"
    return costs


def demo_groups(pattern: str) -> tuple[Group, ...]:
    """Return the groups of all blocks of a model like the demo."""

    def each() -> Iterator[Group]:
        for index in range(BLOCKS):
            prefix = f"model.layers.{index}."
            yield from groups_of(
                parse_pattern(pattern), demo_anatomy(), block=index, prefix=prefix, skip=()
            )

    return tuple(each())


def demo_anatomy() -> Anatomy:
    """Return the linears and couplings of a block of the demo."""
    family = next(row for row in FAMILIES if "llama" in row.model_types)
    shapes = {f"{name}.weight": shape for name, shape in LINEARS.items()}
    return anatomy_of(replace(family, heads=DEMO_HEADS), shapes)
