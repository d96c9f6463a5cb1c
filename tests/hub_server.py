"""A loopback server that speaks the part of the hub's API which huggingface_hub calls, and remembers what it was asked.

Verified against huggingface_hub 2.4: /api/models/ID[/revision/REV], /api/models/ID/tree/SHA, /ID/resolve/REV/FILE.
"""

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit


@dataclass
class Repo:
    """Folders by branch or tag; `closed` is the hub's X-Error-Code for who may not read its files, e.g. GatedRepo."""

    revisions: dict[str, Path]
    closed: str | None = None
    token: str | None = None  # opens a closed repository
    extra_names: list[str] = field(default_factory=list)  # listed, whether they exist or not

    def find(self, revision: str) -> tuple[str, Path] | None:
        """Commit and folder of a branch, tag or commit."""
        commits = {name: commit(folder) for name, folder in self.revisions.items()}
        for name, folder in self.revisions.items():
            if revision in (name, commits[name]):
                return commits[name], folder
        return None


class Seen(NamedTuple):
    """One request: "GET" or "HEAD", its path, and its Authorization header."""

    method: str
    path: str
    authorization: str | None


def commit(folder: Path) -> str:
    """40 hex digits that stand for the folder's content."""
    digest = hashlib.sha1(usedforsecurity=False)
    for name in files(folder):
        digest.update(name.encode() + (folder / name).read_bytes())
    return digest.hexdigest()


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


class HubServer:
    """`with HubServer({"org/name": Repo(...)}) as hub:` serves at `hub.url`; `hub.seen` holds the requests."""

    def __init__(self, repos: dict[str, Repo]):
        self.repos, self.seen = repos, []
        self.status: int | None = None  # answer everything with it, e.g. 503
        self.says: dict[str, bytes] = {}  # end of an address -> what is answered there, whatever is right
        self.tampers: dict[str, bytes] = {}  # file -> what is sent in its place, under the right ETag
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    def fetched(self) -> list[str]:
        """The names of the files whose content was sent."""
        sent = (seen.path for seen in self.seen if seen.method == "GET" and "/resolve/" in seen.path)
        return sorted(path.split("/resolve/")[1].split("/", 1)[1] for path in sent)


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.seen.append(Seen(self.command, path, self.headers.get("Authorization")))
        if self.hub.status is not None:
            return self.answer(self.hub.status)
        for end, content in self.hub.says.items():
            if path.endswith(end):
                return self.answer(200, content)
        if self.headers.get("Authorization") == "Bearer hf_wrong":
            return self.answer(401, **{"X-Error-Message": "Invalid credentials in Authorization header"})
        if path.startswith("/api/models/"):
            return self.api(path.removeprefix("/api/models/").split("/"))
        if "/resolve/" in path:
            name, rest = path.strip("/").split("/resolve/")
            return self.file(name, *rest.split("/", 1))
        return self.answer(404)

    do_HEAD = do_GET

    def api(self, parts: list[str]) -> None:
        name, verb, revision = "/".join(parts[:2]), parts[2:3], "/".join(parts[3:])
        if not (found := self.open(name, revision or "main", listing=True)):
            return None
        sha, folder = found
        names = files(folder) + self.hub.repos[name].extra_names
        if verb == ["tree"]:
            entries = [{"type": "file", "path": listed, "size": 1, "oid": "0" * 40} for listed in names]
            return self.answer(200, json.dumps(entries).encode())
        info = {"id": name, "modelId": name, "sha": sha, "siblings": [{"rfilename": n} for n in names], "tags": []}
        return self.answer(200, json.dumps(info).encode())

    def file(self, name: str, revision: str, filename: str) -> None:
        if not (found := self.open(name, revision)):
            return None
        sha, folder = found
        if filename not in files(folder):
            return self.answer(404, code="EntryNotFound", **{"X-Repo-Commit": sha})
        content = (folder / filename).read_bytes()
        etag = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": sha}
        self.answer(200, self.hub.tampers.get(filename, content), **etag)

    def open(self, name: str, revision: str, listing: bool = False) -> tuple[str, Path] | None:
        """Commit and folder; or None, with the refusal sent. A gated repository shows its list of files to all."""
        repo = self.hub.repos.get(name)
        allowed = repo and (not repo.closed or self.headers.get("Authorization") == f"Bearer {repo.token}")
        if repo is None:
            self.answer(401 if "Authorization" not in self.headers else 404, code="RepoNotFound")
        elif not allowed and not (listing and repo.closed == "GatedRepo"):
            self.answer(403 if repo.closed == "GatedRepo" else 401, code=repo.closed)
        elif not (found := repo.find(revision)):
            self.answer(404, code="RevisionNotFound")
        else:
            return found
        return None

    def answer(self, status: int, content: bytes = b"", code: str | None = None, **headers: str) -> None:
        self.send_response(status)
        headers |= {"Content-Length": str(len(content))} | ({"X-Error-Code": code} if code else {})
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_) -> None:
        pass
