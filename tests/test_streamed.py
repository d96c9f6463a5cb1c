"""Decoders that are larger than memory: pruned layer by layer they become what they become in memory, in a fraction of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

import comp_cli
from comp_cli.commands import prune_streamed
from comp_cli.errors import GateError, RefusedError, UsageError
from comp_cli.files import shards
from comp_cli.report.base import Streamed
from comp_cli.search import layer_by_layer

HOW = {"num_samples": 8, "stage_samples": 6, "eval_samples": 4, "text_tokens": 8, "batch_size": 2, "looks": 3}
RATIOS = {"qwen2-vl": 0.25, "qwen3-vl": 0.2}  # whose tiny models reach no more
SLOW = ("llava-onevision", "paligemma", "qwen2-vl", "qwen2.5-vl")
KINDS = [pytest.param(kind, marks=pytest.mark.slow if kind in SLOW else ()) for kind in tiny.DECODERS if kind != "smolvlm"]


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> Path:
    return tiny.write("llava", tmp_path_factory.mktemp("models") / "llava")


@pytest.fixture
def forced(monkeypatch):
    """As if no model fitted."""
    monkeypatch.setattr(prune_streamed, "exceeds", lambda *given: Streamed(1 << 41, 1 << 40))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("kind", KINDS)
def test_the_plan_and_every_weight_are_those_of_a_run_in_memory(kind, tmp_path, monkeypatch):
    folder, how = tiny.write(kind, tmp_path / kind), HOW | {"ratio": RATIOS.get(kind, 0.3)}
    inside = comp_cli.prune(folder, output=tmp_path / "memory", **how)
    monkeypatch.setattr(prune_streamed, "exceeds", lambda *given: Streamed(1 << 41, 1 << 40))
    beside = comp_cli.prune(folder, output=tmp_path / "disk", **how)
    assert inside.streamed is None and beside.streamed.peak_bytes > 0
    assert beside.plan == inside.plan
    assert [look.tokens for look in beside.compared] == [look.tokens for look in inside.compared]
    losses = [[look.loss for look in report.compared if look.loss is not None] for report in (beside, inside)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    expected, found = weights(tmp_path / "memory"), weights(tmp_path / "disk")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4)
    assert beside.quality.divergence == pytest.approx(inside.quality.divergence, rel=1e-3, abs=1e-6)
    assert beside.quality.agreement == inside.quality.agreement
    assert comp_cli.load(tmp_path / "disk").state_dict().keys() == comp_cli.load(tmp_path / "memory").state_dict().keys()
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {kind, "memory", "disk"}


def test_shards_are_written_with_an_index_that_others_read(llava, tmp_path, forced, monkeypatch):
    monkeypatch.setattr(shards.ShardWriter.__init__, "__defaults__", (40_000,))
    report = comp_cli.prune(llava, ratio=0.3, output=tmp_path / "compact", **HOW)
    files = sorted(path.name for path in (tmp_path / "compact").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    document = json.loads((tmp_path / "compact" / "comp_report.json").read_text())
    assert {*files, "model.safetensors.index.json"} <= document["files"].keys()
    assert document["options"]["looks"] == 3 and document["streamed"] == {"needed_bytes": 1 << 41}
    loaded = comp_cli.load(tmp_path / "compact")  # by transformers, hashes checked
    held = weights(tmp_path / "compact")
    state = {name: tensor for name, tensor in loaded.state_dict().items() if name in held}
    assert len(state) == len(held) and all(torch.equal(tensor, held[name]) for name, tensor in state.items())
    assert sum(parameter.numel() for parameter in loaded.parameters()) == report.params.compact < report.params.dense


def test_the_pass_back_has_the_slopes_of_the_whole_model(llava, tmp_path, forced, monkeypatch):
    """Against autograd through all layers at once: rises and energies, which prices are made of."""
    found = {}
    price = layer_by_layer.prices_of_part

    def remember(weight, biased, statistics, key, width):
        found[key] = (statistics.rises[key], statistics.energies[key])
        return price(weight, biased, statistics, key, width)

    monkeypatch.setattr(layer_by_layer, "prices_of_part", remember)
    comp_cli.prune(llava, ratio=0.3, plan_only=True, output=tmp_path / "plan.json", **HOW)
    monkeypatch.undo()
    from comp_cli.models.dense import open_dense
    from comp_cli.models.pairs import batches_of, generated_pairs
    from comp_cli.progress import Silent
    from comp_cli.search.calibration import gather_statistics

    dense = open_dense(str(llava), Silent(), text_tokens=8)
    batches = batches_of(dense, generated_pairs(dense.task, labelled=False), "calibration", 8, 2)
    whole = gather_statistics(dense, batches, Silent(), rises=True)
    assert found.keys() == {key for key in whole.rises if key[0] == "language"}
    for key, (rise, energy) in found.items():
        assert rise > 0 and rise == pytest.approx(whole.rises[key], rel=1e-4)
        assert energy == pytest.approx(whole.energies[key], rel=1e-5)


WITHOUT = [{"recover": False}, {"sequential": False}]


@pytest.mark.parametrize(
    "more", [*(pytest.param(one, marks=pytest.mark.slow) for one in WITHOUT), {"cip": False, "tokens_method": "divprune"}]
)
def test_what_a_search_can_be_without_it_can_be_without_here_as_well(more, llava, tmp_path, monkeypatch):
    inside = comp_cli.prune(llava, ratio=0.3, output=tmp_path / "memory", **HOW, **more)
    monkeypatch.setattr(prune_streamed, "exceeds", lambda *given: Streamed(1 << 41, 1 << 40))
    beside = comp_cli.prune(llava, ratio=0.3, output=tmp_path / "disk", **HOW, **more)
    assert beside.plan == inside.plan
    expected, found = weights(tmp_path / "memory"), weights(tmp_path / "disk")
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["vitcop", "pyramiddrop"])
def test_token_methods_are_measured_alike(method, llava, tmp_path, monkeypatch):
    data = tiny.table(tmp_path, question=lambda n: "a red circle", answer=lambda n: ["red", "blue"][n % 2])
    columns = {"text_column": "question", "answer_column": "answer", "image_column": "image"}
    how = {"method": method, "tokens": 9, "data": data, "eval_samples": 4, "batch_size": 2, **columns}
    inside = comp_cli.prune(llava, output=tmp_path / "memory", **how)
    monkeypatch.setattr("comp_cli.commands.prune_tokens.exceeds", lambda *given: Streamed(1 << 41, 1 << 40))
    beside = comp_cli.prune(llava, output=tmp_path / "disk", **how)
    assert beside.streamed.peak_bytes > 0 and any("larger than memory" in said for said in beside.warnings)
    assert beside.quality.divergence == pytest.approx(inside.quality.divergence, rel=1e-3)
    assert beside.quality.agreement == inside.quality.agreement
    assert beside.quality.metrics["token accuracy"] == inside.quality.metrics["token accuracy"]
    assert (tmp_path / "memory" / "config.json").read_bytes() == (tmp_path / "disk" / "config.json").read_bytes()


# What decides ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deep(tmp_path_factory) -> Path:
    """A LLaVA of so many layers that one of them is a small part."""
    folder = tmp_path_factory.mktemp("models") / "deep"
    torch.manual_seed(0)
    tiny.llava(text={"num_hidden_layers": 40, "intermediate_size": 96}).eval().save_pretrained(folder)
    tiny.llava_processor().save_pretrained(folder)
    return folder


def needed(folder: Path, ratio: float) -> int:
    return round(4 * sum(tensor.numel() for tensor in weights(folder).values()) * (2 - ratio))


def test_a_model_is_streamed_where_it_does_not_fit_and_only_there(deep, tmp_path):
    limit, how = needed(deep, 0.3), HOW | {"num_samples": 2, "stage_samples": 2, "eval_samples": 2}
    fits = comp_cli.prune(deep, ratio=0.3, output=tmp_path / "fits", max_memory=limit, **how)
    assert fits.streamed is None
    how.pop("looks")
    less = comp_cli.prune(deep, ratio=0.3, output=tmp_path / "less", max_memory=limit - 1, **how)
    assert (less.streamed.needed_bytes, less.streamed.limit_bytes) == (limit, limit - 1)
    assert less.options.looks == 2 and sum(look.loss is not None for look in less.compared) <= 2
    (said,) = (said for said in less.warnings if "larger than memory" in said)
    assert "at most 2 plans are compared (--looks)" in said and "nothing is generated" in said
    assert f"--max-memory {limit - 1}" in less.command


def test_less_than_a_layer_is_refused_with_what_is_needed(llava, tmp_path):
    with pytest.raises(
        UsageError, match="a layer of this model and .* pairs at a time take about .* MiB, and 0 MiB may be used"
    ):
        comp_cli.prune(llava, ratio=0.3, output=tmp_path / "compact", max_memory="1KB", **HOW)
    assert {path.name for path in tmp_path.iterdir()} == set()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"method": "taylor"}, "--method taylor: the model is larger"),
        ({"steps": 5}, "--steps, --epochs: the model is larger"),
        ({"uniform": True}, "--uniform: the model is larger"),
        ({"dtype": "bf16"}, "--dtype: the model is larger"),
        ({"modes": "language_params,vision_params"}, "vision_params among --modes: the model is larger"),
    ],
)
def test_what_is_not_done_layer_by_layer_is_refused(more, said, llava, tmp_path, forced):
    with pytest.raises(UsageError, match=said):
        comp_cli.prune(llava, ratio=0.3, output=tmp_path / "compact", **{"num_samples": 4, **more})
    assert {path.name for path in tmp_path.iterdir()} == set()


def test_a_limit_is_for_decoders_and_looks_for_plans(tiny_folder, llava, tmp_path):
    with pytest.raises(UsageError, match="--max-memory is for image-text decoders"):
        comp_cli.prune(tiny_folder, ratio=0.3, output=tmp_path / "compact", max_memory="1GiB")
    with pytest.raises(UsageError, match="--looks: --method wanda compares no plans"):
        comp_cli.prune(llava, ratio=0.3, method="wanda", looks=2, output=tmp_path / "compact")
    with pytest.raises(UsageError, match="--looks: nothing changes for --method vitcop"):
        comp_cli.prune(llava, method="vitcop", tokens=9, looks=2, output=tmp_path / "compact")


def test_a_weight_that_is_no_number_is_refused_when_its_layer_is_read(llava, tmp_path, forced):
    from safetensors.torch import save_file

    folder = tmp_path / "broken"
    folder.mkdir()
    for path in llava.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    held = weights(folder)
    name = next(name for name in held if "layers.3.mlp.up_proj" in name)
    held[name][1, 2] = float("nan")
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RefusedError, match=r"layers.3.mlp.up_proj.weight is nan at index \[1, 2\]"):
        comp_cli.prune(folder, ratio=0.3, output=tmp_path / "compact", **HOW)
    assert {path.name for path in tmp_path.iterdir()} == {"broken"}


def test_a_gate_that_is_missed_leaves_nothing(llava, tmp_path, forced):
    with pytest.raises(GateError, match="--max-drop allows 0 points"):
        comp_cli.prune(llava, ratio=0.5, output=tmp_path / "compact", max_drop=0, **HOW | {"eval_samples": 20})
    assert {path.name for path in tmp_path.iterdir()} == set()


def test_a_run_that_was_stopped_goes_on_with_the_plans_that_it_knows(llava, tmp_path, forced, monkeypatch):
    whole = comp_cli.prune(llava, ratio=0.3, output=tmp_path / "whole", **HOW)
    real, passes = layer_by_layer.through_compact, []

    def stops(*given, **more):
        if len(passes) == 2:
            raise KeyboardInterrupt
        passes.append(given)
        return real(*given, **more)

    with monkeypatch.context() as stopped:
        stopped.setattr(layer_by_layer, "through_compact", stops)
        with pytest.raises(KeyboardInterrupt):
            comp_cli.prune(llava, ratio=0.3, output=tmp_path / "compact", **HOW)
    assert {path.name for path in tmp_path.iterdir()} == {"whole", ".compact.journal"}
    seen = []
    monkeypatch.setattr(layer_by_layer, "through_compact", lambda *given, **more: (seen.append(0), real(*given, **more))[1])
    again = comp_cli.prune(llava, ratio=0.3, output=tmp_path / "compact", max_memory="64GiB", **HOW)
    halves = [look.halves for look in whole.compared if look.loss is not None]
    assert len(halves) > 2 and len(seen) == sum(halves[1:]) and again.plan == whole.plan
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "compact"}
    assert all(torch.equal(tensor, weights(tmp_path / "compact")[name]) for name, tensor in weights(tmp_path / "whole").items())


# Under a limit ----------------------------------------------------------------------------------------------------------

LIMITED = """
import json, resource, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import comp_cli
from comp_cli.models.dense import open_dense
from comp_cli.progress import Silent

small, large, output, room = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
few = {"num_samples": 2, "stage_samples": 2, "eval_samples": 2, "batch_size": 2, "text_tokens": 8}

def all_of_it(model, folder, **more):
    comp_cli.analyze(model)
    comp_cli.prune(model, method="vitcop", tokens=9, output=folder / "tokens")
    return comp_cli.prune(model, ratio=0.3, output=folder / "comp", **few, **more)

def mapped():
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()

all_of_it(small, output / "small", max_memory="4MB")  # whatever is imported on the way is mapped before the limit
before = mapped()
resource.setrlimit(resource.RLIMIT_AS, (before + room, before + room))
report = all_of_it(large, output / "large")
try:
    open_dense(str(large), Silent())
    fits = True
except Exception:
    fits = False
print(json.dumps({"fits": fits, "streamed": report.to_json()["streamed"], "left": room - (mapped() - before)}))
"""


def test_what_no_loader_could_hold_is_analysed_and_pruned_under_a_limit(deep, tmp_path):
    """Under a limit on the address space that no loader could pass."""
    import larger_than_memory

    large = tmp_path / "dense"
    larger_than_memory.make(large, "tiny")
    size = sum(path.stat().st_size for path in large.glob("*.safetensors"))
    room = 2 * size // 3  # the weights in fp32 alone are twice the size
    paths = os.pathsep.join(filter(None, [str(Path(comp_cli.__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    words = [sys.executable, "-c", LIMITED, str(deep), str(large), str(tmp_path), str(room)]
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert not found["fits"]
    assert found["streamed"]["limit_bytes"] <= room < found["streamed"]["needed_bytes"] / 4
    for name in ("tokens", "comp"):
        written = sorted((tmp_path / "large" / name).glob("model*.safetensors"))
        assert sum(path.stat().st_size for path in written) > 0.6 * size
    model = comp_cli.load(tmp_path / "large" / "comp")
    assert sum(parameter.numel() for parameter in model.parameters()) < sum(
        tensor.numel() for tensor in weights(large).values()
    )
