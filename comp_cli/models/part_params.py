"""Parameters of each prunable part of a model."""

from collections.abc import Iterable

from torch import Tensor

from ..engine.scoring import Key
from ..families import Family


def part_params(tensors: Iterable[tuple[str, Tensor]], family: Family) -> dict[Key, int]:
    """Parameters of each prunable part, norms counted with the part that they belong to. tensors: names and weights."""
    tensors, found = list(tensors), dict[Key, int]()
    for tower in family.towers:
        root = f"{tower.encoder}.{tower.layers}."
        inside = {_first(part.column): part.name for part in tower.parts if part.is_attention}
        for name, tensor in tensors:
            if not name.startswith(root):
                continue
            index, _, path = name.removeprefix(root).partition(".")
            key = (tower.name, int(index), inside.get(_first(path), tower.parts[-1].name))
            found[key] = found.get(key, 0) + tensor.numel()
    return found


def _first(path: str) -> str:
    """The module right inside a layer that a path goes through."""
    return path.partition(".")[0]
