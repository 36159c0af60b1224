"""What a run will cost, before it starts: memory, disk, reads, time, and the micro-batch that fits.

All sizes are bytes; the model is described by shapes alone.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from llmprune.allocation.threshold import BYTES_PER_BIN, TYPICAL_BINS
from llmprune.base.errors import RecipeError, TooLarge
from llmprune.base.memory import anonymous_bytes, parse_size
from llmprune.calibration.hidden import Place
from llmprune.engine.gates import AT_ONCE
from llmprune.walk.forward import LOGITS

if TYPE_CHECKING:
    import torch

    from llmprune.recipe import Recipe

LIBRARIES = 340_000_000  # anonymous pages of torch, transformers and datasets after import
GATE_LIBRARIES = 330_000_000  # the fresh process of the gate, without datasets
ACTIVATIONS = 64_000_000  # a micro-batch may always use this much
DEVICE_TOKENS = 16384  # a micro-batch on an accelerator holds no more tokens
TAPE = 32_000_000_000  # what all blocks are given is kept on disk up to this, for a backward walk
PROBE_ROOM = 512_000_000  # hidden states of candidates may always use this much
WEIGHT_RATE = 0.3e9  # bytes per second that a weight-only cut reads, masks, hashes and writes


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes that decide cost; parameters are counts, widths in values."""

    num_blocks: int
    block_params: int
    linear_params: int
    largest_linear: int
    entrance_params: int
    exit_params: int
    hidden_size: int
    widest: int
    eager_heads: int
    vocab_size: int
    stored_bytes: int
    largest_shard: int


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What is read before the first cut: how often, of how many ranked linears, with tokens or not.

    A ranked linear leaves a histogram until all are seen. `rounds` are the candidates of every
    round of probing, `moments` the values per weight that a backward survey collects. With `target`
    candidates are walked on the text of the evaluation, and what cuts them is learnt in every walk.
    `steps` are those that gates of units are trained in.
    """

    num_reads: int
    num_linears: int
    forward: bool
    rounds: tuple[int, ...] = ()
    target: bool = False
    moments: int = 0
    steps: int = 0

    @property
    def held_bytes(self) -> int:
        """Return the size of all histograms."""
        return self.num_linears * TYPICAL_BINS * BYTES_PER_BIN


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The cost of a run, as the plan prints it; `survey_seconds` is not part of `cut_seconds`.

    `overlaps` says whether there is room to read ahead and to write beside the next block.
    """

    micro_batch: int
    statistics_bytes: int
    place: Place
    host_peak: int
    device_peak: int
    hidden_bytes: int
    out_bytes: int
    disk_bytes: int
    read_bytes: int
    num_reads: int
    survey_seconds: float
    cut_seconds: float
    evaluate_seconds: float
    resume_seconds: float
    probe_at_once: int = 1
    num_candidates: int = 0
    gradient_bytes: int = 0
    gradient_place: Place = "host"
    gate_reads: int = 0
    overlaps: bool = True


def estimate(
    shape: Shape,
    *,
    recipe: Recipe,
    device: torch.device,
    itemsize: int,
    num_samples: int,
    seq_len: int,
    eval_tokens: int,
    forward: bool,
    removed_bytes: int,
    converted_params: int,
    rate: float,
    cut_forward: bool = True,
    survey: Survey | None = None,
    statistics_bytes: int = 0,
    most: int | None = None,
    streams: int = 1,
    passes: float = 0.0,
    workspace: tuple[int, int] = (0, 0),
) -> Estimate:
    """Estimate a run; `itemsize` is that of the dtype that blocks are held in, `rate` in FLOP/s.

    `forward` says that tokens flow at all, `cut_forward` that they do while blocks are cut.

    `statistics_bytes` is what the statistics of the largest block take up; where that is more than
    a quarter of what may be used, the block is observed in rounds. Micro-batches hold `most`
    sequences at most; `streams` are the hidden states held per token, and `passes` the forwards
    that repairing a block costs. `workspace` is that of the solver.

    Raises:
        TooLarge: it does not fit the memory that there is, or that --max-memory allows.
    """
    import torch

    host_budget, device_budget = budgets(recipe, device)
    on_host = device.type in ("cpu", "mps")
    per_token = (8 * shape.hidden_size + 4 * shape.widest) * itemsize
    per_token += 3 * shape.eager_heads * seq_len * itemsize
    micro = micro_batch(shape, per_token, seq_len, num_samples, itemsize, device_budget, on_host)
    micro = min(micro, most or micro) if forward else 1
    hidden = streams * num_samples * seq_len * shape.hidden_size * itemsize if forward else 0
    activations = micro * seq_len * per_token if forward else 0
    learnt = min(statistics_bytes, max(ACTIVATIONS, device_budget // 4))
    block = shape.block_params * itemsize
    at_once = min(torch.get_num_threads() * shape.largest_linear, shape.block_params)
    deciding = at_once * (4 + 4 + 2)  # score, its copy for the k-th value, masks
    square = min(4 * shape.widest**2, statistics_bytes)  # the statistics of the widest tap
    solving = workspace[0] * square + workspace[1] * 4 * shape.largest_linear
    held = block if statistics_bytes > learnt else 0  # new weights wait for the last round
    seen = max(learnt, square)  # a tap that needs more has a round of its own
    survey = survey or Survey(num_reads=0, num_linears=0, forward=False)
    graph = 3 * seq_len * per_token + LOGITS * 8  # what autograd keeps of one sequence
    backward = block * 2 + survey.moments * shape.block_params * 4 + graph if survey.moments else 0
    probed = min(16, max(1, num_samples // 8)) * seq_len
    probed = max(probed, eval_tokens) if survey.target else probed
    search = plan_search(survey, probed * shape.hidden_size * itemsize, device_budget)
    saved = hidden // streams * (shape.num_blocks + 1) if survey.moments else 0
    groups = 1 if saved < host_budget // 2 else -(-saved // TAPE)
    walks = search.num_walks + (2 * groups if survey.moments else 0)
    gates = plan_gates(shape, survey.steps, num_samples, seq_len, itemsize, graph)
    working = max(
        block + held + seen + max(activations, deciding + solving, deciding + shape.largest_shard),
        backward,
        gates.num_bytes,
        block
        + search.num_bytes
        + activations
        + (statistics_bytes + solving if survey.target else 0),
        block + shape.block_params * 20 + micro * graph if passes else 0,
        (shape.entrance_params * itemsize if forward else 0) + activations,
        shape.exit_params * itemsize + 3 * LOGITS * 4 if eval_tokens else 0,
    )
    place: Place = "device" if not on_host and working + hidden < device_budget else "host"
    base = max(LIBRARIES, anonymous_bytes())
    alone = 2 * max(shape.exit_params, shape.largest_linear) * 4  # one module at a time, and a copy
    gate = base + max(shape.block_params * 4 + activations, GATE_LIBRARIES + alone)
    fixed = base + (working if on_host else shape.largest_shard + deciding)
    fixed += survey.held_bytes
    if place == "host" and fixed + hidden > host_budget:
        place = "disk"
    cutting = fixed + (hidden if place == "host" else 0)
    on_device = 0 if on_host else working + (hidden if place == "device" else 0)
    # A shard waits in memory to be written; on an accelerator the next block waits on both sides.
    beside, ahead = shape.largest_shard * (1 if on_host else 2), 0 if on_host else block
    overlaps = cutting + beside <= host_budget and on_device + ahead <= device_budget
    if overlaps:
        cutting, on_device = cutting + beside, on_device + ahead
    host = max(cutting, gate)
    spill: Place = "host" if host + saved < host_budget else "disk"
    tape = saved if spill == "host" else 0  # before hidden states of the cut are there
    host = max(host, base + (backward if on_host else 0) + tape)
    host = max(host, base + (gates.num_bytes if on_host else 0) + gates.held_bytes)
    _check("cpu", host, host_budget)
    if not on_host:
        _check(str(device), on_device, device_budget)
    gate_disk = converted_params * 4  # tensors that change shape on load are laid out anew
    flops = 2 * shape.linear_params * shape.num_blocks
    tokens = num_samples * seq_len if forward else 0
    cut_tokens = tokens if cut_forward else 0
    reads = survey.num_reads + walks + gates.num_walks
    passing = 1.85 * flops * tokens / rate if survey.forward else 0.0
    head = 2 * shape.exit_params
    probing = sum(survey.rounds) * probed * (flops + head) / rate
    probing += walks * passing if survey.target else 0.0
    surveying = survey.num_reads * passing + probing
    surveying += 4 * flops * tokens / rate if survey.moments else 0.0
    surveying += gates.flops / rate
    saved = saved if spill == "host" else min(saved, TAPE)
    return Estimate(
        micro_batch=micro,
        statistics_bytes=learnt,
        place=place,
        host_peak=host,
        device_peak=on_device,
        hidden_bytes=hidden,
        out_bytes=shape.stored_bytes - removed_bytes,
        disk_bytes=shape.stored_bytes
        - removed_bytes
        + max(hidden if place == "disk" else 0, saved if spill == "disk" else 0, gate_disk)
        + survey.moments * 4 * shape.linear_params * shape.num_blocks,
        read_bytes=shape.stored_bytes * (1 + reads),
        num_reads=1 + reads,
        survey_seconds=surveying + reads * shape.stored_bytes / WEIGHT_RATE,
        cut_seconds=(1.85 + passes) * flops * cut_tokens / rate + shape.stored_bytes / WEIGHT_RATE,
        evaluate_seconds=2 * (flops + head) * eval_tokens / rate,
        resume_seconds=flops * cut_tokens / rate,
        probe_at_once=search.at_once,
        num_candidates=sum(survey.rounds),
        gradient_bytes=saved,
        gradient_place=spill,
        gate_reads=gates.num_walks,
        overlaps=overlaps,
    )


class Search(NamedTuple):
    """How candidates are walked: so many at once, in so many walks, holding so many bytes."""

    at_once: int
    num_walks: int
    num_bytes: int


def plan_search(survey: Survey, state_bytes: int, budget: int) -> Search:
    """Return how many candidates a walk takes whose hidden states are held twice: before a block,
    and after it, with the dense model's beside them."""
    most = max(survey.rounds, default=0)
    at_once = max(1, min(most, max(PROBE_ROOM, budget // 8) // max(1, state_bytes)))
    walks = sum(-(-num // at_once) for num in survey.rounds)
    return Search(at_once, walks, 2 * (at_once + 1) * state_bytes if most else 0)


class GateCost(NamedTuple):
    """What training gates costs: walks over the checkpoint, operations, bytes while a block or the
    head is differentiated, and those of hidden states, which are on the host."""

    num_walks: int
    flops: float
    num_bytes: int
    held_bytes: int


def plan_gates(
    shape: Shape, steps: int, num_samples: int, seq_len: int, itemsize: int, graph: int
) -> GateCost:
    """Return what so many steps cost; `graph` are the bytes that a block's forward keeps.

    A step walks forward, and back: a block's forward again, its gradient by what it was given, and
    by the linears that read units, about half of it. The dense model's last hidden states of all
    sequences are kept.
    """
    if not steps:
        return GateCost(0, 0.0, 0, 0)
    num_batches = min(steps, -(-num_samples // AT_ONCE))
    tokens = min(AT_ONCE, num_samples) * seq_len
    body, head = 2 * shape.linear_params * shape.num_blocks, 2 * shape.exit_params
    logits = min(LOGITS, seq_len * shape.vocab_size)
    return GateCost(
        num_walks=2 * steps + num_batches,
        flops=tokens * (steps * (3.5 * body + 3 * head) + num_batches * body),
        num_bytes=max(
            2 * shape.block_params * itemsize + graph,
            shape.exit_params * itemsize + 8 * 4 * logits,
        ),
        held_bytes=(shape.num_blocks + 1 + num_batches) * tokens * shape.hidden_size * itemsize,
    )


def micro_batch(
    shape: Shape,
    per_token: int,
    seq_len: int,
    num_samples: int,
    itemsize: int,
    budget: int,
    on_host: bool,
) -> int:
    """Return the sequences per micro-batch: on a host no more activations than half a block."""
    if on_host:
        room = max(ACTIVATIONS, shape.block_params * itemsize // 2)
    else:
        room = min(budget // 4, DEVICE_TOKENS * per_token)
    return max(1, min(num_samples, room // max(1, per_token * seq_len)))


def budgets(recipe: Recipe, device: torch.device) -> tuple[int, int]:
    """Return the bytes that host and device may hold; the same number where they are one."""
    import psutil
    import torch

    limits = {name: parse_size(size) for name, size in (recipe.max_memory or {}).items()}
    for name in limits:
        if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
            raise RecipeError(f"max_memory: {name!r} is no device. Type cpu, mps, cuda or cuda:0.")
    host = limits.get("cpu", int(psutil.virtual_memory().available * 0.9) + anonymous_bytes())
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        return host, limits.get(f"cuda:{device.index or 0}", limits.get("cuda", int(free * 0.9)))
    return host, host


def measure_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of a matrix product of typical size, measured in a few milliseconds."""
    import torch

    on_cpu = device.type == "cpu"  # where half precision may be slower than it is worth asking
    size = 1024 if on_cpu else 4096
    left = torch.ones(size, size, device=device, dtype=torch.float32 if on_cpu else dtype)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        left @ left
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 0.6 * 2 * size**3 / best  # attention, norms and copies take the rest


def _check(name: str, needed: int, budget: int) -> None:
    """Raise where a peak is above its budget."""
    if needed > budget:
        raise TooLarge(
            f"the run needs about {needed / 1e9:.2f} GB on {name}, where {budget / 1e9:.2f} GB may "
            "be used. Fewer --num-samples or a shorter --seq-len need less; --device cpu needs no "
            f"accelerator; --max-memory {name}=... raises a limit that was set."
        )
