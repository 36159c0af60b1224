"""Find which weights of a linear stay, and what they become, as one problem: ADMM over both.

Columns are scaled so that the damped Gram matrix A has ones on its diagonal; V = W * scale then
minimises tr((V - V0) A (V - V0)^T). One copy of V may be anything (`free`), the other only what the
pattern allows (`fit`), and a penalty rho that grows draws them together.
Legend: O outputs, I inputs of the tap.
Source: Meng et al., ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large
Language Models, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from llmprune.mask.apply import masked
from llmprune.solver.columnwise import solve_columns
from llmprune.solver.errors import row_errors
from llmprune.solver.factor import Factor, factorise
from llmprune.solver.least_squares import fit
from llmprune.solver.types import Choose, Settings, Solved
from llmprune.stats.precision import float32_products
from llmprune.stats.types import Stats

FIRST_RHO, LARGEST_RHO = 0.1, 1e6
ITERATIONS, LOOK_EVERY = 300, 3
SETTLED = 3e-4  # of the kept weights: with fewer changes the mask is found, after some iterations
SETTLED_FROM = 30


def alps(
    weights: Mapping[str, Tensor],
    stats: Stats,
    chooses: Mapping[str, Choose],
    settings: Settings,
) -> dict[str, Solved]:
    """Return pruned weights, float32 (float64 of float64 weights), with masks found by ADMM.

    A score that adapts is asked for all columns at once, for scaled weights and a curvature of
    ones; where the mask is given, only the weights that stay are solved. The solution of a
    columnwise sweep is made too, and stays where it moves the linear's output less: the fact `kept`
    says "alps" or "columnwise". Reads `gram`.

    Raises:
        NumericalError: the Gram matrix is not finite.
    """
    gram_II = stats["gram"]
    with float32_products(gram_II.device):
        found = factorise(gram_II, settings)
        solved = solve_columns(weights, gram_II, found, chooses)
        system = None if found.degraded else _System.of(gram_II, found)
        del found
        for name, swept in solved.items():
            best, kept = swept, "columnwise"
            if system is not None:
                own = _solve(weights[name], system, chooses[name], settings)
                if _error(weights[name], own, gram_II) <= _error(weights[name], swept, gram_II):
                    best, kept = own, "alps"
            solved[name] = best._replace(facts={**swept.facts, "kept": kept})
    return solved


@dataclass(frozen=True, kw_only=True)
class _System:
    """The Gram matrix of a tap, what damps it, and both together, scaled: A = Q diag(value) Q^T."""

    gram_II: Tensor
    added_I: Tensor
    dead_I: Tensor
    scale_I: Tensor
    scaled_II: Tensor
    value_I: Tensor
    vector_II: Tensor

    @classmethod
    def of(cls, gram_II: Tensor, found: Factor) -> _System:
        """Scale a Gram matrix and take its eigenvectors, once for all linears of the tap."""
        scaled_II = gram_II.clone()
        scaled_II.diagonal().add_(found.added_I)
        scale_I = scaled_II.diagonal().sqrt()
        scaled_II /= scale_I
        scaled_II /= scale_I[:, None]
        value_I, vector_II = _eigenvectors(scaled_II)
        return cls(
            gram_II=gram_II,
            added_I=found.added_I,
            dead_I=found.dead_I,
            scale_I=scale_I,
            scaled_II=scaled_II,
            value_I=value_I.clamp(min=0),
            vector_II=vector_II,
        )

    def inverse(self, rho: float) -> Tensor:
        """Return (A + rho)^-1, (I, I)."""
        return (self.vector_II / (self.value_I + rho)) @ self.vector_II.T


def _eigenvectors(matrix_II: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues and eigenvectors of a symmetric matrix; in float64 if need be."""
    try:
        value_I, vector_II = torch.linalg.eigh(matrix_II)
        if bool(value_I.isfinite().all()):
            return value_I, vector_II
    except RuntimeError:
        pass
    value_I, vector_II = torch.linalg.eigh(matrix_II.to("cpu", torch.float64))
    return value_I.to(matrix_II), vector_II.to(matrix_II)


def _solve(weight_OI: Tensor, system: _System, choose: Choose, settings: Settings) -> Solved:
    """Return the mask and the weights of one linear."""
    wide_OI = weight_OI.to(torch.promote_types(weight_OI.dtype, system.gram_II.dtype))
    start_OI = wide_OI
    if choose.adaptive:
        dense_OI = (wide_OI * system.scale_I).masked_fill_(system.dead_I, 0)
        free_OI, keep_OI = _search(dense_OI, system, _projection(choose, dense_OI))
        start_OI = free_OI.div_(system.scale_I)
    else:
        keep_OI = choose.whole(weight_OI)
    alive_OI = keep_OI & ~system.dead_I
    solved_OI = fit(
        wide_OI, alive_OI, start_OI, system.gram_II, system.added_I, settings.iterations
    )
    return Solved(torch.where(keep_OI & system.dead_I, wide_OI, solved_OI), keep_OI)


def _projection(choose: Choose, dense_OI: Tensor) -> Callable[[Tensor], Tensor]:
    """Return what finds the mask of the largest scaled weights that the pattern allows."""
    ones_I = torch.ones_like(dense_OI[0])
    return lambda scaled_OI: choose(scaled_OI, slice(0, len(ones_I)), ones_I)


def _search(
    dense_OI: Tensor, system: _System, project: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the scaled weights at which ADMM ends, and their mask."""
    target_OI = dense_OI @ system.scaled_II
    first_OI = seen_OI = project(dense_OI)
    num_kept = max(1, int(first_OI.count_nonzero()))
    free_OI, fit_OI, dual_OI = dense_OI, masked(dense_OI, first_OI), torch.zeros_like(dense_OI)
    rho, raised = FIRST_RHO, False
    inverse_II = system.inverse(rho)
    for iteration in range(1, ITERATIONS + 1):
        free_OI = (target_OI - dual_OI).add_(fit_OI, alpha=rho) @ inverse_II
        shifted_OI = free_OI.add(dual_OI, alpha=1 / rho)
        keep_OI = project(shifted_OI)
        fit_OI = masked(shifted_OI, keep_OI)
        dual_OI.add_(free_OI, alpha=rho).sub_(fit_OI, alpha=rho)
        if iteration % LOOK_EVERY:
            continue
        changed = int((keep_OI ^ seen_OI).count_nonzero()) / num_kept
        seen_OI = keep_OI
        if (raised and not changed) or (iteration >= SETTLED_FROM and changed < SETTLED):
            break
        growth = _growth(changed, raised)
        raised |= growth > 1
        if growth < 1 and changed:  # too stiff from the start
            fit_OI, dual_OI = masked(dense_OI, first_OI), torch.zeros_like(dense_OI)
        rho = min(rho * growth, LARGEST_RHO)
        inverse_II = system.inverse(rho)
    return free_OI, project(free_OI)


def _growth(changed: float, raised: bool) -> float:
    """Return what multiplies rho, given how much of the mask changed and whether rho ever rose.

    >>> _growth(0.2, False), _growth(0.01, False), _growth(0.001, True), _growth(0.001, False)
    (1.3, 1.2, 1.1, 0.2)
    """
    if changed > 0.1:
        return 1.3
    if changed > 0.005:
        return 1.2
    return 1.1 if raised else 0.2


def _error(weight_OI: Tensor, solved: Solved, gram_II: Tensor) -> float:
    """Return the squared change of a linear's output over all tokens."""
    wide_OI = weight_OI.to(solved.weight_OI.dtype)
    return float(row_errors(wide_OI - solved.weight_OI, gram_II).sum())
