"""A delta from beginning to end: two checkpoints in, a sparse difference out, and back again."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmprune import __version__
from llmprune.arch.limits import longest_sequence
from llmprune.base.errors import RecipeError
from llmprune.base.progress import Progress, human_bytes
from llmprune.calibration.mix import read_windows
from llmprune.checkpoint.locate import open_source
from llmprune.checkpoint.sink import check_links, copy_side_files, settle, write_json
from llmprune.checkpoint.source import Source, check_free_space, open_folder
from llmprune.delivery.gate import Verdict, gate_tokens, pass_gate
from llmprune.delivery.masks import OWN
from llmprune.engine.opening import read_tokenizer
from llmprune.engine.records import check_out
from llmprune.recovery.delta_plan import ANALYTIC, DeltaPlan, q_number
from llmprune.recovery.deltas import DELTA_METHODS, open_entries
from llmprune.recovery.differences import (
    FORMAT,
    LIST,
    Delta,
    DeltaWriter,
    base_fingerprint,
    content_hash,
    copy_records,
    encode,
    is_delta,
    open_delta,
    write_rebuilt,
)
from llmprune.recovery.pairs import Pair
from llmprune.recovery.rescaling import Rescaling, find_rescaling
from llmprune.walk.forward import embed, logits, walk
from llmprune.walk.streamed import stream

if TYPE_CHECKING:
    from torch import Tensor

TOKENS = 128  # in each row of calibration text that q is looked for on
REBUILT = "delta.json"  # in what llmprune wrote beside a rebuilt checkpoint: what it was made of


@dataclass(frozen=True, kw_only=True)
class Made:
    """What a delta holds and costs.

    `changed` entries of pruned tensors differ from the base, `kept` of them stay. `logit_change` is
    the largest difference over the largest logit, on the gate's tokens; None where not measured.
    """

    folder: str
    base: str
    method: str
    sparsity: float
    rescaling: Mapping[str, Any]
    model_bytes: int
    delta_bytes: int
    whole_bytes: int
    num_pruned: int
    num_whole: int
    num_same: int
    changed: int
    kept: int
    logit_change: float | None = None

    def text(self) -> str:
        """Return what was saved and what it costs as sentences."""
        share = self.kept / self.changed if self.changed else 1.0
        lines = [
            f"{self.folder}: {human_bytes(self.delta_bytes)} instead of "
            f"{human_bytes(self.model_bytes)} ({self.delta_bytes / self.model_bytes:.1%}), to be "
            f"added to {self.base}",
            f"{self.kept:,} of {self.changed:,} differences kept ({share:.1%}) in "
            f"{self.num_pruned} tensors; {self.num_whole} others differ and are kept whole "
            f"({human_bytes(self.whole_bytes)}); {self.num_same} are the base's",
        ]
        if (q := self.rescaling.get("q")) is not None:
            numbers = [q] if isinstance(q, float) else sorted(q.values())
            several = f" to {numbers[-1]:.4g}, a number for each tensor" if numbers[1:] else ""
            lines.append(f"what is kept was divided by q = {numbers[0]:.4g}{several}")
        if self.logit_change is not None:
            lines.append(
                "rebuilt, read back and found to be the same; logits change by at most "
                f"{self.logit_change:.1e} of the largest against the fine-tuned model"
            )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class _Tally:
    """Counts while tensors are written."""

    tensors: dict[str, dict[str, Any]] = field(default_factory=dict)
    counts: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(
            ("num_pruned", "num_whole", "num_same", "whole_bytes", "changed", "kept"), 0
        )
    )


def make_delta(
    plan: DeltaPlan, out: Path, progress: Progress, *, prove: bool = True, overwrite: bool = False
) -> Made:
    """Write the pruned difference to a new folder; `prove` rebuilds the checkpoint once, beside it.

    `overwrite` lets it replace another delta.

    Raises:
        RecipeError: `out` holds something, or text cannot be read.
        CheckpointError: what was rebuilt is not what was to be. NumericalError: values overflow.
    """
    pair = plan.pair
    for kept in (pair.tuned.folder, pair.base.folder):
        _check_new(out, kept, overwrite=overwrite, ours=is_delta(out), what="a delta")
    check_links(pair.tuned.folder)
    check_free_space(out.parent, (1 + prove) * pair.tuned.num_bytes, "the delta")
    if plan.left_out:
        progress.note(f"left out, for the model does not read it: {', '.join(plan.left_out)}")
    rescaling = _rescaling(plan, progress)
    with _new_folder(out) as scratch:
        copy_side_files(pair.tuned.folder, scratch)
        tally = _write_tensors(pair, rescaling, scratch, progress)
        masks = copy_records(pair.tuned.folder, pair.base.folder, scratch)
        data = _listed(plan, rescaling, tally, masks)
        write_json(scratch / LIST, data)
        change = None
        if prove:
            with progress.stage("prove", 1) as stage:
                change = _proven(plan, Delta(folder=scratch, data=data))
                stage.advance("rebuilt and read back", change=change)
        size = sum(path.stat().st_size for path in scratch.rglob("*.safetensors"))
    return Made(
        folder=str(out),
        base=pair.base.name,
        method=pair.method,
        sparsity=pair.sparsity,
        rescaling=data["rescaling"],
        model_bytes=sum(pair.tuned.entries[name].num_bytes for name in pair.names),
        delta_bytes=size,
        logit_change=change,
        **tally.counts,
    )


def rebuild(
    folder: Path,
    out: Path,
    *,
    base: str | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> Verdict:
    """Write the checkpoint that a delta and its base make, and prove that it loads the stock way.

    Without `base` it is the one that the delta names. `overwrite` replaces a rebuilt checkpoint.

    Raises:
        RecipeError: `out` holds something. CheckpointError: it is another base, or a damaged delta.
        WontLoad: it does not load, or computes something else.
    """
    delta = open_delta(folder)
    check_links(folder)
    source = _base_of(delta, base)
    ours = (out / OWN / REBUILT).is_file()
    for kept in (folder, source.folder):
        _check_new(out, kept, overwrite=overwrite, ours=ours, what="a rebuilt checkpoint")
    check_free_space(out.parent, source.num_bytes, "the checkpoint")
    with _new_folder(out) as scratch:
        write_rebuilt(delta, source, scratch)
        told = {key: value for key, value in delta.data.items() if key != "tensors"}
        write_json(scratch / OWN / REBUILT, {"delta": str(folder.resolve()), **told})
        verdict = pass_gate(
            scratch,
            device=torch.device("cpu"),
            dtype=torch.float32,
            trust_remote_code=trust_remote_code,
        )
    return replace(verdict, folder=str(out))


def _check_new(out: Path, source: Path, *, overwrite: bool, ours: bool, what: str) -> None:
    """Check that a folder may be written, and that nothing of another kind is replaced."""
    check_out(out, source, overwrite=overwrite)
    if out.exists() and any(out.iterdir()) and not ours:
        raise RecipeError(
            f"out: {out} is not {what}, and --overwrite replaces nothing else. Choose another "
            "folder."
        )


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """Open a folder beside `out` that gets its name at the end, and none if something fails."""
    scratch = out.with_name(f".{out.name}.writing-{os.getpid()}")
    aside = out.with_name(f".{out.name}.replaced-{os.getpid()}")
    try:
        scratch.mkdir(parents=True)
        yield scratch
        if out.exists():
            os.replace(out, aside)
        os.replace(scratch, out)
        settle(out.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.rmtree(aside, ignore_errors=True)


def _rescaling(plan: DeltaPlan, progress: Progress) -> Rescaling | None:
    """Return what survivors are divided by, looked for where it is not given."""
    wish = plan.wish
    if not DELTA_METHODS[wish.method].searches:
        return None
    if (number := q_number(wish.q)) is not None:
        return Rescaling(q=number)
    tokens = _tokens(plan, progress)
    with progress.stage("q", len(plan.blocks)) as stage:
        analytic = wish.q == ANALYTIC
        return find_rescaling(plan.pair, plan.blocks, tokens, analytic=analytic, stage=stage)


def _tokens(plan: DeltaPlan, progress: Progress) -> Tensor:
    """Return one batch (N, T) of calibration tokens."""
    longest = longest_sequence(plan.blocks.model.config) or TOKENS
    tokenizer = read_tokenizer(plan.pair.tuned, plan.recipe)
    found = read_windows(plan.recipe, tokenizer, seq_len=min(TOKENS, longest))
    for notice in found.notices:
        progress.note(notice)
    return found.tokens


def _write_tensors(
    pair: Pair, rescaling: Rescaling | None, folder: Path, progress: Progress
) -> _Tally:
    """Write what differs from the base, one tensor in memory at a time."""
    writer, tally = DeltaWriter(folder=folder), _Tally()
    with progress.stage("delta", len(pair.names)) as stage:
        for name in pair.names:
            tuned, base = pair.read(name)
            value = tuned
            if name in pair.eligible:
                keep = pair.keep(name, tuned, base)
                q = None if rescaling is None else rescaling.of(name)
                value = pair.pruned(name, tuned, base, keep, q)
                tally.counts["changed"] += int(open_entries(tuned, base).sum())
                tally.counts["kept"] += int(keep.sum())
            parts = encode(value, base)
            kind = "pruned" if name in pair.eligible else "whole"
            tally.counts[f"num_{kind if parts else 'same'}"] += 1
            if kind == "whole":
                tally.counts["whole_bytes"] += sum(part.nbytes for part in parts.values())
            tally.tensors[name] = {
                "dtype": str(value.dtype).removeprefix("torch."),
                "shape": list(value.shape),
                "sha256": content_hash(value),
                "file": writer.add(name, parts),
            }
            stage.advance(name)
    writer.flush()
    return tally


def _listed(
    plan: DeltaPlan, rescaling: Rescaling | None, tally: _Tally, masks: Mapping[str, str]
) -> dict[str, Any]:
    """Return what `delta.json` holds."""
    base = plan.pair.base
    return {
        "format": FORMAT,
        "llmprune": __version__,
        "model": plan.pair.tuned.name,
        "base": {
            "name": base.name,
            "folder": str(base.folder.resolve()),
            "revision": base.revision,
            "fingerprint": base_fingerprint(base),
        },
        "method": plan.wish.method,
        "sparsity": plan.wish.sparsity,
        "seed": plan.wish.seed,
        "rescaling": {} if rescaling is None else _plain(rescaling),
        "counts": tally.counts,
        "masks": dict(masks),
        "tensors": tally.tensors,
    }


def _plain(rescaling: Rescaling) -> dict[str, Any]:
    """Return a rescaling as JSON holds it; what overflowed is left out."""
    tried = {f"{label:g}": value for label, value in rescaling.tried.items() if value < torch.inf}
    return asdict(rescaling) | {"tried": tried}


def _base_of(delta: Delta, given: str | None) -> Source:
    """Open the base of a delta.

    Raises:
        CheckpointError: it is not there. RecipeError: it is another model.
    """
    listed = delta.data["base"]
    source = _listed_base(listed) if given is None else open_source(given)
    if base_fingerprint(source) != listed["fingerprint"]:
        raise RecipeError(
            f"base: {source.name} is not the model that {delta.folder} was made against, which was "
            f"{listed['name']}, unchanged. Give that one with --base."
        )
    return source


def _listed_base(listed: Mapping[str, Any]) -> Source:
    """Open the base that a delta names."""
    if listed["revision"] is None and listed["name"] != "demo":
        folder = Path(listed["folder"])
        if not folder.is_dir():
            raise RecipeError(
                f"base: {folder} is gone, and the delta is of no use without it. Say where the "
                "base is now with --base."
            )
        return open_folder(folder)
    return open_source(listed["name"], revision=listed["revision"])


def _proven(plan: DeltaPlan, delta: Delta) -> float:
    """Rebuild the checkpoint in a temporary place; return the largest relative change of logits."""
    scratch = delta.folder / ".rebuilt"
    try:
        write_rebuilt(delta, plan.pair.base, scratch)
        tokens = gate_tokens(plan.blocks.model.config)
        theirs = _logits(plan, plan.pair.tuned, tokens)
        ours = _logits(plan, open_folder(scratch), tokens)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return float((ours - theirs).abs().max() / theirs.abs().max())


def _logits(plan: DeltaPlan, source: Source, tokens_NT: Tensor) -> Tensor:
    """Return the logits (N, T, V) of a checkpoint of this shape, computed in float32."""
    skeleton = plan.blocks.skeleton
    blocks = stream(source, skeleton, device=plan.blocks.device, dtype=torch.float32)
    flow = embed(blocks, tokens_NT, len(tokens_NT))
    walk(blocks, flow)
    return torch.cat([part.float().cpu() for _, _, part in logits(blocks, flow)], 1)
