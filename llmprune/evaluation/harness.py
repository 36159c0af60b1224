"""Scores of a model in memory on tasks of lm-evaluation-harness."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from llmprune.base.errors import LlmpruneError, RecipeError, TooLarge, first_line
from llmprune.base.memory import free_bytes
from llmprune.evaluation.scores import Score, TaskFacts
from llmprune.evaluation.tasks import hushed

if TYPE_CHECKING:
    import torch

BOOTSTRAP = 1000  # draws, for the few metrics whose standard error has no formula


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Mapping[str, Any],
    *,
    limit: int | None = None,
    batch_size: int = 1,
    apply_chat_template: bool = False,
    seed: int = 0,
) -> tuple[tuple[Score, ...], dict[str, TaskFacts], tuple[str, ...]]:
    """Return scores, facts of the tasks and notes of a model on what `open_tasks` returned.

    `limit` takes that many items from the start of each task. Every model sees the same examples in
    its prompts.

    Raises:
        RecipeError: a chat template is asked of a tokenizer that has none, or a task fails.
        TooLarge: memory does not suffice.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    if apply_chat_template and not getattr(tokenizer, "chat_template", None):
        raise RecipeError(
            "apply_chat_template: this tokenizer has no chat template. Leave it out; base models "
            "are measured without one."
        )
    _sow(seed)
    for task in tasks["tasks"].values():
        task.set_fewshot_seed(seed=seed)
    with hushed() as said, _failures(), _same_mode(model):
        # A copy, because the harness gives the tokenizer a padding token.
        lm = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
        found: Any = lm_eval.evaluate(
            lm,
            dict(tasks),
            limit=limit,
            bootstrap_iters=BOOTSTRAP,
            log_samples=False,
            apply_chat_template=apply_chat_template,
            fewshot_as_multiturn=apply_chat_template,
        )
    return tuple(_scores(found)), _facts(found), _notes(said)


@contextmanager
def _same_mode(model: Any) -> Iterator[None]:
    """Put a model's training mode back at the end."""
    training = model.training
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def _failures() -> Iterator[None]:
    """Turn what a task's items, code or size raise into a message.

    Raises:
        TooLarge, RecipeError: what was raised, and what to change.
    """
    import torch

    try:
        yield
    except LlmpruneError:
        raise
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise TooLarge(
            "tasks: out of memory. A smaller --batch-size or --dtype bfloat16 needs less."
        ) from error
    except Exception as error:
        first = first_line(error)
        raise RecipeError(
            f"tasks: lm_eval stopped ({type(error).__name__}: {first}). An item may lack what the "
            "task's YAML asks of it, or the task may have fewer worked examples than "
            "--num-fewshot: mend the task or leave it out."
        ) from error


def check_fits(name: str, num_params: int, itemsize: int, device: torch.device) -> None:
    """Check that the weights of a model find room in memory, where the harness needs them.

    Raises:
        TooLarge: they do not.
    """
    needed = num_params * itemsize
    for place, available in free_bytes(device).items():
        if needed > available:
            raise TooLarge(
                f"tasks: the weights of {name} need {needed / 1e9:.2f} GB, and of {place} "
                f"{available / 1e9:.2f} GB are free. Tasks need the whole model in memory: "
                "--dtype bfloat16 halves it, another machine may hold it. Perplexity streams the "
                "model and needs one block at a time: leave --tasks out."
            )


def _sow(seed: int) -> None:
    """Seed what tasks and generation draw from."""
    import random

    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _scores(found: Mapping[str, Any]) -> Iterator[Score]:
    """Yield the numbers of lm_eval's results, whose keys are `metric,filter`."""
    for task, results in found["results"].items():
        for key, value in results.items():
            metric, comma, way = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = results.get(f"{metric}_stderr,{way}")
            known = isinstance(error, int | float) and math.isfinite(error)
            yield Score(
                task=task,
                metric=metric,
                filter=way,
                value=float(value),
                stderr=float(error) if known else None,
                higher_is_better=found["higher_is_better"].get(task, {}).get(metric),
            )


def _facts(found: Mapping[str, Any]) -> dict[str, TaskFacts]:
    return {
        task: TaskFacts(
            version=str(found["versions"].get(task)),
            num_fewshot=int(found["n-shot"].get(task) or 0),
            num_items=int(items["effective"]),
            num_items_in_all=int(items["original"]),
        )
        for task, items in found["n-samples"].items()
    }


def _notes(said: list[str]) -> tuple[str, ...]:
    """Return what of lm_eval's warnings changes the meaning of a score."""
    cut = sum("truncat" in text.lower() for text in said)
    if not cut:
        return ()
    return (
        f"{cut} requests were longer than the model takes, and were cut at their beginning: fewer "
        "examples (num_fewshot) make them shorter.",
    )
