"""What models are asked after a run, dense beside pruned: their perplexity, and what they write."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from llmprune.base.errors import LlmpruneError
from llmprune.base.progress import Progress
from llmprune.base.timeline import timed
from llmprune.calibration.heldout import evaluation_text
from llmprune.calibration.selection import evaluation_data
from llmprune.calibration.windows import token_ids
from llmprune.checkpoint.source import Source
from llmprune.engine.calibrating import check_tokens
from llmprune.engine.opening import Opened, read_tokenizer
from llmprune.evaluation.perplexity import Question, loss_of_blocks, pose
from llmprune.evaluation.rolling import predict_text
from llmprune.evaluation.samples import prompts_of, write_samples
from llmprune.walk.streamed import Streamed

if TYPE_CHECKING:
    import torch

    from llmprune.evaluation.windows import Windows as Asked
    from llmprune.recipe import Recipe


def evaluation_question(opened: Opened, progress: Progress) -> Question | None:
    """Return what the models of a plan will be asked for their perplexity, before anything is cut.

    Raises:
        LlmpruneError: there is no tokenizer or no text, and the recipe insists on perplexity.
    """
    plan = opened.plan
    if not plan.eval_windows:
        return None
    return question_for(
        *(opened.source, plan.recipe, opened.blocks.model.config, progress),
        seq_len=plan.seq_len,
        num_windows=plan.eval_windows,
    )


def question_for(
    source: Source,
    recipe: Recipe,
    config: Any,
    progress: Progress,
    *,
    seq_len: int,
    num_windows: int | None,
) -> Question | None:
    """Return what models that read as a source does are asked; None where perplexity is not wanted.

    Raises:
        LlmpruneError: there is no tokenizer or no text, and the recipe insists on perplexity.
    """
    wish = recipe.evaluate
    if wish is None or wish.perplexity is False:
        return None
    data = evaluation_data(recipe)
    try:
        tokenizer = read_tokenizer(source, recipe)
        question = pose(
            evaluation_text(data, tokenizer=tokenizer),
            tokenizer,
            data=data,
            seq_len=seq_len,
            stride=wish.stride,
            num_windows=num_windows,
            bos=wish.bos,
        )
        check_tokens(question.windows.inputs_NT, config)
    except LlmpruneError as error:
        if wish.perplexity is True:
            raise
        progress.warn(f"perplexity is not measured: {error}")
        return None
    return question


def perplexities(
    sides: Mapping[str, Streamed | None],
    question: Question,
    progress: Progress,
    *,
    dtype: torch.dtype,
    micro_batch: int = 1,
) -> dict[str, Any] | None:
    """Return the perplexity of models by name, on the same windows; of one not there, nothing.

    A failure costs no proven result: a warning says it, and nothing is returned.
    """
    found = {}
    with progress.stage("perplexity", len(sides)) as stage:
        for name, side in sides.items():
            if side is None:
                stage.advance(name)
                continue
            try:
                blocks = replace(side, dtype=dtype)
                loss = loss_of_blocks(blocks, *question.windows, micro_batch=micro_batch)
            except LlmpruneError as error:
                progress.warn(f"perplexity is not measured: {error}")
                return None
            answer = question.answer(*loss, dtype=dtype)
            found[name] = asdict(answer)
            if name == "dense" and answer.warning:
                progress.warn(answer.warning)
            stage.advance(name, perplexity=answer.value)
    return found


def byte_perplexities(
    sides: Mapping[str, tuple[Streamed, Any]],
    question: Question,
    progress: Progress,
    *,
    dtype: torch.dtype,
    micro_batch: int = 1,
) -> dict[str, Any] | None:
    """Return the perplexity per byte of models by name, each with the tokenizer it reads by.

    All read the same text, as long as the first one's windows would have been.
    """
    words = next(iter(sides.values()))[1]
    text = evaluation_text(question.data, tokenizer=words)
    text = text[: len(text) * question.windows.inputs_NT.numel() // len(token_ids(text, words))]
    found: dict[str, Any] = {}
    with progress.stage("perplexity", len(sides)) as stage:
        for name, (side, tokenizer) in sides.items():
            try:
                answer = predict_text(
                    partial(_loss, replace(side, dtype=dtype), micro_batch),
                    *(text, tokenizer),
                    data=question.data,
                    seq_len=question.seq_len,
                    dtype=str(dtype).removeprefix("torch."),
                )
            except LlmpruneError as error:
                progress.warn(f"perplexity is not measured: {error}")
                return None
            found[name] = asdict(answer)
            stage.advance(name, byte_perplexity=answer.byte_perplexity)
    return found


def samples_of(
    models: Mapping[str, Source],
    recipe: Recipe,
    progress: Progress,
    seconds: dict[str, float],
    *,
    device: torch.device,
    dtype: torch.dtype,
    trust_remote_code: bool,
) -> dict[str, Any] | None:
    """Return what models write after the recipe's prompts, and how long that took; None if it has
    none."""
    wish = recipe.evaluate
    prompts = () if wish is None else prompts_of(wish.prompts, wish.perplexity)
    if wish is None or not prompts:
        return None
    with timed(seconds, "samples"), progress.stage("samples", 1) as stage:
        found = write_samples(
            *(models, prompts),
            num_tokens=wish.new_tokens,
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
        )
        stage.advance(f"{len(prompts)} prompts")
    return found


def _loss(blocks: Streamed, micro_batch: int, windows: Asked) -> tuple[float, int]:
    return loss_of_blocks(blocks, *windows, micro_batch=micro_batch)
