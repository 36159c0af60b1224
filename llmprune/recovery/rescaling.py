"""Look for what survivors of a pruned difference are divided by: one streamed walk, no labels.

The fine-tuned model and one pruned model for each candidate advance through their blocks together,
one block in memory at a time; the candidate that changes the logits least is taken.
Legend: N rows, T tokens, D hidden size, V vocabulary, O outputs, I inputs.

Source: Deng et al., DARE the Extreme: Revisiting Delta-Parameter Pruning for Fine-Tuned Models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from llmprune.base.errors import NumericalError
from llmprune.calibration.replay import head
from llmprune.mask.counts import exact_sparsity
from llmprune.recovery.deltas import analytic_q
from llmprune.recovery.pairs import Pair, pruned_source
from llmprune.stats.types import Stats
from llmprune.walk.block import Block
from llmprune.walk.forward import LOGITS, Stream, advance, embed
from llmprune.walk.observation import observe
from llmprune.walk.streamed import Streamed

if TYPE_CHECKING:
    from torch import Tensor

    from llmprune.base.progress import Stage

POINTS = 9  # of the grid of q, by equal factors from 1 - p (as DARE has it) to 1
ETAS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)  # of the analytic form


@dataclass(frozen=True, kw_only=True)
class Rescaling:
    """What survivors are divided by: one number, or one for each tensor (of a given eta).

    `change` is the mean absolute change of the logits on the tokens that it was chosen on, `tried`
    that of all candidates by q or eta.
    """

    q: float | Mapping[str, float]
    eta: float | None = None
    change: float | None = None
    tried: Mapping[float, float] = field(default_factory=dict)

    def of(self, name: str) -> float:
        """Return the number of a tensor."""
        return self.q if isinstance(self.q, float) else self.q[name]


@dataclass(kw_only=True)
class _Candidate:
    """A pruned model on its way through the blocks; none of it is left once it overflows."""

    label: float
    blocks: Streamed
    by_tensor: dict[str, float]
    flow: Stream | None = None


def grid_of(sparsity: float) -> list[float]:
    """Return the values of q that are tried, from 1 - p to 1.

    >>> grid_of(0.9999)[::4]
    [0.0001, 0.01, 1.0]
    """
    least = float(1 - exact_sparsity(sparsity))
    found = [float(f"{least ** (1 - step / (POINTS - 1)):.6g}") for step in range(POINTS)]
    return [least, *found[1:]] if least < 1 else [1.0]


def find_rescaling(
    pair: Pair,
    blocks: Streamed,
    tokens_NT: Tensor,
    *,
    analytic: bool = False,
    stage: Stage | None = None,
) -> Rescaling:
    """Return the rescaling under which the logits of `blocks`, the fine-tuned model, change least.

    Candidates are values of q for all tensors or, `analytic`, of eta: each gives every parameter
    its own q, from its difference and the mean of its inputs. Of equal changes the first is taken.

    Raises:
        NumericalError: the fine-tuned model, or every candidate, overflows.
    """
    keeps: dict[str, Tensor] = {}
    labels = list(ETAS) if analytic else grid_of(pair.sparsity)
    tried = [_candidate(pair, blocks, label, keeps, analytic) for label in labels]
    rows = len(tokens_NT)
    flow = embed(blocks, tokens_NT, rows)
    for candidate in tried:
        candidate.flow = embed(blocks, tokens_NT, rows)  # trunks are the same
    for index in range(len(blocks)):
        if analytic:
            _solve_block(pair, blocks, index, flow, tried)
        else:
            with blocks.open(index) as block:
                advance(block, flow)
        for candidate in tried:
            _advance(candidate, index)
        keeps.clear()
        if stage is not None:
            stage.advance(f"block {index}")
    changes = _changes(blocks, flow, tried)
    best = min(range(len(tried)), key=lambda place: changes[place])
    if changes[best] == float("inf"):
        raise NumericalError(
            "q: every rescaled model overflows on the calibration tokens. The difference is too "
            "large to drop that much of it; lower --sparsity, or type --method magnitude."
        )
    found = tried[best]
    return Rescaling(
        q=dict(found.by_tensor) if analytic else found.label,
        eta=found.label if analytic else None,
        change=changes[best],
        tried=dict(zip(labels, changes, strict=True)),
    )


def _candidate(
    pair: Pair, blocks: Streamed, label: float, keeps: dict[str, Tensor], analytic: bool
) -> _Candidate:
    """Return a pruned model that shares modules, and which entries stay, with all others."""
    by_tensor: dict[str, float] = {}
    q_of: Callable[[str], float] = by_tensor.__getitem__ if analytic else lambda name: label
    source = pruned_source(pair, q_of, keeps)
    return _Candidate(label=label, blocks=replace(blocks, source=source), by_tensor=by_tensor)


def _advance(candidate: _Candidate, index: int) -> None:
    """Send a candidate through its next block, unless it has overflowed."""
    if candidate.flow is None:
        return
    try:
        with candidate.blocks.open(index) as block:
            advance(block, candidate.flow)
    except NumericalError:
        candidate.flow = None


def _solve_block(
    pair: Pair, blocks: Streamed, index: int, flow: Stream, tried: list[_Candidate]
) -> None:
    """Give every parameter of a block its q for each eta, and let the fine-tuned model advance."""
    taps = blocks.anatomy(index).taps
    with blocks.open(index) as block:
        seen = observe(block, flow, {tap.name: ("col_mean",) for tap in taps}, dense=True)
        tuned = {name: block.weight(name).clone() for name in block.anatomy.linears}
    with replace(blocks, source=pair.base).open(index) as block:
        for param in block.params_of(set(tuned)):
            parts = _parts(block, param, tuned, seen.stats)
            for candidate in tried:
                q = _weighed(parts, pair.sparsity, candidate.label)
                names = blocks.naming.disk_names_of([block.prefix + param])
                candidate.by_tensor |= dict.fromkeys(names, q)


def _parts(
    block: Block, param: str, tuned: Mapping[str, Tensor], stats: Mapping[str, Stats]
) -> list[tuple[Tensor, Tensor]]:
    """Return (delta_OI, mean_I) of the linears that lie in a parameter and have seen tokens."""
    found = []
    for name, linear in block.anatomy.linears.items():
        means = stats[block.anatomy.tap_of(name).name]
        if linear.param == param and means.num_tokens:
            delta_OI = tuned[name] - block.weight(name)
            found.append((delta_OI.cpu(), means["col_mean"].cpu()))
    return found


def _weighed(parts: list[tuple[Tensor, Tensor]], sparsity: float, eta: float) -> float:
    """Return the mean of q over all outputs of a parameter; 1 - p where none has seen a token."""
    import torch

    if not parts:
        return float(1 - exact_sparsity(sparsity))
    return float(torch.cat([analytic_q(*part, sparsity, eta) for part in parts]).mean())


def _changes(blocks: Streamed, flow: Stream, tried: list[_Candidate]) -> list[float]:
    """Return each candidate's mean absolute change of the logits, infinite where it overflowed."""
    import torch

    theirs_BTD = flow.hidden.get(0, blocks.device)
    text = blocks.model.config.get_text_config(decoder=True)
    size = max(1, LOGITS // (text.vocab_size * theirs_BTD.shape[-3]))
    sums = [0.0 if candidate.flow else float("inf") for candidate in tried]
    count = 0
    with torch.no_grad(), blocks.trunk(head=True) as model:

        def logits_of(stream: Stream, start: int) -> Tensor:
            part = stream.hidden.get(0, blocks.device)[..., start : start + size, :]
            return head(model, blocks.modules, part, returns=blocks.family.returns).double()

        for start in range(0, theirs_BTD.shape[-2], size):
            theirs = logits_of(flow, start)
            count += theirs.numel()
            for place, candidate in enumerate(tried):
                if candidate.flow is not None:
                    change = (logits_of(candidate.flow, start) - theirs).abs().sum()
                    sums[place] += float(change) if torch.isfinite(change) else float("inf")
    return [total / count for total in sums]
