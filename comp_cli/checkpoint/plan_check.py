"""The block `comp` of a config.json, checked against the family and the dense sizes in the same file: a plan that lies loads
and gives wrong numbers. What no size says (an activation, an epsilon) only the hashes in comp_report.json can tell."""

import json
import math
from typing import Any

from ..engine.methods import METHODS
from ..errors import RefusedError
from ..families import FAMILIES, Family, Tower, tower_config
from ..plan import PADDING, SCHEMA_VERSION
from .vetting import shown

FACTS = ("comp_version", "base_model", "base_revision", "base_address", "method", "task")


def check_block(block: dict[str, Any], config: dict[str, Any], family: Family, architecture: str) -> None:
    """Raises RefusedError with the place and value of what cannot be. `config` is the whole config.json, defaults filled in;
    `family` is the one that its architecture and task belong to."""
    version = block.get("schema_version")
    newest = type(version) is int and version > SCHEMA_VERSION
    hint = "A newer comp wrote it: pip install -U comp-cli." if newest else None
    _expect(type(version) is int and 1 <= version <= SCHEMA_VERSION, "schema_version", version, f"1 to {SCHEMA_VERSION}", hint)
    named = FAMILIES.get(block["family"]) if isinstance(block.get("family"), str) else None
    fits = [name for name, known in FAMILIES.items() if architecture in known.architectures]
    _expect(named and named.name in fits, "family", block.get("family"), " or ".join(fits))
    if "task" in block:
        _expect(named is family, "family", named.name, f"{family.name}, for the task {block['task']}")
    for name in FACTS:
        _expect(isinstance(block.get(name), str | None), name, block.get(name), "a text")
    towers = block.get("towers")
    _expect(isinstance(towers, list) and len(towers) == len(named.towers), "towers", towers, f"{len(named.towers)} towers")
    for index, (tower, found) in enumerate(zip(named.towers, towers, strict=True)):
        place = f"towers[{index}]"
        _expect(isinstance(found, dict), place, found, "a tower")
        _check_tower(place, found, tower, tower_config(config, tower), block.get("method"))


def _check_tower(place: str, found: dict[str, Any], tower: Tower, sizes: dict[str, Any], method: Any) -> None:
    layout = json.loads(json.dumps(tower.layout()))
    if found.get("layout") != layout:
        given = found["layout"] if isinstance(found.get("layout"), dict) else {}
        name = next((name for name in {**layout, **given} if name not in given or given[name] != layout.get(name)), "")
        _expect(False, f"{place}.layout.{name}", given.get(name), f"{layout.get(name)!r}, as the {tower.name} tower is built")
    rows = found.get("score_rows")
    _expect(_count(rows, 0), f"{place}.score_rows", rows, "a number of rows, 0 for all")
    _check_rule(place, found, tower, method)
    layers, depth = found.get("layers"), sizes["num_hidden_layers"]
    fits = isinstance(layers, list) and len(layers) == depth
    _expect(
        fits, f"{place}.layers", len(layers) if isinstance(layers, list) else layers, f"{depth} layers, as config.json says"
    )
    left = _tokens(tower, sizes)
    for index, layer in enumerate(layers):
        left = _check_layer(f"{place}.layers[{index}]", layer, tower, sizes, left)


def _check_rule(place: str, found: dict[str, Any], tower: Tower, method: Any) -> None:
    """How tokens are ranked follows from the method: images by its rule, texts by their own as ever."""
    own = tower.score_rule
    rules = {"attention", "stride", "random", own} | ({"cls"} if tower.class_token else set())
    if tower.name != "vision":
        rules = {own}
    elif isinstance(method, str) and method in METHODS:
        rules = {METHODS[method].tokens or own}
    rule, fuse = found.get("score_rule", "attention"), found.get("fuse", False)
    known = isinstance(rule, str) and rule in rules
    _expect(known, f"{place}.score_rule", rule, f"{' or '.join(sorted(rules))} (method {method})")
    allowed = {tower.fuse, False} if rule == own and "fuse" not in found else {tower.fuse and rule == own}
    _expect(type(fuse) is bool and fuse in allowed, f"{place}.fuse", fuse, f"{tower.fuse and rule == own}")


def _check_layer(place: str, layer: Any, tower: Tower, sizes: dict[str, Any], tokens: int) -> int:
    """Returns the tokens that the layer hands on."""
    _expect(isinstance(layer, dict), place, layer, "the sizes of a layer")
    heads, width = sizes["num_attention_heads"], sizes["hidden_size"]
    for part in ("attention", "cross") if tower.cross else ("attention",):
        attention, where = layer.get(part), f"{place}.{part}"
        _expect(isinstance(attention, dict), where, attention, "num_heads, head_dim and scale")
        kept, wide, scale = (attention.get(name) for name in ("num_heads", "head_dim", "scale"))
        _expect(set(attention) == {"num_heads", "head_dim", "scale"}, where, attention, "num_heads, head_dim and scale")
        _expect(_count(kept, 1) and kept <= heads, f"{where}.num_heads", kept, f"1 to {heads}")
        _expect(_count(wide, 1) and wide == width // heads, f"{where}.head_dim", wide, f"{width // heads} = {width} / {heads}")
        right = (width // heads) ** -0.5
        close = type(scale) in (int, float) and math.isclose(scale, right, rel_tol=1e-6)
        _expect(close, f"{where}.scale", scale, f"{right:.8g} = 1 / sqrt({width // heads})")
    _expect(tower.cross or "cross" not in layer, f"{place}.cross", layer.get("cross"), "none: the tower has no cross-attention")
    ffn, most = layer.get("ffn"), sizes["intermediate_size"] + PADDING
    _expect(_count(ffn, 1) and ffn <= most, f"{place}.ffn", ffn, f"1 to {sizes['intermediate_size']} channels")
    _expect("keep" in layer, f"{place}.keep", None, "a number of tokens, or null for all")
    keep, least = layer["keep"], max(1, len(tower.protected))
    if keep is None:
        return tokens
    _expect(tower.tokens, f"{place}.keep", keep, f"null: the {tower.name} tower keeps its tokens")
    _expect(_count(keep, least) and keep <= tokens, f"{place}.keep", keep, f"{least} to {tokens} tokens, or null for all")
    return keep


def _tokens(tower: Tower, sizes: dict[str, Any]) -> int:
    """The most tokens that enter a tower."""
    if "image_size" in sizes:
        return (sizes["image_size"] // sizes["patch_size"]) ** 2 + (tower.class_token == "first")
    return sizes["max_position_embeddings"]


def _count(value: Any, least: int) -> bool:
    return type(value) is int and value >= least


def _expect(holds: Any, place: str, value: Any, expected: str, hint: str | None = None) -> None:
    if not holds:
        hint = hint or "The block is not one that comp wrote for this model: write or fetch the folder again."
        raise RefusedError(f"config.json: comp.{place} is {shown(value)}; expected {expected}.", hint=hint)
