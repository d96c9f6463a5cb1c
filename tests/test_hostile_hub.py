"""A hub that hands over other bytes, or answers with nonsense; and a server on the way that does."""

import json

import fuzzing
import pytest
from hub_server import HubServer, Repo
from hypothesis import given, settings
from hypothesis import strategies as st
from test_hub import ask, checkpoint

from comp_cli.checkpoint.download_check import fits, is_hash
from comp_cli.checkpoint.hub import ALIASES


@pytest.fixture
def hub(tmp_path):
    main = checkpoint(tmp_path / "repo", "model.safetensors", "tokenizer.json")
    adapter = checkpoint(tmp_path / "adapter", "model.safetensors", "adapter_config.json")
    taken = checkpoint(tmp_path / "taken", "model.safetensors", value=2.0)
    repos = {
        "org/plain": Repo({"main": main}),
        "org/adapter": Repo({"main": adapter}),
        "Salesforce/blip-itm-base": Repo({"main": taken}),
        "Salesforce/blip-itm-base-coco": Repo({"main": main}),
    }
    with HubServer(repos) as running:
        yield running


def ask_once(hub, cache, model="org/plain", **options):
    return ask(cache, {"model": model}, url=hub.url, **options)[0]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "vocab.txt"])
def test_a_download_that_is_not_what_was_announced_is_refused_and_not_kept(hub, tmp_path, name):
    content = (tmp_path / "repo" / name).read_bytes()
    hub.tampers[name] = content[:-1] + bytes([content[-1] ^ 1])
    cache = tmp_path / "cache"
    answer = ask_once(hub, cache)
    assert answer["code"] == 4 and f"{name} of org/plain is not what the hub announced" in answer["message"]
    assert "not kept" in answer["hint"]
    bad = [path for path in cache.rglob("*") if path.is_file() and path.read_bytes() == hub.tampers[name]]
    assert not bad
    hub.tampers.clear()
    assert name in ask_once(hub, cache)["files"]  # the next run fetches the right one


@pytest.mark.parametrize("name", ["model.safetensors", "vocab.txt"])
def test_a_file_of_the_cache_that_was_changed_is_named(hub, tmp_path, name):
    cache = tmp_path / "cache"
    ask_once(hub, cache)
    (path,) = (path for path in cache.rglob(name) if path.is_symlink())
    path.resolve().write_bytes(path.read_bytes() + b"x")
    for environment in ({}, {"HF_HUB_OFFLINE": "1"}):
        answer = ask_once(hub, cache, **environment)
        assert answer["code"] == 4 and str(path.resolve()) in answer["hint"] and path.exists()


NONSENSE = [
    b"null",
    b"[]",
    b'"x"',
    b"3",
    b"{}",
    b"true",
    b'{"id": 3}',
    b'{"id": null, "sha": 7}',
    b"[" * 100_000,
    b"{",
    b"\xff",
]
INFO = {"id": "org/plain", "sha": "0" * 40}


def test_answers_that_are_no_answers_are_sentences(hub, tmp_path):
    siblings = [
        {"siblings": [{}]},
        {"siblings": [None]},
        {"siblings": "x"},
        {"siblings": 3},
        {"sha": "../../evil"},
        {"sha": None},
    ]
    saids = [*NONSENSE, *(json.dumps(INFO | wrong).encode() for wrong in siblings)]
    hub.says = {f"/api/models/org/n{number}/revision/main": said for number, said in enumerate(saids)}
    hub.says["/api/agent-harnesses"] = b'"x"'
    cache = tmp_path / "cache"
    answers = ask(cache, *({"model": f"org/n{number}"} for number in range(len(saids))), {"model": "org/plain"}, url=hub.url)
    for said, answer in zip(saids, answers[:-1], strict=True):
        assert answer["code"] in (1, 4) and answer["message"], (said, answer)
    assert "not a Hugging Face Hub endpoint" in answers[0]["message"]
    assert not [path for path in tmp_path.rglob("*evil*")]


def test_listings_that_are_none(hub, tmp_path):
    lists = [b"null", b'"x"', b"3", b"[3]", b'[{"type": "file"}]', b'[{"type": 3, "path": []}]', b"{}"]
    names = [f"org/l{number}" for number in range(len(lists))]
    hub.repos |= dict.fromkeys(names, hub.repos["org/plain"])
    sha = hub.repos["org/plain"].find("main")[0]
    hub.says = {f"/{name}/tree/{sha}": said for name, said in zip(names, lists, strict=True)}
    answers = ask(tmp_path / "cache", *({"model": name} for name in names), {"model": "org/plain"}, url=hub.url)
    for said, answer in zip(lists, answers[:-1], strict=True):
        assert answer["code"] in (1, 4), (said, answer)
    assert "model.safetensors" in answers[-1]["files"]


KEYS = st.sampled_from(
    ["id", "sha", "siblings", "rfilename", "path", "type", "size", "oid", "lfs", "sha256", "xetHash", "gated"]
)
JSON = st.recursive(fuzzing.VALUES, lambda part: st.lists(part, max_size=3) | st.dictionaries(KEYS, part, max_size=4))


@settings(max_examples=max(1, settings.default.max_examples // 100), derandomize=True)
@given(saids=st.lists(st.tuples(JSON, st.booleans()), min_size=60, max_size=60))
def test_fuzz_answers_of_a_hub(saids, tmp_path_factory):
    """Sixty models of one hub, each of which answers a request for itself or its list of files with something."""
    place = tmp_path_factory.mktemp("fuzz")
    repo = Repo({"main": checkpoint(place / "repo", "model.safetensors")})
    sha = repo.find("main")[0]
    with HubServer({f"org/f{number}": repo for number in range(60)}) as hub:
        for number, (said, listed) in enumerate(saids):
            where = f"/org/f{number}/" + (f"tree/{sha}" if listed else "revision/main")
            hub.says[where] = json.dumps(said).encode("utf-8", "surrogatepass")
        answers = ask(place / "cache", *({"model": f"org/f{number}"} for number in range(60)), url=hub.url)
    assert all(answer.get("code") in (1, 4) for answer in answers)


def test_a_list_of_agents_that_went_bad_does_not_stick(hub, tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / ".agent_harnesses.json").write_text('"x"')
    answer = ask_once(hub, cache)
    if "code" in answer:  # where telemetry is on: the sentence says which file
        assert answer["code"] == 1 and "AttributeError" in answer["message"] and ".agent_harnesses.json" in answer["hint"]
    assert "files" in ask_once(hub, cache, HF_HUB_DISABLE_TELEMETRY="1")


def test_the_typed_id_comes_before_what_people_mean_by_it(hub, tmp_path):
    assert "Salesforce/blip-itm-base" in ALIASES
    found = ask_once(hub, tmp_path / "cache", "Salesforce/blip-itm-base")
    assert found["name"] == "Salesforce/blip-itm-base" and not found["said"]
    assert ask_once(hub, tmp_path / "cache", "blip-itm-base")["name"] == "Salesforce/blip-itm-base-coco"
    hub.repos["blip-itm-base"] = hub.repos["Salesforce/blip-itm-base"]  # of nobody's, as the first models of the hub are
    found = ask_once(hub, tmp_path / "cache", "blip-itm-base")
    assert found["name"] == "blip-itm-base" and not found["said"]
    del hub.repos["Salesforce/blip-itm-base"]
    found = ask_once(hub, tmp_path / "other", "Salesforce/blip-itm-base")
    assert found["name"] == "Salesforce/blip-itm-base-coco" and found["said"]
    offline = ask_once(hub, tmp_path / "other", "Salesforce/blip-itm-base", HF_HUB_OFFLINE="1")
    assert offline == found
    (unreachable,) = ask(tmp_path / "other", {"model": "Salesforce/blip-itm-base"})
    assert unreachable == found


def test_adapters_on_the_hub(hub, tmp_path):
    answer = ask_once(hub, tmp_path / "cache", "org/adapter")
    assert answer["code"] == 4 and "LoRA adapter" in answer["message"]
    assert "model.safetensors" not in hub.fetched()


def test_names_that_no_file_and_no_model_can_have(hub, tmp_path):
    names = ["a\0b", "org/na\0me", "hf://org/\0", "\0", "x" * 5000, "org/" + "x" * 300, "\udcff/\udcff"]
    answers = ask(tmp_path / "cache", *({"model": name} for name in names), url=hub.url)
    assert [answer["code"] for answer in answers] == [2] * len(names)
    assert not [seen for seen in hub.seen if "/api/models" in seen.path]


def test_hashes_that_a_hub_announces(tmp_path):
    """Of the file "hello\\n": what `git hash-object`, `sha1sum` and `sha256sum` say."""
    file = tmp_path / "file"
    file.write_bytes(b"hello\n")
    right = [
        "ce013625030ba8dba906f756967f9e9ca394464a",
        "f572d396fae9206628714fb2ce00f72e94f2258f",
        "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03",
    ]
    assert all(is_hash(name) and fits(file, name) for name in right)
    file.write_bytes(b"hellO\n")
    assert not any(fits(file, name) for name in right)
    assert not is_hash("W-1234") and not is_hash("a" * 39)
