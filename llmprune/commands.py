"""The commands beside pruning and planning: look at a model, measure, prove and publish a result.

Each takes what its flags say and prints; `cli.py` gives them their names.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Option

from llmprune.base.errors import CheckpointError, RecipeError, TooLarge

PPL, TASKS = "Perplexity", "Tasks"

Folder = Annotated[Path, typer.Argument(help="A folder that llmprune wrote.")]


def inspect(
    model: Annotated[str, typer.Argument(help="A folder, a Hub id, or demo.")],
    revision: Annotated[str | None, Option(help="Branch, tag or commit on the Hub.")] = None,
    trust_remote_code: Annotated[bool, Option("--trust-remote-code")] = False,
    as_json: Annotated[bool, Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print a model's blocks, taps, couplings, experts, and what is eligible; reads no weight."""
    from llmprune import api

    found = api.inspect(model, revision=revision, trust_remote_code=trust_remote_code)
    print(json.dumps(found.to_dict(), indent=2) if as_json else found)


def methods(
    recovery: Annotated[
        bool, Option("--recovery", help="Those of training after a cut, or around it.")
    ] = False,
) -> None:
    """List the methods with what they need and where they come from."""
    from llmprune.base.text import columns
    from llmprune.catalog import METHODS
    from llmprune.engine.parts import needs_of
    from llmprune.mask.pattern import parse_pattern

    if recovery:
        from llmprune.report.offer import recovery_tables

        print(recovery_tables())
        return
    rows = [
        (
            row.name,
            ", ".join(needs_of(row, row.allocation, pattern=parse_pattern(row.pattern)).names)
            or "nothing",
            row.group,
            row.allocation,
            ", ".join(filter(None, (row.refine, row.solver, row.repair))),
            ", ".join(row.patterns),
            row.paper,
        )
        for row in METHODS.values()
    ]
    head = ("method", "needs", "compared in", "allocation", "weights", "patterns", "paper")
    print(columns(head, rows))


def gate(
    folders: Annotated[list[Path], typer.Argument(help="Folders to prove.")],
    dtype: Annotated[str, Option(help="float32, bfloat16 or float16.")] = "float32",
    trust_remote_code: Annotated[bool, Option("--trust-remote-code")] = False,
    as_json: Annotated[bool, Option("--json", help="Print the verdicts as JSON.")] = False,
) -> None:
    """Prove in a fresh process that folders load the stock way and compute what they should."""
    from llmprune import api

    for folder in folders:
        verdict = api.gate(folder, dtype=_dtype(dtype), trust_remote_code=trust_remote_code)
        if as_json:
            print(json.dumps(verdict.to_dict()))
        else:
            print(f"{folder}: {verdict.text()}")


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
        "dtype": "auto" if dtype == "auto" else _dtype(dtype),
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
                model, num_windows=num_windows, stride=stride, bos=_bos(bos), **common_text
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
        batch=_numbers("batch", batch),
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


def analyze(
    model: Annotated[str, typer.Argument(help="A result of llmprune, of any tier.")],
    against: Annotated[
        str | None, Option(help="The dense model. [default: the one that it was made from]")
    ] = None,
    between: Annotated[
        str | None, Option(help="A second result, for the loss along the line between the two.")
    ] = None,
    only: Annotated[
        str | None,
        Option(
            help="Some of pq, outliers, influence, cka, kl, worst, robustness, dead, between, "
            "with commas. [default: all that apply]"
        ),
    ] = None,
    data: Annotated[
        str,
        Option(help="Text to read: wikitext2, c4, demo, or a file. [auto: what eval takes]"),
    ] = "auto",
    num_windows: Annotated[int, Option(help="Windows from its start.")] = 8,
    seq_len: Annotated[
        int | None, Option(help="Tokens in each. [default: 512, at most what the model takes]")
    ] = None,
    seed: Annotated[int, Option(help="Draws the slips of robustness.")] = 0,
    out: Annotated[
        Path | None, Option(help="Folder to write. [default: MODEL/llmprune/analysis]")
    ] = None,
    device: Annotated[str, Option(help="cuda, mps or cpu.")] = "auto",
    dtype: Annotated[
        str, Option(help="auto (float32 on the CPU), float32, bfloat16, float16.")
    ] = "auto",
    trust_remote_code: Annotated[bool, Option("--trust-remote-code")] = False,
    as_json: Annotated[bool, Option("--json", help="Print JSON.")] = False,
) -> None:
    """Look at what pruning did: weights, hidden states, predictions, beside the dense model.

    Writes analysis.html, analysis.json, and a CSV and a picture for each analysis. Both models are
    walked block by block and need not fit into memory.
    """
    from llmprune import analyzing, api
    from llmprune.pages.analysis_result import check_folder

    names = None if only is None else [only]
    analyzing.chosen(names)
    folder = out or analyzing.default_folder(model)
    check_folder(folder)
    found = api.analyze(
        model,
        against=against,
        between=between,
        only=names,
        data=data,
        num_windows=num_windows,
        seq_len=seq_len,
        seed=seed,
        device=device,
        dtype=dtype if dtype == "auto" else _dtype(dtype),
        trust_remote_code=trust_remote_code,
        quiet=as_json,
    )
    written = found.save(folder)
    if as_json:
        print(json.dumps(found.to_dict()))
        return
    print(found)
    print(f"\npage: {written / 'analysis.html'}")


def compare(
    model: Annotated[str, Option(help="Folder, Hub id, or demo.")],
    methods: Annotated[
        str, Option(help="Rows of `llmprune methods`, or fast, good, best; with commas.")
    ],
    sparsity: Annotated[
        str | None, Option(help="Shares to remove, with commas: 0.5,0.6,0.7.")
    ] = None,
    pattern: Annotated[
        str | None,
        Option(
            help="Patterns, with commas: 2:4 fixes its share, others take every --sparsity. "
            "[default: what each method is for]"
        ),
    ] = None,
    seeds: Annotated[
        str, Option(help="Each draws its own calibration windows; with commas.")
    ] = "0",
    out: Annotated[Path | None, Option(help="Folder to write. [default: MODEL-compared]")] = None,
    calib: Annotated[
        str | None, Option(help="Calibration text of all: what --calib of pruning takes.")
    ] = None,
    num_samples: Annotated[int | None, Option(help="Calibration sequences. [default: 128]")] = None,
    seq_len: Annotated[
        int | None, Option(help="Tokens in each. [default: 2048, at most what the model takes]")
    ] = None,
    perplexity: Annotated[
        str | None,
        Option(
            metavar="TEXT",
            help="Text to measure on: wikitext2, c4, demo, or a file. [default: wikitext2; with "
            "the demo model or its text demo]",
        ),
    ] = None,
    num_windows: Annotated[int, Option(help="Windows from its start.")] = 16,
    tasks: Annotated[
        list[str] | None,
        Option(help="Tasks of lm-eval by name, or YAML files; also NAME,NAME (repeatable)."),
    ] = None,
    limit: Annotated[int | None, Option(help="Items of each task. [default: all]")] = None,
    jobs: Annotated[
        int, Option(help="Processes at once, on CUDA devices in turn where there are several.")
    ] = 1,
    keep: Annotated[
        bool, Option("--keep", help="Keep the weights of every pruning in OUT/runs.")
    ] = False,
    skip_impossible: Annotated[
        bool, Option("--skip-impossible", help="Leave out what a method cannot do.")
    ] = False,
    set_: Annotated[
        list[str] | None,
        Option("--set", help="Any other key of all recipes: KEY=VALUE (repeatable)."),
    ] = None,
    device: Annotated[str, Option(help="cuda, mps or cpu.")] = "auto",
    dtype: Annotated[str, Option(help="auto, float32, bfloat16, float16.")] = "auto",
    revision: Annotated[str | None, Option(help="Branch, tag or commit on the Hub.")] = None,
    trust_remote_code: Annotated[bool, Option("--trust-remote-code")] = False,
    dry_run: Annotated[
        bool, Option("--dry-run", help="Print the grid, its time and disk, and stop.")
    ] = False,
    overwrite: Annotated[
        bool, Option("--overwrite", help="Replace an earlier comparison in the folder.")
    ] = False,
    quiet: Annotated[bool, Option("--quiet", help="Print warnings and errors only.")] = False,
    as_json: Annotated[bool, Option("--json", help="Print events as JSON lines.")] = False,
) -> None:
    """Prune a model by several methods and amounts, and compare the results.

    llmprune compare --model demo --methods magnitude,wanda --sparsity 0.5,0.6

    Writes comparison.md, .csv, .json and .html, and pareto.png and .svg. All are of the same
    calibration text, measured on the same windows. The same command again resumes; a longer list
    adds to what is there. Where a pruning fails the others go on, and the exit code says so.
    """
    from llmprune.base.progress import Progress
    from llmprune.comparing import default_folder, make_grid, preview, run_grid

    grid = make_grid(
        *(model, methods, sparsity, pattern),
        seeds=seeds,
        tasks=tasks,
        settings=tuple(set_ or ()),
        calib=calib,
        num_samples=num_samples,
        seq_len=seq_len,
        evaluation=perplexity,
        num_windows=num_windows,
        limit=limit,
        revision=revision,
        device=device,
        dtype=dtype if dtype == "auto" else _dtype(dtype),
        trust_remote_code=trust_remote_code,
    )
    planned = preview(grid, jobs=jobs, keep=keep)
    if dry_run:
        print(json.dumps(planned.to_dict()) if as_json else planned)
        return
    progress = Progress("json" if as_json else "quiet" if quiet else "rich")
    folder = out or default_folder(model)
    found = run_grid(
        planned, folder, progress, skip_impossible=skip_impossible, overwrite=overwrite
    )
    if found is None:
        return
    progress.event("comparison", **found.data)
    if progress.mode == "rich":
        print(f"\n{found}\n\npage: {folder / 'comparison.html'}")
    if found.exit_code:
        raise typer.Exit(found.exit_code)


def export(
    model: Annotated[str, typer.Argument(help="A folder, a Hub id, or demo.")],
    to: Annotated[
        str,
        Option(help="gguf: one file for llama.cpp. packed: a masked result without its zeros."),
    ],
    out: Annotated[
        Path | None, Option(help="What to write. [default: NAME.gguf or NAME-packed, here]")
    ] = None,
    revision: Annotated[str | None, Option(help="Branch, tag or commit on the Hub.")] = None,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace an existing file.")] = False,
    as_json: Annotated[bool, Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write a checkpoint in another format, and read it back to prove it.

    Tensors keep the dtype they are stored in. Llama, Mistral, Qwen2 and Qwen3 become GGUF; masked
    results of every family become packed folders, which llmprune.delivery.packed_model loads.
    """
    name = Path(model).expanduser().resolve().name
    if to == "packed":
        from llmprune.delivery.packed_model import pack_model

        packed = pack_model(
            Path(model).expanduser(), out or Path(f"{name}-packed"), overwrite=overwrite
        )
        print(json.dumps(packed.to_dict()) if as_json else f"{packed.folder}: {packed.text()}")
        return
    if to != "gguf":
        raise RecipeError(f"to: {to!r} is no format to export to. Type --to gguf or --to packed.")
    from llmprune.delivery.gguf_file import export_gguf

    found = export_gguf(model, out or Path(f"{name}.gguf"), revision=revision, overwrite=overwrite)
    print(json.dumps(found.to_dict()) if as_json else found.text())
    for note in found.notes:
        print(f"note: {note}", file=sys.stderr)


def recover(
    folder: Annotated[str, typer.Argument(help="A result of llmprune, or its Hub id.")],
    data: Annotated[
        str | None,
        Option(help="Text to train on: what --calib takes. [default: the calibration text]"),
    ] = None,
    method: Annotated[
        str | None,
        Option(
            help="See docs/METHODS.md. [default: mask-lora; lora where tensors got smaller]",
        ),
    ] = None,
    steps: Annotated[int | None, Option(help="Optimizer steps. [default: 400]")] = None,
    batch: Annotated[int | None, Option(help="Sequences in each. [default: 8]")] = None,
    seq_len: Annotated[
        int | None, Option(help="Tokens in each. [default: 1024, at most what the model takes]")
    ] = None,
    learning_rate: Annotated[
        float | None, Option(help="At its peak. [default: the method's]")
    ] = None,
    rank: Annotated[int | None, Option(help="Of adapters. [default: 16]")] = None,
    masks: Annotated[
        str | None,
        Option(help="stored; or zeros, where another tool pruned: what is zero stays zero."),
    ] = None,
    out: Annotated[Path | None, Option(help="Folder to write. [default: NAME-recovered]")] = None,
    seed: Annotated[int | None, Option(help="Draws windows and their order.")] = None,
    device: Annotated[str | None, Option(help="cuda, mps or cpu.")] = None,
    dtype: Annotated[
        str | None, Option(help="auto, float32, bfloat16: what frozen weights are held in.")
    ] = None,
    revision: Annotated[str | None, Option(help="Branch, tag or commit on the Hub.")] = None,
    set_: Annotated[
        list[str] | None,
        Option("--set", help="Any key of the recipe, such as recover.norms=false (repeatable)."),
    ] = None,
    no_eval: Annotated[bool, Option("--no-eval", help="Measure no perplexity.")] = False,
    trust_remote_code: Annotated[bool, Option("--trust-remote-code")] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="Print what it would do.")] = False,
    overwrite: Annotated[
        bool, Option("--overwrite", help="Replace an existing result or unfinished run.")
    ] = False,
    quiet: Annotated[bool, Option("--quiet", help="Print warnings and errors only.")] = False,
    as_json: Annotated[bool, Option("--json", help="Print events as JSON lines.")] = False,
) -> None:
    """Train a pruned model on; what was removed stays removed.

    The result is a folder of its own, proven as pruned ones are. The same command again resumes an
    interrupted run; under torchrun several processes share each step.
    """
    from llmprune.base.progress import Progress
    from llmprune.recipe import recovery_recipe
    from llmprune.recovery.planning import open_recovery
    from llmprune.runs import run_recipe

    wish = {
        **{"data": data, "method": method, "steps": steps, "batch": batch, "seq_len": seq_len},
        **{"learning_rate": learning_rate, "rank": rank, "masks": masks},
    }
    top = {
        **{"out": None if out is None else str(out), "seed": seed, "device": device},
        **{"dtype": dtype, "revision": revision, "trust_remote_code": trust_remote_code or None},
    }
    settings = [*(set_ or ()), *(["evaluate.perplexity=false"] if no_eval else [])]
    recipe = recovery_recipe(folder, wish, top, settings)
    if dry_run:
        plan = open_recovery(recipe)
        print(json.dumps(plan.data()) if as_json else plan)
        return
    progress = Progress("json" if as_json else "quiet" if quiet else "rich")
    report = run_recipe(recipe, progress, overwrite=overwrite)
    if report is None:
        return
    progress.event("report", **report.data)
    if progress.mode == "rich":
        print(report)
        print(f"details: llmprune show {report.out}, or {report.out}/llmprune/report.html")


def delta(
    model: Annotated[
        str,
        typer.Argument(help="A fine-tuned model: folder or Hub id. With --rebuild a delta."),
    ],
    base: Annotated[
        str | None, Option(help="The model it was tuned from. [of a delta: the one it names]")
    ] = None,
    method: Annotated[
        str | None,
        Option(
            help="dare (random, made up for by 1 / (1 - sparsity)), darex-q (by 1 / q), magnitude. "
            "[default: dare]"
        ),
    ] = None,
    sparsity: Annotated[
        float | None, Option(help="Share of the difference to drop, below 1. [default: 0.9]")
    ] = None,
    q: Annotated[
        str | None,
        Option(
            help="For darex-q: a number; auto looks for the one that changes the logits least; "
            "analytic gives each tensor its own. [default: auto]"
        ),
    ] = None,
    calib: Annotated[
        str | None, Option(help="Text to look for q on: what --calib of pruning takes.")
    ] = None,
    rebuild: Annotated[
        Path | None, Option(help="Write the plain checkpoint of a delta to this folder.")
    ] = None,
    out: Annotated[Path | None, Option(help="Folder to write. [default: NAME-delta, here]")] = None,
    seed: Annotated[int | None, Option(help="Draws what stays. [default: 0]")] = None,
    device: Annotated[str | None, Option(help="cuda, mps or cpu, to compute logits on.")] = None,
    no_prove: Annotated[
        bool, Option("--no-prove", help="Do not rebuild the checkpoint once, to compare.")
    ] = False,
    trust_remote_code: Annotated[bool, Option("--trust-remote-code")] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="Print what it would do.")] = False,
    overwrite: Annotated[
        bool, Option("--overwrite", help="Replace an existing delta or rebuilt checkpoint.")
    ] = False,
    as_json: Annotated[bool, Option("--json", help="Print JSON.")] = False,
) -> None:
    """Store a fine-tuned model as its base plus a sparse difference, or rebuild it from them.

    llmprune delta TUNED --base BASE --out small, then llmprune delta small --rebuild DIR.

    Attention and FFN of the blocks are pruned; what else differs is kept whole, and a mask's zeros
    stay zeros. A delta takes no other base than its own. What is rebuilt is an ordinary checkpoint.
    """
    from llmprune import deltas
    from llmprune.base.progress import Progress
    from llmprune.recovery.delta_plan import DeltaWish, plan_delta

    given: dict[str, Any] = {
        **{"method": method, "sparsity": sparsity, "q": q, "calib": calib, "seed": seed},
        "device": device,
    }
    wish = {key: value for key, value in given.items() if value is not None}
    if rebuild is not None:
        if extra := [*wish, *["out"] * (out is not None), *["dry-run"] * dry_run]:
            raise RecipeError(
                f"rebuild: --{extra[0]} is of making a delta, and one is being taken apart. Type "
                "llmprune delta DIR --rebuild OUT, with --base if the base has moved."
            )
        verdict = deltas.rebuild(
            Path(model).expanduser(),
            rebuild,
            base=base,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
        )
        print(json.dumps(verdict.to_dict()) if as_json else f"{rebuild}: {verdict.text()}")
        return
    if base is None:
        raise RecipeError(
            "base: missing. A delta is what fine-tuning has added to a model; name that model with "
            "--base, or type llmprune delta DIR --rebuild OUT to take one apart."
        )
    plan = plan_delta(
        DeltaWish(model=model, base=base, trust_remote_code=trust_remote_code, **wish)
    )
    if dry_run:
        print(json.dumps(plan.data()) if as_json else plan)
        return
    target = out or Path(f"{Path(model).expanduser().resolve().name}-delta")
    progress = Progress("quiet" if as_json else "rich")
    made = deltas.make_delta(plan, target, progress, prove=not no_prove, overwrite=overwrite)
    print(json.dumps(made.to_dict()) if as_json else made.text())


def show(
    folder: Folder,
    sites: Annotated[bool, Option("--sites", help="Every site.")] = False,
    coverage: Annotated[
        bool, Option("--coverage", help="The tokens that each block's experts saw.")
    ] = False,
    html: Annotated[
        Path | None,
        Option(metavar="FILE", help="Where the page goes. [default: FOLDER/llmprune/report.html]"),
    ] = None,
) -> None:
    """Print the report of a result, and write it as a page for a browser."""
    from llmprune.pages.result import write_page
    from llmprune.report.run import Report

    report = Report.read(folder)
    print(report)
    if sites:
        print()
        print(report.table())
    if coverage:
        print()
        print(report.coverage())
    try:
        print(f"page: {write_page(folder, html)}")
    except (CheckpointError, TooLarge) as error:
        if html is not None:
            raise
        print(f"the page is not renewed: {error}", file=sys.stderr)  # of a folder that is only read


def push(
    folder: Folder,
    repo: Annotated[str, typer.Argument(help="OWNER/NAME on the Hub, or a name of your own.")],
    private: Annotated[bool, Option("--private", help="Make a new repository private.")] = False,
    base_model: Annotated[
        str | None, Option(help="Hub id of the base model, where that was a local folder.")
    ] = None,
    message: Annotated[str | None, Option(help="Of the commit.")] = None,
    revision: Annotated[str | None, Option(help="Branch to commit to. [default: main]")] = None,
    create_pr: Annotated[
        bool, Option("--create-pr", help="Propose the commit as a pull request.")
    ] = False,
    dry_run: Annotated[
        bool, Option("--dry-run", help="Print the card and the files; send nothing.")
    ] = False,
    as_json: Annotated[bool, Option("--json", help="Print JSON.")] = False,
) -> None:
    """Upload a result to the Hub in one commit, with a model card; prints the commit's address.

    Uses the token of `hf auth login` or HF_TOKEN.
    """
    from llmprune.base.progress import human_bytes
    from llmprune.pushing import package_of
    from llmprune.report.licences import better_name, misnamed
    from llmprune.report.uploading import upload

    package = package_of(folder, repo, base_model=base_model)
    files, size = package.sizes, human_bytes(sum(package.sizes.values()))
    if dry_run and as_json:
        print(json.dumps({"repo": repo, "files": files, "card": package.card}))
        return
    if dry_run:
        print(package.card)
        print("\n".join(f"{human_bytes(count):>9}  {name}" for name, count in files.items()))
        print(f"{len(files)} files, {size}, would go to {repo}; nothing was sent")
        if package.terms and (wrong := misnamed(package.terms, repo)):
            print(f"note: {wrong}. Public, it would be {better_name(package.terms, repo)}.")
        return
    done = upload(package, private=private, message=message, create_pr=create_pr, revision=revision)
    if as_json:
        print(json.dumps({**done.to_dict(), "repo": repo, "files": files}))
    else:
        print(f"{len(files)} files, {size}: {done.url}")
        print(f"all {done.num_checked} are there as they are here, by size and hash")


def collect_stats(
    model: Annotated[str, Option(help="Folder, Hub id, or demo.")],
    out: Annotated[Path, Option(help="Folder to write.")],
    for_: Annotated[
        str, Option("--for", help="The method that they are for; see `llmprune methods`.")
    ] = "wanda",
    calib: Annotated[str | None, Option(help="Text: what --calib of pruning takes.")] = None,
    num_samples: Annotated[int | None, Option(help="Calibration sequences. [default: 128]")] = None,
    seq_len: Annotated[
        int | None, Option(help="Tokens in each. [default: 2048, at most what the model takes]")
    ] = None,
    seed: Annotated[int, Option(help="Draws the calibration windows.")] = 0,
    device: Annotated[str, Option(help="cuda, mps or cpu.")] = "auto",
    dtype: Annotated[str, Option(help="auto, float32, bfloat16, float16.")] = "auto",
    revision: Annotated[str | None, Option(help="Branch, tag or commit on the Hub.")] = None,
    set_: Annotated[
        list[str] | None, Option("--set", help="Any key of the recipe: KEY=VALUE (repeatable).")
    ] = None,
    trust_remote_code: Annotated[bool, Option("--trust-remote-code")] = False,
    quiet: Annotated[bool, Option("--quiet", help="Print warnings and errors only.")] = False,
) -> None:
    """Write what a method learns of a text, all of the dense model; prune with it later.

    llmprune --model MODEL --method METHOD --sparsity 0.5 --set calibration.statistics=DIR
    --set prune.propagate=dense
    """
    from llmprune.api import make_recipe
    from llmprune.base.progress import Progress
    from llmprune.catalog import METHODS
    from llmprune.collecting import collect

    row = METHODS[for_]
    recipe = make_recipe(
        model,
        sparsity=None if ":" in row.pattern else 0.5,
        method=for_,
        out=out,
        calib=calib,
        num_samples=num_samples,
        seq_len=seq_len,
        settings=["prune.propagate=dense", "evaluate.perplexity=false", *(set_ or ())],
        seed=seed,
        device=device,
        dtype="auto" if dtype == "auto" else _dtype(dtype),
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    found = collect(recipe, out, Progress("quiet" if quiet else "rich"))
    if not quiet:
        print(_collected(found))
        use = f"--set calibration.statistics={out} --set prune.propagate=dense"
        print(f"prune with: llmprune --model {model} --method {for_} --sparsity 0.5 {use}")


def merge_stats(
    folders: Annotated[list[Path], typer.Argument(help="Folders that `stats collect` wrote.")],
    out: Annotated[Path, Option(help="Folder to write.")],
) -> None:
    """Add statistics of one model that were collected of several texts, in the order given."""
    from llmprune.collecting import merge

    print(_collected(merge(folders, out)))


def _collected(found: Any) -> str:
    """Return what a folder of statistics holds, in a line."""
    record = found.record
    texts = len(record["texts"])
    return (
        f"{found.folder}: {', '.join(record['statistics'])} of {record['model']['name']}, "
        f"{len(record['blocks'])} blocks, {found.num_tokens:,} tokens in {texts} "
        f"text{'' if texts == 1 else 's'}"
    )


def _bos(policy: str) -> bool | str:
    """Return the policy that a word names; what is none is left to be refused."""
    return {"true": True, "false": False}.get(policy.lower(), policy)


def _numbers(flag: str, text: str) -> list[int]:
    """Return the whole numbers of `1,4`.

    Raises:
        RecipeError: it is not of this form.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise RecipeError(
            f"{flag}: {text!r} is not a list of whole numbers. Type --{flag} 1,4."
        ) from None


def _dtype(name: str) -> str:
    """Return the name of a dtype to compute in.

    Raises:
        RecipeError: it is none.
    """
    if name not in ("float32", "bfloat16", "float16"):
        raise RecipeError(f"dtype: {name!r} is none of float32, bfloat16, float16.")
    return name
