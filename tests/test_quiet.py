"""Libraries do not speak: --quiet says nothing, --json one document and comp's own warnings, whatever a family is made of."""

import json
import subprocess
import sys
import warnings

import pytest
import tiny

from comp_cli.cli.output import Output
from comp_cli.cli.perform import own_warnings
from comp_cli.errors import explain, first_line

FEW = ["--num-samples", "4", "--eval-samples", "4", "--text-tokens", "12", "--device", "cpu", "--method", "magnitude"]
# All in one process, for importing takes longest; each ends with its exit code.
RUN = """
import json, sys
from comp_cli.cli import streams
streams.settle()
from comp_cli.cli.app import app
for words in json.loads(sys.argv[1]):
    try:
        app(words, prog_name="comp")
    except SystemExit as end:
        if end.code:
            raise
"""


SLOW = pytest.mark.slow
CASES = [("clip", "--quiet"), ("blip-caption", "--json")]
MORE = [pytest.param("clip", "--json", marks=SLOW), pytest.param("blip-caption", "--quiet", marks=SLOW)]


@pytest.mark.parametrize(("family", "mode"), CASES + MORE)
def test_commands_let_no_library_speak(family, mode, tmp_path):
    dense = str(tiny.write(family, tmp_path / "dense"))
    compact, served = str(tmp_path / "compact"), str(tmp_path / "served")
    commands = [
        ["analyze", dense, "--num-samples", "4", "--text-tokens", "12"],
        ["prune", dense, "--ratio", "0.3", "-o", compact, *FEW],
        ["export", compact, "--onnx", "-o", served],
        ["bench", compact, "--baseline", dense, "--iterations", "1", "--duration", "0", "--batch", "1", "--backend", "torch"],
    ]
    given = json.dumps([[*words, mode] for words in commands])
    done = subprocess.run([sys.executable, "-c", RUN, given], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if line]
    if mode == "--quiet":
        assert said == [] and done.stdout.splitlines() == [compact, served]
    else:
        documents = [json.loads(line) for line in done.stdout.splitlines()]
        told = [f"warning: {warning}" for document in documents for warning in document["warnings"]]
        assert len(documents) == 4 and said == told


def test_of_pythons_warnings_only_those_of_the_runtime_are_told(capsys):
    out = Output("human")
    with own_warnings(out):
        warnings.warn("`past_key_values` is deprecated", FutureWarning, stacklevel=1)
        warnings.warn("transformers 5.99.0 is not one that this runtime of compact models was tested with", stacklevel=1)
    assert out.warnings == ["transformers 5.99.0 is not one that this runtime of compact models was tested with"]
    assert "past_key_values" not in capsys.readouterr().err


def test_a_log_gets_no_bars_of_libraries():
    assert Output("human").shows_bars is False and Output("human").tells_progress


def test_messages_of_libraries_lose_their_colours():
    error = RuntimeError("Failed to export. \x1b[96mThis is step 1/3\x1b[0m of it\nmore")
    assert first_line(error) == "Failed to export. This is step 1/3 of it"
    assert "\x1b" not in explain(error).message and "This is step 1/3 of it" in explain(error).message
