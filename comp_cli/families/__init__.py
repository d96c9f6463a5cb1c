"""The families that comp knows, and how a checkpoint finds its own."""

from difflib import get_close_matches
from typing import Any

from ..errors import REFUSED, USAGE, CompError
from .base import Attention, Decoder, Dual, Family, Tower
from .blip import BLIP, BLIP_CAPTION, BLIP_CONTRASTIVE, BLIP_VQA
from .clip import CLIP, CLIP_TEXT, CLIP_VISION
from .siglip import SIGLIP

# Of those with the same architecture the first is the usual one.
FAMILIES = {
    family.name: family for family in (BLIP, BLIP_CONTRASTIVE, BLIP_CAPTION, BLIP_VQA, CLIP, CLIP_VISION, CLIP_TEXT, SIGLIP)
}

__all__ = [
    "FAMILIES",
    "Attention",
    "Decoder",
    "Dual",
    "Family",
    "Tower",
    "find_architecture",
    "find_family",
    "supported",
    "tower_config",
]


def tower_config(config: dict[str, Any], tower: Tower) -> dict[str, Any]:
    """The part of a config (as a dictionary) that describes a tower."""
    return config[tower.config] if tower.config else config


def supported() -> list[str]:
    """The architectures that comp prunes."""
    return sorted({name for family in FAMILIES.values() for name in family.architectures})


def find_family(config: dict[str, Any], wanted: str | None = None) -> tuple[Family, str, str]:
    """Family, architecture and task of a config.json: of the wanted task, that of a compact model, or the usual one.

    Exit 4 for an architecture that comp does not know, 2 for a task that it is not for.
    """
    architecture = find_architecture(config)
    families = {task: family for family in FAMILIES.values() for task in family.architectures.get(architecture, ())}
    task = wanted or config.get("comp", {}).get("task") or next(iter(families))
    if task not in families:
        raise CompError(f"--task {task}: this model is for {', '.join(families)}.", code=USAGE)
    return families[task], architecture, task


def find_architecture(config: dict[str, Any]) -> str:
    """The transformers class that a config.json names. Exit 4 for one that comp does not know."""
    named = config.get("architectures")
    named = named if isinstance(named, list) and named else ["(none named)"]
    known = supported()
    for architecture in map(str, named):
        stock = architecture.removeprefix("Compact")  # what save_pretrained of a compact model writes
        if stock in known:
            return stock
    spelled = {name.lower(): name for name in known}
    nearest = get_close_matches(str(named[0]).lower(), spelled, n=1, cutoff=0.4)
    raise CompError(
        f"comp does not know the architecture {named[0]} (model_type {config.get('model_type')!r}).",
        code=REFUSED,
        hint=f"Supported: {', '.join(known)}." + (f" The nearest is {spelled[nearest[0]]}." if nearest else ""),
    )
