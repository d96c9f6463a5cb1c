"""The block `comp` of a config.json, checked against the family and the dense sizes in the same file: a plan that lies loads
and gives wrong numbers. What no size says (an activation, an epsilon) only the hashes in comp_report.json can tell."""

import json
import math
from typing import Any

from ..engine.methods import ENCODER, METHODS
from ..engine.token_ranking import fits
from ..errors import RefusedError
from ..families import FAMILIES, Family, Part, Stream, Tower, tower_config
from ..plan import JSON_PARTS, PADDING, SCHEMA_VERSION, width_of_head
from .folder_check import shown
from .stage_check import check_stages, true_sizes

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
    if named is None or named.name not in fits:
        raise _refused("family", block.get("family"), " or ".join(fits))
    if "task" in block:
        _expect(named is family, "family", named.name, f"{family.name}, for the task {block['task']}")
    config = true_sizes(block, config)
    check_stages(block, config, family)
    for name in FACTS:
        _expect(isinstance(block.get(name), str | None), name, block.get(name), "a text")
    method = block.get("method") if family.topology.drops_in == ENCODER else None  # of a decoder, the stages say it
    towers: Any = block.get("towers")
    _expect(isinstance(towers, list) and len(towers) == len(named.towers), "towers", towers, f"{len(named.towers)} towers")
    for index, (tower, found) in enumerate(zip(named.towers, towers, strict=True)):
        place = f"towers[{index}]"
        _expect(isinstance(found, dict), place, found, "a tower")
        _check_tower(place, found, tower, tower_config(config, tower), method)


def _check_tower(place: str, found: dict[str, Any], tower: Tower, sizes: dict[str, Any], method: Any) -> None:
    layout = json.loads(json.dumps(tower.layout()))
    if found.get("layout") != layout:
        given = found["layout"] if isinstance(found.get("layout"), dict) else {}
        name = next((name for name in {**layout, **given} if name not in given or given[name] != layout.get(name)), "")
        _expect(False, f"{place}.layout.{name}", given.get(name), f"{layout.get(name)!r}, as the {tower.name} tower is built")
    for where, ranked, stream in _streams(place, found, tower):
        rows = ranked.get("score_rows")
        _expect(_count(rows, 0), f"{where}.score_rows", rows, "a number of rows, 0 for all")
        _check_rule(where, ranked, stream, method)
    layers: Any = found.get("layers")
    depth = sizes[tower.depth]
    fits = isinstance(layers, list) and len(layers) == depth
    _expect(
        fits, f"{place}.layers", len(layers) if isinstance(layers, list) else layers, f"{depth} layers, as config.json says"
    )
    left = {stream.name: 0 if tower.order == "stock" else _tokens(stream, sizes) for stream in tower.streams}
    for index, layer in enumerate(layers):
        left = _check_layer(f"{place}.layers[{index}]", layer, tower, sizes, left)


def _streams(place: str, found: dict[str, Any], tower: Tower) -> list[tuple[str, dict[str, Any], Stream]]:
    """Where it is said how the tokens of each stream are ranked, and what: in the tower itself where it has one stream."""
    if len(tower.streams) == 1:
        return [(place, found, tower.streams[0])]
    given: Any = found.get("streams")
    names = [stream.name for stream in tower.streams]
    fits_all = isinstance(given, dict) and set(given) == set(names) and all(isinstance(one, dict) for one in given.values())
    _expect(fits_all, f"{place}.streams", given, f"what is said of {', '.join(names)}")
    return [(f"{place}.streams.{stream.name}", given[stream.name], stream) for stream in tower.streams]


def _check_rule(place: str, found: dict[str, Any], stream: Stream, method: Any) -> None:
    """How tokens are ranked follows from the method: images by its rule, texts by their own as ever."""
    own = stream.rule
    rules = {own} | {method.tokens for method in METHODS.values() if method.tokens and fits(method.tokens, stream)}
    if stream.source != "image":
        rules = {own}
    elif isinstance(method, str) and method in METHODS:
        rules = {METHODS[method].tokens or own}
    rule, fuse = found.get("score_rule", "attention"), found.get("fuse", False)
    known = isinstance(rule, str) and rule in rules
    _expect(known, f"{place}.score_rule", rule, f"{' or '.join(sorted(rules))} (method {method})")
    allowed = {stream.fuse, False} if rule == own and "fuse" not in found else {stream.fuse and rule == own}
    _expect(type(fuse) is bool and fuse in allowed, f"{place}.fuse", fuse, f"{stream.fuse and rule == own}")


def _check_layer(place: str, layer: Any, tower: Tower, sizes: dict[str, Any], tokens: dict[str, int]) -> dict[str, int]:
    """Returns the tokens of each stream that the layer hands on."""
    _expect(isinstance(layer, dict), place, layer, "the sizes of a layer")
    for part in tower.parts:
        if part.is_attention:
            _check_heads(f"{place}.{part.name}", layer.get(part.name), part, sizes)
        else:
            kept, dense = layer.get(part.name), sizes[part.units]
            _expect(_count(kept, 1) and kept <= dense + PADDING, f"{place}.{part.name}", kept, f"1 to {dense} channels")
    for name in {*JSON_PARTS} - {part.name for part in tower.parts}:
        _expect(name not in layer, f"{place}.{name}", layer.get(name), f"none: the {tower.name} tower has no {name}")
    _expect("keep" in layer, f"{place}.keep", None, "a number of tokens, or null for all")
    if len(tower.streams) == 1:
        (stream,) = tower.streams
        return {stream.name: _check_keep(f"{place}.keep", layer["keep"], stream, tokens[stream.name])}
    keep = {} if layer["keep"] is None else layer["keep"]
    named = isinstance(keep, dict) and set(keep) <= set(tokens)
    _expect(named, f"{place}.keep", keep, f"null, or numbers of tokens of {', '.join(tokens)}")
    return {
        stream.name: _check_keep(f"{place}.keep.{stream.name}", keep.get(stream.name), stream, tokens[stream.name])
        for stream in tower.streams
    }


def _check_heads(place: str, found: Any, part: Part, sizes: dict[str, Any]) -> None:
    """The heads of an attention: those of a number of units, as wide as in the dense model."""
    units, heads, width = sizes[part.units], sizes[part.queries], width_of_head(sizes, part)
    group = heads // units
    names = ("num_heads", "head_dim", "scale", *(["num_key_value_heads"] if group > 1 else []))
    _expect(isinstance(found, dict) and set(found) == set(names), place, found, f"{', '.join(names[:-1])} and {names[-1]}")
    kept, wide, scale = (found[name] for name in ("num_heads", "head_dim", "scale"))
    whole = _count(kept, group) and kept <= heads and kept % group == 0
    _expect(whole, f"{place}.num_heads", kept, f"{group} to {heads}" + ("" if group == 1 else f", in groups of {group}"))
    if group > 1:
        shared = found["num_key_value_heads"]
        _expect(type(shared) is int and shared * group == kept, f"{place}.num_key_value_heads", shared, f"{kept // group}")
    said = f"{width} = {sizes['hidden_size']} / {heads}" if part.head_dim is None else f"{width}"
    _expect(_count(wide, 1) and wide == width, f"{place}.head_dim", wide, said)
    close = type(scale) in (int, float) and math.isclose(scale, width**-0.5, rel_tol=1e-6)
    _expect(close, f"{place}.scale", scale, f"{width**-0.5:.8g} = 1 / sqrt({width})")


def _check_keep(place: str, keep: Any, stream: Stream, tokens: int) -> int:
    """Returns the tokens of a stream that are handed on, of `tokens`; 0 where layers run as they are, and hand on all."""
    least = max(1, len(stream.protected))
    if keep is None:
        return tokens
    _expect(stream.prunable and tokens, place, keep, f"null: the {stream.name} tower keeps its tokens")
    _expect(_count(keep, least) and keep <= tokens, place, keep, f"{least} to {tokens} tokens, or null for all")
    return keep


def _tokens(stream: Stream, sizes: dict[str, Any]) -> int:
    """The most tokens of a stream that enter its tower."""
    if "image_size" in sizes:
        return (sizes["image_size"] // sizes["patch_size"]) ** 2 + stream.skips_first
    return sizes["max_position_embeddings"]


def _count(value: Any, least: int) -> bool:
    return type(value) is int and value >= least


def _expect(holds: Any, place: str, value: Any, expected: str, hint: str | None = None) -> None:
    if not holds:
        raise _refused(place, value, expected, hint)


def _refused(place: str, value: Any, expected: str, hint: str | None = None) -> RefusedError:
    hint = hint or "The block is not one that comp wrote for this model: write or fetch the folder again."
    return RefusedError(f"config.json: comp.{place} is {shown(value)}; expected {expected}.", hint=hint)
