"""How much must go for a token to take no longer than asked: measured here, before anything is cut.

A token takes the trunk and all blocks. Of sizes, a few equal shares are measured as single blocks;
between these, time is taken to be linear in the weights that go. What is then chosen is measured as
well, and more goes where it is still too slow. A block that goes whole takes its time with it.
Every time is compared with the dense block's of the same measurement.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from llmprune.arch.couplings import BLOCK, EXPERTS, WIDTHS
from llmprune.arch.limits import longest_sequence
from llmprune.base.errors import LlmpruneError, RecipeError
from llmprune.engine.budgets import Budget, check_share, check_shrinks, target_of
from llmprune.engine.parts import options_for
from llmprune.engine.unit_amounts import allocate_units
from llmprune.evaluation.latency import latency_table, trunk_latency
from llmprune.mask.counts import exact_sparsity
from llmprune.recipe.targets import LATENCY, amount_of

if TYPE_CHECKING:
    import torch

    from llmprune.arch.types import Site
    from llmprune.engine.shapes import Anatomies
    from llmprune.engine.sites import Group
    from llmprune.recipe.pruning import PruneStep

GRID = (0.0, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9)
ROUGH, FINE = 7, 25  # timed rounds of the grid, and of what is chosen
ROUNDS = 6  # choices that are measured
UNIFORM = "uniform"

Counts = Mapping[str, int]
Clock = Callable[[Sequence[Counts], int], list[float]]


class Found(NamedTuple):
    """The weights that go at least, and the seconds of a token before and after.

    `unsteady` is by how much of a dense token's time measurements contradict each other.
    """

    asked: int
    dense: float
    expected: float
    unsteady: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Machine:
    """On what, and how, a token is timed: sequences at once, and tokens before it."""

    config: Any
    device: torch.device
    dtype: torch.dtype
    batch: int
    prompt: int
    trust_remote_code: bool = False

    def blocks(self, index: int, sizes: Sequence[Mapping[str, int]], repeat: int) -> list[float]:
        """Return the seconds of one block with other sizes."""
        return latency_table(
            *(self.config, sizes),
            device=self.device,
            dtype=self.dtype,
            batch=self.batch,
            prompt=self.prompt,
            block=index,
            repeat=repeat,
            trust_remote_code=self.trust_remote_code,
        )

    def trunk(self) -> float:
        """Return the seconds of what is around the blocks."""
        return trunk_latency(
            self.config,
            device=self.device,
            dtype=self.dtype,
            batch=self.batch,
            prompt=self.prompt,
            trust_remote_code=self.trust_remote_code,
        )

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        several = "1 sequence" if self.batch == 1 else f"{self.batch} sequences"
        return f"{self.device} in {dtype}, {several}, {self.prompt} tokens before it"


def machine_of(
    step: PruneStep, config: Any, device: torch.device, dtype: torch.dtype, trust: bool
) -> Machine:
    """Return how the recipe wants a token timed: after no more tokens than the model takes.

    Raises:
        RecipeError: a number below 1.
    """
    given = options_for(step.options, LATENCY)
    for name, value in given.items():
        if value < 1 or value != int(value):
            raise RecipeError(
                f"prune.options.{name}: {value:g} is no whole number above 0. Type --set "
                f"prune.options.{name}={LATENCY[name]:g}."
            )
    prompt, longest = int(given["latency_prompt"]), longest_sequence(config)
    if "latency_prompt" not in step.options and longest is not None:
        prompt = min(prompt, longest - 1)
    return Machine(
        config=config,
        device=device,
        dtype=dtype,
        batch=int(given["latency_batch"]),
        prompt=prompt,
        trust_remote_code=trust,
    )


def time_budget(
    step: PruneStep,
    allocation: str,
    groups: Sequence[Sequence[Group]],
    anatomies: Anatomies,
    eligible: int,
    machine: Machine,
) -> Budget:
    """Return how many weights go at least so that a token takes the asked share of its time.

    Raises:
        RecipeError: the time of what would be left cannot be told beforehand, or even with the
            most that may go it is above what is asked.
    """
    key, text = target_of(step)
    share = float(exact_sparsity(amount_of(key, text)[1]))
    sites = [site for here in groups for group in here for site in group.sites]
    deep = _check_kinds(step, allocation, sites)
    check_shrinks(step, key)
    start = time.perf_counter()
    kinds = _kinds_of(anatomies, machine.config)
    trunk = machine.trunk()
    if deep:
        found = _blocks(step, sites, kinds, machine, trunk, share)
    else:
        clock = _clock(groups, kinds, machine, trunk)
        found = _widths(step, sites, clock, share, machine)
    asked, dense = found.asked, found.dense
    check_share(step, asked / eligible)
    facts = {
        "dense": dense,
        "expected": found.expected,
        "unsteady": round(found.unsteady, 3),
        "trunk": trunk,
        "on": str(machine),
        "seconds": round(time.perf_counter() - start, 1),
    }
    return Budget(asked=asked, weights=asked, whole=dense, most=share * dense, facts=facts)


def _check_kinds(step: PruneStep, allocation: str, sites: Sequence[Site]) -> bool:
    """Check that the sizes of what is left are known; tell whether whole blocks go.

    Raises:
        RecipeError: they are not; says why.
    """
    kinds = {site.kind for site in sites}
    if kinds == {BLOCK}:
        return True
    why = ""
    if not kinds <= set(WIDTHS):
        why = f"which parts of {step.pattern} go, and so how long the rest takes, is decided later"
    elif EXPERTS in kinds:
        why = "a token runs through as many experts as before, however many there are"
    elif allocation != UNIFORM:
        why = f"allocation {allocation} gives blocks sizes that are only known later"
    if why:
        raise RecipeError(
            f"prune.target: latency is measured before anything is cut, and {why}. Type --pattern "
            "ffn-channels+heads with --set prune.allocation=uniform, or --pattern blocks."
        )
    return False


def _kinds_of(anatomies: Anatomies, config: Any) -> list[list[int]]:
    """Return the blocks that take equally long: of equal shapes, and one kind of attention."""
    text = config.get_text_config(decoder=True)
    types = getattr(text, "layer_types", None) or [""] * len(anatomies.shapes)
    found: dict[object, list[int]] = {}
    for index, shapes in enumerate(anatomies.shapes):
        found.setdefault((tuple(sorted(shapes.items())), types[index]), []).append(index)
    return list(found.values())


def _clock(
    groups: Sequence[Sequence[Group]],
    kinds: Sequence[Sequence[int]],
    machine: Machine,
    trunk: float,
) -> Clock:
    """Return what tells the seconds of a token for counts of removed units; all of a kind of block
    lose the same."""

    def seconds(candidates: Sequence[Counts], repeat: int) -> list[float]:
        totals = [trunk] * len(candidates)
        for kind in kinds:
            sizes = [_sizes(groups[kind[0]], counts) for counts in candidates]
            for place, each in enumerate(machine.blocks(kind[0], sizes, repeat)):
                totals[place] += len(kind) * each
        return totals

    return seconds


def _sizes(groups: Sequence[Group], counts: Counts) -> dict[str, int]:
    """Return the entries of the config that count what is left of a block."""
    sizes: dict[str, int] = {}
    for group in groups:
        (site,) = group.sites
        gone = counts[site.name]
        for key, per_unit in group.coupling.config_keys if group.coupling and gone else ():
            sizes[key] = per_unit * (site.num_units - gone)
        if group.coupling is not None and gone:
            sizes |= dict(group.coupling.pinned)
    return sizes


def _widths(
    step: PruneStep, sites: Sequence[Site], clock: Clock, share: float, machine: Machine
) -> Found:
    """Return what must go of every kind of unit.

    Raises:
        RecipeError: with the most that can go a token takes longer.
    """
    total = sum(site.num_weights for site in sites)
    known = _legal_path(step, sites, [math.ceil(part * total) for part in GRID])
    dense, *times = clock(list(known.values()), ROUGH)
    ratios = dict(zip(known, [1.0, *(taken / dense for taken in times)], strict=True))
    unsteady = max(abs(ratios[gone] - each) for gone, each in falling(ratios).items())
    gone, sure = 0, {0: 1.0}
    for _ in range(ROUNDS):
        if min(falling(ratios).values()) > share:
            break
        aim = max(crossing(falling(ratios), share), gone + 1)
        ((gone, counts),) = _legal_path(step, sites, [aim]).items()
        before, after = clock([known[0], counts], FINE)
        ratios[gone] = sure[gone] = after / before
        if sure[gone] <= share:
            return Found(gone, dense, sure[gone] * dense, unsteady)
    raise _unreachable(step, ratios, total, dense, machine)


def _legal_path(
    step: PruneStep, sites: Sequence[Site], asked: Sequence[int]
) -> dict[int, dict[str, int]]:
    """Return the counts of equal shares by the weights that go, for as many as can go."""
    found = {}
    for each in asked:
        budget = Budget(asked=each, weights=each)
        try:
            counts = allocate_units(step, UNIFORM, sites, budget)
        except LlmpruneError:
            if len(asked) == 1:
                raise
            break  # what stays of every site is more
        assert counts is not None
        found[sum(counts[site.name] * site.unit_cost for site in sites)] = counts
    return found


def falling(ratios: Mapping[int, float]) -> dict[int, float]:
    """Return the times as never rising with what goes, nearest to those measured.

    Source: the pool-adjacent-violators algorithm.

    >>> falling({0: 1.0, 10: 0.6, 20: 0.8, 30: 0.5})
    {0: 1.0, 10: 0.7, 20: 0.7, 30: 0.5}
    """
    pools: list[tuple[float, int]] = []
    for gone in sorted(ratios):
        mean, size = ratios[gone], 1
        while pools and pools[-1][0] < mean:
            last, many = pools.pop()
            mean, size = (mean * size + last * many) / (size + many), size + many
        pools.append((mean, size))
    flat = [mean for mean, size in pools for _ in range(size)]
    return dict(zip(sorted(ratios), flat, strict=True))


def crossing(ratios: Mapping[int, float], share: float) -> int:
    """Return where times that fall reach a share, between two that were measured.

    >>> crossing({0: 1.0, 100: 0.8, 200: 0.6}, 0.7)
    150
    """
    if next(iter(ratios.values())) <= share:
        return next(iter(ratios))
    for (low, slow), (high, fast) in pairwise(ratios.items()):
        if fast <= share:
            return math.ceil(round(low + (high - low) * (slow - share) / (slow - fast), 6))
    return max(ratios)


def _blocks(
    step: PruneStep,
    sites: Sequence[Site],
    kinds: Sequence[Sequence[int]],
    machine: Machine,
    trunk: float,
    share: float,
) -> Found:
    """Return the weights of as many blocks as must go, whichever they are: the fastest, and the
    largest."""
    each = {index: seconds for kind in kinds for seconds in machine.blocks(kind[0], [{}], FINE)
            for index in kind}  # fmt: skip
    dense = trunk + sum(each.values())
    left, gone = dense, 0
    for seconds in sorted(each[site.block] for site in sites)[: len(each) - 1]:
        if left <= share * dense:
            break
        left, gone = left - seconds, gone + 1
    if left > share * dense:
        raise _unreachable(step, {0: 1.0, 1: left / dense}, 1, dense, machine)
    costs = sorted((site.unit_cost for site in sites), reverse=True)
    return Found(sum(costs[:gone]), dense, left)


def _unreachable(
    step: PruneStep, ratios: Mapping[int, float], total: int, dense: float, machine: Machine
) -> RecipeError:
    """Say how fast a token can become."""
    text = target_of(step)[1]
    gone, best = list(falling(ratios).items())[-1]
    what = f"without {gone / total:.0%} of {step.pattern}" if total > 1 else "with one block left"
    near = math.ceil(best * 100) / 100
    offer = f"Ask for --target latency={near:g}x" if near < 1 else "Ask for --target params=0.8x"
    left = f"{best:.0%} are left" if best < 1 else "nothing is saved"
    deeper = "" if step.pattern == "blocks" else ", or take --pattern blocks"
    return RecipeError(
        f"prune.target: latency={text} cannot be reached: of {1000 * dense:.3g} ms for a token on "
        f"{machine}, {left} {what}. {offer}{deeper}."
    )
