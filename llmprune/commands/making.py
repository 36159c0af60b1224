"""Commands that make something of a model: a recovered one, a difference, a file, a repository."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Option

from llmprune.base.errors import RecipeError
from llmprune.commands.options import Folder


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
    from llmprune.runs import later_lines, plans_of, run_recipe

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
        plan, *later = plans_of(recipe)
        if as_json:
            print(json.dumps(plan.data() | ({"then": later} if later else {})))
        else:
            print("\n".join([str(plan), *later_lines(later)]))
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
        print("".join(f"note: {name} is too large to go\n" for name in package.left), end="")
        if package.terms and (wrong := misnamed(package.terms, repo)):
            print(f"note: {wrong}. Public, it would be {better_name(package.terms, repo)}.")
        return
    done = upload(package, private=private, message=message, create_pr=create_pr, revision=revision)
    if as_json:
        print(json.dumps({**done.to_dict(), "repo": repo, "files": files}))
    else:
        print(f"{len(files)} files, {size}: {done.url}")
        print(f"all {done.num_checked} are there as they are here, by size and hash")
        print("".join(f"note: {name} was too large to go\n" for name in package.left), end="")
