"""A stand-in of the Hugging Face Hub's HTTP API on loopback: small to read, true enough for its client.

``with HubServer(root) as hub:`` serves every ``root/<owner>/<name>`` as a model repository. Its ``main``
is one commit, named after what the folder holds at the time; ``hub.url`` is the ``endpoint`` to use. No file
is announced as stored in Xet, so the client keeps to plain HTTP. A test can look on and make trouble:

    hub.requests, hub.downloaded("owner/name")          what was asked for, and what was sent
    hub.gated["owner/name"] = {"hf_token"}              only these tokens may download
    hub.cut("owner/name", "model.bin", after=1000)      the next download breaks off there
    hub.failing = 503                                   every request is answered with this status
    hub.stop(), hub.start()                             nobody listens; listens again, at the same address
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LFS_SUFFIXES = {".bin", ".ckpt", ".pt", ".pth", ".safetensors"}
INFO = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)(?:/revision/(?P<revision>[^/]+))?")
TREE = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?")
FILE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")


@dataclass
class Request:
    """A line of the log; ``sent`` counts the bytes of the answer's body."""

    method: str
    path: str
    range: str | None
    token: str | None
    status: int = 0
    sent: int = 0


@dataclass(frozen=True)
class Blob:
    """A file as the Hub names it: by git's id, and by the content's sha256 where LFS would hold it."""

    file: Path
    size: int
    oid: str
    sha256: str | None

    @classmethod
    @cache
    def read(cls, file: Path, size: int, _mtime: int) -> Blob:
        """The file, hashed once for each of its states."""
        data = file.read_bytes()
        sha256 = hashlib.sha256(data).hexdigest() if file.suffix in LFS_SUFFIXES else None
        return cls(file, size, hashlib.sha1(b"blob %d\0" % size + data).hexdigest(), sha256)

    @property
    def lfs(self) -> dict[str, Any]:
        """What a listing adds for a file in LFS; of the two listings, each gives the hash its own name."""
        lfs = {"oid": self.sha256, "sha256": self.sha256, "size": self.size, "pointerSize": 134}
        return {"lfs": lfs} if self.sha256 else {}


class Repo:
    """A repository's one commit: files by their path in it; none where there is no such repository."""

    def __init__(self, root: Path, name: str) -> None:
        base = root / name
        stats = {f.relative_to(base).as_posix(): f.stat() for f in sorted(base.rglob("*")) if f.is_file()}
        self.name = name
        self.files = {path: Blob.read(base / path, s.st_size, s.st_mtime_ns) for path, s in stats.items()}
        self.sha = hashlib.sha1(repr([(p, b.oid) for p, b in self.files.items()]).encode()).hexdigest()


class Refusal(Exception):
    """An answer that is an error; the code tells the client which of its exceptions to raise."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **headers}


class HubServer:
    """The Hub over one folder; the module says what can be done with it."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.port = 0
        self.requests: list[Request] = []
        self.gated: dict[str, set[str]] = {}
        self.failing: int | None = None
        self.cuts: defaultdict[str, list[int]] = defaultdict(list)
        self._server: ThreadingHTTPServer | None = None

    def __enter__(self) -> HubServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """The endpoint."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Listen: on a free port the first time, on the same one after."""
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), handler)
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Refuse connections from here on."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def sha(self, repo: str) -> str:
        """The repository's commit."""
        return Repo(self.root, repo).sha

    def cut(self, repo: str, path: str, *, after: int, times: int = 1) -> None:
        """Hang up after that many bytes of the answer, in each of the file's next ``times`` downloads."""
        self.cuts[f"{repo}/{path}"] += [after] * times

    def downloaded(self, repo: str) -> list[str]:
        """The repository's files whose content was sent, whole or in part: each once, sorted."""
        sent = (FILE.fullmatch(r.path) for r in self.requests if r.sent and r.status in (200, 206))
        return sorted({match["path"] for match in sent if match and match["repo"] == repo})


class _Handler(BaseHTTPRequestHandler):
    """One request a connection: one kept alive would outlive ``HubServer.stop``."""

    hub: HubServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        self.entry = Request(self.command, unquote(url.path), self.headers.get("Range"), token)
        self.hub.requests.append(self.entry)
        with suppress(ConnectionError):  # the client may hang up as it likes
            try:
                self.answer(url.path, parse_qs(url.query))
            except Refusal as refusal:
                self.send_json({"error": str(refusal)}, refusal.status, refusal.headers)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        """Keep quiet: the log is ``HubServer.requests``."""

    def answer(self, path: str, query: dict[str, list[str]]) -> None:
        if self.hub.failing:
            raise Refusal(self.hub.failing, "The Hub is unavailable")
        for pattern, answer in ((FILE, self.send_file), (TREE, self.send_tree), (INFO, self.send_info)):
            if match := pattern.fullmatch(path):
                part = {key: unquote(value) for key, value in match.groupdict("").items()}
                repo = Repo(self.hub.root, part["repo"])
                if not repo.files and self.entry.token:
                    raise Refusal(404, "Repository not found", "RepoNotFound")
                if not repo.files:  # the Hub doesn't tell strangers what exists
                    raise Refusal(401, "Invalid username or password.", "RepoNotFound")
                if part["revision"] not in ("", "main", repo.sha):
                    raise Refusal(404, f"Invalid rev id: {part['revision']}", "RevisionNotFound")
                return answer(repo, part.get("path", ""), query)
        raise Refusal(404, "Page not found")

    def send_info(self, repo: Repo, _path: str, query: dict[str, list[str]]) -> None:
        blobs = {p: {"size": b.size, "blobId": b.oid, **b.lfs} for p, b in repo.files.items()}
        siblings = [{"rfilename": p, **(blob if "blobs" in query else {})} for p, blob in blobs.items()]
        info: dict[str, Any] = {"id": repo.name, "sha": repo.sha, "siblings": siblings, "tags": []}
        info |= {"private": False, "gated": "manual" if repo.name in self.hub.gated else False}
        self.send_json({**info, "downloads": 0, "likes": 0})

    def send_tree(self, repo: Repo, path: str, query: dict[str, list[str]]) -> None:
        entries = {p: {"type": "file", "size": b.size, "oid": b.oid, **b.lfs} for p, b in repo.files.items()}
        for folder in {str(f) for p in repo.files for f in list(PurePosixPath(p).parents)[:-1]}:
            oid = hashlib.sha1(folder.encode()).hexdigest()
            entries[folder] = {"type": "directory", "size": 0, "oid": oid}
        prefix, deep = f"{path}/" if path else "", "true" in [v.lower() for v in query.get("recursive", [])]
        inside = {p: p[len(prefix) :] for p in sorted(entries) if p.startswith(prefix)}
        if not inside:
            raise Refusal(404, f"{path} does not exist", "EntryNotFound")
        self.send_json([{"path": p, **entries[p]} for p, rest in inside.items() if deep or "/" not in rest])

    def send_file(self, repo: Repo, path: str, _query: dict[str, list[str]]) -> None:
        if self.entry.token not in self.hub.gated.get(repo.name, {self.entry.token}):
            status, how = (403, "ask for it") if self.entry.token else (401, "log in")
            raise Refusal(status, f"Access to model {repo.name} is restricted: {how}.", "GatedRepo")
        headers = {"X-Repo-Commit": repo.sha}
        if (blob := repo.files.get(path)) is None:
            raise Refusal(404, "Entry not found", "EntryNotFound", **headers)
        headers |= {"ETag": f'"{blob.sha256 or blob.oid}"', "Accept-Ranges": "bytes"}
        if blob.sha256:
            headers |= {"X-Linked-ETag": f'"{blob.sha256}"', "X-Linked-Size": str(blob.size)}
        status, start, stop = 200, 0, blob.size
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.entry.range or ""):
            status, start, stop = 206, int(wanted[1]), min(int(wanted[2] or stop) + 1, stop)
            if start >= stop:
                raise Refusal(416, "Range not satisfiable", **{"Content-Range": f"bytes */{blob.size}"})
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{blob.size}"
        body = blob.file.read_bytes()[start:stop]
        cuts = self.hub.cuts[f"{repo.name}/{path}"] if self.command == "GET" else []
        self.send(status, headers, body, cuts.pop(0) if cuts else len(body))

    def send_json(self, data: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(data).encode()
        self.send(status, {"Content-Type": "application/json", **(headers or {})}, body, len(body))

    def send(self, status: int, headers: dict[str, str], body: bytes, end: int) -> None:
        """Announce the whole body and send it up to ``end``."""
        part = body[:end] if self.command == "GET" else b""
        self.entry.status, self.entry.sent = status, len(part)
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body)), "Connection": "close"}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(part)
