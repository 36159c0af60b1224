"""Methods that remove whole channels and heads: rows and columns of several linears at once."""

from __future__ import annotations

from typing import Any

from llmprune.catalog.types import EXPERTS, WIDTHS, Method

BOTH = "ffn-channels+heads"
FLAP = (
    "An et al., Fluctuation-based Adaptive Structured Pruning for Large Language Models, "
    "arXiv:2312.11983"
)
TAYLOR = (
    "Ma et al., LLM-Pruner: On the Structural Pruning of Large Language Models, arXiv:2305.11627"
)
SPA = "Wang et al., Structurally Prune Anything: Any Architecture, Any Framework, Any Time, arXiv:2403.18955"  # noqa: E501


def width(
    name: str, title: str, score: str, paper: str, year: int, summary: str, **parts: Any
) -> Method:
    """Return the row of a method that removes channels and heads."""
    usual: dict[str, Any] = {
        "allocation": "uniform",
        "solver": "zero",
        "group": "matrix",
        "pool": "mean",
        "patterns": (*WIDTHS, EXPERTS[1]),
        "pattern": BOTH,
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
    width(
        *("compact", "Compact", "flap", FLAP, 2023),
        "What efforts mean for units: FLAP's fluctuation score with the columns that stay fitted "
        "by least squares, and equal widths in every block, chosen among combinations of heads and "
        "channels by the divergence of the next-token distributions. The result is a stock model.",
        allocation="widths",
        solver="least-squares",
    ),
    width(
        *("magnitude-struct", "Magnitude, units", "magnitude", FLAP, 2023),
        "Removes the units with the smallest columns in the linear that reads them: the baseline "
        "of FLAP. Reads no text.",
        pool="l2",
    ),
    width(
        *("wanda-struct", "Wanda, units", "wanda", FLAP, 2023),
        "Removes the units with the smallest mean Wanda score of their columns in the linear that "
        "reads them: the baseline of FLAP.",
    ),
    width(
        *("flap", "FLAP", "flap", FLAP, 2023),
        "Removes the units whose inputs fluctuate least, weighted by the squared norm of their "
        "columns; scores are standardised in each half and ranked over all of the model, so blocks "
        "keep different widths; a bias stands for the mean of what went. Statistics are of the "
        "pruned prefix and variances are of all tokens, unlike in the published code.",
        allocation="standardised",
        solver="bias-shift",
    ),
    width(
        *("flap-published", "FLAP, as published", "flap-published", FLAP, 2023),
        "FLAP as its code ranks units: the score of heads is squared before it is standardised, "
        "and statistics are of the dense model throughout. The running variance of the code, which "
        "leaves out the first batch, is not reproduced.",
        allocation="standardised",
        solver="bias-shift",
        propagate="dense",
    ),
    width(
        *("cfsp", "CFSP", "cfsp"),
        "Wang et al., CFSP: An Efficient Structured Pruning Framework for LLMs with Coarse-to-Fine "
        "Activation Information, arXiv:2409.13199",
        2024,
        "Blocks lose channels by how far they turn the hidden states, channels go by the norm of "
        "their activation: in the published score the weights cancel.",
        allocation="cfsp",
        pattern="ffn-channels",
        propagate="dense",
    ),
    width(
        *("llm-pruner", "LLM-Pruner, element-1", "taylor-1", TAYLOR, 2023),
        "Removes the units with the smallest sum of |weight x gradient| over all linears that a "
        "unit has a part of; equally many in every block.",
    ),
    width(
        *("llm-pruner-vector", "LLM-Pruner, vector", "taylor-vector", TAYLOR, 2023),
        "As llm-pruner, with the sum of weight x gradient of a row taken before its absolute "
        "value.",
    ),
    width(
        *("llm-pruner-2", "LLM-Pruner, element-2", "taylor-2", TAYLOR, 2023),
        "As llm-pruner, with the second-order term: weight squared x mean squared gradient.",
    ),
    width(
        *("llm-pruner-mix", "LLM-Pruner, mix", "taylor-mix", TAYLOR, 2023),
        "As llm-pruner, with the first-order term less half of the second-order one.",
    ),
    width(
        *("llm-pruner-middle", "LLM-Pruner, middle blocks", "taylor-1", TAYLOR, 2023),
        "As llm-pruner, but the first and the last blocks are spared, as in the published runs; "
        "the others lose more, so blocks keep different widths.",
        allocation="middle",
    ),
    width(
        *("spa", "SPA, magnitude", "magnitude", SPA, 2024),
        "Any score of weights, summed over all linears that a unit has a part of; here the "
        "magnitude. `prune.reduce` takes their mean or largest instead.",
        reduce="sum",
    ),
    width(
        *("spa-wanda", "SPA, Wanda", "wanda", SPA, 2024),
        "Wanda's score, summed over all linears that a unit has a part of.",
        reduce="sum",
    ),
    width(
        *("obspa", "OBSPA", "obs-units", SPA, 2024),
        "Removes the units whose removal, with all columns that stay fitted anew, costs least by "
        "the inverse Gram matrix, and fits them. With `calibration.data: random-tokens` it needs "
        "no text.",
        solver="least-squares",
    ),
    width(
        *("hesso", "HESSO", "hesso"),
        "Chen et al., HESSO: Towards Automatic Efficient and User Friendly Any Neural Network "
        "Training and Pruning, arXiv:2409.09085",
        2024,
        "Blends five normalised saliencies of a unit, of its size and of its gradient; here once, "
        "without training.",
    ),
    width(
        *("dimap-struct", "DIMAP, units", "dimap-units"),
        "He and Zhou, Data-independent Module-Aware Pruning for Hierarchical Vision Transformers, "
        "arXiv:2404.13648",
        2024,
        "Magnitudes of whole units, each relative to those as large or larger in its module.",
    ),
    width(
        *("minitron", "Minitron, width", "minitron"),
        "Muralidharan et al., Compact Language Models via Pruning and Knowledge Distillation, "
        "arXiv:2407.14679",
        2024,
        "Removes the units of smallest mean activation, taken as a norm over sequences.",
    ),
    width(
        *("adapt-pruner", "Adapt-Pruner", "taylor-1"),
        "Pan et al., Adapt-Pruner: Adaptive Structural Pruning for Efficient Small Language Model "
        "Training, arXiv:2502.03460",
        2025,
        "In many small steps blocks lose units by how alike their input and output are, measured "
        "again on the pruned model after every step; units go by |weight x gradient|.",
        allocation="adapt-pruner",
    ),
    width(
        *("learned-gates", "Learned gates", "gate"),
        "Zhang et al., EcoDiff: Low-Cost Pruning of Diffusion Models, arXiv:2412.02852",
        2024,
        "Trains for every unit the chance that it stays, weights frozen: models are drawn by these "
        "chances and shall say what the dense one said (KL), while the weights that are expected "
        "to stay fall to the share that is asked. The units least likely to stay go, over all of "
        "the model.",
        allocation="standardised",
    ),
    width(
        *("greedy-units", "Greedy over units", "flap"),
        "Zhang et al., FinerCut: Finer-grained Interpretable Layer Pruning for Large Language "
        "Models, arXiv:2405.18218",
        2024,
        "Chunks of channels, heads and whole halves in one pool: in every round what costs the "
        "least divergence per weight goes, measured again on top of what went.",
        allocation="greedy-units",
        solver="least-squares",
        patterns=(*WIDTHS, "attention", "ffn", "sublayers"),
    ),
)
STRUCTURED = {row.name: row for row in _ROWS}
