"""The public functions: plan, prune, run, gate, load, perplexity."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmprune.base.errors import RecipeError
from llmprune.base.progress import Progress
from llmprune.calibration.text import evaluation_text, token_ids
from llmprune.checkpoint.locate import open_source
from llmprune.checkpoint.sink import write_json
from llmprune.checkpoint.source import Source, open_folder, read_json
from llmprune.delivery.gate import Verdict, pass_gate
from llmprune.engine.opening import (
    choose_device,
    choose_dtype,
    open_blocks,
    open_plan,
    read_tokenizer,
    storage_dtype,
)
from llmprune.evaluation.perplexity import Perplexity, cut_windows, of_blocks, of_model
from llmprune.recipe import Recipe, build, default_steps, override
from llmprune.report.run import Report
from llmprune.steps import calibration_tokens, run_resident, run_streamed

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from llmprune.engine.plan import Plan

Text = str | PathLike[str] | Iterable[str]


def make_recipe(
    model: str,
    *,
    sparsity: float | None = None,
    method: str | None = None,
    pattern: str | None = None,
    out: str | Path | None = None,
    calib: str | None = None,
    num_samples: int | None = None,
    seq_len: int | None = None,
    settings: Iterable[str] = (),
    **others: Any,
) -> Recipe:
    """Build a recipe of one pruning from keywords; `settings` are `key=value` overrides.

    >>> make_recipe("demo", sparsity=0.5).prune.method
    'wanda'
    """
    prune = {"sparsity": sparsity, "method": method, "pattern": pattern}
    calibration = {"data": calib, "num_samples": num_samples, "seq_len": seq_len}
    data: dict[str, Any] = {"model": model, "steps": default_steps()}
    data["steps"][0]["prune"] = _given(prune)
    data["calibration"] = _given(calibration)
    data |= _given({"out": str(out) if out else None, **others})
    return build(override(data, list(settings)))


def plan(recipe: Recipe | str, **wishes: Any) -> Plan:
    """Decide a run without reading a weight; the repr is the table of --dry-run.

    Takes a `Recipe`, or a model and the keywords of `prune`.

    Raises:
        LlmpruneError: the wish cannot be met; says why.
    """
    return open_plan(_recipe(recipe, wishes)).plan


def run(
    plan: Plan, *, tokens: Tensor | None = None, overwrite: bool = False, quiet: bool = False
) -> Report:
    """Carry out a plan, or continue it where an earlier run stopped.

    `tokens` (N, T) int64 replace the calibration text of the recipe.

    Raises:
        LlmpruneError: nothing is published, and the source is as it was.
    """
    progress = Progress("quiet" if quiet else "rich")
    return run_streamed(open_plan(plan.recipe), progress, tokens=tokens, overwrite=overwrite)


def prune(
    model: str | PathLike[str] | PreTrainedModel,
    *,
    sparsity: float | None = None,
    method: str = "wanda",
    pattern: str = "unstructured",
    out: str | Path | None = None,
    calib: Text | Tensor | None = None,
    tokenizer: Any = None,
    num_samples: int = 128,
    seq_len: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
    quiet: bool = False,
    settings: Iterable[str] = (),
    **others: Any,
) -> Report:
    """Prune a checkpoint into a new folder, or a model in memory in place.

    Args:
        model: a folder, a Hub id, "demo", or a `PreTrainedModel`.
        sparsity: the share of the eligible weights to remove, in [0, 1); N:M patterns fix it.
        method: a row of `llmprune methods`.
        pattern: "unstructured", "N:M" (keep N of every M) or "ffn-channels".
        out: the folder to write; named for model, method and sparsity when absent.
        calib: "demo", a file, texts, or token ids (N, T) int64.
        tokenizer: for a model in memory, unless `calib` holds token ids.
        num_samples: calibration sequences. seq_len: tokens in each; min(2048, the model's maximum).
        settings: further `key=value` overrides of the recipe, such as "prune.skip=['*down_proj']".

    Raises:
        LlmpruneError: the wish cannot be met; says why. Source and model are as they were, except a
            model in memory when the fault comes in the middle.
    """
    data, texts, tokens = _calibration(calib)
    if tokens is not None and tokens.ndim == 2:
        num_samples, seq_len = tokens.shape
    if isinstance(model, str | PathLike):
        name = str(model)
    else:
        name = getattr(model.config, "_name_or_path", "") or "a model in memory"
    recipe = make_recipe(
        name,
        sparsity=sparsity,
        method=method,
        pattern=pattern,
        out=out,
        calib=data,
        num_samples=num_samples,
        seq_len=seq_len,
        settings=settings,
        seed=seed,
        **others,
    )
    progress = Progress("quiet" if quiet else "rich")
    if isinstance(model, str | PathLike):
        opened = open_plan(recipe)
        if texts is not None:
            tokenizer = tokenizer or read_tokenizer(opened.source, recipe)
            tokens = calibration_tokens(opened.plan, tokenizer, progress, texts=texts)
        return run_streamed(opened, progress, tokens=tokens, overwrite=overwrite)
    if out is not None:
        raise RecipeError(
            "out: a model in memory is pruned in place. Save it with model.save_pretrained(DIR)."
        )
    return run_resident(model, recipe, progress, tokens=tokens, tokenizer=tokenizer, texts=texts)


def _calibration(calib: Any) -> tuple[str | None, list[str] | None, Tensor | None]:
    """Tell apart what calibration may be: a name or path, texts, or token ids.

    Raises:
        RecipeError: it is none of these.
    """
    if calib is None or isinstance(calib, str | PathLike):
        return None if calib is None else str(calib), None, None
    if isinstance(calib, torch.Tensor):
        return None, None, calib
    texts = list(calib) if isinstance(calib, Iterable) else []
    if not texts or not all(isinstance(text, str) for text in texts):
        raise RecipeError(
            f"calib: {type(calib).__name__} holds no texts. Give 'demo', a file, texts (at least "
            "one str), or token ids as a tensor (sequences, tokens)."
        )
    return None, texts, None


def gate(folder: str | Path, *, dtype: str = "float32", trust_remote_code: bool = False) -> Verdict:
    """Prove that a folder loads the stock way in a fresh process and computes what it should.

    Compares untouched tensors with the source where that still lies at its path.

    Raises:
        WontLoad, CheckpointError: it does not; says what differs.
    """
    path = Path(folder)
    return pass_gate(
        path,
        device=torch.device("cpu"),
        dtype=getattr(torch, dtype),
        source=_recorded_source(path),
        trust_remote_code=trust_remote_code,
    )


def _recorded_source(folder: Path) -> Source | None:
    """Return the source of a result, where it still lies and is what it was."""
    path = folder / "llmprune" / "run.json"
    if not path.exists():
        return None
    recorded = read_json(path).get("source", {})
    home = Path(recorded.get("folder", ""))
    if recorded.get("name") == "demo":
        source = open_source("demo")
    elif recorded.get("folder") and (home / "config.json").exists():
        source = open_folder(home)
    else:
        return None
    return source if source.fingerprint() == recorded.get("fingerprint") else None


def load(folder: str | Path, *, dtype: str = "auto", device: str = "auto") -> Any:
    """Load a result as a `PreTrainedModel`, in evaluation mode.

    Raises:
        CheckpointError: the folder is not a checkpoint.
    """
    from transformers import AutoModelForCausalLM

    source = open_source(str(folder))
    for file in sorted({entry.file for entry in source.entries.values()}):
        source.path(file)  # fetched where the source is on the Hub
    model: Any = AutoModelForCausalLM.from_pretrained(source.folder, dtype=dtype)
    return model.to(choose_device(device)).eval()


def perplexity(
    model: Any,
    tokenizer: Any = None,
    data: str = "demo",
    *,
    seq_len: int | None = None,
    num_windows: int | None = None,
    bos: bool = False,
    micro_batch: int = 1,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Perplexity:
    """Measure perplexity by the papers' protocol: non-overlapping windows of one joined text.

    Args:
        model: a `PreTrainedModel`, or a folder, which is streamed and may be larger than memory.
        tokenizer: the model's; read from the folder when absent.
        data: "demo" (the bundled evaluation text) or a file.
        seq_len: tokens per window; min(2048, the model's maximum).
        num_windows: how many from the start of the text; all when absent.
        bos: begin every window with the BOS token (the papers do not).

    Raises:
        RecipeError: the text is shorter than one window.
    """
    from llmprune.engine.plan import sequence_length

    if num_windows is not None and num_windows < 1:
        raise RecipeError(f"num_windows: {num_windows} windows measure nothing. Ask for 1 or more.")
    streamed = isinstance(model, str | PathLike)
    name = str(model) if streamed else "in memory"
    recipe = make_recipe(
        name,
        sparsity=0.5,
        seq_len=seq_len,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    if streamed:
        source = open_source(str(model), revision=revision)
        tokenizer = tokenizer or read_tokenizer(source, recipe)
        where = choose_device(device)
        kind = choose_dtype(dtype, storage_dtype(source), where)
        blocks = open_blocks(source, recipe, where, kind)
        config = blocks.model.config
    else:
        config = model.config
    if tokenizer is None:
        raise RecipeError("tokenizer: a model in memory needs one; pass the model's tokenizer.")
    length = sequence_length(recipe, config)
    bos_id = tokenizer.bos_token_id if bos else None
    if bos and bos_id is None:
        raise RecipeError("bos: this tokenizer has no BOS token; leave bos out.")
    limit = None if num_windows is None else num_windows * length + 1
    ids = token_ids(evaluation_text(data), tokenizer, limit=limit)
    windows = cut_windows(ids, length, num_windows=num_windows, bos_id=bos_id)
    measure = of_blocks if streamed else of_model
    value, count = measure(blocks if streamed else model, windows, micro_batch=micro_batch)
    return Perplexity(
        value=value,
        num_windows=len(windows),
        seq_len=length,
        num_predicted=count,
        bos=bos,
        data=data,
    )


def store_perplexity(folder: str | Path, found: Perplexity) -> bool:
    """Append a measurement to the folder of a result; other models are left as they are."""
    path = Path(folder) / "llmprune" / "evaluations.json"
    if str(folder) == "demo" or not (path.parent / "report.json").exists():
        return False
    before = read_json(path)["perplexity"] if path.exists() else []
    write_json(path, {"perplexity": [*before, asdict(found)]})
    return True


def _recipe(recipe: Recipe | str, wishes: dict[str, Any]) -> Recipe:
    """Return a recipe from one, or from a model and keywords."""
    return recipe if isinstance(recipe, Recipe) else make_recipe(recipe, **wishes)


def _given(wishes: dict[str, Any]) -> dict[str, Any]:
    """Return the wishes that were made."""
    return {key: value for key, value in wishes.items() if value is not None}


__all__ = ["gate", "load", "make_recipe", "perplexity", "plan", "prune", "run"]
