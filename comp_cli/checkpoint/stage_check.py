"""The stages at which image tokens leave a decoder, and what tells its config.json apart from the dense one: the block `comp`
checked as plan_check.py checks its towers."""

import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from ..errors import RefusedError
from ..families import Family
from ..plan import PADDING
from .folder_check import shown

STAGE_KEYS = {"layer", "rule", "settings"}
RELEVANCES = ("class", "text", "last", "attention")
CLUSTERING, CLUSTERED = ("cls-clusters", "diverse-clusters"), ("cluster-merge", "cluster-attention")  # and what reads them


def _number(value: Any) -> bool:
    return type(value) in (int, float)  # a finite one: other numbers are refused when a config.json is read


SETTINGS: dict[str, tuple[Callable[[Any], bool], str]] = {  # of rules: what may be, and that in words
    "centre_share": (lambda value: _number(value) and 0 < value <= 1, "more than 0, 1 at most"),
    "compat": (lambda value: type(value) is bool, "true or false"),
    "coverage": (lambda value: _number(value) and value >= 0, "0 or more"),
    "cutoff": (lambda value: value is None or _number(value) and value > 0, "more than 0, or null"),
    "diversity": (lambda value: _number(value) and value >= 0, "0 or more"),
    "pivots": (lambda value: type(value) is int and value > 0, "1 or more"),
    "relevance": (lambda value: value in RELEVANCES, " or ".join(RELEVANCES)),
    "seed": (lambda value: type(value) is int and value >= 0, "0 or more"),
}


def true_sizes(block: Mapping[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """The whole config.json as the weights have it: with the size that was changed put right. Raises RefusedError where it is
    not the size that comp would have changed it to."""
    told = block.get("told_apart")
    if told is None:
        return config
    whole = isinstance(told, dict) and set(told) == {"section", "name", "dense"} and isinstance(told["section"], str)
    section = config.get(told["section"]) if whole else None
    if not whole or not isinstance(section, dict) or not isinstance(section.get(told["name"]), int):
        _refuse("told_apart", told, "a size of a part of config.json, and what it is in the weights")
    if type(told["dense"]) is not int or section[told["name"]] != told["dense"] + PADDING:
        _refuse("told_apart.dense", told["dense"], f"{section[told['name']] - PADDING}: {told['name']} less {PADDING}")
    return config | {told["section"]: section | {told["name"]: told["dense"]}}


def check_stages(block: Mapping[str, Any], config: dict[str, Any], family: Family) -> None:
    """Raises RefusedError with the place and value of what cannot be. config: the whole config.json, defaults filled in."""
    expected = json.loads(json.dumps(family.topology.image_tokens(config)))
    if block.get("image_tokens", {}) != expected:
        _refuse("image_tokens", block.get("image_tokens"), shown(expected) if expected else "none: no decoder reads images")
    stages = block.get("token_stages", [])
    if not isinstance(stages, list) or (stages and not expected) or ("token_stages" in block and not stages):
        _refuse("token_stages", stages, "a list of stages" if expected else "none: no decoder reads images")
    if not stages:
        return
    _, tower = family.decoder_of_images
    depth = family.sections(config)[tower.name][tower.depth]
    before: dict[str, Any] = {"layer": -1}
    for index, stage in enumerate(stages):
        _check_stage(f"token_stages[{index}]", stage, before, depth)
        if stage["rule"] in CLUSTERED and not any(earlier["rule"] in CLUSTERING for earlier in stages[:index]):
            _refuse(f"token_stages[{index}].rule", stage["rule"], f"{' or '.join(CLUSTERING)} at a stage before it")
        before = stage
    name, first = family.decoder_of_images[0], stages[0]
    tokens = family.topology.lengths(family, config, 1)[name]
    if family.topology.images_of_one_size and first.get("keep", 0) >= tokens:
        _refuse("token_stages[0].keep", first["keep"], f"less than the {tokens} tokens of an image")


def _check_stage(place: str, stage: Any, before: Mapping[str, Any], depth: int) -> None:
    from ..runtime.token_rules import STAGE_RULES, may_be_first

    amount = next((name for name in ("keep", "share") if isinstance(stage, dict) and name in stage), None)
    if amount is None or set(stage) != STAGE_KEYS | {amount}:
        _refuse(place, stage, "layer, rule, settings, and keep or share")
    layer, rule, settings, kept = (stage[name] for name in ("layer", "rule", "settings", amount))
    if not (type(layer) is int and before["layer"] < layer < depth):
        _refuse(f"{place}.layer", layer, f"{before['layer'] + 1} to {depth - 1}")
    if not (isinstance(rule, str) and rule in STAGE_RULES):
        _refuse(f"{place}.rule", rule, " or ".join(STAGE_RULES))
    known = list(inspect.signature(STAGE_RULES[rule].choose).parameters)[2:]  # behind what it sees and how many stay
    if not isinstance(settings, dict) or not set(settings) <= set(known):
        _refuse(f"{place}.settings", settings, f"some of {', '.join(known)}" if known else "none")
    for name, value in settings.items():
        fits, expected = SETTINGS[name]
        if not fits(value):
            _refuse(f"{place}.settings.{name}", value, expected)
    if layer == 0 and not may_be_first(rule, settings):
        _refuse(f"{place}.layer", layer, f"1 or more: {rule} reads the layer before")
    if not (type(kept) is int and kept > 0 if amount == "keep" else type(kept) in (int, float) and 0 < kept < 1):
        _refuse(f"{place}.{amount}", kept, "1 token or more" if amount == "keep" else "a share between 0 and 1")
    if ({"keep", "share"} - {amount}) & set(before):
        _refuse(place, stage, "keep in all stages, or share in all")
    if amount in before and not kept < before[amount]:
        _refuse(f"{place}.{amount}", kept, f"less than {before[amount]}, which the stage before keeps")


def _refuse(place: str, value: Any, expected: str) -> NoReturn:
    hint = "The block is not one that comp wrote for this model: write or fetch the folder again."
    raise RefusedError(f"config.json: comp.{place} is {shown(value)}; expected {expected}.", hint=hint)
