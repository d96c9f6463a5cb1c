"""Which files of a checkpoint hold its weights, and whether a folder is one that may be read. Names only; light to import."""

import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ..errors import RefusedError
from ..files.store import read_json
from .folder_check import check_folder, shown
from .foreign_formats import MERGE, adapter_among, other_kind


def pick_weights(names: Collection[str], *, allow_pickle: bool, owner: str) -> list[str]:
    """Of a checkpoint's file names those that hold the weights, with the index of shards; pickle as a last resort.

    Raises RefusedError where config.json or weights are missing, or the weights are pickled and `allow_pickle` is not given.
    """
    if adapter := adapter_among(names):
        raise RefusedError(f"{owner} holds a LoRA adapter or its like ({adapter}).", hint=MERGE)
    other = other_kind(names)
    if "config.json" not in names:
        known = f" It looks like {other[0]}." if other else ""
        hint = other[1] if other else "Give a folder or hub model that transformers' save_pretrained or comp wrote."
        raise RefusedError(f"{owner} is not a checkpoint: no config.json.{known}", hint=hint)
    if weights := safe(names):
        return weights
    if not (weights := pickled(names)):
        expected = "model.safetensors, or model.safetensors.index.json and its shards"
        known = f" It looks like {other[0]}." if other else ""
        raise RefusedError(f"{owner} holds no weights: expected {expected}.{known}", hint=other and other[1])
    if not allow_pickle:
        raise RefusedError(
            f"{owner} has only pickled weights ({weights[0]}), and a pickle can run code when it is read.",
            hint="Choose a revision with safetensors, or read them with --allow-pickle if you trust the author.",
        )
    return weights


def pick_graphs(names: Collection[str], *, owner: str) -> list[str]:
    """Of a repository's file names those that hold graphs and their weights. Raises RefusedError where there are none."""
    graphs = sorted(name for name in names if name.endswith((".onnx", ".onnx.data")) and "/" not in name)
    if not graphs or "config.json" not in names:
        expected = "config.json and .onnx files, as comp export writes them"
        raise RefusedError(f"{owner} holds no graphs: expected {expected}.")
    return graphs


def check_checkpoint(folder: Path, *, allow_pickle: bool) -> list[str]:
    """The files that hold the weights. Raises RefusedError where `pick_weights` refuses the folder's files, a shard is missing
    or lies outside, or folder_check.py finds what no library should read."""
    try:
        names = os.listdir(folder)
    except OSError as error:
        raise RefusedError(f"{folder}: {error.strerror}.", hint="Name a folder with a checkpoint.") from error
    weights = pick_weights(names, allow_pickle=allow_pickle, owner=str(folder))
    check_folder(folder)
    return weight_files(folder, weights)


def files_of(folder: Path) -> list[Path]:
    """The files that hold a checkpoint's weights, pickled ones as a last resort."""
    return [
        folder / name for name in weight_files(folder, pick_weights(os.listdir(folder), allow_pickle=True, owner=str(folder)))
    ]


def weight_files(folder: Path, weights: list[str]) -> list[str]:
    """The files that hold the weights, of what `pick_weights` found: the shards that an index names. Raises RefusedError for
    one that is missing."""
    if not weights[0].endswith(".json"):
        found = weights
    else:
        found = check_shards(read_json(folder / weights[0]), folder / weights[0])
    for name in found:
        if not os.path.isfile(folder / name):
            raise RefusedError(f"{folder}: the weight file {shown(name)} is missing.")
    return found


def check_shards(index: dict[str, Any], path: Path) -> list[str]:
    """The file names of a shard index, sorted. Raises RefusedError where one is more than a plain name: it could lead anywhere;
    or of another kind than the index: it could be a pickle."""
    shards, kind = index.get("weight_map"), Path(path.name.removesuffix(".index.json")).suffix
    if not isinstance(shards, dict) or not shards:
        raise RefusedError(f"{path}: expected a weight_map from tensors to files.")
    for name in shards.values():
        if not isinstance(name, str) or name in ("", ".", "..") or re.search(r"[/\\\0]", name):
            raise RefusedError(f"{path}: {shown(name)} is not the name of a file beside it.")
        if not name.endswith(kind):
            raise RefusedError(f"{path}: {shown(name)} is no {kind} file.")
    return sorted(set(shards.values()))


def safe(names: Collection[str]) -> list[str]:
    """The safetensors files of a checkpoint among names, the index first."""
    return _weights(names, "model", ".safetensors")


def pickled(names: Collection[str]) -> list[str]:
    """The same for pickles."""
    return _weights(names, "pytorch_model", ".bin")


def _weights(names: Collection[str], stem: str, suffix: str) -> list[str]:
    whole, index = f"{stem}{suffix}", f"{stem}{suffix}.index.json"
    if whole in names:
        return [whole]
    shard = re.compile(rf"{stem}-\d+-of-\d+{re.escape(suffix)}")
    return [index, *sorted(filter(shard.fullmatch, names))] if index in names else []
