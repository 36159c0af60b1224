"""The recipe's steps in order: cut, prove, evaluate, publish; the same for a model in memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from llmprune.arch.limits import longest_sequence
from llmprune.base.errors import LlmpruneError, RecipeError, TooLarge, WontLoad
from llmprune.base.memory import map_large_pieces
from llmprune.base.progress import Progress
from llmprune.base.timeline import Clock, Timeline
from llmprune.base.world import open_world
from llmprune.calibration.heldout import evaluation_text
from llmprune.calibration.mix import Windows, window_record
from llmprune.calibration.selection import evaluation_data
from llmprune.calibration.windows import token_ids
from llmprune.checkpoint.sink import write_json
from llmprune.checkpoint.skeleton import Skeleton
from llmprune.checkpoint.source import check_free_space, open_folder, read_json
from llmprune.delivery.gate import clean_scratch, pass_gate
from llmprune.delivery.manifest import MANIFEST
from llmprune.engine.budgets import budget_from
from llmprune.engine.calibrating import calibration_windows, leaked_share, run_text
from llmprune.engine.cutting import cut
from llmprune.engine.folder import (
    FolderKeeper,
    complete,
    manifest,
    open_target,
    prior_masks,
    what_fixes,
)
from llmprune.engine.following import follow
from llmprune.engine.gradients import check_backward
from llmprune.engine.masked import masked_logits
from llmprune.engine.opening import (
    Opened,
    anatomies_of,
    check_walk,
    obeying,
    open_origin,
    read_tokenizer,
    with_shipment,
)
from llmprune.engine.plan import Plan, make_plan
from llmprune.engine.records import (
    OBEYED,
    OWN,
    Records,
    check_files,
    check_out,
    check_same_run,
)
from llmprune.engine.shipping import ship, ship_masked
from llmprune.engine.solving import Outcome
from llmprune.engine.survey import Surroundings, before_the_cut
from llmprune.engine.target import reached
from llmprune.engine.whole_run import HiddenRun, VocabularyRun
from llmprune.evaluation.perplexity import Question, loss_of_blocks, pose
from llmprune.evaluation.rolling import predict_text
from llmprune.evaluation.samples import prompts_of, write_samples
from llmprune.pages.result import PAGE, write_last
from llmprune.report.run import Report, report_data
from llmprune.walk.forward import Stream, embed
from llmprune.walk.resident import Resident, in_memory, set_sizes
from llmprune.walk.sharing import ALONE, Others, leading
from llmprune.walk.streamed import Streamed

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from llmprune.evaluation.windows import Windows as Asked
    from llmprune.recipe import Recipe


PROFILE = "profile.json"


def run_together(
    opened: Opened,
    progress: Progress,
    *,
    tokens: Tensor | Windows | None = None,
    overwrite: bool = False,
    chain: Mapping[str, Any] | None = None,
) -> Report | None:
    """Carry out a plan in all processes that torchrun or accelerate started; None in all but the
    first, which returns the report as `run_streamed` does.

    Raises:
        LlmpruneError: nothing is published, and the source is as it was.
    """
    world = open_world(cpu=opened.plan.device.type == "cpu")
    if world.rank:
        follow(world, opened, Records(out=Path(str(opened.plan.out))).partial)
        return None
    if world.size > 1:
        progress.note(f"{world.size} processes share the calibration text")
    with leading(world) as others:
        return run_streamed(
            opened, progress, tokens=tokens, overwrite=overwrite, chain=chain, others=others
        )


def run_streamed(
    opened: Opened,
    progress: Progress,
    *,
    tokens: Tensor | Windows | None = None,
    overwrite: bool = False,
    chain: Mapping[str, Any] | None = None,
    others: Others = ALONE,
) -> Report:
    """Carry out a plan: cut, prove, evaluate, publish; or continue where an earlier run stopped.

    `tokens` (N, T) int64 take the place of the recipe's text. With `overwrite` an existing result
    is replaced, and an unfinished run is not continued. `chain` is the recipe that this is a stage
    of, for the result's record. `others` are further processes, which add to sums over tokens.

    Raises:
        LlmpruneError: nothing is published, and the source is as it was.
    """
    out = Path(str(opened.plan.out))
    records = Records(out=out)
    unfinished = None if overwrite else records.run()
    if unfinished is not None and unfinished.get("budget"):
        opened = obeying(opened, budget_from(unfinished["budget"]))
    plan = opened.plan
    overwrite = overwrite or records.replaces
    map_large_pieces()
    finished = not overwrite and _is_result(out)
    if not finished:
        check_out(out, opened.source.folder, overwrite=overwrite)
    with records.lock(), _memory_errors(), _same_threads():
        if plan.forward and isinstance(tokens, torch.Tensor):
            check_tokens(tokens, opened.blocks.model.config)
        before = read_json(out / OWN / "run.json") if finished else unfinished
        text = run_text(opened, records, progress, before=before, finished=finished, given=tokens)
        if text.tokens is not None:
            check_tokens(text.tokens, opened.blocks.model.config)
        fixed = what_fixes(opened, None, world_size=others.world.size) | text.fixes
        fixed |= {"chain": dict(chain)} if chain else {}
        if finished:
            _check_same_result(out, fixed)
            records.tidy()
            if not (out / OWN / PAGE).exists():  # killed right before it was written
                write_last(out, progress)
            progress.note(f"{out} already holds this result; nothing to do")
            return Report.read(out)
        question = evaluation_question(opened, progress)
        asked_NT = question.windows.inputs_NT if question else None
        leak = leaked_share(text.tokens, asked_NT, progress)
        if unfinished is not None:
            check_same_run(unfinished, fixed, f"{records.partial} holds the beginning")
            fixed |= {key: unfinished[key] for key in OBEYED if key in unfinished}
        else:
            check_free_space(out, plan.estimate.disk_bytes, "the result")
            records.discard()
        try:
            if unfinished is None:
                records.begin(fixed, replaces=overwrite)
            text.keep(records)
            progress.bind(records.own / "events.jsonl")
            report = _carry_out(
                *(opened, records, fixed, text.tokens, question, progress, others),
                calibration=text.record and text.record | {"leak": leak},
            )
            records.publish(overwrite=overwrite)
            write_last(out, progress)
        except LlmpruneError:
            if unfinished is None and not records.any_whole():
                records.discard()
            raise
    progress.bind(out / OWN / "events.jsonl")
    progress.event("published", out=str(out))
    return report


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


def _carry_out(
    opened: Opened,
    records: Records,
    fixed: Mapping[str, Any],
    tokens: Tensor | None,
    question: Question | None,
    progress: Progress,
    others: Others,
    *,
    calibration: Mapping[str, Any] | None = None,
) -> Report:
    """Cut, finish, prove and evaluate in the partial folder; return the report."""
    progress.timeline = Timeline()
    seconds = Clock(progress.timeline)
    torch.set_num_threads(int(fixed["threads"]))
    clean_scratch(records.partial)

    def fresh(tokens_NT: Tensor, name: str = "hidden", *, among: Others = ALONE) -> Stream:
        place = fixed["place"]
        folder = records.own / name if place == "disk" else None
        micro_batch = int(fixed["micro_batch"])
        return embed(
            opened.blocks, tokens_NT, micro_batch, place=place, folder=folder, others=among
        )

    make = partial(_cut_blocks, others) if opened.plan.whole is None else _cut_model
    made = make(opened, records, fixed, tokens, question, progress, seconds, fresh)
    plan = made.plan
    code = plan.shipment.code if plan.shipment else ()
    smaller = made.result.skeleton is not opened.blocks.skeleton
    with _stage(seconds, "gate"), progress.stage("gate", 1) as stage:
        verdict = pass_gate(
            records.partial,
            device=torch.device("cpu"),
            dtype=plan.dtype,
            source=opened.source,
            attention=None if plan.recipe.attention == "auto" else plan.recipe.attention,
            trust_remote_code=plan.recipe.trust_remote_code or bool(code),
            masked=made.masked,
            own_code=bool(code),
            generate=smaller,
        )
        stage.advance("loads in a fresh process")
    if smaller:
        write_json(records.partial / MANIFEST, manifest(opened, plan, fixed))
    quality, rolling = None, None
    if question is not None:
        with _stage(seconds, "evaluate"):
            if plan.whole is not None and plan.whole.is_vocabulary:
                rolling = _evaluate_bytes(opened, records, made, question, progress)
            else:
                quality = _evaluate(opened, made.result, question, progress)
    report = Report(
        report_data(
            *(plan, made.rows),
            fixed=fixed,
            resumed_after=made.resumed,
            seconds=seconds,
            progress=progress,
        )
        | {
            "calibration": calibration,
            "gate": verdict.to_dict(),
            "perplexity": quality,
            **({"rolling": rolling} if rolling else {}),
            "files": made.files,
        }
        | ({"target": _reached(plan, quality, progress)} if plan.target else {})
        | _recoveries(opened)
    )
    report.data["gate"]["folder"] = str(plan.out)
    samples = _samples(opened, records, bool(code), progress, seconds)
    report = replace(report, data={**report.data, **samples, "seconds": dict(seconds)})
    if progress.profile:
        write_json(records.own / PROFILE, progress.timeline.trace())
        report = replace(report, data={**report.data, "profile": progress.timeline.summary()})
    write_json(records.own / "report.json", report.data)
    return report


def _samples(
    opened: Opened, records: Records, own_code: bool, progress: Progress, seconds: dict[str, float]
) -> dict[str, Any]:
    """Return what the dense model and the result write; nothing if not asked for."""
    recipe = opened.plan.recipe
    wish = recipe.evaluate
    prompts = () if wish is None else prompts_of(wish.prompts, wish.perplexity)
    if wish is None or not prompts:
        return {}
    dense = open_origin(opened.source, recipe, opened.plan.dtype)
    models = {
        "dense": opened.source if dense is None else dense.source,
        "pruned": open_folder(records.partial, name=str(opened.plan.out)),
    }
    with _stage(seconds, "samples"), progress.stage("samples", 1) as stage:
        found = write_samples(
            *(models, prompts),
            num_tokens=wish.new_tokens,
            device=opened.blocks.device,
            dtype=opened.plan.dtype,
            trust_remote_code=recipe.trust_remote_code or own_code,
        )
        stage.advance(f"{len(prompts)} prompts")
    return {"samples": found}


def _recoveries(opened: Opened) -> dict[str, Any]:
    """Return what the source was trained by before, for the report of what is made of it."""
    path = opened.source.folder / OWN / "report.json"
    found = read_json(path).get("recovery") if path.exists() else None
    return {"recovery": found} if found else {}


class Made(NamedTuple):
    """What was written: the plan with its counts, the report's rows, the last block of an earlier
    run, hashes of weight files, the result opened for walking, and what its logits must agree with.
    """

    plan: Plan
    rows: list[dict[str, Any]]
    resumed: int | None
    files: Mapping[str, str]
    result: Streamed
    masked: Callable[[Tensor], Tensor] | None


def _cut_blocks(
    others: Others,
    opened: Opened,
    records: Records,
    fixed: Mapping[str, Any],
    tokens: Tensor | None,
    question: Question | None,
    progress: Progress,
    seconds: dict[str, float],
    fresh: Callable[..., Stream],
) -> Made:
    """Survey, cut block after block, and write what completes the folder.

    Other processes take part where sums over micro-batches are all that is learnt; what is not such
    a sum is learnt here, from all of the text.
    """
    plan = opened.plan
    around = Surroundings(
        blocks=opened.blocks,
        progress=progress,
        tokens_NT=tokens,
        embed=fresh,
        share=partial(fresh, among=others),
        prior=prior_masks(opened),
        folder=records.survey,
    )
    with _stage(seconds, "survey") if plan.surveys else nullcontext():
        plan, gradients = before_the_cut(
            plan,
            around,
            question_NT=None if question is None else question.windows.inputs_NT,
            record=records.own / "allocation.json",
        )
    plan = with_shipment(opened, plan)
    blocks = open_target(opened, plan, records.partial, progress.timeline)
    among = others if plan.parts.sums else ALONE
    with _stage(seconds, "embed"):
        if tokens is not None and plan.parts.cut_tokens:
            among.ask("result", counts=dict(plan.counts or {}))
            flow = fresh(tokens, among=among)
        else:
            flow = None
        dense = fresh(tokens, "dense") if tokens is not None and plan.parts.dense else None
    with _stage(seconds, "cut"):
        keeper = FolderKeeper(records, blocks)
        rows, resumed = cut(
            *(plan, blocks, flow, keeper, progress),
            prior=around.prior,
            gradients=gradients,
            dense=dense,
        )
    for each in (flow, dense):
        if each is not None:
            each.hidden.close()
    with _stage(seconds, "finish"):
        files = complete(opened, plan, blocks, records, rows)
    masked = masked_logits(plan, blocks, records.own)
    return Made(plan, rows, resumed, files, blocks.result, masked)


def _cut_model(
    opened: Opened,
    records: Records,
    fixed: Mapping[str, Any],
    tokens: Tensor | None,
    question: Question | None,
    progress: Progress,
    seconds: dict[str, float],
    fresh: Callable[..., Stream],
) -> Made:
    """Learn one choice for the whole model, and write all blocks and files by it."""
    assert opened.plan.whole is not None and tokens is not None
    verbs = VocabularyRun if opened.plan.whole.is_vocabulary else HiddenRun
    run = verbs(opened=opened, records=records, tokens_NT=tokens, embed=fresh, progress=progress)
    with _stage(seconds, "survey"):
        choice = run.learn()
    with _stage(seconds, "cut"):
        rows, resumed = run.rewrite(choice)
    with _stage(seconds, "finish"):
        files = run.finish(choice)
    return Made(run.plan, rows, resumed, files, run.result(), run.masked(choice))


def _reached(plan: Plan, quality: Mapping[str, Any] | None, progress: Progress) -> dict[str, Any]:
    """Return what became of a target; warn where the result misses it."""
    assert plan.target is not None
    if quality is None:
        return dict(plan.target)
    found = reached(plan.target, quality["pruned"]["value"])
    if not found["met"]:
        progress.warn(
            f"target: the result has a perplexity of {found['reached']:.4f}, above the "
            f"{found['limit']:.4f} asked for: what precedes a block differs from the search. Type "
            f"--sparsity {0.98 * found['sparsity']:.3f} without --target for a little less."
        )
    return found


def run_resident(
    model: PreTrainedModel,
    recipe: Recipe,
    progress: Progress,
    *,
    tokens: Tensor | None = None,
    tokenizer: Any = None,
    texts: Sequence[str] | None = None,
    prior: Callable[[int], Mapping[str, Tensor]] = lambda index: {},
) -> Report:
    """Prune a model in memory, in place, through the same loop; nothing is written.

    `prior` gives, by block, the masks of what was removed before.

    Raises:
        LlmpruneError: the wish cannot be met.
    """
    seconds: dict[str, float] = {}
    calibration: Mapping[str, Any] | None = None
    with in_memory(model) as blocks, _memory_errors():
        plan = make_plan(
            recipe,
            anatomies_of(blocks),
            source_name=f"{recipe.model} ({model.config.model_type})",
            out=None,
            config=model.config,
            device=blocks.device,
            dtype=model.dtype,
            stored_bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
            stored=model.dtype,
            may_evaluate=False,
        )
        if plan.searches:
            raise RecipeError(
                "prune.target: perplexity is a checkpoint's here. Give the folder of the model "
                "instead of the model in memory, or a --sparsity."
            )
        if plan.parts.backward:
            check_backward(model.config, blocks.family)
        if plan.forward:
            check_walk(model.config, blocks.family)
            if tokens is None:
                if tokenizer is None:
                    raise RecipeError(
                        "tokenizer: a model in memory needs one for calibration text. Pass "
                        "tokenizer=..., or token ids (N, T) as calib=..."
                    )
                author = partial(nullcontext, model)
                found = calibration_windows(plan, tokenizer, progress, texts=texts, author=author)
                tokens, calibration = found.tokens, found.record
            check_tokens(tokens, model.config)
            calibration = calibration or window_record("token ids", tokens)

        def fresh(tokens_NT: Tensor) -> Stream:
            return embed(blocks, tokens_NT, plan.estimate.micro_batch, place=plan.estimate.place)

        around = Surroundings(
            blocks=blocks, progress=progress, tokens_NT=tokens, embed=fresh, prior=prior
        )
        with _stage(seconds, "survey") if plan.surveys else nullcontext():
            plan, gradients = before_the_cut(plan, around)
        plan = _shipped_in_memory(plan, blocks)
        blocks = _without_blocks(plan, blocks)
        flow = fresh(tokens) if tokens is not None and plan.parts.cut_tokens else None
        dense = fresh(tokens) if tokens is not None and plan.parts.dense else None
        keeper = MemoryKeeper()
        with _stage(seconds, "cut"):
            rows, _ = cut(
                *(plan, blocks, flow, keeper, progress),
                prior=prior,
                gradients=gradients,
                dense=dense,
            )
        blocks.drop_blocks()
        assert plan.shipment is not None
        blocks.complete_biases(plan.shipment.skeleton)
    set_sizes(model, plan.shipment.before, plan.shipment.config)
    data = report_data(plan, rows, fixed={}, seconds=seconds, progress=progress)
    data["calibration"] = calibration
    return Report(data, masks=keeper.masks)


def _shipped_in_memory(plan: Plan, blocks: Resident) -> Plan:
    """Return the plan with the config that a model in memory gets.

    Raises:
        WontLoad: its own class cannot hold what would be left.
    """
    skeleton = Skeleton(model=blocks.model, family=blocks.family)
    config = blocks.model.config.to_dict()
    anatomies = [blocks.anatomy(index) for index in range(len(blocks))]
    store = ship_masked if plan.form == "masked" else ship
    shipment = store(plan, skeleton, config, anatomies, dtype=blocks.model.dtype)
    if shipment.tier != "E0":
        raise WontLoad(
            f"a model in memory keeps its class, which holds equal blocks only (tier E0), and this "
            f"would be {shipment.tier}: {dict(shipment.reasons).get('E0', 'blocks differ')}. Give "
            "the model's folder instead, or --set prune.tier=E0 or prune.form=masked."
        )
    return replace(plan, shipment=shipment)


def _without_blocks(plan: Plan, blocks: Resident) -> Resident:
    """Return the model's blocks, with those that go passed over."""
    assert plan.shipment is not None
    return replace(blocks, gone=frozenset(range(len(blocks))) - plan.shipment.places.keys())


class MemoryKeeper:
    """Keeps packed masks and kept units of a model in memory; no block is whole before the run."""

    def __init__(self) -> None:
        self.masks: dict[str, Tensor] = {}

    def whole(self, index: int) -> dict[str, Any] | None:
        """Return nothing: a model in memory is not resumed."""
        return None

    def keep(
        self, index: int, shard: Path | None, outcome: Outcome, content: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Keep the masks of a block."""
        self.masks |= {name: mask.bits for name, mask in outcome.masks.items()}
        self.masks |= outcome.kept_units
        return {"block": index, **content}

    def flush(self) -> None:
        """Wait for nothing: all is in memory."""


def evaluation_question(opened: Opened, progress: Progress) -> Question | None:
    """Return what both models will be asked for their perplexity, before anything is cut.

    Raises:
        LlmpruneError: there is no tokenizer or no text, and the recipe insists on perplexity.
    """
    plan = opened.plan
    wish = plan.recipe.evaluate
    if wish is None or not plan.eval_windows:
        return None
    data = evaluation_data(plan.recipe)
    try:
        tokenizer = read_tokenizer(opened.source, plan.recipe)
        question = pose(
            evaluation_text(data, tokenizer=tokenizer),
            tokenizer,
            data=data,
            seq_len=plan.seq_len,
            stride=wish.stride,
            num_windows=plan.eval_windows,
            bos=wish.bos,
        )
        check_tokens(question.windows.inputs_NT, opened.blocks.model.config)
    except LlmpruneError as error:
        if wish.perplexity is True:
            raise
        progress.warn(f"perplexity is not measured: {error}")
        return None
    return question


def _evaluate(
    opened: Opened, result: Streamed, question: Question, progress: Progress
) -> dict[str, Any] | None:
    """Return dense and pruned perplexity of the same windows; a failure costs no proven result."""
    plan = opened.plan
    found = {}
    dense = open_origin(opened.source, plan.recipe, plan.dtype) or opened.blocks
    dense = replace(dense, device=opened.blocks.device)
    with progress.stage("perplexity", 2) as stage:
        for name, side in (("dense", dense), ("pruned", result)):
            try:
                loss = loss_of_blocks(
                    replace(side, dtype=plan.dtype),
                    *question.windows,
                    micro_batch=plan.estimate.micro_batch,
                )
            except LlmpruneError as error:
                progress.warn(f"perplexity is not measured: {error}")
                return None
            answer = question.answer(*loss, dtype=plan.dtype)
            found[name] = asdict(answer)
            if name == "dense" and answer.warning:
                progress.warn(answer.warning)
            stage.advance(name, perplexity=answer.value)
    return found


def _evaluate_bytes(
    opened: Opened, records: Records, made: Made, question: Question, progress: Progress
) -> dict[str, Any] | None:
    """Return dense and pruned perplexity per byte of the same text, which each model reads in its
    own tokens; as long a text as the windows would have been."""
    plan = opened.plan
    words = read_tokenizer(opened.source, plan.recipe)
    fewer = read_tokenizer(open_folder(records.partial), plan.recipe)
    text = evaluation_text(question.data, tokenizer=words)
    text = text[: len(text) * question.windows.inputs_NT.numel() // len(token_ids(text, words))]
    found: dict[str, Any] = {}
    sides = {"dense": (opened.blocks, words), "pruned": (made.result, fewer)}
    with progress.stage("perplexity", 2) as stage:
        for name, (side, tokenizer) in sides.items():
            blocks = replace(side, dtype=plan.dtype)
            micro_batch = plan.estimate.micro_batch
            try:
                answer = predict_text(
                    partial(_loss, blocks, micro_batch),
                    *(text, tokenizer),
                    data=question.data,
                    seq_len=plan.seq_len,
                    dtype=plan.dtype_name,
                )
            except LlmpruneError as error:
                progress.warn(f"perplexity is not measured: {error}")
                return None
            found[name] = asdict(answer)
            stage.advance(name, byte_perplexity=answer.byte_perplexity)
    return found


def _loss(blocks: Streamed, micro_batch: int, windows: Asked) -> tuple[float, int]:
    return loss_of_blocks(blocks, *windows, micro_batch=micro_batch)


def _is_result(out: Path) -> bool:
    """Tell whether a folder holds a finished result."""
    return (out / OWN / "run.json").exists() and (out / OWN / "report.json").exists()


def _check_same_result(out: Path, fixed: Mapping[str, Any]) -> None:
    """Check that a finished result is whole, and what is asked for.

    Raises:
        CheckpointError: a shard is missing or damaged.
        RecipeError: it is the result of another recipe, source or calibration.
    """
    open_folder(out)
    check_files(out, Report.read(out).data.get("files") or {})
    before = read_json(out / OWN / "run.json")
    keys = ("recipe", "source", "tokens")
    check_same_run(
        {key: before.get(key) for key in keys},
        {key: fixed[key] for key in keys},
        f"{out} holds the result",
    )


@contextmanager
def _same_threads() -> Iterator[None]:
    """Put torch's number of threads back at the end."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _stage(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Time a stage of the run."""
    start = time.perf_counter()
    timeline = seconds.timeline if isinstance(seconds, Clock) else Timeline()
    try:
        with timeline.span(name):
            yield
    finally:
        seconds[name] = round(time.perf_counter() - start, 3)


@contextmanager
def _memory_errors() -> Iterator[None]:
    """Turn an allocator's failure into a message that says what lowers memory."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        is_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(
            words in text for words in ("can't allocate memory", "out of memory", "Cannot allocate")
        )
        if not is_memory or isinstance(error, LlmpruneError):
            raise
        raise TooLarge(
            f"out of memory ({text.splitlines()[0] if text else type(error).__name__}). Fewer "
            "--num-samples, a shorter --seq-len or a lower --max-memory need less; the same "
            "command resumes."
        ) from error
