"""What every block is given: one forward with the blocks patched to identity, recorded per block.

Blocks of one model may get different arguments (a sliding and a full attention mask, two rotary
tables), so each block's own are kept. Legend: B sequences, T tokens, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from llmprune.base.errors import UnsupportedModel, first_line

if TYPE_CHECKING:
    from torch import Tensor, nn


PLAIN_TOKEN = 3  # no padding, which some models count positions by


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What a block is called with beside its hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Done(Exception):
    """Leaves a forward once the last block has been reached."""


@contextmanager
def patched(blocks: Sequence[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    """Replace each block's forward by `forward(index, *args, **kwargs)`; put the own ones back."""
    before = [block.__dict__.get("forward") for block in blocks]
    for index, block in enumerate(blocks):
        block.forward = partial(forward, index)
    try:
        yield
    finally:
        for block, own in zip(blocks, before, strict=True):
            if own is None:
                del block.forward
            else:
                block.forward = own  # accelerate keeps its hooks here


def capture(
    model: Any, blocks: Sequence[nn.Module], ids_BT: Tensor, *, returns: int = 0
) -> tuple[Tensor, list[Arguments]]:
    """Embed token ids; return the hidden_BTD of block 0 and the arguments of every block.

    Needs the embeddings only: blocks, final norm and head may be on meta. `returns` is the
    family's.
    """
    seen: list[Arguments] = []
    first: list[Tensor] = []

    def record(index: int, *args: Any, **kwargs: Any) -> Any:
        hidden, args, kwargs = split_hidden(args, kwargs)
        if index == 0:
            first.append(hidden)
        seen.append(Arguments(args=args, kwargs=kwargs))
        if index == len(blocks) - 1:
            raise _Done
        return _as(returns, hidden)

    with patched(blocks, record), suppress(_Done):
        model(input_ids=ids_BT, use_cache=False)
    if len(seen) != len(blocks):
        raise UnsupportedModel(
            f"{type(model).__name__} called {len(seen)} of its {len(blocks)} blocks in one "
            "forward; blocks that are skipped or shared cannot be pruned one at a time."
        )
    return first[0], seen


def head(
    model: Any, blocks: Sequence[nn.Module], hidden_BTD: Tensor, *, returns: int = 0
) -> Tensor:
    """Return the logits of hidden states after all blocks, by the model's own last steps.

    Needs what follows the blocks (and position tables), not the token embeddings: token ids that
    mean nothing are embedded as zeros, which blocks patched to return the hidden states ignore.
    """
    import torch

    def skip(index: int, *args: Any, **kwargs: Any) -> Any:
        return _as(returns, hidden_BTD)

    embedding = model.get_input_embeddings()
    width = embedding.weight.shape[-1]

    def blank(index: int, ids_BT: Tensor) -> Tensor:
        return hidden_BTD.new_zeros((*ids_BT.shape, width))

    ids_BT = torch.full(hidden_BTD.shape[-3:-1], PLAIN_TOKEN, device=hidden_BTD.device)
    with patched(blocks, skip), patched([embedding], blank):
        logits: Tensor = model(input_ids=ids_BT, use_cache=False).logits
    return logits


def _as(returns: int, hidden_BTD: Tensor) -> Any:
    """Return hidden states in the form that a block returns them."""
    return (hidden_BTD, *[None] * (returns - 1)) if returns else hidden_BTD


def call(block: nn.Module, hidden_BTD: Tensor, arguments: Arguments) -> Tensor:
    """Run one block on hidden states with its own arguments."""
    output = block(hidden_BTD, *arguments.args, **arguments.kwargs)
    result: Tensor = output[0] if isinstance(output, tuple | list) else output
    return result


def split_hidden(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Separate the hidden states from a block's other arguments."""
    if args:
        return args[0], args[1:], kwargs
    rest = dict(kwargs)
    return rest.pop("hidden_states"), (), rest


def same(left: Any, right: Any) -> bool:
    """Tell whether two arguments are equal: tensors by value, containers item by item.

    Two empty mappings are not: blocks may leave in one what other blocks of the same batch read.
    """
    import torch

    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        return left.shape == right.shape and left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, Arguments) and isinstance(right, Arguments):
        return same(left.args, right.args) and same(
            sorted(left.kwargs.items()), sorted(right.kwargs.items())
        )
    if isinstance(left, (tuple, list)) and isinstance(right, (tuple, list)):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, dict) and isinstance(right, dict):
        if left is right or not left or left.keys() != right.keys():
            return left is right
        return all(same(left[key], right[key]) for key in left)
    return left is right or bool(left == right)


def check_replay(
    model: Any, blocks: Sequence[nn.Module], seq_len: int, *, returns: int = 0
) -> None:
    """Check on a miniature model that blocks replayed with recorded arguments equal a forward.

    Arguments are recorded anew for every batch, so what differs between batches needs no guess.
    What a block computes for another one is not seen by blocks patched to identity, and shows here.

    Raises:
        UnsupportedModel: they differ; names the argument that a block computes for another block.
    """
    import torch

    generator = torch.Generator().manual_seed(1)
    vocab = model.config.get_text_config(decoder=True).vocab_size
    batches = torch.randint(0, vocab, (2, 2, seq_len), generator=generator)
    with torch.no_grad():
        expected = [model(input_ids=batch, use_cache=False).logits for batch in batches]
        real = _arguments_of(model, blocks, batches[0])
        try:
            logits, arguments = _replay(model, blocks, batches, returns)
        except UnsupportedModel:
            raise
        except Exception as error:  # any line of any model may want what only a forward has
            first = first_line(error)
            raise UnsupportedModel(
                f"{type(model).__name__} cannot be walked block by block: with the blocks run one "
                f"at a time it fails ({type(error).__name__}: {first}). This family needs a walk "
                "of its own."
            ) from error
    if all(_close(ours, theirs) for ours, theirs in zip(logits, expected, strict=True)):
        return
    differing = sorted(
        {
            name
            for own, other in zip(arguments[0], real, strict=True)
            for name in own.kwargs.keys() | other.kwargs.keys()
            if not same(own.kwargs.get(name), other.kwargs.get(name))
        }
    )
    raise UnsupportedModel(
        f"{type(model).__name__} cannot be walked block by block: "
        f"{', '.join(differing) or 'the output'} differs from a normal forward, because one block "
        "computes it for another. This family needs a walk of its own."
    )


def _replay(
    model: Any, blocks: Sequence[nn.Module], batches: Tensor, returns: int
) -> tuple[list[Tensor], list[list[Arguments]]]:
    """Return the logits of batches that go through the blocks together, and the arguments used."""
    hidden: list[Tensor] = []
    kept: list[list[Arguments]] = []
    for ids_BT in batches:
        first, arguments = capture(model, blocks, ids_BT, returns=returns)
        hidden.append(first)
        kept.append(shared(arguments, kept))
    for index, block in enumerate(blocks):
        for batch, arguments in enumerate(kept):
            hidden[batch] = call(block, hidden[batch], arguments[index])
    return [head(model, blocks, value, returns=returns) for value in hidden], kept


def shared(arguments: list[Arguments], kept: Sequence[list[Arguments]]) -> list[Arguments]:
    """Return the first micro-batch's arguments where these equal them, else the arguments."""
    return next((old for old in kept[:1] if same(old, arguments)), arguments)


def _close(ours: Tensor, theirs: Tensor) -> bool:
    """Tell whether logits agree to rounding."""
    import torch

    within = 1e-5 * float(theirs.abs().max())
    if ours.shape != theirs.shape or not math.isfinite(within):
        return False
    return torch.allclose(ours, theirs, rtol=0, atol=within)


def _arguments_of(model: Any, blocks: Sequence[nn.Module], ids_BT: Tensor) -> list[Arguments]:
    """Return what every block is given in a normal forward."""
    seen: list[Arguments] = []

    def record(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        _, rest, named = split_hidden(args, kwargs)
        seen.append(Arguments(args=rest, kwargs=named))

    hooks = [block.register_forward_pre_hook(record, with_kwargs=True) for block in blocks]
    try:
        model(input_ids=ids_BT, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return seen
