"""The learning rate as a function of progress: a linear rise, then a decay."""

from __future__ import annotations

import math

STEADY = 0.2  # the last part of a run in which wsd falls
FLOOR = 0.0


def rate_factor(step: int, steps: int, decay: str, warm_up: float) -> float:
    """Return the share of the peak rate at an optimizer step, 0 <= step < steps.

    The rise reaches the peak after `warm_up` of all steps; `wsd` is steady and falls linearly over
    the last fifth.

    >>> [round(rate_factor(step, 10, "linear", 0.2), 3) for step in (0, 1, 2, 9)]
    [0.5, 1.0, 1.0, 0.125]
    """
    rising = round(warm_up * steps)
    if step < rising:
        return (step + 1) / rising
    left = (steps - step) / max(1, steps - rising)  # 1 at the peak, above 0 at the last step
    if decay == "constant":
        return 1.0
    if decay == "wsd":
        return min(1.0, (steps - step) / max(1.0, STEADY * steps))
    if decay == "cosine":
        return FLOOR + (1 - FLOOR) * (1 - math.cos(math.pi * left)) / 2
    return left
