"""Small steps, measured again after each: blocks that hardly change what passes lose more.

Source: Pan et al., Adapt-Pruner.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction

from llmprune.allocation.fitting import fitted, option
from llmprune.allocation.influence import Residual, adapt_shares
from llmprune.allocation.types import Request


def by_adaptation(request: Request) -> dict[str, Fraction]:
    """Return the shares after `steps` steps towards the target, each on the pruned model as it is.

    In a step every block's share goes up by target / steps, less `spread` times its importance, the
    normalised similarity of its input and output. As shares do not fall below 0 their mean may
    drift; the shares are moved by one offset to the target at the end. Before the first step the
    profiles are of the dense model, later `request.remeasure` walks the model with its units
    masked.
    """
    steps = int(option(request, "steps", least=1))
    spread = option(request, "spread", most=1.0)
    target = float(request.target)
    names: dict[int, list[str]] = {}
    for site in request.sites:
        names.setdefault(site.block, []).append(site.name)
    shares = dict.fromkeys(names, 0.0)
    moved: Mapping[int, Residual] = {
        site.block: Residual.of(request.profiles[site.name]) for site in request.sites
    }
    for step in range(steps):
        if step:
            assert request.remeasure is not None
            found = request.remeasure(by_site(request, shares))
            moved = {block: Residual.of(sums) for block, sums in found.items()}
        cosines = [moved[block].cosine for block in names]
        after = adapt_shares(list(shares.values()), cosines, target / steps, spread)
        shares = dict(zip(names, after, strict=True))
    return fitted(request, {n: s for b, s in shares.items() for n in names[b]})


def by_site(request: Request, shares: Mapping[int, float]) -> dict[str, Fraction]:
    """Return a block's share for each of its sites, as a legal count: at least one unit stays."""
    found = {}
    for site in request.sites:
        count = min(round(shares[site.block] * site.num_units), site.num_units - 1)
        whole = count // site.num_groups * site.num_groups
        found[site.name] = Fraction(whole, site.num_units)
    return found
