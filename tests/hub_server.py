"""A loopback server that speaks the part of the hub's API which huggingface_hub calls, and remembers what it was asked.

Verified against huggingface_hub 2.4: /api/models/ID[/revision/REV], /api/models/ID/tree/SHA, /ID/resolve/REV/FILE; and of
uploads /api/whoami-v2, /api/repos/create and delete, /api/validate-yaml, preupload, LFS batches (with HF_HUB_DISABLE_XET), and
commits as lines of JSON.
"""

import base64
import hashlib
import json
import shutil
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".onnx", ".data", ".png", ".bin")  # what goes over LFS


@dataclass
class Repo:
    """Folders by branch or tag; `closed` is the hub's X-Error-Code for who may not read its files, e.g. GatedRepo."""

    revisions: dict[str, Path]
    closed: str | None = None
    token: str | None = None  # opens a closed repository
    extra_names: list[str] = field(default_factory=list)  # listed, whether they exist or not
    private: bool = False

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
        self.who: dict = {"name": "me", "orgs": [{"name": "team", "roleInOrg": "write"}]}  # of every token but hf_wrong
        self.fails: dict[str, int] = {}  # part of an address -> status of every POST, PUT or DELETE to it; 0 hangs up
        self.place: Path | None = None  # where what is uploaded is kept
        self.blobs: dict[str, bytes] = {}  # of large files, by SHA-256
        self.commits: list[tuple[str, str]] = []  # names of repositories, with what was said of each commit
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
        if path == "/api/whoami-v2":
            return self.said(self.hub.who)
        if path.startswith("/api/models/"):
            return self.api(path.removeprefix("/api/models/").split("/"))
        if "/resolve/" in path:
            name, rest = path.strip("/").split("/resolve/")
            return self.file(name, *rest.split("/", 1))
        return self.answer(404)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        path, content = unquote(urlsplit(self.path).path), self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.hub.seen.append(Seen(self.command, path, self.headers.get("Authorization")))
        if (status := next((status for part, status in self.hub.fails.items() if part in path), None)) is not None:
            self.close_connection = not status
            return self.answer(status) if status else None
        if path.startswith("/blob/"):
            self.hub.blobs[path.removeprefix("/blob/")] = content
            return self.answer(200)
        if "Authorization" not in self.headers:
            return self.answer(401)
        if path.endswith("/info/lfs/objects/batch"):
            upload = {"href": f"{self.hub.url}/blob/"}
            asked = json.loads(content)["objects"]
            objects = [one | {"actions": {"upload": {"href": upload["href"] + one["oid"]}}} for one in asked]
            return self.said({"transfer": "basic", "objects": objects})
        if path == "/api/validate-yaml":
            return self.said({"errors": [], "warnings": []})
        if path in ("/api/repos/create", "/api/repos/delete"):
            return self.of_repos(path.rsplit("/", 1)[1], json.loads(content))
        name, verb = "/".join(path.split("/")[3:5]), path.split("/")[5]
        if verb == "preupload":
            mode = {True: "lfs", False: "regular"}
            paths = [one["path"] for one in json.loads(content)["files"]]
            files = [{"path": p, "uploadMode": mode[p.endswith(LARGE)], "shouldIgnore": False} for p in paths]
            return self.said({"files": files})
        return self.commit(name, [json.loads(line) for line in content.splitlines()])

    do_PUT = do_DELETE = do_POST

    def of_repos(self, verb: str, asked: dict) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        if verb == "delete":
            return self.answer(200 if self.hub.repos.pop(name, None) else 404)
        if name in self.hub.repos:
            return self.answer(409)
        folder = self.hub.place / f"{name.replace('/', '--')}-0-{len(self.hub.seen)}"
        folder.mkdir(parents=True)
        (folder / ".gitattributes").write_text("*.safetensors filter=lfs\n")
        self.hub.repos[name] = Repo({"main": folder}, private=asked.get("visibility") == "private")
        self.said({"url": f"{self.hub.url}/{name}"})

    def commit(self, name: str, lines: list[dict]) -> None:
        """All of a commit, or none: into a copy of the folder, which takes its place."""
        repo, head = self.hub.repos[name], lines[0]["value"]
        old = repo.revisions["main"]
        if head.get("parentCommit") not in (None, commit(old)):
            return self.answer(412)
        new = self.hub.place / f"{name.replace('/', '--')}-{len(self.hub.seen)}"
        shutil.copytree(old, new)
        for line in lines[1:]:
            value = line["value"]
            path = new / value["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            if line["key"] == "deletedFile":
                path.unlink()
            else:
                large = line["key"] == "lfsFile"
                path.write_bytes(self.hub.blobs[value["oid"]] if large else base64.b64decode(value["content"]))
        repo.revisions["main"] = new
        self.hub.commits.append((name, head["summary"]))
        oid = commit(new)
        self.said({"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "hookOutput": ""})

    def said(self, answer: dict) -> None:
        self.answer(200, json.dumps(answer).encode())

    def api(self, parts: list[str]) -> None:
        deep = 1 if parts[0] in self.hub.repos else 2  # a repository of nobody's has no slash in its name
        name, verb, revision = "/".join(parts[:deep]), parts[deep : deep + 1], "/".join(parts[deep + 1 :])
        below = ""
        if verb == ["tree"]:
            revision, _, below = revision.partition("/")
        if not (found := self.open(name, revision or "main", listing=True)):
            return None
        sha, folder = found
        names = files(folder) + self.hub.repos[name].extra_names
        if verb == ["tree"]:
            if below and not (names := [listed for listed in names if listed.startswith(f"{below}/")]):
                return self.answer(404, code="EntryNotFound")
            entries = [{"type": "file", "path": listed, "size": 1, "oid": "0" * 40} for listed in names]
            return self.answer(200, json.dumps(entries).encode())
        siblings = [{"rfilename": listed} for listed in names]
        info = {
            "id": name,
            "modelId": name,
            "sha": sha,
            "siblings": siblings,
            "tags": [],
            "private": self.hub.repos[name].private,
        }
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
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_) -> None:
        pass
