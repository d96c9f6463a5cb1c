"""Decoders that are larger than a GPU are pruned through it layer by layer: on a pretended one (pretended_gpus.py) they become
what they become on the CPU, and no more than a part of the weights is ever there."""

import gc
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from pretended_gpus import gpus, pretend  # noqa: F401  (a fixture)
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel

import comp_cli
from comp_cli.commands import prune_streamed
from comp_cli.errors import UsageError
from comp_cli.files import memory as machine
from comp_cli.report.base import Streamed
from comp_cli.report.prune_tables import print_streamed

GPU = "cuda:1"
HOW = {"num_samples": 2, "stage_samples": 2, "eval_samples": 2, "text_tokens": 8, "batch_size": 1, "looks": 1}
RATIOS = {"qwen2-vl": 0.25, "qwen3-vl": 0.2}  # whose tiny models reach no more


@pytest.fixture(scope="module")
def deep(tmp_path_factory) -> Path:
    """A LLaVA of so many layers that a few of them are a small part."""
    folder = tmp_path_factory.mktemp("models") / "deep"
    torch.manual_seed(0)
    tiny.llava(text={"num_hidden_layers": 24}).eval().save_pretrained(folder)
    tiny.llava_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> Path:
    return tiny.write("llava", tmp_path_factory.mktemp("models") / "llava")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def size(folder: Path) -> int:
    """Bytes in fp32."""
    return 4 * sum(tensor.numel() for tensor in weights(folder).values())


def same_weights(found: Path, expected: Path) -> None:
    tensors, wanted = weights(found), weights(expected)
    assert tensors.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert tensors[name].dtype == tensor.dtype
        torch.testing.assert_close(tensors[name], tensor, rtol=1e-3, atol=1e-4)


def test_a_model_that_no_gpu_could_hold_becomes_what_it_becomes_in_memory(deep, tmp_path):
    with sdpa_kernel(SDPBackend.MATH):  # which is the one that a pretended GPU has
        inside = comp_cli.prune(deep, ratio=0.3, output=tmp_path / "memory", device="cpu", **HOW)
    whole = size(deep)
    gc.collect()
    with pretend(room=whole - 1) as memory:
        through = comp_cli.prune(deep, ratio=0.3, output=tmp_path / "gpu", device=GPU, **HOW)
        assert memory.peak[0] == 0 and 0 < memory.peak[1] < whole / 2  # of it two of 24 layers; the most are Gram matrices
        gc.collect()
        assert memory.alive[1] < whole / 100  # nothing stays
        assert through.streamed.peak_bytes == memory.peak[1]
    assert inside.streamed is None
    assert (through.streamed.device, through.streamed.limit_bytes) == (GPU, whole - 1)
    assert any(f"larger than the memory that is free on {GPU}" in said for said in through.warnings)
    said: list[str] = []
    print_streamed(through, SimpleNamespace(line=said.append))
    assert "that a run in memory takes there were never held at once" in said[0]
    assert through.plan == inside.plan
    assert [look.loss for look in through.compared] == pytest.approx([look.loss for look in inside.compared], rel=1e-4)
    assert through.quality.divergence == pytest.approx(inside.quality.divergence, rel=1e-3)
    same_weights(tmp_path / "gpu", tmp_path / "memory")
    assert {path.name for path in tmp_path.iterdir()} == {"memory", "gpu"}


def test_token_methods_are_measured_through_the_gpu(deep, tmp_path):
    data = tiny.table(tmp_path, question=lambda n: "a red circle", answer=lambda n: ["red", "blue"][n % 2])
    columns = {"text_column": "question", "answer_column": "answer", "image_column": "image"}
    how = {"method": "vitcop", "tokens": 9, "data": data, "eval_samples": 4, "batch_size": 2, **columns}
    with sdpa_kernel(SDPBackend.MATH):
        inside = comp_cli.prune(deep, output=tmp_path / "memory", device="cpu", **how)
    whole = size(deep)
    with pretend(room=whole - 1) as memory:
        through = comp_cli.prune(deep, output=tmp_path / "gpu", device=GPU, **how)
        assert 0 < memory.peak[1] < whole / 3
        with pytest.raises(UsageError, match="--refit: the weights take .*, more than may be used"):
            comp_cli.prune(deep, output=tmp_path / "refitted", device=GPU, refit=True, num_samples=2, **how)
    assert through.streamed.device == GPU and inside.streamed is None
    assert through.quality.divergence == pytest.approx(inside.quality.divergence, rel=1e-3)
    assert through.quality.metrics["token accuracy"] == inside.quality.metrics["token accuracy"]


@pytest.mark.gpu
def test_on_a_real_gpu_the_way_layer_by_layer_ends_where_that_in_memory_does(deep, tmp_path):
    inside = comp_cli.prune(deep, ratio=0.3, output=tmp_path / "memory", device="cuda", **HOW)
    through = comp_cli.prune(deep, ratio=0.3, output=tmp_path / "layers", device="cuda", max_memory=size(deep) - 1, **HOW)
    assert inside.streamed is None and through.streamed.device == "cuda:0"
    assert 0 < through.streamed.peak_bytes == torch.cuda.max_memory_allocated("cuda:0")
    assert through.plan == inside.plan
    same_weights(tmp_path / "layers", tmp_path / "memory")


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in tiny.DECODERS if kind != "smolvlm"])
def test_every_family_becomes_the_same(kind, tmp_path, monkeypatch):
    folder, how = tiny.write(kind, tmp_path / kind), HOW | {"ratio": RATIOS.get(kind, 0.3), "batch_size": 2}
    with sdpa_kernel(SDPBackend.MATH):
        inside = comp_cli.prune(folder, output=tmp_path / "memory", device="cpu", **how)
    monkeypatch.setattr(prune_streamed, "exceeds", lambda *given: Streamed(1 << 41, 1 << 40, device=GPU))
    with pretend() as memory:
        through = comp_cli.prune(folder, output=tmp_path / "gpu", device=GPU, **how)
        assert memory.peak[0] == 0 and memory.peak[1] > 0
    assert through.plan == inside.plan
    same_weights(tmp_path / "gpu", tmp_path / "memory")


# What decides ------------------------------------------------------------------------------------------------------------


def decided(folder: Path, **more) -> Streamed | None:
    """What a run on the GPU decides, told before it begins."""
    from comp_cli.models.dense import find_dense
    from comp_cli.options import HUB_DEFAULTS, PruneOptions
    from comp_cli.progress import Silent

    options = PruneOptions(str(folder), 0.3, device=GPU, **more)
    known = find_dense(options.model, Silent(), None, lambda config, family, architecture: None, HUB_DEFAULTS)
    return prune_streamed.exceeds(known, options, HUB_DEFAULTS)


def test_room_is_what_the_gpu_has_free(deep):
    """Weights, dense and compact, and Gram matrices, of 24 layers and of a tower of 3: with a constant, fp64 while summed."""
    gc.collect()
    grams = 24 * (49**2 + 65**2) + 3 * (33**2 + 65**2)
    needed = max(size(deep) + 8 * grams, round(size(deep) * 1.7) + 4 * grams)
    with pretend(room=needed):
        assert decided(deep) is None
        taken = torch.zeros(1, device=GPU)
        assert decided(deep) == Streamed(needed, needed - 4, device=GPU)
        del taken
        assert decided(deep) is None
        assert decided(deep, max_memory=1000) == Streamed(needed, 1000, device=GPU)
    with pretend(room=round(size(deep) * 1.7)):
        assert decided(deep, method="magnitude", recover=False) is None  # which has no Gram matrices
        assert decided(deep, method="magnitude").needed_bytes == needed


def test_weights_reach_a_gpu_through_the_machines_memory(deep, gpus, monkeypatch):  # noqa: F811
    monkeypatch.setattr(machine, "allowed", lambda: size(deep))
    assert decided(deep) is None
    monkeypatch.setattr(machine, "allowed", lambda: size(deep) - 1)
    assert decided(deep) == Streamed(size(deep), size(deep) - 1)


def test_where_the_machines_memory_is_too_small_the_cpu_is_not_advised(tiny_folder, deep, gpus, monkeypatch):  # noqa: F811
    monkeypatch.setattr(machine, "allowed", lambda: 1000)
    for folder, ratio in (tiny_folder, "0.5"), (deep, "0.3,0.4"):
        with pytest.raises(UsageError, match="0.0 MiB are free on this machine, through which") as refused:
            comp_cli.prune(folder, ratio=ratio, output=folder.parent / "compact", device=GPU)
        assert "--device cpu" not in refused.value.hint and "more memory" in refused.value.hint


def test_models_that_do_not_go_through_a_gpu_are_told_where_they_fit(tiny_folder, tmp_path):
    said = "BlipForImageTextRetrieval: a run takes .* MiB in fp32, and 0.1 MiB are free on cuda:1"
    with pretend(room=100_000) as memory:
        with pytest.raises(UsageError, match=said):
            comp_cli.prune(tiny_folder, ratio=0.5, output=tmp_path / "compact", device=GPU)
        with pytest.raises(UsageError) as refused:
            comp_cli.prune(tiny_folder, ratio=0.5, dry_run=True, device=GPU)
        assert "--device cpu" in refused.value.hint and not memory.peak
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dry_run", [False, True])
def test_what_is_not_done_layer_by_layer_names_the_gpu(llava, tmp_path, dry_run):
    said = "--steps, --epochs: the model is larger than the memory that is free on cuda:1"
    with pretend(room=size(llava)):
        with pytest.raises(UsageError, match=said) as refused:
            comp_cli.prune(llava, ratio=0.3, steps=2, output=tmp_path / "compact", device=GPU, dry_run=dry_run)
        assert "--device cpu" in refused.value.hint
    with pretend(room=1000), pytest.raises(UsageError, match="a layer of this model and .* and 0 MiB may be used"):
        comp_cli.prune(llava, ratio=0.3, output=tmp_path / "compact", device=GPU, **HOW)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("asked", [{"ratio": "0.3,0.4"}, {"ratio": "0.3,0.4", "dry_run": True}, {"target_size": "300kB"}])
def test_what_shares_one_model_in_memory_is_refused_before_it_is_loaded(asked, deep, tmp_path):
    with pretend(room=size(deep)) as memory:
        with pytest.raises(UsageError, match="(ratios|0.3MB) takes .* MiB, and .* MiB are free on cuda:1"):
            comp_cli.prune(deep, output=tmp_path / "compact", device=GPU, **asked)
        assert not memory.peak
    assert not list(tmp_path.iterdir())


def test_a_compact_model_that_is_larger_than_the_gpu_is_analysed_without_samples(llava, tmp_path):
    comp_cli.prune(llava, method="vitcop", tokens=9, output=tmp_path / "compact")
    with pretend(room=1000) as memory:
        report = comp_cli.analyze(tmp_path / "compact", device=GPU)
        assert not memory.peak and not report.kept_samples
    assert any("no sample shows which tokens stay: its weights take" in said for said in report.warnings)
