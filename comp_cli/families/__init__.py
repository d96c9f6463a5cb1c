"""The families that comp knows, and how a checkpoint finds its own."""

from difflib import get_close_matches
from typing import Any

from ..errors import RefusedError, UsageError
from .base import Family, Mode, Part, Stream, Tower
from .blip import BLIP, BLIP_CAPTION, BLIP_CONTRASTIVE, BLIP_VQA
from .clip import CLIP, CLIP_TEXT, CLIP_VISION
from .internvl import INTERNVL
from .llava import LLAVA, LLAVA_NEXT, LLAVA_ONEVISION
from .paligemma import PALIGEMMA
from .qwen_vl import QWEN2_5_VL, QWEN2_VL, QWEN3_VL
from .siglip import SIGLIP
from .smolvlm import SMOLVLM
from .support import check_supported

# Of those with the same architecture the first is the usual one.
FAMILIES = {
    family.name: family
    for family in (
        BLIP,
        BLIP_CONTRASTIVE,
        BLIP_CAPTION,
        BLIP_VQA,
        CLIP,
        CLIP_VISION,
        CLIP_TEXT,
        SIGLIP,
        LLAVA,
        LLAVA_NEXT,
        LLAVA_ONEVISION,
        QWEN2_VL,
        QWEN2_5_VL,
        QWEN3_VL,
        INTERNVL,
        SMOLVLM,
        PALIGEMMA,
    )
}

__all__ = [
    "FAMILIES",
    "Family",
    "Mode",
    "Part",
    "Stream",
    "Tower",
    "check_supported",
    "compact_block",
    "find_architecture",
    "find_family",
    "supported",
    "tower_config",
]


def tower_config(config: dict[str, Any], tower: Tower) -> dict[str, Any]:
    """The part of a config (as a dictionary) that describes a tower."""
    return tower.section(config)


def supported() -> list[str]:
    """The architectures that comp prunes."""
    return sorted({name for family in FAMILIES.values() for name in family.architectures})


def compact_block(config: dict[str, Any]) -> dict[str, Any] | None:
    """The block `comp` of a config.json; None for a dense model. Raises RefusedError where it is none."""
    if "comp" not in config:
        return None
    if not isinstance(config["comp"], dict):
        said = f"config.json: comp is {type(config['comp']).__name__}, expected what comp prune writes there."
        raise RefusedError(said, hint="Without that key the model is a dense one.")
    return config["comp"]


def find_family(config: dict[str, Any], wanted: str | None = None) -> tuple[Family, str, str]:
    """Family, architecture and task of a config.json: of the wanted task, that of a compact model, or the usual one.

    Raises RefusedError for an architecture that comp does not know or a task that a compact model cannot be for, UsageError for
    a wanted one."""
    architecture = find_architecture(config)
    families = {task: family for family in FAMILIES.values() for task in family.architectures.get(architecture, ())}
    made_for = (compact_block(config) or {}).get("task")
    if made_for is not None and (not isinstance(made_for, str) or made_for not in families):
        said = f"config.json: comp.task is {made_for!r}; a {architecture} is for {', '.join(families)}."
        raise RefusedError(said)
    task = wanted or made_for or next(iter(families))
    if task not in families:
        raise UsageError(f"--task {task}: this model is for {', '.join(families)}.")
    return families[task], architecture, task


def find_architecture(config: dict[str, Any]) -> str:
    """The transformers class that a config.json names. Raises RefusedError for one that comp does not know."""
    named = config.get("architectures")
    named = [str(name) for name in named] if isinstance(named, list) else []
    known = supported()
    for architecture in named:
        stock = architecture.removeprefix("Compact")  # what save_pretrained of a compact model writes
        if stock in known:
            return stock
    kind = config.get("model_type")
    alike = same_kind(kind)
    if "pretrained_cfg" in config:
        said = f"a timm model ({config.get('architecture')}), which has no texts and no class of transformers."
        raise RefusedError(f"config.json is that of {said}", hint=f"Supported: {', '.join(known)}.")
    if not named:
        fits = f'Add "architectures": ["{alike[0]}"] to it' if alike else "Add the class of the model to it"
        others = f", or what the model is of {', '.join(alike[1:])}" if alike[1:] else ""
        said = f"config.json names no architectures (model_type {kind!r}), so what the model is for is not known."
        raise RefusedError(said, hint=f"{fits}{others}.")
    spelled = {name.lower(): name for name in known}

    def near(cutoff: float) -> list[str]:
        return [spelled[name] for name in get_close_matches(named[0].lower(), spelled, n=1, cutoff=cutoff)]

    meant = near(0.92) or alike or near(0.4)  # a slip of spelling, a model of the same kind, a distant likeness
    nearest = f" The nearest is {meant[0]}." if meant else ""
    raise RefusedError(
        f"comp does not know the architecture {named[0]} (model_type {kind!r}).",
        hint=f"Supported: {', '.join(known)}.{nearest}",
    )


def same_kind(model_type: Any) -> list[str]:
    """The architectures of a model_type that comp prunes, the usual one first; of its parts those of the whole."""
    if not isinstance(model_type, str):
        return []
    for found in (model_type, model_type.split("_")[0]):
        if names := [name for family in FAMILIES.values() if family.model_type == found for name in family.architectures]:
            return list(dict.fromkeys(names))
    return []
