"""From a wish to masks that move: which cuts a training run makes, and with what."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from llmprune.engine.opening import anatomies_of
from llmprune.mask.pattern import NofM, Units, parse_pattern
from llmprune.recipe import PruneStep, RecoverStep
from llmprune.recovery.adapter_units import removal_by_adapters
from llmprune.recovery.attaching import Trainee
from llmprune.recovery.fading import FADES, Fade
from llmprune.recovery.planning import STAIRCASE, RecoverPlan
from llmprune.recovery.regrowth import REGROWTHS
from llmprune.recovery.schedules import (
    FIRST_HALF,
    SCHEDULES,
    progress_of,
    sparsity_at,
    stairs,
    update_steps,
)
from llmprune.recovery.shaping import Cut, Moves, Shaping, rewound_cuts
from llmprune.recovery.soft import SOFT_MASKS
from llmprune.walk.resident import Resident

if TYPE_CHECKING:
    from torch import Tensor


def shaping_of(plan: RecoverPlan, trainee: Trainee, blocks: Resident, cut: Cut) -> Moves | None:
    """Return what moves the masks of a run; none where they stay."""
    wish = plan.wish
    if wish.prune is None:
        return None
    if plan.row.units:
        return removal_by_adapters(wish, anatomies_of(plan.blocks), trainee)
    linears: dict[str, list[Any]] = {}
    for index in range(len(blocks)):
        prefix = f"{blocks.family.blocks}.{index}."
        for linear in blocks.anatomy(index).linears.values():
            linears.setdefault(prefix + linear.param, []).append(linear)
    needs_first = wish.rewind == "weights" or (wish.regrow and wish.grow_from == "dense")
    soft = SOFT_MASKS[wish.soft] if wish.soft else None
    return Shaping(
        trainee=trainee,
        linears=linears,
        steps=wish.steps,
        cuts=cuts_of(wish, wish.prune),
        cut=cut,
        every=wish.every,
        seed=plan.recipe.seed,
        pattern=parse_pattern(wish.prune.pattern),
        regrow=REGROWTHS[wish.regrow] if wish.regrow else None,
        grow_from=wish.grow_from,
        soft=soft,
        fade=fade_of(wish, wish.prune, trainee, blocks),
        options=dict(soft.options) | wish.options if soft else {},
        sparsity=sparsity_of(wish, wish.prune),
        rewind=wish.rewind,
        first={name: p.data.clone() for name, p in trainee.params.items()} if needs_first else {},
    )


def fade_of(wish: RecoverStep, prune: PruneStep, trainee: Trainee, blocks: Resident) -> Fade | None:
    """Return what fades, if anything does."""
    if wish.fade is None:
        return None
    pattern, (begin, end) = parse_pattern(prune.pattern), fade_window(wish)
    prefix = blocks.family.blocks
    return Fade(
        how=wish.fade,
        params=trainee.params,
        blocks=[(f"{prefix}.{index}.", blocks.anatomy(index)) for index in range(len(blocks))],
        kinds=pattern.kinds if isinstance(pattern, Units) else (),
        begin=begin,
        end=end,
        options=FADES[wish.fade] | wish.options,
    )


def fade_window(wish: RecoverStep) -> tuple[int, int]:
    """Return the steps before which a mask is decided and comes into force.

    >>> fade_window(RecoverStep(steps=21, fade="march")), fade_window(RecoverStep(window=(0, 1)))
    ((0, 10), (0, 399))
    """
    steps = update_steps(wish.steps, 1, wish.window or FIRST_HALF)
    return steps[0], steps[-1]


def cuts_of(wish: RecoverStep, prune: PruneStep) -> dict[int, Mapping[str, Any]]:
    """Return before which steps a run cuts, and how: keys of the wish that differ each time."""
    pattern, steps = parse_pattern(prune.pattern), wish.steps
    if wish.fade is not None:
        return {fade_window(wish)[0]: {}}
    if wish.rewind != "none" and not isinstance(pattern, NofM):
        geometric = wish.schedule != "linear"
        return dict(rewound_cuts(steps, wish.rounds, prune.sparsity, geometric=geometric))
    if isinstance(pattern, NofM):
        frames = [(pattern.n, pattern.m)]
        if wish.schedule == STAIRCASE:
            frames = list(stairs(pattern.n, pattern.m))
        begin, end = wish.window or (0.0, 0.5)
        places = [begin + (end - begin) * i / len(frames) for i in range(len(frames))]
        return {
            round(place * (steps - 1)): {"pattern": f"{n}:{m}"}
            for place, (n, m) in zip(places, frames, strict=True)
        }
    window = wish.window or SCHEDULES[wish.schedule].window
    share, before = sparsity_of(wish, prune), 0.0
    found: dict[int, Mapping[str, Any]] = {}
    for step in update_steps(steps, wish.every, window):
        amount = share(progress_of(step, steps))
        if amount > before:
            found[step] = {"sparsity": amount}
            before = amount
    return found


def sparsity_of(wish: RecoverStep, prune: PruneStep) -> Callable[[float], float]:
    """Return the sparsity by progress."""
    if wish.schedule == STAIRCASE or isinstance(parse_pattern(prune.pattern), NofM):
        return lambda progress: prune.sparsity
    options = {} if wish.soft or wish.fade else dict(wish.options)

    def at(progress: float) -> float:
        return sparsity_at(
            wish.schedule, progress, final=prune.sparsity, window=wish.window, options=options
        )

    return at


def keeps_by_param(
    masks: Mapping[str, Tensor], trainee: Trainee, blocks: Resident
) -> dict[str, Tensor]:
    """Return masks by parameter from packed ones by linear."""
    import torch

    from llmprune.mask.packed import unpack

    found: dict[str, Tensor] = {}
    for index in range(len(blocks)):
        prefix = f"{blocks.family.blocks}.{index}."
        for name, linear in blocks.anatomy(index).linears.items():
            bits = masks.get(prefix + name)
            param = prefix + linear.param
            if bits is None or param not in trainee.params:
                continue
            if param not in found:
                found[param] = torch.ones_like(trainee.params[param], dtype=torch.bool)
            linear.view(found[param]).copy_(unpack(bits, linear.shape))
    return found


def keeps_by_linear(keeps: Mapping[str, Tensor], blocks: Resident, index: int) -> dict[str, Tensor]:
    """Return the masks of a block by the full names of its linears."""
    prefix = f"{blocks.family.blocks}.{index}."
    return {
        prefix + name: linear.view(keeps[prefix + linear.param])
        for name, linear in blocks.anatomy(index).linears.items()
        if prefix + linear.param in keeps
    }
