"""A folder of statistics that were collected before: what it is of, and which runs it serves.

    DIR/  statistics.json  block-00001.safetensors ...

A file holds the sums of one block's taps as TAP/STATISTIC/SUM. No text is in it. Legend: I inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmprune.base.errors import CheckpointError, RecipeError
from llmprune.checkpoint.sink import hash_file
from llmprune.checkpoint.source import read_json
from llmprune.stats import STATISTICS
from llmprune.stats.keeping import joined, restore
from llmprune.stats.types import Stats

if TYPE_CHECKING:
    import torch

    from llmprune.engine.parts import Needs

INDEX = "statistics.json"
COLLECT = "llmprune stats collect --model MODEL --for METHOD --out DIR"


@dataclass(frozen=True, kw_only=True)
class Collected:
    """Statistics of all taps of a dense model; `hash` is that of the record, which holds those of
    all files."""

    folder: Path
    record: Mapping[str, Any]
    hash: str

    @property
    def num_tokens(self) -> int:
        """Return the tokens that were read."""
        return sum(int(text["num_tokens"]) for text in self.record["texts"])

    def sums(self, index: int) -> dict[str, dict[str, Any]]:
        """Return the accumulators of a block by tap and statistic.

        Raises:
            CheckpointError: its file is missing, or not what was written.
        """
        taps = self.record["blocks"][index]
        return {tap: self.sums_of(index, tap) for tap in taps}

    def sums_of(self, index: int, tap: str) -> dict[str, Any]:
        """Return the accumulators of a tap by statistic."""
        from safetensors import SafetensorError, safe_open

        path, found = self.folder / block_file(index), {}
        try:
            with safe_open(path, "pt") as file:
                keys = list(file.keys())
                for name in self.record["statistics"]:
                    prefix = f"{tap}/{name}/"
                    sums = {
                        key.removeprefix(prefix): file.get_tensor(key)
                        for key in keys
                        if key.startswith(prefix)
                    }
                    found[name] = restore(STATISTICS[name].accumulator(), sums)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}). Collect again.") from error
        return found

    def of_block(self, index: int, device: torch.device) -> Mapping[str, Stats]:
        """Return the statistics of a block by tap, read one tap at a time.

        Raises:
            CheckpointError: its file is missing, or not what was written.
        """
        path = self.folder / block_file(index)
        if not path.exists() or hash_file(path) != self.record["files"].get(path.name):
            raise CheckpointError(
                f"{path} is missing or not what was written. Collect again: {COLLECT}."
            )
        return _Taps(self, index, device)

    def check_model(self, fingerprint: str) -> None:
        """Check that these statistics are of a model.

        Raises:
            RecipeError: they are of another.
        """
        if self.record["model"]["fingerprint"] != fingerprint:
            raise RecipeError(
                f"calibration.statistics: {self.folder} was collected of another model, "
                f"{self.record['model']['name']}. Collect of this one: {COLLECT}."
            )

    def check_serves(self, parts: Needs, *, propagate: str, method: str) -> None:
        """Check that a run can do with these statistics instead of text.

        Raises:
            RecipeError: it cannot; says what it learns otherwise.
        """
        check_additive(parts, method)
        if propagate != "dense":
            raise RecipeError(
                "calibration.statistics: they are of the dense model, and `propagate: pruned` "
                "learns from what the pruned blocks before each pass on. Type --set "
                "prune.propagate=dense, or calibrate on text."
            )
        missing = sorted({*parts.cut, *parts.around} - set(self.record["statistics"]))
        if missing:
            raise RecipeError(
                f"calibration.statistics: {self.folder} holds "
                f"{', '.join(self.record['statistics'])}, and {method} needs {', '.join(missing)} "
                f"too. Type {COLLECT.replace('METHOD', method)}."
            )


class _Taps(Mapping[str, Stats]):
    """Statistics of a block's taps, each read when it is asked for."""

    def __init__(self, collected: Collected, index: int, device: torch.device) -> None:
        self.collected, self.index, self.device = collected, index, device
        self.taps: tuple[str, ...] = tuple(collected.record["blocks"][index])

    def __getitem__(self, tap: str) -> Stats:
        if tap not in self.taps:
            raise KeyError(tap)
        stats = joined(self.collected.sums_of(self.index, tap))
        values = {name: value.to(self.device) for name, value in stats.values.items()}
        return Stats(num_tokens=stats.num_tokens, values=values)

    def __iter__(self) -> Iterator[str]:
        return iter(self.taps)

    def __len__(self) -> int:
        return len(self.taps)


def block_file(index: int) -> str:
    """Return the file of a block's statistics."""
    return f"block-{index + 1:05d}.safetensors"


def read_collected(folder: str | Path, key: str = "calibration.statistics") -> Collected:
    """Open a folder of statistics; only its record is read.

    Raises:
        RecipeError: it holds none.
        CheckpointError: its record is damaged.
    """
    home = Path(folder).expanduser()
    path = home / INDEX
    if not path.is_file():
        raise RecipeError(
            f"{key}: {home} holds no statistics. Give the folder that {COLLECT} or "
            "llmprune stats merge wrote."
        )
    record = read_json(path)
    wanted = {"model", "dtype", "statistics", "blocks", "texts", "files"}
    if lacks := sorted(wanted - record.keys()):
        raise CheckpointError(f"{path} has no {', '.join(lacks)}. Collect again: {COLLECT}.")
    return Collected(folder=home, record=record, hash=hash_file(path))


def check_additive(parts: Needs, method: str) -> None:
    """Check that all a run learns of text are sums at taps while blocks are cut.

    Raises:
        RecipeError: it learns something else, or nothing.
    """
    others = {
        "gradients": parts.backward or parts.regional,
        "a survey before the cut": parts.survey,
        "what experts answer": parts.routing,
        "gates": parts.gates,
        "candidates compared with the dense model": parts.probes,
        "the inputs of blocks": parts.inputs or parts.dense,
        "one choice for the whole model": parts.whole,
    }
    found = [what for what, needed in others.items() if needed]
    if found:
        raise RecipeError(
            f"calibration.statistics: {method} learns more of its text than sums at taps: "
            f"{', '.join(found)}. Use --method wanda or sparsegpt with allocation uniform, or "
            "calibrate on text."
        )
    if not parts.cut:
        raise RecipeError(
            f"calibration.statistics: {method} reads no text, so there is nothing to collect. "
            "Leave statistics out, or use --method wanda."
        )
