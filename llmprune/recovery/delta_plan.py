"""What a delta will be made of: the wish, both checkpoints opened, what they have in common.

No weight is read.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from llmprune.base.errors import RecipeError
from llmprune.base.progress import human_bytes, human_count
from llmprune.base.text import named_lines
from llmprune.checkpoint.locate import open_source
from llmprune.checkpoint.skeleton import read_config
from llmprune.engine.opening import choose_device, open_blocks
from llmprune.recipe import recovery_recipe
from llmprune.recovery.deltas import DELTA_METHODS, check_amount
from llmprune.recovery.pairs import Pair, check_pair, eligible_tensors
from llmprune.walk.streamed import Streamed

if TYPE_CHECKING:
    from llmprune.recipe import Recipe

AUTO, ANALYTIC = "auto", "analytic"
ROWS = 8  # of calibration text, to look for q on


@dataclass(frozen=True, kw_only=True)
class DeltaWish:
    """What is asked for; `q` is a number, `auto` or `analytic`, of the method that looks for it."""

    model: str
    base: str
    method: str = "dare"
    sparsity: float = 0.9
    q: str | None = None
    calib: str | None = None
    seed: int = 0
    device: str = "auto"
    trust_remote_code: bool = False


@dataclass(frozen=True, kw_only=True)
class DeltaPlan:
    """Both checkpoints opened and found to fit; no weight is read."""

    wish: DeltaWish
    recipe: Recipe
    pair: Pair
    blocks: Streamed
    left_out: tuple[str, ...]

    def data(self) -> dict[str, Any]:
        """Return what would be done, for machines."""
        entries = [self.pair.tuned.entries[name] for name in sorted(self.pair.eligible)]
        size = sum(entry.num_bytes for entry in entries)
        params = sum(entry.num_params for entry in entries)
        rest = sum(self.pair.tuned.entries[name].num_bytes for name in self.pair.names) - size
        kept = (1 - self.wish.sparsity) * size
        return {
            **asdict(self.wish),
            "pruned_tensors": len(entries),
            "pruned_params": params,
            "pruned_bytes": size,
            "other_bytes": rest,
            "most_bytes": round(kept + params / 8 + rest),
            "left_out": list(self.left_out),
        }

    def __repr__(self) -> str:
        found, wish = self.data(), self.wish
        return named_lines(
            [
                ("model", f"{self.pair.tuned.name}, {human_bytes(self.pair.tuned.num_bytes)}"),
                ("base", self.pair.base.name),
                ("method", f"{wish.method}, sparsity {wish.sparsity:g}, seed {wish.seed}"),
                ("pruned", f"{found['pruned_tensors']} tensors of attention and FFN, "
                 f"{human_count(found['pruned_params'])} weights"),
                ("whole", f"{human_bytes(found['other_bytes'])} of others, where they differ"),
                ("result", f"{human_bytes(found['most_bytes'])} at most, masks not counted"),
            ]
        )  # fmt: skip


def plan_delta(wish: DeltaWish) -> DeltaPlan:
    """Open a fine-tuned model and its base; no weight is read.

    Raises:
        RecipeError: method, sparsity or q are not what they can be.
        CheckpointError: the two do not fit. UnsupportedModel: one is quantised, or no text decoder.
    """
    row = DELTA_METHODS[wish.method]
    if wish.q is not None and not row.searches:
        raise RecipeError(
            f"q: {wish.method} has no q. It is what darex-q divides by; type --method darex-q, or "
            "leave --q out."
        )
    check_amount(wish.sparsity, q_number(wish.q))
    text = {"calibration": {"data": wish.calib or AUTO, "num_samples": ROWS}, "seed": wish.seed}
    top = {**text, "trust_remote_code": wish.trust_remote_code}
    recipe = recovery_recipe(wish.model, {}, top)  # for its text; no step of it is taken
    tuned, base = open_source(wish.model), open_source(wish.base)
    read_config(base.folder, trust_remote_code=wish.trust_remote_code)
    device = choose_device(wish.device)
    blocks = open_blocks(tuned, recipe, device, torch.float32)
    names = tuple(sorted(tuned.entries.keys() - set(blocks.unused)))
    check_pair(tuned, base, names)
    pair = Pair(
        tuned=tuned,
        base=base,
        names=names,
        eligible=eligible_tensors(blocks),
        method=wish.method,
        sparsity=wish.sparsity,
        seed=wish.seed,
    )
    return DeltaPlan(wish=wish, recipe=recipe, pair=pair, blocks=blocks, left_out=blocks.unused)


def q_number(q: str | None) -> float | None:
    """Return the number that q is, None where it is to be looked for.

    Raises:
        RecipeError: it is neither.
    """
    if q in (None, AUTO, ANALYTIC):
        return None
    try:
        return float(str(q))
    except ValueError:
        raise RecipeError(
            f"q: {q!r} is no number. It is one from 1 - sparsity to 1, or a way to find it; type "
            "--q auto, or --q analytic for a number of each tensor's own."
        ) from None
