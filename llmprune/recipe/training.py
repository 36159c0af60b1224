"""A wish to train what was cut, and what is wrong with one."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llmprune.recipe.pruning import PruneStep
from llmprune.recipe.texts import Texts


class RecoverStep(Texts):
    """Train a pruned model on; what was removed stays removed.

    ``method`` auto is mask-lora where masks are stored, and lora where tensors got smaller. A step
    of the optimizer reads ``batch`` sequences of ``seq_len`` tokens, ``micro_batch`` at once in
    each process. ``data`` auto is the calibration text. ``loss`` assistant asks only for what an
    assistant said, with what ends its turns; auto does so in conversations, and asks for all of
    plain text. What ``rank``, ``alpha`` and ``learning_rate`` leave out is the method's own.
    ``norms`` trains those beside the method's weights; ``ranks: importance`` gives blocks that
    change more the higher ranks, the same in all. With ``masks: zeros`` what is zero counts as
    removed: for models that others pruned.
    ``distill`` draws the model towards the dense one it was made from, by its ``distill_top`` most
    likely tokens; auto does so (by kl) where that model is still there, and none leaves it. The
    teacher's share of the loss is ``distill_weight``; without one it follows from
    ``data_fraction``, the share that the text is of what the dense model was trained on.

    ``prune`` removes weights while all are trained, by ``schedule`` over a ``window`` of the run,
    every so many steps. ``regrow`` exchanges weights meanwhile, ``soft`` lets masks be soft, and
    ``rewind`` goes back, after each of ``rounds`` cuts, to the first weights or rate. With ``fade``
    what goes is decided once, where the window begins, and is gone where it ends: it marches to
    zero on a line, or gradients pull whole units there.

    >>> RecoverStep(steps=200).method
    'auto'
    """

    method: str = "auto"
    loss: Literal["assistant", "all", "auto"] = "auto"
    seq_len: int | None = Field(default=None, ge=2)
    bos: bool = False
    steps: int = Field(default=400, ge=1)
    batch: int = Field(default=8, ge=1)
    micro_batch: int | None = Field(default=None, ge=1)
    learning_rate: float | None = Field(default=None, gt=0, le=1)
    decay: Literal["linear", "cosine", "wsd", "constant"] = "cosine"
    warm_up: float = Field(default=0.1, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0, lt=1)
    clip: float = Field(default=1.0, gt=0)
    rank: int | None = Field(default=None, ge=1)
    alpha: float | None = Field(default=None, gt=0)
    ranks: Literal["equal", "importance"] = "equal"
    norms: bool | None = None
    masks: Literal["stored", "zeros"] = "stored"
    checkpointing: Literal["auto"] | bool = "auto"
    evaluate_every: int | None = Field(default=None, ge=1)
    save_every: int | None = Field(default=None, ge=1)
    keep_adapter: bool = False
    distill: str | None = "auto"
    distill_weight: float | None = Field(default=None, gt=0, le=1)
    distill_top: int = Field(default=64, ge=1)
    data_fraction: float = Field(default=0.0, ge=0, le=1)
    prune: PruneStep | None = None
    schedule: str = "cubic"
    window: tuple[float, float] | None = None
    every: int = Field(default=10, ge=1)
    rounds: int = Field(default=5, ge=1)
    regrow: str | None = None
    grow_from: Literal["zero", "dense"] = "dense"
    soft: str | None = None
    fade: Literal["march", "pull"] | None = None
    rewind: Literal["none", "weights", "rate"] = "none"
    options: dict[str, float] = Field(default_factory=dict)
