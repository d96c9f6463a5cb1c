"""The three graphs of a decoder that reads images, rewritten for transformers.js as it is.

That client puts image features into the embeddings of a prompt and hands the decoder nothing else of the images; its cache has
the length of its first entry, and in a step it hands over a mask of ones. So in this layout

* embeddings are wider than the model's: columns behind them say which tokens are of images, which of these the vision encoder
  keeps, and of which cluster each is. The decoder takes them off, and finds what it needs;
* the first entry of the cache counts the tokens that were seen: one number for each, 0 for padding. Mask and positions are made
  of it, and stages may stand before the first layer;
* for that entry config.json counts one layer more than there are.
"""

import json
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ..files.store import read_json
from ..topology.base import IDS, MASK, PIXELS
from ..topology.decoder_graphs import DecoderGraphs
from ..topology.decoder_names import (
    BATCH,
    EMBEDS,
    FEATURES,
    GRAPHS,
    KEPT,
    LABELS,
    PAST,
    POSITIONS,
    PRESENT,
    WHERE,
    WRITTEN,
)
from ..topology.graph_specs import Step, Values

FOLDER = "onnx"
COLUMNS = ("image", KEPT, LABELS)  # behind the embeddings
OUTSIDE = 2**40  # no position: to gather there is an error


class Nodes:
    """Nodes that are added to a graph, with their constants."""

    def __init__(self, model: onnx.ModelProto):
        self.model, self.made = model, list[onnx.NodeProto]()

    def __call__(self, operator: str, *inputs: Any, out: str | None = None, **attributes: Any) -> str:
        """Name of what an operator makes of inputs: names, or numbers and lists of them."""
        names = [given if isinstance(given, str) else self.constant(given) for given in inputs]
        name = out or f"client_{operator.lower()}_{len(self.made)}"
        self.made.append(helper.make_node(operator, names, [name], name=f"node_{name}", **attributes))
        return name

    def constant(self, value: Any) -> str:
        array = np.asarray(value, np.float32 if isinstance(value, float) else np.int64)
        name = f"client_{'_'.join(map(str, array.ravel().tolist()))}_{array.dtype}_{array.ndim}".replace("-", "minus_")
        if name not in {known.name for known in self.model.graph.initializer}:
            self.model.graph.initializer.append(numpy_helper.from_array(array, name))
        return name


def columns(graphs: DecoderGraphs) -> tuple[str, ...]:
    """What stands behind the embeddings."""
    return COLUMNS[: 1 + len(graphs.handed_on)]


def lay_out(folder: Path, graphs: DecoderGraphs) -> list[str]:
    """Move the graphs of a folder into `onnx`, rewritten; config.json and processor files as the client reads them. Returns
    their names."""
    (folder / FOLDER).mkdir()
    for name, widen in zip(GRAPHS, (widen_features, widen_embeddings, read_wide), strict=True):
        model = onnx.load(folder / name, load_external_data=False)
        widen(model, graphs)
        (folder / name).unlink()
        onnx.save(model, folder / FOLDER / name)
        if (weights := folder / f"{name}.data").exists():
            weights.replace(folder / FOLDER / weights.name)
    client_files(folder)
    return [f"{FOLDER}/{name}" for name in GRAPHS]


def widen_features(model: onnx.ModelProto, graphs: DecoderGraphs) -> None:
    """Put what the vision encoder hands out into columns behind the features."""
    add, narrow = Nodes(model), rename(model, FEATURES, "features")
    extra = [add("Add", add("Mul", add("Slice", narrow, [0], [1], [2]), 0.0), 1.0)]
    nothing = add("Mul", add("Squeeze", extra[0], [2]), 0.0)
    for name in graphs.handed_on:
        value = add("Cast", LABELS, to=TensorProto.FLOAT) if name == LABELS else add("Expand", 1.0, add("Shape", KEPT))
        extra.append(add("Unsqueeze", add("ScatterElements", nothing, KEPT, value, axis=1), [2]))
    add("Concat", narrow, *extra, out=FEATURES, axis=2)
    model.graph.node.extend(add.made)
    set_shape(model.graph.output, FEATURES, ["images", graphs.tokens, graphs.width + len(extra)])
    for name in graphs.handed_on:
        model.graph.output.remove(named(model.graph.output, name))


def widen_embeddings(model: onnx.ModelProto, graphs: DecoderGraphs) -> None:
    """Zeros behind the embeddings of words."""
    add, narrow, more = Nodes(model), rename(model, EMBEDS, "embeddings"), len(columns(graphs))
    size = add("Concat", add("Shape", narrow, start=0, end=2), [more], axis=0)
    add("Concat", narrow, add("Expand", 0.0, size), out=EMBEDS, axis=2)
    model.graph.node.extend(add.made)
    set_shape(model.graph.output, EMBEDS, [BATCH, "tokens", graphs.width + more])


def read_wide(model: onnx.ModelProto, graphs: DecoderGraphs) -> None:
    """Find in wide embeddings, and in the counter, what the decoder takes."""
    add, width, layer = Nodes(model), graphs.width, len(graphs.heads)
    counter, counted = f"{PAST}.{layer}.key", f"{PRESENT}.{layer}.key"
    replace_reads(model, {EMBEDS: "narrow_embeds", MASK: "whole_mask"})
    add("Slice", EMBEDS, [0], [width], [2], out="narrow_embeds")
    read = {
        name: add("Squeeze", add("Slice", EMBEDS, [width + i], [width + i + 1], [2]), [2])
        for i, name in enumerate(columns(graphs))
    }
    batch = add("Shape", EMBEDS, start=0, end=1)

    def found(flags: str) -> tuple[str, str]:
        """Rows and columns of flags that are set, (batch, as many in each row)."""
        where = add("NonZero", add("Greater", flags, 0.5))
        each = add("Div", add("Shape", where, start=1, end=2), batch)
        shape = add("Concat", batch, each, axis=0)
        rows, places = (add("Reshape", add("Gather", where, i, axis=0), shape, allowzero=1) for i in (0, 1))
        return rows, places

    if graphs.stages:
        rows, places = found(read["image"])
        own = add("Unsqueeze", add("Range", 0, add("Squeeze", batch), 1), [1])
        wrong = add("Cast", add("Not", add("Equal", rows, own)), to=TensorProto.INT64)
        add("Add", places, add("Mul", wrong, OUTSIDE), out=WHERE)  # samples with different numbers of images
    if KEPT in read:
        _, chosen = found(add("GatherElements", read[KEPT], WHERE, axis=1))
        add("Mod", chosen, graphs.tokens, out=KEPT)
        if LABELS in read:
            labels = add("GatherElements", add("GatherElements", read[LABELS], WHERE, axis=1), chosen, axis=1)
            add("Cast", labels, out=LABELS, to=TensorProto.INT64)
    back = add("Neg", add("Shape", EMBEDS, start=1, end=2))
    new = add("Slice", MASK, back, [2**62], [1])
    past = add("Cast", add("Squeeze", counter, [1, 3]), to=TensorProto.INT64)
    whole = add("Concat", past, new, out="whole_mask", axis=1)
    place = add("Max", add("Sub", add("CumSum", whole, 1), 1), 0)
    add("Slice", place, back, [2**62], [1], out=POSITIONS)
    one = add("Unsqueeze", add("Cast", new, to=TensorProto.FLOAT), [1, 3])
    add("Concat", counter, one, out=counted, axis=2)
    nodes = [*add.made, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    inputs = [value for value in model.graph.input if value.name not in (POSITIONS, WHERE, KEPT, LABELS)]
    kept = [value for value in inputs if not value.name.startswith(PAST)]
    caches = [value for value in inputs if value.name.startswith(PAST)]
    logits, *presents = model.graph.output
    first = helper.make_tensor_value_info(counter, TensorProto.FLOAT, [BATCH, 1, "seen", 1])
    last = helper.make_tensor_value_info(counted, TensorProto.FLOAT, [BATCH, 1, "seen_with_these", 1])
    for values, wanted in ((model.graph.input, [*kept, first, *caches]), (model.graph.output, [logits, last, *presents])):
        wanted = [type(value).FromString(value.SerializeToString()) for value in wanted]
        del values[:]
        values.extend(wanted)
    set_shape(model.graph.input, EMBEDS, [BATCH, "tokens", width + len(read)])


def named(values: Any, name: str) -> Any:
    return next(value for value in values if value.name == name)


def set_shape(values: Any, name: str, shape: Sequence[int | str]) -> None:
    named(values, name).CopyFrom(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))


def rename(model: onnx.ModelProto, output: str, name: str) -> str:
    """Another name for what was an output."""
    for node in model.graph.node:
        node.output[:] = [name if value == output else value for value in node.output]
    replace_reads(model, {output: name})
    return name


def replace_reads(model: onnx.ModelProto, names: dict[str, str]) -> None:
    for node in model.graph.node:
        node.input[:] = [names.get(value, value) for value in node.input]


def client_files(folder: Path) -> None:
    """config.json, processor_config.json and preprocessor_config.json as the client reads them."""
    config = read_json(folder / "config.json")
    config["text_config"]["num_hidden_layers"] += 1
    config["transformers.js_config"] = {"dtype": "fp32"}  # files without an ending
    write(folder / "config.json", config)
    settings = read_json(folder / "processor_config.json")
    images = settings.pop("image_processor", None) or read_json(folder / "preprocessor_config.json")
    write(folder / "preprocessor_config.json", images | {"processor_class": settings["processor_class"]})
    write(folder / "processor_config.json", settings | {"num_additional_image_tokens": 0})  # which it adds to the patches


def write(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def logits(graphs: DecoderGraphs, step: Step, names: Iterable[str], values: Values) -> Values:
    """Logits (batch, tokens, vocabulary) behind a prompt and every token that is written but the last, by the steps that the
    client takes. names: of the three graphs, see `lay_out`."""
    see, embed, decode = (partial(step, name) for name in names)
    ids, mask, written, found = values[IDS], values[MASK], values[WRITTEN], []
    embeds = embed({IDS: ids})[EMBEDS]
    features = see({PIXELS: values[PIXELS]})[FEATURES]
    embeds[ids == graphs.placeholder] = features.reshape(-1, features.shape[-1])
    sizes = [(1, 1), *((count, width) for count, width in graphs.heads for _ in "kv")]
    layers = [f"{len(graphs.heads)}.key", *(f"{i}.{kind}" for i in range(len(graphs.heads)) for kind in ("key", "value"))]
    past = {f"{PAST}.{name}": np.zeros((len(ids), n, 0, d), np.float32) for name, (n, d) in zip(layers, sizes, strict=True)}
    for place in range(written.shape[1]):
        made = decode({EMBEDS: embeds, MASK: mask} | past)
        found.append(made.pop("logits"))
        past = {name.replace(PRESENT, PAST): value for name, value in made.items()}
        embeds = embed({IDS: written[:, place : place + 1]})[EMBEDS]
        mask = np.ones((len(ids), next(iter(past.values())).shape[2] + 1), np.int64)  # of its first entry
    return {"logits": np.concatenate(found, 1)}
