"""What is wrong with a wish for masks that move: what neither pattern nor method can do."""

from __future__ import annotations

import math

from llmprune.arch.couplings import EXPERTS
from llmprune.base.errors import RecipeError, UnknownName
from llmprune.catalog import METHODS
from llmprune.mask.pattern import NofM, Tiles, Units, Unstructured, parse_pattern
from llmprune.recipe import PruneStep, RecoverStep
from llmprune.recovery.fading import FADES
from llmprune.solver import COMPENSATIONS


def check_units(name: str, wish: RecoverStep) -> None:
    """Check what a method that removes units by itself is asked for.

    Raises:
        RecipeError: nothing is to be removed, or masks are to move otherwise.
    """
    if wish.prune is None:
        raise RecipeError(
            f"recover.method: {name} removes units while it trains, and recover.prune says nothing "
            "of how many. Add `prune: {pattern: ffn-channels+heads, sparsity: 0.3}` to the step, "
            "or type --method mask-lora."
        )
    moving = {"regrow": wish.regrow, "soft": wish.soft, "fade": wish.fade}
    moving |= {"rewind": None if wish.rewind == "none" else wish.rewind}
    if given := [key for key, value in moving.items() if value]:
        raise RecipeError(
            f"recover.{given[0]}: {name} removes units by what its adapters learn, at once and for "
            "good. Leave it out, or type --method full."
        )


def check_pattern(wish: RecoverStep, prune: PruneStep) -> None:
    """Check that what goes while weights are trained can be zeros in their place.

    Raises:
        RecipeError: it cannot, or single weights would move in a pattern of whole tiles or units.
    """
    pattern = parse_pattern(prune.pattern)
    for key, value in (("regrow", wish.regrow), ("soft", wish.soft)):
        if value and isinstance(pattern, Tiles | Units):
            raise RecipeError(
                f"recover.{key}: it moves single weights, and the pattern is {prune.pattern}. "
                "Leave it out, or type --set recover.prune.pattern=unstructured."
            )
    if not isinstance(pattern, Units):
        return
    if pattern.whole or EXPERTS in pattern.kinds:
        raise RecipeError(
            f"recover.prune.pattern: zeros cannot stand for {prune.pattern} that are gone, and "
            "tensors keep their shapes while they are trained. Remove them in a prune step of "
            "their own, before or after."
        )
    solver = prune.solver or METHODS[prune.method].solver
    if solver in COMPENSATIONS and COMPENSATIONS[solver].bias:
        raise RecipeError(
            f"recover.prune.solver: {solver}, which {prune.method} takes, adds biases that the "
            "model may not have, and training stands for them. Type --set "
            "recover.prune.solver=zero."
        )


def check_fade(wish: RecoverStep, fade: str) -> None:
    """Check what is to fade, and how.

    Raises:
        UnknownName: an option that fading has not.
        RecipeError: an option is out of range, or units cannot fade, or weights be pulled.
    """
    assert wish.prune is not None
    pattern = parse_pattern(wish.prune.pattern)
    if fade == "pull" and isinstance(pattern, Unstructured | NofM | Tiles):
        raise RecipeError(
            f"recover.fade: a pull is on whole units, and the pattern is {wish.prune.pattern}. "
            "Type --set recover.fade=march, or --set recover.prune.pattern=ffn-channels."
        )
    if isinstance(pattern, Units) and pattern.deep:
        raise RecipeError(
            f"recover.fade: {wish.prune.pattern} go with their biases, which would stay as they "
            "are. Type --set recover.prune.pattern=ffn-channels+heads, or leave fade out."
        )
    for name, value in wish.options.items():
        if name not in FADES[fade]:
            known = ", ".join(FADES[fade]) or "none"
            raise UnknownName(
                f"recover.options: {name!r} is no option of fade: {fade}, which has {known}. "
                "Leave it out."
            )
        if not 0 <= value < math.inf:
            raise RecipeError(
                f"recover.options.{name}: {value:g} is no length. It is at least 0; type for "
                f"example {name}: {FADES[fade][name]:g}."
            )
