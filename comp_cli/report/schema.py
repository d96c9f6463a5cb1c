"""JSON schemas of the reports, made of their dataclasses: `python -m comp_cli.report.schema docs/schema` writes them.

A field's description is its line under "Attributes" in the docstring of its class.
"""

import json
import re
import sys
import types
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from .analyze import AnalyzeReport
from .base import Report, written
from .bench import BenchReport
from .compare import CompareReport
from .environment import EnvironmentReport
from .export import ExportReport
from .prune import PruneReport
from .sweep import SweepReport
from .upgrade import UpgradeReport

REPORTS: dict[str, type[Report]] = {
    "analyze": AnalyzeReport,
    "prune": PruneReport,
    "sweep": SweepReport,
    "export": ExportReport,
    "bench": BenchReport,
    "compare": CompareReport,
    "env": EnvironmentReport,
    "upgrade": UpgradeReport,
}
TITLES = {"sweep": "prune --ratio A,B"}
NAMES = {str: "string", bool: "boolean", int: "integer", float: "number", Path: "string", type(None): "null"}
ERROR = {
    "type": "object",
    "description": "Why the command failed. A command that fails before its report is complete writes only this.",
    "properties": {
        "code": {"type": "integer", "description": "exit code."},
        "message": {"type": "string", "description": "what went wrong, in a sentence."},
        "hint": {"type": ["string", "null"], "description": "what to do next."},
    },
    "required": ["code", "message", "hint"],
}


def schema(name: str) -> dict[str, Any]:
    """The JSON schema of a command's document, also of one that says why it failed."""
    definitions: dict[str, Any] = {}
    found = of_class(REPORTS[name], definitions)
    properties = {
        "schema_version": {"const": Report.SCHEMA_VERSION, "description": "version of this schema."},
        **found["properties"],
        "error": ERROR,
        "help": {"type": "string", "description": "what --help says, where it was asked for a document."},
    }
    always = ["schema_version", "warnings"]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"comp {TITLES.get(name, name)} --json",
        "description": found["description"],
        "type": "object",
        "properties": properties,
        "required": always,
        "anyOf": [
            {"required": [n for n in found["required"] if n not in always]},
            {"required": ["error"]},
            {"required": ["help"]},
        ],
        "$defs": dict(sorted(definitions.items())),
    }


def of_class(cls: type, definitions: dict[str, Any]) -> dict[str, Any]:
    """The schema of a dataclass; those of the dataclasses in it go to `definitions`."""
    text, described = read_docstring(cls)
    types_ = get_type_hints(cls)
    chosen = written(cls)
    properties = {f.name: of_type(types_[f.name], definitions) | {"description": described[f.name]} for f in chosen}
    required = [f.name for f in chosen if not f.metadata.get("if_known")]
    return {"type": "object", "description": text, "properties": properties, "required": required}


def of_type(kind: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    """The schema of a type as it is annotated. Raises TypeError for one that JSON does not have."""
    origin, inside = get_origin(kind), get_args(kind)
    if kind is Any:
        return {}
    if kind in NAMES:
        return {"type": NAMES[kind]}
    if origin in (Union, types.UnionType):
        return union([of_type(one, definitions) for one in inside])
    if origin in (list, tuple):
        return {"type": "array", "items": of_type(inside[0], definitions)}
    if origin is dict:
        return {"type": "object", "additionalProperties": of_type(inside[1], definitions)}
    if isinstance(kind, type) and is_dataclass(kind):
        if kind.__name__ not in definitions:
            definitions[kind.__name__] = of_class(kind, definitions)
        return {"$ref": f"#/$defs/{kind.__name__}"}
    raise TypeError(f"{kind} has no JSON schema")


def union(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """One of several schemas, in a word where all are plain types."""
    if all(part.keys() == {"type"} and isinstance(part["type"], str) for part in parts):
        return {"type": [part["type"] for part in parts]}
    return {"anyOf": parts}


def read_docstring(cls: type) -> tuple[str, dict[str, str]]:
    """What a dataclass is, and its fields by name, those of the classes above it among them."""
    fields: dict[str, str] = {}
    text = ""
    for one in reversed(cls.__mro__):
        text, _, listed = (one.__doc__ or "").partition("Attributes:")
        for name, said in re.findall(r"^ {8}(\w+): (.+(?:\n {12}.+)*)", listed, re.MULTILINE):
            fields[name] = " ".join(said.split())
    return " ".join(text.split()), fields


def main(folder: str) -> None:
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    for name in REPORTS:
        (place / f"{name}.json").write_text(json.dumps(schema(name), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
