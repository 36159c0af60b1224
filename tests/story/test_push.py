"""A result goes to the Hub: in one commit, with a card, without paths and without tokens."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from huggingface_hub import ModelCard

import llmprune
from llmprune.delivery import gate
from llmprune.delivery import stock as stock_script
from tests.story.upload_hub import ECHO, HUNG_UP, TOKEN, Repository, UploadHub, serving

COMMANDS = """
import contextlib, io, json, os, sys, urllib.request
from huggingface_hub import constants
from llmprune import cli
found = []
for number, (arguments, environment) in enumerate(json.loads(sys.argv[1])):
    urllib.request.urlopen(f"{os.environ['HF_ENDPOINT']}/command/{number}")
    os.environ.pop("HF_TOKEN", None)
    constants.HF_HUB_OFFLINE = "OFFLINE" in environment
    os.environ.update(environment)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main(arguments)
        except SystemExit as left:
            found.append((left.code, out.getvalue(), err.getvalue()))
print("\\n" + json.dumps(found))
"""

LICENCE = """---
license: other
license_name: a-licence
license_link: LICENSE
language:
- en
- no
tags:
- theirs
datasets: some/texts
---
# The base model
It was made by somebody else.
"""

# What is pushed, with the failures that the server answers with.
PLAN: dict[str, tuple[list[str], dict[str, tuple[int, str]]]] = {
    "first": (["me/small", "--private"], {}),
    "same": (["me/small"], {}),
    "new": (["me/small", "--message", "another method"], {}),
    "replaced": (["me/ours"], {}),
    "proposed": (["me/foreign", "--create-pr"], {}),
    "branch": (["small", "--revision", "v2", "--json"], {}),
    "public": (["me/public", "--private"], {}),
    "foreign": (["me/foreign"], {}),
    "no token": (["me/new"], {}),
    "wrong token": (["me/new"], {}),
    "odd token": (["me/new"], {}),
    "card": (["me/new"], {"validate-yaml": (400, ECHO)}),
    "forbidden": (["other/new"], {"repos/create": (403, ECHO), "api/models/other": (404, ECHO)}),
    "unwritable": (["me/new"], {"preupload": (403, ECHO)}),
    "gone": (["me/new"], {"preupload": (404, ECHO)}),
    "raced": (["me/new"], {"/commit/": (412, ECHO)}),
    "down": (["me/new"], {"repos/create": (500, ECHO)}),
    "silent": (["me/new"], {"whoami": (HUNG_UP, "")}),
    "offline": (["me/new"], {}),
}
NUMBERS = {name: number for number, name in enumerate(PLAN)}
FOREIGN = {"config.json": b"{}", "model.safetensors": b"theirs"}
EARLIER = {
    "model.safetensors": b"stale",
    "llmprune/masks-00001-of-00009.safetensors": b"stale",
    "llmprune/report.json": b"{}",
    "notes.md": b"to be kept",
}


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


class Story(NamedTuple):
    """What the commands did, and the results that they pushed."""

    hub: UploadHub
    ended: dict[str, Ended]
    result: Path
    other: Path
    before: dict[Path, dict[str, bytes]]


def gate_here(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the gate's script in this process, which spares the start of another."""
    stock_script.main(command[2])
    return subprocess.CompletedProcess(command, 0, "", "")


def snapshot(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder."""
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def results(
    source: Path, tmp_path_factory: pytest.TempPathFactory, text_file: Path
) -> tuple[Path, Path]:
    """A result of a model that has a card and a path in its config; the same with a warning."""
    home = tmp_path_factory.mktemp("private place")
    base = shutil.copytree(source, home / "base model")
    (base / "README.md").write_text(LICENCE, encoding="utf-8")
    (base / "LICENSE").write_text("Do what is right.", encoding="utf-8")
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config["_name_or_path"] = str(base)
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    found = home / "small-wanda"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gate.subprocess, "run", gate_here)
        llmprune.prune(
            base, sparsity=0.5, calib=str(text_file), num_samples=4, seq_len=16, out=found,
            quiet=True, settings=["evaluate.perplexity=false"],
        )  # fmt: skip
    other = shutil.copytree(found, home / "small-other")
    report = json.loads((other / "llmprune" / "report.json").read_text(encoding="utf-8"))
    report["warnings"] = [f"a note that names {base / 'a file'} and /somewhere/else/text.txt"]
    (other / "llmprune" / "report.json").write_text(json.dumps(report), encoding="utf-8")
    return found, other


@pytest.fixture(scope="module")
def story(results: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    """Carry out all commands in one process, one after the other."""
    first, other = results
    before = {folder: snapshot(folder) for folder in results}
    home = tmp_path_factory.mktemp("home")
    commands = []
    for name, (arguments, _) in PLAN.items():
        folder = first if name in ("first", "same") else other
        tokens = {"no token": {}, "wrong token": {"HF_TOKEN": "hf_" + "wrong"}}
        tokens["odd token"] = {"HF_TOKEN": "hf_" + "wröng"}
        environment = tokens.get(name, {"HF_TOKEN": TOKEN})
        environment |= {"OFFLINE": "1"} if name == "offline" else {}
        commands.append((["push", str(folder), *arguments], environment))
    with serving({NUMBERS[name]: failures for name, (_, failures) in PLAN.items()}) as hub:
        add_repositories(hub)
        done = subprocess.run(
            [sys.executable, "-c", COMMANDS, json.dumps(commands)],
            capture_output=True,
            text=True,
            cwd=home,
            env=os.environ
            | {
                "HF_ENDPOINT": hub.address,
                "HF_HOME": str(home / "cache"),
                "HF_HUB_DISABLE_XET": "1",
                "HF_HUB_OFFLINE": "0",
                "HF_HUB_DISABLE_PROGRESS_BARS": "1",
                "PYTHONPATH": os.getcwd(),
            },
            check=False,
        )
        assert done.returncode == 0, done.stderr
        ended = [Ended(*one) for one in json.loads(done.stdout.splitlines()[-1])]
        yield Story(hub, dict(zip(PLAN, ended, strict=True)), first, other, before)


def add_repositories(hub: UploadHub) -> None:
    """Let the server hold a public repository, one of somebody else's model, one of ours."""
    hub.repositories["me/public"] = Repository()
    hub.repositories["me/foreign"] = Repository(branches={"main": dict(FOREIGN)})
    hub.repositories["me/ours"] = Repository(branches={"main": dict(EARLIER)})


def lines_of(story: Story, name: str) -> str:
    ended = story.ended[name]
    assert ended.code == 0, ended.err
    return ended.out.strip()


def test_everything_arrives_in_one_commit(story: Story) -> None:
    pushed = story.hub.repositories["me/small"]
    commit = pushed.commits[0]
    assert sorted(commit["changed"]) == sorted(pushed.files)
    assert len(story.hub.of(NUMBERS["first"], "/commit/")) == 1
    sent = {path.relative_to(story.result).as_posix() for path in story.result.rglob("*.*")}
    assert sent - set(pushed.files) == {"llmprune/events.jsonl"}
    assert set(pushed.files) - sent == {"LICENSE", "llmprune/report.png"}
    for name in (name for name in sent if name.endswith((".safetensors", "masks.json"))):
        assert pushed.files[name] == (story.result / name).read_bytes(), name


def test_the_address_of_the_commit_is_printed(story: Story) -> None:
    out = lines_of(story, "first")
    assert out.startswith("21 files, ")
    assert out.endswith("all 21 are there as they are here, by size and hash")
    assert f"{story.hub.address}/me/small/commit/" in out


def test_a_new_repository_is_private_where_that_is_asked_for(story: Story) -> None:
    assert story.hub.repositories["me/small"].private
    assert not story.hub.repositories["me/new"].private


def test_the_card_says_what_the_model_is(story: Story) -> None:
    text = story.hub.repositories["me/small"].files["README.md"].decode()
    facts = ModelCard(text).data.to_dict()
    assert facts["library_name"] == "transformers"
    assert facts["pipeline_tag"] == "text-generation"
    assert facts["tags"] == ["llmprune", "pruned", "sparse", "wanda", "unstructured"]
    assert facts["license"] == "other"
    assert facts["license_link"] == "LICENSE"
    assert facts["language"] == ["en", "no"]
    assert facts["datasets"] == "some/texts"
    assert "base_model" not in facts
    assert 'from_pretrained("me/small"' in text
    assert "made by somebody else" not in text


def test_the_result_loads_from_what_arrived(story: Story, tmp_path: Path, stock: Any) -> None:
    for name, content in story.hub.repositories["me/small"].files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    stock(tmp_path)


def test_no_path_of_this_machine_is_pushed(story: Story) -> None:
    home = str(story.result.parent)
    assert home in (story.result / "config.json").read_text(encoding="utf-8")
    assert home in (story.other / "llmprune" / "report.json").read_text(encoding="utf-8")
    for repository in story.hub.repositories.values():
        for files in repository.branches.values():
            for name, content in files.items():
                for place in (home, str(Path(home).parent), "/somewhere", str(Path.home())):
                    assert place.encode() not in content, f"{place} in {name}"


def test_what_has_not_changed_makes_no_commit(story: Story) -> None:
    assert "/me/small/commit/" in lines_of(story, "same")
    assert not story.hub.of(NUMBERS["same"], "/commit/")


def test_a_second_push_commits_what_changed(story: Story) -> None:
    lines_of(story, "new")
    commit = story.hub.repositories["me/small"].commits[1]
    assert commit["message"] == "another method"
    assert sorted(commit["changed"]) == [
        "README.md",
        "llmprune/report.html",
        "llmprune/report.json",
    ]


def test_weights_of_an_earlier_push_go_in_the_same_commit(story: Story) -> None:
    lines_of(story, "replaced")
    ours = story.hub.repositories["me/ours"]
    assert len(ours.commits) == 1
    assert not set(EARLIER) - {"notes.md", "llmprune/report.json"} & set(ours.files)
    assert ours.files["notes.md"] == EARLIER["notes.md"]
    assert "model-00005-of-00005.safetensors" in ours.files


def test_a_pull_request_leaves_main_as_it_is(story: Story) -> None:
    assert "/me/foreign/discussions/1\n" in lines_of(story, "proposed")
    assert story.hub.repositories["me/foreign"].files == FOREIGN
    assert json.loads(lines_of(story, "branch"))["url"].startswith(story.hub.address)
    card = story.hub.repositories["me/small"].branches["v2"]["README.md"].decode()
    assert 'from_pretrained("me/small"' in card  # though only "small" was typed


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("public", "public, and --private only makes new"),
        ("foreign", "holds a model that llmprune did not push (config.json)"),
        ("no token", "no token for the Hub"),
        ("wrong token", "does not know your token (401)"),
        ("odd token", "the token for the Hub holds a character that no token has"),
        ("card", "does not accept the model card"),
        ("forbidden", "may not write to other/new (403): you are me"),
        ("unwritable", "may not write to me/new (403)"),
        ("gone", "is not there, or you are me and cannot see it (404)"),
        ("raced", "changed while this was under way (412)"),
        ("down", "the Hub answered 500"),
        ("silent", "cannot be reached"),
        ("offline", "HF_HUB_OFFLINE is set"),
    ],
)
def test_a_refusal_says_why_and_commits_nothing(name: str, words: str, story: Story) -> None:
    ended = story.ended[name]
    assert ended.code == 2
    assert words in ended.err
    assert "Traceback" not in ended.err
    assert story.hub.repositories["me/public"].commits == []
    assert story.hub.repositories["me/new"].commits == []


@pytest.mark.parametrize("name", ["no token", "wrong token", "card", "silent", "offline"])
def test_no_repository_is_made_before_token_and_card_are_accepted(name: str, story: Story) -> None:
    assert not story.hub.of(NUMBERS[name], "repos/create|PUT|/commit/")


def test_no_output_holds_a_token(story: Story) -> None:
    assert any("..." in ended.err for ended in story.ended.values())
    for name, ended in story.ended.items():
        assert TOKEN not in ended.out + ended.err, name
        assert "hf_wr" not in ended.out + ended.err, name


def test_the_pushed_folder_is_not_changed(story: Story) -> None:
    for folder, before in story.before.items():
        assert snapshot(folder) == before
