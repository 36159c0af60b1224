"""What a plan costs, in lines: texts, surveys, walks, reads, memory, disk, time, measuring."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmprune.base.progress import human_bytes, human_seconds
from llmprune.base.world import processes_here
from llmprune.calibration import on_policy
from llmprune.calibration.on_policy import CHATS, manner_of
from llmprune.calibration.selection import (
    CALIBRATION,
    DEMO,
    calibration_texts,
    evaluation_data,
    name_of,
    place_of,
)
from llmprune.engine import gates
from llmprune.engine.cost import LIBRARIES
from llmprune.recipe.texts import ON_POLICY

if TYPE_CHECKING:
    from llmprune.engine.collected import Collected
    from llmprune.engine.plan import Plan

BANDWIDTHS = {"cpu": 1e10, "mps": 1e11, "cuda": 1e12}  # bytes per second, by order of magnitude


def cost_lines(plan: Plan) -> list[tuple[str, str]]:
    """Return what a run reads, holds and takes, each with its name; empty where it does not."""
    return [
        ("text", _text(plan)),
        ("gradients", _gradients(plan)),
        ("gates", _gates(plan)),
        ("probes", _probes(plan)),
        ("walks", _walks(plan)),
        ("reads", _reads(plan)),
        ("memory", _memory(plan)),
        ("disk", _disk(plan)),
        ("time", _time(plan)),
        ("resume", _resume(plan)),
        ("perplexity", _perplexity(plan)),
    ]


def _text(plan: Plan) -> str:
    """Return which texts will be read; nothing is fetched to say so."""
    names = []
    if plan.forward:
        texts = calibration_texts(plan.recipe)
        hub = _hub([text.data for text in texts])
        name = writing_text(plan) if _is_written(plan) else name_of(texts) + hub
        names.append(f"calibration on {name}")
    if plan.given is not None:
        names.append(_given(plan.given))
    if plan.eval_windows:
        data = evaluation_data(plan.recipe)
        names.append(f"perplexity on {data}{_hub([data])}")
    return ", ".join(names) or "none is read"


def _given(given: Collected) -> str:
    """Return which statistics stand in place of a text."""
    texts = len(given.record["texts"])
    return (
        f"none for calibration: statistics {', '.join(given.record['statistics'])} of "
        f"{given.num_tokens:,} tokens in {texts} text{'' if texts == 1 else 's'}, from "
        f"{given.folder} ({given.hash[:12]})"
    )


def _is_written(plan: Plan) -> bool:
    return plan.recipe.calibration.data == ON_POLICY


def writing_text(plan: Plan) -> str:
    """Return what the model is to write for itself, and roughly how long that takes."""
    wish = plan.recipe.calibration
    manner = manner_of(plan.recipe, chats=False)
    prompts = manner.prompts
    if wish.prompts is None and prompts != DEMO:
        prompts = f"{CHATS} with a chat template, else {CALIBRATION}"
    tokens = plan.num_samples * plan.seq_len
    size = plan.num_params * plan.dtype.itemsize
    reading = tokens / on_policy.AT_ONCE * size / BANDWIDTHS.get(plan.device.type, 1e10)
    seconds = max(plan.estimate.cut_seconds, reading)  # each new token reads all weights
    return (
        f"{ON_POLICY} text: {tokens:,} tokens, prompts ({prompts}) with up to "
        f"{manner.max_new_tokens} new ones each at temperature {manner.temperature:g}, the model "
        f"in memory whole ({human_bytes(size)}); roughly {human_seconds(seconds)}"
    )


def _hub(names: list[str]) -> str:
    return " (on the Hub)" if any(place_of(name) in ("preset", "hub") for name in names) else ""


def _gradients(plan: Plan) -> str:
    """Return how gradients of the loss are collected, where any are needed."""
    if not plan.parts.backward:
        return ""
    cost = plan.estimate
    return (
        f"{', '.join(plan.parts.backward)} of {plan.num_samples} sequences, blocks in reverse, one "
        f"in memory; their inputs on {cost.gradient_place} ({human_bytes(cost.gradient_bytes)})"
    )


def _gates(plan: Plan) -> str:
    """Return how gates of units are learnt, where any are."""
    if not plan.parts.gates:
        return ""
    sequences = min(gates.AT_ONCE, plan.num_samples)
    return (
        f"learnt in {plan.parts.gates} steps of {sequences} sequences, which walk the model "
        "forward and back, one block in memory"
    )


def _probes(plan: Plan) -> str:
    """Return how many candidates are compared with the dense model."""
    cost = plan.estimate
    if not cost.num_candidates:
        return ""
    return (
        f"at most {cost.num_candidates:,} candidates compared with the dense model, "
        f"{cost.probe_at_once} in a walk"
    )


def _walks(plan: Plan) -> str:
    cost = plan.estimate
    if not plan.parts.walks:
        survey = f"{cost.num_reads - 1} to survey, then " if cost.num_reads > 1 else ""
        learnt = "statistics are given" if plan.parts.given else "no calibration"
        return f"{survey}1 over the weights; no forward, {learnt}"
    tokens = f"{plan.num_samples} x {plan.seq_len} tokens"
    if not plan.parts.cut_walks:
        where = f"{plan.dtype_name} on {plan.device}"
        return f"those of the survey, of {tokens}, {where}; then 1 over the weights"
    then = "passed" if plan.whole is None else "passed (and 1 over the weights)"
    return (
        f"1 forward, each block observed then {then}: "
        f"{tokens} in micro-batches of {cost.micro_batch}, "
        f"{plan.dtype_name} on {plan.device}, "
        f"hidden states on {cost.place} ({human_bytes(cost.hidden_bytes)})"
    )


def _reads(plan: Plan) -> str:
    times = plan.estimate.num_reads
    often = {1: "once", 2: "twice, once of it for the survey"}.get(
        times, f"at most {times} times, all but one for the survey"
    )
    size = human_bytes(plan.estimate.read_bytes)
    beside = (
        "blocks ahead, shards written beside the next block"
        if plan.estimate.overlaps
        else "nothing ahead: no room for a block more"
    )
    return f"the checkpoint {often} ({size}), and again for the proof; {beside}"


def _memory(plan: Plan) -> str:
    host, device = plan.estimate.host_peak, plan.estimate.device_peak
    return (
        f"{human_bytes(host)} on the host, {human_bytes(LIBRARIES)} of them the libraries"
        + (f"; {human_bytes(device)} on {plan.device}" if device else "")
        + _times(plan)
    )


def _times(plan: Plan) -> str:
    """Return how often that is taken up where several processes run on this computer."""
    here = processes_here()
    return f"; that in each of the {here} processes here" if here > 1 else ""


def _disk(plan: Plan) -> str:
    disk, out = plan.estimate.disk_bytes, plan.estimate.out_bytes
    return f"{human_bytes(disk)} ({human_bytes(out)} of them the result)"


def _time(plan: Plan) -> str:
    cost = plan.estimate
    survey = f"{human_seconds(cost.survey_seconds)} to survey, " if cost.survey_seconds else ""
    return f"about {survey}{human_seconds(cost.cut_seconds)} to cut"


def _resume(plan: Plan) -> str:
    if plan.whole is not None:
        return "what was learnt of the text and finished shards are kept"
    if not plan.parts.cut_walks:
        return "finished blocks are kept"
    seconds = human_seconds(plan.estimate.resume_seconds)
    return f"finished blocks are kept; at most {seconds} to walk through them"


def _perplexity(plan: Plan) -> str:
    if not plan.eval_windows:
        return f"not measured; ask with: llmprune eval {plan.out or 'OUT'} --perplexity demo"
    per = "per byte, " if plan.whole is not None and plan.whole.is_vocabulary else ""
    return (
        f"{per}dense and pruned, {plan.eval_windows} windows of {plan.seq_len} tokens, about "
        f"{human_seconds(plan.estimate.evaluate_seconds)}"
    )
