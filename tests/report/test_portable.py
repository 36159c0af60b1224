"""Nothing that leaves says where on this machine it lay."""

from __future__ import annotations

import pytest

from llmprune.report.portable import is_place, last_name, without_places, without_roots


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("/home/me/models/llama", "llama"),
        ("/home/me/models/llama/", "llama"),
        ("~/llama", "llama"),
        ("../models/llama", "llama"),
        ("C:\\Users\\me\\llama", "llama"),
        ("/one", "one"),
    ],
)
def test_a_path_is_cut_to_its_last_name(text: str, left: str) -> None:
    assert is_place(text)
    assert last_name(text) == left
    assert without_places({"a": [text]}) == {"a": [left]}


@pytest.mark.parametrize(
    "text",
    [
        "owner/name",
        "demo",
        "https://huggingface.co/owner/name",
        "arXiv:2306.11695",
        "3 MB/s and 1/2 of it, and/or nothing",
        "model.layers.0.mlp.experts.1.up_proj",
        "2.13.0+cpu",
        "",
    ],
)
def test_what_is_no_path_stays(text: str) -> None:
    assert without_places(text) == text


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("cannot read '/home/me/a.txt': empty", "cannot read 'a.txt': empty"),
        ("/home/me/a.txt: empty", "a.txt: empty"),
        ("see file:///home/me/a.txt, (/b/c)", "see a.txt, (c)"),
        ("C:\\Users\\me\\a.txt broke", "a.txt broke"),
        ("--calib ~/texts/a.txt", "--calib a.txt"),
    ],
)
def test_paths_in_sentences_are_cut(text: str, left: str) -> None:
    assert without_places(text) == left


def test_known_paths_may_hold_spaces() -> None:
    place = "/home/John Smith/my texts/a.txt"
    assert without_places(f"cannot read {place}.", [place]) == "cannot read a.txt."


def test_numbers_and_shapes_stay() -> None:
    data = {"a": [1, 2.5, None, True], "b": {"c": [3, 4]}}
    assert without_places(data) == data


def test_files_of_other_programs_lose_paths_but_not_tokens() -> None:
    data = {
        "_name_or_path": "/data/llama",
        "best_model_checkpoint": "/elsewhere/run-1",
        "additional_special_tokens": ["/think", "/no_think"],
        "template": "/home/me/texts/x.jinja",
        "repository": "owner/name",
    }
    assert without_roots(data, ["/home/me"]) == data | {
        "_name_or_path": "llama",
        "best_model_checkpoint": "run-1",
        "template": "x.jinja",
    }


def test_a_mix_of_paths_keeps_every_name() -> None:
    places = ["/home/me/x/a.jsonl", "/home/me/y y/b.jsonl"]
    mix = f"{places[0]}:3,{places[1]}:1,c4:1"
    assert without_places({"data": mix}, places) == {"data": "a.jsonl:3,b.jsonl:1,c4:1"}
    assert without_places("/home/me/a.txt,~/b.txt") == "a.txt,b.txt"
