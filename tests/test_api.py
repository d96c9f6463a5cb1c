"""`import comp_cli`: light, typed, silent, with the defaults and the sentences of the command line."""

import inspect
import json
import pickle
import subprocess
import sys
import typing
from dataclasses import MISSING, fields, is_dataclass
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

import comp_cli
from comp_cli import api, options
from comp_cli.cli.app import app
from comp_cli.cli.perform import OUTPUT
from comp_cli.option_values import EMPTY_IS_NONE

COMMANDS = ("analyze", "prune", "export", "bench", "compare")
FEW = {"num_samples": 8, "batch_size": 4, "text_tokens": 12, "device": "cpu"}
FAST = FEW | {"eval_samples": 8, "method": "joint"}
OF_THE_RUN = {"seconds", "cost", "output"}  # what differs from run to run


def python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


# What it gives -------------------------------------------------------------------------------------------------------


def test_the_import_is_light_and_stays_so_until_something_is_called():
    heavy = {"torch", "transformers", "numpy", "typer", "rich", "onnx", "onnxruntime", "datasets", "huggingface_hub"}
    code = (
        "import sys, comp_cli, inspect\n"
        "for name in comp_cli.__all__: getattr(comp_cli, name)\n"
        "inspect.signature(comp_cli.prune)\n"
        f"print(sorted({heavy} & set(sys.modules)))"
    )
    assert python(code) == "[]\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_functions_stay_functions_whatever_is_imported(name):
    for place in ("commands", "cli"):
        import_module(f"comp_cli.{place}.{name}")
    assert inspect.isfunction(getattr(comp_cli, name))


def test_every_name_is_there_and_no_other():
    assert set(comp_cli.__all__) <= set(dir(comp_cli))
    assert {place for names in comp_cli._PLACES.values() for place in names} == set(comp_cli.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'prunes'"):
        _ = comp_cli.prunes
    for error in (comp_cli.UsageError, comp_cli.RefusedError, comp_cli.GateError, comp_cli.DeviceError):
        assert issubclass(error, comp_cli.CompError)


@pytest.mark.parametrize("name", [*COMMANDS, "load", "load_onnx"])
def test_functions_are_typed_and_every_argument_is_described(name):
    function = getattr(comp_cli, name)
    signature, said = inspect.signature(function), inspect.getdoc(function)
    assert signature.return_annotation is not inspect.Signature.empty
    for parameter in signature.parameters.values():
        assert parameter.annotation is not inspect.Parameter.empty
        assert f"\n    {parameter.name}: " in said, parameter.name
    for heading in ("Args:", "Returns:", "Raises:", "Example:"):
        assert heading in said


# One place for every default -----------------------------------------------------------------------------------------


def typed(name):
    """The parameters of a command, but the terminal's."""
    command = next(found for found in app.registered_commands if found.callback.__name__ == name).callback
    own = {parameter.name: parameter for parameter in inspect.signature(command).parameters.values()}
    return {key: found for key, found in own.items() if found.annotation is not typer.Context and key not in OUTPUT}


def as_lists(name, value):
    parse = {"backend": api.parse_backends, "batch": api.parse_batches}.get(name, lambda value: value)
    return parse(value)


@pytest.mark.parametrize("name", COMMANDS)
def test_library_and_command_line_have_the_same_options_and_defaults(name):
    library = {key: found for key, found in inspect.signature(getattr(api, name)).parameters.items() if key != "progress"}
    command = typed(name)
    command.pop("onnx", None)  # the only format so far
    assert library.keys() == command.keys()
    for key, found in library.items():
        assert as_lists(key, found.default) == as_lists(key, command[key].default), key


@pytest.mark.parametrize("name", COMMANDS)
def test_defaults_are_those_of_the_options(name):
    """Of every dataclass that the command's options are made of."""
    library = inspect.signature(getattr(api, name)).parameters
    chosen = getattr(options, f"{name.capitalize()}Options")
    nested = [found.default for found in fields(chosen) if is_dataclass(found.default)]
    nested += [options.TokenOptions(), options.TargetOptions()] * (name == "prune")  # of other models, or in place of a ratio
    other_names = {"backends": "backend", "batches": "batch"}
    hub = [options.HubOptions] * (name != "compare")  # which reads files
    for cls in (chosen, *hub, *map(type, nested)):
        names = getattr(cls, "NAMES", {}) | other_names
        for found in fields(cls):
            key = names.get(found.name, found.name)
            if key == "image_tokens":
                continue
            if name == "export" and (cls is options.HubOptions or key in ("split", "label_column")):
                continue  # export reads folders, and its --split is another one
            if not is_dataclass(found.default) and key in library:
                expected = inspect.Parameter.empty if found.default is MISSING else found.default
                assert library[key].default == expected, key
            elif not is_dataclass(found.default):
                assert key in typed(name), key


# Silence and progress ------------------------------------------------------------------------------------------------


class Listener:
    """A progress that remembers what it was told."""

    shows_bars = False

    def __init__(self):
        self.told, self.open = [], 0

    def say(self, message):
        self.told.append(("say", message))

    def warn(self, message):
        self.told.append(("warn", message))

    def track(self, title, total):
        listener = self

        class Tracked:
            def __enter__(self):
                listener.told.append(("begin", title, total))
                listener.open += 1
                return self

            def advance(self, title=None, by=1):
                assert listener.open == 1  # one piece of work after the other
                listener.told.append(("advance", by))

            def __exit__(self, *error):
                listener.open -= 1
                listener.told.append(("end",))

        return Tracked()


@pytest.fixture(scope="module")
def pruned(tiny_folder, tmp_path_factory):
    folder, listener = tmp_path_factory.mktemp("api") / "compact", Listener()
    report = comp_cli.prune(tiny_folder, ratio=0.5, output=folder, progress=listener, **FAST)
    return folder, report, listener.told


def test_the_library_is_silent(tiny_folder, tmp_path, capfd, recwarn):
    report = comp_cli.prune(tiny_folder, ratio=0.5, output=tmp_path / "compact", **FAST)
    comp_cli.export(tmp_path / "compact", output=tmp_path / "served")
    comp_cli.load(tmp_path / "compact")
    assert capfd.readouterr() == ("", "")
    hidden = DeprecationWarning, PendingDeprecationWarning, ResourceWarning  # that Python itself does not show
    assert [str(warning.message) for warning in recwarn if not issubclass(warning.category, hidden)] == []
    assert len(report.warnings) == 1 and "calibrated on generated scenes" in report.warnings[0]


def test_a_progress_hears_all_in_order(pruned):
    _, report, told = pruned
    kinds = [entry[0] for entry in told]
    assert [entry[1] for entry in told if entry[0] == "warn"] == list(report.warnings)
    titles = [entry[1] for entry in told if entry[0] == "begin"]
    assert titles == ["gathering activations", "pruning", "recovering", "judging the dense model", "judging the compact model"]
    assert kinds.count("begin") == kinds.count("end") == len(titles) and kinds.index("say") < kinds.index("begin")
    inside = 0
    for entry in told:
        inside += {"begin": 1, "end": -1}.get(entry[0], 0)
        assert entry[0] != "advance" or inside == 1
    last = len(told) - 1 - told[::-1].index(("end",))
    assert ("say", "writing ...") in told[last:]


# Reports -------------------------------------------------------------------------------------------------------------


def test_a_report_is_typed_and_says_what_the_folder_says(pruned):
    folder, report, _ = pruned
    assert isinstance(report, comp_cli.PruneReport) and report.output == folder
    assert report.ratio == pytest.approx(1 - report.flops.compact / report.flops.dense, abs=1e-5)
    assert report.quality.agreement <= 1 and report.options.text_tokens == 12
    written = json.loads((folder / "comp_report.json").read_text())
    found = json.loads(json.dumps(report.to_json()))
    assert written == {key: value for key, value in found.items() if key not in OF_THE_RUN | {"warnings"}} | {
        "files": written["files"],
        "plan": json.loads(json.dumps(report.plan.to_json())),
    }
    assert isinstance(report.plan, comp_cli.Plan)
    with pytest.raises(AttributeError):
        report.ratio = 0.1


def test_the_library_does_what_the_command_line_does(pruned, tiny_folder, tmp_path):
    """The same weights, and the same document byte for byte, but for times and places."""
    folder, report, _ = pruned
    words = [word for name, value in FAST.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    result = CliRunner().invoke(app, ["prune", str(tiny_folder), "--ratio", "0.5", "-o", str(tmp_path / "c"), "--json", *words])
    assert result.exit_code == 0, result.output
    for name in ("model.safetensors", "config.json", "modeling_comp.py"):
        assert (tmp_path / "c" / name).read_bytes() == (folder / name).read_bytes()
    ours, theirs = (
        json.dumps({key: value for key, value in found.items() if key not in OF_THE_RUN | {"base_address"}})
        for found in (report.to_json(), json.loads(result.stdout))
    )
    assert ours == theirs


def test_a_dry_run_ends_with_an_estimate(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report = comp_cli.prune(str(tiny_folder), ratio=0.4, dry_run=True, **FAST)
    assert report.output is report.quality is None and report.estimate and report.plan.towers
    assert "quality" not in report.to_json() and report.to_json()["output"] is None
    assert list(tmp_path.iterdir()) == []


def test_analyze_takes_a_path(tiny_folder):
    report = comp_cli.analyze(Path(tiny_folder), **FEW)
    assert sum(sum(row.flops.values()) for row in report.layers) + report.flops.outside_layers == report.flops.total


@pytest.mark.parametrize(
    ("batch", "backend"), [([1, 8], ("torch", "onnx")), ("1,8", "torch,onnx"), ((1, 8, 1), [" torch", "onnx"])]
)
def test_bench_takes_lists_and_texts_with_commas(batch, backend, compact_folder, monkeypatch):
    from comp_cli.commands import bench

    monkeypatch.setattr(bench, "bench", lambda *given, **more: pytest.fail(str((given[0], given[1], given[2]))))
    with pytest.raises(pytest.fail.Exception) as called:
        comp_cli.bench(str(compact_folder), baseline=Path("org/name"), batch=batch, backend=backend)
    expected = (compact_folder.resolve(), "org/name", options.BenchOptions(backends=("torch", "onnx"), batches=(1, 8)))
    assert str(called.value) == str(expected)


# Errors --------------------------------------------------------------------------------------------------------------


def test_an_unknown_keyword_is_a_type_error(tiny_folder):
    for name in COMMANDS:
        with pytest.raises(TypeError, match="num_sample"):
            getattr(comp_cli, name)(tiny_folder, num_sample=3)


WRONG = [
    ("prune", {"ratio": 2}, "--ratio 2: expected a number between 0 and 1."),
    ("prune", {"ratio": float("nan")}, "--ratio nan: expected a number."),
    ("prune", {"ratio": "half"}, "--ratio half: expected a number, or several with commas, such as 0.3,0.5."),
    ("prune", {"ratio": None}, "--ratio is missing."),
    ("prune", {"ratio": 0.5, "seed": None}, "--seed None: expected a whole number."),
    ("prune", {"ratio": 0.5, "max_drop": True}, "--max-drop True: expected a number or None."),
    ("prune", {"ratio": 0.5, "task": ["itm"]}, "--task ['itm']: expected text or None."),
    ("prune", {"ratio": 0.5, "overwrite": "no"}, "--overwrite 'no': expected True or False."),
    ("prune", {"ratio": 0.5, "allow_pickle": 0}, "--allow-pickle 0: expected True or False."),
    ("prune", {"ratio": 0.5, "output": ""}, "--output is empty."),
    ("prune", {"ratio": 0.5, "output": Path("a\0b")}, "--output holds a zero byte."),
    ("prune", {"ratio": 0.5, "data": ["a.jsonl"]}, "--data ['a.jsonl']: expected text or a path or None."),
    ("prune", {"ratio": 0.5, "progress": print}, "--progress <built-in function print>: expected an object with say, warn"),
    ("export", {"split": "no"}, "--split 'no': expected True or False."),
    ("prune", {"ratio": 0.5, "method": "magic"}, "--method magic: unknown."),
    ("prune", {"ratio": 0.5, "num_samples": 0}, "--num-samples 0: expected a whole number from 1 to 10000000."),
    ("prune", {"ratio": 0.5, "train_batch_size": 0}, "--train-batch-size 0: expected a whole number from 1 to 10000000."),
    ("prune", {"ratio": 0.5, "device": "toaster"}, "--device toaster: not a device."),
    ("analyze", {"text_tokens": 3}, "--text-tokens 3: expected a whole number from 4 to 10000000."),
    ("analyze", {"seed": -1}, "--seed -1: expected a whole number from 0 to 4294967295."),
    ("export", {"opset": 9}, "--opset 9"),
    ("export", {"atol": -1}, "--atol -1: expected a number from 0."),
    ("bench", {"backend": ("torch", "tensorrt")}, "--backend torch,tensorrt: expected some of torch, onnx, compile"),
    ("bench", {"batch": b"1"}, "--batch b'1': expected text or a whole number or a list."),
    ("bench", {"batch": [True]}, "--batch True: expected numbers from 1 to 100000"),
    ("bench", {"batch": [1.5]}, "--batch 1.5: expected numbers from 1 to 100000"),
    ("bench", {"batch": [0]}, "--batch 0: expected numbers from 1 to 100000"),
    ("bench", {"min_speedup": -1}, "--min-speedup -1: expected a number from 0."),
]


OF_DATA = ("split", "image_column", "text_column", "label_column", "answer_column", "split_column")
UNUSED = [(name, option, "mine") for name in ("analyze", "prune", "export") for option in OF_DATA if option in typed(name)]
UNUSED.remove(("export", "split", "mine"))  # which is another one there
UNUSED += [(name, option, "") for name, option, _ in UNUSED if option in EMPTY_IS_NONE]


@pytest.mark.parametrize(("name", "option", "value"), UNUSED)
def test_what_is_said_of_data_that_nobody_names_is_refused(name, option, value, tmp_path, monkeypatch):
    """Before anything is opened, by the library and by the command line: generated scenes have no columns and no splits."""
    monkeypatch.chdir(tmp_path)
    sentence, ratio = f"--{option.replace('_', '-')} {value!r} without --data.", {"ratio": 0.5} if name == "prune" else {}
    with pytest.raises(comp_cli.UsageError) as refused:
        getattr(comp_cli, name)("nowhere", **{option: value}, **ratio)
    assert refused.value.message == sentence and "Name your pairs with --data" in refused.value.hint
    words = [f"--{option.replace('_', '-')}", value, *(["--ratio", "0.5"] if ratio else []), *["--onnx"] * (name == "export")]
    result = CliRunner().invoke(app, [name, "nowhere", *words, "--json"])
    assert result.exit_code == 2 and json.loads(result.stdout)["error"]["message"] == sentence


class Stopped:
    """In place of a command: it notes what it is given, and does no work."""

    def __init__(self, monkeypatch, place, name):
        monkeypatch.setattr(import_module(f"comp_cli.commands.{place}"), name, self)

    def __call__(self, *given, **more):
        self.given = given
        raise InterruptedError


@pytest.mark.parametrize("kind", [np.int64, np.int8, np.uint16])
def test_numbers_of_numpy_are_numbers(kind, monkeypatch, compact_folder):
    """They reach the commands, and so reports and journals, as Python's own."""
    done = Stopped(monkeypatch, "prune", "prune")
    numbers = {"num_samples": kind(16), "seed": kind(3), "stages": kind(4), "max_drop": kind(2)}
    with pytest.raises(InterruptedError):
        comp_cli.prune("demo", ratio=np.float32(0.5), epochs=kind(2), **numbers)
    wanted = done.given[0]
    assert (wanted.num_samples, wanted.seed, wanted.stages, wanted.ratio, wanted.training.epochs) == (16, 3, 4, 0.5, 2)
    assert {type(wanted.num_samples), type(wanted.seed), type(wanted.training.epochs)} == {int} and type(wanted.ratio) is float
    done = Stopped(monkeypatch, "bench", "bench")
    for batch in (kind(8), [kind(8)]):
        with pytest.raises(InterruptedError):
            comp_cli.bench(compact_folder, batch=batch, iterations=kind(1), duration=np.float64(0))
        assert done.given[2].batches == (8,) and type(done.given[2].batches[0]) is int


@pytest.mark.parametrize("wrong", [np.True_, np.float64(3.0), np.array([3]), torch.tensor(True), 3.0, True, "3"])
def test_what_is_no_whole_number_stays_none(wrong, tiny_folder):
    for name in ("num_samples", "seed"):
        with pytest.raises(comp_cli.UsageError, match=f"^--{name.replace('_', '-')} .*: expected a whole number"):
            comp_cli.analyze(tiny_folder, **{name: wrong})
    with pytest.raises(comp_cli.UsageError, match="^--ratio .*: expected a number"):
        comp_cli.prune(tiny_folder, ratio=np.array([0.5]))


def test_a_number_without_end_is_refused_with_a_sentence(tiny_folder):
    with pytest.raises(comp_cli.UsageError, match="^--seed 1000.*: expected a whole number from 0 to 4294967295"):
        comp_cli.prune(tiny_folder, ratio=0.5, seed=10**400)


@pytest.mark.parametrize(("name", "given", "sentence"), WRONG)
def test_wrong_values_are_refused_with_a_sentence(name, given, sentence, compact_folder, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tiny_folder if name in ("analyze", "prune") else compact_folder
    with pytest.raises(comp_cli.UsageError) as refused:
        getattr(comp_cli, name)(folder, **given)
    assert refused.value.message.startswith(sentence) and refused.value.report is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "given", "sentence"), [case for case in WRONG if "expected a whole number from" in case[2]])
def test_the_command_line_says_the_same(name, given, sentence, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [f"--{key.replace('_', '-')}={value}" for key, value in given.items()]
    result = CliRunner().invoke(app, [name, str(tiny_folder), *words, "--json"])
    assert result.exit_code == 2 and json.loads(result.stdout)["error"]["message"] == sentence


def test_a_missed_gate_carries_the_report(tiny_folder, tmp_path):
    with pytest.raises(comp_cli.GateError, match="--max-drop allows 0 points") as missed:
        comp_cli.prune(tiny_folder, ratio=0.9, output=tmp_path / "compact", max_drop=0, task="retrieval", **FAST)
    report = missed.value.report
    assert isinstance(report, comp_cli.PruneReport) and report.quality.agreement < 1 and report.output is None
    assert missed.value.document == report.to_json() and report.warnings and missed.value.exit_code == 3
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["analyze", "prune", "export", "bench", "load", "load_onnx"])
@pytest.mark.parametrize("wrong", [3, ["demo"], b"demo", "", "a\0b", "\udc80"])
def test_what_is_no_model_or_folder_is_refused(name, wrong):
    with pytest.raises(comp_cli.UsageError, match="^(MODEL|FOLDER) "):
        getattr(comp_cli, name)(wrong, **{"ratio": 0.5} if name == "prune" else {})


@pytest.mark.parametrize("kind", [comp_cli.CompError, comp_cli.UsageError, comp_cli.RefusedError, comp_cli.DeviceError])
def test_errors_come_whole_from_another_process(kind, pruned):
    report = pruned[1]
    for error in (kind("that", hint="this"), comp_cli.GateError("that", hint="this", report=report)):
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is type(error) and str(again) == "that" and vars(again) == vars(error)


def test_a_truth_is_no_number(tiny_folder):
    with pytest.raises(comp_cli.UsageError, match="--steps True: expected a whole number"):
        comp_cli.prune(tiny_folder, ratio=0.5, steps=True)


def test_a_model_that_is_none_is_refused(compact_folder, tmp_path):
    with pytest.raises(comp_cli.RefusedError, match="compact model already"):
        comp_cli.prune(compact_folder, ratio=0.5, output=tmp_path / "c")
    with pytest.raises(comp_cli.UsageError, match="no such folder"):
        comp_cli.export(tmp_path / "nowhere")


def test_hints_name_what_exists():
    """Type hints of the library can be read: what they name is there."""
    for name in COMMANDS:
        hints = typing.get_type_hints(getattr(api, name))
        assert hints["progress"] == comp_cli.Progress | None
