"""What the dense model says of given windows, on disk: teacher and pruned model need never meet.

    teacher.json               which tokens and model, what is kept, the hash of each finished file
    teacher-00000.safetensors  log_prob (g, T, K) float16, index (g, T, K) int32, rest (g, T)
                               float32, and where asked for hidden.0, hidden.1, ... (g, T, D)

The dense model is walked once per file, from disk or memory, one block at a time. Files that are
whole stay when a run is resumed. Hidden states are what blocks return, before any final norm.
Legend: N windows, g windows of a file, B windows asked for, T tokens, t positions of a chunk,
K most likely tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from llmprune.base.errors import CheckpointError, NumericalError, RecipeError
from llmprune.base.progress import Progress, Stage
from llmprune.calibration.windows import token_hash
from llmprune.checkpoint.sink import hash_file, write_json, write_tensors
from llmprune.checkpoint.source import check_free_space, read_json
from llmprune.evaluation.perplexity import HIDDEN_BYTES
from llmprune.recovery.distillation import TopK, strongest
from llmprune.walk.block import Blocks
from llmprune.walk.forward import Stream, advance, embed, logits

TOP = 64  # 388 bytes a token
INDEX = "teacher.json"
HiddenDtype = Literal["float16", "bfloat16", "float32"]
ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
WORDS = {  # how an error speaks of what teacher.json says
    "tokens": "hash of tokens",
    "shape": "number and length of windows",
    "model": "model",
    "top": "number of tokens kept of each distribution",
    "hidden": "dtype of hidden states",
}


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """What is kept of a teacher's outputs: the likeliest tokens, and hidden states in a dtype.

    Raises:
        RecipeError: fewer than 1 token is to be kept, or the dtype is none for hidden states.
    """

    top: int = TOP
    hidden: HiddenDtype | None = None

    def __post_init__(self) -> None:
        if self.top < 1:
            raise RecipeError(
                f"recover.distill: {self.top} tokens of each distribution are none. It takes 1 or "
                f"more; keep top={TOP}."
            )
        if self.hidden is not None and self.hidden not in ITEM_BYTES:
            raise RecipeError(
                f"recover.distill: {self.hidden!r} is no dtype for hidden states. There are "
                f"{', '.join(ITEM_BYTES)}; keep hidden='bfloat16'."
            )


def teacher_bytes(config: Any, outputs: Outputs, *, num_windows: int, seq_len: int) -> int:
    """Return the bytes that a teacher's outputs take on disk, less the files' headers.

    `config` is the dense model's. Each token takes 6 bytes for each of its likeliest, and 4; with
    hidden states their values after every block besides.
    """
    text = config.get_text_config()
    per_token = min(outputs.top, int(text.vocab_size)) * 6 + 4
    if outputs.hidden is not None:
        values = int(text.num_hidden_layers) * int(text.hidden_size)
        per_token += values * ITEM_BYTES[outputs.hidden]
    return num_windows * seq_len * per_token


@dataclass(frozen=True, kw_only=True)
class TeacherCache:
    """A teacher's outputs in a folder, read by the index of a window.

    Files are checked against their hashes when they are first read from.
    """

    folder: Path
    num_windows: int
    group: int
    num_blocks: int
    has_hidden: bool
    hashes: dict[str, str]
    checked: set[str] = field(default_factory=set, repr=False)

    def __len__(self) -> int:
        return self.num_windows

    def top(self, windows: Sequence[int]) -> TopK:
        """Return the most likely tokens of windows, in the order asked, on the host.

        Raises:
            CheckpointError: a file is missing or damaged.
            IndexError: there is no such window.
        """
        return TopK(*self._read(windows, ("log_prob", "index", "rest")))

    def hidden(self, windows: Sequence[int]) -> list[Tensor]:
        """Return what each block gives for windows, (B, T, D) in the stored dtype, on the host.

        Raises:
            CheckpointError: a file is missing or damaged.
            IndexError: there is no such window.
            RecipeError: hidden states were not kept.
        """
        if not self.has_hidden:
            raise RecipeError(
                f"recover.distill: {self.folder} holds no hidden states of the teacher, which "
                "this loss compares. Remove the folder and fill it with hidden='bfloat16', or "
                "distill by kl."
            )
        return self._read(windows, [f"hidden.{index}" for index in range(self.num_blocks)])

    def _read(self, windows: Sequence[int], names: Sequence[str]) -> list[Tensor]:
        """Return tensors of windows by name, (B, ...)."""
        from safetensors import safe_open

        by_file: dict[int, list[int]] = {}
        for place, window in enumerate(windows):
            if not 0 <= window < self.num_windows:
                raise IndexError(
                    f"window {window} of {self.num_windows} in {self.folder} is none. Windows "
                    f"count from 0 to {self.num_windows - 1}; fill a folder for more of them."
                )
            by_file.setdefault(window // self.group, []).append(place)
        found: dict[str, list[Tensor]] = {name: [torch.empty(0)] * len(windows) for name in names}
        for number, places in by_file.items():
            with safe_open(str(self._sound(number)), "pt") as handle:
                for name in names:
                    part = handle.get_slice(name)
                    for place in places:
                        row = windows[place] % self.group
                        found[name][place] = part[row : row + 1]
        return [torch.cat(found[name]) for name in names]

    def _sound(self, number: int) -> Path:
        """Return the path of a file, which holds what was written.

        Raises:
            CheckpointError: it does not.
        """
        path = self.folder / _file_name(number)
        if path.name not in self.checked:
            if not _whole(path, self.hashes):
                raise CheckpointError(
                    f"{path} is {'damaged' if path.exists() else 'missing'}: a teacher's outputs "
                    "of some windows cannot be read. Run the same command again to have this file "
                    "written anew."
                )
            self.checked.add(path.name)
        return path


def fill_cache(
    folder: Path,
    blocks: Blocks,
    tokens_NT: Tensor,
    outputs: Outputs,
    *,
    model: str,
    micro_batch: int = 1,
    group: int | None = None,
    progress: Progress | None = None,
) -> TeacherCache:
    """Write what a dense model says of windows, less what is there already.

    `model` identifies the model and the dtype that it is computed in. As many windows share a file,
    and one walk through the blocks, as hidden states and outputs fit `HIDDEN_BYTES`; `group` says
    how many in a new folder.

    Raises:
        RecipeError: the folder is for other windows, another model or other outputs.
        TooLarge: the disk has no room.
        NumericalError: an output is not finite, or does not fit the dtype of hidden states.
    """
    config, seq_len = blocks.model.config, tokens_NT.shape[1]
    facts = _facts(tokens_NT, model, outputs)
    index = _known(folder, facts)
    if index is None:
        group = group or _group_size(config, outputs, seq_len, micro_batch)
        index = {**facts, "group": group, "blocks": len(blocks), "files": {}}
    cache = _opened(folder, index)
    parts = {_file_name(n): ids for n, ids in enumerate(tokens_NT.split(cache.group))}
    cache.checked.update(name for name in parts if _whole(folder / name, cache.hashes))
    todo = {name: ids_gT for name, ids_gT in parts.items() if name not in cache.checked}
    missing = sum(len(ids_gT) for ids_gT in todo.values())
    needed = teacher_bytes(config, outputs, num_windows=missing, seq_len=seq_len)
    check_free_space(folder, needed, "keeping the teacher's outputs")
    with (progress or Progress("quiet")).stage("teacher", len(todo) * len(blocks)) as stage:
        for name, ids_gT in todo.items():
            write_tensors(folder / name, _said(blocks, ids_gT, outputs, micro_batch, stage))
            cache.hashes[name] = hash_file(folder / name)
            write_json(folder / INDEX, index)
            cache.checked.add(name)
    return cache


def open_cache(folder: Path, tokens_NT: Tensor, outputs: Outputs, *, model: str) -> TeacherCache:
    """Open what `fill_cache` has written, without the model.

    Raises:
        RecipeError: the folder is for other windows, another model or other outputs.
        CheckpointError: nothing or not all is there.
    """
    index = _known(folder, _facts(tokens_NT, model, outputs))
    if index is None:
        raise CheckpointError(
            f"{folder} holds no outputs of a teacher. Fill it first: run the command that names it."
        )
    wanted = -(-len(tokens_NT) // index["group"])
    if len(index["files"]) < wanted:
        raise CheckpointError(
            f"{folder} holds {len(index['files'])} of {wanted} files of a teacher's outputs. Run "
            "the command that fills it again, and it goes on where it was."
        )
    return _opened(folder, index)


def _opened(folder: Path, index: dict[str, Any]) -> TeacherCache:
    """Return a cache whose hashes are those of the index, written together."""
    return TeacherCache(
        folder=folder,
        num_windows=index["shape"][0],
        group=index["group"],
        num_blocks=index["blocks"],
        has_hidden=index["hidden"] is not None,
        hashes=index["files"],
    )


def _facts(tokens_NT: Tensor, model: str, outputs: Outputs) -> dict[str, Any]:
    """Return what decides the contents of a cache."""
    tokens, shape = token_hash(tokens_NT), list(tokens_NT.shape)
    return {"tokens": tokens, "shape": shape, "model": model, **asdict(outputs)}


def _known(folder: Path, facts: dict[str, Any]) -> dict[str, Any] | None:
    """Return the index of a folder; none where there is none.

    Raises:
        RecipeError: it is of something else; names what, and both values.
    """
    if not (folder / INDEX).exists():
        return None
    index = read_json(folder / INDEX)
    for key, value in facts.items():
        if index.get(key) != value:
            raise RecipeError(
                f"recover.distill: {folder} was filled for something else: its {WORDS[key]} is "
                f"{_short(index.get(key))}, and here it is {_short(value)}. Remove the folder to "
                "have it filled anew, or name another."
            )
    return index


def _said(
    blocks: Blocks, ids_gT: Tensor, outputs: Outputs, micro_batch: int, stage: Stage
) -> dict[str, Tensor]:
    """Walk windows through the blocks; return what is kept of them by name."""
    stream = embed(blocks, ids_gT, micro_batch)
    tensors = {}
    for index in range(len(blocks)):
        with blocks.open(index) as block:
            advance(block, stream)
        if outputs.hidden is not None:
            tensors[f"hidden.{index}"] = _stored(stream, outputs.hidden, index)
        stage.advance(f"block {index}")
    said = list(_topmost(blocks, stream, outputs.top))
    stream.hidden.close()
    tensors["log_prob"] = torch.cat([each.log_prob_BTK for each in said])
    tensors["index"] = torch.cat([each.index_BTK for each in said])
    tensors["rest"] = torch.cat([each.rest_BT for each in said if each.rest_BT is not None])
    return tensors


def _topmost(blocks: Blocks, stream: Stream, top: int) -> Iterator[TopK]:
    """Yield the most likely tokens of each micro-batch, on the host."""
    chunks: list[TopK] = []
    for _, start, logits_BtV in logits(blocks, stream):
        if start == 0 and chunks:
            yield _joined(chunks)
            chunks = []
        found = strongest(logits_BtV, top)
        chunks.append(TopK(*(value.cpu() for value in found if value is not None)))
    yield _joined(chunks)


def _joined(chunks: list[TopK]) -> TopK:
    """Return chunks of positions as one."""
    return TopK(*(torch.cat(parts, dim=1) for parts in zip(*chunks, strict=True)))


def _stored(stream: Stream, dtype: HiddenDtype, index: int) -> Tensor:
    """Return the hidden states of all micro-batches as they are kept.

    Raises:
        NumericalError: one is too large for float16.
    """
    host, kind = torch.device("cpu"), getattr(torch, dtype)
    hidden_gTD = torch.cat([stream.hidden.get(n, host).to(kind) for n in range(len(stream))])
    if not torch.isfinite(hidden_gTD).all():
        raise NumericalError(
            f"hidden states after block {index} of the teacher are too large for {dtype}. They fit "
            "bfloat16, which takes as much room; keep them with hidden='bfloat16'."
        )
    return hidden_gTD


def _group_size(config: Any, outputs: Outputs, seq_len: int, micro_batch: int) -> int:
    """Return how many windows share a file: as many as fit, in whole micro-batches."""
    one = teacher_bytes(config, outputs, num_windows=1, seq_len=seq_len)
    one += seq_len * int(config.get_text_config().hidden_size) * 4
    return max(micro_batch, HIDDEN_BYTES // one // micro_batch * micro_batch)


def _file_name(number: int) -> str:
    return f"teacher-{number:05d}.safetensors"


def _whole(path: Path, hashes: dict[str, str]) -> bool:
    """Tell whether a file holds what was written."""
    return path.exists() and hash_file(path) == hashes.get(path.name)


def _short(value: Any) -> str:
    """Return a value as an error shows it; of a hash the first digits.

    >>> _short(None), _short([6, 24]), _short("0c730b69aa21ffdd")
    ('none', '6 x 24', '0c730b69aa21')
    """
    if value is None:
        return "none"
    return " x ".join(map(str, value)) if isinstance(value, list) else str(value)[:12]
