"""Before graphs run: whether the ONNX Runtime here is new enough for them, and whether they are those of their folder."""

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import onnx
from packaging.version import Version

from ..errors import DeviceError, RefusedError
from ..families import Family
from ..files.store import read_json, sha256
from ..topology.graph_specs import Signature

# The first ONNX Runtime that loads an opset, and computes what it should; IR version 10, which is what torch writes, needs
# 1.18 by itself. Measured on 1.17 to 1.32; what is older refuses such graphs when it loads or runs them.
LEAST = {18: "1.18", 19: "1.18", 20: "1.18", 21: "1.18", 22: "1.21", 23: "1.23"}
SHARED_BIAS = "1.20"  # an attention bias that all samples and heads share; older ones want one for each head, and say so
BIAS = 5  # which input of MultiHeadAttention it is


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
            said = " and ".join(
                filter(None, (f"not {', '.join(less)}" if less else "", f"also {', '.join(more)}" if more else ""))
            )
            raise RefusedError(f"{path} {what} {said}: that is no graph of this model.", hint=hint)
        for name, shape in wanted.items():
            here = tuple(found[name])
            known = [(a, b) for a, b in zip(here, shape, strict=False) if isinstance(a, int) and b is not None]
            if len(here) != len(shape) or any(a != b for a, b in known):
                sizes = [", ".join("*" if not isinstance(size, int) else str(size) for size in one) for one in (shape, here)]
                said = f"{name} as ({sizes[1]}); config.json says ({sizes[0]})"
                raise RefusedError(f"{path} {what} {said}.", hint=hint)


def writer_signatures(config: dict[str, Any], family: Family) -> dict[str, Signature]:
    """Of the graphs of a generative model, by their names. Raises RefusedError where the
    config is not one of such a model."""
    try:
        return family.topology.signatures(family, config)
    except (KeyError, TypeError, AttributeError, ZeroDivisionError, StopIteration) as error:
        said = f"config.json describes no generative model ({type(error).__name__}: {error})."
        raise RefusedError(said, hint="Copy the folder again, or export the model again.") from error
