"""A folder as transformers.js reads it: graphs in `onnx`, named after their precision, and configs with the names it knows.

What that client calls a precision, and how the files of it end, is in its src/utils/dtypes.js (4.3.1): without another word it
takes the precision that config.json names.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
from onnx.external_data_helper import uses_external_data

from ..errors import RefusedError, UsageError
from ..families import Family
from ..files.store import read_json

FOLDER = "onnx"
MODEL_TYPES = ("clip", "clip_text_model", "clip_vision_model", "llava", "siglip")  # of comp's, which it has classes for
DTYPES = {"fp32": "fp32", "fp16": "fp16", "int8": "q8", "int4": "q4"}  # of comp -> as the client calls it
ENDINGS = {"fp32": "", "fp16": "_fp16", "q8": "_quantized", "q4": "_q4"}


def check_family(family: Family, dtype: str) -> None:
    """Raises UsageError for a model that the client has no class for, or a precision that it has no name for."""
    if family.model_type not in MODEL_TYPES:
        said = f"--layout transformers.js: transformers.js has no {family.model_type.upper()}."
        raise UsageError(said, hint="Leave --layout out: onnxruntime-node and onnxruntime-web run the graphs themselves.")
    if dtype not in DTYPES:
        raise UsageError(f"--layout transformers.js: transformers.js reads no {dtype}.", hint="Use --dtype fp32 or fp16.")


def check_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Raises RefusedError for one that is not saved as tokenizer.json, which is all that the client reads."""
    if tokenizer is not None and not getattr(tokenizer, "is_fast", False):
        raise RefusedError(
            f"{folder}: transformers.js reads tokenizer.json, and transformers writes none for {type(tokenizer).__name__}.",
            hint="Leave --layout out: the README.md of an export says how texts become tokens.",
        )


def lay_out(folder: Path, names: Mapping[str, str], kinds: Mapping[str, str], *, more_layers: int = 0) -> dict[str, str]:
    """Move the graphs of a folder into `onnx`, and write config.json and the files of processors as the client reads them.

    names: of each graph, and what the client calls it. kinds: of each graph its precision, one of DTYPES. more_layers: that the
    decoder counts in its cache. Returns where each graph lies now.
    """
    (folder / FOLDER).mkdir()
    places = {}
    large = {}
    for name, called in names.items():
        place = f"{FOLDER}/{Path(called).stem}{ENDINGS[DTYPES[kinds[name]]]}.onnx"
        if move(folder / name, folder / place):
            large[Path(place).name] = 1
        places[name] = place
    dtypes = {Path(called).stem: DTYPES[kinds[name]] for name, called in names.items()}
    client: dict[str, Any] = {"dtype": dtypes if len(set(dtypes.values())) > 1 else next(iter(dtypes.values()))}
    client |= {"use_external_data_format": large} if large else {}
    config = read_json(folder / "config.json")
    flatten_processor(folder)
    if more_layers:
        config["text_config"]["num_hidden_layers"] += more_layers
        path = folder / "processor_config.json"
        write(path, read_json(path) | {"num_additional_image_tokens": 0})  # which the client adds to the patches
    write(folder / "config.json", config | {"transformers.js_config": client})
    return places


def move(source: Path, target: Path) -> bool:
    """Move a graph, with its weights where they lie beside it: whether they do."""
    weights = source.with_name(f"{source.name}.data")
    if not weights.exists():
        source.replace(target)
        return False
    model = onnx.load(source, load_external_data=False)
    weights.replace(target.with_name(f"{target.name}_data"))
    for tensor in model.graph.initializer:
        if uses_external_data(tensor):
            next(entry for entry in tensor.external_data if entry.key == "location").value = f"{target.name}_data"
    onnx.save(model, target)
    source.unlink()
    return True


def flatten_processor(folder: Path) -> None:
    """Write preprocessor_config.json, which holds the settings of the image processor alone, and no setting without a value:
    where the client finds a null, it takes it for 0."""
    path, whole = folder / "preprocessor_config.json", folder / "processor_config.json"
    settings = read_json(whole) if whole.is_file() else {}
    images = settings.get("image_processor") or (read_json(path) if path.is_file() else {})
    if not images:
        return
    named = {"processor_class": settings["processor_class"]} if "processor_class" in settings else {}
    write(path, known(images) | named)


def known(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that have a value."""
    return {
        name: known(value) if isinstance(value, Mapping) else value for name, value in settings.items() if value is not None
    }


def write(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
