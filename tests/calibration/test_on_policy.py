"""Text that a model writes for itself: prompts, continuations, windows, and what is kept of it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from llmprune import api
from llmprune.base.errors import RecipeError, TooLarge
from llmprune.calibration.mix import Windows, read_windows, wish_hash
from llmprune.calibration.on_policy import (
    Asked,
    Prompting,
    check_room,
    continuations,
    manner_of,
    prompts_hash,
    read_prompts,
    written_windows,
)
from llmprune.calibration.selection import calibration_texts, place_of
from llmprune.calibration.windows import token_hash
from llmprune.engine import calibrating

CPU = torch.device("cpu")
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="session")
def model(make_model: Callable[..., Any]) -> Any:
    return make_model("llama").eval()


@pytest.fixture
def prompts_file(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("Why is it\n\nTell me of the sea\nOnce\n", encoding="utf-8")
    return path


def recipe_of(prompts: Path | str | None, **calibration: Any) -> Any:
    settings = {"num_samples": 3, "seq_len": 16, "max_new_tokens": 6, **calibration}
    given = [f"calibration.{key}={value}" for key, value in settings.items()]
    given += [] if prompts is None else [f"calibration.prompts={prompts}"]
    return api.make_recipe("a/model", sparsity=0.5, calib="on-policy", settings=given)


def write(recipe: Any, model: Any, tokenizer: Any) -> Windows:
    return written_windows(recipe, tokenizer, lambda: nullcontext(model), seq_len=16, device=CPU)


def test_a_line_of_a_text_file_is_a_prompt(prompts_file: Path, tokenizer: Any) -> None:
    prompts = read_prompts(manner_of(recipe_of(prompts_file), chats=False), tokenizer, most=8)
    texts = {"".join(tokenizer.convert_ids_to_tokens(ids)) for ids in prompts}
    assert texts == {"hy is it", "Once", " the sea"}  # what does not fit goes at the front


def test_a_chat_is_asked_up_to_its_last_question(tmp_path: Path, tokenizer: Any) -> None:
    chat = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Why"},
        {"role": "assistant", "content": "Because"},
    ]
    written = Prompting(_templated(tokenizer)).text(chat, what="x", key="y")
    assert isinstance(written, Asked)
    assert written == "[user]Hi[assistant]Hello[user]Why[assistant]"
    assert Prompting(_templated(tokenizer)).text(chat[1:2], what="x", key="y") is None


def test_with_a_chat_template_a_line_is_what_a_user_says(
    prompts_file: Path, tokenizer: Any
) -> None:
    words = _templated(tokenizer)
    prompts = read_prompts(manner_of(recipe_of(prompts_file), chats=True), words, most=99)
    assert words.decode(prompts[0]).replace(" ", "").startswith("<unk>user<unk>")


def test_rows_of_a_table_are_prompts(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "asked.jsonl"
    rows = [{"prompt": "two\nlines"}, {"prompt": "one"}]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    prompts = read_prompts(manner_of(recipe_of(path), chats=False), tokenizer, most=99)
    assert sorted(map(len, prompts)) == [3, 9]


def test_the_bundled_text_gives_beginnings_of_passages(tokenizer: Any) -> None:
    prompts = read_prompts(manner_of(recipe_of("demo"), chats=False), tokenizer, most=99)
    assert len(prompts) > 100
    assert {len(ids) for ids in prompts} == {24}


def test_a_file_without_a_prompt_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "none.txt"
    path.write_text("\n  \n", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"calibration\.prompts.*no"):
        read_prompts(manner_of(recipe_of(path), chats=False), tokenizer, most=9)
    with pytest.raises(RecipeError, match=r"calibration\.prompts"):
        read_prompts(manner_of(recipe_of("gone.txt"), chats=False), tokenizer, most=9)


def test_a_batch_continues_each_prompt_as_alone(model: Any, tokenizer: Any) -> None:
    """Padding on the left changes nothing; compared with the likeliest token, step by step."""
    manner = manner_of(recipe_of("demo", temperature=0), chats=False)
    prompts = [[5, 9, 30], [7], [12, 13, 14, 15, 16]]
    rows = continuations(model, tokenizer, prompts, manner, at_once=3, longest=64, device=CPU)
    for ids in prompts:
        alone = list(ids)
        for _ in range(6):
            with torch.no_grad():
                best = int(model(torch.tensor([alone])).logits[0, -1].argmax())
            alone.append(best)
            if best == tokenizer.eos_token_id:
                break
        assert next(rows) == alone


def test_what_is_written_follows_from_the_seed(
    prompts_file: Path, model: Any, tokenizer: Any
) -> None:
    before = torch.random.get_rng_state()
    recipe = recipe_of(prompts_file)
    first, again = (write(recipe, model, tokenizer) for _ in range(2))
    other = write(recipe.model_copy(update={"seed": 1}), model, tokenizer)
    assert first.tokens.shape == (3, 16)
    assert torch.equal(first.tokens, again.tokens)
    assert not torch.equal(first.tokens, other.tokens)
    assert torch.equal(before, torch.random.get_rng_state())
    assert first.record["tokens"] == token_hash(first.tokens)
    said = first.record["on_policy"]
    assert said["hash"] == again.record["on_policy"]["hash"] and len(said["hash"]) == 64
    assert said["num_sequences"] >= 3 and said["temperature"] == 1.0
    assert first.is_remote  # so that a resumed run has the same tokens


def test_windows_hold_prompts_and_continuations_in_order(
    prompts_file: Path, model: Any, tokenizer: Any
) -> None:
    recipe = recipe_of(prompts_file)
    manner = manner_of(recipe, chats=False)
    prompts = read_prompts(manner, tokenizer, most=64)
    rows = continuations(model, tokenizer, prompts, manner, at_once=8, longest=10**6, device=CPU)
    stream: list[int] = []
    while len(stream) < 48:
        stream += [tokenizer.eos_token_id] * bool(stream and stream[-1] != tokenizer.eos_token_id)
        stream += next(rows)
    assert write(recipe, model, tokenizer).tokens.flatten().tolist() == stream[:48]


def test_the_hash_of_prompts_tells_where_one_ends() -> None:
    assert prompts_hash([[1, 2], [3]]) != prompts_hash([[1], [2, 3]])


def test_a_prompt_and_its_continuation_are_no_longer_than_the_model_takes(
    model: Any, tokenizer: Any
) -> None:
    manner = manner_of(recipe_of("demo", max_new_tokens=50), chats=False)
    rows = continuations(model, tokenizer, [[5] * 6], manner, at_once=1, longest=9, device=CPU)
    assert len(next(rows)) <= 9


def test_it_is_no_part_of_a_mix_and_no_text_of_a_training(tokenizer: Any) -> None:
    assert place_of("on-policy") == "written"
    mixed = api.make_recipe("a/model", sparsity=0.5, calib="on-policy:1,demo:1")
    with pytest.raises(RecipeError, match="no part of a mix"):
        calibration_texts(mixed)
    with pytest.raises(RecipeError, match=r"recover\.data"):
        read_windows(recipe_of(None), tokenizer, seq_len=16)


def test_how_to_write_is_refused_beside_text_that_is_there() -> None:
    with pytest.raises(RecipeError, match=r"calibration.*'temperature'.*on-policy"):
        api.make_recipe("demo", sparsity=0.5, calib="c4", settings=["calibration.temperature=1"])
    with pytest.raises(RecipeError, match=r"calibration\.top_p"):
        recipe_of(None, top_p=1.5)


def test_a_wish_of_another_manner_is_another_wish(prompts_file: Path, tmp_path: Path) -> None:
    hashes = [wish_hash(recipe_of(prompts_file, top_p=p), 16, tmp_path) for p in (0.5, 0.5, 0.9)]
    assert hashes[0] == hashes[1] != hashes[2]
    prompts_file.write_text("another", encoding="utf-8")
    assert wish_hash(recipe_of(prompts_file, top_p=0.5), 16, tmp_path) != hashes[0]


def test_a_model_that_does_not_fit_is_refused() -> None:
    with pytest.raises(TooLarge, match=r"calibration\.data.*--calib FILE"):
        check_room("a/model", 10**15, 2, CPU)


def test_a_run_keeps_what_was_written(
    pico: Callable[..., Path],
    prompts_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    quick_gate: None,
) -> None:
    """An interrupted run resumes with the same tokens, and the model does not write them again."""
    wish: dict[str, Any] = {
        "sparsity": 0.5,
        "calib": "on-policy",
        "num_samples": 3,
        "seq_len": 16,
        "out": tmp_path / "out",
        "settings": [
            f"calibration.prompts={prompts_file}",
            "calibration.max_new_tokens=6",
            "evaluate.perplexity=false",
        ],
        "quiet": True,
    }

    def stop(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("llmprune.steps.cut", stop)
        with pytest.raises(KeyboardInterrupt):
            api.prune(pico("llama"), **wish)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("it was written again")

    monkeypatch.setattr(calibrating, "written_windows", refuse)
    report = api.prune(pico("llama"), **wish)
    record = report.data["calibration"]
    assert record["data"] == "on-policy" and record["num_windows"] == 3
    assert len(record["on_policy"]["hash"]) == 64
    assert not list((tmp_path / "out").rglob("tokens.safetensors"))
    del wish["quiet"]
    said = str(api.plan(str(pico("llama")), **wish))
    assert "on-policy text: 48 tokens" in said and "roughly" in said


def _templated(tokenizer: Any) -> Any:
    words = copy.deepcopy(tokenizer)
    words.chat_template = TEMPLATE
    return words
