"""docs/schema describes what `--json` prints, and is made of the reports' dataclasses."""

import copy
import json
from pathlib import Path

import jsonschema
import pytest
import typer
from typer.testing import CliRunner

from comp_cli.cli.app import app
from comp_cli.report import schema

FOLDER = Path(__file__).parent.parent / "docs" / "schema"
FEW = ["--num-samples", "4", "--batch-size", "4", "--text-tokens", "12", "--device", "cpu"]
FAST = [*FEW, "--eval-samples", "4", "--method", "joint", "--ratio", "0.5"]  # for prune
SHORT = ["--backend", "torch", "--batch", "1", "--iterations", "1", "--duration", "0", "--device", "cpu", "--text-tokens", "12"]


def parts(node):
    """A schema and all that it is made of."""
    if isinstance(node, dict):
        yield node
        for value in node.values():
            yield from parts(value)
    elif isinstance(node, list):
        for value in node:
            yield from parts(value)


def strict(name):
    """The published schema, but a key that it does not know is refused."""
    found = copy.deepcopy(json.loads((FOLDER / f"{name}.json").read_text()))
    for part in parts(found):
        if "properties" in part:
            part["additionalProperties"] = False
    return found


def document(name, *words):
    result = CliRunner().invoke(app, [name, *map(str, words), "--json"])
    return result.exit_code, json.loads(result.stdout)


@pytest.mark.parametrize("name", schema.REPORTS)
def test_the_published_schema_is_that_of_the_dataclasses(name):
    assert (FOLDER / f"{name}.json").read_text() == json.dumps(schema.schema(name), indent=1) + "\n", "run: make schema"
    jsonschema.Draft202012Validator.check_schema(schema.schema(name))


@pytest.mark.parametrize("name", schema.REPORTS)
def test_every_field_is_described(name):
    for part in parts(schema.schema(name)):
        for field, said in part.get("properties", {}).items():
            assert said.get("description", "").strip(), field


def test_a_field_that_nobody_described_is_an_error():
    from dataclasses import make_dataclass

    with pytest.raises(KeyError, match="new"):
        schema.of_class(make_dataclass("Broken", [("new", int)]), {})


def test_documents_of_the_commands(tiny_folder, compact_folder, tmp_path):
    given = {
        "analyze": [tiny_folder, *FEW],
        "prune": [tiny_folder, "-o", tmp_path / "c", *FAST],
        "export": [compact_folder, "--onnx", "-o", tmp_path / "served"],
        "bench": [compact_folder, "--baseline", tiny_folder, *SHORT, "--save", tmp_path / "bench.json"],
        "compare": [tmp_path / "bench.json", tmp_path / "bench.json", "--max-regression", "5"],
        "env": [],
        "upgrade": [tmp_path / "c"],
    }
    asked_for = {"export": "agreement", "env": "packages", "upgrade": "changed"}
    assert set(given) == set(schema.REPORTS) - {"sweep"} == set(typer.main.get_command(app).commands)
    for name, words in given.items():
        code, found = document(name, *words)
        assert code == 0
        jsonschema.validate(found, strict(name))
        jsonschema.validate(found | {"error": {"code": 3, "message": "a gate.", "hint": None}}, strict(name))
        found.pop(asked_for.get(name, "flops"))
        with pytest.raises(jsonschema.ValidationError):  # the schema asks for what is there
            jsonschema.validate(found, strict(name))


def test_documents_of_failures_and_dry_runs(tiny_folder, compact_folder, tmp_path):
    cases = [
        ("prune", 0, [tiny_folder, "--dry-run", *FAST]),
        ("prune", 3, [tiny_folder, "-o", tmp_path / "c", "--max-drop", "0", "--task", "retrieval", *FAST[:-1], "0.9"]),
        ("prune", 2, [tiny_folder, "--ratio", "2"]),
        ("bench", 2, [compact_folder, "--batch", "many"]),
        ("analyze", 2, ["./nowhere"]),
        ("export", 4, [tiny_folder, "--onnx"]),
        ("export", 3, [compact_folder, "--onnx", "--atol", "0", "-o", tmp_path / "served"]),
        ("compare", 2, ["nowhere.json", "nowhere.json"]),
        ("compare", 2, ["nowhere.json"]),
        ("env", 2, ["--frobnicate"]),
        ("upgrade", 4, [tiny_folder]),
    ]
    cases += [(name, 0, ["--help"]) for name in schema.REPORTS if name != "sweep"]
    for name, expected, words in cases:
        code, found = document(name, *words)
        assert code == expected, (words, found)
        jsonschema.validate(found, strict(name))
        assert ("error" in found) == (code > 0)
