"""Which tokens a window reads and predicts: each once, and none that nothing precedes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmprune.base.errors import RecipeError
from llmprune.evaluation.windows import (
    IGNORED,
    Windows,
    adds_bos,
    bos_token,
    cut_windows,
    next_tokens,
    rolling_windows,
)

BOS = 9999


def predictions(windows: Windows) -> list[tuple[int, list[int]]]:
    """Return (target, what is read up to it) in order, without fillings."""
    return [
        (target, row[: place + 1])
        for row, targets in zip(
            windows.inputs_NT.tolist(), windows.targets_NT.tolist(), strict=True
        )
        for place, target in enumerate(targets)
        if target != IGNORED
    ]


def test_windows_do_not_overlap_and_the_rest_is_left() -> None:
    windows = cut_windows(list(range(11)), 4)
    assert windows.inputs_NT.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert windows.inputs_NT.dtype == torch.int64
    assert torch.equal(windows.targets_NT, next_tokens(windows.inputs_NT))
    assert cut_windows(list(range(11)), 4, num_windows=1).inputs_NT.tolist() == [[0, 1, 2, 3]]
    assert len(cut_windows(list(range(11)), 4, num_windows=9).inputs_NT) == 2


def test_every_window_begins_with_bos_where_asked() -> None:
    windows = cut_windows(list(range(11)), 4, bos_id=99)
    assert windows.inputs_NT.tolist() == [[99, 0, 1, 2], [99, 3, 4, 5], [99, 6, 7, 8]]
    assert windows.targets_NT.tolist() == [
        [0, 1, 2, IGNORED],
        [3, 4, 5, IGNORED],
        [6, 7, 8, IGNORED],
    ]


@pytest.mark.parametrize(("num_tokens", "bos_id"), [(3, None), (2, 99)])
def test_a_text_shorter_than_a_window_is_refused(num_tokens: int, bos_id: int | None) -> None:
    with pytest.raises(RecipeError, match=rf"has {num_tokens} tokens, fewer than one window of 4"):
        cut_windows(list(range(num_tokens)), 4, bos_id=bos_id)
    assert len(cut_windows(list(range(num_tokens + 1)), 4, bos_id=bos_id).inputs_NT) == 1


@pytest.mark.parametrize(("stride", "bos_id"), [(0, None), (-1, None), (5, None), (4, 99)])
def test_a_stride_that_skips_tokens_or_stands_is_refused(stride: int, bos_id: int | None) -> None:
    with pytest.raises(RecipeError, match=rf"stride: {stride}, where a window holds"):
        cut_windows(list(range(11)), 4, stride=stride, bos_id=bos_id)


@given(st.integers(2, 9), st.data(), st.booleans())
def test_strided_windows_predict_every_token_once_in_its_own_context(
    seq_len: int, data: Any, bos: bool
) -> None:
    content = seq_len - bos
    stride = data.draw(st.integers(1, content))
    ids = list(range(data.draw(st.integers(content, 40))))
    found = predictions(cut_windows(ids, seq_len, stride=stride, bos_id=BOS if bos else None))
    expected = ids if bos else ids[1:]
    if stride == seq_len:  # nothing precedes the first token of a window
        expected = [token for token in ids if token % seq_len]
    assert [target for target, _ in found] == expected
    for target, read in found:
        text = read[1:] if bos else read
        assert text == ids[target - len(text) : target]
        assert bos is (read[0] == BOS)
        if target >= content:
            assert len(text) >= content - stride


@given(st.integers(1, 9), st.lists(st.integers(0, 50), min_size=1, max_size=40))
def test_rolling_windows_are_those_of_the_harness(seq_len: int, ids: list[int]) -> None:
    from lm_eval.utils import get_rolling_token_windows

    expected = []
    for read, predicted in get_rolling_token_windows(ids, BOS, seq_len, 1):
        for back, target in enumerate(reversed(predicted)):
            expected.append((target, read[: len(read) - back]))
    found = predictions(rolling_windows(ids, seq_len, BOS))
    assert sorted(found) == sorted(expected)
    assert [target for target, _ in found] == ids


def test_an_empty_text_has_no_rolling_windows() -> None:
    with pytest.raises(RecipeError, match="no tokens"):
        rolling_windows([], 4, 0)


def speaker(*, bos_id: int | None, adds: bool) -> Any:
    """A tokenizer of one letter."""

    class Speaker(SimpleNamespace):
        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": ([bos_id] if adds else []) + [5] * len(text)}

    return Speaker(bos_token_id=bos_id)


def test_bos_is_a_policy() -> None:
    adding, having, none = (
        speaker(bos_id=1, adds=True),
        speaker(bos_id=1, adds=False),
        speaker(bos_id=None, adds=False),
    )
    assert [adds_bos(one) for one in (adding, having, none)] == [True, False, False]
    assert [bos_token(one, "auto") for one in (adding, having, none)] == [1, None, None]
    assert [bos_token(one, False) for one in (adding, having, none)] == [None, None, None]
    assert [bos_token(one, True) for one in (adding, having)] == [1, 1]
    with pytest.raises(RecipeError, match="has no BOS token"):
        bos_token(none, True)
    with pytest.raises(RecipeError, match="'maybe' is no choice"):
        bos_token(adding, "maybe")
