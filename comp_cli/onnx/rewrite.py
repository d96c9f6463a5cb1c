"""Rewriting a written graph: ONNX Runtime's fusions, and int8 weights. Nothing here checks what the new graph says."""

import io
import logging
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from .sessions import open_session
from .write import EXTERNAL_DATA_FROM

QUANTIZED = {"MatMul": 1, "Gather": 0}  # operator -> which of its inputs is the matrix that becomes int8
BLOCK = 32  # weights of a column that have a scale in common, as int4


def optimize(source: Path, target: Path) -> dict[str, int]:
    """Write `source` with ONNX Runtime's fused nodes; returns how many of each kind came in.

    Attention is left alone: it is one node already, and the fusion expects the same number of heads everywhere.
    """
    from onnxruntime.transformers.fusion_options import FusionOptions
    from onnxruntime.transformers.optimizer import optimize_model

    options = FusionOptions("bert")
    options.enable_attention = options.enable_embed_layer_norm = False
    options.enable_shape_inference = False  # it stops at fused attention; without it, residual sums are fused unseen
    before = _fused(onnx.load(source, load_external_data=False))
    with _silent():
        optimized = optimize_model(str(source), "bert", opt_level=0, optimization_options=options)
        optimized.save_model_to_file(str(target), use_external_data_format=_is_large(source))
    return dict(_fused(optimized.model) - before)


def quantize(source: Path, target: Path, left_out: Collection[str] = ()) -> None:
    """Write `source` with int8 matrices, one scale a channel (tables of embeddings: one in all), but for the nodes left out.

    Activations are quantized as they come (onnxruntime.quantization.quantize_dynamic); attention itself stays float.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(source)
    del model.graph.value_info[:]  # the exporter leaves stale shapes there, which quantize_dynamic stops at
    plain = _save(model, source, "plain")
    _data(target).unlink(missing_ok=True)  # of an earlier attempt; onnx would write behind it
    with _silent():
        quantize_dynamic(
            plain,
            target,
            op_types_to_quantize=list(QUANTIZED),
            per_channel=True,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=list(left_out),
            use_external_data_format=_is_large(source),
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},  # onnx cannot infer behind fused attention
        )


def quantize_weights(source: Path, target: Path, left_out: Collection[str] = ()) -> None:
    """Write `source` with int4 matrices, a scale for each block of BLOCK weights of a column, but for the nodes left out. What
    goes into them stays float (MatMulNBits of ONNX Runtime)."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    model = onnx.load(source)
    _data(target).unlink(missing_ok=True)
    with _silent():
        quantizer = MatMulNBitsQuantizer(
            model,
            bits=4,
            block_size=BLOCK,
            is_symmetric=True,
            nodes_to_exclude=list(left_out),
            op_types_to_quantize=("MatMul",),
        )
        quantizer.process()
        quantizer.model.save_model_to_file(str(target), use_external_data_format=_is_large(source))


QUANTIZERS = {"int8": quantize, "int4": quantize_weights}


def noise(path: Path, inputs: Mapping[str, np.ndarray], kind: str) -> dict[str, float]:
    """How much it changes what each matrix makes of these inputs when it is rounded: name of the node -> relative error of its
    output. kind: "int8", where what goes in is rounded as well, or "int4"."""
    model = onnx.load(path)
    weights = {weight.name: weight for weight in model.graph.initializer}
    kinds = QUANTIZED if kind == "int8" else ("MatMul",)
    nodes = [node for node in model.graph.node if node.op_type in kinds and _matrix(node) in weights]
    wanted = {node.input[0] for node in nodes if node.op_type == "MatMul"}
    known = {value.name for value in (*model.graph.input, *model.graph.output)}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted - known)
    session = open_session(_save(model, path, "probe"))
    outputs = session.run(None, {value.name: inputs[value.name] for value in session.get_inputs()})
    seen = dict(inputs) | {value.name: output for value, output in zip(session.get_outputs(), outputs, strict=True)}
    errors = {}
    for node in nodes:
        matrix = numpy_helper.to_array(weights[_matrix(node)])
        if node.op_type == "MatMul":
            states = seen[node.input[0]]
            exact = states @ matrix
            found = _rounded(states) @ _rounded(matrix, axis=0) if kind == "int8" else states @ _in_blocks(matrix)
        else:
            exact, found = matrix, _rounded(matrix)
        errors[node.name] = float(np.linalg.norm(found - exact) / max(float(np.linalg.norm(exact)), 1e-30))
    return errors


def _rounded(values: np.ndarray, axis: int | None = None) -> np.ndarray:
    """Values in 255 steps: one range in all, or one for each channel, where `axis` is summed over."""
    span = np.maximum(values.max(axis, keepdims=True), 0) - np.minimum(values.min(axis, keepdims=True), 0)
    if axis is not None:  # weights: symmetric
        span = 2 * np.abs(values).max(axis, keepdims=True)
    step = np.maximum(span / 255, 1e-12)
    return (np.round(values / step) * step).astype(values.dtype)


def _in_blocks(matrix: np.ndarray) -> np.ndarray:
    """A matrix (rows, columns) in 16 steps, one range for each block of a column."""
    rows = len(matrix)
    blocks = np.pad(matrix, ((0, -rows % BLOCK), (0, 0))).reshape(-1, BLOCK, matrix.shape[1])
    step = np.maximum(np.abs(blocks).max(1, keepdims=True) / 8, 1e-12)
    return ((np.round(blocks / step).clip(-8, 8) * step).reshape(-1, matrix.shape[1])[:rows]).astype(matrix.dtype)


def _matrix(node: onnx.NodeProto) -> str:
    return node.input[QUANTIZED[node.op_type]]


def _fused(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node if node.domain == "com.microsoft")


def _save(model: onnx.ModelProto, path: Path, role: str) -> Path:
    """Beside the file that it was made of, and as large."""
    beside = path.with_suffix(f".{role}.onnx")
    _data(beside).unlink(missing_ok=True)
    onnx.save(model, beside, save_as_external_data=_is_large(path), location=_data(beside).name)
    return beside


def _is_large(path: Path) -> bool:
    return sum(part.stat().st_size for part in (path, _data(path)) if part.exists()) > EXTERNAL_DATA_FROM


def _data(path: Path) -> Path:
    """Where the weights of a large graph lie."""
    return path.with_name(f"{path.name}.data")


@contextmanager
def _silent() -> Iterator[None]:
    """Both tools print and log about what is none of the user's business."""
    logging.disable(logging.CRITICAL)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)
