"""A plan that was searched for, in a file of its own: what `comp prune --plan-only` writes and `--plan` applies.

It holds what a finished search leaves in its journal, the options that it was asked with, and hashes of the weights and of the
calibration pairs. What is read of one may come from anywhere, and is checked against the model before it is used.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from .. import __version__
from ..checkpoint.plan_check import check_block
from ..checkpoint.weight_files import files_of
from ..engine import flops
from ..engine.allocation import AllocationState
from ..engine.methods import METHODS
from ..engine.schedule import TOLERANCE
from ..engine.stages import SearchState
from ..errors import CompError, RefusedError, UsageError
from ..files.outputs import atomic_file, check_file
from ..files.store import read_json, sha256
from ..options import PruneOptions, flag
from ..plan import Heads, Plan
from .dense import Dense

KIND, SCHEMA_VERSION = "comp plan", 1
FREE = (
    "model",
    "data",
    "device",
    "dtype",
    "eval_samples",
    "max_memory",
    "task",
    "push_to_hub",
    "private",
)  # what whoever applies a plan may say anew
State = SearchState | AllocationState
T = TypeVar("T")


@dataclass(frozen=True)
class PlanFile:
    """options: with which the search was asked; local paths in them are names only. weights: hashes of config.json and the
    weight files of the dense model. pairs: fingerprint of the calibration pairs. state: of the search at its end, as JSON."""

    path: Path
    options: PruneOptions
    weights: tuple[str, ...]
    pairs: str
    state: dict[str, Any]

    def state_for(self, dense: Dense) -> State:
        """What the search ended with. Raises RefusedError where it was of another model, or is no plan for it."""
        if list(self.weights) != hashes(dense):
            hint = "Give the model that the plan was made of, in the same revision, or search anew."
            raise RefusedError(f"{self.path}: the plan was made of other weights than those of {dense.source.name}.", hint=hint)
        compares = METHODS[self.options.method].compares_plans
        try:
            found: State = AllocationState.from_json(self.state) if compares else SearchState.from_json(self.state)
            told = found.looks if isinstance(found, AllocationState) else found.stages
            for one in told:
                check_types(type(one), vars(one))
            check_plan(found.plan, dense, self.options.method)
        except CompError as error:
            raise RefusedError(f"{self.path}: {error.message}", hint=error.hint) from error
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise self.refused(f"its state cannot be read ({type(error).__name__}: {error})") from error
        reached = 1 - flops.count(found.plan, dense.reference).total / flops.count(dense.plan, dense.reference).total
        if abs(reached - (self.options.ratio or 0)) > TOLERANCE:
            raise self.refused(f"it has a ratio of {reached:.3f}, and says {self.options.ratio}")
        return found

    def refused(self, why: str) -> RefusedError:
        return RefusedError(f"{self.path}: no plan that comp wrote: {why}.", hint="Make one with --plan-only.")


def hashes(dense: Dense) -> list[str]:
    """SHA-256 of config.json and of the weight files."""
    return [sha256(path) for path in (dense.source.folder / "config.json", *files_of(dense.source.folder))]


def write_plan(path: Path, dense: Dense, asked: PruneOptions, state: State, pairs: str) -> None:
    """Write the file, whole or not at all. asked: without local paths."""
    document = {
        "schema_version": SCHEMA_VERSION,
        "kind": KIND,
        "comp_version": __version__,
        "base_model": dense.source.name,
        "base_revision": dense.source.revision,
        "options": as_json(asked),
        "weights": hashes(dense),
        "pairs": pairs,
        "state": state.to_json(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as partial:
        partial.write_text(json.dumps(document) + "\n", encoding="utf-8")


def check_plan_output(path: Path, overwrite: bool) -> None:
    """Raises UsageError where a plan cannot be written: not a name of a JSON file, or in the way of what is there."""
    if path.suffix != ".json":
        raise UsageError(f"-o/--output {path}: --plan-only writes a file, expected a name that ends in .json.")
    check_file(path)
    if not path.exists():
        return
    if not overwrite:
        raise UsageError(f"The output {path} exists.", hint="--overwrite replaces a plan that comp wrote.")
    try:
        ours = read_json(path).get("kind") == KIND
    except RefusedError:
        ours = False
    if not ours:
        raise UsageError(f"The output {path} is no plan that comp wrote. --overwrite leaves it alone.", hint="Move it away.")


def read_plan(path: Path) -> PlanFile:
    """Raises RefusedError where a file is none that comp wrote, or of a newer version."""
    found = read_json(path)
    empty = PlanFile(path, PruneOptions(""), (), "", {})
    if found.get("kind") != KIND:
        raise empty.refused('"kind" is not "comp plan"')
    version = found.get("schema_version")
    if version != SCHEMA_VERSION:
        hint = "A newer comp wrote it: pip install -U comp-cli." if isinstance(version, int) and version > 1 else None
        raise RefusedError(f"{path}: schema_version is {version!r}, expected {SCHEMA_VERSION}.", hint=hint)
    weights, pairs, state = (found.get(name) for name in ("weights", "pairs", "state"))
    if not (isinstance(weights, list) and all(isinstance(one, str) for one in weights)):
        raise empty.refused('"weights" is no list of hashes')
    if not isinstance(pairs, str) or not isinstance(state, dict) or not isinstance(found.get("options"), dict):
        raise empty.refused('"options", "pairs" or "state" is missing')
    try:
        options = from_json(PruneOptions, found["options"])
    except UsageError as error:
        raise empty.refused(error.message.rstrip(".")) from error
    except (TypeError, ValueError) as error:
        raise empty.refused(f"its options cannot be read ({error})") from error
    if options.method not in METHODS or options.ratio is None:
        raise empty.refused("its options name no method or no ratio that comp knows")
    return PlanFile(path, options, tuple(weights), pairs, state)


def with_plan(asked: PruneOptions, found: PlanFile) -> PruneOptions:
    """The options of a run that applies a plan: those of its search, and what may be said anew. Raises UsageError for what
    contradicts the plan."""
    said: dict[str, Any] = {}
    for one in fields(PruneOptions):
        value, planned = getattr(asked, one.name), getattr(found.options, one.name)
        changed = one.name == "model" or value != one.default
        if one.name in FREE or one.name == "training":
            said[one.name] = value if changed else planned
        elif changed and value != planned:
            hint = "Leave it out, or search anew without --plan."
            raise UsageError(f"{flag(one.name)} {value}: the plan {found.path} was made with {planned}.", hint=hint)
    if asked.data.data is None and found.options.data.data is not None:
        hint = f"--data {found.options.data.data}, wherever it lies."
        raise UsageError(f"the plan {found.path} was calibrated on pairs of your own: name them.", hint=hint)
    if said["training"].stage_share:
        raise UsageError("--stage-share with --plan: stages train while the plan is searched for.")
    if asked.data.data is not None:
        others = {name: value for name, value in vars(asked.data).items() if value is not None}
        said["data"] = replace(found.options.data, **others)
    return replace(found.options, **said)


def check_plan(plan: Plan, dense: Dense, method: str) -> None:
    """Raises RefusedError where a plan is none of a model: other towers, units that it does not have, heads of another size,
    and what no compact checkpoint may say."""
    for tower, whole in zip(plan.towers, dense.plan.towers, strict=True):
        if tower.name != whole.name or len(tower.layers) != len(whole.layers) or tower.streams.keys() != whole.streams.keys():
            raise RefusedError(f"the plan has a tower {tower.name} of {len(tower.layers)} layers, expected {whole.name}.")
        for index, (layer, before) in enumerate(zip(tower.layers, whole.layers, strict=True)):
            place = f"the plan's {tower.name} layer {index}"
            if layer.parts.keys() != before.parts.keys() or layer.padding:
                raise RefusedError(f"{place} has {', '.join(layer.parts)}, expected {', '.join(before.parts)}.")
            for name, units in layer.parts.items():
                every, kept = before.parts[name], units.units
                rising = all(type(unit) is int for unit in kept) and list(kept) == sorted(set(kept))
                if type(units) is not type(every) or not kept or not rising or not set(kept) <= set(every.units):
                    said = f"expected some of its {len(every.units)}, by rising numbers from 0"
                    raise RefusedError(f"{place} keeps units of {name} that it does not have: {said}.")
                if isinstance(units, Heads) and replace(units, units=every.units) != every:
                    raise RefusedError(f"{place} has heads of another size in {name} than the model.")
    config = dense.hf_config.to_dict()
    facts = {"method": method} | ({"task": dense.task.name} if dense.task.name else {})
    block = json.loads(json.dumps(plan.comp_block(dense.family, config, **facts)))
    try:
        check_block(block, config, dense.family, dense.architecture)
    except RefusedError as error:
        raise RefusedError(error.message.replace("config.json: comp.", "the plan says: "), hint=None) from error


def as_json(options: Any) -> dict[str, Any]:
    """A dataclass of options as JSON, fields that are not at their defaults."""
    found = {}
    for one in fields(options):
        value = getattr(options, one.name)
        if is_dataclass(value):
            found[one.name] = as_json(value)
        elif value != one.default:
            found[one.name] = value
    return found


def from_json(cls: type[T], found: Mapping[str, Any]) -> T:
    """The options that `as_json` wrote. Raises TypeError and UsageError for what is none."""
    hints: dict[str, Any] = get_type_hints(cls)
    made: dict[str, Any] = {}
    for name, value in found.items():
        if name not in hints:
            raise TypeError(f"unknown option {name}")
        nested: Any = next((kind for kind in members(hints[name]) if is_dataclass(kind)), None)
        if nested and isinstance(value, dict):
            made[name] = from_json(nested, value)
        else:
            made[name] = tuple(value) if isinstance(value, list) else value
    check_types(cls, made)
    return cls(**made)


def check_types(cls: Any, found: Mapping[str, Any]) -> None:
    """Raises TypeError where a value is not of the type that a dataclass names for it."""
    hints = get_type_hints(cls)
    for name, value in found.items():
        kinds = [get_origin(kind) or kind for kind in members(hints[name])]
        whole = type(value) is int and float in kinds
        if not any(isinstance(value, kind) and (kind is bool or type(value) is not bool) for kind in kinds) and not whole:
            raise TypeError(f"{name} is {value!r}")


def members(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if isinstance(hint, UnionType) else (hint,)
