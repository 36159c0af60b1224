"""Methods that remove whole halves of blocks, or blocks."""

from __future__ import annotations

from typing import Any

from llmprune.catalog.types import DEPTHS, Method

FINERCUT = (
    "Zhang et al., FinerCut: Finer-grained Interpretable Layer Pruning for Large Language Models, "
    "arXiv:2405.18218"
)


def depth(name: str, title: str, paper: str, year: int, summary: str, **parts: Any) -> Method:
    """Return the row of a method that removes halves of blocks."""
    usual: dict[str, Any] = {
        "score": "magnitude",
        "allocation": name,
        "solver": "zero",
        "group": "matrix",
        "pool": "l2",
        "patterns": (*DEPTHS, "sublayers"),
        "pattern": "sublayers",
    }
    return Method(name=name, title=title, paper=paper, year=year, summary=summary, **usual | parts)


_ROWS = (
    depth(
        *("finercut", "FinerCut", FINERCUT, 2024),
        "Removes halves of blocks one by one: every one that is left is tried, and the one whose "
        "absence changes the next-token distributions least goes. Distances: KL here, "
        "`finercut-angular`, `finercut-norm` and `finercut-js` the others.",
    ),
    depth(
        *("finercut-angular", "FinerCut, angle", FINERCUT, 2024),
        "As finercut, by the angle between logits.",
    ),
    depth(
        *("finercut-norm", "FinerCut, norm", FINERCUT, 2024),
        "As finercut, by the squared norm of the change of logits.",
    ),
    depth(
        *("finercut-js", "FinerCut, Jensen-Shannon", FINERCUT, 2024),
        "As finercut, by the Jensen-Shannon divergence.",
    ),
    depth(
        *("sleb", "SLEB"),
        "Song et al., SLEB: Streamlining LLMs through Redundancy Verification and Elimination of "
        "Transformer Blocks, arXiv:2402.09025",
        2024,
        "Removes whole blocks one by one, each time the one without which the loss on the text is "
        "lowest.",
        pattern="blocks",
    ),
    depth(
        *("shortgpt", "ShortGPT"),
        "Men et al., ShortGPT: Layers in Large Language Models are More Redundant Than You Expect, "
        "arXiv:2403.03853",
        2024,
        "Removes in one shot the blocks that turn the hidden states least (block influence). The "
        "first and the last block stay.",
        score="influence",
        allocation="lowest",
        pattern="blocks",
        patterns=("blocks",),
    ),
    depth(
        *("laptop", "LAPTOP"),
        "Zhang et al., LAPTOP-Diff: Layer Pruning and Normalized Distillation for Compressing "
        "Diffusion Models, arXiv:2404.11098",
        2024,
        "Measures what the absence of each half costs alone, takes costs as additive, and chooses "
        "by a knapsack over their sizes; the report says how additive they were.",
    ),
    depth(
        *("ld-pruner", "LD-Pruner"),
        "Castells et al., LD-Pruner: Efficient Pruning of Latent Diffusion Models using "
        "Task-Agnostic Insights, arXiv:2404.11936",
        2024,
        "Removes in one shot the halves whose absence shifts mean and deviation of the final "
        "hidden states least.",
    ),
    depth(
        *("evopress-halves", "EvoPress, halves"),
        "Sieberling et al., EvoPress: Accurate Dynamic Model Compression via Evolutionary Search, "
        "arXiv:2410.14649",
        2024,
        "Begins with the halves whose absence alone changes the next-token distributions least, "
        "and searches: in each generation some sets in which a few come back and others go are "
        "tried, and the best is kept. With `--pattern blocks` it searches over whole blocks, as "
        "the paper does.",
    ),
)
DEEP = {row.name: row for row in _ROWS}
