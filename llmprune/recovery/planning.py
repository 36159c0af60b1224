"""What a recovery would do, decided before a weight is read: the method, the course, the cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from llmprune.arch.limits import window_length
from llmprune.base.errors import CheckpointError, RecipeError
from llmprune.base.markup import html_facts
from llmprune.base.progress import human_bytes, human_count
from llmprune.base.text import named_lines
from llmprune.checkpoint.locate import open_source
from llmprune.checkpoint.source import Source
from llmprune.delivery.heterogeneous import is_own_code
from llmprune.delivery.masks import OWN, MaskFiles
from llmprune.engine.opening import anatomies_of, choose_device, open_blocks, storage_dtype
from llmprune.recipe import Recipe, RecoverStep
from llmprune.recovery.loop import Course
from llmprune.recovery.methods import RECOVERIES
from llmprune.recovery.refusals import check_fade, check_pattern, check_units
from llmprune.recovery.regrowth import REGROWTHS
from llmprune.recovery.schedules import SCHEDULES
from llmprune.recovery.soft import SOFT_MASKS
from llmprune.recovery.taught import settled, why_untaught
from llmprune.recovery.types import Recovery
from llmprune.recovery.unit_counts import final_counts
from llmprune.walk.streamed import Streamed

MOST_TOKENS = 1024  # of a window, where nothing is asked
AT_ONCE = 4096  # tokens of a micro-batch, where nothing is asked
FLOATS = 24  # per hidden value and block that autograd holds, roughly
STAIRCASE = "staircase"
MASKED, SHRUNK, DENSE = "masked", "shrunk", "dense"


@dataclass(frozen=True, kw_only=True)
class RecoverPlan:
    """A recovery that was decided; `str(plan)` is the table of --dry-run, in notebooks as HTML."""

    recipe: Recipe
    wish: RecoverStep
    untaught: str
    name: str
    row: Recovery
    source: Source
    blocks: Streamed
    out: Path
    form: str
    device: torch.device
    dtype: torch.dtype
    seq_len: int
    course: Course
    rank: int
    alpha: float
    norms: bool
    checkpointing: bool
    num_params: int
    num_trained: int
    memory: int

    @property
    def trust(self) -> bool:
        """Tell whether code beside the model may run: ours, or whatever the recipe trusts."""
        return self.recipe.trust_remote_code or is_own_code(self.source.folder)

    @property
    def num_tokens(self) -> int:
        return self.course.steps * self.course.batch * self.seq_len

    def data(self) -> dict[str, Any]:
        """Return the decisions as plain data."""
        return {
            "model": self.source.name,
            "method": self.name,
            "rank": self.rank if self.row.adapter else None,
            "alpha": self.alpha if self.row.adapter else None,
            "norms": self.norms,
            "distill": self.wish.distill,
            "trained": self.num_trained,
            "parameters": self.num_params,
            "tokens": self.num_tokens,
            "seq_len": self.seq_len,
            "checkpointing": self.checkpointing,
            **vars(self.course),
        }

    def _teacher(self) -> str:
        """Return whether the dense model teaches; empty where that was not asked."""
        if self.wish.distill:
            return f"the dense model, by {self.wish.distill}"
        return f"none: {self.untaught}" if self.untaught else ""

    def _removal(self) -> str:
        """Return what is removed meanwhile, and when; empty where masks stay."""
        prune, wish = self.wish.prune, self.wish
        if prune is None:
            return ""
        how = [wish.regrow, wish.soft, wish.fade, None if wish.rewind == "none" else wish.rewind]
        more = "".join(f", {each}" for each in how if each)
        return f"{prune.sparsity:g} by {prune.method}, {prune.pattern}, {wish.schedule}{more}"

    def __str__(self) -> str:
        return named_lines(self._lines())

    def _repr_html_(self) -> str:
        return html_facts(self._lines(), caption="Plan")

    def _lines(self) -> list[tuple[str, str]]:
        """Return names and what was decided of each."""
        course, share = self.course, self.num_trained / self.num_params
        adapter = f", rank {self.rank}, alpha {self.alpha:g}" if self.row.adapter else ""
        lines = [
            ("model", f"{self.source.name} ({self.form})"),
            ("method", f"{self.row.title}: {self.row.summary}{adapter}"),
            (
                "trained",
                f"{human_count(self.num_trained)} of {human_count(self.num_params)} "
                f"parameters ({100 * share:.3f} %)" + (", norms too" if self.norms else ""),
            ),
            (
                "course",
                f"{course.steps} steps of {course.batch} x {self.seq_len} tokens "
                f"({human_count(self.num_tokens)} in all), {course.micro_batch} sequences at "
                f"once, rate {course.learning_rate:g}, {course.decay}",
            ),
            ("teacher", self._teacher()),
            ("removes", self._removal()),
            ("memory", f"about {human_bytes(self.memory)}"),
            ("device", f"{self.device}, {str(self.dtype).removeprefix('torch.')}"),
            ("writes", str(self.out)),
        ]
        return [line for line in lines if line[1]]


def open_recovery(recipe: Recipe, *, num_processes: int = 1) -> RecoverPlan:
    """Open what is to be recovered and decide how; no weight is read.

    Raises:
        LlmpruneError: whatever is wrong with recipe, model, method or device.
    """
    wish = recipe.recover
    assert wish is not None
    out = Path(recipe.out).expanduser() if recipe.out else _default_out(recipe)
    source = open_source(recipe.model, revision=recipe.revision)
    stored = storage_dtype(source)
    device = choose_device(recipe.device)
    trusted = recipe.model_copy(
        update={"trust_remote_code": recipe.trust_remote_code or is_own_code(source.folder)}
    )
    blocks = open_blocks(source, trusted, torch.device("cpu"), stored)
    form = form_of(source.folder, wish)
    check_shaping(wish)
    name = method_of(wish, form)
    row = RECOVERIES[name]
    check_method(name, row, form, wish, source.name)
    if row.units:
        final_counts(wish, anatomies_of(blocks))
    if not row.adapter and (wish.rank or wish.alpha):
        raise RecipeError(
            f"recover.{'rank' if wish.rank else 'alpha'}: {name} has no adapters, so it has no "
            "rank. Leave it out, or type --method mask-lora."
        )
    asked = wish.seq_len or recipe.calibration.seq_len
    seq_len = window_length(asked, blocks.model.config, usual=MOST_TOKENS, key="recover.seq_len")
    rank, norms = wish.rank or row.rank, wish.norms
    norms = "norms" in row.trains if norms is None else norms
    dtype = _dtype(recipe, row, stored, device)
    course = replace(_course(wish, row, seq_len, num_processes), half=dtype == torch.bfloat16)
    untaught = why_untaught(
        *(wish, source, recipe, blocks),
        pruned=form != DENSE,
        out=out,
        num_tokens=course.steps * course.batch * seq_len,
    )
    trained = _num_trained(blocks, row, rank, norms)
    num_params = sum(entry.num_params for entry in source.entries.values())
    hidden, checkpointing = _activations(blocks, course, seq_len, wish, num_params)
    return RecoverPlan(
        recipe=recipe,
        wish=settled(wish, untaught),
        untaught=untaught,
        name=name,
        row=row,
        source=source,
        blocks=blocks,
        out=out,
        form=form,
        device=device,
        dtype=dtype,
        seq_len=seq_len,
        course=course,
        rank=rank,
        alpha=wish.alpha or row.alpha * rank / row.rank,
        norms=norms,
        checkpointing=checkpointing,
        num_params=num_params,
        num_trained=trained,
        memory=num_params * (dtype.itemsize + (form == MASKED)) + 16 * trained + hidden,
    )


def form_of(folder: Path, wish: RecoverStep) -> str:
    """Tell what a folder holds: zeros under stored masks, smaller tensors, or a dense model."""
    files = MaskFiles(folder)
    if files.index or wish.masks == "zeros":
        return MASKED
    return SHRUNK if (folder / OWN / "masks.json").exists() else DENSE


def method_of(wish: RecoverStep, form: str) -> str:
    """Return the method asked for, or the one that fits what a folder holds."""
    if wish.method != "auto":
        return wish.method
    if wish.prune is not None:
        return "full"
    return "lora" if form == SHRUNK else "mask-lora"


def check_method(name: str, row: Recovery, form: str, wish: RecoverStep, model: str) -> None:
    """Check that a method leaves what pruning removed.

    Raises:
        RecipeError: it would fill zeros. CheckpointError: there is nothing that was pruned.
    """
    if row.units:
        check_units(name, wish)
        return
    if wish.prune is not None:
        if "weights" not in row.trains:
            raise RecipeError(
                f"recover.method: {name} leaves weights frozen, and recover.prune removes weights "
                "while they are trained. Type --method full, or prune in a step of its own before."
            )
        return
    if form == MASKED and row.fills:
        raise RecipeError(
            f"recover.method: merging {name} puts numbers where {model} has zeros, and its "
            "sparsity would be gone. Type --method mask-lora, which trains what it merges, or "
            "--method lora-prune, which cuts at the merge."
        )
    if form == DENSE and name != "lora":
        raise CheckpointError(
            f"{model} has no masks (llmprune/masks.json), so what was pruned is not known. Prune "
            "it with llmprune first; type --masks zeros if another tool pruned it, so that its "
            "zeros count; or --method lora to train a dense model."
        )


def check_shaping(wish: RecoverStep) -> None:
    """Check what a recovery says of masks that move.

    Raises:
        UnknownName, RecipeError: a name is none, or two of them exclude each other.
    """
    moving = {
        **{"regrow": wish.regrow, "soft": wish.soft, "fade": wish.fade},
        "rewind": wish.rewind != "none",
    }
    if wish.prune is None:
        if given := [key for key, value in moving.items() if value]:
            raise RecipeError(
                f"recover.{given[0]}: it is about masks that move, and recover.prune says nothing "
                "of what to remove. Add `prune: {sparsity: 0.8}` to the step, or leave it out."
            )
        return
    if wish.schedule != STAIRCASE:
        SCHEDULES[wish.schedule]
    elif ":" not in wish.prune.pattern:
        raise RecipeError(
            f"recover.schedule: a staircase leads to N:M, and the pattern is {wish.prune.pattern}. "
            "Type --set recover.prune.pattern=2:4, or --set recover.schedule=cubic."
        )
    if wish.regrow is not None:
        REGROWTHS[wish.regrow]
    if wish.soft is not None:
        SOFT_MASKS[wish.soft]
    if len(given := [key for key, value in moving.items() if value]) > 1:
        raise RecipeError(
            f"recover.{given[1]}: it does not go with recover.{given[0]}. Leave one out."
        )
    if wish.prune.target is not None:
        raise RecipeError(
            "recover.prune.target: what is removed while training is a share. Give a sparsity."
        )
    check_pattern(wish, wish.prune)
    if wish.fade is not None:
        check_fade(wish, wish.fade)


def _default_out(recipe: Recipe) -> Path:
    return Path(f"{Path(recipe.model.rstrip('/')).name}-recovered")


def _dtype(recipe: Recipe, row: Recovery, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """Return what frozen weights are held in; weights that are trained are float32.

    Raises:
        RecipeError: float16 is asked for, in which gradients vanish.
    """
    if recipe.dtype == "float16":
        raise RecipeError(
            "dtype: float16 cannot hold small gradients. Type --dtype bfloat16 or float32; the "
            "result is stored in float16 all the same, where the model is."
        )
    if recipe.dtype != "auto":
        found: torch.dtype = getattr(torch, recipe.dtype)
        return found
    whole = device.type == "cpu" or "weights" in row.trains or stored == torch.float16
    return torch.float32 if whole else stored


def _course(wish: RecoverStep, row: Recovery, seq_len: int, num_processes: int) -> Course:
    """Return how long and how fast to train.

    Raises:
        RecipeError: the batch cannot be shared by all processes.
    """
    if wish.batch % num_processes:
        raise RecipeError(
            f"recover.batch: {wish.batch} windows cannot be shared evenly by {num_processes} "
            f"processes. Type --batch {-(-wish.batch // num_processes) * num_processes}."
        )
    own = wish.batch // num_processes
    return Course(
        steps=wish.steps,
        batch=wish.batch,
        micro_batch=min(own, wish.micro_batch or max(1, AT_ONCE // seq_len)),
        learning_rate=wish.learning_rate or row.learning_rate,
        decay=wish.decay,
        warm_up=wish.warm_up,
        weight_decay=wish.weight_decay,
        clip=wish.clip,
        evaluate_every=wish.evaluate_every or max(1, wish.steps // 10),
        save_every=wish.save_every or max(1, wish.steps // 20),
        rounds=wish.rounds if wish.rewind != "none" else 1,
    )


def _num_trained(blocks: Streamed, row: Recovery, rank: int, norms: bool) -> int:
    """Return how many parameters would be trained, by their shapes."""
    count = 0
    model = blocks.model
    for index in range(len(blocks)):
        for linear in blocks.anatomy(index).linears.values():
            rows, columns = linear.shape
            if row.adapter in ("mask-lora", "lora", "lora-prune", "scale-lora", "hira", "shira"):
                count += rank * (rows + columns)
            elif row.adapter == "ia3":
                count += rows
            elif "weights" in row.trains:
                count += rows * columns
    for name, value in model.named_parameters():
        kind = type(model.get_submodule(name.rpartition(".")[0])).__name__.lower()
        is_norm = value.dim() == 1 and "norm" in kind
        if (norms and is_norm) or ("biases" in row.trains and name.endswith(".bias")):
            count += value.numel()
    if "head" in row.trains:
        count += model.get_output_embeddings().weight.numel()
    return count


def _activations(
    blocks: Streamed, course: Course, seq_len: int, wish: RecoverStep, num_params: int
) -> tuple[int, bool]:
    """Return the bytes that a micro-batch holds until its backward, and whether to checkpoint."""
    import psutil

    text = blocks.model.config.get_text_config()
    tokens = course.micro_batch * seq_len
    head = 12 * tokens * int(text.vocab_size)
    block = 4 * FLOATS * tokens * int(text.hidden_size)
    whole = block * len(blocks)
    room = psutil.virtual_memory().available - 6 * num_params
    checkpointing = wish.checkpointing
    if checkpointing == "auto":
        checkpointing = whole > room // 4
    held = block + 4 * tokens * int(text.hidden_size) * len(blocks) if checkpointing else whole
    return head + held, bool(checkpointing)


def fixes(plan: RecoverPlan, tokens: str, world_size: int) -> Mapping[str, Any]:
    """Return what fixes the bytes of a recovery, for its folder."""
    import peft
    import transformers

    from llmprune import __version__
    from llmprune.checkpoint.source import read_json
    from llmprune.engine.folder import processor

    earlier = plan.source.folder / OWN / "run.json"
    source = {
        "name": plan.source.name,
        "folder": str(plan.source.folder.resolve()),
        "revision": plan.source.revision,
        "fingerprint": plan.source.fingerprint(),
        "last_change": plan.source.last_change(),
        "masks": MaskFiles(plan.source.folder).fingerprint(),
    }
    before = read_json(earlier) if earlier.exists() else {}
    asked = plan.wish.model_dump(mode="json", exclude={"micro_batch"})
    free = ("out", "max_memory")
    return {
        "llmprune": __version__,
        "recipe": {"steps": [{"recover": asked}], "seed": plan.recipe.seed},
        "wish": {key: value for key, value in plan.recipe.to_dict().items() if key not in free},
        "source": source,
        "origin": before.get("origin", source),
        "unused": list(plan.blocks.unused),
        "tokens": tokens,
        "micro_batch": plan.course.micro_batch,
        "threads": torch.get_num_threads(),
        "device": plan.device.type,
        "processor": processor(plan.device),
        "dtype": str(plan.dtype).removeprefix("torch."),
        "world_size": world_size,
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
        },
    }
