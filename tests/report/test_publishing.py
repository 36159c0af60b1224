"""What is packed for the Hub, and what is not packed at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmprune.base.errors import CheckpointError, RecipeError
from llmprune.pushing import package_of
from llmprune.report.publishing import pack
from tests.report.conftest import Result
from tests.story.conftest import Command, command

__all__ = ["command"]


def test_only_what_belongs_to_a_model_is_packed(result: Result) -> None:
    folder = result()
    strays = (".env", "notes.log", "optimizer.pt", "other.safetensors", ".cache/x.json", "sub/a.py")
    for name in strays:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("stray", encoding="utf-8")
    kept = (
        "LICENSE",
        "chat_template.jinja",
        "modeling_own.py",
        "additional_chat_templates/x.jinja",
    )
    for name in kept:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("kept", encoding="utf-8")
    names = set(pack(folder, "me/small").sizes)
    assert not set(strays) & names
    assert set(kept) <= names
    assert {"README.md", "config.json", "tokenizer.json", "llmprune/run.json"} <= names
    assert "llmprune/events.jsonl" not in names


def test_sizes_are_those_of_what_would_be_sent(result: Result) -> None:
    package = pack(result(), "me/small")
    assert package.sizes["README.md"] == len(package.card.encode())
    for name, path in package.files.items():
        assert package.sizes[name] == path.stat().st_size


@pytest.mark.parametrize(
    "name", ["", "a/b/c", "https://huggingface.co/me/x", "me/-x", "a b", "x.git"]
)
def test_a_name_that_the_hub_does_not_take_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"^repo: .* is no name of a repository\. Give OWNER/NAME"
    ):
        pack(tmp_path, name)
    with pytest.raises(RecipeError, match=r"^base_model: "):
        pack(tmp_path, "me/x", base_model=name)


def test_what_is_no_result_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a finished result of llmprune"):
        pack(tmp_path, "me/small")


def test_a_result_without_a_passed_gate_is_refused(result: Result) -> None:
    folder = result()
    path = folder / "llmprune" / "report.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(data | {"gate": None}), encoding="utf-8")
    with pytest.raises(CheckpointError, match="never proven to load"):
        pack(folder, "me/small")


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_a_damaged_report_is_told(text: str, result: Result) -> None:
    folder = result()
    (folder / "llmprune" / "report.json").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"report\.json "):
        pack(folder, "me/small")


@pytest.mark.parametrize("name", ["notes.txt", "TOKENS", "config.json", "llmprune/report.json"])
def test_a_file_with_a_token_stays(
    name: str, result: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = result()
    monkeypatch.setenv("HF_TOKEN", "own-token")
    for token in ("hf_" + "a1B2" * 9, "own-token"):
        before = (folder / name).read_text(encoding="utf-8") if (folder / name).exists() else "{}"
        data = json.loads(before) | {"note": f"it is {token}."}
        (folder / name).write_text(json.dumps(data), encoding="utf-8")
        with pytest.raises(CheckpointError, match=f"{name} holds a token of the Hub") as raised:
            pack(folder, "me/small")
        assert token not in str(raised.value)
        (folder / name).write_text(before, encoding="utf-8")
    assert name in pack(folder, "me/small").sizes


def test_a_missing_shard_is_told(result: Result) -> None:
    folder = result()
    (folder / "model-00001-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00001-of-00003"):
        pack(folder, "me/small")


@pytest.mark.parametrize(
    "name", ["model-00002-of-00003.safetensors", "llmprune/masks-00001-of-00003.safetensors"]
)
def test_a_file_that_was_changed_after_the_proof_is_refused(name: str, result: Result) -> None:
    folder = result()
    data = bytearray((folder / name).read_bytes())
    data[-1] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=f"{name} is not the file that was proven"):
        pack(folder, "me/small")


def test_a_dry_run_prints_card_and_files(
    result: Result, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = result()
    monkeypatch.setattr("huggingface_hub.HfApi.whoami", lambda *_: pytest.fail("asked the Hub"))
    ended = command("push", folder, "me/small", "--dry-run")
    assert ended.code == 0
    assert ended.out.startswith("---\nlibrary_name: transformers\n")
    assert "  tokenizer.json\n" in ended.out
    assert ended.out.rstrip().endswith("would go to me/small; nothing was sent")
    found = json.loads(command("push", folder, "me/small", "--dry-run", "--json").out)
    assert found["files"] == package_of(folder, "me/small").sizes
