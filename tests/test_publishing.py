"""`--push-to-hub`: the real huggingface_hub client uploads to a loopback hub, whole or not at all."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer, Repo, files
from test_hub import checkpoint

ROOT = Path(__file__).parent.parent

# Answers a list of pushes of one folder; huggingface_hub reads its environment once, when it is imported.
PUSH = """
import json, sys, time
from pathlib import Path
from comp_cli.checkpoint import publish
from comp_cli.errors import CompError
from comp_cli.progress import Silent

time.sleep = lambda seconds: None  # between the client's tries
folder, asked = json.load(sys.stdin)
for name, private, overwrite in asked:
    try:
        publish.check_name(name, private)
        target = publish.Target(name, private, overwrite)
        publish.look(target)
        print(json.dumps({"url": publish.push(Path(folder), target, "made by a test", Silent())}))
    except CompError as error:
        print(json.dumps({"code": error.exit_code, "message": error.message, "hint": error.hint or ""}))
assert not {"torch", "transformers"} & set(sys.modules)
"""


def run(code: str, given: Any, hub: HubServer, cache: Path, **environment: str) -> list[dict]:
    """What a fresh process prints, line by line, with this hub and cache, and a token unless it is taken away."""
    dropped = re.compile("HF_.*|HUGGING.*|TRANSFORMERS_.*|.*_(proxy|PROXY)")
    clean = {key: value for key, value in os.environ.items() if not dropped.fullmatch(key)}
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(cache), "NO_PROXY": "*", "PYTHONPATH": str(ROOT)}
    settings |= {"HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_mine"} | environment
    done = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(given), env=clean | settings, capture_output=True, text=True, cwd=cache
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.fixture
def hub(tmp_path):
    public = Repo({"main": checkpoint(tmp_path / "public", "model.safetensors", "old.bin", value=3.0)})
    (tmp_path / "public" / ".gitattributes").write_text("")
    repos = {"me/public": public, "team/empty": Repo({"main": tmp_path / "bare"})}
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / ".gitattributes").write_text("")
    with HubServer(repos) as running:
        running.place = tmp_path / "uploaded"
        yield running


@pytest.fixture
def folder(tmp_path):
    made = checkpoint(tmp_path / "made", "model.safetensors", "additional_chat_templates/a.jinja", value=1.0)
    (made / "README.md").write_text("---\nlicense: mit\n---\n# made\n")
    return made


def push(hub, folder, *asked, **environment) -> list[dict]:
    cache = folder.with_name("cache")
    cache.mkdir(exist_ok=True)
    return run(PUSH, [str(folder), asked], hub, cache, **environment)


def contents(place: Path) -> dict[str, bytes]:
    return {name: (place / name).read_bytes() for name in files(place) if name != ".gitattributes"}


def test_a_folder_becomes_a_repository_in_one_commit(hub, folder):
    """A new one, a private one of an organization, one that held nothing; and what a repository held goes with --overwrite."""
    names = ("me/new", "team/closed", "team/empty", "me/public")
    asked = [("me/new", False, False), ("team/closed", True, False), ("team/empty", False, False), ("me/public", False, True)]
    answers = push(hub, folder, *asked)
    assert [answer["url"].split("/commit/")[0] for answer in answers] == [f"{hub.url}/{name}" for name in names]
    assert [name for name, _ in hub.commits] == list(names)
    for name in names:
        assert contents(hub.repos[name].revisions["main"]) == contents(folder)
    assert [hub.repos[name].private for name in names] == [False, True, False, False]
    assert {seen.authorization for seen in hub.seen if seen.method == "POST"} == {"Bearer hf_mine"}


def test_what_speaks_against_it_is_said_before_anything_is_sent(hub, folder):
    before = dict(hub.repos)
    asked = [
        ("me/public", False, False),
        ("me/public", True, True),
        ("other/new", False, False),
        ("new", False, False),
        ("a/b/c", False, False),
        ("me/--x", False, False),
        (None, True, False),
    ]
    holds, public, stranger, *usage = push(hub, folder, *asked)
    assert holds["code"] == 2 and "holds 4 files already" in holds["message"] and "--overwrite" in holds["hint"]
    assert public["code"] == 2 and "everybody can read it" in public["message"]
    assert (
        stranger["code"] == 4 and "me, who does not write for other" in stranger["message"] and "me, team" in stranger["hint"]
    )
    assert [answer["code"] for answer in usage] == [2] * 4 and "--private" in usage[-1]["message"]
    (no_token,) = push(hub, folder, asked[0], HF_TOKEN="")
    assert no_token["code"] == 4 and "no token" in no_token["message"] and "hf auth login" in no_token["hint"]
    (wrong,) = push(hub, folder, ("me/new", False, False), HF_TOKEN="hf_wrong")
    assert wrong["code"] == 4 and "does not know this token" in wrong["message"]
    (offline,) = push(hub, folder, ("me/new", False, False), HF_HUB_OFFLINE="1")
    assert offline["code"] == 2 and "HF_HUB_OFFLINE" in offline["message"] and "hf upload me/new" in offline["hint"]
    assert hub.repos == before and not hub.commits and not [seen for seen in hub.seen if seen.method == "POST"]


@pytest.mark.parametrize(
    "who, said",
    [
        ({"name": "me", "orgs": [], "auth": {"accessToken": {"role": "read"}}}, "may read only"),
        ({"name": "x", "orgs": [{"name": "me", "roleInOrg": "read"}]}, "x may only read"),
        (
            {"name": "me", "auth": {"accessToken": {"role": "fineGrained", "fineGrained": {"scoped": []}}}},
            "may write to no repository",
        ),
    ],
)
def test_a_token_that_may_not_write_is_refused(hub, folder, who, said):
    hub.who = who
    (answer,) = push(hub, folder, ("me/new", False, False))
    assert answer["code"] == 4 and said in answer["message"] and "me/new" not in hub.repos


@pytest.mark.parametrize(
    "fails, code, said",
    [
        ({"/api/repos/create": 403}, 4, "does not let this token write there (status 403)"),
        ({"/preupload/": 403}, 4, "status 403"),
        ({"/blob/": 500}, 1, "status 500"),
        ({"/blob/": 0}, 1, "cannot reach the hub"),
        ({"/commit/": 500}, 1, "status 500"),
        ({"/commit/": 0}, 1, "cannot reach the hub"),
        ({"/commit/": 412}, 1, "somebody else wrote there"),
    ],
)
def test_an_upload_that_breaks_leaves_nothing(hub, folder, fails, code, said):
    hub.fails = fails
    new, old = push(hub, folder, ("me/new", False, False), ("me/public", False, True))
    assert new["code"] == code and said in new["message"]
    assert "me/new" not in hub.repos
    if "/api/repos/create" in fails:  # which an old one does not need
        assert [name for name, _ in hub.commits] == ["me/public"]
    else:
        assert old["code"] == code and not hub.commits
        assert (hub.repos["me/public"].revisions["main"] / "old.bin").exists()


def test_a_repository_that_cannot_be_removed_again_is_named(hub, folder):
    hub.fails = {"/commit/": 500, "/api/repos/delete": 500}
    (answer,) = push(hub, folder, ("me/new", False, False))
    assert answer["code"] == 1 and "could not be removed" in answer["message"] and "hf repos delete me/new" in answer["hint"]
