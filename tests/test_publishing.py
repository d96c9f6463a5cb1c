"""`--push-to-hub`: the real huggingface_hub client uploads to a loopback hub, whole or not at all."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hub_server import HubServer, Repo, files
from test_hub import checkpoint
from test_hub_job import FEW, comp

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


# What a user does with two commands, and somebody else with what came of them.
ROUND_TRIP = """
import json, sys, torch, transformers
from pathlib import Path
from PIL import Image
import comp_cli
from comp_cli.errors import CompError

dense, out = json.load(sys.stdin)
out, sizes = Path(out), {"num_samples": 8, "eval_samples": 8, "text_tokens": 12, "device": "cpu", "method": "joint"}
told = comp_cli.prune(dense, ratio=0.5, output=out / "compact", push_to_hub="me/compact", private=True, **sizes)
print(json.dumps({"pushed": told.pushed, "options": told.to_json()["options"], "command": told.command}))
for name, wanted in (("me/compact", {}), ("me/other", {"max_drop": 0})):  # not empty; a gate that is missed
    try:
        comp_cli.prune(dense, ratio=0.9, output=out / "never", push_to_hub=name, **wanted, **sizes)
    except CompError as error:
        print(json.dumps({"code": error.exit_code, "message": error.message, "written": (out / "never").exists()}))

graphs = comp_cli.export("hf://me/compact@main", output=out / "graphs", push_to_hub="team/graphs")
picture = Image.open(out / "compact" / "scene.png")
processor = transformers.AutoProcessor.from_pretrained("me/compact")
given = processor(images=picture, text=["a red circle", "two squares"], padding=True, return_tensors="pt")
auto = {"trust_remote_code": True}
models = [
    comp_cli.load(out / "compact"),
    comp_cli.load("me/compact"),
    comp_cli.load("hf://me/compact@" + told.pushed.rsplit("/", 1)[1], cache_dir=out / "elsewhere"),
    transformers.AutoModel.from_pretrained("me/compact", **auto).eval(),
    transformers.AutoModelForZeroShotImageClassification.from_pretrained("me/compact", **auto).eval(),
]
pipe = transformers.pipeline("zero-shot-image-classification", model="me/compact", **auto)
scores = pipe(picture, candidate_labels=["a red circle", "two squares"], hypothesis_template="{}")
with torch.no_grad():
    logits = [model(**given).logits_per_image[0].tolist() for model in models]
print(json.dumps({"logits": logits, "pipe": {row["label"]: row["score"] for row in scores}, "graphs": graphs.pushed}))
"""


def test_what_was_pruned_and_exported_to_the_hub_is_the_same_for_everybody(hub, tmp_path):
    """With comp and without, by id, by commit and as a pipeline; code of the repository is never run by comp."""
    dense = tiny.write("clip", tmp_path / "dense")
    (tmp_path / "cache").mkdir()
    told, full, missed, found = run(ROUND_TRIP, [str(dense), str(tmp_path / "out")], hub, tmp_path / "cache")
    compact, graphs = (tmp_path / "out" / name for name in ("compact", "graphs"))
    assert contents(hub.repos["me/compact"].revisions["main"]) == contents(compact)
    assert contents(hub.repos["team/graphs"].revisions["main"]) == contents(graphs)
    assert hub.repos["me/compact"].private and not hub.repos["team/graphs"].private
    assert told["pushed"].startswith(f"{hub.url}/me/compact/commit/") and found["graphs"].startswith(hub.url)
    assert "--push-to-hub me/compact --private" in told["command"] and "private" not in told["options"]
    assert full["code"] == 2 and not full["written"] and missed["code"] == 3 and "me/other" not in hub.repos
    first, *others = found["logits"]
    assert all(logits == first for logits in others)
    expected = torch.tensor(first).softmax(0).tolist()
    assert [found["pipe"]["a red circle"], found["pipe"]["two squares"]] == pytest.approx(expected, abs=1e-5)
    assert "[report.html](report.html)" in (compact / "README.md").read_text()
    for folder in (compact, graphs):  # the code of the cards takes model, processor and picture from the repository
        (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
        assert f"/{folder.name}" in code and "scene.png" in code
        assert run(f"import json\n{code}\nprint(json.dumps({{'ran': True}}))", None, hub, tmp_path / "cache") == [{"ran": True}]


def test_an_upload_that_fails_keeps_the_folder_and_says_how_to_go_on(hub, tmp_path):
    """From a shell: one document, and the command line that uploads it later."""
    hub.fails = {"/commit/": 400}
    dense = tiny.write("clip-text", tmp_path / "dense")
    done = comp("prune", dense, "--ratio", 0.3, *FEW, "-o", "c", "--push-to-hub", "me/new", folder=tmp_path, **environment(hub))
    assert done.returncode == 1, done.stderr
    document = json.loads(done.stdout)
    assert "status 400" in document["error"]["message"] and "hf upload me/new c ." in document["error"]["hint"]
    assert (tmp_path / "c" / "config.json").exists() and "me/new" not in hub.repos
    for wrong in (["--dry-run"], ["-o", "d", "--ratio", "0.3,0.5"]):
        done = comp("prune", dense, "--ratio", 0.3, *wrong, "--push-to-hub", "me/new", folder=tmp_path, **environment(hub))
        assert done.returncode == 2 and "--push-to-hub" in done.stderr


HOSTILE = """
import json, sys
import comp_cli
from comp_cli import api
from comp_cli.errors import CompError
for work in (lambda: comp_cli.load("me/hostile"), lambda: comp_cli.export("me/hostile", output=json.load(sys.stdin))):
    print(json.dumps({"made": type(work()).__name__}))
print(json.dumps({"made": comp_cli.analyze("hf://me/hostile@main").compact is not None}))
for work in (
    lambda: comp_cli.bench("me/hostile"),
    lambda: comp_cli.bench("me/hostile", baseline="me/dense", revision="main"),
    lambda: comp_cli.export("me/dense"),
    lambda: api.upgrade("hf://me/hostile"),
    lambda: api.upgrade("me/hostile"),
    lambda: comp_cli.load_onnx("me/hostile"),
    lambda: comp_cli.load("me/nothing"),
):
    try:
        work()
        print(json.dumps({"message": "nothing"}))
    except CompError as error:
        print(json.dumps({"code": error.exit_code, "message": error.message, "hint": error.hint or ""}))
"""


def test_code_of_a_repository_is_not_run(hub, compact_folder, tiny_folder, tmp_path):
    """And what else is said of models on the hub: which dense one is meant, that it is none, that it is not changed."""
    folder = shutil.copytree(compact_folder, tmp_path / "hostile")
    (folder / "modeling_comp.py").write_text(f"open({str(tmp_path / 'trace')!r}, 'w')\n")
    hub.repos |= {"me/hostile": Repo({"main": folder}), "me/dense": Repo({"main": tiny_folder})}
    (tmp_path / "cache").mkdir()
    loaded, exported, analyzed, *refused = run(HOSTILE, str(tmp_path / "graphs"), hub, tmp_path / "cache")
    assert loaded["made"].startswith("Compact") and exported["made"] == "ExportReport" and analyzed["made"]
    assert not (tmp_path / "trace").exists() and not list(tmp_path.rglob("cache/modules/**/modeling_comp.py"))
    said = ["no way to it", "both on the hub", "not a compact model", "changes files", "changes files", "holds no graphs"]
    for answer, words in zip(refused, [*said, "was not found on the Hub"], strict=True):
        assert words in answer["message"], answer
    assert [answer["code"] for answer in refused] == [2, 2, 4, 2, 2, 4, 4]
    assert "hf download me/hostile" in refused[3]["hint"] and "hf://me/hostile@main" in refused[1]["hint"]


def environment(hub) -> dict[str, str]:
    return {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_mine", "HF_HUB_DISABLE_XET": "1"}
