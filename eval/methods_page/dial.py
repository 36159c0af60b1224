"""What stands for other keys: the effort, and the target that a sparsity is looked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from eval.methods_page.text import filled, plain, table
from llmprune.engine.target import ROUNDS, SPLITS
from llmprune.recipe.effort import stages
from llmprune.recipe.pruning import MOST, PruneStep
from llmprune.recipe.targets import TARGETS

AMOUNTS: dict[str, tuple[str, float | None]] = {
    "50 %": ("unstructured", 0.5),
    "60 %": ("unstructured", 0.6),
    "70 %": ("unstructured", 0.7),
    "2:4": ("2:4", None),
    "4:8": ("4:8", None),
    "`--target`": ("unstructured", None),
}


def dial() -> str:
    """Return which parts an effort stands for."""
    rows = [
        (f"`{effort}`", *(parts(stages(effort, *what)) for what in AMOUNTS.values()))
        for effort in efforts()
    ]
    text = (
        "`--effort` (`prune.effort`) stands for the keys that follow from it, from the pattern and "
        "from the sparsity. A key that flags or recipe give stays as given. Without an effort the "
        "method's own parts are used. The last column is for runs that look for the sparsity and "
        "name no highest one."
    )
    return f"## The dial\n\n{filled(text)}\n\n{table(('effort', *AMOUNTS), rows)}"


def target() -> str:
    """Return how a sparsity is found."""
    text = (
        "`--target ppl=+5%` (`prune.target`) looks for the highest sparsity at which perplexity "
        "rises by no more than that share, `ppl=12.5` for the highest that keeps it at the value. "
        f"{ROUNDS} rounds of {SPLITS} sparsities each, between 0 and `prune.sparsity`, or {MOST:g} "
        "where that is not given, are tried on the text of the evaluation, all of a round in one "
        "walk where memory allows; each round looks more closely between the last that met the "
        "target and the first that did not. What is tried loses equal shares, with the method's "
        "score and solver, from statistics of the dense model. Allocation and repair come on top "
        "in the cut, so the result may be better; errors that grow from block to block may make it "
        "worse. The report says what was asked, expected and reached."
    )
    sizes = (
        "Whole units have targets of size as well, from which the number of weights to remove "
        "follows before anything is cut: "
        + "; ".join(f"`{key}`, {what}" for key, what in TARGETS.items() if key != "ppl")
        + "."
    )
    return f"## The target\n\n{filled(text)}\n\n{filled(sizes)}\n"


def efforts() -> tuple[str, ...]:
    """Return the efforts that a recipe may name."""
    choices = PruneStep.model_fields["effort"].annotation
    return next(get_args(choice) for choice in get_args(choices) if get_args(choice))


def parts(keys: Mapping[str, Any]) -> str:
    """Return the keys of a prune step in a cell: the method, then what is set beside it."""
    rest = [f"`{key}: {plain(value)}`" for key, value in keys.items() if key != "method"]
    return ", ".join([f"`{keys['method']}`", *rest] if "method" in keys else rest)
