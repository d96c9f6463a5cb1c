"""Weights that are shared out while they are tuned: what comes out is what one process makes, and each holds its part."""

import json
from pathlib import Path

import process_runs
import pytest
import torch
from safetensors.torch import load_file
from test_processes import SHARDED, check_equal, check_slopes, runs
from typer.testing import CliRunner

from comp_cli.cli.app import app

TUNED = ("llava, tuned",)
SLOPES = ("slopes of llava, tuned", "slopes of retrieval, tuned")  # CLIP has a parameter that is one number
SHARES = ("shares of llava, tuned",)
FEW = (*TUNED, *SLOPES, *SHARES)
EVERY = tuple(name for name, (_, asked) in process_runs.CASES.items() if "steps" in asked and "stage_share" not in asked)


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> dict[int, Path]:
    place = tmp_path_factory.mktemp("few")
    process_runs.prepare(place / "dense", *FEW)
    return {1: runs(place, 1, (*TUNED, *SLOPES)), 2: runs(place, 2, FEW, SHARDED)}


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> dict[int, Path]:
    place = tmp_path_factory.mktemp("many")
    process_runs.prepare(place / "dense", *EVERY)
    return {count: runs(place, count, EVERY, SHARDED) for count in (1, 3)}


@pytest.mark.parametrize("case", TUNED)
def test_the_model_is_that_of_one_process(few, case):
    check_equal(few[1], few[2], case)


@pytest.mark.parametrize("case", SLOPES)
def test_slopes_of_a_step_are_those_of_the_whole_batch(few, case):
    check_slopes(few[1], few[2], case)


@pytest.mark.slow
@pytest.mark.parametrize("case", EVERY)
def test_any_task_is_tuned_so(many, case):
    """Three processes may have two pairs: one runs a row that does not count, for all wait for one another in every layer."""
    check_equal(many[1], many[3], case)


def test_each_process_holds_its_part(few):
    folder = load_file(few[2] / "whole llava, tuned.safetensors")
    size = sum(tensor.nbytes for tensor in folder.values())
    for rank in (0, 1):
        held = json.loads((few[2] / f"shares of llava, tuned {rank}.json").read_text())
        assert held.keys() == {"weights", "slopes", "moments"}
        for name, found in held.items():
            assert 0.4 * size < found < 0.6 * size, name


def test_a_tuning_goes_on_in_shares(few):
    """From the weights and the moments that the first process wrote: to the last bit what one that went through has."""
    whole, gone_on = (load_file(few[2] / f"{name} llava, tuned.safetensors") for name in ("whole", "gone on"))
    assert whole.keys() == gone_on.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, gone_on[name]), name


ASKED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "WORLD_SIZE": "2", "RANK": "0"}


@pytest.mark.parametrize(
    ("changed", "given", "said"),
    [
        ({"FSDP_VERSION": "1"}, "--steps 2", "--fsdp_version 2"),
        ({"WORLD_SIZE": "1"}, "--steps 2", "there is one process"),
        ({}, "", "nothing is tuned here"),
        ({}, "--steps 2 --plan-only", "nothing is tuned here"),
        ({}, "--method comp-paper --steps 2 --stage-share 0.5", "slice whole matrices"),
        ({}, "--steps 2 --mixed-precision fp16", "--mixed-precision fp16"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "--epochs 1 --data x", "--mixed-precision fp16"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "--steps 2", "--fsdp_offload_params"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "--steps 2", "--fsdp_activation_checkpointing"),
        ({"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, "--steps 2", "SIZE_BASED_WRAP"),
        ({"FSDP_IGNORED_MODULES": ".*norm"}, "--steps 2", "--fsdp_ignored_modules"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "--steps 2", "--dynamo_backend inductor"),
    ],
)
def test_what_is_not_done_in_shares_is_refused(changed, given, said, tiny_folder, tmp_path, monkeypatch):
    for name, value in (ASKED | changed).items():
        monkeypatch.setenv(name, value)
    words = ["prune", str(tiny_folder), "--ratio", "0.5", "-o", str(tmp_path / "out.json"), "--device", "cpu", *given.split()]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2 and said in " ".join(result.stderr.split()), result.stderr
    assert not list(tmp_path.iterdir())


def test_a_folder_of_image_tokens_by_number_has_nothing_to_tune(tmp_path, monkeypatch):
    for name, value in ASKED.items():
        monkeypatch.setenv(name, value)
    result = CliRunner().invoke(app, ["prune", "demo-vlm", "--method", "vitcop", "--tokens", "36", "-o", str(tmp_path / "out")])
    assert result.exit_code == 2 and "nothing is tuned here" in " ".join(result.stderr.split())
