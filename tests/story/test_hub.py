"""A model on the Hub: planned from headers, downloaded once, and only what is needed."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import NamedTuple

import pytest

COMMITS = {"main": "a" * 40, "v2": "b" * 40}
DECOYS = (
    "pytorch_model.bin",
    "onnx/model.onnx",
    "original/consolidated.00.pth",
    "other.safetensors",
    "flax_model.msgpack",
)

COMMANDS = """
import json, os, sys, urllib.request
from llmprune import cli
from llmprune.delivery import gate, stock
from llmprune.evaluation import samples

def run_here(command, **options):
    stock.main(command[2])
    return gate.subprocess.CompletedProcess(command, 0, "", "")

gate.subprocess.run = run_here  # the same checks without the start of another Python
samples.PROMPTS = ()
codes = []
for number, arguments in enumerate(json.loads(sys.argv[1])):
    urllib.request.urlopen(f"{os.environ['HF_ENDPOINT']}/command/{number}")
    try:
        cli.main(arguments)
    except SystemExit as left:
        codes.append(left.code)
print("\\n" + json.dumps(codes))
"""


def digest(data: bytes) -> str:
    """Return what names a file's content, as git does."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Request(NamedTuple):
    """One request that the server saw, and during which command."""

    command: int
    method: str
    path: str
    part: str | None


class Hub(ThreadingHTTPServer):
    """Speaks the read protocol of the Hub for one repository."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = files
        self.seen: list[Request] = []
        self.command = -1
        self.silent_from = 1000

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def of(self, command: int, pattern: str = "") -> list[Request]:
        return [r for r in self.seen if r.command == command and re.search(pattern, r.path)]


class Handler(BaseHTTPRequestHandler):
    """Answers model info, HEAD and ranges of files."""

    server: Hub

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if mark := re.fullmatch(r"/command/(\d+)", path):
            self.server.command = int(mark[1])
            return self.answer(b"{}")
        part = self.headers.get("Range")
        self.server.seen.append(Request(self.server.command, self.command, path, part))
        if self.server.command >= self.server.silent_from:
            return self.answer(b"{}", status=503)
        if info := re.fullmatch(r"/api/models/owner/name(?:/revision/(.+))?", path):
            return self.info(info[1] or "main")
        if re.fullmatch(r"/api/models/owner/name/tree/.+", path):
            return self.answer(
                json.dumps(
                    [
                        {"type": "file", "path": name, "size": len(data), "oid": digest(data)}
                        for name, data in self.server.files.items()
                    ]
                ).encode()
            )
        if file := re.fullmatch(r"/owner/name/resolve/([^/]+)/(.+)", path):
            return self.file(file[1], file[2], part)
        return self.answer(b"{}", status=404)

    do_HEAD = do_GET

    def info(self, revision: str) -> None:
        commit = COMMITS.get(revision, revision)
        files = [{"rfilename": name, "size": len(data)} for name, data in self.server.files.items()]
        found = {"id": "owner/name", "modelId": "owner/name", "sha": commit, "siblings": files}
        self.answer(json.dumps(found | {"private": False, "tags": [], "downloads": 0}).encode())

    def file(self, revision: str, name: str, part: str | None) -> None:
        if name not in self.server.files:
            return self.answer(b"{}", status=404, **{"X-Error-Code": "EntryNotFound"})
        data = self.server.files[name]
        headers = {
            "ETag": f'"{digest(data)}"',
            "X-Repo-Commit": COMMITS.get(revision, revision),
            "Accept-Ranges": "bytes",
        }
        if part:
            first, last = (int(n) if n else None for n in part.removeprefix("bytes=").split("-"))
            end = min(len(data) - 1, last if last is not None else len(data))
            headers["Content-Range"] = f"bytes {first}-{end}/{len(data)}"
            return self.answer(data[first : end + 1], status=206, **headers)
        return self.answer(data, **headers)

    def answer(self, body: bytes, *, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def hub(source: Path) -> Iterator[Hub]:
    """A server in front of the small llama, with weights of other kinds beside it."""
    files = {path.name: path.read_bytes() for path in sorted(source.iterdir())}
    server = Hub(files | dict.fromkeys(DECOYS, b"not to be fetched"))
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


class Story(NamedTuple):
    """What a sequence of commands did."""

    codes: list[int]
    err: str
    home: Path
    shards: list[str]


@pytest.fixture(scope="module")
def story(hub: Hub, tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Story:
    """Plan, prune, prune again, plan another revision, plan without a Hub: in one process."""
    home = tmp_path_factory.mktemp("hub")
    model = ["--model", "owner/name", "--calib", str(text_file), "--num-samples", "4"]
    model += ["--seq-len", "16", "--no-eval"]
    commands = [
        ["plan", *model, "--sparsity", "0.5"],
        [*model, "--sparsity", "0.5"],
        [*model, "--sparsity", "0.25", "--method", "magnitude", "--dry-run"],
        ["plan", *model, "--sparsity", "0.5", "--revision", "v2"],
        ["plan", *model, "--sparsity", "0.5"],
    ]
    hub.silent_from = len(commands) - 1
    environment = os.environ | {
        "HF_ENDPOINT": hub.address,
        "HF_HOME": str(home / "cache"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.getcwd(),
    }
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, json.dumps(commands)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=home,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    index = json.loads(hub.files["model.safetensors.index.json"])
    codes = json.loads(done.stdout.splitlines()[-1])
    assert codes[:-1] == [0] * 4, done.stderr
    return Story(codes, done.stderr, home, sorted(set(index["weight_map"].values())))


def shard_downloads(hub: Hub, command: int) -> list[str]:
    """Return the names of shards that a command fetched, headers (by range) aside."""
    found = hub.of(command, r"\.safetensors$")
    return sorted(
        request.path.rpartition("/")[2]
        for request in found
        if request.method == "GET" and not (request.part or "").startswith("bytes=0-")
    )


def test_planning_reads_headers_and_downloads_no_shard(hub: Hub, story: Story) -> None:
    assert shard_downloads(hub, 0) == []
    ranges = [request for request in hub.of(0, r"\.safetensors$") if request.part]
    assert {request.path.rpartition("/")[2] for request in ranges} == set(story.shards)


def test_pruning_downloads_every_shard_once(hub: Hub, story: Story) -> None:
    assert shard_downloads(hub, 1) == story.shards
    out = story.home / "name-wanda-0.5"
    assert (out / "model.safetensors.index.json").exists()
    run = json.loads((out / "llmprune" / "run.json").read_text(encoding="utf-8"))
    assert run["source"]["name"] == "owner/name"
    assert run["source"]["revision"] == COMMITS["main"]


def test_the_result_has_the_sources_tokenizer(hub: Hub, story: Story) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (story.home / "name-wanda-0.5" / name).read_bytes() == hub.files[name]


def test_the_cache_serves_the_second_time(hub: Hub, story: Story) -> None:
    assert shard_downloads(hub, 2) == []


def test_another_revision_is_another_commit(hub: Hub, story: Story) -> None:
    assert hub.of(3, "/revision/v2$")
    resolved = {request.path.split("/")[4] for request in hub.of(3, "/resolve/")}
    assert resolved == {COMMITS["v2"]}


def test_what_is_cached_needs_no_hub(hub: Hub, story: Story) -> None:
    assert hub.of(4)
    assert story.codes[4] == 0, story.err.splitlines()[-1]


def test_weights_of_other_kinds_are_never_requested(hub: Hub, story: Story) -> None:
    for name in DECOYS:
        assert not [request for request in hub.seen if request.path.endswith(name)], name
    assert not (story.home / "name-wanda-0.5" / "onnx").exists()
