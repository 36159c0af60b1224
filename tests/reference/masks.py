"""Better masks as their definitions read: one row at a time, every pair tried."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations, product

import torch
from torch import Tensor


def lost_error(weight_I: Tensor, keep_I: Sequence[bool], gram_II: Tensor) -> float:
    """Return d G d^T of a row whose pruned weights are zeroed."""
    lost_I = [0.0 if keep else float(w) for w, keep in zip(weight_I, keep_I, strict=True)]
    gram = gram_II.double().tolist()
    columns = range(len(lost_I))
    return sum(lost_I[i] * gram[i][j] * lost_I[j] for i, j in product(columns, columns))


def solved_error(weight_I: Tensor, keep_I: Sequence[bool], gram_II: Tensor) -> float:
    """Return d G d^T of a row whose kept weights make up for the others as well as they can."""
    keep = torch.tensor(keep_I)
    weight_I, gram_II = weight_I.double(), gram_II.double()
    solved_I = torch.zeros_like(weight_I)
    if bool(keep.any()):
        kept_II = gram_II[keep][:, keep]
        solved_I[keep] = torch.linalg.solve(kept_II, (gram_II @ weight_I)[keep])
    delta_I = weight_I - solved_I
    return float(delta_I @ gram_II @ delta_I)


def swapped_once(keep_I: Sequence[bool], within: int | None) -> Iterator[list[bool]]:
    """Yield every mask that differs by one exchange in the row, or in one group of it."""
    width = within or len(keep_I)
    for a, b in combinations(range(len(keep_I)), 2):
        if a // width == b // width and keep_I[a] != keep_I[b]:
            other = list(keep_I)
            other[a], other[b] = other[b], other[a]
            yield other


def best_support(weight_OI: Tensor, gram_II: Tensor, num_kept: int) -> tuple[Tensor, float]:
    """Try every mask of a linear that keeps a number of weights; return the best and its error."""
    rows, inputs = weight_OI.shape
    found: list[tuple[float, Tensor]] = []
    for kept in combinations(range(rows * inputs), num_kept):
        keep_OI = torch.zeros(rows, inputs, dtype=torch.bool)
        keep_OI.view(-1)[list(kept)] = True
        masks = keep_OI.tolist()
        found.append((sum(map(solved_error, weight_OI, masks, [gram_II] * rows)), keep_OI))
    error, keep_OI = min(found, key=lambda pair: pair[0])
    return keep_OI, error


def grown_and_pruned(
    weight: Sequence[float],
    keep: Sequence[bool],
    columns: Sequence[tuple[float, float, float]],
    within: int | None,
    *,
    steps: int,
    near: float,
) -> list[bool]:
    """Swap weights of a row as DSnoT says; `columns` are (mean, norm, variance) of inputs."""
    places = range(len(weight))
    part = [w * mean for w, (mean, _, _) in zip(weight, columns, strict=True)]
    score = [abs(w) * norm for w, (_, norm, _) in zip(weight, columns, strict=True)]
    result, pruned_once, grown_once = list(keep), set(), set()
    miss = sum(part[j] for j in places if not keep[j])
    first = abs(miss)
    for _ in range(steps):
        if abs(miss) <= near * first:
            break
        sign = 1 if miss > 0 else -1
        back = [j for j in places if not keep[j] and j not in grown_once and sign * part[j] > 0]
        if not back:
            break
        grow = max(back, key=lambda j: sign * part[j] / columns[j][2])
        grown_once.add(grow)
        go = [j for j in places if keep[j] and j not in pruned_once]
        if within is None:
            go = [j for j in go if sign * part[j] < 0]
        else:
            go = [j for j in go if j // within == grow // within]
        if not go:
            continue
        prune = min(go, key=lambda j: score[j])
        changed = miss + part[prune] - part[grow]
        if abs(changed) < abs(miss):
            miss = changed
            pruned_once.add(prune)
            result[grow], result[prune] = True, False
    return result
