"""Safetensors files in pieces, against the library that maps them; and what memory a process may use."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from comp_cli.errors import CompError, RefusedError, UsageError
from comp_cli.files import memory
from comp_cli.files.shards import INDEX, ShardWriter, Spool
from comp_cli.files.tensors import read_pieces, read_places, read_rows
from comp_cli.option_values import parse_bytes

TENSORS = {
    "matrix": torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "filter": torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(1)),
    "vector": torch.arange(6).half(),
    "scale": torch.tensor(2.5),
    "none": torch.zeros(0, 4),
}


@pytest.fixture
def path(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_tensors_and_rows_are_those_of_the_library(path):
    places, expected = read_places(path), load_file(path)
    assert places.keys() == expected.keys()
    for name, tensor in expected.items():
        found = read_rows(path, places[name])
        assert found.dtype == tensor.dtype and torch.equal(found, tensor)
    assert torch.equal(read_rows(path, places["matrix"], 2, 5), expected["matrix"][2:5])
    pieces = list(read_pieces(path, places["matrix"], size=2 * places["matrix"].row))
    assert [first for first, _ in pieces] == [0, 2, 4, 6]
    assert torch.equal(torch.cat([rows for _, rows in pieces]), expected["matrix"])


def test_a_file_that_shrinks_while_it_is_read_is_refused(path):
    places = read_places(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(RefusedError, match="cut off"):
        for name, place in places.items():
            read_rows(path, place) if name != "none" else None


def test_shards_that_arrive_in_pieces_and_in_any_order_are_read_by_the_library(tmp_path):
    kinds = {"matrix": ("BF16", (7, 5)), "filter": ("F32", (3, 2, 4, 4)), "vector": ("F16", (6,))}
    kinds |= {"scale": ("F32", ()), "none": ("F32", (0, 4))}
    writer = ShardWriter(tmp_path, kinds, shard=400)
    for name in reversed(kinds):
        if name != "matrix":
            writer.write(name, TENSORS[name])
    writer.write("matrix", TENSORS["matrix"][4:].float(), first=4)  # of another precision: rounded to that of the file
    with pytest.raises(CompError, match="matrix was not written whole"):
        writer.close()
    writer.write("matrix", TENSORS["matrix"][:4])
    writer.close()
    index = json.loads((tmp_path / INDEX).read_text())
    files = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    assert files == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in TENSORS.values())
    found = {name: tensor for file in files for name, tensor in load_file(tmp_path / file).items()}
    assert all(torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in TENSORS.items())
    assert all(name in load_file(tmp_path / file) for name, file in index["weight_map"].items())


def test_a_tensor_of_another_shape_than_announced_is_an_error(tmp_path):
    writer = ShardWriter(tmp_path, {"matrix": ("F32", (4, 3))})
    for wrong, first in ((torch.zeros(4, 2), 0), (torch.zeros(5, 3), 0), (torch.zeros(2, 3), 3)):
        with pytest.raises(ValueError, match="matrix: rows of shape"):
            writer.write("matrix", wrong, first)
    assert not (tmp_path / INDEX).exists()  # one file needs none


def test_the_spool_gives_back_what_it_was_given_and_then_its_room(tmp_path):
    spool = Spool(tmp_path)
    for number, tensor in enumerate(TENSORS.values()):
        spool.put(("a", number), tensor)
    spool.put(("a", 0), TENSORS["matrix"].float() * 2)  # the last one counts
    assert torch.equal(spool["a", 0], TENSORS["matrix"].float() * 2)
    for number, tensor in list(enumerate(TENSORS.values()))[1:]:
        assert spool["a", number].dtype == tensor.dtype and torch.equal(spool["a", number], tensor)
        spool.drop(("a", number))
    spool.drop(("a", 0))
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) == 0


def test_a_limit_on_the_address_space_is_what_may_be_used():
    code = """
import resource
from comp_cli.files import memory
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + (256 << 20), resource.RLIM_INFINITY))
print(memory.allowed())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 200 << 20 < int(done.stdout) <= 256 << 20
    free = memory.allowed()
    assert free is not None and free > 0
    held = bytearray(64 << 20)
    assert memory.peak() > len(held)


def test_a_control_group_leaves_what_it_does_not_hold_and_what_is_only_cached(tmp_path, monkeypatch):
    inner = tmp_path / "outer" / "inner"
    inner.mkdir(parents=True)
    for group, limit, taken, cached in ((inner, "max", 1, 0), (inner.parent, "1000", 700, 300), (tmp_path, "5000", 100, 0)):
        (group / "memory.max").write_text(f"{limit}\n")
        (group / "memory.current").write_text(f"{taken}\n")
        (group / "memory.stat").write_text(f"anon 5\nactive_file {cached // 3}\ninactive_file {cached - cached // 3}\n")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path)
    monkeypatch.setattr(memory, "OWN_GROUP", tmp_path / "own")
    (tmp_path / "own").write_text("1:name=x:/\n0::/outer/inner\n")
    assert memory.allowed() == 600
    (inner.parent / "memory.max").write_text("max\n")
    assert memory.allowed() == 4900


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1GiB", 2**30), ("1.5 GB", 1_500_000_000), ("800MB", 800_000_000), ("4096", 4096), ("2KiB", 2048), (None, None), (7, 7)],
)
def test_bytes_are_read_with_their_units(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "1PB", "one"])
def test_what_is_no_number_of_bytes_is_refused(text):
    with pytest.raises(UsageError, match="--max-memory"):
        parse_bytes(text)
