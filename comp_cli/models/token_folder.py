"""A decoder whose image tokens leave on the way, on disk: the dense model's own weights, never written anew, and beside them
what says where tokens leave. No weight is loaded for it."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..checkpoint.download_check import is_hash
from ..checkpoint.header_check import as_named_now, check_shapes, on_meta, read_headers
from ..checkpoint.loading import check_sizes, describe, load_processor
from ..checkpoint.places import copy_settings, without_places
from ..checkpoint.runtimes import runtime_facts, runtime_of, ship
from ..checkpoint.weight_files import check_checkpoint
from ..errors import CompError
from ..files.hand_on import copy, link
from ..files.store import save_tensors
from ..plan import PADDING, Plan
from ..progress import Progress
from ..report.card_pictures import save_example
from ..report.token_card import token_card
from .compact import ORIGIN, auto_map
from .described import Described, check_complete

TOLD_APART = ("text_config", "intermediate_size")
INDEX = "model.safetensors.index.json"
# Files of processors and generation, which are handed on as they are.
BESIDE = (
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
)
TEMPLATES = "additional_chat_templates"


def write_folder(
    folder: Path,
    dense: Described,
    plan: Plan,
    document: dict[str, Any],
    weights: Mapping[str, Tensor] | None = None,
    *,
    linked: bool,
    progress: Progress,
) -> dict[str, dict[str, Any]]:
    """Weights, config.json, runtime, processor files and model card. weights: where they are not those of the dense model.
    What a report says of the weights by their names, where it needs not read them."""
    known = {}
    if weights is None:
        known = hand_on_weights(folder, dense, linked, progress)
    else:
        save_tensors(weights, folder / "model.safetensors")
    block = plan.comp_block(
        dense.family,
        dense.hf_config.to_dict(),
        method=document["options"]["method"],
        **{key: document[key] for key in ORIGIN},
        runtime=runtime_facts(dense.family),
    )
    config = told_apart(dense) | {"auto_map": auto_map(dense.family, dense.architecture)}
    config = without_places(config | {"comp": config["comp"] | block})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    ship(dense.family, folder)
    for path in sorted({path for pattern in BESIDE for path in dense.source.folder.glob(pattern)}):
        copy_settings(path, folder / path.name)
    for path in sorted((dense.source.folder / TEMPLATES).glob("*.jinja")):
        (folder / TEMPLATES).mkdir(exist_ok=True)
        shutil.copyfile(path, folder / TEMPLATES / path.name)
    card = token_card(document, dense.family, dense.task, dense.source.folder)
    (folder / "README.md").write_text(card, encoding="utf-8")
    save_example(folder)
    return known


def hand_on_weights(folder: Path, dense: Described, linked: bool, progress: Progress) -> dict[str, dict[str, Any]]:
    """Links or copies of the files with weights, and a copy of their index.

    A copy is hashed as it is made. A link is not read: its size and its header say what it is, and where it is a blob of the
    hub's cache, whose bytes were compared with its name when the model was opened, its SHA-256 as well.
    """
    source, found = dense.source.folder, {}
    if (source / INDEX).is_file() and INDEX not in dense.files:
        shutil.copyfile(source / INDEX, folder / INDEX)
    if linked:
        for name in dense.files:
            blob = (source / name).resolve().name
            checked = {"sha256": blob} if dense.source.kind == "hub" and len(blob) == 64 and is_hash(blob) else {}
            found[name] = link(source / name, folder / name) | checked
        return found
    size = sum((source / name).stat().st_size for name in dense.files)
    with progress.track("copying the weights (MiB)", max(size >> 20, 1)) as bar:
        copied = 0

        def advance(count: int) -> None:
            nonlocal copied
            before, copied = copied >> 20, copied + count
            bar.advance(by=(copied >> 20) - before)

        for name in dense.files:
            found[name] = copy(source / name, folder / name, advance)
    return found


def told_apart(dense: Described) -> dict[str, Any]:
    """The dense model's config.json with a size that its weights have not, so that no stock class loads the folder: it would
    answer as the dense model, without a word. `comp.told_apart` says the true size, which the runtime restores."""
    section, name = TOLD_APART
    size = dense.hf_config.to_dict()[section][name]
    changed = {name: size + PADDING}
    own = dense.config.get(section)
    # Older configs of Qwen2-VL have the sizes of the language model among those of the whole.
    config = dense.config | (changed if own is None else {section: own | changed})
    return config | {"comp": {"told_apart": {"section": section, "name": name, "dense": size}}}


def check_folder_loads(folder: Path, dense: Described) -> None:
    """The folder must describe the dense model but for what was changed, and its weights must be those of the compact class.
    Raises CompError or RefusedError where that is not so: nothing is kept then."""
    config, family = describe(folder)
    section, name = TOLD_APART
    expected = dense.hf_config.to_dict()
    expected[section] = expected[section] | {name: expected[section][name] + PADDING}
    found = config.to_dict()
    if wrong := differing(expected, found):
        hint = "Nothing was kept. Please report this with the command and the model."
        raise CompError(f"the written config.json says another model than the dense one: {', '.join(wrong)}.", hint=hint)
    files = check_checkpoint(folder, allow_pickle=False)
    compact_class = runtime_of(family).compact_class(dense.architecture)
    compact = on_meta(compact_class, config)
    headers = as_named_now(read_headers(folder, files), config, family, compact_class)  # as its loader will name them
    check_sizes(found, family, headers, folder)
    check_shapes(headers, compact, folder)
    check_complete(headers, compact, str(folder))
    load_processor(folder)


def differing(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Names of what two configs say otherwise, leaving out what is written for comp and for loaders."""
    left_out = {"comp", "auto_map", "_name_or_path"}
    expected, found = without_places(expected), without_places(found)
    names = (expected.keys() | found.keys()) - left_out
    return sorted(name for name in names if expected.get(name) != found.get(name))
