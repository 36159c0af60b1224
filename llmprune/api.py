"""The public functions: plan, prune, run, gate, load, push; measuring.py has those that measure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmprune.analyzing import analyze
from llmprune.base.errors import RecipeError
from llmprune.base.progress import Progress
from llmprune.checkpoint.locate import open_source
from llmprune.checkpoint.source import Source, open_folder, read_json
from llmprune.comparing import compare
from llmprune.comparison.result import Comparison
from llmprune.delivery.gate import Verdict, pass_gate
from llmprune.delivery.heterogeneous import is_own_code
from llmprune.delivery.packed_model import load_packed, packed_folder
from llmprune.engine.calibrating import calibration_windows
from llmprune.engine.opening import (
    anatomies_of,
    check_walk,
    choose_device,
    open_blocks,
    open_plan,
    read_tokenizer,
    storage_dtype,
)
from llmprune.evaluation.speed import bench
from llmprune.measuring import evaluate, perplexity, rolling_perplexity, store_measurement
from llmprune.pushing import carry_out, check_wish, package_of
from llmprune.recipe import Recipe, build, default_steps, override, recovery_recipe
from llmprune.report.run import Report
from llmprune.resident_steps import run_resident
from llmprune.runs import plans_of, result_folder, run_recipe
from llmprune.steps import run_together

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from llmprune.engine.inspection import Inspection
    from llmprune.engine.plan import Plan
    from llmprune.recovery.planning import RecoverPlan

Mix = Sequence[Mapping[str, Any]]
Text = str | PathLike[str] | Iterable[str] | Mix


def make_recipe(
    model: str,
    *,
    sparsity: float | None = None,
    method: str | None = None,
    pattern: str | None = None,
    effort: str | None = None,
    target: Mapping[str, str] | None = None,
    out: str | Path | None = None,
    calib: str | Mix | None = None,
    num_samples: int | None = None,
    seq_len: int | None = None,
    settings: Iterable[str] = (),
    **others: Any,
) -> Recipe:
    """Build a recipe of one pruning from keywords; `settings` are `key=value` overrides.

    >>> make_recipe("demo", sparsity=0.5).prune.method
    'wanda'
    """
    prune: dict[str, Any] = {"sparsity": sparsity, "method": method, "pattern": pattern}
    prune |= {"effort": effort, "target": dict(target) if isinstance(target, Mapping) else target}
    calibration = {"data": calib, "num_samples": num_samples, "seq_len": seq_len}
    data: dict[str, Any] = {"model": model, "steps": default_steps()}
    data["steps"][0]["prune"] = _given(prune)
    data["calibration"] = _given(calibration)
    data |= _given({"out": str(out) if out else None, **others})
    return build(override(data, list(settings)))


def plan(recipe: Recipe | str, **wishes: Any) -> Any:
    """Decide a run without reading a weight; the repr is the table of --dry-run.

    Takes a `Recipe`, or a model and the keywords of `prune`. Of a recipe with several stages it is
    the plan of the first, a `Plan`, or a `RecoverPlan` where that recovers; `run` runs them all.

    Raises:
        LlmpruneError: the wish cannot be met; says why.
    """
    return plans_of(_recipe(recipe, wishes))[0]


def run(
    plan: Plan | RecoverPlan,
    *,
    tokens: Tensor | None = None,
    overwrite: bool = False,
    quiet: bool = False,
) -> Report:
    """Carry out a plan, or continue it where an earlier run stopped.

    `tokens` (N, T) int64 replace the calibration text of the recipe. Under torchrun every process
    calls this, and the others return the report that the first one wrote.

    Raises:
        LlmpruneError: nothing is published, and the source is as it was.
    """
    progress = Progress("quiet" if quiet else "rich")
    budget = getattr(plan, "budget", None)
    budget = budget if budget is not None and budget.facts else None
    report = run_recipe(plan.recipe, progress, tokens=tokens, overwrite=overwrite, budget=budget)
    return report or Report.read(result_folder(plan.recipe))


def prune(
    model: str | PathLike[str] | PreTrainedModel,
    *,
    sparsity: float | None = None,
    method: str | None = None,
    pattern: str | None = None,
    effort: str | None = None,
    target: Mapping[str, str] | None = None,
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
        method: a row of `llmprune methods`; Wanda, or what `effort` says, when absent.
        effort: "fast", "good" or "best": what else is done, where nothing else is said.
        target: `{"ppl": "+5%"}` finds the highest sparsity that keeps perplexity within it.
        pattern: "unstructured", "N:M" (keep N of every M), "HxW" (tiles), or whole units, such as
            "ffn-channels+heads" or "blocks"; what the method is for when absent.
        out: the folder to write; named for model, method and sparsity when absent.
        calib: "c4" or another preset, "demo", a file or folder, OWNER/NAME on the Hub, a mix such
            as "c4:3,demo:1" (or a list of mappings with data, weight, split, config, column), texts
            themselves, or token ids (N, T) int64. When absent: c4; with the demo model its text.
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
        effort=effort,
        target=target,
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
        check_wish(recipe)
        wished, recipe = recipe.push, recipe.without_push()
        opened = open_plan(recipe)
        if texts is not None:
            tokenizer = tokenizer or read_tokenizer(opened.source, recipe)
            windows = calibration_windows(opened.plan, tokenizer, progress, texts=texts)
            report = run_together(opened, progress, tokens=windows, overwrite=overwrite)
        else:
            report = run_together(opened, progress, tokens=tokens, overwrite=overwrite)
        carry_out(wished, report, progress)
        return report or Report.read(Path(str(opened.plan.out)))
    if recipe.push is not None:
        raise RecipeError(
            "push: a model in memory is pruned in place and has no folder to push. Prune a folder "
            "or a model of the Hub, or leave the step out."
        )
    if out is not None:
        raise RecipeError(
            "out: a model in memory is pruned in place. Save it with model.save_pretrained(DIR)."
        )
    return run_resident(model, recipe, progress, tokens=tokens, tokenizer=tokenizer, texts=texts)


def _calibration(calib: Any) -> tuple[str | Mix | None, list[str] | None, Tensor | None]:
    """Tell apart what calibration may be: a name, path or mix, texts, or token ids.

    Raises:
        RecipeError: it is none of these.
    """
    if calib is None or isinstance(calib, str | PathLike):
        return None if calib is None else str(calib), None, None
    if isinstance(calib, torch.Tensor):
        return None, None, calib
    texts = list(calib) if isinstance(calib, Iterable) else []
    if isinstance(calib, Mapping) or (texts and isinstance(texts[0], Mapping)):
        return [calib] if isinstance(calib, Mapping) else texts, None, None
    if not texts or not all(isinstance(text, str) for text in texts):
        raise RecipeError(
            f"calib: {type(calib).__name__} holds no texts. Give a name such as 'c4' or 'demo', a "
            "file, texts (at least one str), or token ids as a tensor (sequences, tokens)."
        )
    return None, texts, None


def recover(
    folder: str | PathLike[str],
    *,
    data: str | Mix | Tensor | None = None,
    method: str | None = None,
    steps: int | None = None,
    batch: int | None = None,
    seq_len: int | None = None,
    learning_rate: float | None = None,
    rank: int | None = None,
    out: str | Path | None = None,
    seed: int = 0,
    overwrite: bool = False,
    quiet: bool = False,
    settings: Iterable[str] = (),
    **others: Any,
) -> Report | None:
    """Train a pruned checkpoint into a new folder; what was removed stays removed.

    Under torchrun every process calls this, and the first returns the report, the others None.

    Args:
        folder: a result of llmprune; it is not changed.
        data: what `calib` of `prune` takes, or token ids (N, T) int64; the calibration text when
            absent.
        method: a row of `llmprune.recovery.methods.RECOVERIES`; when absent mask-lora where masks
            are stored, and lora where tensors got smaller.
        steps: of the optimizer. batch: sequences in each. seq_len: tokens in each sequence.
        learning_rate: at its peak; the method's when absent. rank: of adapters.
        settings: further `key=value` overrides, such as "recover.norms=false".

    Raises:
        LlmpruneError: the wish cannot be met, or the training diverges; nothing is published.
    """
    text, _, tokens = _calibration(data)
    if tokens is not None and tokens.ndim == 2:
        seq_len = tokens.shape[1]
    wish = {
        **{"data": text, "method": method, "steps": steps, "batch": batch, "seq_len": seq_len},
        **{"learning_rate": learning_rate, "rank": rank},
    }
    top = {"out": None if out is None else str(out), "seed": seed, **others}
    recipe = recovery_recipe(str(folder), wish, top, list(settings))
    progress = Progress("quiet" if quiet else "rich")
    return run_recipe(recipe, progress, tokens=tokens, overwrite=overwrite)


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


def inspect(
    model: str | PathLike[str] | PreTrainedModel,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Inspection:
    """Return what a model looks like: blocks by kind, taps, couplings, experts, what is eligible.

    Reads no weight. The repr is what `llmprune inspect` prints.

    Raises:
        LlmpruneError: the model cannot be pruned; says what was found.

    >>> inspect("demo").eligible
    4718592
    """
    from llmprune.engine.inspection import inspection_of
    from llmprune.walk.resident import in_memory

    if not isinstance(model, str | PathLike):
        with in_memory(model) as blocks:
            return inspection_of(anatomies_of(blocks), source="in memory", family=blocks.family)
    recipe = make_recipe(
        str(model), sparsity=0.5, revision=revision, trust_remote_code=trust_remote_code
    )
    source = open_source(str(model), revision=revision)
    streamed = open_blocks(source, recipe, torch.device("cpu"), storage_dtype(source))
    check_walk(streamed.model.config, streamed.family, trust_remote_code=trust_remote_code)
    return inspection_of(anatomies_of(streamed), source=source.name, family=streamed.family)


def load(
    folder: str | Path,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
) -> Any:
    """Load a result of any tier, a packed one too, as a `PreTrainedModel`, in evaluation mode.

    `folder` may be OWNER/NAME on the Hub too, `revision` a branch, tag or commit of it. Code beside
    the model runs only with `trust_remote_code`, or where it is what llmprune ships.

    Raises:
        CheckpointError: the folder is not a checkpoint, or the Hub has no such.
    """
    from transformers import AutoModelForCausalLM

    model: Any
    packed = packed_folder(str(folder), revision)
    if packed is not None:
        model = load_packed(packed, dtype=dtype, trust_remote_code=trust_remote_code)
        return model.to(choose_device(device)).eval()
    source = open_source(str(folder), revision=revision)
    for file in sorted({entry.file for entry in source.entries.values()}):
        source.path(file)  # fetched where the source is on the Hub
    trust_remote_code = trust_remote_code or is_own_code(source.folder)
    model = AutoModelForCausalLM.from_pretrained(
        source.folder, dtype=dtype, trust_remote_code=trust_remote_code
    )
    return model.to(choose_device(device)).eval()


def push(
    folder: str | PathLike[str],
    repo: str,
    *,
    private: bool = False,
    base_model: str | None = None,
    message: str | None = None,
    create_pr: bool = False,
    revision: str | None = None,
) -> str:
    """Upload a result to the Hub in one commit, with a model card; return the commit's address.

    The token is the one of `hf auth login` or HF_TOKEN. Paths of this machine do not travel.

    Args:
        folder: a finished result of llmprune; it is not changed.
        repo: OWNER/NAME, or a name of your own; made where it does not exist.
        private: make a new repository private.
        base_model: the Hub id of the base model, where that was pruned from a local folder.
        message: of the commit. create_pr: propose the commit instead of making it.
        revision: a branch to commit to, made where it does not exist; main when absent.

    Raises:
        LlmpruneError: the folder is no proven result, or the Hub refuses; nothing was committed.
    """
    from llmprune.report.uploading import upload

    package = package_of(folder, repo, base_model=base_model)
    done = upload(package, private=private, message=message, create_pr=create_pr, revision=revision)
    return done.url


def _recipe(recipe: Recipe | str, wishes: dict[str, Any]) -> Recipe:
    """Return a recipe from one, or from a model and keywords."""
    return recipe if isinstance(recipe, Recipe) else make_recipe(recipe, **wishes)


def _given(wishes: dict[str, Any]) -> dict[str, Any]:
    """Return the wishes that were made."""
    return {key: value for key, value in wishes.items() if value is not None}


__all__ = [
    "Comparison",
    "analyze",
    "bench",
    "compare",
    "evaluate",
    "gate",
    "inspect",
    "load",
    "make_recipe",
    "perplexity",
    "plan",
    "prune",
    "push",
    "recover",
    "rolling_perplexity",
    "run",
    "store_measurement",
]
