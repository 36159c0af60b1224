"""Whether a recovery has a teacher: the dense model that the pruned one was made from."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from llmprune.base.errors import CheckpointError, RecipeError
from llmprune.base.progress import human_bytes
from llmprune.checkpoint.source import Source
from llmprune.engine.opening import open_blocks, open_origin
from llmprune.recipe import Recipe, RecoverStep
from llmprune.recovery.distillation import DISTILLATIONS
from llmprune.recovery.objective import kinds_of
from llmprune.recovery.teacher import Outputs, teacher_bytes
from llmprune.walk.streamed import Streamed

AUTO, NONE, USUAL = "auto", "none", "kl"


def settled(wish: RecoverStep, why_not: str) -> RecoverStep:
    """Return a wish that says whether the dense model teaches; not where there is a reason.

    Raises:
        UnknownName, RecipeError: what is asked for is none, or does not go together.
    """
    asked = wish.distill
    if asked == AUTO:
        asked = None if why_not else USUAL
    elif asked == NONE:
        asked = None
    elif asked is not None:
        kinds_of(asked)
    return wish.model_copy(update={"distill": asked})


def why_untaught(
    wish: RecoverStep,
    source: Source,
    recipe: Recipe,
    own: Streamed,
    *,
    pruned: bool,
    out: Path,
    num_tokens: int,
) -> str:
    """Return why the dense model does not teach where nothing is asked; empty where it does.

    It has to lie where it was and to know the same tokens, and what it says of `num_tokens` to take
    less than half of the disk that is left. Where training itself removes weights it does not
    teach, because the published schedules learn from text alone.
    """
    if wish.distill != AUTO:
        return ""
    if not pruned:
        return "the model was not pruned"
    if wish.prune is not None:
        return "training removes weights; --set recover.distill=kl asks for one"
    dense = open_origin(source, recipe, torch.float32)
    if dense is None:
        return "the dense model is not where it was"
    if vocabulary(dense) != vocabulary(own):
        return "the dense model knows other tokens"
    size = teacher_bytes(dense.model.config, outputs_of(wish), num_windows=num_tokens, seq_len=1)
    free = shutil.disk_usage(_existing(out)).free
    if size > free // 2:
        return f"what it says takes {human_bytes(size)}, and {human_bytes(free)} of disk are free"
    return ""


def open_teacher(
    wish: RecoverStep,
    source: Source,
    recipe: Recipe,
    own: Streamed,
    *,
    masked: bool,
    device: torch.device,
    dtype: torch.dtype,
) -> Streamed:
    """Open the dense model that a source was made from, or a dense source itself; `own` is it open.

    Raises:
        CheckpointError: it is not where it was.
        RecipeError: it has another vocabulary.
    """
    found = open_origin(source, recipe, dtype, device=device)
    if found is None and not masked:
        found = open_blocks(source, recipe, device, dtype)
    if found is None:
        raise CheckpointError(
            f"recover.distill: the dense model that {source.name} was made from is not where it "
            "was (llmprune/run.json names it under origin), so it cannot teach. Put it back, or "
            "type --set recover.distill=none."
        )
    theirs, ours = vocabulary(found), vocabulary(own)
    if theirs != ours:
        raise RecipeError(
            f"recover.distill: the dense model knows {theirs} tokens and this one {ours}, so their "
            "predictions do not compare. Type --set recover.distill=none."
        )
    wide, narrow = (int(side.model.config.get_text_config().hidden_size) for side in (found, own))
    if wide != narrow and "hidden" in kinds_of(str(wish.distill)):
        raise RecipeError(
            f"recover.distill: hidden states have {wide} numbers in the dense model and {narrow} "
            "here, so they do not compare. Type --set recover.distill=kl."
        )
    return found


def outputs_of(wish: RecoverStep) -> Outputs:
    """Return what is kept of what the dense model says."""
    kinds: tuple[str, ...] = kinds_of(wish.distill) if wish.distill not in (None, AUTO) else ()
    hidden = any(DISTILLATIONS[kind].needs == "hidden" for kind in kinds)
    return Outputs(top=wish.distill_top, hidden="bfloat16" if hidden else None)


def vocabulary(blocks: Streamed) -> int:
    """Return how many tokens a model knows."""
    config: Any = blocks.model.config
    return int(config.get_text_config().vocab_size)


def _existing(path: Path) -> Path:
    """Return the nearest folder above a path that is there."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
