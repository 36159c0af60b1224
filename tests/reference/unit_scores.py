"""Scores of units as their formulas read: one unit, one weight after the other, Python's floats.

A member is its axis, width and offset, the rows of its weight, and those of what stands beside it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

Rows = Sequence[Sequence[float]]


def lines_of(
    axis: str, width: int, offset: int, unit: int, matrices: Sequence[Rows]
) -> list[list[tuple[float, ...]]]:
    """Return every row or column that a unit owns: a list of weights with what stands beside."""
    found = []
    for line in range(offset + unit * width, offset + (unit + 1) * width):
        if axis == "out":
            length = len(matrices[0][0])
            found.append([tuple(m[line][at] for m in matrices) for at in range(length)])
        else:
            found.append([tuple(m[at][line] for m in matrices) for at in range(len(matrices[0]))])
    return found


def llm_pruner(
    members: Sequence[tuple[str, int, int, Rows, Rows, Rows]], num_units: int, num: int
) -> dict[str, list[float]]:
    """Return the four Taylor scores; beside a weight stand the sums of g and of g^2."""
    scores: dict[str, list[float]] = {"taylor-vector": [], "taylor-1": []}
    scores |= {"taylor-2": [], "taylor-mix": []}
    for unit in range(num_units):
        vector = first = second = mixed = 0.0
        for axis, width, offset, *matrices in members:
            for line in lines_of(axis, width, offset, unit, matrices):
                vector += abs(sum(w * g / num for w, g, _ in line))
                first += sum(abs(w * g / num) for w, g, _ in line)
                second += sum(abs(w * w * a / num) for w, _, a in line)
                mixed += sum(abs(w * g / num - 0.5 * w * w * a / num) for w, g, a in line)
        for name, value in zip(scores, (vector, first, second, mixed), strict=True):
            scores[name].append(value)
    return scores


def hesso(
    members: Sequence[tuple[str, int, int, Rows, Rows]], num_units: int, num: int
) -> list[float]:
    """Return the blended saliency; beside a weight stands the sum of g."""
    terms = []
    for unit in range(num_units):
        pairs = [
            (w, g / num)
            for axis, width, offset, *matrices in members
            for line in lines_of(axis, width, offset, unit, matrices)
            for w, g in line
        ]
        norm = math.sqrt(sum(w * w for w, _ in pairs))
        slope = math.sqrt(sum(g * g for _, g in pairs))
        along = sum(w * g for w, g in pairs)
        cosine = along / (norm * slope) if norm * slope else 0.0
        terms.append((norm, norm / len(pairs), 1 + cosine, abs(along), along**2 / 2))
    whole = [math.sqrt(sum(value * value for value in each)) for each in zip(*terms, strict=True)]
    return [
        sum(0.2 * value / all_of for value, all_of in zip(each, whole, strict=True) if all_of)
        for each in terms
    ]


def flap(weight: Rows, inputs: Rows, width: int, *, metric: str, squared: bool) -> list[float]:
    """Return a score of FLAP from the tokens themselves."""
    scores = []
    for column in range(len(weight[0])):
        seen = [token[column] for token in inputs]
        mean = sum(seen) / len(seen)
        variance = sum((x - mean) ** 2 for x in seen) / (len(seen) - 1)
        of_column = [row[column] for row in weight]
        size = sum(abs(w) for w in of_column) / len(of_column)
        of_metric = {
            "wifv": variance * sum(w * w for w in of_column),
            "ifv": variance,
            "wifn": size * math.sqrt(sum(x * x for x in seen)),
        }
        scores.append(of_metric[metric])
    if squared:
        scores = [score**2 for score in scores]
    mean = sum(scores) / len(scores)
    deviation = math.sqrt(sum((s - mean) ** 2 for s in scores) / (len(scores) - 1))
    standard = [(score - mean) / deviation if deviation else 0.0 for score in scores]
    return [sum(standard[at : at + width]) / width for at in range(0, len(standard), width)]


def cfsp(
    down: Rows, others: Sequence[Rows], inputs: Rows, *, beta: float, gamma: float
) -> list[float]:
    """Return the mean over the hidden width of all shares of a channel, times n^gamma."""

    def shares(values: Sequence[float]) -> list[float]:
        whole = sum(abs(value) for value in values)
        return [abs(value) / whole if whole else 0.0 for value in values]

    scores = []
    for channel in range(len(down[0])):
        norm = math.sqrt(sum(token[channel] ** 2 for token in inputs) / len(inputs))
        of_each = [shares([row[channel] * norm**beta for row in down])]
        of_each += [shares(list(other[channel])) for other in others]
        added = [sum(each) for each in zip(*of_each, strict=True)]
        scores.append(sum(added) / len(added) * norm**gamma)
    return scores


def minitron(sequences: Sequence[Rows], width: int) -> list[float]:
    """Return the root of the sum over sequences of squared mean magnitudes; of heads their norm."""
    columns = []
    for column in range(len(sequences[0][0])):
        means = [sum(abs(token[column]) for token in each) / len(each) for each in sequences]
        columns.append(math.sqrt(sum(mean * mean for mean in means)))
    return [
        math.sqrt(sum(value * value for value in columns[at : at + width]))
        for at in range(0, len(columns), width)
    ]


def cost_of_removal(weight: Any, hessian: Any, gone: Sequence[int]) -> float:
    """Return tr(D H D^T) for the best change D that makes some columns zero."""
    weight, hessian = np.asarray(weight, dtype=float), np.asarray(hessian, dtype=float)
    kept = [column for column in range(len(hessian)) if column not in gone]
    fitted = np.zeros_like(weight)
    if kept:
        inner = hessian[np.ix_(kept, kept)]
        fitted[:, kept] = np.linalg.solve(inner, hessian[kept] @ weight.T).T
    change = weight - fitted
    return float(np.trace(change @ hessian @ change.T))


def greedy_removal(weight: Any, hessian: Any, count: int, width: int) -> list[int]:
    """Return the units that go, in order: each time the one that costs least with those before it,
    all of them tried."""
    gone: list[int] = []
    for _ in range(count):
        costs = {}
        for unit in range(len(hessian) // width):
            if unit not in gone:
                columns = [each * width + at for each in (*gone, unit) for at in range(width)]
                costs[unit] = cost_of_removal(weight, hessian, columns)
        gone.append(min(costs, key=lambda unit: costs[unit]))
    return gone
