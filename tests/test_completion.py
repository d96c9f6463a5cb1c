"""Completion as shells ask for it, and that help, parser and library know the same values."""

import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from comp_cli import options, tasks
from comp_cli.cli import choices
from comp_cli.cli.app import app
from comp_cli.engine.methods import METHODS
from comp_cli.engine.token_schedules import TOKEN_METHODS
from comp_cli.onnx.rewrite import QUANTIZERS


def completed(line: str) -> list[str]:
    """What bash is told for a line whose last word is to be completed."""
    words = line.split(" ")
    environment = {"_COMP_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    done = subprocess.run([sys.executable, "-P", "-m", "comp_cli"], capture_output=True, text=True, env=environment | path())
    return done.stdout.split()


def path() -> dict[str, str]:
    import os

    return {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "HOME") if name in os.environ}


CLOSED = {
    "prune demo --method ": list(METHODS),
    "prune demo --method comp": ["comp", "comp-paper"],
    "prune demo --dtype ": options.DTYPES,
    "prune demo --effort ": list(options.EFFORTS),
    "prune demo --saliency k": ["key-norm"],
    "prune demo --mixed-precision ": options.MIXED_PRECISIONS,
    "prune demo --tokens-method d": [name for name in TOKEN_METHODS if name.startswith("d")],
    "analyze demo --task ": list(tasks.TASKS),
    "export --quantize ": options.QUANTIZATIONS,
    "export --layout ": options.LAYOUTS,
    "export --target o": options.TARGETS,
    "export --format ": ["human", "json", "markdown", "github", "quiet"],
    "bench --backend ": options.BACKENDS,
    "bench --backend torch,": ["torch,onnx", "torch,compile"],
    "bench --device c": ["cpu", "cuda"],
    "comp": ["compare"],
    "prune --rec": ["--recover", "--recipe"],
}


@pytest.mark.parametrize("line", CLOSED)
def test_shells_know_the_values(line):
    assert sorted(completed(f"comp {line}")) == sorted(CLOSED[line])


def test_every_value_comes_from_one_place():
    assert set(choices.METHODS) == set(METHODS) and set(choices.TASKS) == set(tasks.TASKS)
    assert options.QUANTIZATIONS == tuple(QUANTIZERS)


def test_help_lists_the_values(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    group = typer.main.get_command(app)
    for name, wanted in (("prune", ["fp32|bf16|fp16", "no|fp16|bf16"]), ("export", ["int8|int4", "onnxruntime|onnx"])):
        said = CliRunner().invoke(app, [name, "--help"]).stdout
        assert name in group.commands and all(values in said for values in wanted), said
