"""Methods whose point is how much each linear loses; the score is a known one."""

from __future__ import annotations

from llmprune.catalog.types import Method

SHARES = {
    "erk": Method(
        name="erk",
        title="ERK",
        score="magnitude",
        allocation="erk",
        solver="zero",
        group="matrix",
        pool="l2",
        patterns=("unstructured", "HxW"),
        paper=("Evci et al., Rigging the Lottery: Making All Tickets Winners, arXiv:1911.11134"),
        year=2019,
        summary=(
            "Magnitude, with less taken from linears that are small or narrow for their size: "
            "the share kept grows with (outputs + inputs) / (outputs x inputs). Devised for "
            "training from random masks; a data-free baseline here."
        ),
    ),
    "sap": Method(
        name="sap",
        title="SAP (PQ index)",
        score="magnitude",
        allocation="pq",
        solver="zero",
        group="matrix",
        pool="l2",
        patterns=("unstructured", "HxW"),
        paper=(
            "Diao et al., Pruning Deep Neural Networks from a Sparsity Perspective, "
            "arXiv:2302.05601"
        ),
        year=2023,
        summary=(
            "Magnitude, with more taken from linears whose weights are concentrated in few, as "
            "the PQ index measures. The paper repeats it with training in between; here it is "
            "done once."
        ),
    ),
    "owl": Method(
        name="owl",
        title="OWL",
        score="wanda",
        allocation="owl",
        solver="zero",
        group="row",
        pool="mean",
        patterns=("unstructured", "HxW"),
        paper=(
            "Yin et al., Outlier Weighed Layerwise Sparsity (OWL): A Missing Secret Sauce for "
            "Pruning LLMs to High Sparsity, arXiv:2310.05175"
        ),
        year=2023,
        summary=(
            "Wanda, with less taken from blocks that have more outliers: scores above "
            "`options.outliers` times the block's mean. With `prune.solver` and another "
            "method's score it goes with SparseGPT too: `--method sparsegpt --set "
            "prune.allocation=owl`."
        ),
    ),
    "alphapruning": Method(
        name="alphapruning",
        title="AlphaPruning",
        score="wanda",
        allocation="alpha",
        solver="zero",
        group="row",
        pool="mean",
        patterns=("unstructured", "HxW"),
        paper=(
            "Lu et al., AlphaPruning: Using Heavy-Tailed Self Regularization Theory for "
            "Improved Layer-wise Pruning of Large Language Models, arXiv:2410.10912"
        ),
        year=2024,
        summary=(
            "Wanda, with less taken from blocks whose weight spectra have heavier tails, which "
            "the theory reads as better trained."
        ),
    ),
    "ecoflap": Method(
        name="ecoflap",
        title="ECoFLaP",
        score="wanda",
        allocation="ecoflap",
        solver="zero",
        group="row",
        pool="mean",
        patterns=("unstructured", "HxW"),
        paper=(
            "Sung et al., ECoFLaP: Efficient Coarse-to-Fine Layer-Wise Pruning for Vision- "
            "Language Models, arXiv:2310.02998"
        ),
        year=2023,
        summary=(
            "Wanda, with less taken from blocks whose noise moves the loss more: the gradient's "
            "size by two forwards with noise of opposite signs, no backward."
        ),
    ),
    "besa": Method(
        name="besa",
        title="BESA, on error curves",
        score="wanda",
        allocation="learned",
        solver="zero",
        group="row",
        pool="mean",
        patterns=("unstructured", "HxW"),
        paper=(
            "Xu et al., BESA: Pruning Large Language Models with Blockwise Parameter-Efficient "
            "Sparsity Allocation, arXiv:2402.16880"
        ),
        year=2024,
        summary=(
            "Wanda, with the share of each linear learnt by gradient descent under the budget: "
            "BESA's mixture over candidate shares, on curves of each linear's output error "
            "instead of the block's."
        ),
    ),
    "rd-prune": Method(
        name="rd-prune",
        title="RD, on divergence",
        score="magnitude",
        allocation="sensitivity",
        solver="zero",
        group="matrix",
        pool="l2",
        patterns=("unstructured", "HxW"),
        paper=(
            "Xu et al., Efficient Joint Optimization of Layer-Adaptive Weight Pruning in Deep "
            "Neural Networks, arXiv:2308.10438"
        ),
        year=2023,
        summary=(
            "Magnitude, with shares by dynamic programming on what pruning each linear alone "
            "does to the model's output: here the divergence at the asked share, and the Gram "
            "matrix for the shape of the curve."
        ),
    ),
    "evopress": Method(
        name="evopress",
        title="EvoPress",
        score="obs",
        allocation="evopress",
        solver="columnwise",
        group="matrix",
        pool="mean",
        patterns=("unstructured", "HxW"),
        paper=(
            "Sieberling et al., EvoPress: Accurate Dynamic Model Compression via Evolutionary "
            "Search, arXiv:2410.14649"
        ),
        year=2024,
        summary=(
            "SparseGPT, with shares found by an evolutionary search on the divergence from the "
            "dense model. Candidates have Wanda's masks, so no database of solved linears is "
            "needed."
        ),
    ),
}
