"""A stand-in for the Hub: dataset repositories in memory, behind the part of its HTTP API that the clients use.

Branches and commits, regular and LFS files, commits that name their parent. It asks for a token, as the Hub does for
what is private.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_canaryTokenOfTheHub"
REPO = r"/(?:api/)?datasets/(?P<repo>[^/]+/[^/]+?)"


def blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Repo:
    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # the files of each, by its id
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Add files, on top of what the branch holds."""
        tree = {**self.commits.get(self.branches.get(branch, ""), {}), **files}
        content = json.dumps([len(self.commits), sorted((name, blob_id(data)) for name, data in tree.items())])
        oid = hashlib.sha1(content.encode()).hexdigest()
        self.commits[oid], self.branches[branch] = tree, oid
        return oid

    @property
    def files(self) -> dict[str, bytes]:
        """Of a dataset, at the head of main."""
        tree = self.commits[self.branches["main"]]
        return {name: data for name, data in tree.items() if name != ".gitattributes"}


class FakeHub:
    """The repositories, and what was asked."""

    def __init__(self) -> None:
        self.url = ""
        self.repos: dict[str, Repo] = {}
        self.stored: dict[str, bytes] = {}  # LFS objects
        self.asked: list[tuple[str, str]] = []
        self.before: Callable[[str, str], None] = lambda method, path: None

    def create(self, repo: str, private: bool = False) -> Repo:
        self.repos[repo] = Repo(private)
        self.repos[repo].commit({".gitattributes": b"*.parquet filter=lfs diff=lfs merge=lfs -text\n"})
        return self.repos[repo]

    @property
    def environment(self) -> dict[str, str]:
        """Of a process that takes this for the Hub."""
        return {"HF_ENDPOINT": self.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}


class Refused(Exception):
    def __init__(self, status: int, code: str) -> None:
        self.status, self.code = status, code


class Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.before(self.command, path)
        self.hub.asked.append((self.command, path))
        try:
            if not path.startswith("/lfs/") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                raise Refused(401, "RepoNotFound")
            for method, pattern, answer in ROUTES:
                if self.command in method.split() and (match := re.fullmatch(pattern, path)):
                    answer(self, body, **match.groupdict())
                    return
            raise Refused(404, "EntryNotFound")
        except Refused as refused:
            self._send(json.dumps({"error": refused.code}).encode(), refused.status, {"X-Error-Code": refused.code})

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    def _send(self, data: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _json(self, value: Any) -> None:
        self._send(json.dumps(value).encode(), headers={"Content-Type": "application/json"})

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def _repo(self, repo: str) -> Repo:
        if repo not in self.hub.repos:
            raise Refused(404, "RepoNotFound")
        return self.hub.repos[repo]

    def _at(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]]:
        commits, branches = self._repo(repo).commits, self._repo(repo).branches
        oid = branches.get(revision, revision)
        if oid not in commits:
            raise Refused(404, "RevisionNotFound")
        return oid, commits[oid]

    def create(self, body: bytes) -> None:
        request = json.loads(body)
        assert request["type"] == "dataset"
        repo = f"{request['organization']}/{request['name']}"
        if repo in self.hub.repos:
            raise Refused(409, "Conflict")
        self.hub.create(repo, request.get("visibility") == "private")
        self._json({"url": f"{self.hub.url}/datasets/{repo}", "name": repo})

    def info(self, body: bytes, repo: str, revision: str | None = None) -> None:
        oid, files = self._at(repo, revision or "main")
        siblings = [{"rfilename": name} for name in files]
        self._json({"id": repo, "sha": oid, "private": self._repo(repo).private, "siblings": siblings, "tags": []})

    def tree(self, body: bytes, repo: str, revision: str, folder: str | None = None) -> None:
        _, files = self._at(repo, revision)
        prefix = f"{folder}/" if folder else ""
        entries: dict[str, dict[str, Any]] = {}
        recursive = "recursive=true" in self.path.lower()
        for name, data in sorted(files.items()):
            if not name.startswith(prefix):
                continue
            parts = name.removeprefix(prefix).split("/")
            for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
                path = prefix + "/".join(parts[:depth])
                entries[path] = {"type": "directory", "oid": blob_id(path.encode()), "size": 0, "path": path}
            if recursive or len(parts) == 1:
                entries[name] = {"type": "file", "oid": blob_id(data), "size": len(data), "path": name}
                if name.endswith(".parquet"):
                    oid = hashlib.sha256(data).hexdigest()
                    entries[name]["lfs"] = {"oid": oid, "size": len(data), "pointerSize": 134}
        if prefix and not entries:
            raise Refused(404, "EntryNotFound")
        self._json(list(entries.values()))

    def resolve(self, body: bytes, repo: str, revision: str, name: str) -> None:
        oid, files = self._at(repo, revision)
        if name not in files:
            raise Refused(404, "EntryNotFound")
        data, headers, status = files[name], {"X-Repo-Commit": oid, "ETag": f'"{blob_id(files[name])}"'}, 200
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, last = int(match[1]), int(match[2] or len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            data, status = data[first : last + 1], 206
        self._send(data, status, headers)

    def validate(self, body: bytes) -> None:
        assert json.loads(body)["content"].startswith("---\n")
        self._json({"errors": [], "warnings": []})

    def preupload(self, body: bytes, repo: str, revision: str) -> None:
        _, tree = self._at(repo, revision)

        def plan(path: str) -> dict[str, Any]:
            mode = "lfs" if path.endswith(".parquet") else "regular"
            known = tree.get(path)
            oid = None
            if known is not None:
                oid = hashlib.sha256(known).hexdigest() if mode == "lfs" else blob_id(known)
            return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid}

        self._json({"files": [plan(file["path"]) for file in json.loads(body)["files"]]})

    def batch(self, body: bytes, repo: str) -> None:
        def plan(of: dict[str, Any]) -> dict[str, Any]:
            answer = {"oid": of["oid"], "size": of["size"]}
            if of["oid"] not in self.hub.stored:
                answer["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{of['oid']}", "header": {}}}
            return answer

        self._json({"transfer": "basic", "objects": [plan(of) for of in json.loads(body)["objects"]]})

    def store(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.stored[oid] = body
        self._json({})

    def commit(self, body: bytes, repo: str, revision: str) -> None:
        head, _ = self._at(repo, revision)
        header, *operations = [json.loads(line) for line in body.splitlines()]
        if header["value"].get("parentCommit") not in (None, head):
            raise Refused(412, "PreconditionFailed")
        files = {}
        for operation in operations:
            file, regular = operation["value"], operation["key"] == "file"
            files[file["path"]] = base64.b64decode(file["content"]) if regular else self.hub.stored[file["oid"]]
        oid = self._repo(repo).commit(files, revision)
        self._json({"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/datasets/{repo}/commit/{oid}"})


ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("POST", r"/api/repos/create", Handler.create),
    ("POST", r"/api/validate-yaml", Handler.validate),
    ("POST", REPO + r"/preupload/(?P<revision>.+)", Handler.preupload),
    ("POST", REPO + r"\.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", Handler.store),
    ("POST", REPO + r"/commit/(?P<revision>.+)", Handler.commit),
    ("GET", REPO + r"/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?", Handler.tree),
    ("GET HEAD", REPO + r"/resolve/(?P<revision>[^/]+)/(?P<name>.+)", Handler.resolve),
    ("GET", REPO + r"/revision/(?P<revision>.+)", Handler.info),
    ("GET", REPO, Handler.info),
]


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """A running one."""
    hub = FakeHub()
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub})) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield hub
        server.shutdown()
