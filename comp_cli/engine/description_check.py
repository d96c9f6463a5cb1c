"""A family's description on its own, and against the names of real weights: what it speaks of has to be there, once.

Sizes are compared in parts.py. What no name and no size tells (keys in the place of values, where both are alike) shows when
the model of a dense plan is compared with the stock one, as tests/test_families.py does.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import RefusedError
from ..families import Family, Part, Stream, Tower, tower_config

Shape = tuple[int, ...]
SOURCES, PROTECTED, READ = ("image", "text", "answer", "newline"), ("first", "last", "end"), ("first", "last", None)
HINT = "Mend the family's description, see families/base.py and docs/architecture.md."


def check_description(config: Mapping[str, Any], family: Family, shapes: Mapping[str, Shape]) -> None:
    """Raises RefusedError where a description contradicts itself, or names what neither config.json nor the weights have.

    config: the whole config.json, defaults filled in. shapes: of the weights, by their names.
    """
    _once(f"the towers of {family.name}", (tower.name for tower in family.towers))
    _once(f"the streams of {family.name}", (stream.name for tower in family.towers for stream in tower.streams))
    before: list[str] = []  # streams of the towers before
    for tower in family.towers:
        where = f"the {tower.name} tower"
        _expect(not tower.config or tower.config in config, where, f"config.json has no {tower.config}")
        _check_tower(where, tower, tower_config(dict(config), tower), shapes)
        for part in tower.parts:
            there = part.reads is None or part.reads in before
            known = ", ".join(before) or "none"
            _expect(there, where, f"the part {part.name} reads the stream {part.reads}; of towers before it there are: {known}")
        for stream in tower.streams:
            _check_stream(f"the stream {stream.name} of {where}", stream)
        before += [stream.name for stream in tower.streams]
    _check_outside(family, shapes)


def _check_tower(where: str, tower: Tower, sizes: Mapping[str, Any], shapes: Mapping[str, Shape]) -> None:
    from ..runtime.modeling_comp import LAYERS, LAYOUT_DEFAULTS  # brings torch

    orders = (*LAYERS, "stock")
    _expect(tower.order in orders, where, f"order is {tower.order!r}, expected one of {', '.join(orders)}")
    _expect(tower.streams, where, "no tokens go through it: it has no streams")
    _once(f"the parts of {where}", (part.name for part in tower.parts))
    _once(f"the matrices of {where}", (path for part in tower.parts for path in (*part.rows, part.column)))
    ranks = any(part.is_attention and part.reads is None for part in tower.parts)
    _expect(ranks, where, "none of its parts is a self-attention, which ranks the tokens")
    _expect_number(where, tower.depth, sizes)
    for part in tower.parts:
        _check_part(f"the part {part.name} of {where}", part, sizes)
    root = f"{tower.encoder}.{tower.layers}.0."
    inside = {name.removeprefix(root) for name in shapes if name.startswith(root)}
    _expect(inside, where, f"the weights have no layer {root[:-1]}")
    norms = (tower.norms or LAYOUT_DEFAULTS["norms"]) if tower.order == "pre_norm" else ()
    for path in (*norms, *([tower.mlp] if tower.mlp else []), *tower.whole, *tower.unused):
        _expect(_has(inside, path), where, f"it names {path}, and nothing in {root[:-1]} is called so")
    for path in (*tower.whole, *tower.unused):
        named = [one for part in tower.parts for one in (*part.rows, part.column) if f"{one}.".startswith(f"{path}.")]
        _expect(not named, where, f"{path} stays as it is, and yet a part names {next(iter(named), '')}")
    if tower.text_end is not None:
        _expect(_has(shapes, tower.text_end), where, f"text_end is {tower.text_end}, and the weights have nothing of that name")


def _check_part(where: str, part: Part, sizes: Mapping[str, Any]) -> None:
    for name in (part.units, *([part.queries] if part.is_attention else [])):
        _expect_number(where, name, sizes)
    if part.is_attention:
        three = len(part.rows) * part.copies == 3 and part.copies in (1, 3)
        _expect(
            three, where, f"its queries, keys and values are {len(part.rows)} matrices of {part.copies} each, expected three"
        )
        outside = [path for path in part.rows if not path.startswith(f"{part.module}.")]
        _expect(not outside, where, f"{next(iter(outside), '')} is not inside its module {part.module}")


def _check_stream(where: str, stream: Stream) -> None:
    from ..runtime.modeling_comp import TOKEN_RULES  # brings torch

    _expect(stream.source in SOURCES, where, f"source is {stream.source!r}, expected one of {', '.join(SOURCES)}")
    unknown = [name for name in stream.protected if name not in PROTECTED]
    _expect(not unknown, where, f"{next(iter(unknown), '')!r} cannot be protected, only {', '.join(PROTECTED)}")
    _expect(stream.class_token in READ, where, f"class_token is {stream.class_token!r}, expected first, last or None")
    _expect(stream.rule in TOKEN_RULES, where, f"rule is {stream.rule!r}, expected one of {', '.join(TOKEN_RULES)}")
    asks = TOKEN_RULES[stream.rule].class_token
    _expect(not asks or stream.class_token is not None, where, f"the rule {stream.rule} asks a token that it does not have")


def _check_outside(family: Family, shapes: Mapping[str, Shape]) -> None:
    """What lies outside of the layers: matrices with the number of their inputs, and a pooling head."""
    where, often = f"{family.name}.fixed", {"once", "patches", "features", *(tower.name for tower in family.towers)}
    images = any(stream.source == "image" for _, stream in family.streams.values())
    for path, times in family.fixed.items():
        _expect(matching(path, shapes), where, f"the weights have no {path}.weight")
        _expect(times in often, where, f"{path} is used {times!r}, expected one of {', '.join(sorted(often))}")
        _expect(images or times != "patches", where, f"{path} is used for patches, and no stream is of images")
        inside = [tower.name for tower in family.towers if path.startswith(f"{tower.encoder}.{tower.layers}.")]
        _expect(not inside, where, f"{path} is in a layer of the {', '.join(inside)} tower")
    if family.pooling is not None:
        fits = images and _has(shapes, family.pooling)
        _expect(fits, f"{family.name}.pooling", f"{family.pooling} needs weights of that name and a stream of images")


def _expect_number(where: str, name: str, sizes: Mapping[str, Any]) -> None:
    number = sizes.get(name)
    _expect(type(number) is int and number > 0, where, f"{name} of its config is {number!r}, expected a number from 1")


def matching(path: str, shapes: Mapping[str, Shape]) -> list[str]:
    """The weights at a path of `Family.fixed`, in which `*` stands for any number."""
    if "*" not in path:
        return [f"{path}.weight"] if f"{path}.weight" in shapes else []
    pattern = re.compile(re.escape(f"{path}.weight").replace(r"\*", r"\d+"))
    return [name for name in shapes if pattern.fullmatch(name)]


def _has(names: Iterable[str], path: str) -> bool:
    return any(name.startswith(f"{path}.") for name in names)


def _once(what: str, names: Iterable[str]) -> None:
    twice = [name for name, number in Counter(names).items() if number > 1]
    _expect(not twice, what, f"{next(iter(twice), '')} is there twice")


def _expect(holds: object, where: str, problem: str) -> None:
    if not holds:
        raise RefusedError(f"{where}: {problem}.", hint=HINT)
