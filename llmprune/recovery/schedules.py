"""How much is removed at which moment of training: pure functions of progress, as one table.

Progress p runs from 0, before the first optimizer step, to 1, before the last: masks change before
a step, so that every change is followed by training. A window (a, b) of progress maps to x in
[0, 1]; before a nothing more is removed than at the start, from b on exactly what was asked.
Legend: s sparsity, the fraction removed; d density, 1 - s.

Sources: Zhu and Gupta, To prune, or not to prune (cubic); Hubens et al., One-Cycle Pruning, and
fasterai; Jin et al., The Journey Matters (window and average density); Frankle and Carbin, The
Lottery Ticket Hypothesis; Pan et al., Adapt-Pruner; Bambhaniya et al., Progressive Gradient Flow
(staircase).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

from llmprune.base.errors import RecipeError
from llmprune.base.registry import Registry, unknown
from llmprune.mask.counts import exact_sparsity, round_half_up

KEY = "recover.schedule"
MIDDLE_HALF = (0.25, 0.75)  # The Journey Matters: of all compute, for runs of a billion tokens
FIRST_HALF = (0.0, 0.5)  # ours, for short runs: what is cut late is not repaired
SHARE = 0.2  # IMP: of the weights that are left, removed each round
_MOST = 500.0  # an option above it is a slip, and its exponential overflows
_NOISE = 1e-9  # 3 * (0.4 - 0.3) / (0.6 - 0.3) is a little more than 1
_PANELS = 4096

Window = tuple[float, float]
Stair = tuple[int, int]
Stairs = Literal["sparsify", "densify", "fine"]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """One row of the table of schedules.

    `fn(x, start, final, options)` returns the sparsity at x in [0, 1] of the window, where
    start < final; `sparsity_at` is what calls it. `window` is where masks move unless the recipe
    says otherwise, `options` are numbers above 0 that it may set, with their defaults.
    """

    fn: Callable[[float, float, float, Mapping[str, float]], float]
    summary: str
    paper: str = ""
    window: Window = FIRST_HALF
    options: Mapping[str, float] = field(default_factory=dict)


def _one_shot(x: float, start: float, final: float, options: Mapping[str, float]) -> float:
    return final


def _iterative(x: float, start: float, final: float, options: Mapping[str, float]) -> float:
    """Return the sparsity after equal steps: none at x = 0, the first just after."""
    rounds = options["rounds"]
    if rounds != int(rounds):
        raise RecipeError(
            f"{KEY}: {rounds:g} rounds of iterative pruning. It takes a whole number of them; type "
            f"rounds: {max(1, int(rounds))}."
        )
    return start + (final - start) * math.ceil(rounds * x - _NOISE) / rounds


def _linear(x: float, start: float, final: float, options: Mapping[str, float]) -> float:
    return start + (final - start) * x


def _cosine(x: float, start: float, final: float, options: Mapping[str, float]) -> float:
    return start + (final - start) * (1 - math.cos(math.pi * x)) / 2


def _cubic(x: float, start: float, final: float, options: Mapping[str, float]) -> float:
    return float(final + (start - final) * (1 - x) ** 3)


def _power(x: float, start: float, final: float, options: Mapping[str, float]) -> float:
    return float(final + (start - final) * (1 - x) ** options["exponent"])


def _geometric(x: float, start: float, final: float, options: Mapping[str, float]) -> float:
    """Return the sparsity where equal times remove equal shares of what is left."""
    return float(1 - (1 - start) * ((1 - final) / (1 - start)) ** x)


def _one_cycle(x: float, start: float, final: float, options: Mapping[str, float]) -> float:
    """Return a point of the logistic curve that is 1 at the end; at x = 0 it is not quite 0."""
    alpha, beta = options["alpha"], options["beta"]
    return start + (final - start) * (1 + math.exp(beta - alpha)) / (1 + math.exp(beta - alpha * x))


SCHEDULES: Registry[Schedule] = Registry(
    KEY,
    {
        "one-shot": Schedule(
            fn=_one_shot,
            summary="all at once, where the window begins",
            window=(0.0, 0.0),
        ),
        "iterative": Schedule(
            fn=_iterative,
            summary="a few equal steps",
            options={"rounds": 3.0},
            paper="Han et al., Learning both Weights and Connections for Efficient Neural Networks",
        ),
        "linear": Schedule(fn=_linear, summary="the same amount every time"),
        "cosine": Schedule(fn=_cosine, summary="half a cosine: slow, fast, slow"),
        "cubic": Schedule(
            fn=_cubic,
            summary="fast while much is redundant, then ever slower",
            paper="Zhu and Gupta, To prune, or not to prune: exploring the efficacy of pruning for "
            "model compression",
        ),
        "power": Schedule(
            fn=_power,
            summary="cubic with an exponent of choice: 1 is linear, the higher the earlier",
            options={"exponent": 3.0},
        ),
        "geometric": Schedule(
            fn=_geometric,
            summary="every time the same share of what is left",
            paper="Frankle and Carbin, The Lottery Ticket Hypothesis: Finding Sparse, Trainable "
            "Neural Networks",
        ),
        "one-cycle": Schedule(
            fn=_one_cycle,
            summary="a logistic curve over the whole run: slow, steep in the middle, slow",
            window=(0.0, 1.0),
            options={"alpha": 14.0, "beta": 6.0},
            paper="Hubens et al., One-Cycle Pruning: Pruning ConvNets Under a Tight Training "
            "Budget",
        ),
    },
)


def sparsity_at(
    schedule: str,
    progress: float,
    *,
    start: float = 0.0,
    final: float,
    window: Window | None = None,
    options: Mapping[str, float] | None = None,
) -> float:
    """Return the sparsity that a schedule asks for at a progress, which may lie outside [0, 1].

    It is `start` before the window and exactly `final` from its end on.

    Raises:
        UnknownName: no such schedule, or it has no such option.
        RecipeError: a sparsity, the window or an option is out of range.

    >>> [round(sparsity_at("cubic", p, final=0.5, window=(0, 1)), 5) for p in (0, 0.25, 0.5, 1)]
    [0.0, 0.28906, 0.4375, 0.5]
    """
    _check_sparsities(start, final)
    row, (begin, end), own = _checked(schedule, window, options)
    if progress >= end:
        return final
    if progress < begin or start == final:
        return start
    found = row.fn((progress - begin) / (end - begin), start, final, own)
    return min(max(found, start), final)


def progress_of(step: int, total: int) -> float:
    """Return the progress before an optimizer step: 0 before the first, 1 before the last.

    >>> [progress_of(step, 5) for step in range(5)], progress_of(0, 1)
    ([0.0, 0.25, 0.5, 0.75, 1.0], 1.0)
    """
    return step / (total - 1) if total > 1 else 1.0


def update_steps(total: int, every: int, window: Window) -> tuple[int, ...]:
    """Return the optimizer steps, of 0 to total - 1, before which masks are decided anew.

    They are `every` steps apart from the first in the window on, and the last is the first whose
    progress has come to the window's end, wherever that falls.

    Raises:
        RecipeError: no steps, a distance below 1, or no window.

    >>> update_steps(11, 4, (0.0, 1.0)), update_steps(101, 15, (0.25, 0.6))
    ((0, 4, 8, 10), (25, 40, 55, 60))
    """
    if total < 1 or every < 1:
        raise RecipeError(
            f"{KEY}: masks every {every} of {total} steps. Both must be at least 1; type for "
            "example steps: 400 and every: 10."
        )
    begin, end = (_first_step(edge, total) for edge in _checked_window(window))
    return (*range(begin, end, every), end)


def counts_by_step(
    schedule: str,
    total: int,
    every: int,
    *,
    num: int,
    start: float = 0.0,
    final: float,
    window: Window | None = None,
    options: Mapping[str, float] | None = None,
) -> dict[int, int]:
    """Return, by optimizer step, how many of `num` weights or units are removed from then on.

    Steps at which the count is what it was are left out, as are those that remove nothing yet. The
    last is `final` of `num`, rounded as everywhere: to the nearest, halves up.

    Raises:
        UnknownName, RecipeError: as `sparsity_at` and `update_steps`.

    >>> counts_by_step("linear", 9, 1, num=4, final=0.5, window=(0, 1))
    {2: 1, 6: 2}
    """
    _check_sparsities(start, final)
    window = _checked(schedule, window, options)[1]
    found: dict[int, int] = {}
    before = _count(start, num)
    for step in update_steps(total, every, window):
        at = progress_of(step, total)
        share = sparsity_at(schedule, at, start=start, final=final, window=window, options=options)
        count = _count(share, num)
        if count > before:
            found[step] = before = count
    return found


def average_density(
    schedule: str,
    *,
    start: float = 0.0,
    final: float,
    window: Window | None = None,
    options: Mapping[str, float] | None = None,
) -> float:
    """Return the mean of 1 - s over the run: of the parameters that a step trains, the share.

    The Journey Matters predicts a loss from it as from the size of a dense model. Integrated by
    the midpoint rule; of cubic it is a + (b - a)(1 - 3/4 s) + (1 - b)(1 - s), to seven digits.

    Raises:
        UnknownName, RecipeError: as `sparsity_at`.

    >>> round(average_density("cubic", final=0.5, window=MIDDLE_HALF), 5)
    0.6875
    """
    _check_sparsities(start, final)
    row, (begin, end), own = _checked(schedule, window, options)
    inside = final
    if start < final:
        middles = ((panel + 0.5) / _PANELS for panel in range(_PANELS))
        inside = math.fsum(row.fn(x, start, final, own) for x in middles) / _PANELS
    return 1 - (begin * start + (end - begin) * inside + (1 - end) * final)


def compute_window(final: float, compute: Window = MIDDLE_HALF) -> Window:
    """Return the window of steps in which a cubic run from dense spends a window of compute.

    For kernels whose steps cost their density. With masked dense matrices every step costs the
    same, and the window of steps is that of compute.

    Raises:
        RecipeError: nothing would be left, or no window.

    >>> [round(edge, 5) for edge in compute_window(0.5)]
    [0.16129, 0.67742]
    """
    begin, end = _checked_window(compute)
    _check_sparsities(0.0, final)
    if final == 1:
        raise RecipeError(
            f"{KEY}: a sparsity of 1 leaves nothing to compute. Type for example 0.5."
        )
    mean = 1 / (begin + (end - begin) / (1 - 0.75 * final) + (1 - end) / (1 - final))
    return begin * mean, 1 - (1 - end) * mean / (1 - final)


def survivors(rounds: float, share: float = SHARE) -> float:
    """Return the density after rounds of iterative magnitude pruning, each of which takes a share.

    Raises:
        RecipeError: not 0 < share < 1.

    Source: Frankle and Carbin.

    >>> [round(1 - survivors(rounds), 5) for rounds in (1, 3, 5, 10)]
    [0.2, 0.488, 0.67232, 0.89263]
    """
    _check_share(share)
    return float((1 - share) ** rounds)


def rounds_to(final: float, share: float = SHARE) -> float:
    """Return how many rounds lead from dense to a sparsity, as a number to be rounded up.

    Rounded up, the schedule "geometric" takes that many equal shares and ends at `final` exactly.

    Raises:
        RecipeError: not 0 < share < 1, or a sparsity of 1, to which no number of rounds leads.

    >>> round(rounds_to(0.5), 3), round(rounds_to(0.9), 2)
    (3.106, 10.32)
    """
    _check_share(share)
    _check_sparsities(0.0, final)
    if final == 1:
        raise RecipeError(f"{KEY}: no number of rounds leads to 1. Type for example 0.9.")
    return math.log1p(-final) / math.log1p(-share)


def stage_targets(before: int, after: int, stages: int) -> tuple[int, ...]:
    """Return the number of parameters that each of equal stages of cutting and training leaves.

    Raises:
        RecipeError: no stage, or more parameters after than before.

    Source: Pan et al., Adapt-Pruner (20 stages).

    >>> stage_targets(100, 50, 4)
    (88, 75, 63, 50)
    """
    if stages < 1 or not 0 <= after <= before:
        raise RecipeError(
            f"{KEY}: {stages} stages from {before} to {after} parameters. It takes 1 stage or more "
            "and fewer parameters in the end; type for example stages: 20."
        )
    return tuple(
        round_half_up(before - Fraction((before - after) * stage, stages))
        for stage in range(1, stages + 1)
    )


def stairs(kept: int, of: int, kind: Stairs = "sparsify") -> tuple[Stair, ...]:
    """Return the N:M patterns through which a run comes to the one asked, that one last.

    "sparsify" keeps fewer each time, from M - 1 of M by halves; "densify" keeps N of 8M, 4M, 2M;
    "fine" has the density of the end from the start, in groups of 8M, 4M, 2M. Rows of weights must
    divide into the largest group, and only "sparsify" never brings weights back.

    Raises:
        RecipeError: no such kind, or not 0 < N < M.

    Source: Bambhaniya et al., structure decay.

    >>> stairs(1, 8), stairs(2, 4, "densify")
    (((7, 8), (4, 8), (2, 8), (1, 8)), ((2, 32), (2, 16), (2, 8), (2, 4)))
    """
    if not 0 < kept < of:
        raise RecipeError(
            f"{KEY}: {kept}:{of} keeps nothing or everything. Of every M weights N stay, fewer "
            "than M; type for example 2:4."
        )
    match kind:
        case "sparsify":
            halvings = (of // kept).bit_length() - 1  # the whole part of log2(M / N)
            first = [(of - 1, of)] if halvings else []
            lower = [(of >> halving, of) for halving in range(1, halvings)]
            return tuple(dict.fromkeys([*first, *lower, (kept, of)]))
        case "densify":
            return tuple((kept, of * factor) for factor in (8, 4, 2, 1))
        case "fine":
            return tuple((kept * factor, of * factor) for factor in (8, 4, 2, 1))
        case _:
            raise unknown(KEY, kind, ("sparsify", "densify", "fine"))


def staircase(progress: float, kept: int, of: int, kind: Stairs = "sparsify") -> Stair:
    """Return the (N, M) in force at a progress; every pattern of `stairs` has an equal part.

    Raises:
        RecipeError: no such kind, or not 0 < N < M.

    >>> [staircase(progress, 2, 4) for progress in (0.0, 0.49, 0.5, 1.0)]
    [(3, 4), (3, 4), (2, 4), (2, 4)]
    """
    frames = stairs(kept, of, kind)
    reached = math.floor(min(max(progress, 0.0), 1.0) * len(frames) + _NOISE)
    return frames[min(reached, len(frames) - 1)]


def _first_step(edge: float, total: int) -> int:
    """Return the first step whose progress has reached an edge, in decimal arithmetic."""
    return math.ceil(Fraction(str(edge)) * (total - 1)) if total > 1 else 0


def _count(sparsity: float, num: int) -> int:
    return round_half_up(exact_sparsity(sparsity) * num)


def _checked(
    schedule: str, window: Window | None, options: Mapping[str, float] | None
) -> tuple[Schedule, Window, dict[str, float]]:
    """Return the row, the window asked for or its own, and its options."""
    row = SCHEDULES[schedule]
    window = _checked_window(row.window if window is None else window)
    return row, window, _checked_options(row, options or {})


def _checked_window(window: Window) -> Window:
    begin, end = window
    if not 0 <= begin <= end <= 1:
        raise RecipeError(
            f"{KEY}: ({begin}, {end}) is no window. It begins and ends at shares of the run, "
            "0 <= begin <= end <= 1; type for example window: [0, 0.5]."
        )
    return begin, end


def _checked_options(row: Schedule, options: Mapping[str, float]) -> dict[str, float]:
    for name, value in options.items():
        if not row.options:
            raise RecipeError(
                f"{KEY}.options: {name!r} is not known, as this schedule has no options. Leave it "
                "out, or choose a schedule that has some: iterative, power, one-cycle."
            )
        if name not in row.options:
            raise unknown(f"{KEY}.options", name, row.options)
        if not 0 < value <= _MOST:
            raise RecipeError(
                f"{KEY}.options.{name}: {value} is out of range. It must be above 0 and at most "
                f"{_MOST:g}; type for example {name}: {row.options[name]:g}."
            )
    return {**row.options, **options}


def _check_sparsities(start: float, final: float) -> None:
    if not 0 <= start <= final <= 1:
        raise RecipeError(
            f"{KEY}: from sparsity {start} to {final}. What was removed stays removed, and "
            "sparsity is a share: 0 <= start <= final <= 1; type for example 0 to 0.5."
        )


def _check_share(share: float) -> None:
    if not 0 < share < 1:
        raise RecipeError(
            f"{KEY}: a round cannot remove {share} of what is left. It takes a share between 0 and "
            f"1; type {SHARE}."
        )
