"""A recovery from beginning to end: open, train, merge, prove, evaluate, publish."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmprune import __version__
from llmprune.asking import perplexities, question_for, samples_of
from llmprune.base.errors import LlmpruneError, NumericalError
from llmprune.base.memory import anonymous_bytes, keeping_pieces, map_large_pieces
from llmprune.base.progress import Progress
from llmprune.base.timeline import timed
from llmprune.base.world import open_world
from llmprune.calibration.mix import window_record
from llmprune.calibration.windows import token_hash
from llmprune.checkpoint.sink import hash_file, write_json, write_tensors
from llmprune.checkpoint.source import Source, check_free_space, open_folder, read_json
from llmprune.delivery.gate import clean_scratch, gate_tokens, pass_gate
from llmprune.engine.calibrating import leaked_share
from llmprune.engine.opening import open_origin, read_tokenizer
from llmprune.engine.planning import sequence_length
from llmprune.engine.records import OWN, Records, check_out, check_same_run
from llmprune.evaluation.perplexity import Question
from llmprune.pages.result import PAGE, write_last
from llmprune.recipe import PruneStep, Recipe, Step
from llmprune.recovery.bank import Bank
from llmprune.recovery.examples import Examples, examples_of, read_examples, with_text_of
from llmprune.recovery.loop import History, train
from llmprune.recovery.objective import Objective
from llmprune.recovery.planning import DENSE, MASKED, RecoverPlan, fixes, open_recovery
from llmprune.recovery.saved import Saved
from llmprune.recovery.scheduling import keeps_by_linear, keeps_by_param, shaping_of
from llmprune.recovery.shaping import Cut
from llmprune.recovery.student import (
    Student,
    fill_teacher,
    objective_of,
    open_student,
    sparsity_facts,
)
from llmprune.recovery.taught import vocabulary
from llmprune.recovery.writing import write_masks, write_trained
from llmprune.report.recounting import block_rows
from llmprune.report.run import Report
from llmprune.resident_steps import run_resident
from llmprune.steps import check_same_result, is_result
from llmprune.walk.forward import embed, logits, walk
from llmprune.walk.sharing import await_end, leading
from llmprune.walk.streamed import Streamed, stream

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor

SAME = 1e-5  # of the largest logit: how far a merged float32 model may be from the trained one


@dataclass(frozen=True, kw_only=True)
class Merge:
    """How far the merged model is from the one that was trained, on the gate's tokens.

    `exact` is before the weights are rounded to what is stored, `stored` after.
    """

    exact: float
    stored: float
    kl: float

    def text(self) -> str:
        """Return the numbers as a person reads them."""
        return (
            f"{self.exact:.1e} of the largest logit in float32, {self.stored:.1e} as stored "
            f"(KL {self.kl:.1e})"
        )


def run_recovery(
    recipe: Recipe,
    progress: Progress,
    *,
    tokens: Tensor | None = None,
    overwrite: bool = False,
    chain: Mapping[str, Any] | None = None,
) -> Report | None:
    """Train what a recipe says and publish the result; None in all processes but the first.

    `tokens` (N, T) int64 take the place of the text. The same call again goes on where an earlier
    one stopped. `chain` is the recipe that this is a stage of, for the result's record.

    Raises:
        LlmpruneError: nothing is published, and the source is as it was.
    """
    plan = open_recovery(recipe, num_processes=int(os.environ.get("WORLD_SIZE", "1")))
    accelerator = _accelerator(recipe)
    world = open_world(cpu=accelerator.device.type == "cpu")
    if world.rank:
        _train_along(plan, tokens, accelerator, Progress("quiet"))
        await_end(world)  # what comes next reads the result
        return None
    with leading(world):
        return _lead(plan, accelerator, progress, tokens=tokens, overwrite=overwrite, chain=chain)


def _lead(
    plan: RecoverPlan,
    accelerator: Accelerator,
    progress: Progress,
    *,
    tokens: Tensor | None,
    overwrite: bool,
    chain: Mapping[str, Any] | None,
) -> Report:
    """Do all that `run_recovery` does, but for what the other processes add to the training."""
    records = Records(out=plan.out)
    unfinished = None if overwrite else records.run()
    overwrite = overwrite or records.replaces
    finished = not overwrite and is_result(plan.out)
    if not finished:
        check_out(plan.out, plan.source.folder, overwrite=overwrite)
    with records.lock():
        text, record, leak = _text(plan, records, progress, unfinished, tokens)
        fixed = dict(fixes(plan, token_hash(text.ids_NT), accelerator.num_processes))
        fixed |= {"chain": dict(chain)} if chain else {}
        if finished:
            check_same_result(plan.out, fixed)
            records.tidy()
            if not (plan.out / OWN / PAGE).exists():  # killed right before it was written
                write_last(plan.out, progress)
            progress.note(f"{plan.out} already holds this result; nothing to do")
            accelerator.wait_for_everyone()
            return Report.read(plan.out)
        if unfinished is not None:
            check_same_run(unfinished, fixed, f"{records.partial} holds the beginning")
            fixed["micro_batch"] = unfinished["micro_batch"]
        else:
            check_free_space(plan.out, 2 * plan.source.num_bytes, "the result")
            records.discard()
            records.begin(fixed, replaces=overwrite)
        write_tensors(_tokens_file(records), {"tokens": text.ids_NT, "targets": text.targets_NT})
        progress.bind(records.own / "events.jsonl")
        try:
            report = _carry_out(plan, records, fixed, text, progress, accelerator)
            report.data["recovery"][-1]["text"] = record | {"leak": leak}
            write_json(records.own / "report.json", report.data)
            records.publish(overwrite=overwrite)
            write_last(plan.out, progress)
        except LlmpruneError:
            if unfinished is None and Saved(folder=_saved(records)).newest() is None:
                records.discard()
            raise
    progress.bind(plan.out / OWN / "events.jsonl")
    progress.event("published", out=str(plan.out))
    return report


def _accelerator(recipe: Recipe) -> Accelerator:
    """Return what knows processes and devices."""
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs

    on_cpu = recipe.device == "cpu" or (
        recipe.device == "auto" and not torch.cuda.is_available()
        and not torch.backends.mps.is_available()
    )  # fmt: skip
    if recipe.device.startswith("cuda:"):
        torch.cuda.set_device(torch.device(recipe.device))
    return Accelerator(
        cpu=on_cpu,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )


def _carry_out(
    plan: RecoverPlan,
    records: Records,
    fixed: Mapping[str, Any],
    examples: Examples,
    progress: Progress,
    accelerator: Accelerator,
) -> Report:
    """Train, merge, prove and evaluate in the partial folder; return the report."""
    seconds: dict[str, float] = {}
    torch.set_num_threads(int(fixed["threads"]))
    clean_scratch(records.partial)
    question = _question(plan, progress)
    if plan.wish.distill:
        with timed(seconds, "teacher"):
            fill_teacher(plan, examples, _teacher(records), progress)
    with timed(seconds, "load"):
        student = open_student(plan, examples, accelerator.device)
    map_large_pieces()
    with timed(seconds, "train"), keeping_pieces():
        history = _train(plan, student, examples, records, progress, accelerator)
    with timed(seconds, "merge"):
        hashes, merge = _merge(plan, student, records)
    progress.event("merged", **asdict(merge))
    with timed(seconds, "gate"), progress.stage("gate", 1) as stage:
        verdict = pass_gate(
            records.partial,
            device=torch.device("cpu"),
            dtype=torch.float32,
            source=plan.source,
            attention=None if plan.recipe.attention == "auto" else plan.recipe.attention,
            trust_remote_code=plan.trust,
        )
        stage.advance("loads in a fresh process")
    quality = None
    if question is not None:
        with timed(seconds, "evaluate"):
            quality = _quality(plan, records.partial, question, progress)
    before = plan.source.folder / OWN / "report.json"
    earlier = read_json(before) if before.exists() else {}
    data = _report(plan, earlier, fixed, history, merge, seconds, progress)
    if plan.form == MASKED:
        data["form"] = MASKED
    if plan.wish.prune is not None:
        data |= sparsity_facts(plan, student) | {"blocks": block_rows(records.partial)}
    data |= {"gate": verdict.to_dict() | {"folder": str(plan.out)}, "perplexity": quality}
    samples = _samples(plan, records.partial, progress, seconds)
    data |= {"samples": samples, "seconds": dict(seconds)}
    masks = {f"{OWN}/{path.name}": hash_file(path) for path in sorted(records.own.glob("masks-*"))}
    return Report(data | {"files": hashes | masks})


def _train_along(
    plan: RecoverPlan, tokens: Tensor | None, accelerator: Accelerator, progress: Progress
) -> None:
    """Take part in the training of the first process."""
    records = Records(out=plan.out)
    accelerator.wait_for_everyone()
    if not records.own.exists():
        return  # the first process had nothing to do
    from safetensors.torch import load_file

    text = load_file(_tokens_file(records))
    examples = examples_of(text["tokens"], seed=plan.recipe.seed, targets_NT=text["targets"])
    student = open_student(plan, examples, accelerator.device)
    _train(plan, student, examples, records, progress, accelerator, waits=False)


def _train(
    plan: RecoverPlan,
    student: Student,
    examples: Examples,
    records: Records,
    progress: Progress,
    accelerator: Accelerator,
    *,
    waits: bool = True,
) -> History:
    """Train to the last step, from the newest saved state where there is one."""
    saved = Saved(folder=_saved(records))
    if waits:  # the folder is ready for the others
        accelerator.wait_for_everyone()
    newest = saved.newest()
    if newest is not None:
        progress.note(f"recover: going on after step {newest['step']}")
    objective = Objective()
    if plan.wish.distill:
        objective = objective_of(plan, examples, _teacher(records))
        objective.watch(student.blocks.modules)
    shaping = shaping_of(plan, student.trainee, student.blocks, _cutter(plan, student, examples))
    return train(
        *(student.trainee, examples, plan.course, saved, progress, accelerator),
        objective=objective,
        shaping=shaping,
        resume=newest,
    )


def _cutter(plan: RecoverPlan, student: Student, examples: Examples) -> Cut:
    """Return what prunes the model in memory as it is, by the recipe's wish and what differs."""
    trainee, blocks, wish = student.trainee, student.blocks, plan.wish.prune
    tokens = examples.ids_NT[: min(len(examples), plan.recipe.calibration.num_samples)]

    def cut(differs: Mapping[str, Any]) -> Mapping[str, Tensor]:
        assert wish is not None
        given = wish.model_dump(exclude_defaults=True) | {"form": "masked"} | dict(differs)
        if "pattern" in differs:
            given.pop("sparsity", None)
        recipe = plan.recipe.model_copy(update={"steps": (Step(prune=PruneStep(**given)),)})
        held = {} if wish.regrow or plan.wish.regrow else dict(trainee.held)
        report = run_resident(
            trainee.plain,
            recipe,
            Progress("quiet"),
            tokens=tokens,
            prior=lambda index: keeps_by_linear(held, blocks, index),
        )
        return keeps_by_param(report.masks, trainee, blocks)

    return cut


def _merge(plan: RecoverPlan, student: Student, records: Records) -> tuple[dict[str, str], Merge]:
    """Put what was trained into the weights, write them, and compare before and after.

    Raises:
        NumericalError: the merged model computes something else than the trained one.
    """
    tokens, trainee = gate_tokens(plan.blocks.model.config), student.trainee
    trainee.model.to("cpu").float()
    keeps = {**student.bank.keeps, **trainee.held}
    bank = Bank(keeps={name: keep.cpu() for name, keep in keeps.items()})
    trained = _logits(trainee.model, tokens)
    if plan.wish.keep_adapter and trainee.model is not trainee.plain:
        trainee.save_adapter(records.own / "adapter")
    model = trainee.merged()
    exact = _relative(_logits(model, tokens), trained)
    if plan.row.adapter != "lora-prune" and not exact <= SAME:
        raise NumericalError(
            f"recover: the merged model differs from the trained one by {exact:.1e} of the largest "
            "logit. The result is not published; please report the model's config."
        )
    hashes = write_trained(plan.source, model, trainee.touched, bank, records.partial)
    if plan.wish.prune is not None:
        blocks = student.blocks
        found = {i: keeps_by_linear(bank.keeps, blocks, i) for i in range(len(blocks))}
        write_masks(records.partial, found)
    written = _stored_logits(plan, records.partial, tokens)
    log_p, log_q = trained.log_softmax(-1), written.log_softmax(-1)
    kl = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    return hashes, Merge(exact=exact, stored=_relative(written, trained), kl=kl)


def _logits(model: Any, tokens_NT: Tensor) -> Tensor:
    """Return the logits (N, T, V) of a model in memory, float32."""
    with torch.no_grad():
        found: Tensor = model(input_ids=tokens_NT, use_cache=False).logits.float()
    return found


def _stored_logits(plan: RecoverPlan, folder: Path, tokens_NT: Tensor) -> Tensor:
    """Return the logits (N, T, V) of a folder, computed in float32."""
    blocks = _blocks_of(plan, open_folder(folder))
    flow = embed(blocks, tokens_NT, len(tokens_NT))
    walk(blocks, flow)
    return torch.cat([part.float().cpu() for _, _, part in logits(blocks, flow)], 1)


def _blocks_of(plan: RecoverPlan, source: Source) -> Streamed:
    """Open a folder of the same shape as the one that is recovered, to compute in float32."""
    cpu = torch.device("cpu")
    return stream(source, plan.blocks.skeleton, device=cpu, dtype=torch.float32)


def _relative(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest difference over the largest logit."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


def _text(
    plan: RecoverPlan,
    records: Records,
    progress: Progress,
    unfinished: Mapping[str, Any] | None,
    tokens: Tensor | None,
) -> tuple[Examples, dict[str, Any], float | None]:
    """Return what is trained on, what a report says of it, and how much of it is evaluated on.

    An unfinished run goes on with the windows that it kept.
    """
    seed = plan.recipe.seed
    if tokens is not None:
        return examples_of(tokens, seed=seed), window_record("token ids", tokens), None
    tokenizer = read_tokenizer(plan.source, plan.recipe)
    wanted = with_text_of(plan.recipe, plan.wish, plan.seq_len)
    examples, found = read_examples(wanted, tokenizer, seq_len=plan.seq_len, loss=plan.wish.loss)
    for notice in found.notices:
        progress.note(notice)
    question = _question(plan, Progress("quiet"))
    asked = question.windows.inputs_NT if question else None
    leak = leaked_share(examples.ids_NT, asked, progress, what="training", flag="--data")
    return examples, dict(found.record), leak


def _question(plan: RecoverPlan, progress: Progress) -> Question | None:
    """Return what dense, pruned and recovered models will be asked for their perplexity."""
    config, wish = plan.blocks.model.config, plan.recipe.evaluate
    return question_for(
        *(plan.source, plan.recipe, config, progress),
        seq_len=sequence_length(plan.recipe, config),
        num_windows=wish.num_windows if wish else None,
    )


def _quality(
    plan: RecoverPlan, folder: Path, question: Question, progress: Progress
) -> dict[str, Any] | None:
    """Return the perplexity of the dense model where it still lies, before and after."""
    dense = open_origin(plan.source, plan.recipe, torch.float32)
    if dense is not None and vocabulary(dense) != vocabulary(plan.blocks):
        dense = None  # it reads the same text in other tokens
    sides = {
        "dense": dense,
        "before": _blocks_of(plan, plan.source),
        "pruned": _blocks_of(plan, open_folder(folder)),
    }
    return perplexities(sides, question, progress, dtype=torch.float32)


def _samples(
    plan: RecoverPlan, folder: Path, progress: Progress, seconds: dict[str, float]
) -> dict[str, Any] | None:
    """Return what the dense model, the one before and the result write; None if not asked for."""
    dense = open_origin(plan.source, plan.recipe, torch.float32)
    models = {} if dense is None else {"dense": dense.source}
    return samples_of(
        models | {"before": plan.source, "after": open_folder(folder, name=str(plan.out))},
        *(plan.recipe, progress, seconds),
        device=torch.device("cpu"),
        dtype=torch.float32,
        trust_remote_code=plan.trust,
    )


def _report(
    plan: RecoverPlan,
    earlier: Mapping[str, Any],
    fixed: Mapping[str, Any],
    history: History,
    merge: Merge,
    seconds: Mapping[str, float],
    progress: Progress,
) -> dict[str, Any]:
    """Return what report.json holds: the report of the pruned model, and what training did."""
    own = {
        "llmprune": __version__,
        "out": str(plan.out),
        "run": dict(fixed),
        "seconds": dict(seconds),
        "peak_memory": anonymous_bytes(),
        "resumed_after": None,
        "warnings": list(progress.warnings),
    }
    recovered = {**plan.data(), "history": history.to_dict(), "merge": asdict(merge)}
    return {**BARE, **earlier, **own, "recovery": [*earlier.get("recovery", ()), recovered]}


BARE: dict[str, Any] = {
    **dict.fromkeys(("model", "method", "pattern"), ""),
    **dict.fromkeys(("sparsity", "sparsity_of_all"), 0.0),
    **dict.fromkeys(("blocks", "skipped"), ()),
    "form": DENSE,
}  # of a model that llmprune did not prune


def _saved(records: Records) -> Path:
    return records.own / "records" / "saved"


def _teacher(records: Records) -> Path:
    return records.own / "records" / "teacher"


def _tokens_file(records: Records) -> Path:
    return records.own / "records" / "tokens.safetensors"
