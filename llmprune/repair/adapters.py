"""Low-rank updates cut by the masks: a block is trained with few numbers, and zeros stay zeros.

The weight of a pruned linear is W + c (B A) * M with the stored mask M; what is trained is what is
merged. Goals, steps and the judgement of what was held out are those of the kept weights' training.
Legend: O outputs, I inputs, R rank.

Source: Zimmer et al., PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs (MaskLoRA,
reconstruction of blocks).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch

from llmprune.base.errors import RecipeError
from llmprune.repair.fitting import Adam, Fitted, Goal, fit, kept_in, spread
from llmprune.repair.halves import by_halves, pace_of, passes, watch_halves
from llmprune.repair.types import Repair, Work
from llmprune.walk.block import Block

if TYPE_CHECKING:
    from torch import Tensor

    from llmprune.solver.types import Fact
    from llmprune.walk.forward import Stream

SCALE = 2.0  # c: alpha 32 over rank 16
WARM_UP = 0.1  # of all steps
OPTIONS = {
    "epochs": 4.0, "learning_rate": 0.03, "sequences": 2.0, "rank": 16.0, "halves": 1.0,
    "norms": 1.0,
}  # fmt: skip


def watch_adapters(
    block: Block, stream: Stream, options: Mapping[str, float], seed: int
) -> dict[str, Tensor]:
    """Return copies of the dense parameters, from which targets are made.

    Raises:
        RecipeError: the rank is no rank.
    """
    if options["rank"] < 1:
        raise RecipeError(
            f"prune.options.rank: {options['rank']:g} leaves adapters nothing to train. It is the "
            "number of columns of B, 1 or more; type --set prune.options.rank=16."
        )
    return watch_halves(block, stream, options, seed)


def repair_adapters(work: Work) -> dict[str, Fact]:
    """Train adapters of every half of a cut block, or of all of it, and merge them.

    Targets are the dense block's on the same inputs. The block's norms are trained too, unless the
    option `norms` is 0.

    Source: PERP, layer-wise reconstruction with MaskLoRA.
    """
    norms = norms_of(work.block) if work.options["norms"] else ()

    def train(keep: Mapping[str, Tensor], goal: Goal) -> Fitted:
        pace, rank = pace_of(work), int(work.options["rank"])
        moves = Adapters(work.block, keep, rank=rank, rate=pace.rate, seed=pace.seed, norms=norms)
        fitted = fit(work.block, keep, goal, pace, moves)
        if fitted.accepted:
            work.touch(set(norms))
        return fitted

    return by_halves(work, train, whole=not work.options["halves"])


class Factors(NamedTuple):
    """The adapter of one linear, float32, and what it is added to: the weight after the cut."""

    weight_OI: Tensor
    keep_OI: Tensor
    b_OR: Tensor
    a_RI: Tensor


class Adapters:
    """Moves the factors of a low-rank update of every linear, and whole norms, by Adam.

    A rate is relative: the first step moves the weights of a linear by about `rate` times their
    root mean square, whatever the rank and the scale, and its A by `rate` times that of A.
    """

    def __init__(
        self,
        block: Block,
        keep: Mapping[str, Tensor],
        *,
        rank: int,
        rate: float,
        seed: int,
        norms: tuple[str, ...] = (),
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.block, self.adam = block, Adam()
        self.kept = {name: kept_in(block, name, keep) for name in block.params_of(set(keep))}
        self.factors: dict[str, Factors] = {}
        self.rates: dict[str, tuple[float, float]] = {}
        for linear, keep_OI in keep.items():
            factors = drawn(block.weight(linear), keep_OI, rank, generator)
            size = spread(factors.weight_OI.float(), keep_OI)
            self.factors[linear] = factors
            self.rates[linear] = (rate * size / _reach(factors.a_RI), rate * _rms(factors.a_RI))
        self.norms = {name: block.module.get_parameter(name).data for name in norms}
        self.masters = {name: value.float() for name, value in self.norms.items()}
        self.kept |= {name: torch.ones_like(v, dtype=torch.bool) for name, v in self.norms.items()}
        self.norm_rates = {name: rate * _rms(value) for name, value in self.masters.items()}

    def step(self, gradients: dict[str, Tensor], step: int, total: int) -> None:
        """Take one step with all factors and norms; weights are the merged ones, rounded once."""
        speed = speed_at(step, total)
        for linear, factors in self.factors.items():
            found = self.block.anatomy.linears[linear]
            grad_b_OR, grad_a_RI = pulled(found.view(gradients[found.param]), factors)
            rate_b, rate_a = self.rates[linear]
            self.adam.step(f"{linear}.b", factors.b_OR, grad_b_OR, rate_b * speed, step + 1)
            self.adam.step(f"{linear}.a", factors.a_RI, grad_a_RI, rate_a * speed, step + 1)
            self.block.weight(linear).copy_(merged(factors))
        for name, master in self.masters.items():
            rate = self.norm_rates[name] * speed
            self.adam.step(name, master, gradients[name], rate, step + 1)
            self.norms[name].copy_(master)


def drawn(weight_OI: Tensor, keep_OI: Tensor, rank: int, generator: torch.Generator) -> Factors:
    """Return a fresh adapter: A uniform within 1 / sqrt(I), B zero, so that nothing changes yet."""
    height, width = weight_OI.shape
    rank = min(rank, height, width)
    device = weight_OI.device
    a_RI = torch.rand(rank, width, generator=generator).mul_(2).sub_(1).div_(math.sqrt(width))
    b_OR = torch.zeros(height, rank, device=device)
    return Factors(weight_OI.detach().clone(), keep_OI, b_OR, a_RI.to(device))


def merged(factors: Factors) -> Tensor:
    """Return W + c (B A) * M, float32 (O, I).

    >>> w, keep = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.eye(2).bool()
    >>> merged(Factors(w, keep, torch.tensor([[1.0], [2.0]]), torch.tensor([[0.5, 1.0]])))
    tensor([[2., 0.],
            [0., 6.]])
    """
    update_OI = (factors.b_OR @ factors.a_RI).mul_(SCALE).masked_fill_(~factors.keep_OI, 0)
    return update_OI.add_(factors.weight_OI)


def pulled(grad_OI: Tensor, factors: Factors) -> tuple[Tensor, Tensor]:
    """Return the gradients by B (O, R) and by A (R, I) of one by the weight, 0 where pruned."""
    return SCALE * (grad_OI @ factors.a_RI.T), SCALE * (factors.b_OR.T @ grad_OI)


def norms_of(block: Block) -> tuple[str, ...]:
    """Return the parameters of a block's norms."""
    modules = block.module.named_modules()
    norms = {name for name, module in modules if "norm" in type(module).__name__.lower()}
    names = (name for name, param in block.module.named_parameters() if param.dim() == 1)
    return tuple(name for name in names if name.rpartition(".")[0] in norms)


def speed_at(step: int, total: int) -> float:
    """Return the share of the learning rate at a step: a linear rise, then a linear fall to zero.

    >>> [round(speed_at(step, 20), 3) for step in (0, 1, 2, 11, 19)]
    [0.5, 1.0, 1.0, 0.5, 0.056]
    """
    rising = max(1.0, WARM_UP * total)
    return min((step + 1) / rising, (total - step) / max(1.0, total - rising), 1.0)


def _reach(a_RI: Tensor) -> float:
    """Return how far a weight moves where all entries of its row of B move by one."""
    return SCALE * math.sqrt(len(a_RI)) * _rms(a_RI)


def _rms(value: Tensor) -> float:
    return float(value.square().mean().sqrt())


ADAPTERS = Repair(
    watch=watch_adapters,
    fn=repair_adapters,
    passes=passes,
    paper="Zimmer et al., PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs",
    options=OPTIONS,
)
