"""Exchange kept and pruned weights of a row while that lowers the error of its output.

The error of a row is d G d^T, where d is what its weights lost and G = X^T X. A weight that goes
changes d by c = w, one that comes back by c = -w, and an exchange of a and b changes the error by

    cost_a + cost_b + 2 c_a c_b G_ab,    cost = c (c diag(G) + 2 r),    r = G d.

A sweep takes the weights of lowest cost of each side, exchanges the best pairs among them, one
after the other, each judged after those before, and only then brings r up to date. Where weights
that stay are updated, d is what is lost after the update, and a weight comes back at the value that
lowers the error most, c = -r / diag(G).
Legend: O outputs, R some of them, I inputs, J groups of M inputs, K candidates of each side, L = 2K
those of both, S changes of a sweep.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from llmprune.solver.least_squares import fit
from llmprune.solver.types import Settings
from llmprune.stats.precision import float32_products
from llmprune.stats.types import Stats

CANDIDATES = 16
SWEEPS = 200
MIN_GAIN = 1e-6  # of the row's error; what gains less may be rounding
ROUNDS, SWEEPS_OF_ROUND, ITERATIONS_OF_ROUND = 4, 3, 10
_CHUNK = {"cpu": 2**22}  # values of the rows that are worked on at a time
_LARGE_CHUNK = 2**26  # other devices have more to keep busy


def swap(
    weight_OI: Tensor,
    keep_OI: Tensor,
    stats: Stats,
    within: int | None,
    settings: Settings | None = None,
) -> Tensor:
    """Return a new keep_OI whose error is lower or the same in every row, where nothing is updated.

    Every row keeps as many weights as before, and so does every group of `within` consecutive
    columns, if given. A weight of zero never comes back: what an earlier pruning removed stays
    removed. A row that is not finite stays as it is. Reads `gram`, (I, I).

    >>> gram = torch.tensor([[1.0, 0.9], [0.9, 2.0]])
    >>> stats = Stats(num_tokens=2, values={"gram": gram})
    >>> swap(torch.tensor([[2.0, 1.0]]), torch.tensor([[False, True]]), stats, None)
    tensor([[ True, False]])
    """
    return _by_rows(_swapped, weight_OI, keep_OI, stats["gram"], within)


def swap_updated(
    weight_OI: Tensor,
    keep_OI: Tensor,
    stats: Stats,
    within: int | None,
    settings: Settings | None = None,
) -> Tensor:
    """Return a new keep_OI whose error, once least squares updated what stays, is not higher.

    Sweeps of exchanges and steps of the update take turns. Counts, zeros and rows that are not
    finite are as in `swap`. The Gram matrix is damped as `settings` say. Reads `gram`, (I, I).

    >>> gram = torch.tensor([[1.0, 0.9], [0.9, 2.0]])
    >>> stats = Stats(num_tokens=2, values={"gram": gram})
    >>> swap_updated(torch.tensor([[2.0, 1.0]]), torch.tensor([[False, True]]), stats, None)
    tensor([[ True, False]])
    """
    settings, damped_II = settings or Settings(), stats["gram"].clone()
    diagonal_I = damped_II.diagonal()
    added_I = diagonal_I.mean() if settings.damp == "mean" else diagonal_I.clone()
    diagonal_I.add_(settings.damping * added_I)
    return _by_rows(_swapped_updated, weight_OI, keep_OI, damped_II, within)


_Refine = Callable[[Tensor, Tensor, Tensor, int | None], Tensor]


def _by_rows(
    refine: _Refine, weight_OI: Tensor, keep_OI: Tensor, gram_II: Tensor, within: int | None
) -> Tensor:
    """Return the masks that `refine` finds for some rows at a time."""
    wide = torch.promote_types(weight_OI.dtype, gram_II.dtype)
    gram_II = gram_II.to(weight_OI.device, wide)
    width = max(weight_OI.shape[1] * (within or 1), 16 * CANDIDATES**2)
    num_rows = max(1, _CHUNK.get(weight_OI.device.type, _LARGE_CHUNK) // width)
    parts = zip(weight_OI.split(num_rows), keep_OI.split(num_rows), strict=True)
    with float32_products(weight_OI.device):
        return torch.cat([refine(weight.to(wide), keep, gram_II, within) for weight, keep in parts])


@dataclass
class _Rows:
    """Rows that still improve: places, weights (dense and now), masks, r and errors."""

    place_R: Tensor
    dense_RI: Tensor
    weight_RI: Tensor
    keep_RI: Tensor
    drift_RI: Tensor
    error_R: Tensor

    @classmethod
    def of(cls, dense_RI: Tensor, weight_RI: Tensor, keep_RI: Tensor, gram_II: Tensor) -> _Rows:
        """Take in the rows that are finite and lose something."""
        drift_RI, error_R = _errors(dense_RI - weight_RI, gram_II)
        place_R = torch.arange(len(dense_RI), device=dense_RI.device)
        rows = cls(place_R, dense_RI, weight_RI, keep_RI, drift_RI, error_R)
        return rows.only((error_R > 0) & error_R.isfinite() & dense_RI.isfinite().all(1))

    def only(self, these_R: Tensor) -> _Rows:
        """Return copies of some of the rows."""
        return _Rows(*(part[these_R] for part in vars(self).values()))


def _swapped(dense_RI: Tensor, keep_RI: Tensor, gram_II: Tensor, within: int | None) -> Tensor:
    """Return the masks of some rows after all sweeps; the old one where nothing was gained."""
    rows = _Rows.of(dense_RI, dense_RI.masked_fill(~keep_RI, 0), keep_RI, gram_II)
    found_RI = keep_RI.clone()
    for _ in range(SWEEPS):
        if not len(rows.place_R):
            break
        changed_R = _sweep(rows, gram_II, within, free=False)
        found_RI[rows.place_R] = rows.keep_RI
        if not bool(changed_R.all()):
            rows = rows.only(changed_R)
    before_R, after_R = (
        _errors(dense_RI.masked_fill(keep, 0), gram_II)[1] for keep in (keep_RI, found_RI)
    )
    return torch.where((after_R < before_R)[:, None], found_RI, keep_RI)


def _swapped_updated(
    dense_RI: Tensor, keep_RI: Tensor, gram_II: Tensor, within: int | None
) -> Tensor:
    """Return the masks of some rows after all rounds; the old one where nothing was gained."""
    rows = _Rows.of(dense_RI, dense_RI.masked_fill(~keep_RI, 0), keep_RI, gram_II)
    _update(rows, gram_II)
    before_R = rows.error_R.clone()
    for _ in range(ROUNDS):
        changed = [_sweep(rows, gram_II, within, free=True) for _ in range(SWEEPS_OF_ROUND)]
        if not bool(torch.stack(changed).any()):
            break
        _update(rows, gram_II)
    found_RI = keep_RI.clone()
    better_R = rows.error_R < before_R
    found_RI[rows.place_R[better_R]] = rows.keep_RI[better_R]
    return found_RI


def _update(rows: _Rows, gram_II: Tensor) -> None:
    """Bring kept weights closer to the least squares, and r and errors up to date."""
    nothing_I = torch.zeros_like(gram_II[0])  # the matrix is damped
    rows.weight_RI = fit(
        rows.dense_RI, rows.keep_RI, rows.weight_RI, gram_II, nothing_I, ITERATIONS_OF_ROUND
    )
    rows.drift_RI, rows.error_R = _errors(rows.dense_RI - rows.weight_RI, gram_II)


def _errors(lost_RI: Tensor, gram_II: Tensor) -> tuple[Tensor, Tensor]:
    """Return r = G d and d G d^T of every row."""
    drift_RI = lost_RI @ gram_II
    return drift_RI, (lost_RI * drift_RI).sum(1)


def _sweep(rows: _Rows, gram_II: Tensor, within: int | None, *, free: bool) -> Tensor:
    """Exchange pairs in every row, in place, and return which rows changed.

    What comes back does so at its dense value, or at any: it is `free`.
    """
    keep_RI, own_I = rows.keep_RI, gram_II.diagonal()
    back_RI = rows.drift_RI / _positive(own_I) if free else rows.dense_RI
    change_RI = torch.where(keep_RI, rows.weight_RI, -back_RI)
    own_RI = own_I.expand_as(change_RI)
    go = _Side(change_RI, own_RI, rows.drift_RI, ~keep_RI)
    back = _Side(change_RI, own_RI, rows.drift_RI, keep_RI | (rows.dense_RI == 0))
    if within is None:
        num = min(CANDIDATES, keep_RI.shape[1])
        places = [side.costs().topk(num, largest=False).indices for side in (go, back)]
    else:
        places = _pairs_of_groups(go, back, gram_II, within, free=free)
    place_RL = torch.cat(places, dim=1)
    gram_RLL = gram_II[place_RL[:, :, None], place_RL[:, None, :]]
    go, back, paired = go.at(places[0]), back.at(places[1]), within is not None
    taken_RL, change_RL = _exchange(go, back, gram_RLL, rows.error_R, free=free, paired=paired)
    flips_RI = torch.zeros_like(keep_RI, dtype=torch.int8)
    rows.keep_RI = keep_RI ^ flips_RI.scatter_add_(1, place_RL, taken_RL.to(torch.int8)).bool()
    rows.weight_RI = rows.weight_RI.scatter_add(1, place_RL, -change_RL)
    _follow(rows.drift_RI, place_RL, change_RL, taken_RL, gram_II)
    return taken_RL.any(1)


class _Side(NamedTuple):
    """Weights that may go, or come back: c, diag(G), r and which may not, (..., K) each."""

    change: Tensor
    own: Tensor
    drift: Tensor
    shut: Tensor

    def costs(self) -> Tensor:
        """Return by how much each alone changes the error."""
        costs = (self.change * self.own).add_(self.drift, alpha=2).mul_(self.change)
        return costs.masked_fill_(self.shut, torch.inf)

    def at(self, place_RK: Tensor) -> _Side:
        """Return copies of some of each row."""
        return _Side(*(part.gather(1, place_RK) for part in self))

    def shaped(self, *shape: int) -> _Side:
        """Return views of another shape."""
        return _Side(*(part.reshape(shape) for part in self))


def _pair_costs(go: _Side, back: _Side, between: Tensor, *, free: bool) -> Tensor:
    """Return by how much each pair changes the error, (..., K, K), as `between`, their G."""
    costs = (go.change[..., :, None] * between).add_(back.drift[..., None, :])
    if free:
        costs.square_().div_(-_positive(back.own)[..., None, :])
    else:
        costs.mul_(2).add_((back.change * back.own)[..., None, :])
        costs.mul_(back.change[..., None, :])
    costs += go.costs()[..., :, None]
    return costs.masked_fill_(back.shut[..., None, :], torch.inf)


def _pairs_of_groups(
    go: _Side, back: _Side, gram_II: Tensor, within: int, *, free: bool
) -> list[Tensor]:
    """Return the places of the best pairs, at most one of each group."""
    num_rows, inputs = go.change.shape
    num_groups = inputs // within
    group_MMJ = gram_II.view(num_groups, within, num_groups, within).diagonal(dim1=0, dim2=2)
    go, back = (side.shaped(num_rows, num_groups, within) for side in (go, back))
    cost_RJMM = _pair_costs(go, back, group_MMJ.permute(2, 0, 1), free=free)
    lowest_RJ, pair_RJ = cost_RJMM.flatten(2).min(2)
    num = min(2 * CANDIDATES, num_groups)  # looking at a pair is cheap beside finding it
    group_RK = lowest_RJ.topk(num, largest=False).indices
    pair_RK = pair_RJ.gather(1, group_RK)
    first_RK = group_RK * within
    return [first_RK + pair_RK // within, first_RK + pair_RK % within]


def _exchange(
    go: _Side, back: _Side, gram_RLL: Tensor, error_R: Tensor, *, free: bool, paired: bool
) -> tuple[Tensor, Tensor]:
    """Exchange the best pairs of candidates, one after the other.

    Returns which candidates of both sides changed, and by how much: taken_RL, change_RL. Brings
    `error_R` and the sides up to date. With `paired` a candidate has but one partner, that at its
    place of the other side.
    """
    num_rows, num = go.change.shape
    row_R = torch.arange(num_rows, device=error_R.device)
    taken_RL = torch.zeros(num_rows, 2 * num, dtype=torch.bool, device=error_R.device)
    change_RL = error_R.new_zeros(num_rows, 2 * num)
    between = gram_RLL[:, :num, num:]
    shape = (num_rows, num, 1) if paired else (num_rows, num)
    if paired:
        between = between.diagonal(dim1=1, dim2=2)[..., None, None]
    for _ in range(num):
        cost = _pair_costs(go.shaped(*shape), back.shaped(*shape), between, free=free)
        gain_R, best_R = cost.flatten(1).min(1)
        good_R = gain_R < -MIN_GAIN * error_R
        if not bool(good_R.any()):
            break
        go_R, back_R = (best_R, best_R) if paired else (best_R // num, best_R % num)
        first_R, second_R = go.change[row_R, go_R], back.change[row_R, back_R]
        gram_RL, other_RL = gram_RLL[row_R, go_R], gram_RLL[row_R, num + back_R]
        if free:
            pull_R = back.drift[row_R, back_R] + first_R * gram_RL[row_R, num + back_R]
            second_R = -pull_R / _positive(back.own[row_R, back_R])
        first_R, second_R = first_R * good_R, second_R * good_R
        step_RL = first_R[:, None] * gram_RL + second_R[:, None] * other_RL
        for side, part_RK in ((go, step_RL[:, :num]), (back, step_RL[:, num:])):
            side.drift.add_(part_RK)
        for side, place_R, offset, moved_R in (
            (go, go_R, 0, first_R),
            (back, back_R, num, second_R),
        ):
            side.shut[row_R, place_R] |= good_R
            taken_RL[row_R, offset + place_R] |= good_R
            change_RL[row_R, offset + place_R] += moved_R
        error_R += gain_R.masked_fill(~good_R, 0)
    return taken_RL, change_RL


def _positive(own: Tensor) -> Tensor:
    """Return a diagonal that can be divided by."""
    return own.clamp(min=torch.finfo(own.dtype).tiny)


def _follow(
    drift_RI: Tensor, place_RL: Tensor, change_RL: Tensor, taken_RL: Tensor, gram_II: Tensor
) -> None:
    """Add G times the change of d to r, in place: only as many rows of G as some row changed."""
    num = int(taken_RL.sum(1).amax()) if len(taken_RL) else 0
    order_RS = taken_RL.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :num]
    if num:
        place_RS, change_RS = place_RL.gather(1, order_RS), change_RL.gather(1, order_RS)
        drift_RI += embedding_bag(place_RS, gram_II, per_sample_weights=change_RS, mode="sum")
