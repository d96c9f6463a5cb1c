"""What imports what: layers, one above the other, and no circles. docs/architecture.md lists the same layers."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "comp_cli"
PAGE = (ROOT / "docs" / "architecture.md").read_text()

# Folders and files of the package. A layer imports those before it, when it is imported or later.
LAYERS = (
    "errors privacy progress signals options option_values runtime topology families plan engine files data tasks "
    "checkpoint report models onnx measure search commands api cli"
).split()
# Of what others know besides, types alone: a topology is given batches, families and tasks; an error carries a report.
NAMED_ONLY = {("topology", "families"), ("topology", "data"), ("topology", "tasks"), ("errors", "report")}
# What a layer takes of those before it, where that is less than all.
ONLY = {
    "runtime": set(),
    "topology": {"runtime"},
    "families": {"errors", "topology"},
    "plan": {"families"},
    "engine": {"errors", "families", "plan", "runtime"},
    "files": {"errors", "signals"},
    "cli": {"api", "engine", "errors", "families", "option_values", "options", "progress", "report", "signals"},
}
TERMINAL = {"typer", "click", "rich"}
LIGHT = ["comp_cli", "comp_cli.families", "comp_cli.checkpoint.hub", "comp_cli.cli", "comp_cli.engine.methods", "comp_cli.plan"]


class Arrow(NamedTuple):
    source: str  # module
    target: str  # module of the package, or package of somebody else
    typed: bool  # for type checkers only


def modules() -> dict[str, Path]:
    paths = (path for path in PACKAGE.rglob("*.py") if not path.name.startswith("__main__"))
    named = {path: path.relative_to(ROOT).with_suffix("").parts for path in paths}
    return {".".join(parts).removesuffix(".__init__"): path for path, parts in named.items()}


@cache
def arrows() -> frozenset[Arrow]:
    return frozenset(arrow for name, path in modules().items() for arrow in arrows_of(name, path.read_text(), path.stem))


def arrows_of(name: str, source: str, stem: str) -> list[Arrow]:
    known, found, tree = modules(), [], ast.parse(source)
    blocks = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    typed = {id(inside) for block in blocks for inside in ast.walk(block)}
    package = name.split(".") if stem == "__init__" else name.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [Arrow(name, alias.name, id(node) in typed) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            targets = {f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base for alias in node.names}
            found += [Arrow(name, target, id(node) in typed) for target in sorted(targets)]
    return found


def layer_of(module: str) -> str:
    return (*module.split("."), "")[1]


def between_layers(typed: bool) -> set[tuple[str, str]]:
    """Pairs of layers, of which the first imports the second. The package itself is none: it has the version."""
    inside = [arrow for arrow in arrows() if arrow.target.split(".")[0] == "comp_cli" and arrow.typed == typed]
    pairs = {(layer_of(arrow.source), layer_of(arrow.target)) for arrow in inside}
    return {(source, target) for source, target in pairs if source and target and source != target}


def test_every_folder_and_file_is_in_a_layer_and_on_the_page():
    there = {layer_of(name) for name in modules()} - {""}
    assert there == set(LAYERS)
    (listed,) = re.findall(r"^    (errors .*(?:\n    .*)*)", PAGE, re.MULTILINE)
    assert listed.split() == LAYERS


def test_a_layer_imports_those_below_it():
    wrong = [pair for pair in between_layers(typed=False) if LAYERS.index(pair[0]) < LAYERS.index(pair[1])]
    assert not wrong
    wrong = [pair for pair in between_layers(typed=True) - NAMED_ONLY if LAYERS.index(pair[0]) < LAYERS.index(pair[1])]
    assert not wrong


@pytest.mark.parametrize("layer", ONLY)
def test_what_a_layer_takes(layer):
    assert {target for source, target in between_layers(typed=False) if source == layer} <= ONLY[layer]


def test_modules_import_in_no_circle():
    wanted: dict[str, set[str]] = {}
    for arrow in arrows():
        if not arrow.typed and arrow.target in modules() and arrow.target != "comp_cli":
            wanted.setdefault(arrow.source, set()).add(arrow.target)
    while free := [name for name, targets in wanted.items() if not targets & wanted.keys()]:
        for name in free:
            del wanted[name]
    assert not wanted


def test_only_the_command_line_knows_the_terminal():
    spoken = {layer_of(arrow.source) for arrow in arrows() if arrow.target.split(".")[0] in TERMINAL}
    assert spoken == {"cli"}


def test_families_need_no_torch():
    heavy = {"torch", "transformers", "numpy"}
    assert not [arrow for arrow in arrows() if layer_of(arrow.source) == "families" and arrow.target.split(".")[0] in heavy]


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_bring_nothing_heavy(module):
    code = (
        f"import sys, {module}; print(*{{'torch', 'transformers', 'onnx', 'datasets', 'huggingface_hub'}} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def test_arrows_are_seen_wherever_they_are():
    source = (
        "from typing import TYPE_CHECKING\nfrom .. import errors\nimport torch.nn\n"
        "if TYPE_CHECKING:\n    from ..plan import Plan\ndef later():\n    from .base import Part\n"
    )
    found = {arrow[1:] for arrow in arrows_of("comp_cli.families.llava", source, "llava")}
    inside = {("comp_cli.errors", False), ("comp_cli.plan", True), ("comp_cli.families.base", False)}
    assert found == inside | {("typing", False), ("torch.nn", False)}
