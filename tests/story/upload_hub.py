"""A server in this process that speaks the upload protocol of the Hub and keeps what it saw."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote

TOKEN = "hf_" + "aFakeTokenThatMustNeverShow"
USER = "me"
HUNG_UP = 0  # in place of a status: no answer at all
LOST = -1  # the request does its work, and the answer never arrives
ECHO = f"the server says {TOKEN} back"


@dataclass
class Repository:
    """A repository: its files by branch, and every commit with what it changed."""

    private: bool = False
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    commits: list[dict[str, Any]] = field(default_factory=list)
    at: dict[str, dict[str, bytes]] = field(default_factory=dict)  # files by commit

    @property
    def head(self) -> str:
        return hashlib.sha1(str(len(self.commits)).encode()).hexdigest()

    @property
    def files(self) -> dict[str, bytes]:
        return self.branches["main"]


class UploadHub(ThreadingHTTPServer):
    """Holds repositories and uploaded objects; answers with the failures of the current command."""

    def __init__(self, failures: dict[int, dict[str, tuple[int, str]]]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.failures = failures
        self.command = -1
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.seen: list[tuple[int, str, str]] = []
        self.auth: dict[str, Any] = {}  # what whoami tells of the token
        self.faults: dict[int, int] = {}  # requests to come until one fails, and its status
        self.garbled = ""  # a file that is kept otherwise than it was sent

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def of(self, command: int, pattern: str) -> list[str]:
        """Return the requests of a command that match."""
        found = [f"{verb} {path}" for number, verb, path in self.seen if number == command]
        return [request for request in found if re.search(pattern, request)]


@contextmanager
def serving(failures: dict[int, dict[str, tuple[int, str]]]) -> Iterator[UploadHub]:
    """Serve until the end of the block."""
    server = UploadHub(failures)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    server: UploadHub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are two packets
    lost = False

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if mark := re.fullmatch(r"/command/(\d+)", path):
            self.server.command = int(mark[1])
            return self.answer({})
        self.server.seen.append((self.server.command, self.command, path))
        due = self.server.faults.pop(0, None)
        self.server.faults = {left - 1: status for left, status in self.server.faults.items()}
        self.lost = due == LOST
        if due not in (None, LOST):
            return self.fail(due, ECHO)
        for pattern, (status, text) in self.server.failures.get(self.server.command, {}).items():
            if re.search(pattern, path):
                return self.fail(status, text)
        free = path.startswith("/objects/") or path.endswith("/validate-yaml")
        if not free and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.fail(401, "Invalid credentials in Authorization header")
        for pattern, reply in ROUTES.items():
            if found := re.fullmatch(pattern, f"{self.command} {path}"):
                return reply(
                    self, body, query, *(unquote(part or "main") for part in found.groups())
                )
        return self.fail(404, f"nothing answers {self.command} {path}")

    do_POST = do_PUT = do_GET

    def who(self, body: bytes, query: str) -> None:
        self.answer({"name": USER, "type": "user", "orgs": [], "auth": self.server.auth})

    def validate(self, body: bytes, query: str) -> None:
        self.answer({"errors": [], "warnings": []})

    def create(self, body: bytes, query: str) -> None:
        asked = json.loads(body)
        name = f"{asked['organization'] or USER}/{asked['name']}"
        address = {"url": f"{self.server.address}/{name}"}
        if name in self.server.repositories:
            return self.answer(address, status=409)
        private = asked.get("private") or asked.get("visibility") == "private"
        self.server.repositories[name] = Repository(private=bool(private))
        self.answer(address)

    def branch(self, body: bytes, query: str, name: str, branch: str) -> None:
        branches = self.server.repositories[name].branches
        branches.setdefault(branch, dict(branches["main"]))
        self.answer({})

    def info(self, body: bytes, query: str, name: str, branch: str) -> None:
        repository = self.server.repositories.get(name)
        if repository is None or branch not in repository.branches:
            kind = "RepoNotFound" if repository is None else "RevisionNotFound"
            return self.answer({"error": "not there"}, status=404, **{"X-Error-Code": kind})
        files = [{"rfilename": path} for path in repository.branches[branch]]
        found = {"id": name, "modelId": name, "sha": repository.head, "siblings": files}
        self.answer(found | {"private": repository.private, "tags": [], "downloads": 0})

    def tree(self, body: bytes, query: str, name: str, commit: str) -> None:
        repository = self.server.repositories[name]
        files = repository.at.get(commit, repository.files)
        self.answer([entry_of(path, content) for path, content in sorted(files.items())])

    def preupload(self, body: bytes, query: str, name: str, branch: str) -> None:
        there = self.server.repositories[name].branches[branch]
        answers = []
        for asked in json.loads(body)["files"]:
            large = asked["path"].endswith(".safetensors")
            oid = content_name(there[asked["path"]], large) if asked["path"] in there else None
            mode = "lfs" if large else "regular"
            one = {"path": asked["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}
            answers.append(one)
        self.answer({"files": answers})

    def batch(self, body: bytes, query: str, name: str) -> None:
        wanted = json.loads(body)["objects"]
        found = []
        for one in wanted:
            action = {"upload": {"href": f"{self.server.address}/objects/{one['oid']}"}}
            known = one["oid"] in self.server.objects
            found.append(one | ({} if known else {"actions": action}))
        self.answer({"transfer": "basic", "objects": found})

    def put(self, body: bytes, query: str, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.objects[oid] = body
        self.answer({})

    def commit(self, body: bytes, query: str, name: str, branch: str) -> None:
        repository = self.server.repositories[name]
        lines = [json.loads(line) for line in body.splitlines()]
        header = lines[0]["value"]
        if header.get("parentCommit", repository.head) != repository.head:
            return self.fail(412, "a commit has happened since")
        proposed = "create_pr=1" in query
        files = dict(repository.branches[branch])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        changed = [line["value"]["path"] for line in lines[1:]]
        repository.commits.append({"message": header["summary"], "changed": changed})
        found = {"commitUrl": f"{self.server.address}/{name}/commit/{repository.head}"}
        if proposed:
            found["pullRequestUrl"] = f"{self.server.address}/{name}/discussions/1"
        else:
            repository.branches[branch] = files
        if self.server.garbled in files:
            files[self.server.garbled] += b"!"
        repository.at[repository.head] = files
        self.answer(found | {"commitOid": repository.head, "success": True})

    def fail(self, status: int, text: str) -> None:
        if status == HUNG_UP:
            self.close_connection = True
            return
        self.answer({"error": text}, status=status, **{"X-Error-Message": text})

    def answer(self, data: Any, *, status: int = 200, **headers: str) -> None:
        if self.lost:
            self.close_connection = True
            return
        body = json.dumps(data).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


def entry_of(path: str, content: bytes) -> dict[str, Any]:
    """Return a file as the Hub lists it."""
    entry = {
        "type": "file",
        "path": path,
        "size": len(content),
        "oid": content_name(content, False),
    }
    if path.endswith(".safetensors"):
        digest = content_name(content, True)
        entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 130}
    return entry


def content_name(data: bytes, large: bool) -> str:
    """Return what names a file's content: git's hash, or the plain one for large files."""
    if large:
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


ROUTES = {
    r"GET /api/whoami-v2": Handler.who,
    r"POST /api/validate-yaml": Handler.validate,
    r"POST /api/repos/create": Handler.create,
    r"GET /api/models/([\w-]+/[\w-]+)(?:/revision/(.+))?": Handler.info,
    r"GET /api/models/(.+)/tree/(.+)": Handler.tree,
    r"POST /api/models/(.+)/branch/(.+)": Handler.branch,
    r"POST /api/models/(.+)/preupload/(.+)": Handler.preupload,
    r"POST /(.+)\.git/info/lfs/objects/batch": Handler.batch,
    r"PUT /objects/(.+)": Handler.put,
    r"POST /api/models/(.+)/commit/(.+)": Handler.commit,
}
