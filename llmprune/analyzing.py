"""What pruning did to a model: a result walked beside the dense model that it was made from.

Legend: N windows, T tokens.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmprune.analysis import (
    alignment,
    concentrations,
    halfway,
    influences,
    noise,
    outstanding,
    positions,
    reach,
    worsened,
)
from llmprune.analysis.types import Finding, absent
from llmprune.analysis.walking import Seen, Side, walk_together
from llmprune.base.errors import CheckpointError, RecipeError
from llmprune.base.progress import Progress
from llmprune.base.registry import unknown
from llmprune.calibration.heldout import evaluation_text
from llmprune.calibration.selection import AUTO, DEMO, EVALUATION, evaluation_data, is_demo
from llmprune.checkpoint.locate import open_source
from llmprune.checkpoint.source import Source, read_json
from llmprune.delivery.heterogeneous import is_own_code
from llmprune.delivery.manifest import MANIFEST
from llmprune.delivery.masks import OWN, MaskFiles
from llmprune.engine.opening import (
    choose_device,
    choose_dtype,
    open_blocks,
    open_origin,
    read_tokenizer,
    storage_dtype,
)
from llmprune.engine.planning import sequence_length
from llmprune.evaluation.perplexity import loss_of_blocks, pose
from llmprune.pages.analysis_result import Analysis
from llmprune.recipe import build, default_steps

if TYPE_CHECKING:
    from torch import Tensor

    from llmprune.recipe import Recipe
    from llmprune.walk.block import Block
    from llmprune.walk.streamed import Streamed

ROOMS = (
    concentrations,
    outstanding,
    influences,
    alignment,
    positions,
    worsened,
    noise,
    reach,
    halfway,
)
TITLES = {room.NAME: room.TITLE for room in ROOMS}
PAIRED = frozenset({"cka", "kl", "worst"})  # need the dense model, and the same tokens
READING = frozenset({*PAIRED, "outliers", "influence"})  # walk the blocks with text
SEQ_LEN = 512


@dataclass(frozen=True, kw_only=True)
class _Model:
    """A model opened for walking, with its windows where text is read."""

    source: Source
    blocks: Streamed
    tokenizer: Any = None
    ids_NT: Tensor | None = None


def analyze(
    folder: str | PathLike[str],
    *,
    against: str | PathLike[str] | None = None,
    between: str | PathLike[str] | None = None,
    only: Sequence[str] | None = None,
    data: str | PathLike[str] = AUTO,
    num_windows: int = 8,
    seq_len: int | None = None,
    seed: int = 0,
    micro_batch: int = 1,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    quiet: bool = True,
) -> Analysis:
    """Look at what pruning did to a model; neither it nor the dense model is in memory whole.

    Args:
        folder: a result of llmprune, of any tier; another model's folder too.
        against: the dense model; by default the one that the result was made from.
        between: a second result, for the loss along the line between the two.
        only: some of pq, outliers, influence, cka, kl, worst, robustness, dead, between; all when
            absent.
        data: the text to read, as `perplexity` takes it.
        num_windows: windows from its start. seq_len: tokens in each; min(512, the model's maximum).
        seed: draws the slips of `robustness`.

    Raises:
        LlmpruneError: there is no such model, text, or analysis. What does not apply to a model is
            said in the finding instead.
    """
    names = chosen(only, between)
    _check_counts(num_windows, micro_batch)
    progress = Progress("quiet" if quiet else "rich")
    where = choose_device(device)
    pruned, wish = _open(folder, seq_len, where, dtype, trust_remote_code)
    dense, why = _dense(pruned, against, wish, where, dtype, trust_remote_code)
    length = seq_len or min(SEQ_LEN, sequence_length(wish, pruned.blocks.model.config))
    text, name = None, None
    if names & {*READING, "robustness", "between"}:
        name = _text_of(pruned.source, data)
        pruned = replace(pruned, tokenizer=read_tokenizer(pruned.source, wish))
        text = evaluation_text(name, key="data", tokenizer=pruned.tokenizer)
        pruned = _with_windows(pruned, text, name, length, num_windows)
        if dense is not None:
            dense = replace(dense, tokenizer=_tokenizer(dense.source, wish) or pruned.tokenizer)
            dense = _with_windows(dense, text, name, length, num_windows)
    found = _walked(names, pruned, dense, why, micro_batch, progress)
    if "robustness" in names:
        assert text is not None
        found["robustness"] = _robustness(pruned, dense, text, length, num_windows, seed)
    if "between" in names:
        if between is None:
            why_between = "two results are needed; name the second with --between DIR"
            found["between"] = absent("between", TITLES["between"], why_between)
        else:
            opened = _open(between, seq_len, where, dtype, trust_remote_code)[0]
            found["between"] = _line(pruned, opened, micro_batch)
    settings = {
        "against": dense.source.name if dense else None,
        "between": None if between is None else str(between),
        "data": name,
        "num_windows": None if pruned.ids_NT is None else len(pruned.ids_NT),
        "seq_len": None if pruned.ids_NT is None else length,
        "seed": seed,
        "dtype": str(pruned.blocks.dtype).removeprefix("torch."),
        "device": str(where),
    }
    return Analysis(
        model=pruned.source.name,
        settings=settings,
        findings={name: found[name] for name in TITLES if name in found},
        command=_command(str(folder), against, only, settings),
    )


def chosen(only: Sequence[str] | None, between: object = None) -> frozenset[str]:
    """Return the names of the analyses that are asked for.

    Raises:
        UnknownName: there is no such analysis.

    >>> sorted(chosen(["pq", "cka"]))
    ['cka', 'pq']
    """
    if only is None:
        return frozenset(TITLES) - (frozenset() if between is not None else {"between"})
    names = [only] if isinstance(only, str) else list(only)
    names = [part.strip() for name in names for part in name.split(",")]
    for name in names:
        if name not in TITLES:
            raise unknown("only", name, TITLES)
    return frozenset(names)


def default_folder(folder: str | PathLike[str]) -> Path:
    """Return where an analysis is kept: with a result; of other models in the working folder."""
    path = Path(folder).expanduser()
    if (path / OWN).is_dir():
        return path / OWN / "analysis"
    return Path(f"{Path(str(folder).rstrip('/')).name}-analysis")


def _check_counts(num_windows: int, micro_batch: int) -> None:
    for name, count in (("num_windows", num_windows), ("micro_batch", micro_batch)):
        if count < 1:
            raise RecipeError(f"{name}: {count} measures nothing. Give 1 or more.")


def _open(
    folder: str | PathLike[str],
    seq_len: int | None,
    device: torch.device,
    dtype: str,
    trust_remote_code: bool,
) -> tuple[_Model, Recipe]:
    """Open a model for walking, with the recipe that opens it."""
    source = open_source(str(folder))
    steps = default_steps()
    steps[0]["prune"] = {"sparsity": 0.5}  # which is not carried out
    wish = build(
        {
            "model": str(folder),
            "trust_remote_code": trust_remote_code or is_own_code(source.folder),
            "calibration": {"seq_len": seq_len},
            "steps": steps,
        }
    )
    kind = choose_dtype(dtype, storage_dtype(source), device)
    blocks = open_blocks(source, wish, device, kind)
    sequence_length(wish, blocks.model.config)
    return _Model(source=source, blocks=blocks), wish


def _dense(
    pruned: _Model,
    against: str | PathLike[str] | None,
    wish: Recipe,
    device: torch.device,
    dtype: str,
    trust_remote_code: bool,
) -> tuple[_Model | None, str]:
    """Return the dense model, or why there is none."""
    if against is not None:
        return _open(against, None, device, dtype, trust_remote_code)[0], ""
    found = open_origin(pruned.source, wish, pruned.blocks.dtype)
    if found is not None:
        blocks = replace(found, device=device)
        return _Model(source=found.source, blocks=blocks), ""
    if (pruned.source.folder / OWN / "run.json").exists():
        why = "the dense model is not where it was, or is another now; name it with --against"
    else:
        why = "this is no result of llmprune, which would name its dense model; use --against"
    return None, why


def _tokenizer(source: Source, wish: Recipe) -> Any:
    """Return the tokenizer of a source, None where it has none."""
    try:
        return read_tokenizer(source, wish)
    except CheckpointError:
        return None


def _text_of(source: Source, data: str | PathLike[str]) -> str:
    """Return the name of the text: what is asked for, or what `auto` means for this model."""
    if str(data) != AUTO:
        return str(data)
    record = source.folder / OWN / "run.json"
    if record.exists():
        return evaluation_data(build(read_json(record)["wish"]))
    return DEMO if source.name == DEMO or is_demo(str(source.folder)) else EVALUATION


def _with_windows(model: _Model, text: str, data: str, seq_len: int, num_windows: int) -> _Model:
    """Return a model with its windows of a text."""
    question = pose(text, model.tokenizer, data=data, seq_len=seq_len, num_windows=num_windows)
    return replace(model, ids_NT=question.windows.inputs_NT)


def _numbers(pruned: _Model, dense: _Model | None) -> tuple[list[int], bool]:
    """Return the dense number of each block, and whether that is certain."""
    own = list(range(len(pruned.blocks)))
    path = pruned.source.folder / MANIFEST
    if dense is None:
        return own, True
    if path.exists():
        made = read_json(path)
        rows = [row["source_block"] for row in made["blocks"]]
        if made["base"].get("fingerprint") == dense.source.fingerprint() and len(rows) == len(own):
            return rows, True
    return own, len(own) == len(dense.blocks)


def _walked(
    names: frozenset[str],
    pruned: _Model,
    dense: _Model | None,
    why: str,
    micro_batch: int,
    progress: Progress,
) -> dict[str, Finding]:
    """Return the findings of one walk through both models, and why others are not there."""
    numbers, certain = _numbers(pruned, dense)
    missing = _missing(names, pruned, dense, why, certain=certain)
    wanted = names - missing.keys()
    found = {name: absent(name, TITLES[name], reason) for name, reason in missing.items()}
    if not wanted & {*READING, "pq", "dead"}:
        return found
    reads = bool(wanted & READING)
    sides = [
        Side(
            blocks=model.blocks,
            ids_NT=model.ids_NT if reads else None,
            numbers=own,
            masks=masks,
        )
        for model, own, masks in (
            (pruned, numbers, _masks_of(pruned)),
            *([(dense, range(len(dense.blocks)), lambda block: {})] if dense else []),
        )
    ]
    beside = sides[1] if len(sides) > 1 and (certain or wanted & PAIRED) else None
    total = len((beside or sides[0]).numbers)
    with progress.stage("analyze", total) as stage:
        seen = walk_together(
            *(sides[0], beside, wanted), micro_batch=micro_batch, passed=stage.advance
        )
    return found | _findings(wanted, seen, pruned, certain=certain)


def _findings(
    wanted: frozenset[str], seen: Seen, model: _Model, *, certain: bool
) -> dict[str, Finding]:
    """Return what was seen in a walk as findings."""
    new, old = seen.pruned, seen.dense
    found = {}
    if "pq" in wanted:
        dense = old.concentrations if certain else []
        found["pq"] = concentrations.concentration_finding(new.concentrations, dense)
    if "outliers" in wanted:
        shares = old.outliers if certain else {}
        found["outliers"] = outstanding.outlier_finding(new.outliers, shares)
    if "influence" in wanted:
        before = old.influences if certain else {}
        found["influence"] = influences.influence_finding(new.influences, before)
    if "cka" in wanted:
        found["cka"] = alignment.alignment_finding(seen.alignment)
    if "dead" in wanted:
        found["dead"] = reach.reach_finding(new.dead, new.reach)
    if seen.predictions is not None and model.ids_NT is not None:
        if "kl" in wanted:
            found["kl"] = positions.position_finding(seen.predictions)
        if "worst" in wanted:
            ids = model.ids_NT
            found["worst"] = worsened.worst_finding(seen.predictions, ids, model.tokenizer)
    return found


def _missing(
    names: frozenset[str], pruned: _Model, dense: _Model | None, why: str, *, certain: bool
) -> dict[str, str]:
    """Return the analyses that cannot be made, with the reason."""
    missing: dict[str, str] = {}
    for name in sorted(names & PAIRED):
        if dense is None:
            missing[name] = why
        elif not _same_tokens(pruned, dense):
            missing[name] = (
                "the two models have other tokens, so there are no pairs to compare; llmprune eval "
                "--rolling measures both by byte"
            )
        elif name == "cka" and not certain:
            missing[name] = (
                f"which of the {len(dense.blocks)} dense blocks the {len(pruned.blocks)} here "
                "were, nothing says; the result's own source, by --against, may tell"
            )
    if {"kl", "worst"} & names - missing.keys() and dense is not None:
        sizes = [side.blocks.model.config.get_text_config().vocab_size for side in (pruned, dense)]
        if sizes[0] != sizes[1]:
            reason = f"the vocabularies have {sizes[0]} and {sizes[1]} entries"
            missing |= {name: reason for name in {"kl", "worst"} & names}
    return missing


def _same_tokens(pruned: _Model, dense: _Model) -> bool:
    """Tell whether both models read the same windows."""
    one, other = pruned.ids_NT, dense.ids_NT
    return one is not None and other is not None and torch.equal(one, other)


def _masks_of(model: _Model) -> Any:
    """Return a function that gives a block's stored masks, of linears whose size they have."""
    files = MaskFiles(model.source.folder)

    def masks(block: Block) -> dict[str, Tensor]:
        found = {
            name.removeprefix(block.prefix): keep_OI
            for name, keep_OI in files.of_block(block.prefix).items()
        }
        linears = block.anatomy.linears
        return {
            name: keep_OI.to(block.device)
            for name, keep_OI in found.items()
            if name in linears and tuple(keep_OI.shape) == linears[name].shape
        }

    return masks


def _robustness(
    pruned: _Model, dense: _Model | None, text: str, seq_len: int, num_windows: int, seed: int
) -> Finding:
    """Measure both models on the same text at every rate of slips, in one walk each."""
    assert pruned.ids_NT is not None
    same = dense is not None and _same_tokens(pruned, dense)
    room = 4 * sum(len(pruned.tokenizer.decode(row)) for row in pruned.ids_NT.tolist())
    texts = [noise.noised(text[:room], rate, seed) for rate in noise.RATES]
    windows = [
        pose(
            each, pruned.tokenizer, data="data", seq_len=seq_len, num_windows=num_windows
        ).windows.inputs_NT
        for each in texts
    ]
    counts = [len(each) for each in windows]
    found = [
        noise.perplexities(noise.losses(side.blocks, torch.cat(windows), 1), counts, seq_len)
        for side in (pruned, *([dense] if same and dense else []))
    ]
    return noise.noise_finding(found[0], found[1] if len(found) > 1 else None)


def _line(one: _Model, other: _Model, micro_batch: int) -> Finding:
    """Measure the loss along the line between two results."""
    title = TITLES["between"]
    if (why := halfway.why_not(one.blocks, other.blocks)) is not None:
        return absent("between", title, why)
    assert one.ids_NT is not None
    losses = []
    for t in halfway.POINTS:
        blend = halfway.Blend(one=one.blocks, other=other.blocks, t=t)
        nats, count = loss_of_blocks(blend, one.ids_NT, micro_batch=micro_batch)
        losses.append(nats / count)
    names = (Path(one.source.name).name, Path(other.source.name).name)
    return halfway.between_finding(losses, _shared(one, other), names=names)


def _shared(one: _Model, other: _Model) -> float | None:
    """Return which share of the weights that either mask removed both removed."""
    both = either = 0
    for index in range(len(one.blocks)):
        prefix = one.blocks.skeleton.prefix(index)
        masks = [MaskFiles(side.source.folder).of_block(prefix) for side in (one, other)]
        for name in masks[0].keys() & masks[1].keys():
            first, second = masks[0][name], masks[1][name]
            if first.shape == second.shape:
                both += int((~first & ~second).sum())
                either += int((~first | ~second).sum())
    return both / either if either else None


def _command(
    folder: str,
    against: str | PathLike[str] | None,
    only: Sequence[str] | None,
    settings: Mapping[str, Any],
) -> str:
    """Return the command that makes an analysis again."""
    words = ["llmprune", "analyze", folder]
    flags = {
        "--against": against,
        "--between": settings["between"],
        "--only": None if only is None else only if isinstance(only, str) else ",".join(only),
        "--data": settings["data"],
        "--num-windows": settings["num_windows"],
        "--seq-len": settings["seq_len"],
        "--seed": settings["seed"],
    }
    for flag, value in flags.items():
        words += [] if value is None else [flag, str(value)]
    return shlex.join(words)
