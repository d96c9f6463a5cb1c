"""Command lines, names of models, journals and tables with random content: an exit code and a sentence, never a defect."""

import json
import random

import fuzzing
import pytest
from fuzzing import examples, outcome
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from comp_cli.checkpoint import hub
from comp_cli.cli.app import app
from comp_cli.cli.output import Output
from comp_cli.commands import analyze, bench, export, prune
from comp_cli.data.sources import open_pairs
from comp_cli.errors import CompError
from comp_cli.search.journal import Journal

COMMANDS = ("analyze", "prune", "export", "bench")
WORDS = [
    "demo",
    "0.5",
    "-1",
    "nan",
    "1e400",
    "",
    " ",
    "--",
    "-",
    "0",
    "cpu",
    "comp",
    "json",
    "x" * 300,
    "a\0b",
    "é",
    "\udcff",
    "1,8",
    "torch",
]
FLAGS = [
    "--json", "--quiet", "-q", "--format", "--ratio", "--seed", "--batch-size", "--num-samples", "--text-tokens", "--device",
    "--dtype", "--method", "--data", "--split", "--task", "-o", "--output", "--overwrite", "--revision", "--cache-dir",
    "--allow-pickle", "--onnx", "--quantize", "--target", "--opset", "--atol", "--backend", "--batch", "--threads",
    "--iterations", "--duration", "--min-speedup", "--steps", "--epochs", "--lr", "--distill", "--max-drop", "--stages",
    "--no-recover", "--no-cip", "--dry-run", "--resume", "--no-resume", "--help", "--baseline", "--plot", "--no-progress",
    "--evil",
]  # fmt: skip
TOKENS = st.one_of(st.sampled_from(FLAGS), st.sampled_from(WORDS), st.text(max_size=6), st.integers(-(10**20), 10**20).map(str))


@pytest.fixture(scope="module")
def stubbed(tmp_path_factory):
    """The commands do nothing, in an empty folder; what is before them is real."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("fuzz"))
        for module, name in ((analyze, "analyze"), (prune, "prune"), (export, "export"), (bench, "bench")):
            patch.setattr(module, name, lambda *arguments, **options: {})
        yield


@examples(400)
@given(command=st.sampled_from(COMMANDS), tokens=st.lists(TOKENS, max_size=7))
def test_fuzz_command_lines(stubbed, command, tokens):
    result = CliRunner().invoke(app, [command, *tokens])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code in (0, 1, 2, 4, 5) and "defect" not in result.output and "Traceback" not in result.output


NAMES = st.one_of(
    st.text(max_size=20),
    st.sampled_from(["hf://", "https://", "http://", "org/", "./", "~", "demo", "Salesforce/", "datasets/", "%2e%2e/", "@"]),
    st.sampled_from(["blip-itm-base", "..", "\\", "\0", "\n", "é", "x" * 97, "?", "#", "main", ":"]),
)


@examples(500)
@given(parts=st.lists(NAMES, min_size=1, max_size=4), revision=st.none() | st.text(max_size=8))
def test_fuzz_names_of_models(parts, revision, tmp_path_factory):
    cache = tmp_path_factory.getbasetemp() / "fuzz-cache"
    typed = "".join(parts)
    if typed in ("demo", "", ".", "..") or typed.startswith(("/", "~", ".")):
        typed = "./gone/" + typed.replace(".", "")
    found = outcome(lambda: hub.resolve(typed, revision=revision, cache_dir=cache, progress=Output("quiet")))
    assert isinstance(found, CompError) and found.exit_code in (1, 2, 4)


SETTINGS = {"ratio": 0.5, "seed": 0}
STATE = {"stages": [{"mode": "x", "keep": [1, 2]}], "seconds": 3.5}


@examples(200)
@given(data=st.data())
def test_fuzz_journals(tmp_path_factory, data):
    """Whatever lies there: the state that was saved, or a refusal that says --no-resume."""
    journal = Journal(tmp_path_factory.getbasetemp() / "fuzz-journal", SETTINGS)
    journal.remove()
    journal.save(STATE)
    whole = journal.path.read_bytes()
    fuzzing.write(journal.path, data.draw(fuzzing.damaged(json.loads(whole)) | fuzzing.torn(whole)))
    found = outcome(journal.load)
    if isinstance(found, CompError):
        assert found.exit_code == 2 and "--no-resume" in found.hint
    else:
        assert found == STATE


# --- tables of pairs

CELLS = st.one_of(
    fuzzing.VALUES,
    st.sampled_from(
        ["a.png", "gone.png", "a red circle", {"path": 3}, {"bytes": "x"}, {"path": "a.png", "bytes": None}, [["x"]]]
    ),
)
ROWS = st.lists(
    st.dictionaries(
        st.sampled_from(["image", "text", "label", "answer", "question", "split", "caption", "x"]), CELLS, max_size=4
    ),
    max_size=5,
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tables")
    Image.new("RGB", (8, 8), (9, 99, 9)).save(folder / "a.png")
    return folder


def pairs_of(path):
    """What calibration and the comparison would read."""
    found = open_pairs(str(path), progress=Output("quiet"))
    return [list(found.read(purpose, 4)) for purpose in ("calibration", "evaluation")]


@examples(60)
@given(rows=ROWS, good=st.integers(0, 6))
def test_fuzz_rows_of_tables(pictures, rows, good):
    honest = [{"image": "a.png", "text": f"a red circle {number}"} for number in range(good)]
    rows = honest + rows
    random.Random(len(rows)).shuffle(rows)
    path = pictures / "table.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    outcome(lambda: pairs_of(path))


@examples(30)
@given(data=st.data(), kind=st.sampled_from(["table.csv", "table.jsonl"]))
def test_fuzz_bytes_of_tables(pictures, data, kind):
    whole = {
        "table.csv": b"image,text\n" + b'a.png,"a red, circle"\n' * 5,
        "table.jsonl": b'{"image": "a.png", "text": "a red circle"}\n' * 5,
    }
    path = pictures / kind
    path.write_bytes(data.draw(fuzzing.torn(whole[kind])))
    outcome(lambda: pairs_of(path))
