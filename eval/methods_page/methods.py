"""Every method in a section of its own, and all of them in tables."""

from __future__ import annotations

from eval.methods_page.parts import GROUPS
from eval.methods_page.text import anchor, filled, item, linked, names, table, tells, values
from llmprune.allocation import ALLOCATIONS
from llmprune.catalog import METHODS, Method
from llmprune.catalog.types import UNITS
from llmprune.engine.amounts import is_ranked
from llmprune.engine.parts import needs_of
from llmprune.engine.unit_amounts import EQUAL
from llmprune.mask.pattern import LowRank, Units, parse_pattern
from llmprune.repair import REPAIRS
from llmprune.score import RANK_SCORES, SCORES, WHOLE_SCORES, score_row

RANKED = "with all weights of the model"
POOLS = {"l2": "root mean square", "mean": "mean"}
COLUMNS = {
    "l2": "the norm of the scores in each of its columns, added up, in the linear that reads it",
    "mean": "the mean of the scores in each of its columns, added up, in the linear that reads it",
}


def of_units(method: Method) -> bool:
    """Tell whether a method is made for whole units."""
    return isinstance(parse_pattern(method.pattern), Units)


def factored(method: Method) -> bool:
    """Tell whether a method puts two linears in place of one."""
    return isinstance(parse_pattern(method.pattern), LowRank)


def deep(method: Method) -> bool:
    """Tell whether a method removes halves or blocks, which only its allocation judges."""
    pattern = parse_pattern(method.pattern)
    return isinstance(pattern, Units) and pattern.deep


def overview() -> str:
    """Return one line per method of single weights."""
    head = ("method", "needs", "weights compete", "allocation", "weights", "patterns", "year")
    rows = [
        (
            f"[{method.title}](#{anchor(method.title)})",
            names(needs(method)),
            RANKED if is_ranked(method.allocation) else GROUPS[method.group],
            f"`{method.allocation}`",
            names(filter(None, (method.refine, method.solver, method.repair))),
            names(method.patterns),
            str(method.year),
        )
        for method in METHODS.values()
        if not of_units(method) and not factored(method)
    ]
    text = "*Weights* names the refinement, the solver and the repair, in the order of their work."
    return f"## Overview\n\n{text}\n\n{table(head, rows)}"


def unit_overview() -> str:
    """Return one line per method of whole units."""
    head = ("method", "removes", "needs", "score", "allocation", "what stays", "blocks", "year")
    rows = [
        (
            f"[{method.title}](#{anchor(method.title)})",
            f"`{method.pattern}`",
            learnt(method),
            "" if blind(method) else f"`{method.score}`",
            f"`{method.allocation}`",
            "" if deep(method) or method.solver == "zero" else f"`{method.solver}`",
            blocks(method),
            str(method.year),
        )
        for method in METHODS.values()
        if of_units(method)
    ]
    text = (
        "*Removes* is the pattern where none is given, *what stays* the "
        "[compensation](#compensations). Blocks that are *alike* load as a stock model, others in "
        "a [tier](#tiers) for blocks that differ. A few methods of single weights know whole units "
        "too, which their patterns name."
    )
    return f"## Overview of methods for whole units\n\n{filled(text)}\n\n{table(head, rows)}"


def blind(method: Method) -> bool:
    """Tell whether a method asks no score: trials of halves or blocks decide alone."""
    return deep(method) and ALLOCATIONS[method.allocation].profile is None


def blocks(method: Method) -> str:
    """Return whether the blocks of a method's result are alike."""
    alike = method.allocation in EQUAL or method.pattern == "blocks"
    return "alike" if alike else "lose halves" if deep(method) else "differ"


def section(method: Method) -> str:
    """Return what one method does, with what, and where it comes from."""
    facts = [f"Ask for it: `--method {method.name}`."]
    if factored(method):
        facts += rank_facts(method)
    else:
        facts += unit_facts(method) if of_units(method) else weight_facts(method)
    if options := options_of(method):
        facts.append(f"Options, with their defaults: {values(options)}.")
    facts.append(f"Paper: {linked(method.paper)}.")
    return f"## {method.title}\n\n{filled(method.summary)}\n\n" + "\n".join(map(item, facts)) + "\n"


def weight_facts(method: Method) -> list[str]:
    """Return what there is to know of a method of single weights."""
    score = SCORES[method.score]
    ranked = is_ranked(method.allocation)
    compete = f"{RANKED}, then {GROUPS[method.group]}" if ranked else GROUPS[method.group]
    facts = [
        f"Needs: {names(needs(method))}.",
        f"Score `{method.score}`: {tells(score.fn)}",
        f"Weights compete {compete}.",
        f"Patterns: {names(method.patterns)}.",
    ]
    if score.adaptive:
        facts.append("The score adapts: it is asked again while the solver updates weights.")
    if "HxW" in method.patterns:
        facts.append(f"Score of a tile: the {POOLS[method.pool]} of its weights' scores.")
    if set(UNITS) & set(method.patterns):
        facts.append(f"Score of a unit: {COLUMNS[method.pool]}.")
    facts.append(f"Allocation `{method.allocation}`, see [allocations](#allocations).")
    if method.refine:
        facts.append(f"Refinement `{method.refine}`, see [refinements](#refinements).")
    facts.append(f"Solver `{method.solver}`, see [solvers](#solvers).")
    if method.repair:
        facts.append(f"Repair `{method.repair}`, see [repairs](#repairs).")
    return facts


def rank_facts(method: Method) -> list[str]:
    """Return what there is to know of a method of low rank."""
    return [
        f"Pattern `{method.pattern}`, see [low rank](#low-rank).",
        f"Needs: {names(needs(method))}.",
        f"Score `{method.score}`: a linear keeps {RANK_SCORES[method.score].says}.",
        "Allocation `uniform`, or shares by name with `prune.sparsities`.",
        "Tier E3, or `prune.tier: E0` for products, which save nothing.",
    ]


def unit_facts(method: Method) -> list[str]:
    """Return what there is to know of a method of whole units."""
    others = [pattern for pattern in method.patterns if pattern != method.pattern]
    facts = [
        f"Pattern `{method.pattern}`" + (f"; others: {names(others)}." if others else "."),
        f"Needs: {learnt(method)}.",
        judged_by(method),
    ]
    if method.score in WHOLE_SCORES:
        facts.append("One choice for all blocks: allocation, solver and tier follow from it.")
        return facts
    facts.append(f"Allocation `{method.allocation}`, see [unit allocations](#unit-allocations).")
    if not deep(method):
        facts.append(f"Solver `{method.solver}`, see [compensations](#compensations).")
    if method.propagate == "dense":
        facts.append("Statistics are of the dense model throughout (`propagate: dense`).")
    facts.append(f"Blocks of the result: {blocks(method)}, see [tiers](#tiers).")
    return facts


def learnt(method: Method) -> str:
    """Return what a method of whole units learns from text: statistics, or what trials cost."""
    return "trials" if deep(method) and not needs(method) else names(needs(method))


def judged_by(method: Method) -> str:
    """Return what says how much a unit matters."""
    if blind(method):
        return "No score: trials decide which halves or blocks go."
    if method.score not in SCORES:
        return f"Score `{method.score}`, see [unit scores](#unit-scores)."
    how = COLUMNS[method.pool]
    if method.reduce != "reader":
        how = f"the {method.reduce} over all linears that it has a part of (`prune.reduce`)"
    return f"Score `{method.score}` of weights; of a unit: {how}."


def options_of(method: Method) -> dict[str, float]:
    """Return the numbers that a run with a method's own parts takes."""
    repair = REPAIRS[method.repair].options if method.repair else {}
    whole = WHOLE_SCORES.get(method.score)
    score = whole.options if whole is not None else score_row(method.score).options
    return {**score, **ALLOCATIONS[method.allocation].options, **repair}


def needs(method: Method) -> tuple[str, ...]:
    """Return the statistics that the parts of a method learn from text."""
    pattern = parse_pattern(method.pattern)
    return needs_of(method, method.allocation, pattern=pattern).names
