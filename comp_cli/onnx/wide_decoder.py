"""The three graphs of a decoder that reads images, rewritten for transformers.js as it is.

That client puts image features into the embeddings of a prompt and hands the decoder nothing else of the images; its cache has
the length of its first entry, and in a step it hands over a mask of ones. So in this layout

* embeddings are wider than the model's: columns behind them say which tokens are of images, which of these the vision encoder
  keeps, and of which cluster each is. The decoder takes them off, and finds what it needs;
* the first entry of the cache counts the tokens that were seen: one number for each, 0 for padding. Mask and positions are made
  of it, and stages may stand before the first layer;
* for that entry config.json counts one layer more than there are (see transformers_js.py).
"""

from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

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
from .nodes import Nodes, named, rename, replace_reads, set_shape

COLUMNS = ("image", KEPT, LABELS)  # behind the embeddings
PREFIX = "client"  # of names of nodes
OUTSIDE = 2**40  # no position: to gather there is an error


def columns(graphs: DecoderGraphs) -> tuple[str, ...]:
    """What stands behind the embeddings."""
    return COLUMNS[: 1 + len(graphs.handed_on)]


def widen(folder: Path, graphs: DecoderGraphs) -> None:
    """Rewrite the three graphs of a folder."""
    for name, change in zip(GRAPHS, (widen_features, widen_embeddings, read_wide), strict=True):
        model = onnx.load(folder / name, load_external_data=False)
        change(model, graphs)
        onnx.save(model, folder / name)


def widen_features(model: onnx.ModelProto, graphs: DecoderGraphs) -> None:
    """Put what the vision encoder hands out into columns behind the features."""
    add, narrow = Nodes(model, PREFIX), rename(model, FEATURES, "features")
    extra = [add("Add", add("Mul", add("Slice", narrow, [0], [1], [2]), 0.0), 1.0)]
    nothing = add("Mul", add("Squeeze", extra[0], [2]), 0.0)
    for name in graphs.handed_on:
        value = add("Cast", LABELS, to=TensorProto.FLOAT) if name == LABELS else add("Expand", 1.0, add("Shape", KEPT))
        extra.append(add("Unsqueeze", add("ScatterElements", nothing, KEPT, value, axis=1), [2]))
    add("Concat", narrow, *extra, out=FEATURES, axis=2)
    add.put_last()
    set_shape(model.graph.output, FEATURES, ["images", graphs.tokens, graphs.width + len(extra)])
    for name in graphs.handed_on:
        model.graph.output.remove(named(model.graph.output, name))


def widen_embeddings(model: onnx.ModelProto, graphs: DecoderGraphs) -> None:
    """Zeros behind the embeddings of words."""
    add, narrow, more = Nodes(model, PREFIX), rename(model, EMBEDS, "embeddings"), len(columns(graphs))
    size = add("Concat", add("Shape", narrow, start=0, end=2), [more], axis=0)
    add("Concat", narrow, add("Expand", 0.0, size), out=EMBEDS, axis=2)
    add.put_last()
    set_shape(model.graph.output, EMBEDS, [BATCH, "tokens", graphs.width + more])


def read_wide(model: onnx.ModelProto, graphs: DecoderGraphs) -> None:
    """Find in wide embeddings, and in the counter, what the decoder takes."""
    add, width, layer = Nodes(model, PREFIX), graphs.width, len(graphs.heads)
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
    add.put_first()
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


def logits(graphs: DecoderGraphs, step: Step, names: Iterable[str], values: Values) -> Values:
    """Logits (batch, tokens, vocabulary) behind a prompt and every token that is written but the last, by the steps that the
    client takes. names: of the three graphs, wherever they lie."""
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
