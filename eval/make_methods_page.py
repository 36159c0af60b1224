"""Print docs/METHODS.md: the published methods, from the tables that the package itself works with.

`make docs` writes the page; a test compares the two.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Iterable
from typing import Any

from llmprune.allocation import ALLOCATIONS
from llmprune.catalog import METHODS, Method
from llmprune.mask.pattern import Channels, NofM, Tiles, Unstructured
from llmprune.score import SCORES
from llmprune.solver import SOLVERS
from llmprune.stats import STATISTICS

HEAD = """\
# Methods

Made by `make docs` from the tables in `llmprune/`. Do not edit this page: edit
`llmprune/catalog/` and the docstrings of the parts, then run `make docs`.

A method is a row of names: a *score* says how much each weight matters (higher = keep), an
*allocation* how much to remove where, a *solver* what happens to the weights that stay. Shapes: O
outputs, I inputs of a linear.
"""
QUESTIONS = {
    "When is pruned?": (
        "*Before training* a mask is guessed on random weights; *during training* weights go "
        "gradually, on a schedule, while the others adapt; *after training*, in one shot or in a "
        "few rounds, a finished model is cut with little text and no labels. Here: after "
        "training, in one shot. A result can be pruned again, and what was removed stays removed."
    ),
    "How is it removed?": (
        "A *masked* result has zeros in tensors of the same shape; a *shrunk* one has smaller "
        "tensors. Beside that, the weights that stay may be left alone, or *solved* for anew so "
        "that each linear computes nearly what it did, or a whole block may be *repaired*. Here: "
        "masked and shrunk; solvers are {solvers}."
    ),
    "At what granularity?": (
        "The *unit* is what stays or goes as one: a weight; a weight under a rule that hardware "
        "knows, such as N:M; a tile; a channel, an attention head, an expert; a sublayer or a "
        "whole block. Coarse units are what ordinary kernels can skip, and cost more quality at "
        "the same sparsity. Here: the [patterns](#patterns) {patterns}."
    ),
    "By which evidence?": (
        "The *score* of a unit may look at its magnitude; at the activations that it meets; at "
        "the gradient of the loss, hence at what removal costs to first order; at curvature, "
        "which adds how far other weights can make the error good; at how little a unit changes "
        "what passes through it; or the mask itself is learnt. Scores are compared within a "
        "*group*: a row, a matrix, the whole model. Here: {scores}, where `random` is the floor "
        "under all evidence."
    ),
    "How much where?": (
        "An *allocation* spreads the asked sparsity over the linears: alike; by one ranking of "
        "all units; by a *profile* of each linear or block, such as its outliers or its spectrum; "
        "by search; or by hand. Here: the [allocations](#allocations) {allocations}."
    ),
    "With what recovery?": (
        "Training after the cut, with the masks kept: of all weights, of adapters, of norms and "
        "biases alone, or from the dense model's answers. Here: none. The result is an ordinary "
        "folder that any trainer takes, but one that knows no masks lets removed weights return."
    ),
}
GROUPS = {
    "row": "within each row (one output)",
    "matrix": "within the whole matrix",
    "mass": "so that every row loses the same share of its scores' sum",
}
RANKED = "with all weights of the model"
POOLS = {"l2": "root mean square", "mean": "mean"}
CHANNELS = {
    "l2": "the norm of the scores in the channel's column of the down projection",
    "mean": "the mean of the scores in the channel's column of the down projection",
}
PATTERNS = {
    "unstructured": Unstructured,
    "N:M": NofM,
    "HxW": Tiles,
    "ffn-channels": Channels,
}
COUNTING = (
    "Ask for one with `--pattern`. Counts are whole numbers and exact: sparsity is read as a "
    "decimal fraction of the units, and of equal scores the first is pruned, on every device."
)


def page() -> str:
    """Return the whole page: vocabulary, overview, patterns, allocations, methods, statistics."""
    sections = [
        HEAD,
        vocabulary(),
        overview(),
        patterns(),
        allocations(),
        *map(section, METHODS.values()),
        statistics(),
    ]
    return "\n".join(sections)


def vocabulary() -> str:
    """Return the questions that place a method, each with what there is here."""
    here = {
        "solvers": names(SOLVERS),
        "patterns": names(PATTERNS),
        "scores": names(SCORES),
        "allocations": names(ALLOCATIONS),
    }
    intro = filled(
        "Pruning methods differ in few respects. Six questions place any of them, and say here "
        "what llmprune has; the words in *italics* are those of this page and of the code."
    )
    lines = [item(f"**{ask}** {answer.format(**here)}") for ask, answer in QUESTIONS.items()]
    return "\n".join(["## Six questions", "", intro, "", *lines, ""])


def overview() -> str:
    """Return one line per method."""
    head = ("method", "needs", "weights compete", "allocation", "patterns", "year")
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for method in METHODS.values():
        cells = (
            f"[{method.title}](#{anchor(method.title)})",
            names(needs(method)),
            RANKED if is_ranked(method.allocation) else GROUPS[method.group],
            f"`{method.allocation}`",
            names(method.patterns),
            str(method.year),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "## Overview\n\n" + "\n".join(lines) + "\n"


def patterns() -> str:
    """Return what each pattern removes."""
    lines = [item(f"`{name}`: {says(kind)}") for name, kind in PATTERNS.items()]
    lines.append(
        item(
            "Units compete in the method's group, which `prune.group` changes: "
            + "; ".join(f"`{name}`, {text}" for name, text in GROUPS.items())
            + ". The groups of N:M are its own, M consecutive inputs. Tiles know `row` (of tiles) "
            "and `matrix`."
        )
    )
    return f"## Patterns\n\n{filled(COUNTING)}\n\n" + "\n".join([*lines, ""])


def allocations() -> str:
    """Return how each allocation spreads the sparsity."""
    lines = []
    for name, row in ALLOCATIONS.items():
        facts = [f"`{name}`: {says(row.fn)}"]
        if row.profile is not None:
            facts.append(f"What is compared: {says(row.profile.normalise or row.profile.fn)}")
            facts.append(
                f"Stays whatever its rank: {float(row.min_keep):g} of each linear."
                if row.min_keep
                else "Stays whatever its rank: one unit of each linear."
            )
        lines.append(item(" ".join(facts)))
    lines.append(
        item(
            "Those that rank the whole model read all weights once or twice before the first cut, "
            "a survey; `prune.min_keep` changes what stays in any case. They take scores of one "
            "scale only: of magnitudes and of chance, not those that grow with activations. N:M "
            "and FFN channels fix or tie the shares and take `uniform` alone."
        )
    )
    text = (
        "Ask for one with `--set prune.allocation=NAME`; the default is the method's own. `manual` "
        "follows from `prune.sparsities`, which maps globs on linears to shares."
    )
    return "## Allocations\n\n" + filled(text) + "\n\n" + "\n".join([*lines, ""])


def section(method: Method) -> str:
    """Return what one method does, with what, and where it comes from."""
    score, solver = SCORES[method.score], SOLVERS[method.solver]
    ranked = is_ranked(method.allocation)
    compete = f"{RANKED}, then {GROUPS[method.group]}" if ranked else GROUPS[method.group]
    facts = [
        f"Ask for it: `--method {method.name}`.",
        f"Needs: {names(needs(method))}.",
        f"Score `{method.score}`: {says(score.fn)}",
        f"Weights compete {compete}.",
        f"Patterns: {names(method.patterns)}.",
    ]
    if "HxW" in method.patterns:
        facts.append(f"Score of a tile: the {POOLS[method.pool]} of its weights' scores.")
    if "ffn-channels" in method.patterns:
        facts.append(f"Score of an FFN channel: {CHANNELS[method.pool]}.")
    facts += [
        f"Allocation `{method.allocation}`, see [allocations](#allocations).",
        f"Solver `{method.solver}`: {says(solver.fn)}",
        f"Paper: {linked(method.paper)}.",
    ]
    return f"## {method.title}\n\n{filled(method.summary)}\n\n" + "\n".join(map(item, facts)) + "\n"


def statistics() -> str:
    """Return what calibration learns for these methods."""
    lines = [
        item(f"`{name}`, shape {row.shape}, by {row.observe}: {says(row.accumulator)}")
        for name, row in STATISTICS.items()
    ]
    return "## Statistics\n\nWhat the methods need of the calibration text.\n\n" + "\n".join(
        [*lines, ""]
    )


def needs(method: Method) -> list[str]:
    """Return the statistics that score, solver and the allocation's profile learn from text."""
    profile = ALLOCATIONS[method.allocation].profile
    wanted = SCORES[method.score].learnt + SOLVERS[method.solver].needs
    return list(dict.fromkeys(wanted + (profile.needs if profile else ())))


def is_ranked(allocation: str) -> bool:
    """Tell whether an allocation ranks all units of the model together."""
    profile = ALLOCATIONS[allocation].profile
    return profile is not None and profile.ranked


def names(words: Iterable[str]) -> str:
    """Return names as code, or that there are none."""
    return ", ".join(f"`{word}`" for word in words) or "nothing"


def says(part: Callable[..., Any]) -> str:
    """Return the first paragraph of a docstring on one line, without its `Return`."""
    text = inspect.getdoc(part) or ""
    return " ".join(text.split("\n\n")[0].split()).removeprefix("Return ")


def anchor(title: str) -> str:
    """Return the link target that a heading gets."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


def linked(paper: str) -> str:
    """Return a citation whose arXiv or OpenReview number is a link."""
    paper = re.sub(r"arXiv:([\d.]+\d)", r"[arXiv:\1](https://arxiv.org/abs/\1)", paper)
    forum = r"[openreview:\1](https://openreview.net/forum?id=\1)"
    return re.sub(r"openreview:(\w+)", forum, paper)


def item(text: str) -> str:
    """Return a list item of short lines."""
    return filled(f"- {text}", indent="  ")


def filled(text: str, indent: str = "") -> str:
    """Return text in lines of 100 characters, never broken inside a word."""
    return textwrap.fill(
        text, 100, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


if __name__ == "__main__":
    print(page(), end="")
