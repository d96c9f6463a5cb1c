"""Reports from their documents: the way back of `base.plain`. Of what others may have written, so nothing is believed."""

import math
import types
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from ..errors import RefusedError
from .base import Report, written

R = TypeVar("R", bound=Report)
EXPECTED = {str: "text", bool: "true or false", int: "a whole number", float: "a number", Path: "text", types.NoneType: "null"}


def read_report(kind: type[R], document: dict[str, Any], about: str) -> R:
    """The report that a document tells. about: its name in messages. Keys that the report does not know are passed over.

    Raises RefusedError for another version of the schema, for a key that is missing, and for values of other types."""
    version = document.get("schema_version")
    if version != kind.SCHEMA_VERSION or isinstance(version, bool):
        raise RefusedError(f"{about}: schema_version {version!r}: expected {kind.SCHEMA_VERSION}.")
    found: R = _read(kind, document, about, "")
    return found


def _read(kind: Any, value: Any, about: str, place: str) -> Any:
    """A value of an annotated type. place: where it stands, such as "timings[0].median"."""
    origin, inside = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _read_one_of(inside, value, about, place)
    if kind is Any:
        return value
    if isinstance(kind, type) and is_dataclass(kind):
        _expect(isinstance(value, dict), about, place, "an object", value)
        annotated = get_type_hints(kind)
        lacking = [f.name for f in written(kind) if f.name not in value and not f.metadata.get("if_known")]
        if lacking:
            raise RefusedError(f"{about}: {place or 'the document'} has no {lacking[0]!r}.", hint="Measure and save it again.")
        start = f"{place}." if place else ""
        fields = {f.name: value[f.name] for f in written(kind) if f.name in value}
        return kind(**{name: _read(annotated[name], one, about, start + name) for name, one in fields.items()})
    if origin in (list, tuple):
        _expect(isinstance(value, list), about, place, "a list", value)
        return origin(_read(inside[0], one, about, f"{place}[{index}]") for index, one in enumerate(value))
    if origin is dict:
        _expect(isinstance(value, dict), about, place, "an object", value)
        return {name: _read(inside[1], one, about, f"{place}.{name}") for name, one in value.items()}
    return _read_plain(kind, value, about, place)


def _read_one_of(kinds: tuple[Any, ...], value: Any, about: str, place: str) -> Any:
    """A value of one of several types, None for a null where that is one of them."""
    if value is None and types.NoneType in kinds:
        return None
    others = [kind for kind in kinds if kind is not types.NoneType]
    return _read(others[0], value, about, place)


def _read_plain(kind: Any, value: Any, about: str, place: str) -> Any:
    if kind is float:
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        _expect(number, about, place, EXPECTED[kind], value)
        return float(value)
    held = {Path: str}.get(kind, kind)
    _expect(isinstance(value, held) and (kind is bool or not isinstance(value, bool)), about, place, EXPECTED[kind], value)
    return kind(value) if kind is Path else value


def _expect(fits: bool, about: str, place: str, wanted: str, value: Any) -> None:
    if not fits:
        said = str(value) if isinstance(value, int | float) else type(value).__name__
        raise RefusedError(f"{about}: {place or 'the document'}: expected {wanted}, found {said[:40]}.")
