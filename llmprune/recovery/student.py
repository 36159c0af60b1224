"""The model that is trained: loaded, frozen but for what a recovery trains; and its teacher."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from warnings import catch_warnings, simplefilter

import torch
from torch.nn.functional import cosine_similarity

from llmprune.base.errors import CheckpointError, RecipeError
from llmprune.base.progress import Progress
from llmprune.checkpoint.source import read_json
from llmprune.delivery.masks import OWN
from llmprune.engine.opening import anatomies_of
from llmprune.engine.shapes import what_stays
from llmprune.recovery.attaching import Trainee, attach
from llmprune.recovery.bank import Bank, bank_of_zeros, stored_bank
from llmprune.recovery.distillation import DISTILLATIONS, data_weight
from llmprune.recovery.examples import Examples
from llmprune.recovery.objective import Objective, kinds_of
from llmprune.recovery.planning import MASKED, RecoverPlan
from llmprune.recovery.ranks import importance_of_angles, ranks_by_importance
from llmprune.recovery.taught import open_teacher, outputs_of
from llmprune.recovery.teacher import fill_cache, open_cache
from llmprune.walk.resident import Resident, in_memory

if TYPE_CHECKING:
    from llmprune.walk.streamed import Streamed


LOOKED_AT = 32  # windows that importances of blocks are learnt from


@dataclass(frozen=True, kw_only=True)
class Student:
    """A model in training, its blocks, and the masks that it came with."""

    trainee: Trainee
    blocks: Resident
    bank: Bank


def open_student(plan: RecoverPlan, examples: Examples, device: torch.device) -> Student:
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
        trainee = attach(
            *(blocks, bank, plan.row),
            rank=plan.rank,
            alpha=plan.alpha,
            norms=plan.norms,
            ranks=_ranks(plan, blocks, examples) if plan.wish.ranks == "importance" else None,
        )
    model.eval()
    if plan.checkpointing:
        _checkpoint(model, plan.blocks.family.blocks)
    return Student(trainee=trainee, blocks=blocks, bank=bank)


def _ranks(plan: RecoverPlan, blocks: Resident, examples: Examples) -> dict[int, int]:
    """Return ranks by how far blocks turn what they read, as many in all as equal ones.

    Source: Wang et al., CFSP.
    """
    angles = dict.fromkeys(range(len(blocks)), 0.0)

    def turned(index: int) -> Any:
        def see(module: Any, args: Any, given: Any, output: Any) -> None:
            before = args[0] if args else given["hidden_states"]
            after = output[0] if isinstance(output, tuple | list) else output
            cos = cosine_similarity(before.float(), after.float(), dim=-1).clamp(-1, 1)
            angles[index] += float((cos.acos() / torch.pi).sum())

        return see

    handles = [
        block.register_forward_hook(turned(index), with_kwargs=True)
        for index, block in enumerate(blocks.modules)
    ]
    ids_NT = examples.ids_NT[:LOOKED_AT]
    with torch.no_grad():
        for ids_BT in ids_NT.split(plan.course.micro_batch):
            blocks.model(input_ids=ids_BT.to(blocks.device), use_cache=False)
    for handle in handles:
        handle.remove()
    means = {index: angle / ids_NT.numel() for index, angle in angles.items()}
    sides = [
        min(linear.shape)
        for index in range(len(blocks))
        for linear in blocks.anatomy(index).linears.values()
    ]
    return ranks_by_importance(importance_of_angles(means), plan.rank, most=min(sides))


def fill_teacher(plan: RecoverPlan, examples: Examples, folder: Path, progress: Progress) -> None:
    """Write what the dense model says of the windows, block by block, before training begins.

    Raises:
        CheckpointError: the dense model is not where it was.
    """
    dense = _dense(plan)
    fill_cache(
        *(folder, dense, examples.ids_NT, outputs_of(plan.wish)),
        model=dense.source.fingerprint(),
        progress=progress,
    )


def objective_of(plan: RecoverPlan, examples: Examples, folder: Path) -> Objective:
    """Return the loss with a teacher, whose outputs lie in a folder."""
    wish = plan.wish
    assert wish.distill is not None
    weight = wish.distill_weight
    dense = _dense(plan)
    model = dense.source.fingerprint()
    return Objective(
        kinds=kinds_of(wish.distill),
        weight=data_weight(wish.data_fraction) if weight is None else weight,
        teacher=open_cache(folder, examples.ids_NT, outputs_of(plan.wish), model=model),
        kept=_kept_blocks(plan, len(dense)),
    )


def _kept_blocks(plan: RecoverPlan, num_blocks: int) -> list[int] | None:
    """Return the teacher's blocks that are left; none where they all are.

    Raises:
        RecipeError: blocks went, and which is not known, or hidden states have another size.
    """
    if not any(DISTILLATIONS[kind].needs == "hidden" for kind in kinds_of(str(plan.wish.distill))):
        return None
    path = plan.source.folder / OWN / "masks.json"
    data = read_json(path) if path.exists() else {}
    kept: list[int] | None = data.get("blocks") or data.get("origin", {}).get("blocks")
    if len(plan.blocks) != num_blocks and (kept is None or len(kept) != len(plan.blocks)):
        raise RecipeError(
            f"recover.distill: this model has {len(plan.blocks)} of the {num_blocks} blocks of the "
            "dense one, and which is not known, so hidden states cannot be compared. Type --set "
            "recover.distill=kl."
        )
    return kept if len(plan.blocks) != num_blocks else None


def sparsity_facts(plan: RecoverPlan, student: Student) -> dict[str, Any]:
    """Return what a report says of the masks that training ended with."""
    wish = plan.wish.prune
    assert wish is not None
    keeps = {**student.bank.keeps, **student.trainee.held}
    removed = sum(int((~keep).sum()) for keep in keeps.values())
    _, eligible = what_stays(anatomies_of(plan.blocks), wish, ())
    return {
        "model": f"{plan.source.name} ({plan.blocks.model.config.model_type})",
        "method": plan.name if plan.row.units else wish.method,
        "pattern": wish.pattern,
        "form": MASKED,
        "sparsity": removed / max(1, eligible),
        "sparsity_asked": wish.sparsity,
        "sparsity_of_all": removed / plan.num_params,
        "parameters_before": plan.num_params,
        "parameters_after": plan.num_params,
    }


def _dense(plan: RecoverPlan) -> Streamed:
    """Open the teacher, to be walked where the student will be trained."""
    accelerated = plan.device.type != "cpu"
    return open_teacher(
        *(plan.wish, plan.source, plan.recipe, plan.blocks),
        masked=plan.form == MASKED,
        device=plan.device,
        dtype=plan.dtype if accelerated else torch.float32,
    )


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
