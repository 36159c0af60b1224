"""Which shapes of mask are legal, and how each is chosen from scores.

True means kept; N:M keeps N of every M consecutive inputs. Legend: O outputs, I inputs, U units, P
and Q the tiles of a column and of a row of tiles.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, assert_never

import torch
from torch import Tensor

from llmprune.arch.couplings import (
    ATTENTION,
    BLOCK,
    DEPTHS,
    EXPERT_CHANNELS,
    EXPERTS,
    FFN,
    HEADS,
    QUERY_HEADS,
    WIDTHS,
)
from llmprune.base.errors import RecipeError
from llmprune.base.registry import unknown
from llmprune.mask.counts import spread
from llmprune.mask.mass import keep_equal_mass
from llmprune.mask.rank import keep_highest, keep_highest_flat, keep_n_of_m

GroupName = Literal["row", "matrix", "mass"]
PoolName = Literal["l2", "mean"]


@dataclass(frozen=True)
class Unstructured:
    """Single weights, anywhere."""

    @property
    def sparsity(self) -> None:
        """The sparsity that the pattern fixes: none."""
        return None


@dataclass(frozen=True)
class NofM:
    """Of every M consecutive inputs of a row N stay, which sparse kernels know as 2:4."""

    n: int
    m: int

    @property
    def sparsity(self) -> Fraction:
        """The sparsity that the pattern fixes."""
        return Fraction(self.m - self.n, self.m)


@dataclass(frozen=True)
class Tiles:
    """Whole tiles of H outputs by W inputs go, which block-sparse kernels skip."""

    height: int
    width: int

    @property
    def sparsity(self) -> None:
        """The sparsity that the pattern fixes: none."""
        return None

    @property
    def size(self) -> int:
        """The number of weights of a tile."""
        return self.height * self.width


@dataclass(frozen=True)
class Units:
    """Whole units go, of these kinds: rows and columns of several linears, halves, blocks."""

    kinds: tuple[str, ...]

    @property
    def sparsity(self) -> None:
        """The sparsity that the pattern fixes: none."""
        return None

    @property
    def deep(self) -> bool:
        """Tell whether whole halves or blocks may go."""
        return any(kind in DEPTHS for kind in self.kinds)

    @property
    def whole(self) -> bool:
        """Tell whether units run through all blocks, as hidden channels and token ids do."""
        return self.kinds[0] in WHOLE


@dataclass(frozen=True)
class LowRank:
    """Single linears become two with few values between them: no mask, and no weight is zero."""

    @property
    def sparsity(self) -> None:
        """The sparsity that the pattern fixes: none."""
        return None


Pattern = Unstructured | NofM | Tiles | Units | LowRank
LOW_RANK = "low-rank"

WHOLE = ("hidden", "vocabulary")
_PLURAL: dict[str, tuple[str, ...]] = {"sublayers": (ATTENTION, FFN), "blocks": (BLOCK,)}
_UNITS: dict[str, tuple[str, ...]] = (
    {kind: (kind,) for kind in (*WIDTHS, ATTENTION, FFN)}
    | _PLURAL
    | {kind: (kind,) for kind in WHOLE}
)


def parse_pattern(text: str) -> Pattern:
    """Return the pattern that a text names: "unstructured", "N:M", "HxW", "low-rank", or kinds of
    unit joined by a plus, such as "ffn-channels+heads".

    Raises:
        UnknownName: no pattern has this name.
        RecipeError: N:M that keeps nothing, or everything; tiles of fewer than two weights; kinds
            of unit that do not go together.

    >>> parse_pattern("2:4").sparsity
    Fraction(1, 2)
    >>> parse_pattern("16x32")
    Tiles(height=16, width=32)
    """
    if sides := re.fullmatch(r"([0-9]+)x([0-9]+)", text):
        tile = Tiles(height=int(sides[1]), width=int(sides[2]))
        if tile.size < 2:
            raise RecipeError(
                f"pattern: {text!r} is a tile of {tile.size} weights. HxW removes whole tiles of H "
                "outputs by W inputs, such as 16x16; for single weights type unstructured."
            )
        return tile
    ratio = re.fullmatch(r"([0-9]+):([0-9]+)", text)
    if ratio is None:
        alone: dict[str, Pattern] = {"unstructured": Unstructured(), LOW_RANK: LowRank()}
        return alone.get(text) or _units(text)
    n, m = int(ratio[1]), int(ratio[2])
    if not 0 < n < m:
        meant = f"{m}:{n}" if 0 < m < n else f"{m // 2}:{m}" if m > 1 else "2:4"
        raise RecipeError(
            f"pattern: {text!r} would keep {n} of every {m} weights. N:M keeps N of every M "
            f"consecutive weights; did you mean {meant}?"
        )
    return NofM(n=n, m=m)


def _units(text: str) -> Units:
    """Return the pattern of kinds of unit joined by a plus."""
    names = text.split("+")
    for name in names:
        if name not in _UNITS:
            known = ["unstructured", *_UNITS, LOW_RANK, "2:4", "4:8", "N:M", "16x16", "HxW"]
            raise unknown("pattern", name, known)
    kinds = tuple(dict.fromkeys(kind for name in names for kind in _UNITS[name]))
    for one, other in ((HEADS, QUERY_HEADS), (EXPERTS, EXPERT_CHANNELS), *_with_whole(kinds)):
        if one in kinds and other in kinds:
            raise RecipeError(
                f"pattern: {text!r} asks for {one} and {other} at once, which lie across each "
                f"other. Prune one kind, then the result by the other."
            )
    return Units(kinds=kinds)


def _with_whole(kinds: Iterable[str]) -> list[tuple[str, str]]:
    """Return the pairs of a kind that runs through all blocks with every other kind."""
    return [(one, other) for one in WHOLE for other in kinds if other != one]


def choose_keep(
    pattern: Unstructured | NofM | Tiles,
    score_OI: Tensor,
    num_pruned: int,
    group: GroupName,
    how: PoolName = "mean",
) -> Tensor:
    """Return keep_OI (bool) without the `num_pruned` units of lowest score of each group.

    A unit is a weight, or a tile with its pooled score. Units compete within their row (each row
    losing the same number to within one), within the whole matrix, or such that every row loses the
    same share of its score's sum ("mass"; tiles then compete within their row of tiles). The groups
    of N:M are its own. A score of -inf marks what was removed before: it goes first, and counts
    nothing in a tile that has other weights.

    Raises:
        ValueError: a score is NaN, or the pattern cannot prune this number.

    >>> choose_keep(Unstructured(), torch.tensor([[1.0, 2.0], [3.0, 4.0]]), 2, "matrix")
    tensor([[False, False],
            [ True,  True]])
    """
    match pattern:
        case NofM(n=n, m=m):
            if num_pruned * m != score_OI.numel() * (m - n):
                raise ValueError(f"{n}:{m} cannot prune {num_pruned} of {score_OI.numel()} weights")
            return keep_n_of_m(score_OI, n, m)
        case Tiles():
            score_PQ = pool_tiles(score_OI, pattern, how)
            within: GroupName = "row" if group == "mass" else group
            return fill_tiles(_keep_units(score_PQ, num_pruned, within), pattern)
        case Unstructured():
            return _keep_units(score_OI, num_pruned, group)
        case _:
            assert_never(pattern)


def _keep_units(score_OI: Tensor, num_pruned: int, group: GroupName) -> Tensor:
    """Return the mask of single units in a group."""
    match group:
        case "row":
            return keep_highest(score_OI, spread(num_pruned, len(score_OI)))
        case "mass":
            return keep_equal_mass(score_OI, num_pruned)
        case "matrix":
            return keep_highest_flat(score_OI.reshape(-1), num_pruned).view(score_OI.shape)
        case _:
            assert_never(group)


def pool(score_OI: Tensor, how: PoolName) -> Tensor:
    """Return unit_score_U (U,) from the scores of the linear that reads the units as columns.

    "l2" is the norm of each column, "mean" its mean; U = I.

    Source: An et al., FLAP, the magnitude and Wanda baselines for structures.

    >>> pool(torch.tensor([[3.0, 0.0], [4.0, 1.0]]), "l2")
    tensor([5., 1.])
    """
    return torch.linalg.vector_norm(score_OI, dim=0) if how == "l2" else score_OI.mean(dim=0)


def pool_tiles(score_OI: Tensor, tile: Tiles, how: PoolName) -> Tensor:
    """Return score_PQ, the mean ("mean") or root mean square ("l2") of the scores in each tile.

    Weights of score -inf count as zero, and a tile of nothing else is -inf.

    Raises:
        ValueError: tiles do not fill the matrix.

    Source: Xu et al., LPViT (the mean over the tile as ranking).

    >>> pool_tiles(torch.tensor([[3.0, 1.0, 0.0, 2.0]]), Tiles(height=1, width=2), "mean")
    tensor([[2., 1.]])
    """
    rows, columns = score_OI.shape
    if rows % tile.height or columns % tile.width:
        raise ValueError(f"{tile.height}x{tile.width} tiles do not fill {rows} x {columns} weights")
    shape = (rows // tile.height, tile.height, columns // tile.width, tile.width)
    removed_OI = score_OI == -torch.inf
    if not bool(removed_OI.any()):
        return _pool_last(score_OI.reshape(shape), how)
    score_PQ = _pool_last(score_OI.masked_fill(removed_OI, 0).reshape(shape), how)
    return score_PQ.masked_fill_(~tiles_kept(~removed_OI, tile), -torch.inf)


def _pool_last(score_PHQW: Tensor, how: PoolName) -> Tensor:
    """Return the pooled score of every tile."""
    if how == "mean":
        return score_PHQW.mean(dim=(1, 3))
    size = score_PHQW.shape[1] * score_PHQW.shape[3]
    norm_PQ: Tensor = torch.linalg.vector_norm(score_PHQW, dim=(1, 3))
    return norm_PQ.div_(math.sqrt(size))


def tiles_kept(keep_OI: Tensor, tile: Tiles) -> Tensor:
    """Return keep_PQ: the tiles of which any weight is kept.

    >>> tiles_kept(torch.tensor([[True, False, False, False]]), Tiles(height=1, width=2))
    tensor([[ True, False]])
    """
    rows, columns = keep_OI.shape
    shape = (rows // tile.height, tile.height, columns // tile.width, tile.width)
    return keep_OI.reshape(shape).any(dim=3).any(dim=1)


def fill_tiles(keep_PQ: Tensor, tile: Tiles) -> Tensor:
    """Return keep_OI: the mask of tiles, spelled out by weight.

    >>> fill_tiles(torch.tensor([[True, False]]), Tiles(height=1, width=2))
    tensor([[ True,  True, False, False]])
    """
    return keep_PQ.repeat_interleave(tile.height, dim=0).repeat_interleave(tile.width, dim=1)
