"""How scores and activations of a block are spread, counted by powers of two for the report.

Legend: O outputs, I inputs, C columns judged together, E exponents. Counting reads a sample of rows
and changes nothing, so a result is the same with it and without.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from llmprune.arch.anatomy import split_index

if TYPE_CHECKING:
    from torch import Tensor

SAMPLE = 2**17  # numbers of a linear that are looked at, about
NUM_EXPONENTS = 256  # of float32: bin e holds what is from 2^(e - 127) on
BIAS = 127


@dataclass
class Spreads:
    """Counts by linear (kept and removed scores) and by tap (columns), names within the block."""

    scores: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    activations: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def judge(
        self,
        linear: str,
        score_OC: Tensor,
        keep_OC: Tensor,
        *,
        first: bool = True,
        parts: int = 1,
    ) -> None:
        """Count the scores of a linear, or of one of the parts that it comes in.

        `first` forgets what was.
        """
        step = max(1, -(-score_OC.numel() * parts // SAMPLE))
        sample, keep = score_OC[::step].cpu(), keep_OC[::step].cpu()
        removed_E, kept_E = exponents_of(sample, keep)
        found = {"removed": removed_E, "kept": kept_E}
        if not first and linear in self.scores:
            found = {part: each + self.scores[linear][part] for part, each in found.items()}
        self.scores[linear] = found

    def observe(self, tap: str, col_sq_I: Tensor, num_tokens: int) -> None:
        """Count the root mean square of every column of a tap."""
        if tap and num_tokens:
            rms_I = (col_sq_I.cpu().double() / num_tokens).sqrt().float()
            self.activations[tap] = {"all": exponents_of(rms_I)[0]}

    def take(self, other: Spreads) -> None:
        """Add counts of other linears and taps."""
        self.scores |= other.scores
        self.activations |= other.activations

    def to_dict(self) -> dict[str, Any]:
        """Return plain data by kind of linear and of tap: experts are one kind.

        `low` is the exponent of the first count, counts are numbers in one string (report.json has
        a line per item); nothing is left where nothing was counted.
        """
        found = {"scores": _by_kind(self.scores), "activations": _by_kind(self.activations)}
        return {name: kinds for name, kinds in found.items() if kinds}


def exponents_of(values: Tensor, chosen: Tensor | None = None) -> Tensor:
    """Return how many values have which exponent: (2, E) int64, the `chosen` in the second row.

    Zeros, negatives and what is not finite are in none.

    >>> exponents_of(torch.tensor([1.0, 1.5, 2.0, 0.0, -1.0]))[0].nonzero().flatten().tolist()
    [127, 128]
    """
    bits = values.flatten().float().view(torch.int32)
    places = (bits >> 23).clamp_(min=0)  # the sign bit makes a negative number of it
    if chosen is not None:
        places += chosen.flatten() * NUM_EXPONENTS
    counts_E = torch.bincount(places, minlength=2 * NUM_EXPONENTS).view(2, NUM_EXPONENTS)
    counts_E[:, 0] = counts_E[:, -1] = 0  # zeros and the like; infinities
    return counts_E


def _by_kind(counted: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
    summed: dict[str, dict[str, Tensor]] = {}
    for name, parts in counted.items():
        kind = summed.setdefault(split_index(name)[0], {})
        for part, counts_E in parts.items():
            kind[part] = counts_E + kind[part] if part in kind else counts_E
    found = {kind: _trimmed(parts) for kind, parts in summed.items()}
    return {kind: counts for kind, counts in found.items() if counts}


def _trimmed(parts: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the counts from the lowest exponent that any part has to the highest."""
    filled = torch.stack(list(parts.values())).sum(0).nonzero().flatten().tolist()
    if not filled:
        return {}
    low, high = filled[0], filled[-1] + 1
    counts = {
        part: " ".join(map(str, counts_E[low:high].tolist())) for part, counts_E in parts.items()
    }
    return {"low": low - BIAS, "counts": counts}
