"""Commands on the second of two pretended GPUs (pretended_gpus.py) do what they do on the CPU, to rounding, and leave the first
one alone. Kernels are the CPU's there: what a GPU computes otherwise, `pytest -m gpu` finds on one."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from accelerate import Accelerator
from pretended_gpus import gpus, pretend  # noqa: F401  (a fixture)
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel

import comp_cli
from comp_cli.measure import memory, memory_process
from comp_cli.search.trainer import Trainer

GPU = "cuda:1"
FEW = {"num_samples": 4, "eval_samples": 4, "text_tokens": 8, "batch_size": 2}
QUICK = FEW | {"looks": 1}
TRAINED = QUICK | {"steps": 2, "train_batch_size": 2}
TOKENS = {"method": "vitcop", "tokens": 9}
SLOW = pytest.mark.slow
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "an encoder, trained": ("clip", TRAINED | {"ratio": 0.5}),
    "a decoder": ("llava", QUICK | {"ratio": 0.3}),
    "image tokens, refitted": ("llava", TOKENS | {"refit": True, "num_samples": 4, "eval_samples": 4, "data": True}),
}
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"comp of {family}": (family, FEW | {"ratio": 0.5}) for family in tiny.FAMILIES},
    **{f"comp of {family}": (family, FEW | {"ratio": 0.2}) for family in tiny.DECODERS if family != "smolvlm"},
    **{
        method: ("clip", FEW | {"ratio": 0.369, "method": method})
        for method in ("joint", "obs", "taylor", "upop", "cls", "random")
    },
    **{f"decoder, {method}": ("llava", FEW | {"ratio": 0.3, "method": method}) for method in ("wanda", "taylor", "upop")},
    "as published": ("blip", FEW | {"ratio": 0.5, "method": "comp-paper", "stages": 3, "steps": 4, "train_batch_size": 2}),
    "training a decoder": ("llava", TRAINED | {"ratio": 0.3}),
    "training captions": ("blip-caption", TRAINED | {"ratio": 0.5}),
    "one size in all layers": ("llava", FEW | {"ratio": 0.3, "uniform": True, "modes": "vision_params,language_params"}),
    "all modes": ("llava", QUICK | {"ratio": 0.3, "modes": "vision_params,language_params,image_tokens"}),
    "ranked by attention": ("llava", QUICK | {"ratio": 0.3, "tokens_method": "attention"}),
    "image tokens, trained": ("llava", TOKENS | {"steps": 2, "train_batch_size": 2, "eval_samples": 4, "data": True}),
    "a size": ("clip", QUICK | {"target_size": "400kB"}),
    "a drop": ("clip", QUICK | {"max_drop": 50}),
}


def prune(folder: Path, family: str, home: Path, device: str, **options: Any) -> tuple[Path, dict[str, Any]]:
    """A compact folder, and its report without what names the device."""
    output = home / device.replace(":", "-")
    comp_cli.prune(folder, output=output, device=device, task=tiny.TASKS.get(family), **options)
    report = json.loads((output / "comp_report.json").read_text())
    for name in ("command", "files"):
        del report[name]
    del report["options"]["device"]
    return output, report


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def with_data(options: dict[str, Any], home: Path) -> dict[str, Any]:
    if not options.get("data"):
        return options
    data = tiny.table(home, question=lambda n: "a red circle", answer=lambda n: ["red", "blue"][n % 2])
    return options | {"data": data, "text_column": "question", "answer_column": "answer"}


def same(found: Any, expected: Any) -> None:
    """Two documents, numbers to rounding."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
    if isinstance(expected, dict | list):
        assert len(found) == len(expected)
        for key in expected if isinstance(expected, dict) else range(len(expected)):
            same(found[key], expected[key])
    else:
        assert found == (pytest.approx(expected, rel=1e-3, abs=1e-6) if isinstance(expected, float) else expected)


@pytest.mark.parametrize("name", [*CASES, *(pytest.param(name, marks=SLOW) for name in MORE)])
def test_what_is_pruned_there_is_what_is_pruned_here(name, tmp_path):
    family, options = (CASES | MORE)[name]
    folder = tiny.write(family, tmp_path / "dense")
    options = with_data(options, tmp_path)
    with sdpa_kernel(SDPBackend.MATH):  # which is the one that a pretended GPU has
        here, expected = prune(folder, family, tmp_path, "cpu", **options)
    with pretend() as memory:
        there, found = prune(folder, family, tmp_path, GPU, **options)
        assert memory.peak[1] > 0 and memory.peak[0] == 0
    assert (there / "config.json").read_bytes() == (here / "config.json").read_bytes()
    same(found, expected)
    tensors, wanted = weights(there), weights(here)
    assert tensors.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(tensors[name], tensor, atol=2e-4, rtol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_a_real_gpu_prunes_to_what_is_asked(name, tmp_path):
    """Random weights have near ties, which its rounding decides otherwise: the plan is another, not its size and its worth."""
    family, options = CASES[name]
    folder = tiny.write(family, tmp_path / "dense")
    options = with_data(options, tmp_path)
    (here, expected), (there, found) = (prune(folder, family, tmp_path, device, **options) for device in ("cpu", "cuda"))
    assert found["ratio"] == pytest.approx(expected["ratio"], abs=0.01)
    assert found["quality"]["divergence"] == pytest.approx(expected["quality"]["divergence"], rel=0.5, abs=0.05)
    assert weights(there).keys() == weights(here).keys() and comp_cli.load(there, device="cuda")


def test_runs_of_one_program_train_where_and_how_each_is_told(tmp_path, monkeypatch):
    """accelerate has one state a process, which the first who asks would settle for all."""
    real, seen = Trainer._loss, []

    def remembering(self, model, batch):
        seen.append((self.accelerator.device.type, self.accelerator.mixed_precision))
        return real(self, model, batch)

    monkeypatch.setattr(Trainer, "_loss", remembering)
    folder, ways = tiny.write("clip-text", tmp_path / "dense"), [("cpu", "no"), (GPU, "bf16"), ("cpu", "bf16"), (GPU, "no")]
    theirs = Accelerator(cpu=True)
    for device, precision in ways:
        how = {"method": "magnitude", "recover": False, "steps": 1, "train_batch_size": 2, "mixed_precision": precision}
        with pretend() as memory:
            comp_cli.prune(folder, ratio=0.5, output=tmp_path / "compact", device=device, overwrite=True, **FEW | how)
            assert (memory.peak[1] > 0) == (device == GPU) and memory.peak[0] == 0
    assert seen == [(device.partition(":")[0], precision) for device, precision in ways]
    assert (theirs.device.type, theirs.mixed_precision) == ("cpu", "no")


def test_a_program_that_gathers_slopes_over_batches_goes_on_so_and_runs_do_not(tmp_path):
    folder = tiny.write("clip-text", tmp_path / "dense")
    how = FEW | {"ratio": 0.5, "method": "magnitude", "recover": False, "steps": 1, "train_batch_size": 2, "device": "cpu"}
    comp_cli.prune(folder, output=tmp_path / "alone", **how)
    theirs = Accelerator(cpu=True, gradient_accumulation_steps=4)
    with theirs.accumulate():  # its optimizer waits for three more batches
        assert not theirs.sync_gradients
        comp_cli.prune(folder, output=tmp_path / "beside", **how)
        assert not theirs.sync_gradients and theirs.gradient_accumulation_steps == 4
    alone, beside = (weights(tmp_path / name) for name in ("alone", "beside"))
    assert all(torch.equal(beside[name], tensor) for name, tensor in alone.items())
    theirs.gradient_accumulation_steps = 1  # of all that this process trains
    theirs.gradient_state._set_sync_gradients(True)


@pytest.fixture(scope="module", params=["clip", pytest.param("blip-caption", marks=SLOW), "llava"])
def folders(request, tmp_path_factory) -> tuple[Path, Path]:
    """A dense model and a compact one of it."""
    home = tmp_path_factory.mktemp(request.param)
    dense = tiny.write(request.param, home / "dense")
    how = TOKENS if request.param in tiny.DECODERS else QUICK | {"ratio": 0.5, "method": "magnitude", "looks": None}
    comp_cli.prune(dense, output=home / "compact", device="cpu", **how)
    return dense, home / "compact"


def test_models_are_loaded_there(folders, gpus):  # noqa: F811
    model = comp_cli.load(folders[1], device=GPU)
    tensors = [*model.parameters(), *model.buffers()]
    assert {tensor.device for tensor in tensors} == {torch.device(GPU)} and gpus.peak[0] == 0


def test_models_are_analysed_there(folders, tmp_path):
    sizes = {"num_samples": 4, "text_tokens": 8}
    for folder in folders:
        with sdpa_kernel(SDPBackend.MATH):
            expected = comp_cli.analyze(folder, device="cpu", **sizes).to_json()
        with pretend() as memory:
            same(comp_cli.analyze(folder, device=GPU, **sizes).to_json(), expected)
            assert memory.peak[0] == 0


def test_models_are_timed_there(folders, gpus, monkeypatch):  # noqa: F811
    """The process that measures memory, which nothing is pretended to, runs here."""

    def measured(given: list[str]) -> tuple[int, int]:
        _, path, inputs, device, family = given
        torch.cuda.reset_peak_memory_stats(device)
        return memory_process.run_torch(Path(path), dict(np.load(inputs)), device, family, False)

    monkeypatch.setattr(memory, "measure", measured)
    how = {"backend": "torch", "batch": "2", "iterations": 1, "duration": 0, "text_tokens": 8}
    report = comp_cli.bench(folders[1], baseline=folders[0], device=GPU, **how)
    assert (report.machine.device, report.machine.name) == (GPU, "pretended GPU 1")
    assert report.peak_memory_bytes and all(row.bytes > 0 and row.baseline_bytes == 0 for row in report.peak_memory_bytes)
    assert gpus.peak[0] == 0
