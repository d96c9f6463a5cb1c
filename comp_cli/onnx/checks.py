"""Before graphs run: whether the ONNX Runtime here is new enough for them, and whether they are those of their folder."""

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import onnx
from packaging.version import Version

from ..errors import DeviceError, RefusedError
from ..families import Family, Tower, tower_config
from ..files.store import read_json, sha256
from .graphs import DECODER, ENCODER, HIDDEN, PAST, STATES

# The first ONNX Runtime that loads an opset, and computes what it should; IR version 10, which is what torch writes, needs
# 1.18 by itself. Measured on 1.17 to 1.32; what is older refuses such graphs when it loads or runs them.
LEAST = {18: "1.18", 19: "1.18", 20: "1.18", 21: "1.18", 22: "1.21", 23: "1.23"}
SHARED_BIAS = "1.20"  # an attention bias that all samples and heads share; older ones want one for each head, and say so
BIAS = 5  # which input of MultiHeadAttention it is

Shape = tuple[int | None, ...]  # None: any number


class Signature(NamedTuple):
    """What a graph takes and hands out: name -> shape."""

    inputs: dict[str, Shape]
    outputs: dict[str, Shape]


def least_runtime(models: Iterable[onnx.ModelProto]) -> str:
    """The oldest ONNX Runtime, such as "1.18", that runs all of these graphs and computes them rightly."""
    return max((version for model in models for version in _needs(model)), key=Version)


def _needs(model: onnx.ModelProto) -> list[str]:
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    expanded = {name for node in model.graph.node if node.op_type == "Expand" for name in node.output}
    biases = (node.input[BIAS] for node in model.graph.node if node.op_type == "MultiHeadAttention" and len(node.input) > BIAS)
    return [LEAST[opset], *(SHARED_BIAS for bias in biases if bias not in expanded)]


def require_runtime(least: str, folder: Path) -> None:
    """Raises DeviceError where the ONNX Runtime that is installed is older."""
    import onnxruntime

    if Version(onnxruntime.__version__) < Version(least):
        raise DeviceError(
            f"{folder}: its graphs need ONNX Runtime {least} or newer; {onnxruntime.__version__} is installed.",
            hint="An older one refuses them, or computes them wrongly. pip install -U onnxruntime",
        )


def check_files(folder: Path, names: Collection[str]) -> None:
    """Raises RefusedError where one of these files, or weights beside a graph, is not the one that `comp export` wrote: by the
    hashes in export.json. Without one of comp's there is nothing to compare with."""
    document = read_json(folder / "export.json") if (folder / "export.json").is_file() else {}
    if "comp_version" not in document:
        return
    written = document.get("files")
    if not isinstance(written, dict) or not all(name in written for name in names):
        raise RefusedError(
            f"{folder / 'export.json'} does not list {', '.join(sorted(names))} under `files`.",
            hint="It is not of this folder, or was changed. Export the model again.",
        )
    for name in (*names, *(name for name in written if Path(name).stem in names)):
        path = folder / name
        if not path.is_file():
            raise RefusedError(f"{path} is missing; export.json lists it.", hint="Copy the whole folder again.")
        if sha256(path) != written[name]:
            raise RefusedError(
                f"{path} is not the file that `comp export` wrote: its SHA-256 is not that in export.json.",
                hint="It was cut off, damaged or changed. Copy the folder again, or export the model again.",
            )
    if isinstance(least := document.get("min_onnxruntime"), str):
        require_runtime(least, folder)


def check_signature(path: Path, session: Any, expected: Signature) -> None:
    """Raises RefusedError where a graph takes or hands out something else than config.json beside it says."""
    for what, values, wanted in (
        ("takes", session.get_inputs(), expected.inputs),
        ("hands out", session.get_outputs(), expected.outputs),
    ):
        found = {value.name: value.shape for value in values}
        hint = "Graphs and config.json must be of one export. Export the model again."
        if found.keys() != wanted.keys():
            less, more = (sorted(a - b)[:3] for a, b in ((wanted.keys(), found.keys()), (found.keys(), wanted.keys())))
            said = " and ".join(filter(None, (less and f"not {', '.join(less)}", more and f"also {', '.join(more)}")))
            raise RefusedError(f"{path} {what} {said}: that is no graph of this model.", hint=hint)
        for name, shape in wanted.items():
            here = tuple(found[name])
            known = [(a, b) for a, b in zip(here, shape, strict=False) if isinstance(a, int) and b is not None]
            if len(here) != len(shape) or any(a != b for a, b in known):
                sizes = [", ".join("*" if not isinstance(size, int) else str(size) for size in one) for one in (shape, here)]
                said = f"{name} as ({sizes[1]}); config.json says ({sizes[0]})"
                raise RefusedError(f"{path} {what} {said}.", hint=hint)


def writer_signatures(config: dict[str, Any], family: Family) -> dict[str, Signature]:
    """Of the three graphs of a model that writes texts, by their names. Raises RefusedError where the config is not one of such
    a model."""
    try:
        return _writer_signatures(config, family)
    except (KeyError, TypeError, AttributeError, ZeroDivisionError, StopIteration) as error:
        said = f"config.json describes no model that writes texts ({type(error).__name__}: {error})."
        raise RefusedError(said, hint="Copy the folder again, or export the model again.") from error


def _writer_signatures(config: dict[str, Any], family: Family) -> dict[str, Signature]:
    tower = family.towers[-1]
    text, vision = (tower_config(config, family.tower(name)) for name in (tower.name, "vision"))
    side, dim = vision["image_size"], (text if family.decoder.question else vision)["hidden_size"]
    images = {"pixel_values": (None, 3, side, side)}
    asked = {"input_ids": (None, None), "attention_mask": (None, None)} if family.decoder.question else {}
    tokens, states = {"input_ids": (None, None)}, {STATES: (None, None, dim)}
    logits = {"logits": (None, None, text["vocab_size"])}
    layers = _heads(config, tower, text)

    def cache(prefix: str, *parts: str) -> dict[str, Shape]:
        names = ((i, part, kind) for i in range(len(layers)) for part in parts for kind in ("key", "value"))
        return {f"{prefix}.{i}.{part}.{kind}": (None, layers[i][part][0], None, layers[i][part][1]) for i, part, kind in names}

    return {
        ENCODER: Signature(images | asked, {HIDDEN: (None, None, dim)}),
        DECODER: Signature(tokens | states, logits | cache("present", "decoder", "encoder")),
        PAST: Signature(tokens | cache("past_key_values", "decoder", "encoder"), logits | cache("present", "decoder")),
    }


def _heads(config: dict[str, Any], tower: Tower, text: dict[str, Any]) -> list[dict[str, tuple[int, int]]]:
    """Heads and their width in self- ("decoder") and cross-attention ("encoder") of each layer of a tower."""
    if "comp" not in config:
        dense = (text["num_attention_heads"], text["hidden_size"] // text["num_attention_heads"])
        return [{"decoder": dense, "encoder": dense}] * text["num_hidden_layers"]
    layers = next(entry["layers"] for entry in config["comp"]["towers"] if entry["layout"]["encoder"] == tower.encoder)
    parts = {"decoder": "attention", "encoder": "cross"}
    return [{name: (layer[kind]["num_heads"], layer[kind]["head_dim"]) for name, kind in parts.items()} for layer in layers]
