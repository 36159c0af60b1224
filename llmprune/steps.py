"""The recipe's steps in order: cut, prove, evaluate, publish."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from llmprune.asking import byte_perplexities, evaluation_question, perplexities, samples_of
from llmprune.base.errors import LlmpruneError
from llmprune.base.memory import map_large_pieces, memory_errors
from llmprune.base.progress import Progress
from llmprune.base.timeline import Clock, Timeline, timed
from llmprune.base.world import open_world
from llmprune.calibration.mix import Windows
from llmprune.checkpoint.sink import write_json
from llmprune.checkpoint.source import check_free_space, open_folder, read_json
from llmprune.delivery.gate import clean_scratch, pass_gate
from llmprune.delivery.manifest import MANIFEST
from llmprune.engine.budgets import budget_from
from llmprune.engine.calibrating import check_tokens, leaked_share, run_text
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
from llmprune.engine.masked import in_place_of_removed, masked_logits
from llmprune.engine.opening import (
    Opened,
    obeying,
    open_origin,
    read_tokenizer,
    with_shipment,
)
from llmprune.engine.plan import Plan
from llmprune.engine.records import OBEYED, OWN, Records, check_files, check_out, check_same_run
from llmprune.engine.survey import Surroundings, before_the_cut
from llmprune.engine.target import reached
from llmprune.engine.whole_run import HiddenRun, VocabularyRun
from llmprune.evaluation.perplexity import Question
from llmprune.pages.result import PAGE, write_last
from llmprune.report.run import Report, report_data
from llmprune.walk.forward import Stream, embed
from llmprune.walk.sharing import ALONE, Others, leading
from llmprune.walk.streamed import Streamed

if TYPE_CHECKING:
    from torch import Tensor


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
    finished = not overwrite and is_result(out)
    if not finished:
        check_out(out, opened.source.folder, overwrite=overwrite)
    with records.lock(), memory_errors(), _same_threads():
        if plan.forward and isinstance(tokens, torch.Tensor):
            check_tokens(tokens, opened.blocks.model.config)
        before = read_json(out / OWN / "run.json") if finished else unfinished
        text = run_text(opened, records, progress, before=before, finished=finished, given=tokens)
        if text.tokens is not None:
            check_tokens(text.tokens, opened.blocks.model.config)
        fixed = what_fixes(opened, None, world_size=others.world.size) | text.fixes
        fixed |= {"chain": dict(chain)} if chain else {}
        if finished:
            check_same_result(out, fixed)
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
    with timed(seconds, "gate"), progress.stage("gate", 1) as stage:
        verdict = pass_gate(
            records.partial,
            device=torch.device("cpu"),
            dtype=plan.dtype,
            source=opened.source,
            attention=None if plan.recipe.attention == "auto" else plan.recipe.attention,
            trust_remote_code=plan.recipe.trust_remote_code or bool(code),
            masked=made.masked,
            beside=in_place_of_removed(plan),
            own_code=bool(code),
            generate=smaller,
        )
        stage.advance("loads in a fresh process")
    if smaller:
        write_json(records.partial / MANIFEST, manifest(opened, plan, fixed))
    quality, rolling = None, None
    if question is not None:
        with timed(seconds, "evaluate"):
            quality, rolling = _quality(opened, made, records.partial, question, progress)
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
    samples = _samples(opened, records.partial, bool(code), progress, seconds)
    report = replace(report, data={**report.data, "samples": samples, "seconds": dict(seconds)})
    if progress.profile:
        write_json(records.own / PROFILE, progress.timeline.trace())
        report = replace(report, data={**report.data, "profile": progress.timeline.summary()})
    write_json(records.own / "report.json", report.data)
    return report


def _quality(
    opened: Opened, made: Made, folder: Path, question: Question, progress: Progress
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Return the perplexity of the dense model and the result by token, or by byte where the
    result reads in tokens of its own."""
    plan = opened.plan
    measured = partial(perplexities, dtype=plan.dtype, micro_batch=plan.estimate.micro_batch)
    if plan.whole is not None and plan.whole.is_vocabulary:
        words = read_tokenizer(opened.source, plan.recipe)
        fewer = read_tokenizer(open_folder(folder), plan.recipe)
        readers = {"dense": (opened.blocks, words), "pruned": (made.result, fewer)}
        return None, byte_perplexities(readers, question, progress, **measured.keywords)
    dense = open_origin(opened.source, plan.recipe, plan.dtype) or opened.blocks
    sides = {"dense": replace(dense, device=opened.blocks.device), "pruned": made.result}
    return measured(sides, question, progress), None


def _samples(
    opened: Opened, folder: Path, own_code: bool, progress: Progress, seconds: dict[str, float]
) -> dict[str, Any] | None:
    """Return what the dense model and the result write; None if not asked for."""
    plan = opened.plan
    dense = open_origin(opened.source, plan.recipe, plan.dtype)
    return samples_of(
        {
            "dense": opened.source if dense is None else dense.source,
            "pruned": open_folder(folder, name=str(plan.out)),
        },
        *(plan.recipe, progress, seconds),
        device=opened.blocks.device,
        dtype=plan.dtype,
        trust_remote_code=plan.recipe.trust_remote_code or own_code,
    )


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
        others=others,
    )
    with timed(seconds, "survey") if plan.surveys else nullcontext():
        plan, gradients = before_the_cut(
            plan,
            around,
            question_NT=None if question is None else question.windows.inputs_NT,
            record=records.own / "allocation.json",
        )
    plan = with_shipment(opened, plan)
    blocks = open_target(opened, plan, records.partial, progress.timeline)
    among = others if plan.parts.sums else ALONE
    with timed(seconds, "embed"):
        if tokens is not None and plan.parts.cut_tokens:
            among.ask("result", counts=dict(plan.counts or {}))
            flow = fresh(tokens, among=among)
        else:
            flow = None
        dense = fresh(tokens, "dense") if tokens is not None and plan.parts.dense else None
    with timed(seconds, "cut"):
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
    with timed(seconds, "finish"):
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
    with timed(seconds, "survey"):
        choice = run.learn()
    with timed(seconds, "cut"):
        rows, resumed = run.rewrite(choice)
    with timed(seconds, "finish"):
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


def is_result(out: Path) -> bool:
    """Tell whether a folder holds a finished result."""
    return (out / OWN / "run.json").exists() and (out / OWN / "report.json").exists()


def check_same_result(out: Path, fixed: Mapping[str, Any]) -> None:
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
