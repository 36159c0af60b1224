"""The backward survey of a run: its files, what a killed one leaves, and who is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig

from llmprune.arch.probe import find_family
from llmprune.base.errors import CheckpointError, NumericalError, UnsupportedModel
from llmprune.base.progress import Progress
from llmprune.checkpoint.sink import write_tensors
from llmprune.engine.gradients import (
    Gradients,
    all_linears,
    check_backward,
    check_gradients,
    sequences_at_once,
    take_gradients,
)
from llmprune.walk.resident import in_memory
from llmprune.walk.streamed import Streamed
from tests.reference.gradients import whole_model

Pico = Callable[..., Path]
Open = Callable[..., Streamed]
MakeModel = Callable[..., Any]

NEEDS = ("grad_abs", "grad_sq")


def room_for(blocks: Any, num: int, tokens_NT: Tensor) -> int:
    """Return bytes that hold the inputs of so many sequences, and no more."""
    return next(
        room
        for room in range(0, 2**22, 1024)
        if sequences_at_once(blocks, tokens_NT.shape[1], room + 1024) > num
    )


def take(blocks: Any, tokens_NT: Tensor, folder: Path | None, **options: Any) -> Gradients:
    options = {"progress": Progress("quiet"), **options}
    needs = options.pop("needs", NEEDS)
    return take_gradients(blocks, tokens_NT, needs, folder=folder, **options)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_files_hold_what_the_whole_model_gives(
    pico: Pico, streamed: Open, make_model: MakeModel, tokens: Tensor, tmp_path: Path,
    model_type: str,
) -> None:  # fmt: skip
    folder = tmp_path / "survey"
    blocks = streamed(pico(model_type))
    found = take(blocks, tokens, folder)
    assert [*content(folder)] == [
        f"gradients-{index + 1:05d}.safetensors" for index in range(len(blocks))
    ]
    with in_memory(make_model(model_type)) as resident:
        expected = whole_model(resident, tokens)
        held = take(resident, tokens, None)
    again = Gradients(folder=folder)
    for (index, linear), moments in expected.items():
        for stats in (found.of(index), held.of(index), again.of(index)):
            assert set(stats[linear].values) == set(NEEDS)
            assert stats[linear].num_sequences == len(tokens)
            for name in NEEDS:
                value = moments[name]
                within = 1e-5 * float(value.max())
                torch.testing.assert_close(stats[linear][name], value, rtol=0, atol=within)


def test_groups_of_any_size_give_the_same_bytes(
    pico: Pico, streamed: Open, tokens: Tensor, tmp_path: Path
) -> None:
    blocks = streamed(pico("llama"))
    take(blocks, tokens, tmp_path / "all")
    for num in (1, 4):
        room = room_for(blocks, num, tokens)
        take(blocks, tokens, tmp_path / f"{num}", room=room)
        assert content(tmp_path / f"{num}") == content(tmp_path / "all")
        held = take(blocks, tokens, None, room=room)
        for linear, stats in held.of(0).items():
            expected = Gradients(folder=tmp_path / "all").of(0)[linear]
            assert torch.equal(stats["grad_sq"], expected["grad_sq"])
    take(blocks, tokens, tmp_path / "disk", place="disk", room=room)
    assert content(tmp_path / "disk") == content(tmp_path / "all")


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let the run end at a write: the first `num` ones are done."""

    def after(num: int) -> None:
        left = num

        def write(*args: Any, **options: Any) -> None:
            nonlocal left
            if not left:
                raise KeyboardInterrupt
            left -= 1
            write_tensors(*args, **options)

        monkeypatch.setattr("llmprune.engine.gradients.write_tensors", write)

    return after


def test_a_killed_survey_goes_on_to_the_same_bytes(
    pico: Pico, streamed: Open, tokens: Tensor, tmp_path: Path, killed: Callable[[int], None]
) -> None:
    """Also where the second half has room for other numbers of sequences."""
    blocks = streamed(pico("llama"))
    take(blocks, tokens, tmp_path / "whole")
    room = room_for(blocks, 2, tokens)  # three groups of two, two blocks: six writes
    for num in range(6):
        folder = tmp_path / f"killed-{num}"
        killed(num)
        with pytest.raises(KeyboardInterrupt):
            take(blocks, tokens, folder, room=room, place="disk")
        assert not folder.exists() or not (folder / "inputs").exists()
        killed(100)
        take(blocks, tokens, folder, room=room if num % 2 else 2 * room)
        assert content(folder) == content(tmp_path / "whole")


def test_what_a_kill_leaves_of_the_inputs_is_removed(
    pico: Pico, streamed: Open, tokens: Tensor, tmp_path: Path
) -> None:
    blocks = streamed(pico("llama"))
    (tmp_path / "inputs" / "block-00000").mkdir(parents=True)
    (tmp_path / "inputs" / "block-00000" / "hidden-00000.bin").write_bytes(b"old")
    take(blocks, tokens[:2], tmp_path, place="disk")
    assert all(name.startswith("gradients-") for name in content(tmp_path))


def test_a_whole_survey_is_only_read(
    pico: Pico, streamed: Open, tokens: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = streamed(pico("llama"))
    first = take(blocks, tokens, tmp_path)

    def forbidden(*args: Any, **options: Any) -> None:
        raise AssertionError("opened")

    monkeypatch.setattr(Streamed, "open", forbidden)
    monkeypatch.setattr(Streamed, "trunk", forbidden)
    again = take(blocks, tokens, tmp_path)
    assert first.of(1).keys() == again.of(1).keys()


def test_only_the_linears_that_are_asked_for_are_kept(
    pico: Pico, streamed: Open, tokens: Tensor, tmp_path: Path
) -> None:
    blocks = streamed(pico("llama"))
    assert "self_attn.q_proj" in all_linears(blocks)[0]
    found = take(blocks, tokens, tmp_path, linears=[[], ["mlp.up_proj"]])
    assert list(content(tmp_path)) == ["gradients-00002.safetensors"]
    assert list(found.of(1)) == ["mlp.up_proj"]
    assert found.of(0) == {}
    assert not list(take(blocks, tokens, tmp_path / "none", linears=[[], []]).of(1))


@pytest.mark.parametrize("change", ["needs", "linears", "fewer", "damaged"])
def test_gradients_of_another_run_are_refused(
    pico: Pico, streamed: Open, tokens: Tensor, tmp_path: Path, change: str
) -> None:
    blocks = streamed(pico("llama"))
    take(blocks, tokens, tmp_path)
    options: dict[str, Any] = {}
    words = "--overwrite"
    if change == "needs":
        options["needs"] = ("grad_sum",)
    elif change == "linears":
        options["linears"] = [["mlp.up_proj"], ["mlp.up_proj"]]
    elif change == "fewer":
        tokens, words = tokens[:3], "of 6 sequences, where this run has 3"
    else:
        path = tmp_path / "gradients-00001.safetensors"
        path.write_bytes(path.read_bytes()[:-7])
        words = "is damaged"
    with pytest.raises(CheckpointError, match=words):
        take(blocks, tokens, tmp_path, **options)


def test_every_block_is_a_step_in_both_directions(
    pico: Pico, streamed: Open, tokens: Tensor, tmp_path: Path
) -> None:
    blocks = streamed(pico("llama"))
    progress = Progress("quiet")
    events = tmp_path / "events"
    progress.bind(events)
    take(blocks, tokens, None, progress=progress, room=room_for(blocks, 3, tokens))
    text = events.read_text()
    assert '"stage_start", "stage": "gradients", "total": 8' in text
    assert '"stage_end", "stage": "gradients", "done": 8' in text
    assert "block 1 backward, sequences to 3 of 6" in text


def test_room_is_for_the_inputs_of_all_blocks(pico: Pico, streamed: Open) -> None:
    blocks = streamed(pico("llama"))  # 2 blocks and the head; 10 tokens of 32 values of 4 bytes
    assert sequences_at_once(blocks, 10, 3 * 10 * 32 * 4 * 5) == 5
    assert sequences_at_once(blocks, 10, 3 * 10 * 32 * 4 * 5 - 1) == 4
    assert sequences_at_once(blocks, 10, 0) == 1


def test_a_fault_leaves_files_that_can_be_gone_on_from(
    make_model: MakeModel, tokens: Tensor, tmp_path: Path
) -> None:
    model = make_model("llama")
    model.model.norm.weight.data.fill_(torch.inf)
    with in_memory(model) as blocks, pytest.raises(NumericalError, match="block 1"):
        take(blocks, tokens, tmp_path)
    assert not content(tmp_path)


def test_families_whose_blocks_stand_alone_pass(model_type: str) -> None:
    config = AutoConfig.for_model(model_type)
    check_backward(config, find_family(config))


def test_blocks_that_read_keys_of_another_one_are_refused() -> None:
    config = AutoConfig.for_model("gemma3n_text")
    with pytest.raises(UnsupportedModel, match=r"shared keys.*block 0 .*--method wanda"):
        check_backward(config, find_family(config))


def test_a_model_without_gradients_is_refused(make_model: MakeModel) -> None:
    model = make_model("llama")
    norm: nn.Module = model.model.norm
    norm.forward = torch.no_grad()(norm.forward)  # type: ignore[method-assign]
    with in_memory(model) as blocks, pytest.raises(UnsupportedModel, match="no gradients can be"):
        check_gradients(blocks)
