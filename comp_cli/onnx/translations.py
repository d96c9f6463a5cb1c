"""Operators of torch that its exporter has no ONNX for, and that the rules of token pruning are made of."""

from typing import Any

import onnx_ir
import torch
from onnxscript import opset18

op: Any = opset18


def stable_sort(values: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> tuple[Any, Any]:
    """sort(stable=True) along the last dimension as TopK, of which ONNX says that the lower index comes first among equal
    values. Whole numbers are made different first: so that nothing depends on whether a kernel knows."""
    if dim not in (-1, len(values.shape) - 1):
        raise NotImplementedError("a stable sort along another dimension than the last")
    size = op.Shape(values, start=len(values.shape) - 1)
    if values.dtype in (onnx_ir.DataType.FLOAT, onnx_ir.DataType.FLOAT16, onnx_ir.DataType.DOUBLE):
        return top(values, size, descending)
    place = op.Range(op.Constant(value_int=0), op.Squeeze(size), op.Constant(value_int=1))
    if descending:
        place = op.Neg(place)
    keys = op.Add(op.Mul(op.Cast(values, to=onnx_ir.DataType.INT64), size), place)
    _, index = top(keys, size, descending)
    return op.GatherElements(values, index, axis=-1), index


def topk(values: Any, k: Any, dim: int = -1, largest: bool = True, sorted: bool = True) -> tuple[Any, Any]:
    """topk along the last dimension."""
    if dim not in (-1, len(values.shape) - 1):
        raise NotImplementedError("topk along another dimension than the last")
    count = op.Constant(value_ints=[k]) if isinstance(k, int) else op.Reshape(k, op.Constant(value_ints=[1]))
    return top(values, count, largest)


def top(values: Any, count: Any, largest: bool) -> tuple[Any, Any]:
    """TopK of values that may have no rows, of which ONNX Runtime dies before 1.31: with a row of zeros more."""
    rows = op.Shape(values, start=0, end=1)
    row = op.Concat(op.Constant(value_ints=[1]), op.Shape(values, start=1), axis=0)
    zeros = op.Expand(op.CastLike(op.Constant(value_int=0), values), row)
    found = op.TopK(op.Concat(values, zeros, axis=0), count, axis=-1, largest=int(largest), sorted=1)
    first, axis = op.Constant(value_ints=[0]), op.Constant(value_ints=[0])
    best, index = (op.Slice(part, first, rows, axis) for part in found)
    return best, index


def where(condition: Any, yes: Any, no: Any) -> Any:
    """Where, also of booleans, of which ONNX Runtime knows none."""
    if yes.dtype == onnx_ir.DataType.BOOL:
        return op.Or(op.And(condition, yes), op.And(op.Not(condition), no))
    return op.Where(condition, yes, no)


def distances(left: Any, right: Any, p: float, compute_mode: int | None = None) -> Any:
    """cdist of (rows, m, dim) and (rows, n, dim), Euclidean."""
    if p != 2:
        raise NotImplementedError(f"cdist with p = {p}")
    apart = op.Sub(op.Unsqueeze(left, [2]), op.Unsqueeze(right, [1]))
    return op.Sqrt(op.ReduceSum(op.Mul(apart, apart), [3], keepdims=0))


TRANSLATIONS: dict[Any, Any] = {
    torch.ops.aten.sort.stable: stable_sort,
    torch.ops.aten.topk.default: topk,
    torch.ops.aten.where.self: where,
    torch.ops.aten._cdist_forward.default: distances,
}


def count_axes_from_the_front(model: Any) -> None:
    """Write the axes of reductions of an onnx_ir model as 0, 1, 2, ...: of tensors without elements, which the rules see in a
    step, ONNX Runtime reduces another axis than the one that is meant by a negative number (seen in 1.31)."""
    for node in model.graph:
        rank = len(node.inputs[0].shape) if node.inputs and node.inputs[0] is not None and node.inputs[0].shape else None
        if rank is None:
            continue
        if node.op_type in ("ArgMax", "ArgMin") and node.attributes.get_int("axis", 0) < 0:
            node.attributes["axis"] = onnx_ir.AttrInt64("axis", node.attributes.get_int("axis") + rank)
        if node.op_type.startswith("Reduce") and len(node.inputs) > 1 and node.inputs[1] is not None:
            axes = node.inputs[1].const_value
            if axes is not None and (axes.numpy() < 0).any():
                name = f"{node.inputs[1].name}_of_{rank}"
                if name not in model.graph.initializers:
                    found = onnx_ir.tensor(axes.numpy() % rank, name=name)
                    model.graph.initializers[name] = onnx_ir.Value(
                        name=name, shape=onnx_ir.Shape([found.size]), type=onnx_ir.TensorType(found.dtype), const_value=found
                    )
                node.replace_input_with(1, model.graph.initializers[name])
