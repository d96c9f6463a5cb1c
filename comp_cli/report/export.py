"""The report of `comp export`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .base import PairCounts, Report, Texts, Threads, if_known


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of a graph.

    Attributes:
        type: element type, as ONNX names it.
        shape: sizes, and names of those that are free; null for one without a name.
    """

    type: str
    shape: list[int | str | None]


@dataclass(frozen=True)
class Signature:
    """What goes into a graph and comes out.

    Attributes:
        inputs: by name.
        outputs: by name.
    """

    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]


@dataclass(frozen=True)
class Quantization:
    """int8 dynamic quantization, or int4 weights.

    Attributes:
        weights: type of the weights.
        per_channel: whether every output channel has its own scale.
        left_out: layers that stay in float.
        block_size: weights of a channel that have a scale in common, where they are not all of it.
    """

    weights: str
    per_channel: bool
    left_out: list[str]
    block_size: int | None = if_known()


@dataclass(frozen=True)
class Allowed:
    """What parity asks for.

    Attributes:
        atol: max. abs. error; for embeddings and logits of words in units of the largest number.
        agreement: least share of the real pairs with the same prediction.
        jumps: share of the samples that may differ by more, where rounding may change which tokens stay.
    """

    atol: float
    agreement: float
    jumps: float


@dataclass(frozen=True)
class ParityRow:
    """PyTorch against ONNX Runtime: one output on one case.

    Attributes:
        output: name of the output.
        inputs: "real" or "random".
        images: number of images.
        batch: batch size.
        text_tokens: text length.
        max_error: max. abs. error.
        mean_error: mean abs. error.
        judged: the error that the tolerance is for; null for outputs that are not judged.
        samples: the same of each sample; empty for outputs that are not judged.
        same_decision: prediction agreement, in one row of each case; null in the others.
    """

    output: str
    inputs: str
    images: int
    batch: int
    text_tokens: int
    max_error: float
    mean_error: float
    judged: float | None
    samples: tuple[float, ...]
    same_decision: float | None


def jumped(rows: Sequence[ParityRow], atol: float) -> tuple[int, int]:
    """How many of the samples that are judged differ by more than that, and of how many."""
    errors = [error for row in rows for error in row.samples]
    return sum(not error <= atol for error in errors), len(errors)


@dataclass(frozen=True, kw_only=True)
class ExportReport(Report):
    """The graphs that were written, and how well they agree with PyTorch.

    Attributes:
        comp_version: version of comp.
        versions: versions of the libraries.
        min_onnxruntime: the oldest ONNX Runtime that runs the graphs.
        source: what the compact checkpoint says about its origin.
        architecture: transformers class.
        opset: ONNX opset.
        target: "onnxruntime" or "onnx".
        layout: "optimum" or "transformers.js".
        with_preprocessing: whether graphs take pictures as they are.
        dtype: of the weights.
        quantization: null for none.
        fused: nodes that ONNX Runtime's fusions made, by kind.
        graphs: inputs and outputs of every file.
        keep: tokens that each layer hands on (null: all), by tower.
        logit_scale: what a dual encoder multiplies a cosine with.
        logit_bias: what it adds.
        checked_on: device of the parity check.
        data: the pairs of the parity check.
        pairs: what became of the rows of the user's data, by purpose.
        texts: texts that were truncated.
        passed: whether the graphs agree with PyTorch.
        allowed: what parity asks for.
        agreement: share of the real pairs with the same prediction.
        parity: errors, case by case.
        size_bytes: size of the folder, bytes.
        files: SHA-256 of every file.
        threads: CPU threads that it worked with.
        seconds: duration of the whole run, s.
        output: the folder that was written; null where none was.
        pushed: address of the commit on the Hub; left out where nothing was uploaded.
    """

    comp_version: str
    versions: dict[str, str]
    min_onnxruntime: str
    source: dict[str, Any]
    architecture: str
    opset: int
    target: str
    layout: str
    with_preprocessing: bool
    dtype: str
    quantization: Quantization | None
    fused: dict[str, int]
    graphs: dict[str, Signature]
    keep: dict[str, list[int | None]]
    logit_scale: float | None = if_known()
    logit_bias: float | None = if_known()
    checked_on: str
    data: str
    pairs: dict[str, PairCounts]
    texts: Texts
    passed: bool
    allowed: Allowed
    agreement: float
    parity: tuple[ParityRow, ...]
    size_bytes: int
    files: dict[str, str] | None = if_known()
    threads: Threads | None = if_known()
    seconds: float | None = if_known()
    output: Path | None = None
    pushed: str | None = if_known()
