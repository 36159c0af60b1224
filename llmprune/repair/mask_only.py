"""Other masks for a cut block: a score per weight is trained, and kept and pruned weights swap.

"jackpots" leaves every weight at its dense value; "bilevel" trains the kept ones in between.
Gradients pass the choice of a mask straight through, so that a pruned weight knows what it would
do. Rows, or groups of N:M, keep as many weights as the cut left them.
Legend: O outputs, I inputs, G rows or groups, C their columns.

Sources: Zhang et al., Lottery Jackpots Exist in Pre-trained Models (scores for frozen weights,
short restriction); Zhang et al., Advancing Model Pruning via Bi-level Optimization (BiP).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from llmprune.base.errors import RecipeError
from llmprune.repair.fitting import Adam, Fitted, Goal, fit, kept_in
from llmprune.repair.halves import by_halves, pace_of, passes, watch_halves
from llmprune.repair.types import Repair, Work
from llmprune.walk.block import Block

if TYPE_CHECKING:
    from torch import Tensor

    from llmprune.solver.types import Fact
    from llmprune.walk.forward import Stream

MOMENTUM = 0.9
OPTIONS = {"epochs": 2.0, "learning_rate": 0.01, "sequences": 2.0, "swaps": 0.5, "halves": 1.0}
BOTH = {**OPTIONS, "epochs": 4.0, "weight_rate": 0.03}


def watch_masks(
    block: Block, stream: Stream, options: Mapping[str, float], seed: int
) -> dict[str, Tensor]:
    """Return copies of the dense parameters: what weights come back as, and what makes targets.

    Raises:
        RecipeError: the share of swaps is none.
    """
    if not 0 < options["swaps"] <= 1:
        raise RecipeError(
            f"prune.options.swaps: {options['swaps']:g} is no share of the swaps that scores ask "
            "for. It is above 0 and at most 1; type --set prune.options.swaps=0.5."
        )
    return watch_halves(block, stream, options, seed)


def repair_masks(work: Work) -> dict[str, Fact]:
    """Train scores of every half of a cut block, or of all of it, and keep the highest.

    Kept weights have their dense values at the end, whatever a solver made of them. A weight that
    was 0 in the dense block never comes back.

    Source: Lottery Jackpots, towards the outputs of blocks instead of a loss.
    """
    return _with_scores(work, Scores)


def repair_bilevel(work: Work) -> dict[str, Fact]:
    """Train kept weights and scores of a cut block in turn, each with micro-batches of its own.

    Weights begin at their dense values, as one does that comes back.

    Source: BiP, towards the outputs of blocks instead of a loss.
    """
    return _with_scores(work, Bilevel)


def _with_scores(work: Work, kind: type[Scores]) -> dict[str, Fact]:
    """Train scores of one kind half by half, and let the run have the masks that were accepted."""
    linears = {name: work.block.anatomy.linears[name] for name in work.keep}
    seen = {name: linear.view(work.seen[linear.param]) for name, linear in linears.items()}
    dense = work.reordered(seen)
    swapped = 0

    def train(keep: Mapping[str, Tensor], goal: Goal) -> Fitted:
        nonlocal swapped
        scores = kind(work, keep, {name: dense[name] for name in keep})
        fitted = fit(work.block, keep, goal, pace_of(work), scores)
        if fitted.accepted:
            work.remask(scores.keep)
            swapped += sum(int((now & ~keep[name]).sum()) for name, now in scores.keep.items())
        return fitted

    return {**by_halves(work, train, whole=not work.options["halves"]), "swapped": swapped}


class Scores:
    """Moves a score per weight by gradient descent with momentum; `keep` are the masks that follow.

    A score begins as what its weight gives, by the first gradients (`saliency`), in units of their
    root mean square in the linear. The rate is relative to that: with 1, a step moves a score by
    the loss that its weight saves to first order, in the same units.
    """

    def __init__(self, work: Work, keep: Mapping[str, Tensor], dense: Mapping[str, Tensor]) -> None:
        self.block, self.options, self.within = work.block, work.options, work.within
        self.keep, self.dense = dict(keep), dense
        everywhere = {name: torch.ones_like(keep_OI) for name, keep_OI in keep.items()}
        params = self.block.params_of(set(keep))
        self.kept = {name: kept_in(self.block, name, everywhere) for name in params}
        self.units: dict[str, float] = {}
        self.scores: dict[str, Tensor] = {}
        self.momentum: dict[str, Tensor] = {}

    def step(self, gradients: dict[str, Tensor], step: int, total: int) -> None:
        """Take one step with every score, and swap a share of the weights that it asks for."""
        share = self.options["swaps"] * (1 - step / total)
        for name, keep_OI in self.keep.items():
            self._judge(name, self.gradient_of(name, gradients))
            if name in self.scores:
                self.keep[name] = swapped_masks(self.scores[name], keep_OI, share, self.within)
            self.place(name)

    def gradient_of(self, name: str, gradients: Mapping[str, Tensor]) -> Tensor:
        """Return the gradient by the weight of a linear, (O, I)."""
        linear = self.block.anatomy.linears[name]
        found: Tensor = linear.view(gradients[linear.param])
        return found

    def weight_of(self, name: str) -> Tensor:
        """Return the values of a linear's weights as they would be if all were kept."""
        return self.dense[name]

    def slope(self, name: str, grad_OI: Tensor) -> Tensor:
        """Return the gradient by a linear's mask, float32 (O, I): straight through."""
        return grad_OI * self.dense[name].float()

    def place(self, name: str) -> None:
        """Put the weights that the mask keeps into the block."""
        weight_OI = self.weight_of(name).masked_fill(~self.keep[name], 0)
        self.block.weight(name).copy_(weight_OI)

    def _judge(self, name: str, grad_OI: Tensor) -> None:
        """Move the scores of a linear; they begin once a token has reached it."""
        if name not in self.scores and not self._begin(name, grad_OI):
            return
        slope_OI = self.slope(name, grad_OI).div_(self.units[name])
        self.momentum[name].mul_(MOMENTUM).add_(slope_OI)
        self.scores[name].sub_(self.momentum[name], alpha=self.options["learning_rate"])

    def _begin(self, name: str, grad_OI: Tensor) -> bool:
        """Give weights their first scores; tell whether there are any."""
        dense_OI, keep_OI = self.dense[name], self.keep[name]
        score_OI = saliency(dense_OI, grad_OI)
        self.units[name] = float(score_OI.square().mean().sqrt())
        if not 0 < self.units[name] < math.inf:
            return False
        score_OI = agreeing(score_OI.div_(self.units[name]), keep_OI, self.within)
        self.scores[name] = score_OI.masked_fill_((dense_OI == 0) & ~keep_OI, -torch.inf)
        self.momentum[name] = torch.zeros_like(score_OI)
        return True


class Bilevel(Scores):
    """Moves kept weights in even steps, by Adam, and scores in odd ones.

    `weight_rate` is relative to the root mean square of a linear's kept weights. It is also 1 over
    the curvature that the hyper-gradient supposes, in units of a linear's first gradients.
    """

    def __init__(self, work: Work, keep: Mapping[str, Tensor], dense: Mapping[str, Tensor]) -> None:
        super().__init__(work, keep, dense)
        self.adam = Adam()
        self.masters = {name: dense_OI.float().clone() for name, dense_OI in dense.items()}
        self.rates = {
            name: self.options["weight_rate"] * _rms(self.masters[name][keep_OI])
            for name, keep_OI in keep.items()
        }
        self.flat: dict[str, float] = {}

    def step(self, gradients: dict[str, Tensor], step: int, total: int) -> None:
        """Take one step with weights, or with scores."""
        if step % 2:
            super().step(gradients, step, total)
            return
        for name, master_OI in self.masters.items():
            grad_OI = self.gradient_of(name, gradients)
            if name not in self.flat and (size := _rms(grad_OI)) > 0:
                self.flat[name] = self.rates[name] / size
            self.adam.hold(name, self.keep[name])
            rate = self.rates[name] * (1 - step / total)
            self.adam.step(name, master_OI, grad_OI * self.keep[name], rate, step // 2 + 1)
            self.place(name)

    def weight_of(self, name: str) -> Tensor:
        """Return the trained values; those of weights never kept are the dense ones."""
        return self.masters[name]

    def slope(self, name: str, grad_OI: Tensor) -> Tensor:
        """Return the gradient by a mask, float32 (O, I), through the weights trained for it."""
        flat = self.flat.get(name, 0.0)
        return hyper_gradient(self.masters[name], self.keep[name], grad_OI, flat)


def saliency(weight_OI: Tensor, grad_OI: Tensor) -> Tensor:
    """Return |w| times the root of its curvature, float32 (O, I), up to a factor.

    Curvatures are taken from squared gradients, as products of a row's mean and a column's.

    >>> saliency(torch.tensor([[3.0, -1.0]]), torch.tensor([[1.0, 2.0]]))
    tensor([[3., 2.]])
    """
    square_OI = grad_OI.float().square()
    mean_O1, mean_1I = square_OI.mean(dim=1, keepdim=True), square_OI.mean(dim=0, keepdim=True)
    tiny = torch.finfo(torch.float32).tiny
    root_O1 = mean_O1.div(square_OI.mean().clamp(min=tiny)).sqrt_()
    return weight_OI.float().abs().mul_(root_O1).mul_(mean_1I.sqrt())


def agreeing(score_OI: Tensor, keep_OI: Tensor, within: int | None) -> Tensor:
    """Return scores that ask for no swap: kept weights have the threshold of their group at least.

    The threshold is the score of as high a rank as the group keeps; pruned weights have it at most.

    >>> agreeing(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([[True, True, False]]), None)
    tensor([[3., 2., 2.]])
    """
    columns = within or score_OI.shape[1]
    score_GC, keep_GC = score_OI.reshape(-1, columns), keep_OI.reshape(-1, columns)
    last_G1 = keep_GC.sum(dim=1, keepdim=True).sub_(1).clamp_(min=0)
    least_G1 = score_GC.sort(dim=1, descending=True).values.gather(1, last_G1)
    found_GC = torch.where(keep_GC, score_GC.maximum(least_G1), score_GC.minimum(least_G1))
    return found_GC.reshape(score_OI.shape)


def swapped_masks(score_OI: Tensor, keep_OI: Tensor, share: float, within: int | None) -> Tensor:
    """Return keep_OI after the swaps of largest gain; groups keep as many weights as before.

    In a group the best pruned weight takes the place of the worst kept one, the second best that of
    the second worst, as long as scores rise. Of all such pairs of the linear the `share` that gains
    most is carried out, rounded up; equal gains, and equal scores, go by index.

    Source: Lottery Jackpots, short restriction.

    >>> score, keep = torch.tensor([[0.98, 1.0, 0.995, 0.99]]), torch.tensor([[1, 1, 0, 0]]).bool()
    >>> swapped_masks(score, keep, 1.0, None)
    tensor([[False,  True,  True, False]])
    """
    columns = within or score_OI.shape[1]
    score_GC, keep_GC = score_OI.reshape(-1, columns), keep_OI.reshape(-1, columns).clone()
    best = score_GC.masked_fill(keep_GC, -torch.inf).sort(dim=1, descending=True, stable=True)
    worst = score_GC.masked_fill(~keep_GC, torch.inf).sort(dim=1, stable=True)
    gain_GC = best.values - worst.values
    row, place = (gain_GC > 0).nonzero(as_tuple=True)
    first = gain_GC[row, place].argsort(descending=True, stable=True)
    first = first[: math.ceil(share * len(first))]
    row, place = row[first], place[first]
    keep_GC[row, worst.indices[row, place]] = False
    keep_GC[row, best.indices[row, place]] = True
    return keep_GC.reshape(keep_OI.shape)


def hyper_gradient(weight_OI: Tensor, keep_OI: Tensor, grad_OI: Tensor, flat: float) -> Tensor:
    """Return g (w - m g / gamma), the gradient by a mask whose kept weights follow it; 1 / gamma is
    `flat`.

    Source: BiP, equation of the implicit gradient with a diagonal curvature gamma.

    >>> w, m, g = torch.tensor([2.0, -1.0]), torch.tensor([True, False]), torch.tensor([0.5, 0.3])
    >>> hyper_gradient(w, m, g, 0.1)
    tensor([ 0.9750, -0.3000])
    """
    return grad_OI * (weight_OI.float() - flat * grad_OI * keep_OI)


def _rms(value: Tensor) -> float:
    return float(value.float().square().mean().sqrt()) if value.numel() else 0.0


JACKPOTS = Repair(
    watch=watch_masks,
    fn=repair_masks,
    passes=passes,
    paper="Zhang et al., Lottery Jackpots Exist in Pre-trained Models",
    options=OPTIONS,
    swaps=True,
)
BILEVEL = Repair(
    watch=watch_masks,
    fn=repair_bilevel,
    passes=passes,
    paper="Zhang et al., Advancing Model Pruning via Bi-level Optimization",
    options=BOTH,
    swaps=True,
)
