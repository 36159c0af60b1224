"""What accumulators hold, as named tensors of a file, and accumulators made of them again.

A mean or a variance alone cannot be added to another: what is stored is the sum, not the result.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llmprune.stats.types import Stats

TOKENS = "num_tokens"


def stored(accumulator: Any) -> dict[str, Tensor]:
    """Return the sums of an accumulator by name, on the host, and its number of tokens.

    >>> from llmprune.stats.moments import ColumnSquares
    >>> seen = ColumnSquares()
    >>> seen.update(torch.tensor([[1.0, 2.0]]))
    >>> stored(seen)["sum_I"]
    tensor([1., 4.], dtype=torch.float64)
    """
    accumulator.result()  # of a Gram matrix this fills in what lies below the diagonal
    found = {
        name.removeprefix("_"): value.detach().cpu().clone()
        for name, value in vars(accumulator).items()
        if isinstance(value, Tensor)
    }
    return found | {TOKENS: torch.tensor(accumulator.num_tokens)}


def restore(accumulator: Any, sums: Mapping[str, Tensor]) -> Any:
    """Return a new accumulator with the sums that `stored` took of another of its kind."""
    for name, value in sums.items():
        if name == TOKENS:
            accumulator.num_tokens = int(value)
        else:
            setattr(accumulator, f"_{name}", value)
    return accumulator


def joined(accumulators: Mapping[str, Any]) -> Stats:
    """Return the statistics of one tap, of the accumulators by the name of their statistic."""
    results = [accumulator.result() for accumulator in accumulators.values()]
    values = {key: value for result in results for key, value in result.values.items()}
    return Stats(num_tokens=results[0].num_tokens if results else 0, values=values)
