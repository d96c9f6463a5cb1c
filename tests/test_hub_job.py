"""The line that people type, against a loopback hub: `comp prune Salesforce/blip-itm-base --ratio 0.5`."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from hub_server import HubServer, Repo, commit
from safetensors.torch import load_file

FEW = ["--num-samples", "8", "--text-tokens", "12", "--device", "cpu", "--eval-samples", "8", "--json"]


@pytest.fixture(scope="module")
def pickled(tiny_folder, tmp_path_factory):
    """The tiny model with pytorch_model.bin instead of safetensors."""
    folder = tmp_path_factory.mktemp("pickled") / "blip"
    shutil.copytree(tiny_folder, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def comp(*arguments, folder, **environment):
    dropped = ("HF_", "TRANSFORMERS_")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(dropped) and not k.lower().endswith("_proxy")}
    command = [sys.executable, "-m", "comp_cli", *map(str, arguments)]
    environment = clean | {"HF_HOME": str(folder / "hf"), "NO_PROXY": "*"} | environment
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def test_as_typed_then_offline(tiny_folder, tmp_path):
    with HubServer({"Salesforce/blip-itm-base-coco": Repo({"main": tiny_folder})}) as hub:
        done = comp("prune", "Salesforce/blip-itm-base", "--ratio", 0.5, *FEW, folder=tmp_path, HF_ENDPOINT=hub.url)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["base_model"] == "Salesforce/blip-itm-base-coco"
    assert document["base_revision"] == commit(tiny_folder)
    config = json.loads((tmp_path / document["output"] / "config.json").read_text())
    assert config["comp"]["base_revision"] == commit(tiny_folder)
    again = comp("analyze", "Salesforce/blip-itm-base", "--json", folder=tmp_path, HF_HUB_OFFLINE="1", HF_ENDPOINT=hub.url)
    assert json.loads(again.stdout)["revision"] == commit(tiny_folder)


def test_the_real_id_is_said(tmp_path):
    with HubServer({}) as hub:
        done = comp("prune", "Salesforce/blip-itm-base", "--ratio", 0.5, folder=tmp_path, HF_ENDPOINT=hub.url)
    assert done.returncode == 4
    assert sum("Salesforce/blip-itm-base-coco" in line for line in done.stderr.splitlines() if "error" not in line) >= 1


def test_pickled_weights_on_the_hub(pickled, tmp_path):
    with HubServer({"org/blip": Repo({"main": pickled})}) as hub:
        done = comp("prune", "org/blip", "--ratio", 0.5, folder=tmp_path, HF_ENDPOINT=hub.url)
        assert done.returncode == 4 and "--allow-pickle" in done.stderr
        done = comp("prune", "org/blip", "--ratio", 0.5, "--allow-pickle", *FEW, folder=tmp_path, HF_ENDPOINT=hub.url)
    assert done.returncode == 0, done.stderr


def test_a_hostile_pickle_is_not_run(pickled, tmp_path):
    folder, trace = tmp_path / "hostile", tmp_path / "trace"
    shutil.copytree(pickled, folder)

    class Hostile:
        def __reduce__(self):
            return os.system, (f"touch {trace}",)

    torch.save({"itm_head.weight": Hostile()}, folder / "pytorch_model.bin")
    done = comp("prune", folder, "--ratio", 0.5, "--allow-pickle", folder=tmp_path)
    assert done.returncode == 4 and not trace.exists()


def test_an_unknown_architecture_is_refused_before_its_weights_come(tiny_folder, tmp_path):
    folder = tmp_path / "llama"
    shutil.copytree(tiny_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["ClipModel"]}))
    with HubServer({"org/llama": Repo({"main": folder})}) as hub:
        done = comp("prune", "org/llama", "--ratio", 0.5, "--json", folder=tmp_path, HF_ENDPOINT=hub.url)
    error = json.loads(done.stdout)["error"]
    assert done.returncode == 4 and "The nearest is CLIPModel" in error["hint"]
    assert not list((tmp_path / "hf").rglob("model.safetensors")) and list((tmp_path / "hf").rglob("config.json"))
