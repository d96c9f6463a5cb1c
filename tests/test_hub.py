"""MODEL becomes a folder: the real huggingface_hub client against a loopback hub, one subprocess per environment."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hub_server import HubServer, Repo, commit
from safetensors.numpy import save_file

from comp_cli.checkpoint import hub
from comp_cli.cli.output import Output
from comp_cli.errors import CompError

ROOT = Path(__file__).parent.parent

# Answers a list of resolve() calls; huggingface_hub reads its environment once, when it is imported.
ASK = """
import json, sys
from pathlib import Path
from comp_cli.checkpoint import hub
from comp_cli.errors import CompError
from comp_cli.cli.output import Output

class Heard(Output):
    def say(self, message):
        self.said = getattr(self, "said", []) + [message]

for options in json.load(sys.stdin):
    out = Heard(progress=False)
    try:
        source = hub.resolve(**options, progress=out)
        print(json.dumps({"folder": str(source.folder), "name": source.name, "revision": source.revision,
            "kind": source.kind, "files": sorted(p.name for p in source.folder.iterdir()),
            "said": getattr(out, "said", [])}))
    except CompError as error:
        print(json.dumps({"code": error.exit_code, "message": error.message, "hint": error.hint or ""}))
heavy = {"torch", "transformers"} & set(sys.modules)
assert not heavy, heavy
"""
NO_SOCKETS = """
import socket
def refuse(*_): raise AssertionError("the network was used")
socket.socket.connect = socket.getaddrinfo = refuse
"""


def ask(cache: Path, *questions: dict, url: str = "http://127.0.0.1:9", before: str = "", **environment: str) -> list[dict]:
    """Resolve each question in a fresh process with this hub (by default a dead port) and cache."""
    dropped = re.compile("HF_.*|HUGGING.*|TRANSFORMERS_.*|.*_(proxy|PROXY)")
    clean = {key: value for key, value in os.environ.items() if not dropped.fullmatch(key)}
    hub_settings = {"HF_ENDPOINT": url, "HF_HOME": str(cache), "NO_PROXY": "*", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", before + ASK],
        input=json.dumps(questions),
        env=clean | hub_settings | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def checkpoint(folder: Path, *names: str, value: float = 0.0) -> Path:
    """A folder with config.json, a tokenizer and the named weight files."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "blip"}')
    (folder / "vocab.txt").write_text("a\nb\n")
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        if name.endswith(".safetensors"):
            save_file({"weight": np.full((2, 3), value, np.float32)}, folder / name)
        else:
            (folder / name).write_bytes(b"not weights that comp should fetch " + name.encode())
    return folder


def shard_index(folder: Path, *shards: str) -> Path:
    weight_map = {f"tensor{position}": shard for position, shard in enumerate(shards)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    base = tmp_path_factory.mktemp("repos")
    others = ("pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "onnx/model.onnx", "model.fp16.safetensors")
    main = checkpoint(base / "main", "model.safetensors", "tokenizer.json", "onnx/config.json", *others)
    shards = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    repos = {
        "org/plain": Repo({"main": main, "v1": checkpoint(base / "v1", "model.safetensors", value=1.0)}),
        "org/sharded": Repo({"main": shard_index(checkpoint(base / "sharded", *shards), *shards)}),
        "org/hostile": Repo(
            {"main": shard_index(checkpoint(base / "hostile"), "../../../secret.safetensors")},
            extra_names=["../evil.json", "..", "/etc/evil.txt"],
        ),
        "org/pickled": Repo({"main": checkpoint(base / "pickled", "pytorch_model.bin", "model.onnx")}),
        "org/empty": Repo({"main": checkpoint(base / "empty")}),
        "org/gated": Repo({"main": main}, closed="GatedRepo", token="hf_secret"),
        "org/private": Repo({"main": main}, closed="RepoNotFound", token="hf_secret"),
        "Salesforce/blip-itm-base-coco": Repo({"main": main}),
    }
    with HubServer(repos) as running:
        yield running


@pytest.fixture
def fresh(server):
    server.seen.clear()
    server.status = None
    yield server
    server.status = None


def test_download_takes_what_is_needed_and_offline_takes_it_from_the_cache(fresh, tmp_path):
    repo = fresh.repos["org/plain"]
    asked = [{"model": "org/plain"}, {"model": "org/plain", "revision": "v1"}, {"model": "hf://org/plain@v1"}]
    plain, tagged, by_uri = ask(tmp_path, *asked, url=fresh.url)
    needed = ["config.json", "model.safetensors", "tokenizer.json", "vocab.txt"]
    assert plain["files"] == needed and plain["said"] == []
    assert (plain["name"], plain["kind"], plain["revision"]) == ("org/plain", "hub", commit(repo.revisions["main"]))
    assert Path(plain["folder"]).is_relative_to(tmp_path)
    assert tagged["files"] == ["config.json", "model.safetensors", "vocab.txt"]
    assert tagged["revision"] == commit(repo.revisions["v1"])
    assert by_uri == tagged
    assert fresh.fetched() == sorted([*needed, "model.safetensors"])  # what v1 shares with main is not sent twice

    fresh.seen.clear()
    questions = [
        {"model": "org/plain"},
        {"model": "org/plain", "revision": plain["revision"]},
        {"model": "org/sharded"},
    ]
    cached, by_commit, missing = ask(tmp_path, *questions, url=fresh.url, before=NO_SOCKETS, HF_HUB_OFFLINE="1")
    assert cached == by_commit == plain
    assert missing["code"] == 1 and "org/sharded is not in the cache" in missing["message"]
    assert "HF_HUB_OFFLINE" in missing["hint"]
    assert fresh.seen == []


FULL_DISK = """
import shutil
usage = shutil.disk_usage("/")
shutil.disk_usage = lambda path: usage._replace(free=0)  # this hub says that every file has one byte
"""


def test_weights_for_which_there_is_no_room_are_not_fetched(fresh, tmp_path):
    (answer,) = ask(tmp_path, {"model": "org/plain"}, url=fresh.url, before=FULL_DISK)
    assert answer["code"] == 1 and "MiB free; downloading org/plain" in answer["message"]
    assert "model.safetensors" not in fresh.fetched()


def test_cache_of_another_program_serves_offline(fresh, tmp_path):
    """transformers fills the cache file by file, without a list of the repository's files."""
    (plain,) = ask(tmp_path, {"model": "org/plain"}, url=fresh.url)
    for listing in tmp_path.rglob("trees/*.json"):
        listing.unlink()
    (cached,) = ask(tmp_path, {"model": "org/plain"}, url=fresh.url, HF_HUB_OFFLINE="1")
    assert cached == plain
    (Path(plain["folder"]) / "model.safetensors").unlink()
    (missing,) = ask(tmp_path, {"model": "org/plain"}, url=fresh.url, HF_HUB_OFFLINE="1")
    assert missing["code"] == 1 and "not all of it" in missing["message"]


def test_what_the_hub_says_is_refused_in_sentences(fresh, tmp_path):
    (tmp_path / "secret.safetensors").write_bytes(b"")
    names = ["org/pickled", "org/empty", "org/hostile", "org/gated", "org/private"]
    wrong = [{"model": "org/plain", "revision": "v9"}, {"model": "org/plain", "revision": "0" * 40}]
    unknown = [{"model": "Salesforce/blip-itm-bse-cocoo"}, {"model": "nobody/nothing-like-it"}]
    invalid = [{"model": "not a name"}, {"model": "org/../name"}]
    questions = [*({"model": name} for name in names), *wrong, *unknown, *invalid]
    pickled, empty, hostile, gated, private, tag, sha, typo, nothing, spaces, dots = answers = ask(
        tmp_path / "cache", *questions, url=fresh.url
    )
    assert [answer["code"] for answer in answers] == [4] * 9 + [2] * 2
    assert "pytorch_model.bin" in pickled["message"] and "--allow-pickle" in pickled["hint"]
    assert "org/empty holds no weights" in empty["message"]
    assert "'../../../secret.safetensors'" in hostile["message"]
    assert "gated" in gated["message"] and f"{fresh.url}/org/gated" in gated["hint"]
    assert "HF_TOKEN" in private["hint"]
    assert "org/plain has no revision v9" in tag["message"]
    assert "0" * 40 in sha["message"]
    assert "Did you mean Salesforce/blip-itm-base-coco" in typo["hint"]
    assert "Did you mean" not in nothing["hint"]
    assert "neither a folder here nor a hub id" in spaces["message"]
    assert not any(name.endswith((".bin", ".onnx")) for name in fresh.fetched())
    assert not list(tmp_path.rglob("evil*"))


def test_aliases_pickle_and_shards(fresh, tmp_path):
    short, shorter, sharded, pickled = ask(
        tmp_path,
        {"model": "Salesforce/blip-itm-base", "cache_dir": str(tmp_path / "elsewhere")},
        {"model": "blip-itm-base", "cache_dir": str(tmp_path / "elsewhere")},
        {"model": "org/sharded"},
        {"model": "org/pickled", "allow_pickle": True},
        url=fresh.url,
    )
    assert short["name"] == shorter["name"] == "Salesforce/blip-itm-base-coco"
    assert short["said"] == ["Salesforce/blip-itm-base: taking Salesforce/blip-itm-base-coco, its id on the hub."]
    assert Path(short["folder"]).is_relative_to(tmp_path / "elsewhere")
    assert sum(name.endswith(".safetensors") for name in sharded["files"]) == 2
    assert pickled["files"] == ["config.json", "pytorch_model.bin", "vocab.txt"]


def test_token_opens_closed_models(fresh, tmp_path):
    questions = [{"model": "org/gated"}, {"model": "org/private"}]
    gated, private = ask(tmp_path, *questions, url=fresh.url, HF_TOKEN="hf_secret")
    assert gated["kind"] == private["kind"] == "hub"
    assert {seen.authorization for seen in fresh.seen if "/org/" in seen.path} == {"Bearer hf_secret"}


def test_hub_down_and_network_down(fresh, tmp_path):
    (plain,) = ask(tmp_path, {"model": "org/plain"}, url=fresh.url)
    cached, unreachable = ask(tmp_path, {"model": "org/plain"}, {"model": "org/sharded"})
    assert cached == plain
    assert unreachable["code"] == 1 and "Cannot reach the hub" in unreachable["message"]
    assert "HF_ENDPOINT" in unreachable["hint"]
    fresh.status = 503
    (broken,) = ask(tmp_path, {"model": "org/sharded"}, url=fresh.url)
    assert broken["code"] == 1 and "503" in broken["message"]
    fresh.status = 200  # with no JSON in it, as a login page would
    (strange,) = ask(tmp_path, {"model": "org/sharded"}, url=fresh.url)
    assert strange["code"] == 1 and f"from {fresh.url}: not a Hugging Face Hub endpoint" in strange["message"]
    fresh.status = None
    (refused,) = ask(tmp_path, {"model": "org/sharded"}, url=fresh.url, HF_TOKEN="hf_wrong")
    assert refused["code"] == 4 and "status 401" in refused["message"] and "HF_TOKEN" in refused["hint"]


def resolve(model: str, **options) -> hub.Source:
    return hub.resolve(model, progress=Output("quiet"), **options)


def refusal(model: str, **options) -> CompError:
    with pytest.raises(CompError) as caught:
        resolve(model, **options)
    return caught.value


def test_a_local_folder_wins_where_it_exists(tmp_path, monkeypatch):
    folder = checkpoint(tmp_path / "blip-itm-base", "model.safetensors")
    monkeypatch.chdir(tmp_path)
    expected = hub.Source(folder, "blip-itm-base", None, "folder")
    assert resolve("blip-itm-base") == resolve("./blip-itm-base/") == resolve(str(folder)) == expected
    monkeypatch.chdir(folder)
    assert resolve(".") == expected
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/blip-itm-base") == expected


@pytest.mark.parametrize("model", ["./gone", "/no/such/folder", "~/gone", "../gone", "a/b/c", "org/name/", "", " ", "a\\b"])
def test_paths_that_are_not_there(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error = refusal(model)
    assert error.exit_code == 2 and "does not exist" in error.message


def test_names_that_mean_nothing(tmp_path):
    file = tmp_path / "model.safetensors"
    file.touch()
    assert "is a file" in refusal(str(file)).message
    folder = checkpoint(tmp_path / "folder", "model.safetensors")
    assert "--revision" in refusal(str(folder), revision="main").message
    assert "--revision" in refusal("hf://org/name@v1", revision="v2").message
    for uri in (
        "hf://",
        "hf://name",
        "hf://datasets/org/name",
        "hf://org/name/file.txt",
        "https://example.com/org/name",
    ):
        error = refusal(uri)
        assert error.exit_code == 2 and uri in error.message and "hf://org/name@revision" in error.hint


def test_demo(tmp_path, monkeypatch):
    monkeypatch.setitem(hub.DEMOS, "demo", tmp_path / "demo")
    assert "demo model is missing" in refusal("demo").message
    checkpoint(tmp_path / "demo", "model.safetensors")
    assert resolve("demo") == hub.Source(tmp_path / "demo", "demo", None, "demo")
    assert refusal("demo", revision="main").exit_code == 2


def test_local_folders_are_checked(tmp_path):
    (tmp_path / "bare").mkdir()
    assert "no config.json" in refusal(str(tmp_path / "bare")).message
    pickled = checkpoint(tmp_path / "pickled", "pytorch_model.bin")
    assert refusal(str(pickled)).exit_code == 4 and "--allow-pickle" in refusal(str(pickled)).hint
    assert resolve(str(pickled), allow_pickle=True).folder == pickled
    empty = checkpoint(tmp_path / "empty")
    assert "holds no weights" in refusal(str(empty), allow_pickle=True).message


@pytest.mark.parametrize("shard", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..\\x", "..", ".", "", 7, None])
def test_shards_that_lead_elsewhere(shard, tmp_path):
    (tmp_path / "x.safetensors").touch()
    folder = shard_index(checkpoint(tmp_path / "model", "model-00001-of-00001.safetensors"), shard)
    error = refusal(str(folder))
    assert error.exit_code == 4 and repr(shard) in error.message


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "{", "[" * 100_000])
def test_broken_shard_index(index, tmp_path):
    folder = checkpoint(tmp_path / "model")
    (folder / "model.safetensors.index.json").write_text(index)
    assert refusal(str(folder)).exit_code == 4


def test_missing_shard(tmp_path):
    first, second = shards = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    error = refusal(str(shard_index(checkpoint(tmp_path / "model", first), *shards)))
    assert error.exit_code == 4 and f"{second!r} is missing" in error.message


def test_aliases_lead_to_known_ids():
    assert set(hub.ALIASES.values()) <= set(hub.KNOWN_IDS)
    assert hub.ALIASES["blip-itm-large-flickr"] == "Salesforce/blip-itm-large-flickr"
    assert not set(hub.ALIASES) & set(hub.KNOWN_IDS)


@pytest.mark.parametrize(
    "typed, nearest",
    [
        ("Salesforce/blip-itm-basecoco", "Salesforce/blip-itm-base-coco"),
        ("clip-vit-large-patch14-335", "openai/clip-vit-large-patch14-336"),
        ("openai/clip-vit-base-patch-16", "openai/clip-vit-base-patch16"),
        ("blip-itm-lage", "Salesforce/blip-itm-large-coco"),
    ],
)
def test_suggestions(typed, nearest):
    assert hub.suggest(typed)[0] == nearest
