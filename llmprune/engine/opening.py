"""From a recipe to an opened source and a plan: devices, dtypes, names, shapes, no weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmprune.arch.miniature import SEQ_LEN, miniature_model
from llmprune.arch.types import Family
from llmprune.base.errors import CheckpointError, RecipeError, first_line
from llmprune.calibration.replay import check_replay
from llmprune.catalog import METHODS
from llmprune.checkpoint.locate import open_source
from llmprune.checkpoint.skeleton import build_skeleton, read_config
from llmprune.checkpoint.source import Source, read_json
from llmprune.delivery.masks import OWN
from llmprune.engine.budgets import Budget
from llmprune.engine.collected import read_collected
from llmprune.engine.gradients import check_backward
from llmprune.engine.plan import Plan
from llmprune.engine.planning import make_plan
from llmprune.engine.rank_shipping import check_no_masks, shipping_of
from llmprune.engine.shapes import Anatomies
from llmprune.engine.whole_shipping import ship_whole
from llmprune.walk.rewriting import DTYPE_NAMES
from llmprune.walk.streamed import Streamed, stream

if TYPE_CHECKING:
    from llmprune.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A source opened for walking, and the plan of what to do with it."""

    source: Source
    blocks: Streamed
    plan: Plan


def default_out(recipe: Recipe) -> Path:
    """Return the folder of a result: model, method or effort, and amount, in the working folder."""
    name = Path(recipe.model.rstrip("/")).name
    pattern = recipe.prune.pattern
    amount = pattern.replace(":", "of") if ":" in pattern else f"{recipe.prune.sparsity:g}"
    kind = "" if pattern == "unstructured" or ":" in pattern else f"-{pattern}"
    step = recipe.prune
    for key, text in (step.target or {}).items():
        amount = key + text.replace("%", "pc").replace("+", "-").replace(" ", "")
    return Path(f"{name}-{step.effort or step.method}{kind}-{amount}")


def choose_device(name: str) -> torch.device:
    """Return the device to work on: CUDA, else MPS, else the CPU, unless one is named.

    Raises:
        RecipeError: the named device is not there.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", 0)
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = first_line(error)
        raise RecipeError(
            f"device: {name!r} cannot be used ({first}). Type --device cpu."
        ) from None
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def choose_dtype(name: str, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype to compute in: the stored one on accelerators, float32 on the CPU."""
    if name != "auto":
        found: torch.dtype = getattr(torch, name)
        return found
    return torch.float32 if device.type == "cpu" else stored


def storage_dtype(source: Source) -> torch.dtype:
    """Return the dtype that most of a checkpoint's parameters are stored in."""
    sizes: dict[str, int] = {}
    for entry in source.entries.values():
        sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.num_params
    most = max(sizes, key=lambda key: sizes[key])
    if most not in DTYPE_NAMES:
        raise CheckpointError(
            f"{source.name} stores its weights as {most}, a quantised type. Prune the 16-bit "
            "checkpoint it was made from."
        )
    found: torch.dtype = getattr(torch, DTYPE_NAMES[most])
    return found


def open_plan(recipe: Recipe, *, budget: Budget | None = None) -> Opened:
    """Open the source and decide the run; no weight is read.

    A `budget` that was measured before is not measured again.

    Raises:
        LlmpruneError: whatever is wrong with recipe, source, device or memory.
    """
    METHODS[recipe.prune.method]
    out = Path(recipe.out).expanduser() if recipe.out else default_out(recipe)
    if not out.name or out.name == "..":
        raise RecipeError(f"out: {out} has no name of its own. Choose a new folder with --out.")
    source = open_source(recipe.model, revision=recipe.revision)
    device = choose_device(recipe.device)
    stored = storage_dtype(source)
    dtype = choose_dtype(recipe.dtype, stored, device)
    blocks = open_blocks(source, recipe, device, dtype)
    folder = recipe.calibration.statistics
    given = None if folder is None else read_collected(folder)
    if given is not None:
        given.check_model(source.fingerprint())
    plan = make_plan(
        recipe,
        anatomies_of(blocks),
        source_name=f"{source.name} ({blocks.model.config.model_type})",
        out=str(out),
        config=blocks.model.config,
        device=device,
        dtype=dtype,
        stored_bytes=source.num_bytes,
        stored=stored,
        converted_params=sum(
            source.entries[name].num_params
            for name, pattern in blocks.naming.pattern.items()
            if pattern is not None
        ),
        budget=budget,
        given=given,
    )
    check_walk(blocks.model.config, blocks.family, trust_remote_code=recipe.trust_remote_code)
    if plan.parts.backward:
        config, trust = blocks.model.config, recipe.trust_remote_code
        check_backward(config, blocks.family, trust_remote_code=trust)
    if not plan.forward and given is None:
        blocks = replace(blocks, dtype=None)
    opened = Opened(source=source, blocks=blocks, plan=plan)
    return replace(opened, plan=with_shipment(opened, plan))


def obeying(opened: Opened, budget: Budget) -> Opened:
    """Return an opened source whose plan follows a budget that was measured before."""
    if budget == opened.plan.budget:
        return opened
    return replace(opened, plan=with_shipment(opened, opened.plan.with_budget(budget)))


def with_shipment(opened: Opened, plan: Plan) -> Plan:
    """Return the plan with how its result will be stored, where its counts are known.

    Raises:
        WontLoad: no tier that is allowed holds what would be left.
    """
    if plan.counts is None:
        return plan
    if plan.whole is not None:
        words = read_tokenizer(opened.source, plan.recipe) if plan.whole.is_vocabulary else None
        return replace(plan, shipment=ship_whole(plan, opened.source, opened.blocks, words))
    skeleton, config = opened.blocks.skeleton, opened.source.config()
    check_no_masks(plan, opened.source)
    shipment = shipping_of(plan)(
        *(plan, skeleton, config, [opened.blocks.anatomy(i) for i in range(len(plan.groups))]),
        dtype=opened.blocks.dtype or plan.dtype,
        trust_remote_code=plan.recipe.trust_remote_code,
    )
    return replace(plan, shipment=shipment)


def check_walk(config: Any, family: Family, *, trust_remote_code: bool = False) -> None:
    """Check on a miniature that blocks can be run one at a time, as calibration and gate do.

    Raises:
        UnsupportedModel: they cannot; says what differs from a normal forward.
    """
    small = miniature_model(config, trust_remote_code=trust_remote_code)
    blocks = small.get_submodule(family.blocks)
    check_replay(small, blocks, SEQ_LEN, returns=family.returns)


MANY_BLOCKS, WIDE = 512, 2**20  # up to these a model without weights is built in no time
WIDTHS = ("hidden_size", "intermediate_size", "head_dim", "vocab_size")


def check_sizes(config: Any, source: Source) -> None:
    """Check before anything is built that a config asks for no more than its checkpoint can hold.

    What takes no time to build is left to the comparison of names and shapes, which says more.

    Raises:
        CheckpointError: it asks for more blocks than there are tensors, or for a width above the
            number of weights in the largest.
    """
    text = config.get_text_config()
    most = max((entry.num_params for entry in source.entries.values()), default=0)
    limits = {"num_hidden_layers": len(source.entries)} | dict.fromkeys(WIDTHS, most)
    for key, limit in limits.items():
        value = getattr(text, key, None)
        harmless = MANY_BLOCKS if key == "num_hidden_layers" else WIDE
        if isinstance(value, int) and value > max(limit, harmless):
            raise CheckpointError(
                f"{source.folder / 'config.json'} says {key} {value}, and the weights of "
                f"{source.name} hold at most {limit}: they are not of one model. Fetch both again."
            )


def open_blocks(
    source: Source, recipe: Recipe, device: torch.device, dtype: torch.dtype
) -> Streamed:
    """Open a source for walking."""
    trust = recipe.trust_remote_code
    config = read_config(source.folder, trust_remote_code=trust)
    check_sizes(config, source)
    skeleton = build_skeleton(
        config,
        dtype=dtype,
        attention=None if recipe.attention == "auto" else recipe.attention,
        trust_remote_code=trust,
    )
    return stream(source, skeleton, device=device, dtype=dtype)


def anatomies_of(blocks: Any) -> Anatomies:
    """Return the shapes of a model, streamed or in memory."""
    model = blocks.model
    inside = blocks.family.blocks + "."
    return Anatomies(
        model_type=model.config.model_type,
        prefixes=tuple(f"{inside}{index}." for index in range(len(blocks))),
        blocks=tuple(blocks.anatomy(index) for index in range(len(blocks))),
        shapes=tuple(
            {name: tuple(value.shape) for name, value in module.named_parameters()}
            for module in blocks.modules
        ),
        trunk={
            name: tuple(value.shape)
            for name, value in model.named_parameters()
            if not name.startswith(inside)
        },
    )


def open_origin(
    source: Source,
    recipe: Recipe,
    dtype: torch.dtype | None,
    *,
    device: torch.device | None = None,
) -> Streamed | None:
    """Open the dense model that a result was made from, where it still lies and is what it was.

    It is walked on the CPU where no device is given. None for a source that llmprune did not write.
    """
    record = source.folder / OWN / "run.json"
    origin = read_json(record).get("origin") or {} if record.exists() else {}
    name = "demo" if origin.get("name") == "demo" else str(origin.get("folder") or "")
    if not name or (name != "demo" and not (Path(name) / "config.json").is_file()):
        return None
    dense = open_source(name)
    if dense.fingerprint() != origin.get("fingerprint"):
        return None
    return open_blocks(dense, recipe, device or torch.device("cpu"), dtype or storage_dtype(dense))


def read_tokenizer(source: Source, recipe: Recipe) -> Any:
    """Load the tokenizer of a source.

    Raises:
        CheckpointError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(
            source.folder, trust_remote_code=recipe.trust_remote_code
        )
        if not isinstance(found.model_max_length, int | float):
            raise ValueError(f"model_max_length is {found.model_max_length!r}, not a number")
        return found
    except Exception as error:  # tokenizers raises bare exceptions
        first = first_line(error)
        raise CheckpointError(
            f"{source.name} has no usable tokenizer ({first}). Calibration text needs one: copy "
            "tokenizer.json and tokenizer_config.json of this model into the folder, or use "
            "--method magnitude, which reads no text."
        ) from None
