"""The model that is trained: loaded, frozen but for what a recovery trains; and its teacher."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from warnings import catch_warnings, simplefilter

import torch

from llmprune.base.errors import CheckpointError, RecipeError
from llmprune.base.progress import Progress
from llmprune.engine.opening import open_origin
from llmprune.recovery.attaching import Trainee, attach
from llmprune.recovery.bank import Bank, bank_of_zeros, stored_bank
from llmprune.recovery.distillation import DISTILLATIONS, data_weight
from llmprune.recovery.examples import Examples
from llmprune.recovery.objective import Objective, kinds_of
from llmprune.recovery.planning import MASKED, RecoverPlan
from llmprune.recovery.teacher import Outputs, fill_cache, open_cache
from llmprune.walk.resident import Resident, in_memory

if TYPE_CHECKING:
    from llmprune.walk.streamed import Streamed


@dataclass(frozen=True, kw_only=True)
class Student:
    """A model in training, its blocks, and the masks that it came with."""

    trainee: Trainee
    blocks: Resident
    bank: Bank


def open_student(plan: RecoverPlan, device: torch.device) -> Student:
    """Load the model and its masks, and put into it what is trained.

    Raises:
        CheckpointError: weights are not zero where the masks say removed.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model: Any = AutoModelForCausalLM.from_pretrained(
        plan.source.folder, dtype=plan.dtype, trust_remote_code=plan.trust
    )
    model.config.use_cache = False
    model.to(device)
    torch.manual_seed(plan.recipe.seed)
    with in_memory(model) as blocks, catch_warnings():
        simplefilter("ignore", FutureWarning)  # of peft about transformers
        zeros = plan.wish.masks == "zeros"
        bank = bank_of_zeros(blocks) if zeros else stored_bank(plan.source.folder, blocks)
        if plan.form == MASKED:
            _check_bank(plan, model, bank)
        trainee = attach(blocks, bank, plan.row, rank=plan.rank, alpha=plan.alpha, norms=plan.norms)
    model.eval()
    if plan.checkpointing:
        _checkpoint(model, plan.blocks.family.blocks)
    return Student(trainee=trainee, blocks=blocks, bank=bank)


def fill_teacher(plan: RecoverPlan, examples: Examples, folder: Path, progress: Progress) -> None:
    """Write what the dense model says of the windows, block by block, before training begins.

    Raises:
        CheckpointError: the dense model is not where it was.
    """
    dense = _dense(plan)
    fill_cache(
        *(folder, dense, examples.ids_NT, _outputs(plan)),
        model=dense.source.fingerprint(),
        progress=progress,
    )


def objective_of(plan: RecoverPlan, examples: Examples, folder: Path) -> Objective:
    """Return the loss with a teacher, whose outputs lie in a folder."""
    wish = plan.wish
    assert wish.distill is not None
    weight = wish.distill_weight
    model = _dense(plan).source.fingerprint()
    return Objective(
        kinds=kinds_of(wish.distill),
        weight=data_weight(wish.data_fraction) if weight is None else weight,
        teacher=open_cache(folder, examples.ids_NT, _outputs(plan), model=model),
    )


def sparsity_facts(plan: RecoverPlan, student: Student) -> dict[str, Any]:
    """Return what a report says of the masks that training ended with."""
    wish = plan.wish.prune
    assert wish is not None
    held = student.trainee.held
    removed = sum(int((~keep).sum()) for keep in held.values())
    eligible = sum(keep.numel() for keep in held.values())
    return {
        "model": f"{plan.source.name} ({plan.blocks.model.config.model_type})",
        "method": wish.method,
        "pattern": wish.pattern,
        "form": MASKED,
        "sparsity": removed / max(1, eligible),
        "sparsity_asked": wish.sparsity,
        "sparsity_of_all": removed / plan.num_params,
        "parameters_before": plan.num_params,
        "parameters_after": plan.num_params,
    }


def _dense(plan: RecoverPlan) -> Streamed:
    """Open the teacher: the model that the source was made from, or a dense source itself.

    Raises:
        CheckpointError: it is not where it was.
        RecipeError: it has another vocabulary.
    """
    found = open_origin(plan.source, plan.recipe, torch.float32)
    if found is None and plan.form != MASKED:
        from llmprune.engine.opening import open_blocks

        found = open_blocks(plan.source, plan.recipe, torch.device("cpu"), torch.float32)
    if found is None:
        raise CheckpointError(
            f"recover.distill: the dense model that {plan.source.name} was made from is not where "
            "it was (llmprune/run.json names it under origin), so it cannot teach. Put it back, or "
            "leave --set recover.distill out."
        )
    theirs, ours = (int(b.model.config.vocab_size) for b in (found, plan.blocks))
    if theirs != ours:
        raise RecipeError(
            f"recover.distill: the dense model knows {theirs} tokens and this one {ours}, so their "
            "predictions do not compare. Leave recover.distill out."
        )
    return found


def _outputs(plan: RecoverPlan) -> Outputs:
    """Return what is kept of the teacher."""
    hidden = any(DISTILLATIONS[k].needs == "hidden" for k in kinds_of(str(plan.wish.distill)))
    return Outputs(top=plan.wish.distill_top, hidden="bfloat16" if hidden else None)


def _check_bank(plan: RecoverPlan, model: Any, bank: Bank) -> None:
    """Check that removed weights are zero before anything is trained.

    Raises:
        CheckpointError: they are not; something else was merged into the folder.
    """
    found = dict(bank.violations(dict(model.named_parameters())))
    if found:
        name = min(found)
        raise CheckpointError(
            f"{plan.source.name}: {name} has {found[name]} numbers where its mask says removed. "
            "The folder was changed after pruning (merged, fine-tuned or quantised); prune it "
            "again."
        )


def _checkpoint(model: Any, path: str) -> None:
    """Let blocks be computed again in the backward pass; what is in them stays in evaluation."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    for block in model.get_submodule(path):
        block.training = True
