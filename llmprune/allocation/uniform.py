"""The allocation that treats all sites alike."""

from __future__ import annotations

from fractions import Fraction

from llmprune.allocation.types import Probe, Profiles


def same_share(
    profiles: Profiles, target: Fraction, probe: Probe | None = None
) -> dict[str, Fraction]:
    """Return the target itself for every site; neither profiles nor probe are read.

    >>> same_share({"q": None, "k": None}, Fraction(1, 2))
    {'q': Fraction(1, 2), 'k': Fraction(1, 2)}
    """
    return dict.fromkeys(profiles, target)
