"""Nodes that are added to written graphs, and names that change there."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


class Nodes:
    """Nodes that are added to a graph, with their constants. prefix: of their names."""

    def __init__(self, model: onnx.ModelProto, prefix: str):
        self.model, self.prefix, self.made = model, prefix, list[onnx.NodeProto]()

    def __call__(self, operator: str, *inputs: Any, out: str | None = None, **attributes: Any) -> str:
        """Name of what an operator makes of inputs: names, or numbers and lists of them."""
        names = [given if isinstance(given, str) else self.constant(given) for given in inputs]
        name = out or f"{self.prefix}_{operator.lower()}_{len(self.made)}"
        self.made.append(helper.make_node(operator, names, [name], name=f"node_{name}", **attributes))
        return name

    def constant(self, value: Any) -> str:
        """Name of a number, or a list: float32 where it is float, otherwise int64."""
        array = np.asarray(value)
        array = array.astype(np.float32 if array.dtype.kind == "f" else np.int64)
        name = f"{self.prefix}_{'_'.join(map(str, array.ravel().tolist()))}_{array.dtype}_{array.ndim}".replace("-", "minus_")
        if name not in {known.name for known in self.model.graph.initializer}:
            self.model.graph.initializer.append(numpy_helper.from_array(array, name))
        return name

    def either(self, condition: str, yes: Callable[["Nodes"], str], no: Callable[["Nodes"], str]) -> str:
        """Name of the floats that one of two branches makes: each puts its nodes, and says the name of its value."""
        branches = {}
        for kind, make in ("then", yes), ("else", no):
            inside = Nodes(self.model, f"{self.prefix}_{kind}_{len(self.made)}")
            value = helper.make_tensor_value_info(make(inside), TensorProto.FLOAT, None)
            branches[f"{kind}_branch"] = helper.make_graph(inside.made, inside.prefix, [], [value])
        return self("If", condition, **branches)

    def put_first(self) -> None:
        """Put the nodes before those of the graph."""
        nodes = [*self.made, *self.model.graph.node]
        del self.model.graph.node[:]
        self.model.graph.node.extend(nodes)

    def put_last(self) -> None:
        self.model.graph.node.extend(self.made)


def named(values: Any, name: str) -> Any:
    return next(value for value in values if value.name == name)


def set_shape(values: Any, name: str, shape: Sequence[int | str], kind: int = TensorProto.FLOAT) -> None:
    named(values, name).CopyFrom(helper.make_tensor_value_info(name, kind, shape))


def rename(model: onnx.ModelProto, output: str, name: str) -> str:
    """Another name for what was an output."""
    for node in model.graph.node:
        node.output[:] = [name if value == output else value for value in node.output]
    replace_reads(model, {output: name})
    return name


def replace_reads(model: onnx.ModelProto, names: dict[str, str]) -> None:
    for node in model.graph.node:
        node.input[:] = [names.get(value, value) for value in node.input]
