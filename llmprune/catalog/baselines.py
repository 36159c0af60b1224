"""Methods that score each weight by itself: by size, by what it reads, or by lot."""

from __future__ import annotations

from llmprune.catalog.types import EXPERTS, WEIGHTS, WIDTHS, Method

SCORED = (*WEIGHTS, *WIDTHS, EXPERTS[1])

BASELINES = {
    "random": Method(
        name="random",
        title="Random",
        score="random",
        allocation="uniform",
        solver="zero",
        group="row",
        pool="mean",
        patterns=SCORED,
        paper=(
            "Liu et al., The Unreasonable Effectiveness of Random Pruning: Return of the Most "
            "Naive Baseline for Sparse Training, arXiv:2202.02643"
        ),
        year=2022,
        summary=(
            "Removes weights by lot, as many of each row. The floor that every other method "
            "must clear; the paper's findings are about training from random masks, not about "
            "pruning after training. Follows from `seed` and the names of the linears alone."
        ),
    ),
    "magnitude": Method(
        name="magnitude",
        title="Magnitude",
        score="magnitude",
        allocation="uniform",
        solver="zero",
        group="matrix",
        pool="l2",
        patterns=SCORED,
        paper=(
            "Han et al., Learning both Weights and Connections for Efficient Neural Networks, "
            "arXiv:1506.02626"
        ),
        year=2015,
        summary=(
            "Removes the weights of smallest absolute value in each matrix. Needs no "
            "calibration. FFN channels go by the norm of their column of the down projection, "
            "the baseline of FLAP (arXiv:2312.11983)."
        ),
    ),
    "magnitude-global": Method(
        name="magnitude-global",
        title="Magnitude, global",
        score="magnitude",
        allocation="global",
        solver="zero",
        group="matrix",
        pool="l2",
        patterns=("unstructured", "HxW"),
        paper=(
            "Gupta et al., Is Complexity Required for Neural Network Pruning? A Case Study on "
            "Global Magnitude Pruning, arXiv:2209.14624"
        ),
        year=2022,
        summary=(
            "Removes the weights of smallest absolute value of the whole model, so that "
            "linears of small weights lose more. A share of each linear, `prune.min_keep`, "
            "always stays, which keeps a linear from being emptied."
        ),
    ),
    "lamp": Method(
        name="lamp",
        title="LAMP",
        score="magnitude",
        allocation="lamp",
        solver="zero",
        group="matrix",
        pool="l2",
        patterns=("unstructured", "HxW"),
        paper=(
            "Lee et al., Layer-adaptive Sparsity for the Magnitude-based Pruning, arXiv:2010.07611"
        ),
        year=2020,
        summary=(
            "Global magnitude made relative: each squared weight is divided by the sum of all "
            "squares of its linear that are as large or larger, and the smallest quotients of "
            "the whole model go. Within a linear this is the order of magnitudes."
        ),
    ),
    "dimap": Method(
        name="dimap",
        title="DIMAP",
        score="magnitude",
        allocation="dimap",
        solver="zero",
        group="matrix",
        pool="l2",
        patterns=("unstructured", "HxW"),
        paper=(
            "He and Zhou, Data-independent Module-Aware Pruning for Hierarchical Vision "
            "Transformers, arXiv:2404.13648"
        ),
        year=2024,
        summary=(
            "LAMP's number, ranked module by module over all blocks: linears that read what "
            "attention is given, those that write what it returns, and those of the FFN. Each "
            "module loses the same share. Needs no text."
        ),
    ),
    "wanda": Method(
        name="wanda",
        title="Wanda",
        score="wanda",
        allocation="uniform",
        solver="zero",
        group="row",
        pool="mean",
        patterns=SCORED,
        paper=(
            "Sun et al., A Simple and Effective Pruning Approach for Large Language Models, "
            "arXiv:2306.11695"
        ),
        year=2023,
        summary=(
            "Removes, in each row, the weights of smallest absolute value times the norm of "
            "the input they read. FFN channels go by the mean of these over their column of "
            "the down projection, the baseline of FLAP (arXiv:2312.11983)."
        ),
    ),
    "wanda-alpha": Method(
        name="wanda-alpha",
        title="Wanda, alpha variant",
        score="wanda",
        allocation="uniform",
        solver="zero",
        group="mass",
        pool="mean",
        patterns=("unstructured", "N:M", "HxW"),
        paper=(
            "Sun et al., A Simple and Effective Pruning Approach for Large Language Models, "
            "arXiv:2306.11695"
        ),
        year=2023,
        summary=(
            "Wanda's scores, with another number of weights for each row: every row loses the "
            "same share, alpha, of the sum of its scores. Alpha follows from the sparsity. N:M "
            "and tiles have groups of their own and are decided as by Wanda."
        ),
    ),
    "ria": Method(
        name="ria",
        title="RIA",
        score="ria",
        allocation="uniform",
        solver="zero",
        group="matrix",
        pool="mean",
        patterns=("unstructured", "N:M", "HxW"),
        paper=(
            "Zhang et al., Plug-and-Play: An Efficient Post-training Pruning Method for Large "
            "Language Models, ICLR 2024, openreview:Tr0lPx9woF"
        ),
        year=2024,
        summary=(
            "Weighs each weight by its share of its row's and its column's magnitudes, times "
            "the root of the norm of the input it reads: no row and no column goes as a whole. "
            "The paper's permutation of channels for N:M is not part of it."
        ),
    ),
}
