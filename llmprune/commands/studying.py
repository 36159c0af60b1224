"""Commands that study: what pruning did, which method does it best, and statistics kept apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Option

from llmprune.commands.options import dtype_of


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
        dtype=dtype if dtype == "auto" else dtype_of(dtype),
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
    statistics: Annotated[
        str,
        Option(
            help="sequential: each pruning learns from what its own pruned blocks pass on, as the "
            "bare command does. dense: all from the dense model, collected once."
        ),
    ] = "sequential",
    pareto: Annotated[
        str, Option(help="What the front is of: perplexity, or kl from the dense model.")
    ] = "perplexity",
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
    from llmprune.comparing import default_folder, run_grid
    from llmprune.comparison.previewing import make_grid, preview

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
        statistics=statistics,
        revision=revision,
        device=device,
        dtype=dtype if dtype == "auto" else dtype_of(dtype),
        trust_remote_code=trust_remote_code,
    )
    planned = preview(grid, jobs=jobs, keep=keep, pareto=pareto)
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
        dtype="auto" if dtype == "auto" else dtype_of(dtype),
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
