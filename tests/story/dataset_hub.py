"""A server on this machine that speaks the Hub's read protocol for data sets, and counts bytes."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any, NamedTuple
from urllib.parse import unquote

COMMIT = "c0ffee" + "0" * 34
CONVERTED = "c0ffee" + "1" * 34
REVISIONS = {"main": COMMIT, "refs/convert/parquet": CONVERTED}


class Sent(NamedTuple):
    """One answer: what was asked for, and how many bytes of a body went out."""

    method: str
    path: str
    num_bytes: int
    part: str | None


class DatasetHub(ThreadingHTTPServer):
    """Serves repositories given as ``{"owner/name": {"path": content}}``.

    A repository whose files are None is gated; one that is not there is not found. Files of the
    converted branch are given under ``owner/name@refs/convert/parquet``. From the first request
    for ``/silent`` on every answer is 503.
    """

    daemon_threads = True

    def __init__(self, repos: dict[str, dict[str, bytes] | None]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos = repos
        self.sent: list[Sent] = []
        self.authorization: set[str] = set()
        self.silent = False

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def start(self) -> None:
        Thread(target=self.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self.shutdown()
        self.server_close()

    def files(self, repo: str, commit: str) -> dict[str, bytes]:
        branch = f"{repo}@refs/convert/parquet"
        return self.repos.get(branch if commit == CONVERTED else repo) or {}

    def bytes_of(self, pattern: str, repo: str = "*") -> int:
        """Return how many bytes of the files that match a glob went out."""
        place = f"/datasets/{repo}/resolve/*/{pattern}"
        return sum(sent.num_bytes for sent in self.sent if fnmatch.fnmatch(sent.path, place))


class Handler(BaseHTTPRequestHandler):
    """Answers what the client asks to read a data set: info, listings, and ranges of files."""

    protocol_version = "HTTP/1.1"
    server: DatasetHub

    def do_GET(self) -> None:
        path = unquote(self.path.partition("?")[0])
        self.server.authorization.add(self.headers.get("Authorization", ""))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if path == "/silent":
            self.server.silent = True
            return self.answer(b"{}")
        if self.server.silent:
            return self.answer(b"{}", status=503)
        asked = re.fullmatch(
            r"/api/datasets/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/(.+))?", path
        )
        if asked:
            return self.about(asked[1], asked[2] or "revision", asked[3] or "main", body)
        if file := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/(.+)", path):
            return self.file(file[1], file[2])
        return self.answer(b"{}", status=404)

    do_HEAD = do_POST = do_GET

    def about(self, repo: str, what: str, rest: str, body: bytes) -> None:
        if self.refused(repo):
            return None
        revision, inner = split_revision(rest)
        if revision not in (*REVISIONS, *REVISIONS.values()):
            return self.answer(b"{}", status=404, **{"X-Error-Code": "RevisionNotFound"})
        files = self.server.files(repo, REVISIONS.get(revision, revision))
        if what == "revision":
            found = {"id": repo, "sha": REVISIONS.get(revision, revision), "private": False}
            siblings = [{"rfilename": name} for name in files]
            return self.answer(json.dumps(found | {"tags": [], "siblings": siblings}).encode())
        if what == "paths-info":
            wanted = json.loads(body)["paths"] if body.startswith(b"{") else form_paths(body)
            rows = [row for name in wanted for row in entries(files, name, deep=True, itself=True)]
        else:
            rows = entries(files, inner, deep="recursive=true" in self.path.lower())
            if not rows and inner:
                return self.answer(b"{}", status=404, **{"X-Error-Code": "EntryNotFound"})
        return self.answer(json.dumps(rows).encode(), **{"Content-Type": "application/json"})

    def file(self, repo: str, rest: str) -> None:
        if self.refused(repo):
            return
        revision, name = split_revision(rest)
        commit = REVISIONS.get(revision, revision)
        data = self.server.files(repo, commit).get(name)
        if data is None:
            return self.answer(b"{}", status=404, **{"X-Error-Code": "EntryNotFound"})
        headers = {"ETag": f'"{digest(data)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if part := self.headers.get("Range"):
            first, last = (int(n) if n else None for n in part.removeprefix("bytes=").split("-"))
            start = first or 0
            end = min(len(data) - 1, last if last is not None else len(data))
            if start >= len(data):
                return self.answer(b"", status=416, **headers)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            return self.answer(data[start : end + 1], status=206, **headers)
        return self.answer(data, **headers)

    def refused(self, repo: str) -> bool:
        """Answer for a repository that cannot be read, if it is one."""
        if self.server.repos.get(repo) is not None:
            return False
        gated = repo in self.server.repos
        status, code = (403, "GatedRepo") if gated else (401, "RepoNotFound")
        self.answer(b"{}", status=status, **{"X-Error-Code": code})
        return True

    def answer(self, body: bytes, *, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        sent = 0
        try:
            if self.command != "HEAD":
                for start in range(0, len(body), 1 << 16):
                    sent += self.wfile.write(body[start : start + (1 << 16)])
        except OSError:
            self.close_connection = True
        path = unquote(self.path.partition("?")[0])
        self.server.sent.append(Sent(self.command, path, sent, self.headers.get("Range")))

    def log_message(self, *args: object) -> None:
        pass


def split_revision(rest: str) -> tuple[str, str]:
    """Return revision and path of ``main/data/file``, where a revision may be ``refs/a/b``."""
    count = 3 if rest.startswith("refs/") else 1
    parts = rest.split("/")
    return "/".join(parts[:count]), "/".join(parts[count:])


def entries(
    files: dict[str, bytes], folder: str, *, deep: bool, itself: bool = False
) -> list[dict[str, Any]]:
    """Return what is in a folder of a repository, as listings say it; or a path itself."""
    if itself:
        if folder in files:
            return [entry(folder, files[folder])]
        inside = any(name.startswith(folder.rstrip("/") + "/") for name in files)
        return [{"type": "directory", "path": folder, "oid": "0" * 40}] if inside else []
    prefix = folder.rstrip("/") + "/" if folder else ""
    found: dict[str, dict[str, Any]] = {}
    for name, data in files.items():
        if not name.startswith(prefix):
            continue
        parts = name[len(prefix) :].split("/")
        for depth in range(1, len(parts) if deep else min(len(parts), 2)):
            path = prefix + "/".join(parts[:depth])
            found[path] = {"type": "directory", "path": path, "oid": "0" * 40, "size": 0}
        if deep or len(parts) == 1:
            found[name] = entry(name, data)
    return list(found.values())


def entry(name: str, data: bytes) -> dict[str, Any]:
    return {"type": "file", "path": name, "size": len(data), "oid": digest(data)}


def form_paths(body: bytes) -> list[str]:
    """Return the paths of a form such as ``paths=a&paths=b&expand=False``."""
    pairs = (pair.partition("=") for pair in body.decode().split("&"))
    return [unquote(value.replace("+", " ")) for name, _, value in pairs if name == "paths"]


def digest(data: bytes) -> str:
    """Return what names a file's content, as git does."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
