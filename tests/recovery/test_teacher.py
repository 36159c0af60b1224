"""A teacher's outputs on disk: what the model says in memory, kept through kills, and guarded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmprune.base.errors import CheckpointError, NumericalError, RecipeError, TooLarge
from llmprune.base.progress import Progress
from llmprune.checkpoint.sink import hash_file, write_tensors
from llmprune.checkpoint.source import read_header
from llmprune.evaluation.windows import next_tokens
from llmprune.recovery import teacher
from llmprune.recovery.distillation import kl, normalized_mse, topk_kl
from llmprune.recovery.teacher import Outputs, TeacherCache, fill_cache, open_cache, teacher_bytes
from llmprune.walk.resident import in_memory
from llmprune.walk.streamed import Streamed

Pico = Callable[..., Path]
Open = Callable[..., Streamed]
Fill = Callable[..., TeacherCache]
FILES = [f"teacher-0000{number}.safetensors" for number in range(3)]
TOP = 8


@pytest.fixture
def fill(pico: Pico, streamed: Open, tokens: Tensor, tmp_path: Path) -> Fill:
    """Fill a folder with what the pico llama says: six windows, two in a file."""

    def filled(name: str = "teacher", **changes: Any) -> TeacherCache:
        wish: dict[str, Any] = {"model": "llama", "micro_batch": 2, "group": 2} | changes
        outputs = Outputs(top=wish.pop("top", TOP), hidden=wish.pop("hidden", None))
        ids = wish.pop("tokens", tokens)
        return fill_cache(tmp_path / name, streamed(pico("llama")), ids, outputs, **wish)

    return filled


@torch.no_grad()
def log_probs_of(model: Any, tokens_NT: Tensor) -> Tensor:
    log_probs: Tensor = model(input_ids=tokens_NT).logits.double().log_softmax(-1)
    return log_probs


@torch.no_grad()
def outputs_of(model: Any, blocks: Any, tokens_NT: Tensor) -> list[Tensor]:
    """Return what each block of a model gives, seen by hooks in its own forward."""
    seen: list[Tensor] = []

    def see(module: Any, args: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    hooks = [block.register_forward_hook(see) for block in blocks]
    model(input_ids=tokens_NT)
    for hook in hooks:
        hook.remove()
    return seen


def flip(path: Path) -> None:
    """Change the last byte of a file, which header and size do not tell."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_the_cache_says_what_the_model_in_memory_says(
    pico: Pico,
    stock: Callable[[Path], Any],
    streamed: Open,
    tokens: Tensor,
    tmp_path: Path,
    model_type: str,
) -> None:
    folder, model = pico(model_type), stock(pico(model_type))
    wish = Outputs(top=TOP, hidden="float32")
    cache = fill_cache(
        tmp_path, streamed(folder), tokens, wish, model="any", micro_batch=2, group=4
    )
    assert len(cache) == 6 and cache.group == 4
    found, said = cache.top(range(6)), log_probs_of(model, tokens)
    assert found.log_prob_BTK.dtype == torch.float16 and found.index_BTK.dtype == torch.int32
    ours = said.gather(-1, found.index_BTK.long())
    torch.testing.assert_close(found.log_prob_BTK.double(), ours, rtol=2**-11, atol=1e-4)
    torch.testing.assert_close(ours, said.topk(TOP).values, rtol=0, atol=1e-4)
    assert found.rest_BT is not None and found.rest_BT.dtype == torch.float32
    rest = (1 - ours.exp().sum(-1)).log()
    torch.testing.assert_close(found.rest_BT.double(), rest, rtol=0, atol=1e-4)
    hidden = outputs_of(model, model.get_submodule(streamed(folder).family.blocks), tokens)
    assert len(cache.hidden([0])) == len(hidden) > 1
    for stored, own in zip(cache.hidden(range(6)), hidden, strict=True):
        torch.testing.assert_close(stored, own, rtol=1e-4, atol=1e-4 * float(own.abs().max()))


def test_stored_losses_are_those_against_the_model(
    pico: Pico, stock: Callable[[Path], Any], make_model: Any, tokens: Tensor, fill: Fill
) -> None:
    dense, student = stock(pico("llama")), make_model("llama", seed=1)
    assert student.config.vocab_size == 64
    cache = fill(top=1000, hidden="float32")
    windows, wanted = [4, 1, 4], next_tokens(tokens)[[4, 1, 4]]
    assert cache.top(windows).index_BTK.shape == (3, 24, 64)  # there are no more tokens than that
    with torch.no_grad():
        ours = student(input_ids=tokens[windows]).logits
        theirs = dense(input_ids=tokens[windows]).logits
    full = kl(ours, theirs, wanted).item()
    assert topk_kl(ours, cache.top(windows), wanted).item() == pytest.approx(full, rel=1e-3)
    few = topk_kl(ours, fill("few").top(windows), wanted).item()
    assert 0 < few < full
    own = [value[windows] for value in outputs_of(dense, dense.model.layers, tokens)]
    assert normalized_mse(own, cache.hidden(windows), wanted).item() < 1e-9
    other = outputs_of(student, student.model.layers, tokens[windows])
    assert normalized_mse(other, cache.hidden(windows), wanted).item() > 0.1


def test_resident_blocks_write_the_same_bytes(
    pico: Pico, stock: Callable[[Path], Any], tokens: Tensor, fill: Fill, tmp_path: Path
) -> None:
    fill(hidden="bfloat16")
    wish = Outputs(top=TOP, hidden="bfloat16")
    with in_memory(stock(pico("llama"))) as blocks:
        fill_cache(tmp_path / "own", blocks, tokens, wish, model="llama", micro_batch=2, group=2)
    for name in (*FILES, "teacher.json"):
        assert (tmp_path / "own" / name).read_bytes() == (tmp_path / "teacher" / name).read_bytes()


def test_chunks_of_logits_change_nothing(fill: Fill, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fill().top(range(6))
    monkeypatch.setattr("llmprune.walk.forward.LOGITS", 64 * 2 * 5)  # 5 positions of 2 windows
    found = fill("chunks").top(range(6))
    assert torch.equal(found.index_BTK, whole.index_BTK)
    torch.testing.assert_close(found.log_prob_BTK, whole.log_prob_BTK, rtol=2**-10, atol=1e-4)
    assert found.rest_BT is not None and whole.rest_BT is not None
    torch.testing.assert_close(found.rest_BT, whole.rest_BT, rtol=0, atol=1e-4)


def test_windows_come_in_the_order_asked(fill: Fill) -> None:
    cache = fill(hidden="float16")
    whole, some = cache.top(range(6)), cache.top([5, 0, 3, 0])
    for all_of_it, part in zip(whole, some, strict=True):
        assert part is not None and torch.equal(part, all_of_it[[5, 0, 3, 0]])  # type: ignore[index]
    assert torch.equal(cache.hidden([3, 2])[1], cache.hidden(range(6))[1][[3, 2]])
    for window in (-1, 6):
        with pytest.raises(IndexError, match=rf"window {window} of 6 .* from 0 to 5"):
            cache.top([0, window])


@pytest.mark.parametrize("hidden", [None, "float16", "bfloat16", "float32"])
@pytest.mark.parametrize("top", [1, TOP, 100])
def test_the_bytes_told_beforehand_are_those_on_disk(
    pico: Pico, streamed: Open, fill: Fill, top: int, hidden: Any
) -> None:
    cache = fill(top=top, hidden=hidden, group=4)
    config = streamed(pico("llama")).model.config
    told = teacher_bytes(config, Outputs(top=top, hidden=hidden), num_windows=6, seq_len=24)
    entries = [read_header(cache.folder / name).values() for name in FILES[:2]]
    assert told == sum(entry.num_bytes for each in entries for entry in each)
    if hidden is None and top == TOP:
        assert told == 6 * 24 * (8 * (2 + 4) + 4)


def test_a_killed_run_keeps_whole_files_and_writes_the_others(
    fill: Fill, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fill("whole", hidden="bfloat16")

    def killed(path: Path, tensors: Any) -> None:
        if path.name == FILES[2]:
            raise KeyboardInterrupt
        write_tensors(path, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(teacher, "write_tensors", killed)
        with pytest.raises(KeyboardInterrupt):
            fill(hidden="bfloat16")
    folder = tmp_path / "teacher"
    before = {name: (folder / name).stat().st_mtime_ns for name in FILES[:2]}
    walked: list[str] = []
    monkeypatch.setattr(
        teacher,
        "write_tensors",
        lambda path, part: (walked.append(path.name), write_tensors(path, part)),
    )
    fill(hidden="bfloat16", group=5)  # a folder stays as it was begun
    assert walked == FILES[2:]
    assert before == {name: (folder / name).stat().st_mtime_ns for name in FILES[:2]}
    for name in (*FILES, "teacher.json"):
        assert hash_file(folder / name) == hash_file(whole.folder / name)
    fill(hidden="bfloat16")
    assert walked == FILES[2:]  # nothing is left to do


@pytest.mark.parametrize("harm", [flip, Path.unlink])
def test_a_file_that_is_not_what_was_written_is_found_and_mended(
    tokens: Tensor, fill: Fill, harm: Callable[[Path], None]
) -> None:
    cache = fill()
    before = cache.top([2, 3])
    harm(cache.folder / FILES[1])
    opened = open_cache(cache.folder, tokens, Outputs(top=TOP), model="llama")
    opened.top([0, 1, 4, 5])
    with pytest.raises(CheckpointError, match=rf"{FILES[1]} is (damaged|missing).*same command"):
        opened.top([3])
    mended = fill()
    for one, two in zip(mended.top([2, 3]), before, strict=True):
        assert one is not None and two is not None and torch.equal(one, two)
    assert open_cache(cache.folder, tokens, Outputs(top=TOP), model="llama").top([3])


def test_a_file_is_checked_once(
    tokens: Tensor, fill: Fill, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_cache(fill().folder, tokens, Outputs(top=TOP), model="llama")
    checked: list[str] = []
    monkeypatch.setattr(
        teacher, "hash_file", lambda path: checked.append(path.name) or hash_file(path)
    )
    for _ in range(3):
        opened.top([0, 1, 5])
    assert checked == [FILES[0], FILES[2]]


def test_a_folder_of_something_else_is_refused(tokens: Tensor, fill: Fill) -> None:
    cache = fill()
    before = {path.name: hash_file(path) for path in cache.folder.iterdir()}
    other = tokens.clone()
    other[5, 23] = (other[5, 23] + 1) % 64
    for changes, said in (
        ({"tokens": other}, r"hash of tokens is \w{12}, and here it is \w{12}"),
        ({"tokens": tokens.view(3, 48)}, "length of windows is 6 x 24, and here it is 3 x 48"),
        ({"model": "a better one"}, "model is llama, and here it is a better one"),
        ({"top": 4}, "each distribution is 8, and here it is 4"),
        ({"hidden": "bfloat16"}, "dtype of hidden states is none, and here it is bfloat16"),
    ):
        with pytest.raises(RecipeError, match=rf"recover\.distill: .*{said}\. Remove the folder"):
            fill(**changes)
    with pytest.raises(RecipeError, match="tokens"):
        open_cache(cache.folder, other, Outputs(top=TOP), model="llama")
    assert before == {path.name: hash_file(path) for path in cache.folder.iterdir()}


def test_only_a_filled_folder_opens(tokens: Tensor, fill: Fill, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no outputs of a teacher"):
        open_cache(tmp_path / "nothing", tokens, Outputs(top=TOP), model="llama")
    folder = fill().folder
    index = json.loads((folder / "teacher.json").read_text())
    del index["files"][FILES[1]]
    (folder / "teacher.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="holds 2 of 3 files"):
        open_cache(folder, tokens, Outputs(top=TOP), model="llama")
    fill()
    with pytest.raises(RecipeError, match=r"no hidden states.*hidden='bfloat16'"):
        open_cache(folder, tokens, Outputs(top=TOP), model="llama").hidden([0])


def test_as_many_windows_share_a_file_as_fit(
    fill: Fill, pico: Pico, streamed: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = streamed(pico("llama")).model.config
    for hidden in (None, "float32"):
        outputs = Outputs(top=TOP, hidden=hidden)  # type: ignore[arg-type]
        one = (
            teacher_bytes(config, outputs, num_windows=1, seq_len=24) + 24 * 4 * config.hidden_size
        )
        monkeypatch.setattr(teacher, "HIDDEN_BYTES", 5 * one)
        assert fill(f"some-{hidden}", hidden=hidden, group=None).group == 4  # micro-batches of 2
        monkeypatch.setattr(teacher, "HIDDEN_BYTES", one - 1)
        assert fill(f"two-{hidden}", hidden=hidden, group=None).group == 2


def test_hidden_states_too_large_for_their_dtype_are_refused(
    make_model: Any, tokens: Tensor, tmp_path: Path
) -> None:
    model = make_model("llama", tied=False)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1e6)
    with in_memory(model) as blocks:
        with pytest.raises(NumericalError, match=r"after block 0 .* too large for float16"):
            fill_cache(tmp_path / "a", blocks, tokens, Outputs(hidden="float16"), model="m")
        wide = fill_cache(tmp_path / "b", blocks, tokens, Outputs(hidden="bfloat16"), model="m")
    assert float(wide.hidden([0])[0].abs().max()) > 65504


def test_what_is_kept_must_be_something() -> None:
    with pytest.raises(RecipeError, match="0 tokens of each distribution"):
        Outputs(top=0)
    with pytest.raises(RecipeError, match="'int8' is no dtype for hidden states"):
        Outputs(hidden="int8")  # type: ignore[arg-type]


def test_a_full_disk_is_told_before_the_walk(
    fill: Fill, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 0))  # type: ignore[attr-defined]
    with pytest.raises(TooLarge, match="keeping the teacher's outputs needs"):
        fill()
    assert not (tmp_path / "teacher").exists()


def test_progress_counts_the_blocks_of_every_walk(fill: Fill, tmp_path: Path) -> None:
    progress = Progress("quiet")
    progress.bind(tmp_path / "events.jsonl")
    num_blocks = fill(progress=progress).num_blocks
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert events[-1]["event"] == "stage_end"
    assert events[-1]["done"] == events[-1]["total"] == len(FILES) * num_blocks > 3
