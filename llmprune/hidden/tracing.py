"""Who reads and writes the residual stream, seen in one forward of a miniature model.

Norms are known by what they compute, their readers by what they multiply with: every row of it is a
row that a norm gave out, also where experts take some tokens only. Whatever else writes as many
values as the stream is wide writes the stream; a proof on numbers follows (`proof.py`).
Legend: D hidden size, N tokens, M tokens of one product, O outputs, I inputs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llmprune.arch.miniature import SEQ_LEN
from llmprune.arch.products import Products, slices
from llmprune.arch.types import Family
from llmprune.base.errors import UnsupportedModel
from llmprune.checkpoint.skeleton import use_eager_experts
from llmprune.hidden.roles import Blueprint

REMEDY = "Prune widths inside the blocks instead: --pattern ffn-channels or heads."
STREAM = "the residual stream itself"


@dataclass(kw_only=True)
class _Trace:
    """What one forward showed of one block: by parameter, who gave what it was multiplied with."""

    given: dict[str, list[Tensor]] = field(default_factory=dict)
    reads: dict[str, set[str | None]] = field(default_factory=dict)
    axes: dict[str, tuple[int, int]] = field(default_factory=dict)
    outputs: dict[str, int] = field(default_factory=dict)


def trace_roles(model: Any, family: Family) -> Blueprint:
    """Return who reads and writes the stream of a (small, random) model.

    Raises:
        UnsupportedModel: its norms are no RMS norms before their readers, or its trunk has more
            than embeddings, a norm and a head.
    """
    use_eager_experts(model)
    blocks = model.get_submodule(family.blocks)
    width = model.get_input_embeddings().weight.shape[1]
    norms = [_norms_of(block, width) for block in blocks]
    readers: dict[str, tuple[int, str]] = {}
    writers: dict[str, int] = {}
    offsets: dict[str, float] = {}
    for block, own, trace in zip(blocks, norms, _run(model, blocks, norms), strict=True):
        found = _readers(block, own, trace)
        readers |= found
        offsets |= {name: _offset(block, name, width) for _, name in found.values()}
        writers |= _writers(block, trace, found, width)
    if readers.keys() & writers.keys():
        both = sorted(readers.keys() & writers.keys())[0]
        raise UnsupportedModel(
            f"the hidden size cannot be cut: {both!r} reads the residual stream in one block and "
            f"writes it in another. {REMEDY}"
        )
    embedding, norm, head = _trunk(model, family)
    return Blueprint(
        readers=readers,
        writers=writers,
        norms=offsets,
        seen=frozenset(name for block in blocks for name, _ in block.named_parameters()),
        embedding=embedding,
        norm=norm,
        head=head,
        offset=_offset(model, norm, width),
    )


def norm_offset(norm: nn.Module, width: int) -> float | None:
    """Return what an RMS norm adds to its weight, 0 or 1; None where it is no RMS norm.

    >>> norm_offset(nn.RMSNorm(8), 8), norm_offset(nn.LayerNorm(8), 8)
    (0.0, None)
    """
    if [name for name, _ in norm.named_parameters()] != ["weight"]:
        return None
    x_ND = 100 * torch.randn(4, width, generator=torch.Generator().manual_seed(0))
    x_ND += 50  # a mean that a LayerNorm would take away
    unit_ND = x_ND / x_ND.square().mean(dim=-1, keepdim=True).sqrt()
    with torch.no_grad():
        zero_ND, one_ND = (
            torch.func.functional_call(norm, {"weight": weight_D}, (x_ND,))
            for weight_D in (torch.zeros(width), torch.ones(width))
        )
    for offset in (0.0, 1.0):
        expected = ((zero_ND, offset * unit_ND), (one_ND, (offset + 1) * unit_ND))
        if all(torch.allclose(found, wanted, atol=1e-3) for found, wanted in expected):
            return offset
    return None


def _norms_of(block: nn.Module, width: int) -> dict[str, nn.Module]:
    """Return the modules of a block that hold nothing but vectors of the stream's width."""
    found = {}
    for path, module in block.named_modules():
        shapes = {tuple(value.shape) for value in module.parameters()}
        if shapes == {(width,)} and not list(module.children()):
            found[f"{path}.weight"] = module
    return found


def _run(model: Any, blocks: Any, norms: list[dict[str, nn.Module]]) -> list[_Trace]:
    """Run once, and note what every matrix of every block is multiplied with."""
    traces = [_Trace() for _ in blocks]
    owners: dict[int, tuple[int, str, Tensor]] = {}
    hooks = []
    for index, block in enumerate(blocks):
        for name, value in block.named_parameters():
            if value.dim() in (2, 3):
                owners[value.untyped_storage().data_ptr()] = (index, name, value)
        keep = traces[index].given
        hooks.append(
            block.register_forward_pre_hook(
                lambda m, args, kwargs, keep=keep: _keep(keep, STREAM, (*args, *kwargs.values())),
                with_kwargs=True,
            )
        )
        for name, norm in norms[index].items():
            hooks.append(
                norm.register_forward_hook(
                    lambda m, args, out, keep=keep, name=name: _keep(keep, name, (out,))
                )
            )

    def seen(left: Tensor, right: Tensor) -> None:
        owner = owners.get(right.untyped_storage().data_ptr())
        if owner is not None:
            for one, matrix_OI in slices(left, right):
                _note(traces[owner[0]], owner[1], owner[2], one, matrix_OI)

    generator = torch.Generator().manual_seed(0)
    vocab = model.config.get_text_config(decoder=True).vocab_size
    ids_BT = torch.randint(min(3, vocab - 1), vocab, (2, SEQ_LEN), generator=generator)
    try:
        with torch.no_grad(), Products(seen):
            model(input_ids=ids_BT, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return traces


def _keep(kept: dict[str, list[Tensor]], name: str, values: tuple[Any, ...]) -> None:
    """Keep the rows of the first tensor."""
    first = next(value for value in values if isinstance(value, Tensor))
    kept.setdefault(name, []).append(first.detach().reshape(-1, first.shape[-1]).clone())


def _note(trace: _Trace, name: str, param: Tensor, left: Tensor, matrix_OI: Tensor) -> None:
    """Note one product: the axes (of inputs, of outputs) of its parameter, and who gave its left.

    Of several that gave out the same rows a norm counts before the stream.
    """
    left_MI = left.detach().reshape(-1, left.shape[-1])
    if not len(left_MI):
        return
    last, before = param.dim() - 1, param.dim() - 2
    trace.axes[name] = (last, before) if matrix_OI.stride(-1) == 1 else (before, last)
    trace.outputs[name] = len(matrix_OI)
    givers = {
        giver for giver, all_ in trace.given.items() if any(_all_in(left_MI, x) for x in all_)
    }
    found = min(sorted(givers), key=lambda giver: giver == STREAM) if givers else None
    trace.reads.setdefault(name, set()).add(found)


def _all_in(left_MI: Tensor, given_NI: Tensor) -> bool:
    """Tell whether every row of one is a row of the other."""
    if left_MI.shape[1] != given_NI.shape[1]:
        return False
    return bool((left_MI[:, None] == given_NI[None]).all(dim=-1).any(dim=-1).all())


def _readers(
    block: nn.Module, norms: dict[str, nn.Module], trace: _Trace
) -> dict[str, tuple[int, str]]:
    """Return the matrices that read what norms give out, and check that the norms allow it."""
    found = {}
    for name, givers in trace.reads.items():
        if STREAM in givers:
            raise UnsupportedModel(
                f"the hidden size cannot be cut: {name!r} reads the residual stream without a "
                f"weighted norm before it, so no norm can make up for channels that go. {REMEDY}"
            )
        if len(givers) > 1:
            raise UnsupportedModel(
                f"the hidden size cannot be cut: {name!r} is multiplied with more than one "
                f"activation, so the norm before it cannot be folded into it. {REMEDY}"
            )
        (giver,) = givers
        if giver is not None:
            found[name] = (trace.axes[name][0], giver)
    for path in sorted(norms.keys() - {norm for _, norm in found.values()}):
        if "." not in path.removesuffix(".weight"):  # those inside attention see no stream
            raise UnsupportedModel(
                f"the hidden size cannot be cut: {path!r} ({type(norms[path]).__name__}) stands "
                "behind a sublayer, where its weight acts on what is added to the residual stream "
                f"and its mean is over channels that would go. {REMEDY}"
            )
    return found


def _offset(owner: nn.Module, name: str, width: int) -> float:
    """Return what a norm on the stream adds to its weight.

    Raises:
        UnsupportedModel: it is no RMS norm.
    """
    norm = owner.get_submodule(name.removesuffix(".weight"))
    offset = norm_offset(norm, width)
    if offset is None:
        raise UnsupportedModel(
            f"the hidden size cannot be cut: the norm {name!r} ({type(norm).__name__}) is no RMS "
            "norm. A LayerNorm takes away the mean over all channels, which changes when some go, "
            f"so the result would not compute what its weights were chosen for. {REMEDY}"
        )
    return offset


def _writers(
    block: nn.Module, trace: _Trace, readers: dict[str, tuple[int, str]], width: int
) -> dict[str, int]:
    """Return what writes the stream, with its axis: matrices that do not read it, and biases."""
    params = dict(block.named_parameters())
    found = {}
    for name, outputs in trace.outputs.items():
        if name in readers or outputs != width:
            continue
        found[name] = trace.axes[name][1]
        stem = name.removesuffix(".weight")
        for bias in (f"{stem}.bias", f"{stem}_bias"):
            if bias in params and params[bias].shape[-1] == width:
                found[bias] = params[bias].dim() - 1
    return found


def _trunk(model: Any, family: Family) -> tuple[str, str, str]:
    """Return the names of embeddings, last norm and head.

    Raises:
        UnsupportedModel: the trunk has other parameters too, or they lie otherwise.
    """
    names = {id(value): name for name, value in model.named_parameters(remove_duplicate=False)}
    modules = {id(module): name for name, module in model.named_modules()}
    exit_ = model.get_output_embeddings()
    embedding = f"{modules[id(model.get_input_embeddings())]}.weight"
    head = f"{modules[id(exit_)]}.weight"
    known = {embedding, head, f"{modules[id(exit_)]}.bias"}
    inside = family.blocks + "."
    rest = sorted(n for n in names.values() if not n.startswith(inside) and n not in known)
    norm = next((name for name in rest if name.endswith(".weight")), None)
    others = [name for name in rest if name != norm]
    if norm is None or model.get_parameter(norm).dim() != 1:
        raise UnsupportedModel(
            f"the hidden size cannot be cut: beside blocks, embeddings and head this model has "
            f"{', '.join(rest) or 'nothing'}, where a last RMS norm is expected. {REMEDY}"
        )
    if set(others) - {f"{norm.removesuffix('.weight')}.bias"}:
        raise UnsupportedModel(
            f"the hidden size cannot be cut: {others[0]!r} is beside blocks, embeddings, last norm "
            f"and head, and how it meets the residual stream is not known. {REMEDY}"
        )
    return embedding, norm, head
