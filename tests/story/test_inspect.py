"""`llmprune inspect`: what it prints, and that wrong input ends with helpful words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.story.conftest import Ended

Command = Callable[..., Ended]


def test_it_names_blocks_taps_couplings_and_what_stays(source: Path, command: Command) -> None:
    ended = command("inspect", source)
    assert ended.code == 0 and not ended.err
    for words in (
        "llama, a row of the family table", "4 at model.layers", "blocks 0-3", "attn_in",
        "self_attn.q_proj", "intermediate_size", "norms, biases, scales", "lm_head.weight",
    ):  # fmt: skip
        assert words in ended.out


def test_json_holds_the_same(source: Path, command: Command) -> None:
    ended = command("inspect", source, "--json")
    found = json.loads(ended.out)
    assert ended.code == 0 and found["blocks"] == "model.layers"
    (kind,) = found["kinds"]
    assert kind["blocks"] == [0, 1, 2, 3]
    assert kind["couplings"][0] == "ffn-channels" and "heads" in kind["couplings"]
    assert {name for tap in kind["taps"] for name in tap["readers"]} == kind["linears"].keys()


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ("{", "not valid JSON"),
        ("{}", "model_type"),
        ('{"model_type": "llama", "quantization_config": {"quant_method": "awq"}}', "quantised"),
        ('{"model_type": "odd", "auto_map": {"AutoConfig": "odd.C"}}', "--trust-remote-code"),
        ('{"model_type": "xlm"}', "more than one list"),
    ],
)
def test_an_unsuitable_model_is_the_users_fault(
    config: str, says: str, own_source: Path, command: Command
) -> None:
    (own_source / "config.json").write_text(config)
    ended = command("inspect", own_source)
    assert ended.code == 2 and not ended.out
    assert ended.err.startswith("error: ") and says in ended.err
    assert "Traceback" not in ended.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["no/such/folder/at/all"], "no/such/folder/at/all"),
        ([], "Missing argument"),
        (["one", "two"], "unexpected extra argument"),
    ],
)
def test_wrong_arguments_are_told(arguments: list[str], says: str, command: Command) -> None:
    ended = command("inspect", *arguments)
    assert ended.code == 2 and says in ended.err
