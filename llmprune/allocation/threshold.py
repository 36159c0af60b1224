"""One ranking of all units of a model, from a histogram per linear.

A float32 that is not negative keeps its order when its bits are read as a whole number. So the
upper 16 bits are a bin; non-empty bins of a linear are a few thousand, however large it is. Where
the threshold falls into a bin of unequal scores, a second look at that bin alone, by its lower 16
bits, decides; bfloat16 has no lower bits. Counts are exact; of equal scores the first site's go
first.
Legend: N scores of a linear, B bins that hold any.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmprune.mask.pieces import PIECE

REMOVED = -1  # the bin of what an earlier pruning removed: below all scores
NUM_BINS = 2**16
_INFINITY = 0x7F800000  # the bits of the largest float32
BYTES_PER_BIN = 8
TYPICAL_BINS = 2500  # of a linear of some million normally distributed weights


class Histogram(NamedTuple):
    """Scores counted by their bits; `settled` says that all scores of a bin are equal."""

    bins_B: NDArray[np.int32]
    counts_B: NDArray[np.int32]
    settled: bool

    @property
    def total(self) -> int:
        """Return the number of scores."""
        return int(self.counts_B.sum(dtype=np.int64))

    def at(self, bin: int) -> int:
        """Return the number of scores in a bin."""
        return int(self.counts_B[self.bins_B == bin].sum())


class Lowest(NamedTuple):
    """How many of the lowest each site has, but for `missing` that lie in bin `edge`."""

    counts: dict[str, int]
    edge: int
    missing: int


Look = Callable[[int | None], Iterable[tuple[str, Histogram]]]
"""`look(within)`: every site's histogram, in order; of the upper bits, or of a bin's lower ones."""


def histogram(score_N: Tensor, *, num_removed: int = 0, within: int | None = None) -> Histogram:
    """Count scores by their upper 16 bits, or those of the bin `within` by their lower 16 bits.

    Args:
        score_N: float32, any shape, on any device.
        num_removed: how many units rank below all scores.
        within: the bin to look into.

    Raises:
        ValueError: a score is NaN or negative.

    >>> histogram(torch.tensor([1.0, 1.0, 2.0])).counts_B
    array([2, 1], dtype=int32)
    """
    counts_B = torch.zeros(NUM_BINS, dtype=torch.int64, device=score_N.device)
    settled = True
    for part_N in score_N.reshape(-1).split(PIECE):
        bits_N = part_N.contiguous().add(0.0).view(torch.int32)  # adding makes -0.0 a plain zero
        low, high = torch.aminmax(bits_N)
        if int(low) < 0 or int(high) > _INFINITY:
            raise ValueError("scores to be ranked hold NaN or are negative")
        upper_N = bits_N >> 16
        lower_N = bits_N.bitwise_and_(0xFFFF)
        if within is None:
            settled = settled and not bool(lower_N.any())
            counts_B += torch.bincount(upper_N, minlength=NUM_BINS)
        else:
            counts_B += torch.bincount(lower_N[upper_N == within], minlength=NUM_BINS)
    bins_B = counts_B.nonzero().flatten()
    found = Histogram(
        bins_B.cpu().numpy().astype(np.int32),
        counts_B[bins_B].cpu().numpy().astype(np.int32),
        settled,
    )
    if not num_removed or within is not None:
        return found
    return Histogram(
        np.r_[np.int32(REMOVED), found.bins_B],
        np.r_[np.int32(num_removed), found.counts_B],
        settled,
    )


def spare(histogram: Histogram, num: int) -> Histogram:
    """Leave out the `num` highest scores, or all but the removed ones if there are fewer.

    >>> spare(histogram(torch.tensor([1.0, 2.0, 2.0])), 1).counts_B
    array([1, 1], dtype=int32)
    """
    counts_B = histogram.counts_B.astype(np.int64)
    num = min(num, int(counts_B[histogram.bins_B != REMOVED].sum()))
    at_least_B = np.cumsum(counts_B[::-1])[::-1]
    left_B = np.clip(at_least_B - num, 0, counts_B).astype(np.int32)
    return histogram._replace(counts_B=left_B)


def lowest(histograms: Mapping[str, Histogram], num: int) -> Lowest:
    """Return how many of the `num` lowest scores each site has, as far as bins tell.

    Raises:
        ValueError: there are fewer scores.
    """
    total_B = np.zeros(NUM_BINS + 1, dtype=np.int64)
    for each in histograms.values():
        total_B[each.bins_B + 1] += each.counts_B
    reached_B = np.cumsum(total_B)
    if num > reached_B[-1]:
        raise ValueError(f"{num} of {reached_B[-1]} scores")
    place = int(np.searchsorted(reached_B, num))
    missing = num - int(reached_B[place] - total_B[place])
    whole = missing == total_B[place]
    edge = place - 1
    counts = {
        site: int(each.counts_B[each.bins_B < edge + whole].sum(dtype=np.int64))
        for site, each in histograms.items()
    }
    return Lowest(counts, edge, 0 if whole else missing)


def count_lowest(look: Look, num: int, spared: Mapping[str, int]) -> dict[str, int]:
    """Return how many of the `num` lowest scores of all sites each site has; they sum to `num`.

    The `spared[site]` highest scores of a site are not counted. Of equal scores the first site's
    are taken first.

    Raises:
        ValueError: fewer than `num` scores are not spared.

    Source: Gupta et al., Is Complexity Required for Neural Network Pruning? A Case Study on Global
    Magnitude Pruning (the minimum threshold, here as a share of each linear).

    >>> scores = {"a": torch.tensor([5.0, 4.0, 3.0]), "b": torch.tensor([0.1, 0.2, 0.3])}
    >>> look = lambda within: [(s, histogram(scores[s], within=within)) for s in scores]
    >>> count_lowest(look, 3, {"a": 1, "b": 1})
    {'a': 1, 'b': 2}
    """
    first = {site: spare(each, spared[site]) for site, each in look(None)}
    counts, edge, missing = lowest(first, num)
    at_edge = {site: each.at(edge) for site, each in first.items()}
    settled = all(first[site].settled for site, count in at_edge.items() if count)
    del first
    if missing and edge != REMOVED and not settled:
        finer = {site: spare(each, each.total - at_edge[site]) for site, each in look(edge)}
        more, edge, missing = lowest(finer, missing)
        counts = {site: count + more[site] for site, count in counts.items()}
        at_edge = {site: each.at(edge) for site, each in finer.items()}
    for site, count in at_edge.items():
        taken = min(count, missing)
        counts[site] += taken
        missing -= taken
    return counts
