"""Files and tables become documents, and what cannot be read is named."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from llmprune.base.errors import CheckpointError, RecipeError, UnknownName
from llmprune.calibration.documents import open_text, read_documents
from llmprune.calibration.files import local_files
from llmprune.calibration.heldout import evaluation_text
from llmprune.calibration.selection import place_of
from llmprune.calibration.windows import token_ids
from llmprune.recipe import Portion

ROWS = [{"text": f"Document number {i}.", "id": i, "note": "x"} for i in range(5)]
TEXTS = [str(row["text"]) for row in ROWS]


def write_table(path: Path, rows: list[dict[str, Any]]) -> str:
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        import pyarrow as pa
        from pyarrow import parquet

        parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text(lines)
    return str(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.parquet"])
def test_tables_are_read_by_their_text_column(name: str, tmp_path: Path) -> None:
    path = write_table(tmp_path / name, ROWS)
    assert list(read_documents(path, seed=0)) == TEXTS
    assert list(read_documents(path, seed=0, column="note")) == ["x"] * 5


def test_the_only_column_of_text_needs_no_name(tmp_path: Path) -> None:
    path = write_table(tmp_path / "a.jsonl", [{"id": 1, "body": "words"}, {"id": 2, "body": None}])
    assert list(read_documents(path, seed=0)) == ["words"]


@pytest.mark.parametrize(
    ("row", "column", "message"),
    [
        ({"a": "x", "b": "y"}, None, r"^calibration\.data: .*columns: a, b\."),
        ({"a": "x"}, "aa", r"^calibration\.column: 'aa'.*Did you mean 'a'\?"),
        ({"a": ["x"]}, "a", r"column 'a' .* holds list, not text"),
    ],
)
def test_a_column_that_is_not_clear_is_asked_for(
    row: dict[str, Any], column: str | None, message: str, tmp_path: Path
) -> None:
    path = write_table(tmp_path / "a.jsonl", [row])
    with pytest.raises(RecipeError, match=message):
        list(read_documents(path, seed=0, column=column))


def test_folders_and_globs_are_read_in_seeded_order(tmp_path: Path) -> None:
    for i in range(6):
        (tmp_path / f"{i}.txt").write_text(f"text {i}")
    (tmp_path / "ignored.bin").write_text("not text")
    orders = [list(read_documents(str(tmp_path), seed=seed)) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == [f"text {i}" for i in range(6)]
    assert list(read_documents(str(tmp_path / "[01].txt"), seed=0)) != []
    assert evaluation_text(str(tmp_path)) == "\n\n".join(f"text {i}" for i in range(6))


def test_names_that_are_not_there_get_a_near_match(tmp_path: Path) -> None:
    (tmp_path / "novels.txt").write_text("words")
    with pytest.raises(UnknownName, match="Did you mean 'demo'"):
        next(read_documents("dmo", seed=0))
    with pytest.raises(UnknownName, match=r"Did you mean '.*novels\.txt'"):
        next(read_documents(str(tmp_path / "novel.txt"), seed=0))
    with pytest.raises(UnknownName, match="Did you mean 'wikitext2'"):
        evaluation_text("wikitxt2")


def test_files_without_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text('{"text": "x"}\n{bad')
    (tmp_path / "latin.txt").write_bytes(b"\xe9")
    (tmp_path / "a.bin").write_bytes(b"x")
    for name, message in {
        "empty.txt": "there is no text in it",
        "empty.jsonl": "there is no text in it",
        "broken.jsonl": "cannot read",
        "latin.txt": "Give text in UTF-8",
        "a.bin": r"Give files that end in \.txt",
        "*.md": "holds no file",
    }.items():
        with pytest.raises(RecipeError, match=message):
            list(read_documents(str(tmp_path / name), seed=0))


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_reading_may_stop_in_the_middle(name: str, tmp_path: Path) -> None:
    path = write_table(tmp_path / name, ROWS * 200)
    documents = read_documents(path, seed=0)
    assert next(documents) == TEXTS[0]
    documents.close()  # type: ignore[attr-defined]


def test_json_may_be_an_array_of_texts_and_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(TEXTS), encoding="utf-8-sig")
    assert list(read_documents(str(tmp_path / "a.json"), seed=0)) == TEXTS


def test_columns_that_change_their_type_are_no_obstacle(tmp_path: Path) -> None:
    rows = [{"text": "a", "meta": {"n": 1}}, {"text": "b", "meta": [1]}, {"text": "c"}]
    path = write_table(tmp_path / "a.jsonl", rows)
    assert list(read_documents(path, seed=0)) == ["a", "b", "c"]


@pytest.mark.parametrize("part", ["split", "config", "revision"])
def test_parts_of_a_data_set_are_refused_for_files(part: str, tmp_path: Path) -> None:
    path = write_table(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(RecipeError, match=rf"^calibration\.{part}: .* is no data set on the Hub"):
        open_text(Portion(data=path, **{part: "train"}))


def test_a_question_and_its_answer_are_one_document(tmp_path: Path) -> None:
    rows = [{"instruction": "Add.", "input": "1 + 1", "output": "2", "source": "x"}]
    path = write_table(tmp_path / "a.jsonl", rows)
    assert list(read_documents(path, seed=0)) == ["Add.\n\n1 + 1\n\n2"]


@pytest.mark.parametrize("name", ["a" * 5000, "a" * 300 + "/b", "x" * 300 + ".txt", "[a]" * 2000])
def test_a_name_too_long_for_a_file_is_no_file(name: str) -> None:
    with pytest.raises(RecipeError, match=r"^calibration\.data: "):
        local_files(name, "calibration.data")
    assert place_of(name) in ("local", "hub")


def test_what_is_there_but_no_file_is_not_its_own_near_match(tmp_path: Path) -> None:
    (tmp_path / "a.txt").symlink_to("nowhere")
    with pytest.raises(UnknownName, match="a link to nothing") as raised:
        next(read_documents(str(tmp_path / "a.txt"), seed=0))
    assert "Did you mean" not in str(raised.value)


def test_half_a_character_is_shown(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "before \\ud800 after"}\n', encoding="utf-8")
    (text,) = read_documents(str(path), seed=0)
    with pytest.raises(RecipeError, match=r"half a character .* at 'before \\ud800'"):
        token_ids(text, tokenizer)


def test_a_tokenizer_that_cannot_read_is_told() -> None:
    words = Tokenizer(WordLevel({"a": 0}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    with pytest.raises(CheckpointError, match=r"cannot read 'a b' \(WordLevel error"):
        token_ids("a b", PreTrainedTokenizerFast(tokenizer_object=words))


@pytest.mark.parametrize("data", ["", " ", None, ["a"]])
def test_evaluation_text_has_a_name(data: Any) -> None:
    with pytest.raises(RecipeError, match=r"^evaluate\.data: .* names no text\. Give demo"):
        evaluation_text(data)
