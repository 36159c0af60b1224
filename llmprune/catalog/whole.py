"""Methods that remove units of the whole model: channels of the residual stream, token ids."""

from __future__ import annotations

from typing import Any

from llmprune.catalog.types import Method


def one_choice(
    name: str, title: str, score: str, paper: str, year: int, summary: str, **parts: Any
) -> Method:
    """Return the row of a method that makes one choice for all blocks."""
    usual: dict[str, Any] = {
        "allocation": "uniform",
        "solver": "zero",
        "group": "matrix",
        "pool": "mean",
        "patterns": ("hidden",),
        "pattern": "hidden",
    }
    return Method(
        name=name,
        title=title,
        score=score,
        paper=paper,
        year=year,
        summary=summary,
        **usual | parts,
    )


_ROWS = (
    one_choice(
        *("slicegpt", "SliceGPT", "principal-axes"),
        "Ashkboos et al., SliceGPT: Compress Large Language Models by Deleting Rows and Columns, "
        "arXiv:2401.15024",
        2024,
        "Turns the residual stream onto its principal axes and keeps those of most energy: every "
        "matrix of every block gets smaller. One rotation serves all blocks, so the result is a "
        "stock model. Embeddings and head, where they are tied, become two tensors. For families "
        "with RMS norms.",
    ),
    one_choice(
        *("hidden-channels", "Minitron, hidden channels", "channel-activity"),
        "Muralidharan et al., Compact Language Models via Pruning and Knowledge Distillation, "
        "arXiv:2407.14679",
        2024,
        "Removes the channels of the residual stream that say least after the norms, summed over "
        "all of them. Weights that stay keep their values but for the norms' scale, and tied "
        "embeddings stay tied. Needs training after it more than slicegpt does.",
    ),
    one_choice(
        *("vocabulary", "Vocabulary", "token-counts"),
        "Yang et al., TextPruner: A Model Pruning Toolkit for Pre-Trained Language Models, "
        "arXiv:2203.15996",
        2022,
        "Removes the tokens that the calibration text uses least, with their rows of embeddings "
        "and head; what they spelt is spelt with shorter tokens. --sparsity is the share of the "
        "vocabulary's rows. Tokens that could not be spelt otherwise stay.",
        patterns=("vocabulary",),
        pattern="vocabulary",
    ),
)
WHOLE_MODEL = {row.name: row for row in _ROWS}
