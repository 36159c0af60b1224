"""A push fails at every request in every way: it says so, loses nothing, and works again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

import llmprune
from llmprune import runs
from llmprune.base.errors import CheckpointError, LlmpruneError, RecipeError
from llmprune.base.progress import Progress
from llmprune.recipe import build
from llmprune.report import publishing
from llmprune.report.publishing import Package, pack
from llmprune.report.uploading import check_repository, upload
from llmprune.runs import plans_of, run_recipe
from tests.conftest import Pico
from tests.report.conftest import Result
from tests.story.conftest import Command, command
from tests.story.test_push import snapshot
from tests.story.upload_hub import ECHO, HUNG_UP, LOST, TOKEN, Repository, UploadHub, serving

__all__ = ["command"]
STATUSES = (HUNG_UP, LOST, 500, 401, 403, 409, 429)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[UploadHub]:
    """A Hub in this process, which the client waits for no longer than it must."""
    with serving({}) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(time, "sleep", lambda _: None)
        huggingface_hub.constants.HF_HUB_DISABLE_PROGRESS_BARS = True
        yield server


@pytest.fixture
def small(result: Result, monkeypatch: pytest.MonkeyPatch) -> Package:
    """A packed result of few small files."""
    monkeypatch.setattr(publishing, "_picture", lambda report: b"a picture")
    return pack(result(), "me/small")


def arrived(hub: UploadHub, repo: str = "me/small") -> dict[str, bytes]:
    return dict(hub.repositories[repo].files)


def expected(package: Package) -> dict[str, bytes]:
    return {**{n: p.read_bytes() for n, p in package.files.items()}, **package.texts}


def forget(hub: UploadHub) -> None:
    hub.repositories.clear()
    hub.objects.clear()
    hub.seen.clear()
    hub.faults = {}


def test_every_request_may_fail_in_every_way(
    hub: UploadHub, small: Package, capfd: pytest.CaptureFixture[str], caplog: Any
) -> None:
    few = ("config.json", "model-00001-of-00003.safetensors")
    small = replace(small, files={name: small.files[name] for name in few})
    before, whole = snapshot(small.folder), expected(small)
    upload(small)
    assert arrived(hub) == whole
    count = len(hub.seen)
    assert count >= 8
    told = []
    for place in range(count):
        for status in STATUSES:
            forget(hub)
            hub.faults = {place: status}
            try:
                upload(small)
            except LlmpruneError as error:
                told.append(str(error))
                has_said_so = "Nothing was committed" in told[-1]
                commits = hub.repositories["me/small"].commits if hub.repositories else []
                assert not (has_said_so and commits), (place, status, told[-1])
                upload(small)
            assert arrived(hub) == whole, (place, status)
            assert len(hub.repositories["me/small"].commits) == 1, (place, status)
    assert snapshot(small.folder) == before
    out, err = capfd.readouterr()
    for text in (out, err, caplog.text, small.card, *told):
        assert TOKEN not in text
    assert len(told) > 3 * count
    remedies = ("Go online", "hf auth login", "same command again", "again later")
    assert not [text for text in told if not any(words in text for words in remedies)]


def test_an_answer_that_got_lost_is_no_failure(hub: UploadHub, small: Package) -> None:
    upload(small)
    (place,) = (at for at, (_, verb, path) in enumerate(hub.seen) if "/commit/" in path)
    forget(hub)
    hub.faults = {place: LOST}
    done = upload(small)
    assert done.commit == hub.repositories["me/small"].head
    assert len(hub.repositories["me/small"].commits) == 1


@pytest.mark.parametrize("name", ["README.md", "model-00001-of-00003.safetensors"])
def test_what_arrived_otherwise_is_told(name: str, hub: UploadHub, small: Package) -> None:
    hub.garbled = name
    with pytest.raises(CheckpointError, match=f"{name} is not in me/small as it was sent"):
        upload(small)
    hub.garbled = ""
    upload(small)
    assert arrived(hub) == expected(small)


SCOPES = {"global": [], "scoped": [{"permissions": ["repo.content.read", "discussion.read"]}]}


@pytest.mark.parametrize(
    ("token", "reads"),
    [
        ({"role": "read"}, True),
        ({"role": "write"}, False),
        ({"role": "fineGrained", "fineGrained": SCOPES}, True),
        ({"role": "fineGrained", "fineGrained": {"global": ["repo.write"]}}, False),
    ],
)  # fmt: skip
def test_a_token_that_may_only_read_is_refused(
    token: dict[str, Any], reads: bool, hub: UploadHub
) -> None:
    hub.auth = {"accessToken": token}
    if not reads:
        return check_repository("me/new")
    with pytest.raises(CheckpointError, match=r"may only read: you are me, .*hf auth login"):
        check_repository("me/new")
    return None


MEASURED = {"perplexity": False}
LLAMA = "---\nlicense: llama3.1\n---\n"


def test_a_llama_is_named_as_its_licence_asks(
    hub: UploadHub, result: Result, command: Command
) -> None:
    folder = result()
    (folder / "README.md").write_text(LLAMA, encoding="utf-8")
    package = pack(folder, "me/small")
    assert "**Built with Llama.**" in package.card
    assert package.texts["NOTICE"].startswith(b"Llama 3.1 is licensed under the Llama 3.1 Comm")
    with pytest.raises(RecipeError, match="Name it me/Llama-small, or keep it to yourself"):
        upload(package)
    assert (
        "Public, it would be me/Llama-small" in command("push", folder, "me/small", "--dry-run").out
    )
    assert not hub.repositories
    upload(pack(folder, "me/Llama-small"))
    assert "NOTICE" in arrived(hub, "me/Llama-small")


def recipe_of(model: Path, text: Path, out: Path, **wish: Any) -> Any:
    """Return the recipe of a small pruning that pushes at its end."""
    return build(
        {
            "model": str(model), "out": str(out),
            "calibration": {"data": str(text), "num_samples": 4, "seq_len": 16},
            "steps": [{"prune": {"sparsity": 0.5}}, {"evaluate": MEASURED}, {"push": wish}],
        }
    )  # fmt: skip


@pytest.fixture
def pushes(pico: Pico, text_file: Path, tmp_path: Path, quick_gate: None) -> Callable[..., Any]:
    """Return what makes a recipe that pushes: `pushes(repo="me/small")`."""
    return lambda **wish: recipe_of(pico("llama"), text_file, tmp_path / "out", **wish)


def test_a_recipe_pushes_what_it_made(
    hub: UploadHub, pushes: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publishing, "_picture", lambda report: b"a picture")
    recipe = pushes(repo="me/small", private=True)
    assert plans_of(recipe)[1:] == [{"push": {"repo": "me/small", "private": True}}]
    hub.failures[-1] = {"/commit/": (403, ECHO)}
    with pytest.raises(CheckpointError, match=r"The result is finished, in .* --private`"):
        run_recipe(recipe, Progress("quiet"))
    before = snapshot(tmp_path / "out")
    del hub.failures[-1]
    run_recipe(recipe, Progress("quiet"))
    assert snapshot(tmp_path / "out") == before
    files = arrived(hub)
    assert hub.repositories["me/small"].private
    assert {"llmprune/report.html", "llmprune/report.png"} <= set(files)
    assert b"push" not in files["llmprune/run.json"]


def test_a_recipe_that_could_not_push_stops_before_it_begins(
    hub: UploadHub, pushes: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories["me/taken"] = Repository(branches={"main": {"config.json": b"{}"}})
    monkeypatch.setattr(runs, "open_plan", lambda *_, **__: pytest.fail("work began"))
    for repo, words in (
        ("me/taken", "holds a model that llmprune did not push"),
        ("me/x", "log in"),
    ):
        with pytest.raises(
            LlmpruneError, match=rf"^steps\[2\]\.push: .*{words}.* leave the step out"
        ):
            run_recipe(pushes(repo=repo), Progress("quiet"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr("huggingface_hub.hf_api.get_token", lambda: None)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        (
            [{"prune": {}}, {"push": {"repo": "a b"}}],
            r"push\.repo: 'a b' is no name of a repository",
        ),
        ([{"prune": {}}, {"push": {}}], r"push\.repo: missing"),
        (
            [{"prune": {}}, {"push": {"repo": "a/b", "hidden": 1}}],
            r"push\.hidden: there is no such",
        ),
        (
            [{"push": {"repo": "a/b"}}, {"prune": {"sparsity": 0.5}}],
            "step 0 pushes, and something comes after it",
        ),
        ([{"push": {"repo": "a/b"}}], "no step prunes"),
        (
            [{"prune": {}}, {"push": {"repo": "a/b", "create_pr": True, "revision": "v2"}}],
            "a pull request goes to the main branch",
        ),
    ],
)
def test_a_wish_to_push_that_cannot_be_is_told(steps: list[Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        build({"model": "demo", "steps": steps})


def test_a_model_in_memory_has_nothing_to_push(make_model: Callable[..., Any]) -> None:
    with pytest.raises(RecipeError, match="has no folder to push"):
        llmprune.prune(make_model("llama"), sparsity=0.5, settings=["push.repo=me/x"])
