"""Which tokens stay: those that a text uses most, and all that these are merged from.

V ids, N windows, T tokens in each.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmprune.base.errors import RecipeError, UnsupportedModel
from llmprune.calibration.windows import token_ids
from llmprune.vocabulary.closure import merge_parents
from llmprune.vocabulary.contents import all_tokens
from llmprune.vocabulary.required import pinned_ids

if TYPE_CHECKING:
    from torch import Tensor


def count_tokens(windows_NT: Tensor, *, num_ids: int) -> Tensor:
    """Return how often each id occurs, counts_V int64.

    >>> import torch
    >>> count_tokens(torch.tensor([[0, 2], [2, 2]]), num_ids=4).tolist()
    [1, 0, 3, 0]
    """
    import torch

    return torch.bincount(windows_NT.flatten().cpu(), minlength=num_ids)


def count_texts(texts: Iterable[str], tokenizer: Any, *, num_ids: int) -> Tensor:
    """Return how often each id occurs in texts, counts_V int64; special tokens are not added."""
    import torch

    counts_V = torch.zeros(num_ids, dtype=torch.int64)
    for text in texts:
        ids = torch.tensor(token_ids(text, tokenizer), dtype=torch.int64)
        counts_V += torch.bincount(ids, minlength=num_ids)
    return counts_V


def choose_tokens(
    tokenizer_json: Mapping[str, Any],
    counts_V: Tensor,
    *,
    num_kept: int | None = None,
    share: float | None = None,
    multiple: int = 64,
    required: Iterable[int] = (),
) -> list[int]:
    """Return the ids to keep, sorted, in the numbering that they have.

    The rarest token that no kept token is merged from goes first, the higher id of equals, until
    the size is reached. A BPE spells what is gone with the two tokens that it was merged from, so
    these take its count over. Rows without a token go before any token. What `pinned_ids` names
    stays, and so does `required`, the ids of the configs (`required_ids`).

    Args:
        counts_V: how often each id occurs; V is the number of rows of the embeddings.
        num_kept: the ids to keep, or else
        share: the share of the V ids to keep. Either is rounded down to a `multiple`, as products
            on accelerators want it; all V stay where no fewer are asked for.

    Raises:
        RecipeError: the size lies below what must stay.
        UnsupportedModel: a token or required id has no row.
    """
    num_ids = len(counts_V)
    size = _size(num_ids, num_kept, share, multiple)
    tokens = set(all_tokens(tokenizer_json).values())
    pinned = pinned_ids(tokenizer_json) | set(required)
    if beyond := sorted(index for index in tokens | pinned if not 0 <= index < num_ids):
        raise UnsupportedModel(
            f"token {beyond[0]} has no row: the embeddings have {num_ids}. Tokenizer or configs "
            "belong to another model, or tokens were added without resizing the embeddings."
        )
    parents = merge_parents(tokenizer_json)
    kept = _without_rarest(counts_V.tolist(), size, tokens, pinned, parents)
    if len(kept) > size:
        raise RecipeError(
            f"vocabulary: {size} of {num_ids} ids are too few. Bytes, single characters, special "
            f"tokens, those that configs and chat templates name, and all that these are merged "
            f"from are {len(kept)}. Keep at least {-(-len(kept) // multiple) * multiple}."
        )
    return kept


def _size(num_ids: int, num_kept: int | None, share: float | None, multiple: int) -> int:
    """Return how many ids to keep."""
    if (num_kept is None) == (share is None):
        raise RecipeError("vocabulary: give the number of tokens to keep, or their share; one.")
    asked = num_kept if share is None else round(share * num_ids)
    assert asked is not None
    if not 0 < asked <= num_ids:
        raise RecipeError(
            f"vocabulary: {asked} tokens cannot be kept of {num_ids}. Give a number between 1 and "
            f"{num_ids}, or a share between 0 and 1."
        )
    return num_ids if asked == num_ids else asked // multiple * multiple


def _without_rarest(
    counts: Sequence[int],
    size: int,
    tokens: set[int],
    pinned: set[int],
    parents: Mapping[int, tuple[int, int]],
) -> list[int]:
    """Drop ids one by one until `size` are left, or none may go."""
    worth = list(counts)
    last = max(tokens, default=-1)
    needed = Counter(part for pair in parents.values() for part in pair)

    def rank(index: int) -> tuple[int, int, int]:
        row = 2 if index in tokens else int(index > last)  # a hole, padding behind, a token
        return row, worth[index], -index

    kept = set(range(len(counts)))
    free = [rank(index) for index in kept - pinned if not needed[index]]
    heapq.heapify(free)
    while len(kept) > size and free:
        index = -heapq.heappop(free)[2]
        kept.remove(index)
        for part in parents.get(index, ()):
            worth[part] += worth[index]
            needed[part] -= 1
        for part in set(parents.get(index, ())):
            if not needed[part] and part not in pinned:
                heapq.heappush(free, rank(part))
    return sorted(kept)
