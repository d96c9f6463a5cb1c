"""Nothing that comp writes names a place of the machine that it was written on, whatever kind of folder it is."""

import json
import shutil
from pathlib import Path

import pytest
import tiny

import comp_cli
from comp_cli.checkpoint.places import without_places
from comp_cli.commands import prune_streamed
from comp_cli.report.base import Streamed

FEW = {"num_samples": 4, "eval_samples": 4, "text_tokens": 12, "device": "cpu"}
SHORT = FEW | {"stage_samples": 2, "looks": 1}


def seen(family: str, folder: Path) -> Path:
    """A dense folder that remembers where it was made, as older versions of transformers write it."""
    tiny.write(family, folder)
    home = str(folder.parent)
    for name, told in (
        ("config.json", {"_name_or_path": home}),
        ("tokenizer_config.json", {"is_local": True, "local_files_only": True, "name_or_path": home}),
    ):
        settings = json.loads((folder / name).read_text())
        told |= {"special_tokens_map_file": f"{home}/x.json"} if "tokenizer" in name else {}
        (folder / name).write_text(json.dumps(settings | told))
    return folder


def check(folder: Path, *places: Path) -> None:
    """No file holds the name of a place, and the settings of the tokenizer do not say that they are local."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    for path in files:
        content = path.read_bytes()
        for place in places:
            assert str(place).encode() not in content, path
        if path.name == "tokenizer_config.json":
            assert not {"is_local", "local_files_only", "name_or_path", "special_tokens_map_file"} & json.loads(content).keys()


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("somewhere")


def test_folders_of_several_ratios_and_graphs_name_no_place(place):
    """Pairs of a local table, reports as pages, the trade-off, the graphs of one of the folders."""
    dense = seen("clip", place / "clip")
    (place / "pairs").mkdir()
    table = tiny.table(place / "pairs", text=lambda number: tiny.WORDS[number])
    comp_cli.prune(dense, ratio="0.3,0.5", data=table, output=place / "out", method="joint", **FEW)
    comp_cli.export(place / "out" / "ratio-0.5", output=place / "graphs", data=table)
    check(place / "out", place, Path.home())
    check(place / "graphs", place, Path.home())


@pytest.mark.parametrize(
    "how",
    [
        {"tokens": 9},
        {"ratio": 0.4, **SHORT},
        {"ratio": 0.3, **SHORT},
        {"ratio": 0.3, "uniform": True, **SHORT},
    ],
    ids=["tokens", "parameters", "layer by layer", "uniform"],
)
def test_folders_of_decoders_name_no_place(place, how, monkeypatch, request):
    if "layer by layer" in request.node.name:  # as if it did not fit
        monkeypatch.setattr(prune_streamed, "exceeds", lambda *given: Streamed(1 << 41, 1 << 40))
    dense = place / "llava"
    if not dense.exists():
        seen("llava", dense)
    output = place / "compact"
    comp_cli.prune(dense, output=output, overwrite=True, **how)
    check(output, place, Path.home())
    comp_cli.load(output)
    shutil.rmtree(output)


def test_names_of_the_hub_and_words_stay_in_settings():
    known = {
        "name_or_path": "org/name",
        "unk_token": "/",
        "text_config": {"_name_or_path": "lmsys/vicuna"},
        "list": [{"a": 1}],
        "id2label": {0: "/"},
    }
    assert without_places(known) == known
    told = {"tokenizer_file": "C:\\Users\\me\\x.json", "text_config": {"_name_or_path": "/home/me"}, "is_local": True}
    assert without_places(told) == {"text_config": {}}
