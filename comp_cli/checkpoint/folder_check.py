"""What a checkpoint folder must be before a library reads it: plain files of its own, numbers that are numbers, no code, no
wish for files from elsewhere. Light to import: names and JSON only.

A compact folder with its `comp_report.json` must hold the bytes that comp wrote.
"""

import math
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import CompError, RefusedError
from ..files.store import JSON_LIMIT, departs, read_json
from . import runtimes

REPORT = "comp_report.json"
# People edit the first; comp runs its own runtime, not the others.
FREE = {"README.md", *runtimes.ALL}
READ = {".json", ".txt", ".model", ".jinja", ".safetensors", ".bin"}  # what the libraries open, by suffix
SMALL = READ - {".safetensors", ".bin"}
CONFIGS = ("config.json", "generation_config.json")
PROCESSORS = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
KERNELS = ("eager", "sdpa")  # attention that comes with torch and transformers; other names are fetched from the hub
CONFIG_LIMIT = 16 * 2**20  # bytes of a config
LARGEST = 2**40  # of a number in a config: no size of a model comes near
MOST_LABELS = 100_000  # transformers writes down a name for each


def check_folder(folder: Path) -> None:
    """Raises RefusedError where a file that would be read is no plain file, lies outside the folder, or a config asks for code,
    kernels, quantized weights or files from elsewhere, or holds a number that is none."""
    check_files(folder)
    for name in CONFIGS + PROCESSORS:
        if (folder / name).is_file():
            if (folder / name).stat().st_size > CONFIG_LIMIT:
                raise RefusedError(f"{folder / name}: larger than {CONFIG_LIMIT // 2**20} MiB, which none is.")
            check_config(read_json(folder / name), folder / name)


def check_files(folder: Path) -> None:
    """Raises RefusedError for devices, pipes, links that lead out of the folder (but into a cache of the hub) and small files
    that are not small."""
    home = folder.resolve()
    nested = home / "additional_chat_templates"
    for path in sorted([*home.iterdir(), *(nested.iterdir() if nested.is_dir() else ())]):
        if path.suffix not in READ or (path.is_dir() and not path.is_symlink()):
            continue
        try:
            target = path.resolve(strict=True)
            found = target.stat()
        except (OSError, RuntimeError) as error:  # a loop
            raise RefusedError(f"{path}: a link that leads to no file.") from error
        if not stat.S_ISREG(found.st_mode):
            raise RefusedError(f"{path}: not a plain file (a device, a pipe, a socket or a folder).")
        if not target.is_relative_to(home) and not _in_hub_cache(target):
            hint = "comp reads nothing outside the folder. Copy the file into it if that is what you want."
            raise RefusedError(f"{path}: a link to {target}, outside the folder.", hint=hint)
        if path.suffix in SMALL and found.st_size > JSON_LIMIT:
            raise RefusedError(f"{path}: larger than {JSON_LIMIT // 2**20} MiB, which no such file is.")


def _in_hub_cache(target: Path) -> bool:
    """Whether a file is a blob of a model in a cache of the hub, its own or one that models share: snapshots are folders of
    links to them."""
    shared = target.parent.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", target.name)
    return bool(shared) or (target.parent.name == "blobs" and target.parent.parent.name.startswith("models--"))


def check_config(config: dict[str, Any], path: Path) -> None:
    """Raises RefusedError with the place and value of what speaks against a config."""
    for place, value in leaves(config):
        key = place.rsplit(".", 1)[-1].split("[")[0]
        if isinstance(value, float) and not math.isfinite(value):
            raise _refused(path, place, value, "not a finite number")
        if isinstance(value, int) and abs(value) > LARGEST and path.name == "config.json":
            raise _refused(path, place, value, "no size of a model")
        if key == "num_labels" and value is not None and not (type(value) is int and 0 <= value <= MOST_LABELS):
            raise _refused(path, place, value, f"expected a number from 0 to {MOST_LABELS}")
        if key.endswith("_eps") and isinstance(value, int | float) and not 0 <= value < 1:
            raise _refused(path, place, value, "expected a small positive number")
        if "attn_implementation" in place or "experts_implementation" in place:
            if value is not None and value not in KERNELS:
                hint = f"comp runs no kernels from elsewhere. Remove the line, or use {' or '.join(KERNELS)}."
                raise _refused(path, place, value, "not an attention that comes with torch", hint)
        if key == "output_attentions" and value:
            raise _refused(path, place, value, "fused attention makes no maps", "Remove the line.")
        if place.startswith("transformers_weights") and value is not None:
            raise _refused(path, place, value, "comp reads model.safetensors and its shards", "Remove the line.")
        if place.startswith("quantization_config"):
            hint = "Give the model as it was before it was quantized; comp export --quantize int8 quantizes what comp wrote."
            raise RefusedError(f"{path}: the weights are quantized (quantization_config).", hint=hint)
        if place.startswith("init_inputs"):
            raise _refused(path, place, value, "names files for the tokenizer by itself", "Remove the line.")


def leaves(content: Any) -> Iterator[tuple[str, Any]]:
    """Every value of nested JSON that is no container, with its place such as vision_config.sizes[0]; however deep or long."""
    waiting = [iter([("", content)])]
    while waiting:
        place, value = next(waiting[-1], (None, None))
        if place is None:
            waiting.pop()
        elif isinstance(value, dict | list):
            waiting.append(_inside(place, value))
        else:
            yield place, value


def _inside(place: str, value: dict[str, Any] | list[Any]) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        yield from ((f"{place}.{key}" if place else str(key), part) for key, part in value.items())
    else:
        yield from ((f"{place}[{index}]", part) for index, part in enumerate(value))


def check_report(folder: Path) -> None:
    """Raises RefusedError where comp's own report lies in the folder and a file is not, byte for byte, the one that it lists.

    README.md, the runtime and what no library opens may be edited. Of weights that are links to the dense model's, size and
    header are compared (see `store.unread_facts`). Without a report (a model that was trained further, saved elsewhere) there
    is nothing to compare with.
    """
    if not (folder / REPORT).is_file():
        return
    report = read_json(folder / REPORT)
    files = report.get("files")
    if not isinstance(files, dict) or not all(isinstance(known, dict) for known in files.values()):
        raise RefusedError(f"{folder / REPORT}: expected the files of the folder under 'files'.", hint=_cure(folder))
    for name, known in files.items():
        path, inside = folder / name, name == os.path.basename(name)
        if name in FREE or (inside and os.path.splitext(name)[1] not in READ):  # pictures, pages: nothing opens or fetches them
            continue
        if not inside or not path.is_file():
            raise RefusedError(f"{folder}: {name!r}, which {REPORT} lists, is missing.", hint=_cure(folder))
        if how := departs(path, {"bytes": None, **known}):
            raise RefusedError(f"{path}: {how} ({REPORT}).", hint=_cure(folder))


def _cure(folder: Path) -> str:
    return (
        "Fetch or write the folder again. If you changed it on purpose (trained further, another tokenizer), remove "
        f"{folder / REPORT}: it describes what comp wrote."
    )


def _refused(path: Path, place: str, value: Any, why: str, hint: str | None = None) -> CompError:
    return RefusedError(f"{path}: {place} is {shown(value)}: {why}.", hint=hint)


def shown(value: Any) -> str:
    """A value as it stands in a sentence: never longer than a line."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"
