"""The parts of a family's layers against the shapes of real weights: how large a unit is, and whether the description fits.

A description that forgets a matrix would slice a model inconsistently and count its FLOPs too low, without a word. So every
matrix of a layer is one of a part, or named as one that stays.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import RefusedError
from ..families import Family, Part, Tower, tower_config
from ..plan import width_of_head
from .description_check import Shape, check_description

HINT = "The family's description and the weights must fit: see families/base.py, Part."


@dataclass(frozen=True)
class PartSizes:
    """The matrices of a part: how much of them belongs to one unit."""

    units: int  # of the dense model
    rows: tuple[tuple[int, int], ...]  # of each of Part.rows: rows of a unit, inputs
    column: tuple[int, int]  # of Part.column: outputs, columns of a unit


def part_sizes(config: dict[str, Any], family: Family, shapes: Mapping[str, Shape]) -> dict[tuple[str, str], PartSizes]:
    """(tower, part) -> the sizes of its matrices, from config.json and the shapes of the weights.

    Raises RefusedError where the description contradicts itself (description_check.py), a matrix of a layer is in no part, a
    part names one that is not there, or the numbers of rows and columns are not those of as many units as the config says.
    """
    check_description(config, family, shapes)
    found = {}
    for tower in family.towers:
        sizes = tower_config(config, tower)
        matrices = [matrices_of(shapes, tower, index) for index in range(sizes[tower.depth])]
        for index, inside in enumerate(matrices):
            _check_named(tower, index, inside)
            for part in tower.parts:
                _check_units(tower, index, part, sizes, inside)
        for part in tower.parts:
            found[tower.name, part.name] = _sizes(part, sizes[part.units], matrices[0])
    return found


def matrices_of(shapes: Mapping[str, Shape], tower: Tower, index: int) -> dict[str, Shape]:
    """Path inside a layer -> shape, of what is no vector: norms and biases have none."""
    root = f"{tower.encoder}.{tower.layers}.{index}."
    return {name[len(root) :]: shape for name, shape in shapes.items() if name.startswith(root) and len(shape) > 1}


def _sizes(part: Part, units: int, matrices: Mapping[str, Shape]) -> PartSizes:
    rows = tuple((shape[0] // units, shape[1]) for shape in (matrices[f"{path}.weight"] for path in part.rows))
    outputs, columns = matrices[f"{part.column}.weight"]
    return PartSizes(units, rows, (outputs, columns // units))


def _check_named(tower: Tower, index: int, matrices: Mapping[str, Shape]) -> None:
    """Raises RefusedError unless the matrices of a layer are those that the description names."""
    named = {f"{path}.weight" for part in tower.parts for path in (*part.rows, part.column)}
    stay = tuple(f"{path}." for path in (*tower.whole, *tower.unused))
    where = f"layer {index} of the {tower.name} tower ({tower.encoder}.{tower.layers}.{index})"
    if lacking := sorted(named - matrices.keys()):
        raise RefusedError(f"{where}: the description names {lacking[0]}, the weights have none of that name.", hint=HINT)
    if nameless := sorted(name for name in matrices.keys() - named if not name.startswith(stay)):
        parts = ", ".join(part.name for part in tower.parts)
        said = f"{where} has the matrix {nameless[0]} {matrices[nameless[0]]}, which none of its parts ({parts}) names"
        raise RefusedError(
            f"{said}: pruning would leave it as it is, and its FLOPs would not be counted.",
            hint="Name it in the part that it belongs to, or in Tower.whole or Tower.unused if it stays.",
        )


def _check_units(tower: Tower, index: int, part: Part, sizes: dict[str, Any], matrices: Mapping[str, Shape]) -> None:
    """Raises RefusedError unless a part's matrices have the rows and columns of as many units as the config says."""
    units, group, width = sizes[part.units], 1, 1
    if part.is_attention:
        width = width_of_head(sizes, part)
        group = sizes[part.queries] // units
        if units * group != sizes[part.queries]:
            said = f"{part.queries} {sizes[part.queries]} is no multiple of {part.units} {units}"
            raise RefusedError(f"the {tower.name} tower's config: {said}.", hint="config.json and weights must fit.")
    # The first matrix makes queries, where there are any: one for every query head of a unit.
    wanted = {
        f"{path}.weight": (0, units * width * part.copies * (group if place == 0 else 1))
        for place, path in enumerate(part.rows)
    }
    wanted[f"{part.column}.weight"] = (1, units * width * group)
    for name, (axis, size) in wanted.items():
        if len(matrices[name]) != 2 or matrices[name][axis] != size:
            said = f"{name} of {tower.encoder}.{tower.layers}.{index} is {matrices[name]}"
            expected = f"{size} {'columns' if axis else 'rows'}: {part.units} {units}"
            if part.is_attention:
                expected += f", {group} query head(s) of width {width} each"
            raise RefusedError(f"{said}; the part {part.name} expects {expected}.", hint=HINT)
