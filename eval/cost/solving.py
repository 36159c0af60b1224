"""What sharing saves in second-order pruning: one block, by tap and linear by linear.

usage: python eval/cost/solving.py [--hidden 1024] [--ffn 2816] [--tokens 32768] [--threads 1]
Both sides do the same: Gram matrix, factor of its damped inverse, columnwise sweep with OBS masks.
Shared is what llmprune does: per tap, half the Gram matrix, one Cholesky and a triangular inverse,
one sweep over all linears. Alone is the formulas as they stand: for every linear the whole matrix,
Cholesky, inverse and Cholesky, and a sweep with a rank-1 update of the block after each column.
Legend: T tokens, O outputs, I inputs, C columns of a block.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor

from llmprune.mask.rank import keep_highest_flat
from llmprune.score import SCORES
from llmprune.solver.columnwise import solve_columns
from llmprune.solver.errors import row_errors
from llmprune.solver.factor import factorise
from llmprune.solver.types import Choose, Settings
from llmprune.stats.gram import GramMatrix
from llmprune.stats.types import Stats

SETTINGS = Settings()
BLOCK = 128
AT_ONCE = 4096  # tokens of a micro-batch
Times = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--ffn", type=int, default=2816)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    hidden, ffn = args.hidden, args.ffn
    taps = [
        ([hidden] * 3, hidden),  # q, k, v
        ([hidden], hidden),  # o
        ([ffn] * 2, hidden),  # gate, up
        ([hidden], ffn),  # down
    ]
    shared: Times = {}
    alone: Times = {}
    for index in range(args.repeats):
        for rows, width in taps:
            generator = torch.Generator().manual_seed(index)
            x_TI = tokens(min(AT_ONCE, args.tokens), width, generator)
            weights = [torch.randn(outputs, width, generator=generator) for outputs in rows]
            found = by_tap(x_TI, args.tokens, weights, shared)
            other = one_by_one(x_TI, args.tokens, weights, alone)
            agree(x_TI, weights, found, other)
    shape = f"hidden {hidden}, FFN {ffn}, {args.tokens} tokens, float32, {args.threads} thread(s)"
    print(f"one Llama block: {shape}, mean of {args.repeats}")
    for name in shared:
        print(f"{name:8} {told(shared, alone, name, args.repeats)}")
    both = {"all": sum(shared.values())}, {"all": sum(alone.values())}
    print(f"{'all':8} {told(*both, 'all', args.repeats)}")


def told(shared: Times, alone: Times, name: str, repeats: int) -> str:
    """Return both times and their ratio as a line."""
    ours, theirs = shared[name] / repeats, alone[name] / repeats
    return f"shared {ours:7.2f} s   alone {theirs:7.2f} s   ratio {ours / theirs:.2f}"


def tokens(number: int, width: int, generator: torch.Generator) -> Tensor:
    """Return inputs that correlate, as activations do."""
    x_TI = torch.randn(number, width, generator=generator)
    return x_TI + torch.randn(number, 8, generator=generator) @ torch.randn(
        8, width, generator=generator
    )


def by_tap(x_TI: Tensor, num_tokens: int, weights: list[Tensor], times: Times) -> list[Tensor]:
    """Solve all linears of a tap as llmprune does; add the seconds of each part."""
    start = time.perf_counter()
    seen = GramMatrix()
    for done in range(0, num_tokens, len(x_TI)):
        seen.update(x_TI[: num_tokens - done])
    gram_II = seen.result()["gram"]
    start = add(times, "gram", start)
    found = factorise(gram_II, SETTINGS)
    start = add(times, "factor", start)
    named = {str(index): weight_OI for index, weight_OI in enumerate(weights)}
    choose = Choose(fn=lowest_half, adaptive=True, columns=BLOCK)
    solved = solve_columns(named, gram_II, found, dict.fromkeys(named, choose))
    add(times, "sweep", start)
    return [each.weight_OI for each in solved.values()]


def one_by_one(x_TI: Tensor, num_tokens: int, weights: list[Tensor], times: Times) -> list[Tensor]:
    """Solve every linear alone, by the formulas as they stand; add the seconds of each part."""
    found = []
    for weight_OI in weights:
        start = time.perf_counter()
        gram_II = x_TI.new_zeros(x_TI.shape[1], x_TI.shape[1])
        for done in range(0, num_tokens, len(x_TI)):
            part_TI = x_TI[: num_tokens - done]
            gram_II.addmm_(part_TI.T, part_TI)
        start = add(times, "gram", start)
        diagonal_I = gram_II.diagonal()
        diagonal_I += SETTINGS.damping * diagonal_I.mean()
        inverse_II = torch.cholesky_inverse(torch.linalg.cholesky(gram_II))
        upper_II = torch.linalg.cholesky(inverse_II, upper=True)
        start = add(times, "factor", start)
        found.append(plain_sweep(weight_OI.clone(), upper_II))
        add(times, "sweep", start)
    return found


def plain_sweep(weight_OI: Tensor, upper_II: Tensor) -> Tensor:
    """Sweep over the columns of one linear, in place."""
    for first in range(0, weight_OI.shape[1], BLOCK):
        cols = slice(first, first + BLOCK)
        block_OC, upper_CC = weight_OI[:, cols].clone(), upper_II[cols, cols]
        keep_OC = lowest_half(block_OC, cols, upper_CC.diagonal())
        errors_OC = torch.zeros_like(block_OC)
        for column in range(block_OC.shape[1]):
            weight_O = block_OC[:, column]
            kept_O = weight_O * keep_OC[:, column]
            error_O = (weight_O - kept_O) / upper_CC[column, column]
            block_OC[:, column:] -= error_O[:, None] @ upper_CC[column, None, column:]
            weight_OI[:, first + column] = kept_O
            errors_OC[:, column] = error_O
        weight_OI[:, first + BLOCK :] -= errors_OC @ upper_II[cols, first + BLOCK :]
    return weight_OI


def lowest_half(weight_OC: Tensor, cols: slice, curvature_C: Tensor | None) -> Tensor:
    """Return the mask of a block of columns of one linear."""
    assert curvature_C is not None
    stats = Stats(num_tokens=0, values={"curvature": curvature_C})
    score_OC = SCORES["obs"].fn(weight_OC, stats)
    return keep_highest_flat(score_OC.reshape(-1), score_OC.numel() // 2).view(score_OC.shape)


def agree(x_TI: Tensor, weights: list[Tensor], found: list[Tensor], other: list[Tensor]) -> None:
    """Check that both sides leave the same error, to a thousandth."""
    gram_II = x_TI.T @ x_TI
    for weight_OI, ours_OI, theirs_OI in zip(weights, found, other, strict=True):
        ours = float(row_errors(weight_OI - ours_OI, gram_II).sum())
        theirs = float(row_errors(weight_OI - theirs_OI, gram_II).sum())
        assert abs(ours - theirs) < 1e-3 * theirs, f"errors {ours} and {theirs} differ"


def add(times: Times, name: str, start: float) -> float:
    """Add the seconds since `start` to a part's, and return the time."""
    now = time.perf_counter()
    times[name] = times.get(name, 0.0) + now - start
    return now


if __name__ == "__main__":
    main()
