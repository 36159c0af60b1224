"""Token batches through the blocks: embed, advance block by block, and the head at the end.

Legend: B sequences of a micro-batch, T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from llmprune.base.errors import NumericalError
from llmprune.base.memory import keeping_pieces
from llmprune.calibration.hidden import HiddenStates, Place
from llmprune.calibration.replay import Arguments, call, capture, head, shared
from llmprune.walk.block import Block, Blocks
from llmprune.walk.sharing import ALONE, Others

if TYPE_CHECKING:
    from torch import Tensor


LOGITS = 16_000_000


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Hidden states of all micro-batches and, per micro-batch, the arguments of every block.

    Micro-batches that are given the same arguments share them. Where there are other processes,
    these micro-batches are the first process's share, and `others` hold the rest.
    """

    hidden: HiddenStates
    arguments: tuple[list[Arguments], ...]
    others: Others = ALONE

    def __len__(self) -> int:
        return len(self.arguments)


def embed(
    blocks: Blocks,
    tokens_NT: Tensor,
    micro_batch: int,
    *,
    place: Place = "host",
    folder: Path | None = None,
    others: Others = ALONE,
) -> Stream:
    """Embed tokens in micro-batches and record what every block is given.

    With `others` every process has its share of the micro-batches.
    """
    import torch

    batches = tokens_NT.split(micro_batch)
    with others.asked(
        "embed",
        tokens_NT=tokens_NT,
        micro_batch=micro_batch,
        place=place,
        folder=folder,
        threads=torch.get_num_threads(),
    ):
        mine = embed_batches(
            blocks, batches[others.world.share(len(batches))], place=place, folder=folder
        )
    return replace(mine, others=others)


def embed_batches(
    blocks: Blocks, batches: Sequence[Tensor], *, place: Place, folder: Path | None
) -> Stream:
    """Embed micro-batches ids_BT and record what every block is given."""
    import torch

    hidden = HiddenStates(place, folder)
    kept: list[list[Arguments]] = []
    with torch.no_grad(), blocks.trunk(head=False) as model:
        for ids_BT in batches:
            ids_BT = ids_BT.to(blocks.device)
            first, arguments = capture(model, blocks.modules, ids_BT, returns=blocks.family.returns)
            hidden.append(first)
            kept.append(shared(arguments, kept))
    return Stream(hidden=hidden, arguments=tuple(kept))


def advance(
    block: Block,
    stream: Stream,
    *,
    known: Mapping[int, Tensor] | None = None,
    stored: bool = False,
) -> None:
    """Replace every micro-batch by the block's output; `known` outputs are not computed again.

    Other processes are sent the block's values; `stored` tells them that it is the result's, whose
    modules may be smaller.

    Raises:
        NumericalError: the output is not finite.
    """
    import torch

    with (
        torch.no_grad(),
        keeping_pieces(),
        stream.others.asked("advance", index=block.index, stored=stored, values=block.values()),
    ):
        for batch, arguments in enumerate(stream.arguments):
            output = (known or {}).get(batch)
            if output is None:
                hidden = stream.hidden.get(batch, block.device)
                output = call(block.module, hidden, arguments[block.index])
                check_activation(output, f"output of block {block.index}")
            stream.hidden.set(batch, output)


def check_activation(value: Tensor, what: str) -> None:
    """Check an activation for NaN and infinity.

    Raises:
        NumericalError: with what it is an activation of.
    """
    import torch

    low, high = torch.aminmax(value)
    if not (torch.isfinite(low) and torch.isfinite(high)):
        raise NumericalError(
            f"the {what} holds NaN or infinity. In float16 large activations overflow: use "
            "--dtype bfloat16 or float32; otherwise the checkpoint is damaged."
        )


def logits(
    blocks: Blocks, stream: Stream, *, chunk: int | None = None
) -> Iterator[tuple[int, int, Tensor]]:
    """Yield (micro-batch, first position, logits_BtV) of hidden states that have passed all blocks.

    A chunk of positions holds at most `LOGITS` values, so a large vocabulary costs no memory. While
    the caller works on them its gradients are as it has them: a generator may be left unfinished,
    and be closed in another thread.
    """
    import torch

    vocab = blocks.model.config.get_text_config().vocab_size

    with blocks.trunk(head=True) as model:
        for batch in range(len(stream)):
            hidden = stream.hidden.get(batch, blocks.device)
            length = hidden.shape[-2]
            size = chunk or max(1, LOGITS // (vocab * hidden.shape[-3]))
            for start in range(0, length, size):
                part = hidden[..., start : start + size, :]
                with torch.no_grad():
                    found = head(model, blocks.modules, part, returns=blocks.family.returns)
                yield batch, start, found


def walk(blocks: Blocks, stream: Stream) -> None:
    """Send hidden states through all blocks, one block on the device at a time."""
    for index in range(len(blocks)):
        with blocks.open(index) as block:
            advance(block, stream)
