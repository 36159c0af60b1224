"""Methods that weigh a weight by gradients, of the model's loss or of its block's output."""

from __future__ import annotations

from llmprune.catalog.types import Method

GRADIENTS = {
    "snip": Method(
        name="snip",
        title="SNIP",
        score="snip",
        allocation="uniform",
        solver="zero",
        group="matrix",
        pool="mean",
        patterns=("unstructured", "N:M", "HxW"),
        paper=(
            "Lee et al., SNIP: Single-shot Network Pruning based on Connection Sensitivity, "
            "arXiv:1810.02340"
        ),
        year=2018,
        summary=(
            "Removes the weights whose product with the mean gradient of the loss is smallest: "
            "the change of the loss to first order (Taylor), signs included. The paper prunes "
            "before training."
        ),
    ),
    "taylor": Method(
        name="taylor",
        title="Taylor, by sequence",
        score="taylor",
        allocation="uniform",
        solver="zero",
        group="matrix",
        pool="mean",
        patterns=("unstructured", "N:M", "HxW"),
        paper=(
            "Molchanov et al., Importance Estimation for Neural Network Pruning, arXiv:1906.10771"
        ),
        year=2019,
        summary=(
            "The mean over sequences of the size of weight times gradient, so that gradients of "
            "opposite signs do not cancel."
        ),
    ),
    "fisher": Method(
        name="fisher",
        title="Diagonal Fisher",
        score="fisher",
        allocation="uniform",
        solver="zero",
        group="matrix",
        pool="mean",
        patterns=("unstructured", "N:M", "HxW"),
        paper=(
            "Theis et al., Faster gaze prediction with dense networks and Fisher pruning, "
            "arXiv:1801.05787"
        ),
        year=2018,
        summary=(
            "Half the squared weight times the mean squared gradient of single sequences: the "
            "change of the loss to second order with the diagonal of the empirical Fisher "
            "matrix."
        ),
    ),
    "gblm": Method(
        name="gblm",
        title="GBLM-Pruner",
        score="gblm",
        allocation="uniform",
        solver="zero",
        group="row",
        pool="mean",
        patterns=("unstructured", "N:M", "HxW"),
        paper=(
            "Das et al., Beyond Size: How Gradients Shape Pruning Decisions in Large Language "
            "Models, arXiv:2311.04902"
        ),
        year=2023,
        summary=(
            "Wanda's score plus the weight times the norm of its gradients over sequences, "
            "times `options.alpha`: both terms in the paper's absolute scale."
        ),
    ),
    "wanda++": Method(
        name="wanda++",
        title="Wanda++",
        score="wanda++",
        allocation="uniform",
        solver="zero",
        repair="regional",
        group="row",
        pool="mean",
        patterns=("unstructured", "N:M"),
        paper=(
            "Yang et al., Wanda++: Pruning Large Language Models via Regional Gradients, "
            "arXiv:2503.04992"
        ),
        year=2025,
        summary=(
            "Wanda's score plus the gradient of the norm of the block's own output, which needs "
            "one block in memory; between rounds of pruning the block's weights take small "
            "steps towards the dense block's output."
        ),
    ),
}
