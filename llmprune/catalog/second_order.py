"""Methods that update the weights that stay, or exchange weights, by second moments of inputs."""

from __future__ import annotations

from llmprune.catalog.types import Method

SECOND_ORDER = {
    "sparsegpt": Method(
        name="sparsegpt",
        title="SparseGPT",
        score="obs",
        allocation="uniform",
        solver="columnwise",
        group="matrix",
        pool="mean",
        patterns=("unstructured", "N:M", "HxW"),
        paper=(
            "Frantar and Alistarh, SparseGPT: Massive Language Models Can Be Accurately Pruned "
            "in One-Shot, arXiv:2301.00774"
        ),
        year=2023,
        summary=(
            "Goes through the columns from left to right; removes, in each 128 columns of a "
            "matrix, the weights whose removal costs least given what is fixed already, and "
            "updates the columns that follow so that the output changes least. N:M groups are "
            "chosen when the sweep reaches them."
        ),
    ),
    "alps": Method(
        name="alps",
        title="ALPS",
        score="obs",
        allocation="uniform",
        solver="alps",
        group="matrix",
        pool="mean",
        patterns=("unstructured", "N:M"),
        paper=(
            "Meng et al., ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for "
            "Large Language Models, arXiv:2406.07831"
        ),
        year=2024,
        summary=(
            "Searches mask and weights together by ADMM on the exact error of each linear's "
            "output, then solves for the weights that stay. SparseGPT's result is kept for a "
            "linear where that is better."
        ),
    ),
    "dsnot": Method(
        name="dsnot",
        title="DSnoT",
        score="wanda",
        allocation="uniform",
        solver="zero",
        refine="dsnot",
        group="row",
        pool="mean",
        patterns=("unstructured", "N:M"),
        paper=(
            "Zhang et al., Dynamic Sparse No Training: Training-Free Fine-tuning for Sparse "
            "LLMs, arXiv:2310.08915"
        ),
        year=2023,
        summary=(
            "Wanda's masks with pruned and kept weights of a row exchanged as long as the mean "
            "error of the row's output falls. Weights that stay are not changed."
        ),
    ),
    "wanda-ls": Method(
        name="wanda-ls",
        title="Wanda, least squares",
        score="wanda",
        allocation="uniform",
        solver="least-squares",
        group="row",
        pool="mean",
        patterns=("unstructured", "N:M", "HxW"),
        paper=(
            "Boža, Fast and Effective Weight Update for Pruned Large Language Models, "
            "arXiv:2401.02938"
        ),
        year=2024,
        summary=(
            "Wanda's masks; the weights that stay are those that bring the output of each "
            "linear nearest to the dense one's, found for all rows at once by preconditioned "
            "conjugate gradients on the Gram matrix (the paper uses ADMM)."
        ),
    ),
    "free-lunch": Method(
        name="free-lunch",
        title="Wanda, blocks reconstructed",
        score="wanda",
        allocation="uniform",
        solver="least-squares",
        repair="halves",
        group="row",
        pool="mean",
        patterns=("unstructured", "N:M"),
        paper=(
            "Wagner et al., A Free Lunch in LLM Compression: Revisiting Retraining after "
            "Pruning, arXiv:2510.14444"
        ),
        year=2025,
        summary=(
            "Wanda's masks and least squares; then the weights that stay of each block's "
            "attention half and FFN half are trained on the calibration text to give what the "
            "dense half gives."
        ),
    ),
}
