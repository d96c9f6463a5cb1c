"""The families that comp knows, and how a checkpoint finds its own."""

from difflib import get_close_matches
from typing import Any

from ..errors import REFUSED, CompError
from .base import Attention, Decoder, Family, Tower
from .blip import BLIP, BLIP_CAPTION, BLIP_VQA
from .clip import CLIP, CLIP_TEXT, CLIP_VISION
from .siglip import SIGLIP

FAMILIES = {family.name: family for family in (BLIP, BLIP_CAPTION, BLIP_VQA, CLIP, CLIP_VISION, CLIP_TEXT, SIGLIP)}

__all__ = ["FAMILIES", "Attention", "Decoder", "Family", "Tower", "find_family", "supported", "tower_config"]


def tower_config(config: dict[str, Any], tower: Tower) -> dict[str, Any]:
    """The part of a config (as a dictionary) that describes a tower."""
    return config[tower.config] if tower.config else config


def supported() -> list[str]:
    """The architectures that comp prunes."""
    return sorted(name for family in FAMILIES.values() for name in family.architectures)


def find_family(config: dict[str, Any]) -> tuple[Family, str]:
    """Family and architecture of a config.json. Exit 4 for an architecture that comp does not know."""
    named = config.get("architectures")
    named = named if isinstance(named, list) and named else ["(none named)"]
    for family in FAMILIES.values():
        for architecture in map(str, named):
            stock = architecture.removeprefix("Compact")  # what save_pretrained of a compact model writes
            if stock in family.architectures:
                return family, stock
    spelled = {name.lower(): name for name in supported()}
    nearest = get_close_matches(str(named[0]).lower(), spelled, n=1, cutoff=0.4)
    raise CompError(
        f"comp does not know the architecture {named[0]} (model_type {config.get('model_type')!r}).",
        code=REFUSED,
        hint=f"Supported: {', '.join(supported())}." + (f" The nearest is {spelled[nearest[0]]}." if nearest else ""),
    )
