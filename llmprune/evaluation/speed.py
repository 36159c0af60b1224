"""Measured speed and memory of a model, alone or side by side with another in one run.

Each model lives in a process of its own (`stopwatch.py`); the processes take turns, one repetition
each, in alternating order, so that what else the computer does meets both.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path
from typing import IO, Any

from llmprune.arch.limits import longest_sequence
from llmprune.base.errors import (
    LlmpruneError,
    RecipeError,
    TooLarge,
    UnsupportedModel,
    WontLoad,
    first_line,
)
from llmprune.base.progress import Progress, human_bytes
from llmprune.checkpoint.locate import open_source
from llmprune.checkpoint.skeleton import read_config
from llmprune.checkpoint.source import Source, read_json
from llmprune.evaluation.timings import Bench, Measured, Speed, Spread

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def bench(
    folder: str | PathLike[str],
    against: str | PathLike[str] | None = None,
    *,
    batch: Sequence[int] = (1,),
    prompt: int = 128,
    new: int = 64,
    repeat: int = 5,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Bench:
    """Measure how fast a model reads a prompt and decodes, and the memory that it takes.

    Args:
        folder: a folder, a Hub id, or "demo".
        against: another, usually the dense model, that takes turns with it; see `Bench.ratios`.
        batch: how many sequences at once, one or more numbers.
        prompt: tokens read at once. new: tokens decoded one by one after it, greedily.
        repeat: how often; a first, untimed repetition warms up.
        dtype: float32, bfloat16, float16, or "auto": as it is stored.

    Raises:
        RecipeError: a number below 1, more tokens than the model takes, or no such device.
        CheckpointError: no such model, or it is damaged. WontLoad: transformers refuses it.
        TooLarge: the models do not fit into memory together.
    """
    for name, counts in (("batch", batch), ("prompt", (prompt,)), ("new", (new,)),
                         ("repeat", (repeat,))):  # fmt: skip
        if not counts or min(counts) < 1:
            raise RecipeError(
                f"{name}: {min(counts, default='nothing')} measures nothing. Give 1 or more, as in "
                f"--{name} 4."
            )
    if dtype != "auto" and dtype not in ITEM_BYTES:
        raise RecipeError(f"dtype: {dtype!r} is none of auto, {', '.join(ITEM_BYTES)}.")
    progress = progress or Progress("quiet")
    sources = [open_source(str(name)) for name in (folder, against) if name is not None]
    for source in sources:
        _check_length(source, prompt, new, trust_remote_code)
    _check_memory(sources, dtype)
    job = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
    with _opened(sources, job) as workers:
        found = _take_turns(workers, batch, {"prompt": prompt, "new": new}, repeat, progress)
    sides = [
        _measured(source, worker, speeds)
        for source, worker, speeds in zip(sources, workers, found, strict=True)
    ]
    return Bench(
        model=sides[0],
        against=sides[1] if against is not None else None,
        prompt=prompt,
        new=new,
        repeat=repeat,
        hint=None if against is not None else _hint(sources[0]),
    )


def _take_turns(
    workers: Sequence[_Worker],
    batches: Sequence[int],
    tokens: Mapping[str, int],
    repeat: int,
    progress: Progress,
) -> list[list[Speed]]:
    """Return for every worker the speed of every batch size; who is first alternates."""
    found: list[list[Speed]] = [[] for _ in workers]
    order = list(range(len(workers)))
    with progress.stage("measuring", total=len(batches) * (repeat + 2)) as stage:
        for batch in batches:
            asked = {"batch": batch, "watch": False, **tokens}
            rows: list[list[dict[str, Any]]] = [[] for _ in workers]
            for turn in range(repeat + 1):
                for place in order if turn % 2 else order[::-1]:
                    rows[place].append(workers[place].ask(asked))
                stage.advance(f"batch {batch}" + ("" if turn else ", warm-up"))
            for place, worker in enumerate(workers):
                memory = worker.ask({**asked, "watch": True})["memory"]
                found[place].append(_speed(batch, tokens, rows[place][1:], memory))
            stage.advance(f"batch {batch}, memory")
    return found


def _speed(
    batch: int, tokens: Mapping[str, int], rows: Sequence[Mapping[str, float]], memory: int
) -> Speed:
    """Return tokens per second of the seconds that repetitions took."""
    return Speed(
        batch=batch,
        prefill=Spread(tuple(batch * tokens["prompt"] / row["prefill"] for row in rows)),
        decode=Spread(tuple(batch * tokens["new"] / row["decode"] for row in rows)),
        first_token=Spread(tuple(row["first"] for row in rows)),
        memory=memory,
    )


def _measured(source: Source, worker: _Worker, speeds: Sequence[Speed]) -> Measured:
    files = {source.path(entry.file) for entry in source.entries.values()}
    return Measured(
        name=source.name,
        file_bytes=sum(path.stat().st_size for path in files),
        speeds=tuple(speeds),
        **worker.facts,
    )


class _Worker:
    """A process that holds one model and times it on request."""

    def __init__(self, source: Source, job: Mapping[str, Any], log: IO[str]) -> None:
        self.name, self.log = source.name, log
        self.facts: dict[str, Any] = {}
        for file in sorted({entry.file for entry in source.entries.values()}):
            source.path(file)  # fetched where the source is on the Hub
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).with_name("stopwatch.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"},
        )
        self._send({"folder": str(source.folder.resolve()), **job})

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Return the answer to a request."""
        self._send(request)
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """Wait for the next answer.

        Raises:
            LlmpruneError: the process refuses, with what to do; or it has ended.
        """
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            last = (self.log.read().strip().splitlines() or ["no message"])[-1]
            code = self.process.wait()
            if code == -9:  # how Linux ends what takes more memory than there is
                raise refusal(self.name, "memory", "the system stopped it")
            raise refusal(self.name, "run", f"it ended with code {code}: {last}")
        found: dict[str, Any] = json.loads(line)
        if "refused" in found:
            raise refusal(self.name, found["refused"], found["reason"])
        return found

    def _send(self, words: Mapping[str, Any]) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended; `answer` tells why
            self.process.stdin.write(json.dumps(words) + "\n")
            self.process.stdin.flush()

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()


@contextmanager
def _opened(sources: Sequence[Source], job: Mapping[str, Any]) -> Iterator[list[_Worker]]:
    """Start a process per model, and wait until all have loaded; end them afterwards."""
    workers: list[_Worker] = []
    with tempfile.TemporaryDirectory() as scratch:
        try:
            for place, source in enumerate(sources):
                log = (Path(scratch) / f"{place}.log").open("w+", encoding="utf-8")
                workers.append(_Worker(source, job, log))
            for worker in workers:
                worker.facts = worker.answer()
            yield workers
        finally:
            for worker in workers:
                worker.close()
                worker.log.close()


def refusal(name: str, kind: str, reason: str) -> LlmpruneError:
    """Return the error for what a measuring process refused."""
    line = first_line(reason)
    if kind == "device":
        return RecipeError(f"device: cannot be used ({line}). Type --device cpu.")
    if kind == "memory":
        return TooLarge(
            f"{name} does not fit into memory while it runs ({line}). Give a smaller --batch or "
            "--prompt, or --dtype bfloat16."
        )
    if kind == "cache":
        return UnsupportedModel(
            f"{name}: {line} returns no past_key_values, and decoding is measured with the cache "
            "that a model returns. Models of this kind are not measured."
        )
    if kind == "load":
        return WontLoad(
            f"{name} does not load with from_pretrained: {line}. A result of llmprune loads: type "
            "llmprune gate FOLDER to see what differs."
        )
    return WontLoad(
        f"{name} loads, but fails while it runs: {line}. Try --device cpu, or --dtype float32."
    )


def _check_length(source: Source, prompt: int, new: int, trust_remote_code: bool) -> None:
    """Check that prompt and new tokens are no more than a model takes."""
    longest = longest_sequence(read_config(source.folder, trust_remote_code=trust_remote_code))
    if longest is not None and prompt + new > longest:
        fitting = max(1, longest - new) if new < longest else max(1, longest // 2)
        rest = "" if new < longest else f" --new {longest - fitting}"
        raise RecipeError(
            f"prompt: {prompt} tokens and {new} new ones are {prompt + new}, and {source.name} "
            f"takes {longest}. Type --prompt {fitting}{rest}."
        )


def _check_memory(sources: Sequence[Source], dtype: str) -> None:
    """Check that all models find room in memory, where they are loaded."""
    import psutil

    needed = 0
    for source in sources:
        params = sum(entry.num_params for entry in source.entries.values())
        needed += source.num_bytes if dtype == "auto" else params * ITEM_BYTES[dtype]
    free = psutil.virtual_memory().available
    if needed > free:
        raise TooLarge(
            f"bench: {' and '.join(source.name for source in sources)} need {human_bytes(needed)} "
            f"of memory, and {human_bytes(free)} are free. They are held together so that they "
            "can take turns: --dtype bfloat16 halves float32, or measure one without --against."
        )


def _hint(source: Source) -> str | None:
    """Return how to compare a result with the model it was made from, where that still lies."""
    path = source.folder / "llmprune" / "run.json"
    if not path.exists():
        return None
    run = read_json(path)
    first = run.get("origin") or run.get("source") or {}
    home = str(first.get("folder", ""))
    name = "demo" if first.get("name") == "demo" else home
    if not name or not (Path(home) / "config.json").is_file():
        return None
    return f"to compare with what it was made from: llmprune bench {source.name} --against {name}"
