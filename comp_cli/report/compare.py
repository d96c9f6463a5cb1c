"""The report of `comp compare`."""

from dataclasses import dataclass

from .base import Report
from .bench import Factor, GateOutcome, Machine


@dataclass(frozen=True)
class Numbers:
    """A number of the compact model before and after.

    Attributes:
        before: in the first document.
        after: in the second document.
    """

    before: int
    after: int


@dataclass(frozen=True)
class Change:
    """One time before and after.

    Attributes:
        figure: "latency" of a batch; of a decoder that writes also "first_token" and "token".
        backend: "torch", "onnx" or "compile".
        side: "dense" (stock), "own_dense" (dense, comp runtime) or "compact".
        batch: batch size.
        before: median in the first document, ms for a whole batch.
        after: median in the second document, ms.
        ratio: after over before, so that more than 1 is slower; from the ends of both 95 % intervals, which hold what varied
            inside of each run.
        verdict: "slower" or "faster" where the intervals lie apart, else "alike".
    """

    figure: str
    backend: str
    side: str
    batch: int
    before: float
    after: float
    ratio: Factor
    verdict: str


@dataclass(frozen=True)
class SpeedupChange:
    """The speed-up of the compact model against the stock one of the same run, in which a slow moment of the machine cancels.

    Attributes:
        backend: "torch", "onnx" or "compile".
        batch: batch size.
        before: in the first document.
        after: in the second document.
        ratio: after over before, so that less than 1 is worse; from the ends of both intervals.
    """

    backend: str
    batch: int
    before: Factor
    after: Factor
    ratio: Factor


@dataclass(frozen=True)
class PeakChange:
    """Peak memory of the compact model at the largest batch.

    Attributes:
        backend: "torch" or "onnx".
        bytes: resident memory; on CUDA allocated memory.
    """

    backend: str
    bytes: Numbers


@dataclass(frozen=True, kw_only=True)
class CompareReport(Report):
    """Two benchmarks of one kind, side by side.

    Attributes:
        comp_version: version of comp.
        before: the first document.
        after: the second document.
        baseline: the dense model of both.
        architecture: transformers class of both.
        machine: where both were measured, with the versions of the second.
        versions: libraries whose version changed: before and after.
        changes: times.
        speedups: speed-up of the compact model.
        params: parameters of the compact model.
        flops: its FLOPs for one sample.
        size_bytes: size of its folder, bytes.
        peak_memory_bytes: its peak memory.
        drift: stock rows that are not alike, though the model is the same: a busier machine, or another library.
        gates: outcome of `max_regression`, where that was asked for; `found` is in percent.
    """

    comp_version: str
    before: str
    after: str
    baseline: str
    architecture: str
    machine: Machine
    versions: dict[str, tuple[str, ...]]
    changes: tuple[Change, ...]
    speedups: tuple[SpeedupChange, ...]
    params: Numbers
    flops: Numbers
    size_bytes: Numbers
    peak_memory_bytes: tuple[PeakChange, ...]
    drift: tuple[Change, ...]
    gates: tuple[GateOutcome, ...]
