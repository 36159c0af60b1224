"""The calibration text of a run: read once, kept for a resumed run, compared with evaluation text.

Shapes: N windows, T tokens in each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmprune.arch.limits import longest_sequence
from llmprune.base.errors import RecipeError
from llmprune.base.memory import return_freed
from llmprune.base.progress import Progress
from llmprune.calibration.leak import MOST_SHARED, RUN, shared_share
from llmprune.calibration.mix import Windows, read_windows, window_record, wish_hash
from llmprune.calibration.on_policy import (
    Author,
    Manner,
    check_room,
    prompts_hash,
    wanted_prompts,
    written_windows,
)
from llmprune.calibration.selection import AUTO, DEMO, RANDOM, calibration_texts, is_demo, place_of
from llmprune.calibration.windows import token_hash, tokenize_windows
from llmprune.calibration.written import keep_text, kept_text, text_key
from llmprune.checkpoint.sink import write_tensors
from llmprune.engine.opening import Opened, read_tokenizer
from llmprune.engine.plan import Plan
from llmprune.engine.plan_cost import writing_text
from llmprune.engine.records import Records
from llmprune.evaluation.remembered import model_key
from llmprune.evaluation.tasks import hushed
from llmprune.recipe.texts import ON_POLICY

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class RunText:
    """Token windows (N, T) of a run, and what its folder keeps of them.

    Without windows: of a run that needs none, or a finished result whose text was on the Hub.
    """

    tokens: Tensor | None = None
    hash: str | None = None
    kept: Mapping[str, Any] | None = None

    @property
    def fixes(self) -> dict[str, Any]:
        """Return what run.json holds: the hash, which decides, and where the text came from."""
        return {"tokens": self.hash, "text": None if self.kept is None else dict(self.kept)}

    @property
    def record(self) -> dict[str, Any] | None:
        """Return what a report says of the text."""
        return None if self.kept is None else dict(self.kept["record"])

    def keep(self, records: Records) -> None:
        """Write the windows for a resumed run where they came from the Hub.

        They go with the records when the result is published: a text may be private.
        """
        if self.tokens is not None and self.kept and self.kept["is_remote"]:
            write_tensors(_kept_file(records), {"tokens": self.tokens})


def run_text(
    opened: Opened,
    records: Records,
    progress: Progress,
    *,
    before: Mapping[str, Any] | None,
    finished: bool,
    given: Tensor | Windows | None = None,
) -> RunText:
    """Return the text of a run; `before` is what an earlier run of this folder wrote down.

    What that read from the Hub for the same wish is not asked for again.

    Raises:
        LlmpruneError: the text is not there, cannot be reached, or is too short; no tokenizer.
    """
    if not opened.plan.forward:
        return RunText()
    if isinstance(given, Windows):
        return _text("", given)
    if given is not None:
        return _text("", Windows(tokens=given, record=window_record("token ids", given)))
    asked = wish_hash(opened.plan.recipe, opened.plan.seq_len, opened.source.folder)
    known = (before or {}).get("text") or {}
    if before and known.get("is_remote") and known.get("asked") == asked:
        if finished:
            return RunText(hash=before["tokens"], kept=known)
        tokens = _kept_tokens(records)
        if tokens is not None and token_hash(tokens) == before["tokens"]:
            return _text(asked, Windows(tokens=tokens, record=known["record"], is_remote=True))
    return _text(asked, opened_windows(opened, progress))


def opened_windows(opened: Opened, progress: Progress) -> Windows:
    """Return the token windows (N, T) of the recipe's text; where the model writes it itself, from
    those that are kept, if it has written them before.

    Raises:
        LlmpruneError: the text is not there, cannot be reached, or is too short; no tokenizer.
    """
    plan, config = opened.plan, opened.blocks.model.config
    words = read_tokenizer(opened.source, plan.recipe)
    wish, author = plan.recipe.calibration, partial(author_of, opened)
    if wish.data != ON_POLICY or wish.cache is False:
        return calibration_windows(plan, words, progress, author=author)
    asked = wanted_prompts(plan.recipe, words, config, seq_len=plan.seq_len)
    key = text_key(_decides(opened, words, *asked))
    found = kept_text(key)
    if found is not None:
        progress.note(
            f"calibration: what the model wrote before for the same prompts is read again "
            f"({key[:16]}); calibration.cache=false writes anew"
        )
        return found
    return keep_text(key, calibration_windows(plan, words, progress, author=author, asked=asked))


def _decides(
    opened: Opened, tokenizer: Any, manner: Manner, prompts: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """Return all that decides what a model writes on a machine."""
    import platform

    import transformers

    plan = opened.plan
    return {
        "model": model_key(opened.source),
        **manner.record(),
        "prompts": prompts_hash(prompts),  # what they say, not where they lie
        **{"seed": manner.seed, "num_samples": plan.num_samples, "seq_len": plan.seq_len},
        "bos": tokenizer.bos_token_id if plan.recipe.calibration.bos else None,
        "ends": [tokenizer.eos_token_id, tokenizer.pad_token_id],
        **{"dtype": plan.dtype_name, "device": plan.device.type, "machine": platform.machine()},
        "threads": torch.get_num_threads(),
        "versions": [torch.__version__, transformers.__version__],
    }


@contextmanager
def author_of(opened: Opened) -> Iterator[Any]:
    """Hold the model that is pruned in memory, as transformers loads it, for it to write text.

    Raises:
        TooLarge: it does not fit.
    """
    from transformers import AutoModelForCausalLM

    plan, source = opened.plan, opened.source
    size = sum(entry.num_params for entry in source.entries.values())
    check_room(source.name, size, plan.dtype.itemsize, plan.device)
    for file in sorted({entry.file for entry in source.entries.values()}):
        source.path(file)  # fetched where the source is on the Hub
    with hushed():
        model: Any = AutoModelForCausalLM.from_pretrained(
            source.folder, dtype=plan.dtype, trust_remote_code=plan.recipe.trust_remote_code
        )
    try:
        yield model.to(plan.device).eval()
    finally:
        del model
        return_freed()


def calibration_windows(
    plan: Plan,
    tokenizer: Any,
    progress: Progress,
    *,
    texts: Sequence[str] | None = None,
    author: Author | None = None,
    asked: tuple[Manner, list[list[int]]] | None = None,
) -> Windows:
    """Return the token windows (N, T) of the recipe's text, or of texts given as strings.

    `author` holds the model in memory for text that it writes itself; `asked` are the prompts for
    it, where they were read before.

    Raises:
        RecipeError: the text is not there, cannot be reached, or is too short.
    """
    recipe = plan.recipe
    if texts is None and recipe.calibration.data == RANDOM:
        return drawn_windows(plan, tokenizer)
    if texts is None and recipe.calibration.data == ON_POLICY:
        assert author is not None  # who prunes has the model
        progress.note(f"calibration: the model writes it, {writing_text(plan)}")
        return written_windows(
            *(recipe, tokenizer, author),
            seq_len=plan.seq_len,
            device=plan.device,
            asked=asked,
        )
    if texts is None:
        names = [text.data for text in calibration_texts(recipe)]
        if any(place_of(name) in ("preset", "hub") for name in names):
            default = ", the default" if recipe.calibration.data == AUTO else ""
            progress.note(f"calibration: reading {', '.join(names)} from the Hub{default}")
        if not is_demo(recipe.model) and DEMO in names:
            progress.note(
                "calibration: the bundled demo text (English novels). Text like that of your use "
                "gives a better result: --calib c4 or --calib FILE."
            )
        found = read_windows(recipe, tokenizer, seq_len=plan.seq_len)
    else:
        tokens, notice = tokenize_windows(
            texts,
            tokenizer,
            num_samples=recipe.calibration.num_samples,
            seq_len=plan.seq_len,
            seed=recipe.seed,
            bos=recipe.calibration.bos,
        )
        notices = (notice,) if notice else ()
        found = Windows(tokens=tokens, record=window_record("texts", tokens), notices=notices)
    for notice in found.notices:
        progress.warn(notice)
    return found


def drawn_windows(plan: Plan, tokenizer: Any) -> Windows:
    """Return windows (N, T) of tokens drawn from the whole vocabulary, each as likely as any other.

    They stand for text where there is none. They follow from the seed alone.
    """
    import torch

    generator = torch.Generator().manual_seed(plan.recipe.seed)
    shape = (plan.num_samples, plan.seq_len)
    tokens = torch.randint(0, len(tokenizer), shape, generator=generator)
    return Windows(tokens=tokens, record=window_record(RANDOM, tokens))


def leaked_share(
    tokens: Tensor | None,
    evaluation_NT: Tensor | None,
    progress: Progress,
    *,
    what: str = "calibration",
    flag: str = "--calib",
) -> float | None:
    """Return how much of the evaluation text is in a text that shaped the result; warn of much.

    `what` names that text, and `flag` gives another. None where there is nothing to compare, or
    windows are shorter than what is compared.
    """
    if tokens is None or evaluation_NT is None:
        return None
    if min(tokens.shape[1], evaluation_NT.shape[1]) < RUN:
        return None
    share = shared_share(tokens, evaluation_NT)
    if share > MOST_SHARED:
        progress.warn(
            f"{100 * share:.1f} % of the evaluation text is in the {what} text, so the "
            f"perplexity of the result will flatter. Choose another {flag}, or another text with "
            "--set evaluate.data=NAME."
        )
    return share


def _text(asked: str, windows: Windows) -> RunText:
    kept = {"asked": asked, "is_remote": windows.is_remote, "record": dict(windows.record)}
    return RunText(tokens=windows.tokens, hash=windows.record["tokens"], kept=kept)


def _kept_tokens(records: Records) -> Tensor | None:
    """Return the windows that an earlier run kept, where they can be read."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(_kept_file(records)).get("tokens")
    except (OSError, SafetensorError):
        return None


def _kept_file(records: Records) -> Path:
    return records.own / "records" / "tokens.safetensors"


def check_tokens(tokens_NT: Tensor, config: Any) -> None:
    """Check token ids that did not come from the model's own tokenizer, or may not have.

    Raises:
        RecipeError: not (N, T) whole numbers of the vocabulary, or longer than the model takes.
    """
    text = config.get_text_config()
    whole = not tokens_NT.is_floating_point() and tokens_NT.dtype != torch.bool
    if tokens_NT.ndim != 2 or not whole or not tokens_NT.numel():
        raise RecipeError(
            f"calibration: token ids of shape {tuple(tokens_NT.shape)}, {tokens_NT.dtype}. "
            "Give whole numbers of shape (sequences, tokens)."
        )
    low, high = int(tokens_NT.min()), int(tokens_NT.max())
    if low < 0 or high >= text.vocab_size:
        raise RecipeError(
            f"calibration: token ids from {low} to {high}, but the model's vocabulary has "
            f"{text.vocab_size}. Use the tokenizer that belongs to this model."
        )
    most = longest_sequence(config)
    if most and tokens_NT.shape[1] > most:
        raise RecipeError(
            f"calibration: sequences of {tokens_NT.shape[1]} tokens, where this model takes "
            f"{most}. Cut them."
        )
