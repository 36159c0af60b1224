"""The steps for a model in memory: cut in place through the same loop; nothing is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmprune.base.errors import RecipeError, WontLoad
from llmprune.base.memory import memory_errors
from llmprune.base.progress import Progress
from llmprune.base.timeline import timed
from llmprune.calibration.mix import window_record
from llmprune.checkpoint.skeleton import Skeleton
from llmprune.engine.calibrating import calibration_windows, check_tokens
from llmprune.engine.cutting import cut
from llmprune.engine.gradients import check_backward
from llmprune.engine.opening import anatomies_of, check_walk
from llmprune.engine.outcome import Outcome
from llmprune.engine.plan import Plan
from llmprune.engine.planning import make_plan
from llmprune.engine.rank_shipping import shipping_of
from llmprune.engine.survey import Surroundings, before_the_cut
from llmprune.report.run import Report, report_data
from llmprune.walk.forward import Stream, embed
from llmprune.walk.resident import Resident, in_memory, set_sizes

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from llmprune.recipe import Recipe


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
    with in_memory(model) as blocks, memory_errors():
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
        with timed(seconds, "survey") if plan.surveys else nullcontext():
            plan, gradients = before_the_cut(plan, around)
        plan = _shipped_in_memory(plan, blocks)
        blocks = _without_blocks(plan, blocks)
        flow = fresh(tokens) if tokens is not None and plan.parts.cut_tokens else None
        dense = fresh(tokens) if tokens is not None and plan.parts.dense else None
        keeper = MemoryKeeper()
        with timed(seconds, "cut"):
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
    shipment = shipping_of(plan)(plan, skeleton, config, anatomies, dtype=blocks.model.dtype)
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
