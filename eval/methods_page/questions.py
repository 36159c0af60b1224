"""The six questions that place a method, each with what there is here."""

from __future__ import annotations

from eval.methods_page.recoveries import known
from eval.methods_page.text import filled, item, names
from llmprune.allocation import ALLOCATIONS
from llmprune.catalog.types import PATTERNS
from llmprune.repair import REPAIRS
from llmprune.score import RANK_SCORES, SCORES, UNIT_SCORES, WHOLE_SCORES
from llmprune.solver import COMPENSATIONS, REFINEMENTS, SOLVERS

QUESTIONS = {
    "When is pruned?": (
        "*Before training* a mask is guessed on random weights; *during training* weights go "
        "gradually, on a schedule, while the others adapt; *after training*, in one shot or in a "
        "few rounds, a finished model is cut with little text and no labels. Here: after "
        "training, in one shot, or while the finished model is [trained on](#recovery), on the "
        "[schedules](#schedules) {schedules}. A result can be pruned again, and what was removed "
        "stays removed."
    ),
    "How is it removed?": (
        "A *masked* result has zeros in tensors of the same shape; a *shrunk* one has smaller "
        "tensors. Beside that, the weights that stay may be left alone, or *solved* for anew so "
        "that each linear computes nearly what it did, or a whole block may be *repaired*. Here: "
        "masked and shrunk; the [solvers](#solvers) are {solvers}, those of whole units, the "
        "[compensations](#compensations), {compensations}, and the [repairs](#repairs) {repairs}."
    ),
    "At what granularity?": (
        "The *unit* is what stays or goes as one: a weight; a weight under a rule that hardware "
        "knows, such as N:M; a tile; a channel, an attention head, an expert; a sublayer or a "
        "whole block. Coarse units are what ordinary kernels can skip, and cost more quality at "
        "the same sparsity. Here: the [patterns](#patterns) {patterns}; what moves with each kind "
        "of [unit](#units) is a table. Whole units leave nothing to refine or repair, and tiles "
        "nothing to refine."
    ),
    "By which evidence?": (
        "The *score* of a unit may look at its magnitude; at the activations that it meets; at "
        "the gradient of the loss, hence at what removal costs to first order; at curvature, "
        "which adds how far other weights can make the error good; at how little a unit changes "
        "what passes through it; or the mask itself is learnt. Scores are compared within a "
        "*group*: a row, a matrix, the whole model. A *refinement* then looks at weights together, "
        "where a score looks at each alone. Here: of weights {scores}, where `random` is the floor "
        "under all evidence; of [units](#unit-scores) {unit_scores}; and the "
        "[refinements](#refinements) {refinements}."
    ),
    "How much where?": (
        "An *allocation* spreads the asked sparsity over the linears: alike; by one ranking of "
        "all units; by a *profile* of each linear or block, such as its outliers or its spectrum; "
        "by *probes*, trials whose distance from the dense model is measured; or by hand. Here: "
        "the [allocations](#allocations) {allocations}, and [of units](#unit-allocations) "
        "{unit_allocations}. How much in all is asked for, or follows from a "
        "[target](#the-target)."
    ),
    "With what recovery?": (
        "Training of the whole model after the cut, with the masks kept: of all weights, of "
        "adapters, of norms and biases alone, or towards the dense model's answers. Here: "
        "[by](#recovery) {recoveries}; with masks that move by [regrowth](#regrowth), {regrowths}, "
        "or are [soft](#soft-masks), {soft_masks}; [taught](#distillation) by {distillations}. A "
        "[repair](#repairs) trains one block at a time on the calibration text, towards what the "
        "dense block gives, and knows neither labels nor the model's loss. The result is an "
        "ordinary folder that any trainer takes, but one that knows no masks lets removed weights "
        "return; a shrunk one has none to return."
    ),
}


def vocabulary() -> str:
    """Return the questions that place a method, each with what there is here."""
    here = {
        "solvers": names(SOLVERS),
        "compensations": names(COMPENSATIONS),
        "patterns": names(PATTERNS),
        "scores": names(SCORES),
        "unit_scores": names((*UNIT_SCORES, *WHOLE_SCORES, *RANK_SCORES)),
        "allocations": names(name for name, row in ALLOCATIONS.items() if not row.units),
        "unit_allocations": names(name for name, row in ALLOCATIONS.items() if row.units),
        "refinements": names(REFINEMENTS),
        "repairs": names(REPAIRS),
        **known(),
    }
    intro = filled(
        "Pruning methods differ in few respects. Six questions place any of them, and say here "
        "what llmprune has; the words in *italics* are those of this page and of the code."
    )
    lines = [item(f"**{ask}** {answer.format(**here)}") for ask, answer in QUESTIONS.items()]
    return "\n".join(["## Six questions", "", intro, "", *lines, ""])
