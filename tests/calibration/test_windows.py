"""Documents become the same windows every time."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llmprune.base.errors import RecipeError
from llmprune.calibration import windows as module
from llmprune.calibration.documents import read_documents
from llmprune.calibration.heldout import evaluation_text
from llmprune.calibration.windows import token_hash, token_ids, tokenize_windows

TEXTS = [f"Document number {i}." for i in range(5)]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(str(resources.files("llmprune") / "demo" / "model"))


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Return a tokenizer that puts a space before each text, as that of Llama 2 does."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    backend = Tokenizer(models.WordLevel({"<unk>": 0, "▁a": 1, "▁b": 2, "▁": 3}, "<unk>"))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_windows_are_seeded_stretches_of_the_text(tokenizer: Any) -> None:
    def draw(seed: int, num_samples: int = 5) -> torch.Tensor:
        documents = read_documents("demo", seed=seed)
        return tokenize_windows(
            documents, tokenizer, num_samples=num_samples, seq_len=64, seed=seed
        )[0]

    windows = draw(0)
    assert windows.shape == (5, 64)
    assert windows.dtype == torch.int64
    assert token_hash(windows) == token_hash(draw(0)) != token_hash(draw(1))
    whole = token_ids(next(read_documents("demo", seed=0)), tokenizer, limit=4 * 5 * 64)
    stretches = [whole[start : start + 64] for start in range(0, len(whole), 64)]
    places = [stretches.index(row) for row in windows.tolist()]
    assert len(set(places)) == 5
    assert places != sorted(places)


def test_bos_takes_the_first_place_of_each_window(tokenizer: Any) -> None:
    documents = list(read_documents("demo", seed=0))
    options = {"num_samples": 3, "seed": 0}
    plain, _ = tokenize_windows(documents, tokenizer, seq_len=31, **options)
    with_bos, _ = tokenize_windows(documents, tokenizer, seq_len=32, bos=True, **options)
    assert with_bos.shape == (3, 32)
    assert (with_bos[:, 0] == tokenizer.bos_token_id).all()
    assert torch.equal(with_bos[:, 1:], plain)


def test_bos_that_the_tokenizer_lacks_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"^calibration\.bos: "):
        tokenize_windows(["a b"], sentencepiece_like(), num_samples=1, seq_len=2, seed=0, bos=True)


def test_short_documents_are_packed_with_end_of_text_between(tokenizer: Any) -> None:
    num_tokens = sum(len(token_ids(words, tokenizer)) for words in TEXTS) + len(TEXTS) - 1
    windows, notice = tokenize_windows(TEXTS, tokenizer, num_samples=1, seq_len=num_tokens, seed=0)
    assert notice is None
    documents = tokenizer.decode(windows[0]).split("<|eos|>")
    assert sorted(documents) == TEXTS
    assert documents != TEXTS


def test_too_little_text_gives_a_notice_or_an_error(tokenizer: Any) -> None:
    windows, notice = tokenize_windows(TEXTS, tokenizer, num_samples=8, seq_len=16, seed=0)
    assert 1 <= len(windows) < 8
    assert notice is not None
    assert f"uses {len(windows)} windows of 16 tokens instead of 8" in notice
    with pytest.raises(RecipeError, match=r"has \d+ tokens, and one window needs 512"):
        tokenize_windows(TEXTS, tokenizer, num_samples=8, seq_len=512, seed=0)


def test_reading_stops_when_there_is_enough(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BUFFER_DOCUMENTS", 2)
    count = 0

    def endless() -> Any:
        nonlocal count
        while True:
            count += 1
            yield "some words that repeat"

    windows, _ = tokenize_windows(endless(), tokenizer, num_samples=2, seq_len=8, seed=0)
    assert windows.shape == (2, 8)
    assert count < 4 * 2 * 8


def test_pieces_of_long_text_give_the_tokens_of_the_whole(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = evaluation_text("demo")[:20_000]
    whole = token_ids(words, tokenizer)
    monkeypatch.setattr(module, "_PIECE", 300)
    assert token_ids(words, tokenizer) == whole
    assert token_ids(words, tokenizer, limit=100) == whole[:100]
    assert token_ids("x" * 1000, tokenizer) != []
    assert token_ids("a b " * 200 + "a", sentencepiece_like()) == [1, 2] * 200 + [1]


def test_the_bundled_evaluation_text_gives_the_reference_tokens(tokenizer: Any) -> None:
    golden = Path(__file__).parents[1] / "golden" / "tokens.safetensors"
    reference = load_file(golden)["evaluation"].flatten().long()
    ids = token_ids(evaluation_text("demo"), tokenizer, limit=reference.numel())
    assert torch.equal(torch.tensor(ids), reference)
