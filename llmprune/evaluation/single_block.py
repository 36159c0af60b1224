"""One decoder block with random weights, called as its model calls it, with a cache or without.

The model is built on meta, of any family; the block's own arguments (masks, rotary tables, cache)
are those that a forward hands it. Weights are views of one pool of numbers, so that blocks of many
sizes together take the memory of the largest. Legend: B sequences, T tokens, D hidden size.
"""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from llmprune.arch.probe import find_family
from llmprune.arch.types import Family
from llmprune.base.errors import UnsupportedModel
from llmprune.calibration.replay import Arguments, patched, split_hidden
from llmprune.checkpoint.skeleton import fill, tie
from llmprune.evaluation.stopwatch import wait

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Phase = Literal["decode", "prefill"]
ALIGNED = 64  # elements between the starts of two weights in the pool, as an allocator aligns them


@dataclass(frozen=True, kw_only=True)
class Built:
    """A model on meta, and its blocks."""

    model: Any
    family: Family

    @property
    def blocks(self) -> Any:
        return self.model.get_submodule(self.family.blocks)


def build(config: Any, dtype: torch.dtype, trust_remote_code: bool) -> Built:
    """Build a model of a config on meta, as transformers would run it."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=trust_remote_code
        )
    tie(model)
    family = find_family(config, trust_remote_code=trust_remote_code)
    return Built(model=model.eval().requires_grad_(False), family=family)


class Pool:
    """Random numbers that the weights of all candidates are views of."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.modules: list[tuple[Any, dict[str, Any]]] = []

    def add(self, module: nn.Module, outside: nn.Module | None = None) -> None:
        """Take up the parameters of a (meta) module, less those of a module within it."""
        inner = {id(value) for value in outside.parameters()} if outside is not None else set()
        named = {name: value for name, value in module.named_parameters() if id(value) not in inner}
        self.modules.append((module, named))

    def fill(self) -> None:
        """Draw the numbers and put the views in place; each module begins at the first number."""
        import torch

        sizes = [sum(_room(v.numel()) for v in named.values()) for _, named in self.modules]
        draw = torch.Generator(device=self.device).manual_seed(0)
        numbers = torch.empty(max(sizes, default=0), dtype=self.dtype, device=self.device)
        numbers.normal_(0, 0.02, generator=draw)
        for module, named in self.modules:
            start = 0
            for name, value in named.items():
                view = numbers[start : start + value.numel()].view(value.shape)
                # norms near 0 would make what follows too small for ordinary arithmetic
                fill(module, {name: view if value.dim() > 1 else torch.ones_like(view)})
                start += _room(value.numel())
            _move_buffers(module, self.device)


def _room(count: int) -> int:
    """Return the elements that a weight takes in the pool."""
    return -(-count // ALIGNED) * ALIGNED


def _move_buffers(module: nn.Module, device: torch.device) -> None:
    for part in module.modules():
        for name, value in part._buffers.items():
            if value is not None and not value.is_meta:
                part._buffers[name] = value.to(device)


def block_call(
    built: Built, index: int, device: torch.device, batch: int, prompt: int, phase: Phase
) -> Callable[[], float]:
    """Return what runs the block once and tells its seconds; it has run once, so its sizes fit."""
    import torch

    _fill_small(built, device)
    block = built.blocks[index]
    shape, given, cache = _given(built, index, device, batch, prompt, None)
    draw = torch.Generator(device=device).manual_seed(1)
    dtype = next(block.parameters()).dtype
    hidden = torch.randn(shape, generator=draw, device=device).to(dtype)
    call = partial(_timed, block, hidden, given, cache)
    call()
    if phase == "prefill":
        return call
    with torch.inference_mode():
        block(hidden, *given.args, **given.kwargs)
    for other in range(len(cache.layers)):
        if other != index:  # only their length is read, of some
            token = hidden.new_zeros(batch, 1, prompt, 1)
            cache.update(token, token, other)
    shape, given, cache = _given(built, index, device, batch, 1, cache)
    call = partial(_timed, block, hidden[:, -1:].contiguous(), given, cache)
    call()
    return call


def _fill_small(built: Built, device: torch.device) -> None:
    """Give what lies before the blocks (position tables, norms) zeros, but no token embeddings."""
    import torch

    inside = {id(value) for value in built.blocks.parameters()}
    large = {id(built.model.get_input_embeddings().weight)}
    if (exit_ := built.model.get_output_embeddings()) is not None:
        large.add(id(exit_.weight))
    for name, value in list(built.model.named_parameters()):
        if value.is_meta and id(value) not in inside | large:
            fill(built.model, {name: torch.zeros_like(value, device=device)})
    _move_buffers(built.model, device)


class _Reached(Exception):
    """Leaves a forward where the block to be timed would run."""


def _given(
    built: Built, index: int, device: torch.device, batch: int, tokens: int, cache: Any
) -> tuple[tuple[int, ...], Arguments, Any]:
    """Return the shape of a block's hidden states, its arguments, and the cache among them."""
    import torch

    model, seen = built.model, []
    embedding = model.get_input_embeddings()
    width = embedding.weight.shape[-1]

    def blank(place: int, ids_BT: Tensor) -> Tensor:
        return torch.zeros(*ids_BT.shape, width, dtype=embedding.weight.dtype, device=device)

    def record(place: int, *args: Any, **kwargs: Any) -> Any:
        if place < index:
            return _passed(built, args, kwargs)
        hidden, args, kwargs = split_hidden(args, kwargs)
        seen.append((tuple(hidden.shape), Arguments(args=args, kwargs=kwargs)))
        raise _Reached

    ids_BT = torch.ones(batch, tokens, dtype=torch.long, device=device)
    before = {} if cache is None else {"past_key_values": cache}
    with (
        torch.inference_mode(),
        patched(built.blocks, record),
        patched([embedding], blank),
        suppress(_Reached),
    ):
        model(input_ids=ids_BT, use_cache=True, **before)
    shape, given = seen[0]
    values = (*given.args, *given.kwargs.values())
    found = next((value for value in values if hasattr(value, "get_seq_length")), None)
    if found is None:
        raise UnsupportedModel(
            f"latency: {type(model).__name__} hands its blocks no key-value cache, and what they "
            "take cannot be measured one at a time. Give a budget of parameters instead."
        )
    return shape, given, found


def _passed(built: Built, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the hidden states that a block was given, in the form that it returns them."""
    hidden, _, _ = split_hidden(args, kwargs)
    returns = built.family.returns
    return (hidden, *[None] * (returns - 1)) if returns else hidden


def _timed(block: nn.Module, hidden_BTD: Tensor, given: Arguments, cache: Any) -> float:
    """Return the seconds of one call, with the cache as it was: a block adds its tokens to it."""
    import torch

    with torch.inference_mode():
        own = copy.deepcopy(cache)
        args = [own if value is cache else value for value in given.args]
        kwargs = {name: own if v is cache else v for name, v in given.kwargs.items()}
        wait(hidden_BTD.device)
        start = time.perf_counter()
        block(hidden_BTD, *args, **kwargs)
        wait(hidden_BTD.device)
        return time.perf_counter() - start


def trunk_call(built: Built, device: torch.device, batch: int, tokens: int) -> Callable[[], float]:
    """Return what runs all but the blocks once and tells its seconds."""
    import torch

    model = built.model
    vocab = model.config.get_text_config(decoder=True).vocab_size
    draw = torch.Generator().manual_seed(1)
    ids_BT = torch.randint(0, vocab, (batch, tokens), generator=draw).to(device)
    parameters = inspect.signature(model.forward).parameters
    wants = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}

    def skip(place: int, *args: Any, **kwargs: Any) -> Any:
        return _passed(built, args, kwargs)

    def call() -> float:
        with torch.inference_mode(), patched(built.blocks, skip):
            wait(device)
            start = time.perf_counter()
            model(input_ids=ids_BT, use_cache=False, **wants)
            wait(device)
            return time.perf_counter() - start

    return call
