"""The image processor inside a graph: a picture of any size goes in as it is, and is resized, cropped and normalised there.

Resizing is written out as Pillow does it: two products with a matrix, of columns and of rows, each rounded to grey levels.
The Resize operator of ONNX is none of them: with `antialias` it is another grey level in some pixels, and up to four where
one side grows and the other shrinks (ONNX Runtime 1.31). All operators here are standard ones, and whole numbers decide which
pixels count, so that every runtime gets the same.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx
import PIL
from onnx import TensorProto, helper
from packaging.version import Version
from PIL import Image

from ..data.preparation import NotKnownError, Preparation
from ..topology.base import IMAGE, PIXELS
from .nodes import Nodes, named, replace_reads

PREFIX = "picture"
FILTERS = {Image.Resampling.BILINEAR: 1, Image.Resampling.BICUBIC: 2, Image.Resampling.LANCZOS: 3}  # -> support, pixels
A = -0.5  # of Pillow's cubic
STEPS = float(2**22)  # of a weight in Pillow
TALL_FIRST = Version(PIL.__version__) >= Version("13")  # since then rows come first where the height shrinks by more than twice


def check(preparation: Preparation) -> None:
    """Raises NotKnownError for what graphs cannot do."""
    if (preparation.size or preparation.edge) and preparation.filter not in FILTERS:
        raise NotKnownError(f"resizes with the filter {preparation.filter.name.lower()}")


def prepend(path: Path, preparation: Preparation) -> None:
    """Let a graph take `image`, (images, height, width, 3) uint8, in the place of `pixel_values`. Graphs that take none of
    these stay as they are."""
    model = onnx.load(path, load_external_data=False)
    if PIXELS not in {value.name for value in model.graph.input}:
        return
    pixels = named(model.graph.input, PIXELS)
    images = pixels.type.tensor_type.shape.dim[0]
    add = Nodes(model, PREFIX)
    replace_reads(model, {PIXELS: prepare(add, preparation)})
    add.put_first()
    pixels.CopyFrom(
        helper.make_tensor_value_info(IMAGE, TensorProto.UINT8, [images.dim_param or images.dim_value, "height", "width", 3])
    )
    onnx.save(model, path)


def prepend_all(folder: Path, names: Iterable[str], preparation: Preparation) -> None:
    """The same for the graphs of a folder."""
    for name in names:
        prepend(folder / name, preparation)


def prepare(add: Nodes, preparation: Preparation) -> str:
    """Name of the pixels, (images, 3, *shape), that are made of `image`."""
    values = add("Transpose", add("Cast", IMAGE, to=TensorProto.FLOAT), perm=[0, 3, 1, 2])
    sides = tuple(add("Squeeze", add("Shape", IMAGE, start=axis, end=axis + 1)) for axis in (1, 2))
    goals: tuple[str | int, ...] = preparation.size or sides
    if edge := preparation.edge:
        least = add("Min", *sides)
        goals = tuple(add("Div", add("Mul", side, edge), least) for side in sides)
    rows, columns = (
        weights(add, side, goal, length, preparation.filter)
        for side, goal, length in zip(sides, goals, preparation.shape, strict=True)
    )
    columns = add("Transpose", columns, perm=[1, 0])

    def wide_first(put: Nodes) -> str:
        return grey(put, put("MatMul", rows, grey(put, put("MatMul", values, columns))))

    def tall_first(put: Nodes) -> str:
        return grey(put, put("MatMul", grey(put, put("MatMul", rows, values)), columns))

    if TALL_FIRST and (preparation.size or preparation.edge):
        less = [add("Sub", side, goal) for side, goal in zip(sides, goals, strict=True)]
        tall = add("And", add("Greater", less[0], 0), add("Greater", less[0], add("Mul", less[1], 2)))
        grown = add.either(tall, tall_first, wide_first)
    else:
        grown = wide_first(add)
    return normalised(add, grown, preparation)


def normalised(add: Nodes, values: str, preparation: Preparation) -> str:
    """Of grey levels (images, 3, height, width)."""
    if preparation.factor is not None:
        values = add("Mul", values, float(preparation.factor))
    if preparation.mean is not None and preparation.std is not None:
        mean, std = ([[[float(value)]] for value in each] for each in (preparation.mean, preparation.std))
        values = add("Div", add("Sub", values, mean), std)
    return values


def grey(add: Nodes, values: str) -> str:
    """The nearest grey levels, halves upwards."""
    return add("Clip", add("Floor", add("Add", values, 0.5)), 0.0, 255.0)


def weights(add: Nodes, side: str, goal: str | int, length: int, filtering: Image.Resampling) -> str:
    """(length, side): what each pixel of a line of `side` counts in each of the `length` pixels in the middle of the line of
    `goal` that it is resized to; nothing counts in what lies outside of that line."""
    first = add("Sub", add("Div", add("Add", goal, length), 2), length)  # down, also where the line is too short
    own = add("Unsqueeze", add("Add", first, add("Range", 0, length, 1)), [1])  # (length, 1)
    read = add("Unsqueeze", add("Range", 0, side, 1), [0])  # (1, side)
    there, here = (add("Add", add("Mul", index, 2), 1) for index in (own, read))
    apart = add("Abs", add("Sub", add("Mul", here, goal), add("Mul", there, side)))  # exact: in parts of 2 * goal
    unit = add("Mul", add("Max", side, goal), 2)
    found = shape_of(add, add("Div", *(add("Cast", value, to=TensorProto.FLOAT) for value in (apart, unit))), filtering)
    inside = add("And", add("GreaterOrEqual", own, 0), add("Less", own, goal))
    sums = add("ReduceSum", found, [1], keepdims=1)
    shares = add("Div", found, add("Where", inside, sums, 1.0))
    rounded = add("Div", add("Round", add("Mul", shares, STEPS)), STEPS)
    return add("Where", inside, rounded, 0.0)


def shape_of(add: Nodes, distance: str, filtering: Image.Resampling) -> str:
    """What a filter of Pillow says of distances from 0 on."""
    support = float(FILTERS[filtering])
    if filtering == Image.Resampling.BILINEAR:
        return add("Max", add("Sub", 1.0, distance), 0.0)
    if filtering == Image.Resampling.BICUBIC:
        near, far = polynomial(add, distance, A + 2, -(A + 3), 0.0, 1.0), polynomial(add, distance, A, -5 * A, 8 * A, -4 * A)
        value = add("Where", add("Less", distance, 1.0), near, far)
    else:
        value = add("Mul", sinc(add, distance), sinc(add, add("Div", distance, support)))
    return add("Where", add("Less", distance, support), value, 0.0)


def polynomial(add: Nodes, at: str, *factors: float) -> str:
    """With the factor of the highest power first."""
    value: str | float = float(factors[0])
    for factor in factors[1:]:
        value = add("Add", add("Mul", value, at), float(factor))
    return str(value)


def sinc(add: Nodes, at: str) -> str:
    angle = add("Mul", at, float(np.pi))
    zero = add("Equal", at, 0.0)
    return add("Where", zero, 1.0, add("Div", add("Sin", angle), add("Where", zero, 1.0, angle)))
