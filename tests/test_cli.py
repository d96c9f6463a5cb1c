"""What a user types: results, exit codes, sentences. Never a traceback."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from tiny import table
from typer.testing import CliRunner

from comp_cli.cli.app import app
from comp_cli.report.base import Texts, Values
from comp_cli.report.prune import Quality

FEW = ["--num-samples", "8", "--batch-size", "4", "--text-tokens", "12", "--device", "cpu"]
FAST = [*FEW, "--eval-samples", "8"]  # for prune


def comp(*arguments):
    """Run a command; no output may hold a traceback."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert "Traceback" not in result.output
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(scope="module")
def compact(tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "compact"
    result = comp("prune", tiny_folder, "--ratio", 0.5, "-o", folder, *FAST)
    assert result.exit_code == 0, result.output
    return folder


def test_export_takes_every_column_that_its_data_may_need(compact, tmp_path):
    """Each name reaches the table: one that is not there is refused, before any graph is made."""
    (tmp_path / "pairs.csv").write_text("image,text\n0.png,a\n")
    for role in ("image", "text", "answer", "split"):
        given = ("--data", tmp_path / "pairs.csv", f"--{role}-column", f"my {role}")
        result = comp("export", compact, "--onnx", "-o", tmp_path / "served", *given)
        assert result.exit_code == 2 and f"no column 'my {role}'" in result.output


@pytest.mark.parametrize("form", ["two words", "one word"])
def test_an_empty_name_says_that_there_is_no_such_column(tiny_folder, tmp_path, form):
    """As the questions about labels and splits advise."""
    data = table(tmp_path, caption=lambda n: f"text {n}", label=lambda n: n % 2, answer=lambda n: "a", split=lambda n: n % 3)
    roles = ("label", "answer", "split")
    given = [word for role in roles for word in ([f"--{role}-column", ""] if form == "two words" else [f"--{role}-column="])]
    result = comp("analyze", tiny_folder, "--data", data, "--json", *given, *FEW)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["pairs"]["calibration"]
    assert found["rows"] == found["pairs"] + found["left_out"].get("kept for evaluation", 0) > 0
    assert comp("analyze", tiny_folder, "--data", data, "--text-column", "", *FEW).exit_code == 2


# The main job --------------------------------------------------------------------------------------------------------


def test_prune_ends_with_a_table_and_the_next_command(tiny_folder, tmp_path):
    result = comp("prune", tiny_folder, "--ratio", 0.5, "-o", tmp_path / "c", *FAST)
    assert result.exit_code == 0
    for word in ("parameters", "FLOPs per pair", "vision tokens", "weights on disk", "prediction agreement", "comp export"):
        assert word in result.stdout
    assert "calibrated on generated scenes" in result.stderr


def test_prune_as_json_is_one_document(tiny_folder, tmp_path):
    result = comp("prune", tiny_folder, "--ratio", 0.5, "-o", tmp_path / "c", "--json", *FAST)
    document = json.loads(result.stdout)
    assert document["schema_version"] == 1 and document["output"] == str(tmp_path / "c")
    assert document["ratio"] == pytest.approx(0.5, abs=0.01)
    assert document["params"]["compact"] < document["params"]["dense"]
    assert document["size_bytes"]["compact"] < document["size_bytes"]["dense"]
    assert len(document["warnings"]) == 1


def test_the_same_seed_gives_the_same_bytes(tiny_folder, tmp_path):
    for name in ("a", "b"):
        assert comp("prune", tiny_folder, "--ratio", 0.4, "-o", tmp_path / name, *FAST).exit_code == 0
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_quiet_prints_the_path(tiny_folder, tmp_path):
    result = comp("prune", tiny_folder, "--ratio", 0.5, "-o", tmp_path / "c", "-q", *FAST)
    assert result.stdout == f"{tmp_path / 'c'}\n"


def test_dry_run_prints_the_plan_and_writes_nothing(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = comp("prune", tiny_folder, "--ratio", 0.5, "--dry-run", *FAST)
    assert result.exit_code == 0 and "vision 0" in result.stdout and "language 3" in result.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["comp", "wanda"])
def test_methods(tiny_folder, tmp_path, method):
    result = comp("prune", tiny_folder, "--ratio", 0.3, "--method", method, "-o", tmp_path / "c", "--json", *FAST)
    assert json.loads(result.stdout)["options"]["method"] == method


def test_analyze(tiny_folder):
    result = comp("analyze", tiny_folder, "--json", *FEW)
    document = json.loads(result.stdout)
    layers = document["layers"]
    assert len(layers) == 9
    inside = sum(sum(layer["flops"].values()) for layer in layers)
    assert inside + document["flops"]["outside_layers"] == document["flops"]["total"]
    inside = sum(sum(layer["params"].values()) for layer in layers)
    assert inside + document["params"]["outside_layers"] == document["params"]["total"]
    assert all(0 <= row["tokens"] < 1 and 0 <= row["ffn"] < 1 for row in document["inequality"])
    found = document["diagnostics"]
    assert [(row["tower"], row["layer"]) for row in found["layers"]] == [(row["tower"], row["layer"]) for row in layers]
    assert (
        set(found["layers"][-1]["overlap"]) == {"attention", "cross", "ffn"} and found["layers"][0]["influence"]["least_heads"]
    )
    said = comp("analyze", tiny_folder, *FEW, "--score-rows", "0").stdout
    assert "cross" in said and "Cross-mode interference" in said and "30 % least important heads" in said.replace("\n", " ")


def test_score_rows_reach_the_plan(tiny_folder, tmp_path):
    document = json.loads(comp("analyze", tiny_folder, "--json", "--score-rows", "7", *FEW).stdout)
    assert document["score_rows"] == {"vision": 7, "language": 0}
    result = comp("prune", tiny_folder, "--ratio", 0.3, "--method", "token", "--score-rows", "7", "-o", tmp_path / "c", *FAST)
    assert result.exit_code == 0
    vision, language = json.loads((tmp_path / "c" / "config.json").read_text())["comp"]["towers"]
    assert (vision["score_rows"], language["score_rows"]) == (7, 0)


def test_parameters_of_the_analysis_are_those_of_the_model(stock, tiny_folder):
    document = json.loads(comp("analyze", tiny_folder, "--json", *FEW).stdout)
    assert document["params"]["total"] == sum(p.numel() for p in stock.parameters())
    first = document["layers"][0]["params"]
    assert sum(first.values()) == sum(p.numel() for p in stock.vision_model.encoder.layers[0].parameters())
    text = next(layer for layer in document["layers"] if layer["tower"] == "language")["params"]
    crossing = stock.text_encoder.encoder.layer[0].crossattention
    assert text["cross"] == sum(p.numel() for p in crossing.parameters())


def test_commands_without_a_folder_take_the_last_compact_model(compact, monkeypatch):
    monkeypatch.chdir(compact.parent)
    result = comp("export", "-o", "served")
    assert result.exit_code == 0, result.output
    assert f"taking {compact}" in result.stderr
    assert (compact.parent / "served" / "model.onnx").exists()


# Bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", ["0", "1", "-0.5", "1.5", "nan", "inf", "abc"])
def test_bad_ratios(tiny_folder, tmp_path, ratio):
    result = comp("prune", tiny_folder, "--ratio", ratio, "-o", tmp_path / "c")
    assert result.exit_code == 2
    assert not (tmp_path / "c").exists()


def test_a_ratio_out_of_reach(tiny_folder, tmp_path):
    result = comp("prune", tiny_folder, "--ratio", "0.995", "-o", tmp_path / "c", *FAST)
    assert result.exit_code == 1 and "cannot be reached" in result.stderr and "Try --ratio" in result.stderr
    assert list(tmp_path.iterdir()) == []


def config_of(folder, tmp_path, **changes):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text()) | changes
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def test_an_unknown_architecture(tiny_folder, tmp_path):
    folder = config_of(tiny_folder, tmp_path, architectures=["BlipForImageTextRetrievalX"])
    result = comp("prune", folder, "--ratio", 0.5, "-o", tmp_path / "c")
    assert result.exit_code == 4 and "Supported: BlipForConditionalGeneration" in result.stderr


def test_a_compact_model_is_not_pruned_again(compact, tmp_path):
    result = comp("prune", compact, "--ratio", 0.5, "-o", tmp_path / "c")
    assert result.exit_code == 4 and "compact model already" in result.stderr


def test_a_head_count_that_does_not_divide(tiny_folder, tmp_path):
    config = json.loads((tiny_folder / "config.json").read_text())
    folder = config_of(tiny_folder, tmp_path, vision_config=config["vision_config"] | {"num_attention_heads": 7})
    assert comp("analyze", folder, *FEW).exit_code == 4


def test_a_corrupt_config(tiny_folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_folder, copy)
    (copy / "config.json").write_text("{ not json")
    assert comp("analyze", copy).exit_code == 4


def test_a_folder_without_processor(tiny_folder, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny_folder / name, copy)
    result = comp("prune", copy, "--ratio", 0.5, "-o", tmp_path / "c")
    assert result.exit_code == 4 and "no tokenizer files" in result.stderr


def test_an_output_that_exists(tiny_folder, compact, tmp_path):
    result = comp("prune", tiny_folder, "--ratio", 0.5, "-o", compact, *FAST)
    assert result.exit_code == 2 and "--overwrite" in result.stderr
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("mine")
    result = comp("prune", tiny_folder, "--ratio", 0.5, "-o", tmp_path / "notes", "--overwrite", *FAST)
    assert result.exit_code == 2 and (tmp_path / "notes" / "thesis.txt").read_text() == "mine"


def test_the_model_is_never_overwritten(tiny_folder):
    result = comp("prune", tiny_folder, "--ratio", 0.5, "-o", tiny_folder, "--overwrite", *FAST)
    assert result.exit_code == 2 and (tiny_folder / "model.safetensors").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["prune", "./nowhere", "--ratio", "0.5"],
        ["prune", "demo"],
        ["analyze", "demo", "--frobnicate"],
        ["analyze", "demo", "--num-samples", "0"],
        ["analyze", "demo", "--device", "toaster"],
        ["analyze", "demo", "--format", "xml"],
        ["prune", "demo", "--ratio", "0.5", "--dtype", "fp8"],
        ["prune", "demo", "--ratio", "0.5", "--method", "magic"],
        ["export", "./nowhere", "--onnx"],
        ["export", "./nowhere"],
        ["export", ".", "--no-onnx"],
        ["bench", "./nowhere"],
    ],
)
def test_wrong_usage(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = comp(*arguments)
    assert result.exit_code == 2 and result.stderr.strip()
    assert list(tmp_path.iterdir()) == []


def test_export_wants_a_compact_model_and_options_that_can_be(compact, tiny_folder, tmp_path):
    """ONNX is the only format: --onnx names it, and says nothing more."""
    assert comp("export", tiny_folder, "-o", tmp_path / "x").exit_code == 4
    assert comp("export", tiny_folder, "--onnx", "-o", tmp_path / "x").exit_code == 4
    assert comp("export", compact, "--onnx", "--opset", 9, "-o", tmp_path / "x").exit_code == 2
    assert comp("export", compact, "--onnx", "--target", "tflite", "-o", tmp_path / "x").exit_code == 2


@pytest.mark.parametrize(
    ("options", "code", "sentence"),
    [
        (["--dtype", "fp8"], 2, "'fp8' is not one of 'fp32', 'bf16', 'fp16'"),
        (["--quantize", "int2"], 2, "'int2' is not one of 'int8', 'int4'"),
        (["--quantize", "int8", "--dtype", "fp16"], 2, "starts from fp32"),
        (["--layout", "genai"], 2, "'genai' is not one of"),
        (["--layout", "transformers.js"], 2, "transformers.js has no BLIP"),
        (["--layout", "transformers.js", "--split"], 2, "Leave --split out"),
        (["--layout", "transformers.js", "--with-preprocessing"], 2, "transformers.js prepares pictures itself"),
        (["--optimize", "--target", "onnx"], 2, "only ONNX Runtime knows"),
        (["--dtype", "bf16"], 5, "nothing is written unchecked"),
        (["--device", "tpu"], 2, "--device tpu"),
    ],
)
def test_export_refuses_what_makes_no_sense(compact, tmp_path, options, code, sentence):
    result = comp("export", compact, "--onnx", *options, "-o", tmp_path / "x")
    assert (result.exit_code, sentence in " ".join(result.stderr.split())) == (code, True)
    assert not list(tmp_path.iterdir())


def test_nothing_to_take_below_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for command in (["export", "--onnx"], ["bench"]):
        result = comp(*command)
        assert result.exit_code == 2 and "comp prune demo" in result.stderr


@pytest.mark.parametrize(
    "arguments", [["--backend", "tensorrt"], ["--batch", "0"], ["--batch", "many"], ["--backend", ""], ["--plot", "a.txt"]]
)
def test_bench_options(compact, arguments):
    assert comp("bench", compact, *arguments).exit_code == 2


def test_a_missed_gate_of_the_bench_exits_3_with_the_whole_report(compact):
    fast = ["--backend", "torch", "--batch", 1, "--iterations", 1, "--duration", 0, "--device", "cpu"]
    result = comp("bench", compact, *fast, "--max-latency-ms", 0.001, "--min-speedup", 0, "--json")
    assert result.exit_code == 3
    document = json.loads(result.stdout)
    assert document["error"]["code"] == 3 and len(document["timings"]) == 3
    assert {row["gate"]: row["passed"] for row in document["gates"]} == {"min_speedup": True, "max_latency_ms": False}
    assert "--max-latency-ms 0.001 not met" in result.stderr


@pytest.mark.parametrize("command", [["bench"], ["analyze"], ["prune", "--ratio", "0.5"]])
def test_cuda_without_a_gpu(compact, tiny_folder, tmp_path, monkeypatch, command):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    monkeypatch.chdir(tmp_path)
    model = compact if command[0] == "bench" else tiny_folder
    result = comp(command[0], model, *command[1:], "--device", "cuda")
    assert result.exit_code == 5 and "cuda" in result.stderr.lower()
    if command == ["bench"]:
        result = comp("bench", model, "--backend", "onnx", "--device", "cuda:0", "--json")
        assert result.exit_code == 5 and "CUDAExecutionProvider" in json.loads(result.stdout)["error"]["message"]
    assert list(tmp_path.iterdir()) == []


def test_what_the_parser_refuses_is_a_document_too():
    command = [sys.executable, "-m", "comp_cli", "prune", "demo", "--ratio", "abc", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and json.loads(done.stdout)["error"]["code"] == 2


def test_a_processor_that_does_not_fit(tiny_folder, tmp_path):
    from tiny import blip_processor

    copy = tmp_path / "copy"
    shutil.copytree(tiny_folder, copy)
    blip_processor(64).save_pretrained(copy)
    result = comp("analyze", copy, *FEW)
    assert result.exit_code == 4 and "processor" in result.stderr


def test_a_base_model_is_found_from_anywhere(compact, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = comp("bench", compact, "--backend", "torch", "--batch", 1, "--iterations", 1, "--duration", 0, "--json")
    assert json.loads(result.stdout)["baseline"] == "tiny-blip"


def test_failures_are_documents_too(tmp_path):
    result = comp("prune", "demo", "--ratio", "2", "--json")
    document = json.loads(result.stdout)
    assert result.exit_code == 2 and document["error"]["code"] == 2
    assert document["error"]["message"] and document["error"]["hint"]


def test_ctrl_c(tiny_folder, tmp_path, monkeypatch):
    from comp_cli.commands import prune

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(prune, "write_checkpoint", interrupted)
    result = comp("prune", tiny_folder, "--ratio", 0.5, "-o", tmp_path / "c", *FAST)
    assert result.exit_code == 130 and "same command goes on" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == [".c.journal"]


# The command itself --------------------------------------------------------------------------------------------------


def python(code, **environment):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment)


def test_help_imports_nothing_heavy():
    code = "import sys; from comp_cli.cli.app import app\ntry: app(['--help'])\nexcept SystemExit: pass\n"
    done = python(code + "print('HEAVY' if {'torch', 'transformers', 'onnx'} & set(sys.modules) else 'light')")
    assert done.stdout.strip().endswith("light") and "analyze" in done.stdout


@pytest.mark.parametrize("command", ["analyze", "prune", "export", "bench"])
def test_every_help_has_examples(command):
    result = comp(command, "--help")
    assert result.exit_code == 0 and f"comp {command} " in result.stdout


def test_help_says_what_each_method_is(monkeypatch):
    from comp_cli.engine.methods import METHODS

    monkeypatch.setenv("COLUMNS", "200")
    said = comp("prune", "--help").stdout
    assert all(f"{name}: {method.description}" in said for name, method in METHODS.items())


def test_stdout_holds_only_the_document(tiny_folder):
    command = [sys.executable, "-W", "always", "-m", "comp_cli", "analyze", str(tiny_folder), "--json", *FEW]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["architecture"] == "BlipForImageTextRetrieval"


def test_version():
    assert comp("--version").stdout.startswith("comp ")


def test_a_drop_that_is_not_allowed(tiny_folder, tmp_path, monkeypatch):
    """Exit 3 and no folder; the advice that is given, another ratio, then runs."""
    from comp_cli.commands import prune as command

    measured = {"metric": "accuracy", "metrics": {"accuracy": Values(0.9, 0.88)}, "agreement": 0.95}
    quality = Quality(samples=8, data="", divergence=0.0, texts=Texts(0, 8, 24), shared_texts=0, **measured)
    monkeypatch.setattr(command, "compare", lambda *given: (quality, 1.0))
    given = ["prune", tiny_folder, "--ratio", "0.5", "-o", tmp_path / "compact", "--method", "joint", *FAST]
    result = comp(*given, "--max-drop", "1", "--json")
    assert result.exit_code == 3 and not (tmp_path / "compact").exists()
    assert "accuracy falls from 90.0 % to 88.0 %" in json.loads(result.stdout)["error"]["message"]
    assert "less than one of 8 pairs" in result.stderr
    assert not list(tmp_path.iterdir())
    given[3] = "0.4"
    assert comp(*given, "--max-drop", "2.5").exit_code == 0
    assert comp(*given, "--overwrite", "--max-drop", "-1").exit_code == 2


def test_the_demo_model_was_trained_for_one_task():
    result = comp("analyze", "demo", "--task", "retrieval", "--num-samples", "2", "--device", "cpu")
    assert result.exit_code == 0 and "never trained for retrieval" in result.stderr
    assert "comp prune demo --ratio 0.5 --task retrieval --device cpu -o compact" in result.stdout


def test_a_task_that_the_model_is_not_for(tiny_folder, tmp_path):
    result = comp("prune", tiny_folder, "--ratio", "0.5", "-o", tmp_path / "compact", "--task", "caption")
    assert result.exit_code == 2 and "this model is for itm, retrieval, zero-shot" in result.stderr
