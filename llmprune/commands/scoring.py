"""Commands that measure one model, or two beside each other: text, tasks, speed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Option

from llmprune.base.errors import RecipeError
from llmprune.commands.options import PPL, TASKS, bos_of, dtype_of, numbers_of


def evaluate(
    model: Annotated[str, typer.Argument(help="A folder, a Hub id, or demo.")],
    perplexity: Annotated[
        str | None,
        Option(
            metavar="TEXT",
            help="wikitext2, c4, demo, or a .txt, .jsonl or .parquet file. [default: where no "
            "tasks are given, what a result's recipe says, demo for the demo, else wikitext2]",
            rich_help_panel=PPL,
        ),
    ] = None,
    seq_len: Annotated[int | None, Option(help="Tokens per window.", rich_help_panel=PPL)] = None,
    num_windows: Annotated[
        int | None, Option(help="Windows from the start. [default: all]", rich_help_panel=PPL)
    ] = None,
    stride: Annotated[
        int | None,
        Option(
            help="Begin windows this many tokens apart; each scores what is new in it. [default: "
            "no overlap]",
            rich_help_panel=PPL,
        ),
    ] = None,
    bos: Annotated[
        str,
        Option(
            help="Begin every window with BOS: true, false, or auto (as the tokenizer does).",
            rich_help_panel=PPL,
        ),
    ] = "false",
    rolling: Annotated[
        bool,
        Option(
            "--rolling",
            help="Perplexity by word and byte of the whole text, as lm-eval, instead of by token.",
            rich_help_panel=PPL,
        ),
    ] = False,
    tasks: Annotated[
        list[str] | None,
        Option(
            help="Tasks of lm-eval by name, or YAML files; also NAME,NAME (repeatable).",
            rich_help_panel=TASKS,
        ),
    ] = None,
    limit: Annotated[
        int | None, Option(help="Items of each task. [default: all]", rich_help_panel=TASKS)
    ] = None,
    num_fewshot: Annotated[
        int | None,
        Option(help="Worked examples in a prompt. [default: the task's]", rich_help_panel=TASKS),
    ] = None,
    batch_size: Annotated[int, Option(help="Items at once.", rich_help_panel=TASKS)] = 1,
    baseline: Annotated[
        str,
        Option(
            help="What to compare with: auto (the model a result was made from), none, a folder "
            "or a Hub id.",
            rich_help_panel=TASKS,
        ),
    ] = "auto",
    include_path: Annotated[
        Path | None,
        Option(help="Folder with YAML files of tasks to know by name.", rich_help_panel=TASKS),
    ] = None,
    apply_chat_template: Annotated[
        bool,
        Option(
            "--apply-chat-template", help="Ask as the chat template does.", rich_help_panel=TASKS
        ),
    ] = False,
    seed: Annotated[int, Option(help="Draws the worked examples.", rich_help_panel=TASKS)] = 0,
    no_cache: Annotated[
        bool,
        Option(
            "--no-cache",
            help="Measure again what was measured before. [default: equal models on equal tasks "
            "are looked up]",
            rich_help_panel=TASKS,
        ),
    ] = False,
    device: Annotated[str, Option(help="cuda, mps or cpu.")] = "auto",
    dtype: Annotated[str, Option(help="auto, float32, bfloat16, float16.")] = "auto",
    revision: Annotated[str | None, Option(help="Branch, tag or commit on the Hub.")] = None,
    trust_remote_code: Annotated[bool, Option("--trust-remote-code")] = False,
    as_json: Annotated[bool, Option("--json", help="Print JSON, a line per measurement.")] = False,
) -> None:
    """Measure perplexity, or with --tasks the scores of lm-evaluation-harness.

    Perplexity streams the model from disk. Tasks hold it in memory, and set a result of llmprune
    beside the dense model that it was made from. What was measured of a result is kept in its
    llmprune/evaluations.json.
    """
    from dataclasses import asdict

    from llmprune import api

    common: dict[str, Any] = {
        "device": device,
        "dtype": "auto" if dtype == "auto" else dtype_of(dtype),
        "revision": revision,
        "trust_remote_code": trust_remote_code,
    }
    if not tasks and (apply_chat_template or any((limit, num_fewshot, include_path))):
        raise RecipeError(
            "tasks: --limit, --num-fewshot, --include-path and --apply-chat-template are about "
            "tasks, and none is named. Add --tasks NAME, or leave them out."
        )
    if rolling and (stride or num_windows or bos != "false"):
        raise RecipeError(
            "rolling: scores the whole text once, and begins it in its own way. Leave --stride, "
            "--num-windows and --bos out; a shorter text takes less time: --perplexity FILE."
        )
    if not tasks or perplexity is not None or rolling:
        text = "auto" if perplexity is None else perplexity
        common_text = {"data": text, "seq_len": seq_len, **common}
        found: Any
        if rolling:
            found = api.rolling_perplexity(model, **common_text)
        else:
            found = api.perplexity(
                model, num_windows=num_windows, stride=stride, bos=bos_of(bos), **common_text
            )
        print(json.dumps(asdict(found)) if as_json else f"perplexity {found}", flush=True)
        api.store_measurement(model, found)
    if tasks:
        scores = api.evaluate(
            model,
            [name.strip() for given in tasks for name in given.split(",") if name.strip()],
            limit=limit,
            num_fewshot=num_fewshot,
            batch_size=batch_size,
            baseline=None if baseline == "none" else baseline,
            include_path=include_path,
            apply_chat_template=apply_chat_template,
            seed=seed,
            cache=not no_cache,
            **common,
        )
        print(json.dumps(scores.to_dict()) if as_json else scores, flush=True)
        for note in scores.notes:
            print(f"note: {note}", file=sys.stderr)
        api.store_measurement(model, scores)


def bench(
    model: Annotated[str, typer.Argument(help="A folder, a Hub id, or demo.")],
    against: Annotated[
        str | None, Option(help="Another, usually the dense model, measured in turn with it.")
    ] = None,
    batch: Annotated[str, Option(help="Sequences at once: one number or more.")] = "1",
    prompt: Annotated[int, Option(help="Tokens read at once.")] = 128,
    new: Annotated[int, Option(help="Tokens decoded one by one after it.")] = 64,
    repeat: Annotated[int, Option(help="Repetitions, after one that warms up.")] = 5,
    device: Annotated[str, Option(help="cuda, mps or cpu.")] = "auto",
    dtype: Annotated[
        str, Option(help="auto (as it is stored), float32, bfloat16, float16.")
    ] = "auto",
    trust_remote_code: Annotated[bool, Option("--trust-remote-code")] = False,
    as_json: Annotated[bool, Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure tokens per second, time to the first token, and memory.

    Each model runs in a process of its own, in memory as transformers loads it. Zeros alone make
    nothing faster there; smaller tensors may. What was measured of a result of llmprune is kept in
    its llmprune/evaluations.json.
    """
    from llmprune import api
    from llmprune.base.progress import Progress
    from llmprune.evaluation import speed

    found = speed.bench(
        model,
        against,
        batch=numbers_of("batch", batch),
        prompt=prompt,
        new=new,
        repeat=repeat,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        progress=Progress("quiet" if as_json else "rich"),
    )
    api.store_measurement(model, found)
    print(json.dumps(found.to_dict()) if as_json else found)
