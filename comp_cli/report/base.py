"""Reports: what a command found, as dataclasses. `to_json` is the document that `--json` prints; docs/schema describes it.

The "Attributes" of the docstrings are the descriptions in the JSON schema (see schema.py).
"""

from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar

FLOPS = "2 x multiply-accumulates, one sample"


def if_known() -> Any:
    """A field that the document leaves out where it is None."""
    return field(default=None, metadata={"if_known": True})


def unwritten(default: Any = None) -> Any:
    """A field that is no part of the document."""
    return field(default=default, metadata={"unwritten": True})


@dataclass(frozen=True, kw_only=True)
class Report:
    """What every report has.

    Attributes:
        warnings: what the user should know about the work.
    """

    SCHEMA_VERSION: ClassVar[int] = 1

    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The document: plain dicts, lists, texts and numbers."""
        found = plain(self)
        return {"schema_version": self.SCHEMA_VERSION} | found | {"warnings": found.pop("warnings")}


def plain(value: Any) -> Any:
    """A value as JSON has it."""
    if is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in written(value) if not is_left_out(f, value)}
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def written(cls: Any) -> list[Any]:
    """The fields of a dataclass that are part of its document."""
    return [f for f in fields(cls) if not f.metadata.get("unwritten")]


def is_left_out(f: Any, owner: Any) -> bool:
    return bool(f.metadata.get("if_known")) and getattr(owner, f.name) is None


@dataclass(frozen=True)
class Reference:
    """The input that FLOPs are counted for.

    Attributes:
        tokens: tokens that enter each tower.
        flops: the unit of FLOPs.
    """

    tokens: dict[str, int]
    flops: str = FLOPS


@dataclass(frozen=True)
class Threads:
    """CPU threads that a command worked with.

    Attributes:
        number: threads of PyTorch, and of ONNX Runtime.
        because: what decided it: "--threads", "OMP_NUM_THREADS" or "MKL_NUM_THREADS"; "model size", for which more do not pay;
            "cores" of the machine; "affinity" or "quota" of the process; "processes" that share the cores; "torch", which had
            fewer.
    """

    number: int
    because: str

    def __str__(self) -> str:
        return f"{self.number} thread{'s' * (self.number > 1)} ({self.because})"


@dataclass(frozen=True)
class Sizes:
    """A number of the dense and of the compact model.

    Attributes:
        dense: of the dense model.
        compact: of the compact model.
    """

    dense: int
    compact: int


@dataclass(frozen=True)
class Streamed:
    """A model that was larger than memory, and was worked on layer by layer from its files.

    Attributes:
        needed_bytes: bytes of the dense and the compact weights in fp32, which a run in memory takes; on a GPU with the Gram
            matrices of its search.
        limit_bytes: bytes that the process might take when it began; left out in comp_report.json, as are the next two.
        peak_bytes: bytes that were resident at most, with Python and its libraries; on a GPU those of tensors.
        device: the GPU whose memory it was larger than, such as "cuda:0"; left out where it was the machine's own.
    """

    needed_bytes: int
    limit_bytes: int | None = if_known()
    peak_bytes: int | None = if_known()
    device: str | None = if_known()


@dataclass(frozen=True)
class Values:
    """A measurement of the dense and of the compact model.

    Attributes:
        dense: of the dense model.
        compact: of the compact model.
    """

    dense: float
    compact: float


@dataclass(frozen=True)
class Texts:
    """Texts that were read.

    Attributes:
        cut: number of truncated texts.
        of: number of texts.
        at: tokens at which they are truncated.
        tokens: mean number of tokens of a text, for each tower that reads texts: as they are read, without padding.
    """

    cut: int
    of: int
    at: int
    tokens: dict[str, float] | None = if_known()


@dataclass(frozen=True)
class PairCounts:
    """What became of the rows of the user's data.

    Attributes:
        asked: pairs that were asked for; null for all.
        pairs: pairs that were used.
        rows: rows that were read.
        bad_rows: rows that could not be used, by problem.
        left_out: rows and pairs that were left out, by reason.
    """

    asked: int | None
    pairs: int
    rows: int
    bad_rows: dict[str, int]
    left_out: dict[str, int]
