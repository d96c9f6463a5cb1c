"""Weights against config.json by names and shapes alone, before anything of their sizes is built: an absurd number in a config
costs no memory, and what does not fit is named."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, apply_renamings
from transformers.initialization import no_init_weights

from ..errors import RefusedError
from ..families import Family, Tower, tower_config
from ..files.store import TensorHeader, read_tensors_header

FLOATS = ("F64", "F32", "F16", "BF16")
# What wraps a model while it is trained stands in the names of its weights: how the model inside is saved.
WRAPPERS = {
    "_orig_mod": "saved from a model that torch.compile made: save the one inside, model._orig_mod.save_pretrained(...)",
    "module": "saved from DataParallel or DistributedDataParallel: save the model inside, model.module.save_pretrained(...)",
    "_fsdp_wrapped_module": "saved from FSDP: save with Trainer or accelerate's get_state_dict, which unwrap it",
    "_checkpoint_wrapped_module": "saved with activation checkpointing: save the model without its wrapper",
    "base_layer": "saved with an adapter in it: merge it first, model.merge_and_unload().save_pretrained(...)",
    "lora_A": "saved with a LoRA adapter in it: merge it first, model.merge_and_unload().save_pretrained(...)",
    "base_model": "saved from a PEFT model: merge it first, model.merge_and_unload().save_pretrained(...)",
}


def read_headers(folder: Path, names: list[str]) -> dict[str, TensorHeader]:
    """Dtypes and shapes of all tensors in the named weight files. Raises RefusedError where a file is broken, or a pickle holds
    more than tensors."""
    found: dict[str, TensorHeader] = {}
    for name in names:
        if name.endswith(".safetensors"):
            found |= read_tensors_header(folder / name)
        elif name.endswith(".bin"):
            found |= _read_pickle(folder / name)
    return found


def _read_pickle(path: Path) -> dict[str, TensorHeader]:
    hint = "Ask its author for safetensors."
    try:
        held = torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:  # torch's own advice here is to read it unsafely
        said = f"{path}: not a pickle of plain tensors: it is broken, or wants to run code, which comp does not do."
        raise RefusedError(said, hint=hint) from error
    if not isinstance(held, Mapping) or not all(isinstance(tensor, torch.Tensor) for tensor in held.values()):
        inside = f" Its keys are {few(held)}." if isinstance(held, Mapping) else ""
        said = f"{path}: expected names and tensors, found {type(held).__name__} of other things.{inside}"
        raise RefusedError(said, hint="Save the model with transformers' save_pretrained.")
    kinds = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    return {
        str(name): TensorHeader(kinds.get(tensor.dtype, str(tensor.dtype).removeprefix("torch.")), tuple(tensor.shape))
        for name, tensor in held.items()
    }


def as_named_now(
    headers: Mapping[str, TensorHeader], config: transformers.PretrainedConfig, family: Family, model_class: type
) -> Mapping[str, TensorHeader]:
    """The tensors under the names that the model has for them today, where files have those of an older release, as all of
    LLaVA's have. model_class: the one that reads them. As they are where every tower stands under its name, or one has more
    layers than there are tensors: then they are for `check_depth`."""
    sizes = config.to_dict()
    depths = [tower_config(sizes, tower)[tower.depth] for tower in family.towers]
    known = all(_depth(headers, tower)[0] for tower in family.towers)
    if known or not all(type(depth) is int and depth <= len(headers) for depth in depths):
        return headers
    model: Any = on_meta(model_class, config)
    changes = [change for change in get_model_conversion_mapping(model) if isinstance(change, WeightRenaming)]
    return {apply_renamings(name, changes): header for name, header in headers.items()}


def check_depth(headers: Mapping[str, TensorHeader], config: dict[str, Any], family: Family, folder: Path) -> None:
    """Raises RefusedError where a tower of config.json has another number of layers than the weights, or stands under other
    names."""
    for wrapper, cure in WRAPPERS.items():
        wrapped = [name for name in headers if wrapper in name.split(".")[:-1]]
        if wrapped:
            said = f"{folder}: {len(wrapped)} of {len(headers)} weights are named as in {wrapped[0]!r}: {cure}."
            raise RefusedError(said, hint="Then give the folder that it writes.")
    for tower in family.towers:
        sizes = tower_config(config, tower)
        wanted, key = sizes[tower.depth], f"{tower.config}.{tower.depth}".removeprefix(".")
        found, prefix = _depth(headers, tower)
        if prefix:
            said = f"{folder}: weights are named {prefix}{tower.encoder}..., and a model of this kind has {tower.encoder}..."
            cure = f"They come from a larger model, or a wrapper: save the model inside, so that no name has {prefix!r}."
            raise RefusedError(said, hint=cure)
        if type(wanted) is not int or wanted != found:
            root = f"{tower.encoder}.{tower.layers}"
            said = f"{folder}: config.json says {key} {wanted}, the weights hold {found} layers {root}.N"
            hint = "Weights and config.json must belong together."
            raise RefusedError(f"{said} (first weights: {few(headers)}).", hint=hint)


def _depth(headers: Mapping[str, TensorHeader], tower: Tower) -> tuple[int, str]:
    """How many layers of a tower the weights hold, and what stands before its name where nothing should."""
    root = re.compile(rf"(.*?){re.escape(tower.encoder)}\.{re.escape(tower.layers)}\.(\d{{1,9}})\.")
    matches = [match for match in map(root.match, headers) if match]
    plain = {int(match[2]) for match in matches if not match[1]}
    return len(plain), "" if plain or not matches else matches[0][1]


def on_meta(model_class: type, config: transformers.PretrainedConfig) -> nn.Module:
    """A model of a config without any memory for its weights."""
    with torch.device("meta"), no_init_weights():
        return model_class(config)


def check_shapes(headers: Mapping[str, TensorHeader], model: nn.Module, folder: Path) -> None:
    """Raises RefusedError at the first tensor whose shape or kind is not the one that config.json asks for, and where
    config.json asks for far more than the files hold. Missing and left-over names are for the loader, which knows the old
    ones."""
    wanted = model.state_dict()
    for name, header in headers.items():
        if name not in wanted:
            continue
        expected = tuple(wanted[name].shape)
        if header.shape != expected:
            said = f"{folder}: the weight {name} is mismatched: {header.shape} in the file, {expected} by config.json."
            raise RefusedError(said, hint="Weights and config.json must belong together.")
        if wanted[name].is_floating_point() and header.dtype not in FLOATS:
            said = f"{folder}: the weight {name} is of the type {header.dtype}; comp reads {', '.join(FLOATS)}."
            raise RefusedError(said, hint="Give the model as it was before it was quantized.")
    missing = {name: tensor.numel() for name, tensor in wanted.items() if name not in headers}
    held = sum(tensor.numel() for name, tensor in wanted.items() if name in headers)
    if sum(missing.values()) > 2 * held + 10**6:
        said = f"{folder}: weights and config.json do not agree (missing keys: {few(missing)})."
        raise RefusedError(said, hint="comp loads all or nothing.")


def few(keys: Any) -> str:
    """The first three of some names, and how many there are."""
    names = sorted(str(key[0] if isinstance(key, tuple) else key) for key in keys)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
