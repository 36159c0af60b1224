"""Statistics of a dense model as a folder: collected from a text, merged with those of others.

What was collected apart, of other parts of a text or on other computers, adds up; no text travels.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmprune import __version__
from llmprune.base.errors import RecipeError
from llmprune.base.progress import Progress
from llmprune.base.world import num_processes
from llmprune.checkpoint.sink import hash_file, write_json, write_tensors
from llmprune.checkpoint.source import check_free_space
from llmprune.engine.calibrating import check_tokens, run_text
from llmprune.engine.collected import (
    INDEX,
    Collected,
    block_file,
    check_additive,
    read_collected,
)
from llmprune.engine.opening import Opened, open_plan
from llmprune.engine.records import Records, check_out
from llmprune.stats.keeping import stored
from llmprune.walk.forward import embed
from llmprune.walk.observation import Sums, in_rounds, observe, statistics_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from llmprune.engine.parts import Needs
    from llmprune.recipe import Recipe

SAME = ("dtype", "attention", "statistics", "blocks")


def collect(
    recipe: Recipe,
    out: Path,
    progress: Progress,
    *,
    tokens: Tensor | None = None,
    names: Sequence[str] | None = None,
) -> Collected:
    """Write the statistics that a recipe's method learns of its text, all of the dense model.

    `tokens` (N, T) int64 take the place of the recipe's text, and `names` of statistics that of
    what its method learns.

    Raises:
        LlmpruneError: the method learns more than sums, or text or model cannot be read; nothing is
            written.
    """
    if num_processes() > 1:
        raise RecipeError(
            "stats: collects in one process. Start one for each part of the text, with an --out of "
            "its own, and add what they wrote: llmprune stats merge A B --out DIR."
        )
    opened = open_plan(recipe)
    plan = opened.plan
    check_additive(plan.parts, plan.method.name)
    check_out(out, opened.source.folder, overwrite=False)
    text = run_text(opened, Records(out=out), progress, before=None, finished=False, given=tokens)
    assert text.tokens is not None
    check_tokens(text.tokens, opened.blocks.model.config)
    found = names_of(plan.parts) if names is None else tuple(names)
    check_free_space(out, collected_bytes(opened, found), "the statistics")
    with _whole(out) as folder:
        blocks = _collect_blocks(opened, text.tokens, found, folder, progress)
        record = {
            "llmprune": __version__,
            "model": {"name": opened.source.name, "fingerprint": opened.source.fingerprint()},
            "dtype": plan.dtype_name,
            "attention": opened.blocks.model.config._attn_implementation,
            "statistics": list(found),
            "blocks": blocks,
            "texts": [{"tokens": text.hash, "num_tokens": text.tokens.numel()}],
        }
        _seal(folder, record)
    return read_collected(out)


def names_of(parts: Needs) -> tuple[str, ...]:
    """Return the statistics of taps that a run learns while blocks are cut."""
    return tuple(dict.fromkeys((*parts.cut, *parts.around)))


def collected_bytes(opened: Opened, names: tuple[str, ...]) -> int:
    """Return how large a folder of these statistics is."""
    anatomies = [opened.blocks.anatomy(index) for index in range(len(opened.blocks))]
    return sum(statistics_bytes(one, {tap.name: names for tap in one.taps}) for one in anatomies)


def merge(folders: Sequence[Path], out: Path) -> Collected:
    """Write the sum of several folders of statistics, added in the order given.

    Raises:
        RecipeError: they are of different models, taps, dtypes or statistics, or one text is in two
            of them; nothing is written.
    """
    parts = [read_collected(folder, key="stats") for folder in folders]
    if len(parts) < 2:
        raise RecipeError("stats: one folder alone is merged already. Give two or more.")
    for other in parts[1:]:
        _check_same(parts[0], other)
    _check_texts(parts)
    check_out(out, None, overwrite=False)
    with _whole(out) as folder:
        for index in range(len(parts[0].record["blocks"])):
            sums = _verified(parts[0], index)
            for other in parts[1:]:
                for tap, found in _verified(other, index).items():
                    for name, accumulator in found.items():
                        sums[tap][name].merge(accumulator)
            _write_block(folder, index, sums)
        texts = [text for part in parts for text in part.record["texts"]]
        _seal(folder, {**parts[0].record, "texts": texts})
    return read_collected(out)


def _collect_blocks(
    opened: Opened, tokens_NT: Tensor, names: tuple[str, ...], folder: Path, progress: Progress
) -> list[dict[str, int]]:
    """Write every block's sums, each block fed by its dense predecessors; return taps and widths.

    A block whose statistics do not fit at once is observed in rounds.
    """
    plan, found = opened.plan, []
    room = plan.estimate.statistics_bytes
    stream = embed(
        *(opened.blocks, tokens_NT, plan.estimate.micro_batch),
        place=plan.estimate.place,
        folder=folder / "hidden" if plan.estimate.place == "disk" else None,
    )
    with progress.stage("collect", len(opened.blocks)) as stage:
        for index in range(len(opened.blocks)):
            sums: dict[str, dict[str, Any]] = {}
            with opened.blocks.open(index) as block:
                needs = {tap.name: names for tap in block.anatomy.taps}
                rounds = in_rounds(block.anatomy, needs, room)
                for part in rounds:
                    taken = Sums(part)
                    observe(block, stream, part, dense=part is rounds[-1], sums=taken)
                    sums |= taken.by_tap()
                linears = block.anatomy.linears
                taps = {t.name: linears[t.readers[0]].shape[1] for t in block.anatomy.taps}
            _write_block(folder, index, sums)
            found.append(taps)
            stage.advance(f"block {index}")
    stream.hidden.close()
    shutil.rmtree(folder / "hidden", ignore_errors=True)
    return found


def _write_block(folder: Path, index: int, sums: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the sums of a block's taps."""
    tensors = {
        f"{tap}/{name}/{key}": value
        for tap, found in sums.items()
        for name, accumulator in found.items()
        for key, value in stored(accumulator).items()
    }
    write_tensors(folder / block_file(index), tensors)


def _seal(folder: Path, record: Mapping[str, Any]) -> None:
    """Write the record of a folder, with the hashes of its files."""
    names = [block_file(index) for index in range(len(record["blocks"]))]
    files = {name: hash_file(folder / name) for name in names}
    write_json(folder / INDEX, {**record, "files": files})


def _verified(part: Collected, index: int) -> dict[str, dict[str, Any]]:
    """Return the accumulators of a block, of a file that is what was written."""
    import torch

    part.of_block(index, torch.device("cpu"))  # raises where it is not
    return part.sums(index)


def _check_same(first: Collected, other: Collected) -> None:
    """Check that two folders can be added.

    Raises:
        RecipeError: they differ; says in what.
    """
    ours, theirs = first.record, other.record
    one, another = ours["model"], theirs["model"]
    if one["fingerprint"] != another["fingerprint"]:
        raise RecipeError(
            f"stats: {first.folder} is of {one['name']} and {other.folder} of {another['name']}, "
            "whose weights differ. Only statistics of one model add up."
        )
    for key in SAME:
        if ours.get(key) != theirs.get(key):
            shown = "" if key == "blocks" else f": {ours.get(key)!r} and {theirs.get(key)!r}"
            what = "taps" if key == "blocks" else key
            raise RecipeError(
                f"stats: {first.folder} and {other.folder} differ in {what}{shown}. Collect both "
                "with the same --for, --dtype and settings."
            )


def _check_texts(parts: Sequence[Collected]) -> None:
    """Check that no text would count twice.

    Raises:
        RecipeError: the same tokens are in two folders.
    """
    holders: dict[str, Path] = {}
    for part in parts:
        for text in part.record["texts"]:
            if text["tokens"] in holders:
                raise RecipeError(
                    f"stats: {holders[text['tokens']]} and {part.folder} hold the same text "
                    f"(tokens {text['tokens'][:12]}), which would count twice. Collect another "
                    "part of it, with --seed or --calib, or leave one out."
                )
            holders[text["tokens"]] = part.folder


@contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """Give a folder to write in that becomes `out` at the end, or vanishes."""
    records = Records(out=out)
    partial = records.partial
    with records.lock():
        if partial.exists():
            raise RecipeError(
                f"out: {partial} is in the way, of a run that was broken off. Remove it, or choose "
                "another --out."
            )
        try:
            partial.mkdir(parents=True)
            yield partial
            records.publish(overwrite=False)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
