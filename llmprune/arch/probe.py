"""What a family looks like, found out on a miniature: where its blocks are, who reads what.

One forward of a random model tells which list of modules is run block after block, and which
matrices are multiplied with the same activation. Legend: E experts, O outputs, I inputs.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from llmprune.arch.anatomy import EXPERT, is_router
from llmprune.arch.couplings import heads_of
from llmprune.arch.experts import mixture_of
from llmprune.arch.miniature import SEQ_LEN, miniature_model
from llmprune.arch.products import Products, slices
from llmprune.arch.table import GATED_FFN, HEADS, row_of
from llmprune.arch.types import Family, Tap, Unfuse
from llmprune.base.errors import UnsupportedModel, first_line


@dataclass(frozen=True, kw_only=True)
class Use:
    """How a matrix of a block is multiplied with: as stored (O, I), or `transposed` (I, O)."""

    param: str
    expert: int | None
    transposed: bool


@dataclass(kw_only=True)
class Trace:
    """What one forward showed: per block, the activations that every matrix was multiplied with."""

    reads: list[dict[Use, list[tuple[int, ...]]]]
    returns: set[int]
    kept: list[Tensor] = field(default_factory=list)


def find_family(config: Any, *, trust_remote_code: bool = False) -> Family:
    """Return the row of a model type, or what the probe finds where the table has none.

    Raises:
        UnsupportedModel: neither; says what was found.
    """
    if (row := row_of(_known_kind(config))) is not None:
        return replace(row, heads=heads_of(config), mixture=mixture_of(config))
    data = json.dumps(config.to_dict(), sort_keys=True, default=str)
    kind: Any = type(config)
    found = _probed(data, kind, trust_remote_code)
    sized = replace(found, heads=heads_of(config), mixture=mixture_of(config))
    return replace(sized, ffns=(GATED_FFN,), attentions=(HEADS,))


def _known_kind(config: Any) -> str:
    """Return the model type whose row says where linears are: of a result of tier E3 that of its
    source, but where two linears stand for one."""
    kind = str(config.model_type)
    return kind if getattr(config, "ranks", None) else kind.removeprefix("llmprune_")


@cache
def _probed(data: str, config_class: Any, trust_remote_code: bool) -> Family:
    """Probe a config that is given as JSON, once per process."""
    config = config_class.from_dict(json.loads(data))
    return probe_family(config, trust_remote_code=trust_remote_code)


def probe_family(config: Any, *, trust_remote_code: bool = False) -> Family:
    """Return the family of a model type that the table does not know.

    Raises:
        UnsupportedModel: no miniature can be built or run, or its blocks are not to be found.
    """
    model = miniature_model(config, trust_remote_code=trust_remote_code)
    experts = getattr(model, "set_experts_implementation", None)
    if experts is not None and hasattr(model.config, "_experts_implementation"):
        experts("eager")
    return family_of_model(model)


def family_of_model(model: Any) -> Family:
    """Return what a (small, random) model shows of its family when it runs.

    Raises:
        UnsupportedModel: it does not run, or its blocks are not to be found.
    """
    kind = model.config.model_type
    try:
        path = _find_blocks(model)
        trace = _trace(model, model.get_submodule(path))
    except UnsupportedModel:
        raise
    except Exception as error:  # any line of any model may be what does not run
        first = first_line(error)
        raise UnsupportedModel(
            f"a miniature of {kind!r} does not run on token ids alone: {type(error).__name__}: "
            f"{first}. Models that need other inputs are not pruned."
        ) from error
    blocks = model.get_submodule(path)
    unfuse, names = _unfuse(blocks, trace)
    taps = _taps(trace, names)
    if not taps:
        raise UnsupportedModel(
            f"the blocks of {kind!r} at {path!r} multiply with no weight in a way that is watched, "
            "so there is nothing to prune."
        )
    return Family(
        model_types=(kind,),
        blocks=path,
        taps=taps,
        unfuse=unfuse,
        returns=max(trace.returns),
        seen=frozenset(name for block in blocks for name, _ in block.named_parameters()),
    )


def _ids(model: Any) -> Tensor:
    """Return tokens (2, T) that are no special ones."""
    vocab = model.config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(0)
    return torch.randint(min(3, vocab - 1), vocab, (2, SEQ_LEN), generator=generator)


def _find_blocks(model: Any) -> str:
    """Return the path of the list whose members run once, in order, on one another's outputs.

    Of several the one that holds the most parameters.
    """
    calls: list[tuple[str, int]] = []
    lists: dict[str, nn.ModuleList] = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)
    }
    hooks = []
    for name, members in lists.items():
        for index, member in enumerate(members):

            def note(
                module: Any, args: Any, out: Any, name: str = name, index: int = index
            ) -> None:
                calls.append((name, index))

            hooks.append(member.register_forward_hook(note))
    try:
        with torch.no_grad():
            model(input_ids=_ids(model), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    good = {
        name: sum(value.numel() for value in members.parameters())
        for name, members in lists.items()
        if len(members) > 1
        and [index for other, index in calls if other == name] == list(range(len(members)))
    }
    if not good:
        raise UnsupportedModel(
            f"{type(model).__name__} has no list of blocks that run once each, in order "
            f"(its lists: {', '.join(lists) or 'none'}). Only such models can be pruned block by "
            "block."
        )
    found = max(good, key=lambda name: (good[name], -len(name)))
    _check_alone(model, found, {name for name, _ in calls})
    return found


def _check_alone(model: Any, blocks: str, called: Collection[str]) -> None:
    """Check that no other list of the model holds blocks, or halves of them.

    Lists of single matrices or norms are no blocks.

    Raises:
        UnsupportedModel: one does, and would stay as it is.
    """
    for name in sorted(called):
        if f"{name}.".startswith(f"{blocks}.") or blocks.startswith(f"{name}."):
            continue
        matrices = [p for p in model.get_submodule(name)[0].parameters() if p.dim() > 1]
        if len(matrices) > 1:
            raise UnsupportedModel(
                f"{type(model).__name__} runs blocks from more than one list: {blocks} and {name}. "
                "Only models whose blocks stand in one list, each fed by the one before it, can be "
                "pruned block by block."
            )


def _trace(model: Any, blocks: Any) -> Trace:
    """Run once more, and note which matrix of which block is multiplied with which activation."""
    trace = Trace(reads=[{} for _ in blocks], returns=set())
    params = [_watched(block) for block in blocks]
    current = -1

    def enter(index: int) -> None:
        nonlocal current
        current = index

    def leave(output: Any) -> None:
        nonlocal current
        current = -1
        trace.returns.add(len(output) if isinstance(output, tuple | list) else 0)

    def seen(left: Tensor, right: Tensor) -> None:
        if current < 0 or _address(right) not in params[current]:
            return
        name, param = params[current][_address(right)]
        for one, matrix in slices(left, right):
            if (use := _use(name, param, matrix)) is not None:
                trace.kept.append(one)
                key = (one.data_ptr(), one.numel(), one.shape[-1], one._version)
                trace.reads[current].setdefault(use, []).append(key)

    hooks = []
    for index, block in enumerate(blocks):
        hooks.append(block.register_forward_pre_hook(lambda m, a, i=index: enter(i)))
        hooks.append(block.register_forward_hook(lambda m, a, out: leave(out)))
    try:
        with torch.no_grad(), Products(seen):
            model(input_ids=_ids(model), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return trace


def _watched(block: nn.Module) -> dict[int, tuple[str, Tensor]]:
    """Return the parameters that may hold linears, by address."""
    shapes = {name: tuple(value.shape) for name, value in block.named_parameters()}
    return {
        _address(value): (name, value)
        for name, value in block.named_parameters()
        if value.dim() in (2, 3) and not is_router(name, shapes)
    }


def _address(value: Tensor) -> int:
    """Return where the memory that a tensor or a view of it lies in begins."""
    return value.untyped_storage().data_ptr()


def _use(name: str, param: Tensor, matrix_OI: Tensor) -> Use | None:
    """Return how a matrix lies in its parameter; nothing if it is only a part of one."""
    shape = tuple(param.shape[-2:])
    transposed = matrix_OI.stride(0) == 1 and matrix_OI.stride(1) == matrix_OI.shape[0]
    transposed = transposed and matrix_OI.shape[0] > 1
    if tuple(matrix_OI.shape) != (shape[::-1] if transposed else shape):
        return None
    expert = None
    if param.dim() == 3:
        expert = (matrix_OI.data_ptr() - param.data_ptr()) // (
            matrix_OI.numel() * param.element_size()
        )
    return Use(param=name, expert=expert, transposed=transposed)


def _unfuse(blocks: Any, trace: Trace) -> tuple[tuple[Unfuse, ...], Mapping[str, tuple[str, ...]]]:
    """Return the rows of parameters that are not plain (O, I), and the linears of every one."""
    rows: dict[str, Unfuse] = {}
    names: dict[str, tuple[str, ...]] = {}
    for block, reads in zip(blocks, trace.reads, strict=True):
        for use in reads:
            base = use.param.removesuffix(".weight")
            stacked = use.expert is not None
            if stacked:
                owner, _, leaf = base.rpartition(".")
                parts = tuple(f"{owner}.{{expert}}.{part}" for part in _parts(leaf))
            else:
                parts = (base,)
            names[use.param] = parts
            if stacked or use.transposed or base == use.param:
                module = block.get_submodule(use.param.rpartition(".")[0])
                rows[use.param] = Unfuse(
                    param=use.param,
                    parts=parts,
                    transposed=use.transposed,
                    stacked=stacked,
                    interleaved=len(parts) > 1 and not getattr(module, "is_concatenated", True),
                )
    return tuple(rows.values()), names


def _parts(leaf: str) -> tuple[str, ...]:
    """Return the linears in a stacked parameter: gate and up lie in one where its name says so."""
    return ("gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,)


def _taps(trace: Trace, names: Mapping[str, tuple[str, ...]]) -> tuple[Tap, ...]:
    """Return the taps: matrices that every block that has one of them feeds with one activation."""
    groups: dict[tuple[object, ...], list[str]] = {}
    for param in names:
        key = tuple(_activations(reads, param) for reads in trace.reads)
        groups.setdefault(key, []).append(param)
    taps = []
    for params in groups.values():
        readers = tuple(dict.fromkeys(_templates(params, names)))
        taps.append(Tap(name=f"{readers[0]}.in", readers=readers))
    return tuple({tap.readers: tap for tap in taps}.values())


def _activations(reads: Mapping[Use, list[tuple[int, ...]]], param: str) -> object:
    """Return what identifies the activations that a parameter's matrices read in one block."""
    return tuple(
        sorted((use.expert or 0, tuple(keys)) for use, keys in reads.items() if use.param == param)
    )


def _templates(params: list[str], names: Mapping[str, tuple[str, ...]]) -> Iterator[str]:
    """Yield the linears of parameters, experts that are modules of their own as templates."""
    for param in params:
        for name in names[param]:
            yield EXPERT.sub("experts.{expert}", name)
