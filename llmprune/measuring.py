"""Measuring a model that is named or given: perplexity of tokens, of words, and tasks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmprune.base.errors import LlmpruneError, RecipeError
from llmprune.base.progress import Progress
from llmprune.calibration.heldout import evaluation_text, most_windows
from llmprune.calibration.selection import AUTO, DEMO, EVALUATION, evaluation_data, is_demo
from llmprune.checkpoint.locate import open_source
from llmprune.checkpoint.sink import write_json
from llmprune.checkpoint.source import Source, open_folder, read_json
from llmprune.delivery.masks import OWN
from llmprune.engine.opening import (
    choose_device,
    choose_dtype,
    open_blocks,
    read_tokenizer,
    storage_dtype,
)
from llmprune.engine.planning import sequence_length
from llmprune.evaluation.harness import check_fits, run_tasks
from llmprune.evaluation.perplexity import Perplexity, loss_of_blocks, loss_of_model, pose
from llmprune.evaluation.remembered import model_key, recall, remember, score_key, tasks_key
from llmprune.evaluation.rolling import RollingPerplexity, predict_text, prefix_token
from llmprune.evaluation.scores import ALONE, DENSE, PRUNED, Evaluation, Score, TaskFacts
from llmprune.evaluation.tasks import hushed, open_tasks
from llmprune.evaluation.timings import Bench
from llmprune.evaluation.windows import Bos, Windows
from llmprune.pages.result import renew_page
from llmprune.recipe import build, default_steps

if TYPE_CHECKING:
    from llmprune.recipe import Recipe

KINDS = {
    Perplexity: "perplexity",
    RollingPerplexity: "rolling",
    Evaluation: "tasks",
    Bench: "speed",
}


def perplexity(
    model: Any,
    tokenizer: Any = None,
    data: str | PathLike[str] = "auto",
    *,
    seq_len: int | None = None,
    num_windows: int | None = None,
    stride: int | None = None,
    bos: Bos = False,
    micro_batch: int = 1,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Perplexity:
    """Measure the perplexity of tokens over windows of one joined text, as the papers do.

    Args:
        model: a `PreTrainedModel`, or a folder, which is streamed and may be larger than memory.
        tokenizer: the model's; read from the folder when absent.
        data: "demo" (the bundled evaluation text), "wikitext2" or "c4" (joined and split as in the
            papers), or a file. "auto" is what the recipe of a result says, demo for the demo model,
            and else wikitext2.
        seq_len: tokens per window; min(2048, the model's maximum).
        num_windows: how many from the start of the text; when absent all, or as many tokens as the
            papers score (c4: 256 windows).
        stride: windows begin this many tokens apart and score what none before them did; by default
            they do not overlap. `llmprune.evaluation.windows.cut_windows` defines both.
        bos: True begins every window with BOS, False does not (as the papers), "auto" does what the
            tokenizer does with a text.

    Raises:
        RecipeError: the text is shorter than one window.
    """
    if num_windows is not None and num_windows < 1:
        raise RecipeError(f"num_windows: {num_windows} windows measure nothing. Ask for 1 or more.")
    wish = _wish(model, seq_len=seq_len, revision=revision, trust_remote_code=trust_remote_code)
    opened = _open(model, tokenizer, wish, device, dtype)
    data = _text_for(model, data)
    most = None if num_windows else most_windows(data)
    question = pose(
        evaluation_text(data, key="perplexity", tokenizer=opened.tokenizer),
        opened.tokenizer,
        data=data,
        seq_len=opened.seq_len,
        stride=stride,
        num_windows=num_windows,
        num_tokens=most and most * opened.seq_len,
        bos=bos,
    )
    loss = opened.loss(question.windows, micro_batch)
    found = question.answer(*loss, dtype=opened.dtype)
    if found.warning:
        Progress("quiet").warn(found.warning)
    return found


def _text_for(model: Any, data: str | PathLike[str]) -> str:
    """Return the text to measure on: what is asked for, or what `auto` means for a model."""
    if str(data) != AUTO:
        return str(data)
    streamed = isinstance(model, str | PathLike)
    name = str(model) if streamed else getattr(model, "name_or_path", "")
    record = Path(name) / "llmprune" / "run.json"
    if streamed and record.exists():
        return evaluation_data(build(read_json(record)["wish"]))
    return DEMO if is_demo(name) else EVALUATION


def rolling_perplexity(
    model: Any,
    tokenizer: Any = None,
    data: str | PathLike[str] = "auto",
    *,
    seq_len: int | None = None,
    micro_batch: int = 1,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> RollingPerplexity:
    """Measure perplexity by word and by byte of a whole text, every token predicted once.

    These compare models whose tokenizers differ, and are what lm-evaluation-harness calls
    `word_perplexity`, `byte_perplexity` and `bits_per_byte`. The perplexity of tokens is another
    number. Arguments are those of `perplexity`; the text counts as one document.

    Raises:
        RecipeError: the text is empty, or the tokenizer has neither BOS nor end-of-text.
    """
    wish = _wish(model, seq_len=seq_len, revision=revision, trust_remote_code=trust_remote_code)
    opened = _open(model, tokenizer, wish, device, dtype)
    data = _text_for(model, data)
    prefix_token(opened.tokenizer)  # refused before a text is fetched
    return predict_text(
        lambda windows: opened.loss(windows, micro_batch),
        evaluation_text(data, key="perplexity", tokenizer=opened.tokenizer),
        opened.tokenizer,
        data=data,
        seq_len=opened.seq_len,
        dtype=str(opened.dtype).removeprefix("torch."),
    )


def evaluate(
    model: Any,
    tasks: str | PathLike[str] | Sequence[str | PathLike[str]],
    tokenizer: Any = None,
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 1,
    baseline: str | PathLike[str] | None = "auto",
    include_path: str | Path | None = None,
    apply_chat_template: bool = False,
    seed: int = 0,
    cache: bool = True,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Evaluation:
    """Run tasks of lm-evaluation-harness on a result and on the dense model that it came from.

    One model at a time is in memory, whole, as transformers loads it. Scores of a checkpoint are
    kept in ~/.cache/llmprune, by the bytes of model and tasks, and are not measured twice.

    Args:
        model: a folder, a Hub id, "demo", or a `PreTrainedModel` with its `tokenizer`.
        tasks: names or globs of lm-eval's tasks, or YAML files of your own.
        limit: items from the start of each task; all when absent.
        num_fewshot: worked examples in the prompt; the task's own number when absent.
        baseline: "auto", the model that a result of llmprune was made from; a folder or Hub id; or
            None.
        include_path: a folder with YAML files of tasks, which are then known by name.
        apply_chat_template: ask as the model's chat template does.
        seed: draws the worked examples.
        cache: take scores that were measured before; False measures again.

    Raises:
        UnknownName: there is no such task.
        RecipeError: a task's data cannot be read.
        TooLarge: the weights do not fit into memory.
    """
    for name, count in (("limit", limit), ("batch_size", batch_size)):
        if count is not None and count < 1:
            raise RecipeError(f"{name}: {count} measures nothing. Give 1 or more.")
    wish = _wish(model, revision=revision, trust_remote_code=trust_remote_code)
    sides, notes = _sides(model, tokenizer, wish, baseline)
    where = choose_device(device)
    for side in sides.values():
        side.check_fits(dtype, where)
    if num_fewshot is not None and num_fewshot < 0:
        raise RecipeError(f"num_fewshot: {num_fewshot} examples cannot be shown. Give 0 or more.")
    names = [tasks] if isinstance(tasks, str | PathLike) else list(tasks)
    opened = open_tasks(
        [str(name) for name in names], include_path=include_path, num_fewshot=num_fewshot
    )
    asked: dict[str, Any] = {
        "limit": limit,
        "batch_size": batch_size,
        "apply_chat_template": apply_chat_template,
        "seed": seed,
    }
    scores: dict[str, tuple[Score, ...]] = {}
    facts: dict[str, TaskFacts] = {}
    computed, again = {}, []
    for role, side in sides.items():
        computed[role] = side.computed(dtype, where)
        key = side.key(opened, {**asked, "computed": computed[role]}) if cache else None
        told = recall(key) if key else None
        if told is not None:
            again.append(role)
        else:
            with side.held(dtype, where, trust_remote_code) as (held, words):
                told = run_tasks(held, words, opened, **asked)
            if key:
                remember(key, told)
        scores[role], facts, said = told
        notes += [note for note in said if note not in notes]
    return Evaluation(
        models={role: side.name for role, side in sides.items()},
        scores=scores,
        tasks=facts,
        settings={
            **asked,
            "lm_eval": version("lm_eval"),
            "num_fewshot": num_fewshot,
            "computed": computed,
            "measured before": again,
        },
        notes=tuple(notes),
    )


def store_measurement(
    folder: str | PathLike[str], found: Perplexity | RollingPerplexity | Evaluation | Bench
) -> bool:
    """Append a measurement to the folder of a result, and write its page anew.

    Other models are left as they are.
    """
    path = Path(folder) / OWN / "evaluations.json"
    if str(folder) == "demo" or not (path.parent / "report.json").exists():
        return False
    before = read_json(path) if path.exists() else {}
    kind = KINDS[type(found)]
    row = found.to_dict() if isinstance(found, Evaluation | Bench) else asdict(found)
    write_json(path, {**before, kind: [*before.get(kind, []), row]})
    renew_page(Path(folder))
    return True


@dataclass(frozen=True, kw_only=True)
class _Opened:
    """A model opened for perplexity, streamed or in memory, with its tokenizer and window."""

    tokenizer: Any
    seq_len: int
    dtype: torch.dtype
    model: Any = None
    blocks: Any = None

    def loss(self, windows: Windows, micro_batch: int) -> tuple[float, int]:
        """Return (summed negative log-likelihood, predicted tokens).

        Raises:
            RecipeError: the micro-batch holds nothing.
        """
        if micro_batch < 1:
            raise RecipeError(f"micro_batch: {micro_batch} measures nothing. Give 1 or more.")
        if self.blocks is not None:
            return loss_of_blocks(self.blocks, *windows, micro_batch=micro_batch)
        return loss_of_model(self.model, *windows, micro_batch=micro_batch)


@dataclass(frozen=True, kw_only=True)
class _Side:
    """A model to run tasks on: a checkpoint, or one in memory with its tokenizer."""

    name: str
    wish: Recipe
    source: Source | None = None
    model: Any = None
    tokenizer: Any = None

    def check_fits(self, dtype: str, device: torch.device) -> None:
        """Check that the weights find room.

        Raises:
            TooLarge: they do not.
        """
        if self.source is not None:
            kind = choose_dtype(dtype, storage_dtype(self.source), device)
            size = sum(entry.num_params for entry in self.source.entries.values())
            check_fits(self.name, size, kind.itemsize, device)

    def computed(self, dtype: str, device: torch.device) -> str:
        """Return what is computed in and where, as a protocol says it."""
        if self.source is None:
            kind, place = self.model.dtype, self.model.device
        else:
            kind, place = choose_dtype(dtype, storage_dtype(self.source), device), device
        return f"{str(kind).removeprefix('torch.')} on {place}"

    def key(self, tasks: Mapping[str, Any], settings: Mapping[str, Any]) -> str | None:
        """Return the name that scores are kept under; none for a model in memory."""
        if self.source is None:
            return None
        versions = {name: version(name) for name in ("lm_eval", "transformers", "torch")}
        return score_key(model_key(self.source), tasks_key(tasks), {**settings, **versions})

    @contextmanager
    def held(
        self, dtype: str, device: torch.device, trust_remote_code: bool
    ) -> Iterator[tuple[Any, Any]]:
        """Hold model and tokenizer in memory, the stock way; a checkpoint's goes afterwards."""
        if self.source is None:
            yield self.model, self.tokenizer
            return
        from transformers import AutoModelForCausalLM

        for file in sorted({entry.file for entry in self.source.entries.values()}):
            self.source.path(file)  # fetched where the source is on the Hub
        with hushed():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                self.source.folder,
                dtype=choose_dtype(dtype, storage_dtype(self.source), device),
                trust_remote_code=trust_remote_code,
            )
        yield loaded.to(device).eval(), read_tokenizer(self.source, self.wish)


NO_TOKENIZER = "tokenizer: a model in memory needs one; pass the model's tokenizer."


def _wish(
    model: Any,
    *,
    seq_len: int | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Recipe:
    """Return the recipe that opens a model; its pruning is not carried out."""
    steps = default_steps()
    steps[0]["prune"] = {"sparsity": 0.5}
    return build(
        {
            "model": str(model) if isinstance(model, str | PathLike) else "in memory",
            "revision": revision,
            "trust_remote_code": trust_remote_code,
            "calibration": {"seq_len": seq_len},
            "steps": steps,
        }
    )


def _open(model: Any, tokenizer: Any, wish: Recipe, device: str, dtype: str) -> _Opened:
    """Open a folder for streaming, or take a model in memory as it is.

    Raises:
        LlmpruneError: there is no such model, or it has no tokenizer.
    """
    if not isinstance(model, str | PathLike):
        if tokenizer is None:
            raise RecipeError(NO_TOKENIZER)
        length = sequence_length(wish, model.config)
        return _Opened(tokenizer=tokenizer, seq_len=length, dtype=model.dtype, model=model)
    source = open_source(wish.model, revision=wish.revision)
    tokenizer = tokenizer or read_tokenizer(source, wish)
    where = choose_device(device)
    kind = choose_dtype(dtype, storage_dtype(source), where)
    blocks = open_blocks(source, wish, where, kind)
    length = sequence_length(wish, blocks.model.config)
    return _Opened(tokenizer=tokenizer, seq_len=length, dtype=kind, blocks=blocks)


def _sides(
    model: Any, tokenizer: Any, wish: Recipe, baseline: str | PathLike[str] | None
) -> tuple[dict[str, _Side], list[str]]:
    """Return the models to measure by role, the dense one first, and what there is to say of it.

    Raises:
        LlmpruneError: there is no such model, or one in memory has no tokenizer.
    """
    notes: list[str] = []
    run: Mapping[str, Any] | None = None
    if isinstance(model, str | PathLike):
        source = open_source(wish.model, revision=wish.revision)
        own = _Side(name=source.name, wish=wish, source=source)
        path = source.folder / OWN / "run.json"
        run = read_json(path) if path.exists() else None
    elif tokenizer is None:
        raise RecipeError(NO_TOKENIZER)
    else:
        own = _Side(name="in memory", wish=wish, model=model, tokenizer=tokenizer)
    first = None
    if baseline == "auto":
        first = _first_model(run, notes) if run else None
    elif baseline is not None:
        first = open_source(str(baseline))
    sides = {}
    if first is not None:
        sides[DENSE] = _Side(name=first.name, wish=wish, source=first)
    sides[PRUNED if run or first else ALONE] = own
    return sides, notes


def _first_model(run: Mapping[str, Any], notes: list[str]) -> Source | None:
    """Return the model that a result was first made from, where it can still be opened."""
    first = run.get("origin") or run["source"]
    name, revision = str(first["name"]), first.get("revision")
    home = Path(first.get("folder") or name)
    try:
        if name == "demo" or revision is not None:
            found = open_source(name, revision=revision)
        else:
            found = open_folder(home, name=name)
        if found.fingerprint() != first.get("fingerprint"):
            notes.append(f"{name} is not what it was when it was pruned: other bytes, or a copy.")
    except LlmpruneError as error:
        notes.append(f"the dense model is not measured: {error} Name it with --baseline.")
        return None
    return found
