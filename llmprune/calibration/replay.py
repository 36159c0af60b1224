"""What every block is given: one forward with the blocks patched to identity, recorded per block.

Blocks of one model may get different arguments (a sliding and a full attention mask, two rotary
tables), so each block's own are kept. Legend: B sequences, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from llmprune.base.errors import UnsupportedModel

if TYPE_CHECKING:
    from torch import Tensor, nn

Replace = Callable[[int, "Tensor"], "Tensor"]


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
    model: Any, blocks: Sequence[nn.Module], ids_BT: Tensor
) -> tuple[Tensor, list[Arguments]]:
    """Embed token ids; return the hidden_BTD of block 0 and the arguments of every block.

    Needs the embeddings only: blocks, final norm and head may be on meta.
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
        return hidden

    with patched(blocks, record), suppress(_Done):
        model(input_ids=ids_BT, use_cache=False)
    if len(seen) != len(blocks):
        raise UnsupportedModel(
            f"{type(model).__name__} called {len(seen)} of its {len(blocks)} blocks in one "
            "forward; blocks that are skipped or shared cannot be pruned one at a time."
        )
    return first[0], seen


def head(model: Any, blocks: Sequence[nn.Module], hidden_BTD: Tensor) -> Tensor:
    """Return the logits of hidden states after all blocks, by the model's own last steps.

    Needs what follows the blocks (and position tables), not the token embeddings.
    """

    def skip(index: int, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_BTD

    with patched(blocks, skip):
        logits: Tensor = model(inputs_embeds=hidden_BTD, use_cache=False).logits
    return logits


def call(block: nn.Module, hidden_BTD: Tensor, arguments: Arguments) -> Tensor:
    """Run one block on hidden states with its own arguments."""
    output = block(hidden_BTD, *arguments.args, **arguments.kwargs)
    result: Tensor = output[0] if isinstance(output, tuple) else output
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
    """Tell whether two arguments are equal: tensors by value, containers item by item."""
    import torch

    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        return left.shape == right.shape and left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, Arguments) and isinstance(right, Arguments):
        return same(left.args, right.args) and same(left.kwargs, right.kwargs)
    if isinstance(left, (tuple, list)) and isinstance(right, (tuple, list)):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    return left is right or bool(left == right)


def check_replay(model: Any, blocks: Sequence[nn.Module], seq_len: int) -> None:
    """Check on a miniature model that blocks replayed with recorded arguments equal a forward.

    Arguments are recorded anew for every batch, so what differs between batches needs no guess.
    What
    a block computes for another one is not seen by blocks patched to identity, and shows here.

    Raises:
        UnsupportedModel: they differ; names the argument that a block computes for another block.
    """
    import torch

    generator = torch.Generator().manual_seed(1)
    vocab = model.config.get_text_config().vocab_size
    batch = torch.randint(0, vocab, (2, seq_len), generator=generator)
    with torch.no_grad():
        expected = model(input_ids=batch, use_cache=False).logits
        real = _arguments_of(model, blocks, batch)
        hidden, arguments = capture(model, blocks, batch)
        for block, own in zip(blocks, arguments, strict=True):
            hidden = call(block, hidden, own)
        logits = head(model, blocks, hidden)
    if torch.allclose(logits, expected, rtol=0, atol=1e-5 * float(expected.abs().max())):
        return
    differing = sorted(
        {
            name
            for own, other in zip(arguments, real, strict=True)
            for name in own.kwargs.keys() | other.kwargs.keys()
            if not same(own.kwargs.get(name), other.kwargs.get(name))
        }
    )
    raise UnsupportedModel(
        f"{type(model).__name__} cannot be walked block by block: "
        f"{', '.join(differing) or 'the output'} differs from a normal forward, because one block "
        "computes it for another. This family needs a walk of its own."
    )


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
