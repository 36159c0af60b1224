"""What an allocation is: how much of every site to remove, and what it must know to say so.

Legend: O outputs, I inputs, N all weights (or tiles) of a linear, S sequences of a probe.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from types import MappingProxyType
from typing import Literal, NamedTuple

from torch import Tensor

from llmprune.arch.types import Site
from llmprune.stats.types import Stats


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A model to be probed: the dense one with some of its sites changed.

    `shares` says how much each named site loses (by its own scores, weights that stay unchanged).
    `noise` adds to the weights of a named site that many times a standard normal draw, which is
    the same for every scale: it follows from the seed and the site's name.
    """

    shares: Mapping[str, Fraction] = field(default_factory=dict)
    noise: Mapping[str, float] = field(default_factory=dict)


class Measured(NamedTuple):
    """What a probe says of a candidate, per sequence: means over its tokens, float64 (S,), host.

    `kl_S` is the divergence KL(dense || candidate) of the next-token distributions in nats,
    `loss_S` the negative log-likelihood of the text in nats, `others` the distances that the
    allocation names besides (`evaluation.divergence` defines them).
    """

    kl_S: Tensor
    loss_S: Tensor
    others: Mapping[str, Tensor] = MappingProxyType({})

    @property
    def kl(self) -> float:
        """Return the mean divergence over all sequences."""
        return float(self.kl_S.mean())

    def distance(self, name: str) -> float:
        """Return the mean of a distance over all sequences: "kl", "loss" or one of `others`."""
        known = {"kl": self.kl_S, "loss": self.loss_S, **self.others}
        return float(known[name].mean())


Probe = Callable[[Sequence[Candidate]], Sequence[Measured]]
"""One walk over the checkpoint answers all candidates of a round, in order."""


Remeasure = Callable[[Mapping[str, Fraction]], Mapping[int, Tensor]]
"""What gives the statistic `residual` of every block once sites have lost some shares."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What an allocation is asked: the sites, the share to remove of them all, and what is known.

    `named` are the shares that the recipe gives single sites, `profiles` what a survey learnt,
    `options` the row's numbers (the recipe's, else their defaults); `seed` is the run's. `ties` are
    sites that must lose equally many units, `multiple` what kept widths of channels must be
    multiples of, as far as the form of the result demands either, `parallel` how many devices share
    the heads and channels of a block. Into `facts` an allocation writes numbers that a report
    should show. `remeasure` walks the model without some shares of its units
    and returns the statistic `residual` of every block.

    Of units, `target` is of all weights of `sites`, those that two sites share counted twice; a
    site of one unit goes whole or stays. Where a half of a block, or a block, goes whole, the sites
    that it covers lose nothing of their own, so that what sites lose adds up.
    """

    sites: Sequence[Site]
    target: Fraction
    named: Mapping[str, Fraction] = field(default_factory=dict)
    profiles: Mapping[str, Tensor] = field(default_factory=dict)
    options: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0
    probe: Probe | None = None
    multiple: int | None = None
    parallel: int = 1
    ties: tuple[tuple[str, ...], ...] = ()
    facts: dict[str, float] = field(default_factory=dict)
    remeasure: Remeasure | None = None


class Evidence(NamedTuple):
    """One linear as a survey sees it; `keep_OI` is the mask of an earlier pruning, if any."""

    weight_OI: Tensor
    stats: Stats
    keep_OI: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What a survey learns of every linear before the first cut.

    `fn(weight_OI, stats, keep_OI)` reads the weight, the statistics that `needs` names (of the
    linear's tap, from dense activations) and the mask of an earlier pruning, None where there is
    none. Without `ranked` its answer, a small tensor, becomes the linear's profile.

    At the level of a block, fn takes all of its linears together, `{site: Evidence}`, and returns
    `{site: Tensor}`. At the level of a site it takes the scores that the method gives the site's
    units, unit_score_U, and returns as many numbers. At that of the residual the profile is how far
    the site's block moves what passes through it, the statistic `residual`. The numbers that a
    row's `options` name are given to fn as keywords.

    With `ranked` the answer is score_OI: new, float32, not below 0, higher = keep. All units of the
    model are then ranked together, tiles by their pooled score, and the profile is how many of the
    linear's are among the lowest, int64 (1,). `normalise`, if given, maps the scores of a linear's
    units, in any order and without those removed before, to the scores that are compared. With
    `among`, which names a class for every linear (by its name in the block), units are ranked
    within their class only, and each class loses the same share.
    """

    fn: Callable[..., Tensor] | Callable[..., Mapping[str, Tensor]]
    needs: tuple[str, ...] = ()
    level: Literal["linear", "block", "site", "residual"] = "linear"
    options: tuple[str, ...] = ()
    ranked: bool = False
    normalise: Callable[[Tensor], Tensor] | None = None
    among: Callable[[str], str] | None = None


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """One row of the table of allocations.

    `fn(request)` returns the share of units to remove by site, as exact fractions; the projector
    turns shares into counts. `needs` names what the fn reads: with "profile" there is a `profile`,
    and the plan derives a survey; with "probe" `rounds(num_sites, options)` says how many
    candidates each round of probing has, at most, and a round is a walk over the checkpoint.
    `rounds_for(request)` says the same where the target decides how many there are; no probe is
    called. `distances` are those that answers need besides KL. With `units` it decides about whole
    units, from channels to blocks, not about weights. `options` are numbers that a recipe may set,
    with their defaults. `min_keep` is the share of each site that a ranking leaves, unless the
    recipe says otherwise. A `judged` allocation is used only where its divergence from the dense
    model, on text it has not seen, is below that of equal shares.
    """

    fn: Callable[[Request], dict[str, Fraction]]
    needs: tuple[Literal["profile", "probe", "remeasure"], ...]
    paper: str
    profile: Profile | None = None
    rounds: Callable[[int, Mapping[str, float]], Sequence[int]] | None = None
    rounds_for: Callable[[Request], Sequence[int]] | None = None
    distances: tuple[str, ...] = ()
    units: bool = False
    options: Mapping[str, float] = field(default_factory=dict)
    min_keep: Fraction = Fraction(0)
    judged: bool = False
