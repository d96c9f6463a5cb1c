"""`--recipe` and [tool.comp] of pyproject.toml: what reaches the commands, what is refused, and what is said of it."""

import functools
import json

import pytest
from typer.testing import CliRunner

from comp_cli import api
from comp_cli.cli.app import app
from comp_cli.errors import UsageError


def comp(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """What the functions of the library are called with; none of them does anything. Runs in an empty folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".git").mkdir()  # nothing above it is looked at
    calls = []

    def replaced(function):
        @functools.wraps(function)
        def call(**keywords):
            calls.append(keywords)
            raise UsageError("that was all.")

        return call

    for name in ("analyze", "prune", "export", "bench", "compare", "upgrade"):
        monkeypatch.setattr(api, name, replaced(getattr(api, name)))
    return calls


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


# What reaches the commands -------------------------------------------------------------------------------------------

WHOLE = """
model = "demo"
seed = 3
device = "cpu"
[prune]
ratio = [0.3, 0.5]
num-samples = 16
eval_samples = 8
max-drop = 1
no-explore = true
history = false
modes = ["vision_params", "vision_tokens"]
dtype = "bf16"
max_memory = 1000000
[export]
onnx = true
split = true
opset = 20
[bench]
batch = 1
backend = "torch"
"""


def test_every_command_takes_its_table_and_what_all_share(asked, tmp_path):
    write(tmp_path / "comp.toml", WHOLE)
    for name in ("prune", "export", "bench", "analyze"):
        assert "that was all." in comp(name, "--recipe", "comp.toml").stderr, name
    prune, export, bench, analyze = asked
    assert (prune["model"], prune["ratio"], prune["seed"], prune["num_samples"], prune["eval_samples"]) == (
        "demo",
        "0.3,0.5",
        3,
        16,
        8,
    )
    assert (prune["explore"], prune["history"], prune["dtype"], prune["max_memory"]) == (False, False, "bf16", "1000000")
    assert prune["max_drop"] == 1.0 and prune["modes"] == "vision_params,vision_tokens"
    assert export["split"] is True and export["device"] == "cpu" and "seed" not in export
    assert bench["batch"] == "1" and bench["backend"] == "torch" and bench["seed"] == 3
    assert analyze["model"] == "demo" and analyze["num_samples"] == 32  # the default: 16 is for prune


def test_what_is_typed_goes_first(asked, tmp_path):
    write(tmp_path / "comp.toml", WHOLE)
    comp("prune", "other", "--recipe", "comp.toml", "--ratio", "0.7", "--explore", "--num-samples", "4")
    assert (asked[0]["model"], asked[0]["ratio"], asked[0]["explore"], asked[0]["num_samples"]) == ("other", "0.7", True, 4)
    assert asked[0]["eval_samples"] == 8


def test_every_option_can_stand_in_a_recipe(asked, tmp_path):
    """Without a second list: whatever a command takes."""
    import typer

    from comp_cli.cli.recipes import annotations, options

    for name, command in typer.main.get_command(app).commands.items():
        known = options(command)
        missing = {p.name for p in command.params} - {p.name for p, _ in known.values()}
        assert missing <= {"recipe", "help"}, name
        for parameter, _ in known.values():
            annotation, typed = annotations(command, parameter)
            assert annotation is not None and typed


def test_paths_start_at_the_folder_of_the_recipe(asked, tmp_path):
    (tmp_path / "ci" / "pairs").mkdir(parents=True)
    text = 'model = "./mine"\ndata = "pairs"\n[prune]\nratio = 0.5\noutput = "out/compact"\n[analyze]\nmodel = "org/name"\n'
    write(tmp_path / "ci" / "comp.toml", text)
    comp("prune", "--recipe", "ci/comp.toml")
    comp("prune", "--recipe", "ci/comp.toml", "-o", "here")
    comp("analyze", "--recipe", "ci/comp.toml")
    assert (asked[0]["model"], asked[0]["data"], str(asked[0]["output"])) == ("ci/./mine", "ci/pairs", "ci/out/compact")
    assert str(asked[1]["output"]) == "here"
    assert asked[2]["model"] == "org/name"  # which lies nowhere beside the recipe: a name on the hub
    (tmp_path / "ci" / "demo").mkdir()
    write(tmp_path / "ci" / "comp.toml", 'model = "demo"')
    comp("analyze", "--recipe", "ci/comp.toml")
    assert asked[3]["model"] == "demo"  # as on the command line


def test_the_mode_of_output_can_stand_there(asked, tmp_path):
    write(tmp_path / "comp.toml", 'format = "json"\n[prune]\nratio = 0.5')
    assert json.loads(comp("prune", "demo", "--recipe", "comp.toml").stdout)["error"]["message"] == "that was all."
    assert comp("prune", "demo", "--recipe", "comp.toml", "-q").stdout == ""  # typed: the other one does not count
    write(tmp_path / "comp.toml", 'json = true\n[prune]\ndtype = "fp8"')
    refused = comp("prune", "demo", "--recipe", "comp.toml")
    assert refused.exit_code == 2 and "comp.toml, [prune], dtype: 'fp8'" in json.loads(refused.stdout)["error"]["message"]


# What is refused -----------------------------------------------------------------------------------------------------

REFUSED = {
    "an option that is none": (
        "[prune]\nratoi = 0.5",
        "comp.toml, [prune], ratoi: comp prune has no such option. Did you mean ratio?",
    ),
    "one of another command": ("[prune]\nbatch = 1", "comp.toml, [prune], batch: comp prune has no such option."),
    "in the table of another command": (
        "[bench]\niteration = 5",
        "comp.toml, [bench], iteration: comp bench has no such option.",
    ),
    "one that no command has": ("nums = 1", "comp.toml, nums: no such option"),
    "a table that is none": ("[prun]\nratio = 0.5", "comp.toml, [prun]: no such table. Did you mean prune?"),
    "a table that is a number": ("prune = 1", "comp.toml, prune: expected a table, found a whole number (1)."),
    "text for a number": ('[prune]\nseed = "one"', "comp.toml, [prune], seed: expected a whole number, found text ('one')."),
    "a fraction for a whole number": ("[prune]\nseed = 1.5", "seed: expected a whole number, found a number (1.5)."),
    "a boolean for a number": ("[prune]\nseed = true", "seed: expected a whole number, found a boolean (True)."),
    "text for a boolean": ('[prune]\nuniform = "no"', "uniform: expected true or false, found text ('no')."),
    "a list for a text": ('[prune]\ntask = ["itm"]', "task: expected text, found a list."),
    "a table for a text": ("[prune.task]\na = 1", "comp.toml, [prune], task: expected text, found a table."),
    "a date": ("[prune]\nratio = 2020-01-01", "ratio: expected a number or text or a list, found a date or time."),
    "lists in a list": ("[prune]\nratio = [[0.5]]", "ratio: expected a list of texts or numbers."),
    "an empty text": ('[prune]\noutput = ""', "comp.toml, [prune], output is empty."),
    "a zero byte": ('[prune]\noutput = "a\\u0000b"', "comp.toml, [prune], output holds a zero byte."),
    "the same twice": ("[prune]\nnum_samples = 4\nnum-samples = 5", "num-samples: num_samples says it already."),
    "the same with its opposite": ("[prune]\nrecover = true\nno-recover = true", "no-recover: recover says it already."),
    "a choice that is none": ('[prune]\nmethod = "magic"', "comp.toml, [prune], method: 'magic' is not one of 'comp'"),
    "a shared choice that is none": ('dtype = "fp8"', "comp.toml, dtype: 'fp8' is not one of"),
    "not finite": ("[prune]\nlr = nan", "nan is not a finite number"),
    "another recipe": ('[prune]\nrecipe = "b.toml"', "recipe: comp prune has no such option."),
    "no TOML": ("[prune\nratio = 1", "comp.toml: not valid TOML ("),
    "no text": ("\udcff", "comp.toml: not valid TOML ("),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_with_file_table_and_key(case, asked, tmp_path):
    content, sentence = REFUSED[case]
    (tmp_path / "comp.toml").write_bytes(content.encode("utf-8", "surrogateescape"))
    result = comp("prune", "demo", "--recipe", "comp.toml", "--json")
    assert result.exit_code == 2 and sentence in json.loads(result.stdout)["error"]["message"]
    assert not asked


@pytest.mark.parametrize("name", ["nowhere.toml", ".", "/dev/zero", ""])
def test_a_recipe_that_is_no_file(name, asked):
    result = comp("prune", "demo", "--recipe", name, "--json")
    assert result.exit_code == 2 and json.loads(result.stdout)["error"]["message"]


def test_a_recipe_that_is_too_long(asked, tmp_path):
    write(tmp_path / "comp.toml", "# " + "a" * 2**20)
    assert "larger than 1 MiB" in comp("env", "--recipe", "comp.toml").stderr


def test_what_the_library_refuses_is_found_in_the_recipe(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "comp.toml", "seed = 3\n[prune]\nratio = 7.0\n")
    found = json.loads(comp("prune", "demo", "--recipe", "comp.toml", "--json").stdout)["error"]
    assert found["message"].startswith("--ratio 7.0") and found["hint"].endswith("See comp.toml, [prune], ratio.")
    found = json.loads(comp("prune", "demo", "--recipe", "comp.toml", "--json", "--ratio", "8").stdout)["error"]
    assert "comp.toml" not in found["hint"]


# pyproject.toml ------------------------------------------------------------------------------------------------------


def test_a_project_is_followed_and_said(asked, tmp_path, monkeypatch):
    write(tmp_path / "pyproject.toml", '[tool.comp]\nseed = 5\n[tool.comp.prune]\nratio = 0.4\noutput = "out"\n')
    (tmp_path / "a" / "b").mkdir(parents=True)
    for folder, way in ((".", ""), ("a/b", "../../")):
        monkeypatch.chdir(tmp_path / folder)
        for mode in ("human", "json", "quiet", "github", "markdown"):
            asked.clear()
            result = comp("prune", "demo", "--format", mode)
            assert (asked[0]["ratio"], asked[0]["seed"], str(asked[0]["output"])) == ("0.4", 5, f"{way}out")
            assert f"options from {way}pyproject.toml: --seed 5, --ratio 0.4, --output {way}out" in " ".join(
                result.stderr.split()
            )
        result = comp("prune", "demo", "--ratio", "0.3", "-o", "x", "--seed", "1")
        assert "options from" not in result.stderr  # nothing is


def test_a_named_recipe_is_in_the_place_of_the_project(asked, tmp_path):
    write(tmp_path / "pyproject.toml", "[tool.comp.prune]\nratio = 0.4\nseed = 4\n")
    write(tmp_path / "comp.toml", "[prune]\nratio = 0.5\n")
    comp("prune", "demo", "--recipe", "comp.toml")
    comp("prune", "demo", "--recipe", "/dev/null")
    assert (asked[0]["ratio"], asked[0]["seed"]) == ("0.5", 0) and asked[1]["ratio"] is None


def test_a_project_without_the_table_hides_none_above_it_and_a_repository_ends_the_search(asked, tmp_path, monkeypatch):
    write(tmp_path / "pyproject.toml", "[tool.comp.prune]\nratio = 0.4\n")
    write(tmp_path / "a" / "pyproject.toml", "[tool.ruff]\nline-length = 3\n")
    (tmp_path / "a" / "own" / ".git").mkdir(parents=True)
    for folder, ratio in (("a", "0.4"), ("a/own", None)):
        asked.clear()
        monkeypatch.chdir(tmp_path / folder)
        comp("prune", "demo")
        assert asked[0]["ratio"] == ratio


PROJECTS = {
    "an option that is none": (
        "[tool.comp.prune]\nratoi = 1",
        "pyproject.toml, [tool.comp.prune], ratoi: comp prune has no such",
    ),
    "no table": ("[tool]\ncomp = 3", "pyproject.toml, tool.comp: expected a table."),
    "no TOML": ("[tool", "pyproject.toml: not valid TOML"),
    "what a stranger may not decide": (
        "[tool.comp.prune]\nallow-pickle = true",
        "allow-pickle: only the command line and a recipe",
    ),
    "what goes to the hub": ('[tool.comp.prune]\npush-to-hub = "a/b"', "push-to-hub: only the command line and a recipe"),
}


@pytest.mark.parametrize("case", PROJECTS)
def test_what_a_project_cannot_say(case, asked, tmp_path):
    content, sentence = PROJECTS[case]
    write(tmp_path / "pyproject.toml", content)
    result = comp("prune", "demo", "--json")
    assert result.exit_code == 2 and sentence in json.loads(result.stdout)["error"]["message"] and not asked


def test_a_recipe_that_is_named_may_say_all(asked, tmp_path):
    write(tmp_path / "comp.toml", '[prune]\nallow-pickle = true\npush-to-hub = "a/b"')
    comp("prune", "demo", "--recipe", "comp.toml")
    assert asked[0]["allow_pickle"] is True and asked[0]["push_to_hub"] == "a/b"


def test_help_and_completion_read_no_project(asked, tmp_path):
    write(tmp_path / "pyproject.toml", "[tool")
    assert comp("prune", "--help").exit_code == 0


# The way on ----------------------------------------------------------------------------------------------------------


def test_an_interrupted_run_goes_on_by_the_same_command(tiny_folder, tmp_path, monkeypatch):
    """Also where the recipe says that nothing is to go on: and the journal is that of the same options typed."""
    from comp_cli.commands import prune

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    sizes = "num-samples = 8\nbatch-size = 4\ntext-tokens = 12\neval-samples = 8\n"
    recipe = (
        f'model = "{tiny_folder}"\ndevice = "cpu"\n[prune]\nratio = 0.5\nmethod = "comp"\noutput = "c"\nresume = false\n{sizes}'
    )
    write(tmp_path / "comp.toml", recipe)
    with monkeypatch.context() as patched:
        patched.setattr(prune, "write_checkpoint", interrupted)
        result = comp("prune", "--recipe", "comp.toml")
    assert result.exit_code == 130
    assert "goes on where it was: comp prune --recipe comp.toml --resume" in " ".join(result.stderr.split())
    result = comp("prune", "--recipe", "comp.toml", "--resume", "--json")
    assert result.exit_code == 0 and "going on after" in result.stderr + result.stdout or result.exit_code == 0
    card = (tmp_path / "c" / "README.md").read_text()
    assert "--ratio 0.5" in card and "--num-samples 8" in card and "recipe" not in card
    assert json.loads(result.stdout)["options"]["num_samples"] == 8


def test_the_next_command_repeats_what_the_recipe_says_of_the_data(tiny_folder, tmp_path, monkeypatch):
    from tiny import table

    monkeypatch.chdir(tmp_path)
    data = table(tmp_path, caption=lambda n: f"text {n}", label=lambda n: n % 2)
    write(
        tmp_path / "comp.toml",
        f'model = "{tiny_folder}"\ndata = "{data}"\nlabel-column = "label"\n'
        "[analyze]\nnum-samples = 4\nbatch-size = 4\ntext-tokens = 12\n",
    )
    result = comp("analyze", "--recipe", "comp.toml", "--device", "cpu")
    assert f"--data {data}" in result.stdout.replace("\n", "") and "--text-tokens 12" in result.stdout
