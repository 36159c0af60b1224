"""Print docs/METHODS.md: the published methods, from the tables that the package itself works with.

`make docs` writes the page; a test compares the two. What was measured is read from
`eval/results/demo.json`, which `eval/results/README.md` describes.
"""

from __future__ import annotations

import inspect
import json
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

import torch

from llmprune.allocation import ALLOCATIONS
from llmprune.arch.types import Site, Span
from llmprune.catalog import METHODS, Method
from llmprune.engine.amounts import is_ranked, survey_cost
from llmprune.engine.parts import needs_of
from llmprune.engine.target import ROUNDS, SPLITS
from llmprune.mask.pattern import Channels, NofM, Tiles, Unstructured
from llmprune.recipe.effort import stages
from llmprune.recipe.models import MOST, PruneStep
from llmprune.repair import REPAIRS
from llmprune.score import SCORES
from llmprune.solver import REFINEMENTS, SOLVERS
from llmprune.stats import STATISTICS

RESULTS = Path(__file__).parent / "results" / "demo.json"
HEAD = """\
# Methods

Made by `make docs` from the tables in `llmprune/`. Do not edit this page: edit
`llmprune/catalog/` and the docstrings of the parts, then run `make docs`.

A method is a row of names: a *score* says how much each weight matters (higher = keep), an
*allocation* how much to remove where, a *refinement* exchanges weights of the mask, a *solver*
decides what happens to the weights that stay, a *repair* improves the block as a whole. All but the
score can be asked for by themselves: `prune.allocation`, `prune.refine`, `prune.solver`,
`prune.repair`. Shapes: O outputs, I inputs of a linear.
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
        "masked and shrunk; the [solvers](#solvers) are {solvers}, the [repairs](#repairs) "
        "{repairs}."
    ),
    "At what granularity?": (
        "The *unit* is what stays or goes as one: a weight; a weight under a rule that hardware "
        "knows, such as N:M; a tile; a channel, an attention head, an expert; a sublayer or a "
        "whole block. Coarse units are what ordinary kernels can skip, and cost more quality at "
        "the same sparsity. Here: the [patterns](#patterns) {patterns}. Whole channels leave "
        "nothing to refine, update or repair, and tiles nothing to refine."
    ),
    "By which evidence?": (
        "The *score* of a unit may look at its magnitude; at the activations that it meets; at "
        "the gradient of the loss, hence at what removal costs to first order; at curvature, "
        "which adds how far other weights can make the error good; at how little a unit changes "
        "what passes through it; or the mask itself is learnt. Scores are compared within a "
        "*group*: a row, a matrix, the whole model. A *refinement* then looks at weights together, "
        "where a score looks at each alone. Here: {scores}, where `random` is the floor under all "
        "evidence, and the [refinements](#refinements) {refinements}."
    ),
    "How much where?": (
        "An *allocation* spreads the asked sparsity over the linears: alike; by one ranking of "
        "all units; by a *profile* of each linear or block, such as its outliers or its spectrum; "
        "by *probes*, trials whose distance from the dense model is measured; or by hand. Here: "
        "the [allocations](#allocations) {allocations}. How much in all is asked for, or follows "
        "from what perplexity may rise to: `--target ppl=+5%`."
    ),
    "With what recovery?": (
        "Training of the whole model after the cut, with the masks kept: of all weights, of "
        "adapters, of norms and biases alone, or from the dense model's answers. Here: none. A "
        "[repair](#repairs) trains one block at a time on the calibration text, towards what the "
        "dense block gives, and knows neither labels nor the model's loss. The result is an "
        "ordinary folder that any trainer takes, but one that knows no masks lets removed weights "
        "return."
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
AMOUNTS: dict[str, tuple[str, float | None]] = {
    "50 %": ("unstructured", 0.5),
    "60 %": ("unstructured", 0.6),
    "70 %": ("unstructured", 0.7),
    "2:4": ("2:4", None),
    "4:8": ("4:8", None),
    "`--target`": ("unstructured", None),
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


def page() -> str:
    """Return the whole page."""
    sections = [
        HEAD,
        vocabulary(),
        overview(),
        results(),
        dial(),
        target(),
        patterns(),
        allocations(),
        refinements(),
        solvers(),
        repairs(),
        *map(section, METHODS.values()),
        statistics(),
    ]
    return "\n".join(filter(None, sections))


def vocabulary() -> str:
    """Return the questions that place a method, each with what there is here."""
    here = {
        "solvers": names(SOLVERS),
        "patterns": names(PATTERNS),
        "scores": names(SCORES),
        "allocations": names(ALLOCATIONS),
        "refinements": names(REFINEMENTS),
        "repairs": names(REPAIRS),
    }
    intro = filled(
        "Pruning methods differ in few respects. Six questions place any of them, and say here "
        "what llmprune has; the words in *italics* are those of this page and of the code."
    )
    lines = [item(f"**{ask}** {answer.format(**here)}") for ask, answer in QUESTIONS.items()]
    return "\n".join(["## Six questions", "", intro, "", *lines, ""])


def overview() -> str:
    """Return one line per method."""
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
    ]
    text = "*Weights* names the refinement, the solver and the repair, in the order of their work."
    return f"## Overview\n\n{text}\n\n{table(head, rows)}"


def results(path: Path = RESULTS) -> str:
    """Return what was measured of the demo, a line per method; nothing where there is no file.

    Raises:
        ValueError: a row of the file is not as eval/results/README.md says.
    """
    if not path.exists():
        return ""
    cells: dict[tuple[str, str], dict[str, str]] = {}
    amounts: list[str] = []
    for row in json.loads(path.read_text(encoding="utf-8")):
        method, amount, settings = measured(row)
        amounts += [amount] if amount not in amounts else []
        line = cells.setdefault((method, settings), {})
        if amount in line:
            raise ValueError(f"{row} is a second row of its method, settings and amount")
        seconds = f" ({row['seconds']:.0f} s)" if "seconds" in row else ""
        line[amount] = f"{row['perplexity']:.2f}{seconds}"
    rows = [
        (label(method), f"`{settings}`" if settings else "", *(line.get(a, "") for a in amounts))
        for (method, settings), line in cells.items()
    ]
    text = (
        "Perplexity of the demo on its evaluation text, lower is better; where they are known, "
        "the seconds of the run in brackets. Another model may order the methods otherwise. What "
        "was measured how: "
        "[eval/results/README.md](../eval/results/README.md)."
    )
    return f"## Results\n\n{filled(text)}\n\n{table(('method', 'set', *amounts), rows)}"


def measured(row: Any) -> tuple[str, str, str]:
    """Return the method, amount and settings of a row of results.

    Raises:
        ValueError: it is not as eval/results/README.md says.
    """
    needed: dict[str, Any] = {"method": str, "amount": str, "perplexity": int | float}
    kinds: dict[str, Any] = needed | {"seconds": int | float, "settings": str}
    keys = set(row) if isinstance(row, dict) else set()
    if set(needed) - keys or keys - set(kinds):
        raise ValueError(f"{row} has not the keys {[*needed]}, or more than {[*kinds]}")
    for key in keys:
        if not isinstance(row[key], kinds[key]):
            raise ValueError(f"{row}: {key} is no {kinds[key]}")
    if row["method"] not in {*METHODS, *efforts(), "dense"}:
        raise ValueError(f"{row}: there is no method or effort {row['method']!r}")
    return row["method"], row["amount"], row.get("settings", "")


def label(method: str) -> str:
    """Return what a line of results is about."""
    if method in METHODS:
        title = METHODS[method].title
        return f"[{title}](#{anchor(title)})"
    return f"[`--effort {method}`](#the-dial)" if method in efforts() else method


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
    return f"## The target\n\n{filled(text)}\n"


def efforts() -> tuple[str, ...]:
    """Return the efforts that a recipe may name."""
    choices = PruneStep.model_fields["effort"].annotation
    return next(get_args(choice) for choice in get_args(choices) if get_args(choice))


def parts(keys: Mapping[str, Any]) -> str:
    """Return the keys of a prune step in a cell: the method, then what is set beside it."""
    rest = [f"`{key}: {plain(value)}`" for key, value in keys.items() if key != "method"]
    return ", ".join([f"`{keys['method']}`", *rest] if "method" in keys else rest)


def plain(value: Any) -> str:
    """Return a value as a recipe writes it."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {plain(each)}" for key, each in value.items()) + "}"
    return str(value).lower() if isinstance(value, bool) else f"{value}"


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
    text = (
        "Ask for one with `--set prune.allocation=NAME`; the default is the method's own. `manual` "
        "follows from `prune.sparsities`, which maps globs on linears to shares. N:M and FFN "
        "channels fix or tie the shares and take `uniform` alone."
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
    rows = []
    for name, row in ALLOCATIONS.items():
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
    lines = [item(f"`{name}`: {allocation(name)}") for name in ALLOCATIONS]
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
        facts.append(f"{kind}: {says(row.profile.normalise or row.profile.fn)}")
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


def described(name: str, row: Any, *facts: str) -> str:
    """Return what a part does and where it comes from."""
    return item(" ".join([f"`{name}`: {tells(row.fn)}", *facts, *cited(row.paper)]))


def cited(paper: str) -> list[str]:
    """Return the citation of a row, whose title follows a colon; other rows come from no paper."""
    return [f"Paper: {linked(paper)}."] if ":" in paper else []


def section(method: Method) -> str:
    """Return what one method does, with what, and where it comes from."""
    score = SCORES[method.score]
    ranked = is_ranked(method.allocation)
    compete = f"{RANKED}, then {GROUPS[method.group]}" if ranked else GROUPS[method.group]
    facts = [
        f"Ask for it: `--method {method.name}`.",
        f"Needs: {names(needs(method))}.",
        f"Score `{method.score}`: {tells(score.fn)}",
        f"Weights compete {compete}.",
        f"Patterns: {names(method.patterns)}.",
    ]
    if score.adaptive:
        facts.append("The score adapts: it is asked again while the solver updates weights.")
    if "HxW" in method.patterns:
        facts.append(f"Score of a tile: the {POOLS[method.pool]} of its weights' scores.")
    if "ffn-channels" in method.patterns:
        facts.append(f"Score of an FFN channel: {CHANNELS[method.pool]}.")
    facts.append(f"Allocation `{method.allocation}`, see [allocations](#allocations).")
    if method.refine:
        facts.append(f"Refinement `{method.refine}`, see [refinements](#refinements).")
    facts.append(f"Solver `{method.solver}`, see [solvers](#solvers).")
    if method.repair:
        facts.append(f"Repair `{method.repair}`, see [repairs](#repairs).")
    if options := options_of(method):
        facts.append(f"Options, with their defaults: {values(options)}.")
    facts.append(f"Paper: {linked(method.paper)}.")
    return f"## {method.title}\n\n{filled(method.summary)}\n\n" + "\n".join(map(item, facts)) + "\n"


def options_of(method: Method) -> dict[str, float]:
    """Return the numbers that a run with a method's own parts takes."""
    repair = REPAIRS[method.repair].options if method.repair else {}
    return {**SCORES[method.score].options, **ALLOCATIONS[method.allocation].options, **repair}


def statistics() -> str:
    """Return what calibration learns for these methods."""
    places = {
        "tap": "activations of the block that is cut, or of the dense one in a survey",
        "backward": "gradients of the dense model's loss, sequence by sequence, block by block in "
        "reverse before the first cut",
        "block_gradient": "gradients of the norm of the block's own output, sequence by sequence",
    }
    lines = [
        item(f"`{name}`, shape {row.shape}, by {row.observe}: {says(row.accumulator)}")
        for name, row in STATISTICS.items()
    ]
    where = [item(f"by {place}: {text}.") for place, text in places.items()]
    return "## Statistics\n\nWhat the methods need of the calibration text.\n\n" + "\n".join(
        [*lines, *where, ""]
    )


def needs(method: Method) -> tuple[str, ...]:
    """Return the statistics that the parts of a method learn from text."""
    return needs_of(method, method.allocation).names


def names(words: Iterable[str]) -> str:
    """Return names as code, or that there are none."""
    return ", ".join(f"`{word}`" for word in words) or "nothing"


def says(part: Callable[..., Any]) -> str:
    """Return the first paragraph of a docstring on one line, without its `Return`."""
    text = inspect.getdoc(part) or ""
    return " ".join(text.split("\n\n")[0].split()).removeprefix("Return ")


def tells(part: Callable[..., Any]) -> str:
    """Return the paragraphs of a docstring that say what a part does, on one line."""
    text = inspect.getdoc(part) or ""
    ends = re.split(r"\n\n(?=Source|Raises|Args|>>>)", text)[0]
    return " ".join(ends.split()).removeprefix("Return ")


def values(options: Mapping[str, float]) -> str:
    """Return numbers by name."""
    return ", ".join(f"`{name}` {value:g}" for name, value in options.items())


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table in Markdown."""
    head = list(head)
    lines = [head, *map(list, rows)]
    text = [f"| {' | '.join(cells)} |".replace("  ", " ") for cells in lines]
    return "\n".join([text[0], "|" + "---|" * len(head), *text[1:], ""])


def anchor(title: str) -> str:
    """Return the link target that the heading of a method gets; equal ones are counted."""

    def plain(heading: str) -> str:
        return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")

    titles = [method.title for method in METHODS.values()]
    before = [plain(other) for other in titles[: titles.index(title)]].count(plain(title))
    return plain(title) + (f"-{before}" if before else "")


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
