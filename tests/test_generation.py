"""Generated texts: what compact models write, with caches and without, greedily and in beams."""

import subprocess
import sys
from dataclasses import dataclass

import pytest
import tiny
import torch
from torch import nn

from comp_cli.loading import load_model
from comp_cli.output import Output
from comp_cli.prune import Options, prune
from comp_cli.variants import on_own_kernels
from comp_cli.workbench import Dense, open_dense

QUIET = Output("quiet")
WAYS = {"greedy": {"num_beams": 1}, "beams": {"num_beams": 3, "num_return_sequences": 2}}


@dataclass(frozen=True)
class Writer:
    dense: Dense
    stock: nn.Module
    compact: nn.Module  # uneven
    prompted: dict[str, torch.Tensor]  # inputs of generate(), three samples with texts of one length


@pytest.fixture(scope="module", params=["blip-caption", "blip-vqa"])
def writer(request, tmp_path_factory):
    folder = tiny.write(request.param, tmp_path_factory.mktemp(request.param) / "dense")
    dense = open_dense(str(folder), QUIET, text_tokens=12)
    stock = load_model(folder, dtype=torch.float32)
    inputs = {name: dense.random_inputs(3, 5)[name] for name in ("pixel_values", "input_ids", "attention_mask")}
    return Writer(dense, stock, dense.runtime(tiny.uneven(dense.plan, dense.family)), inputs)


@pytest.fixture(params=WAYS)
def way(request):
    return WAYS[request.param] | {"max_new_tokens": 8}


def write(model, inputs, **options):
    """The tokens, and the logits or beam scores at every step."""
    given = {name: tensor.clone() for name, tensor in inputs.items()}  # generate() writes into what it is given
    found = model.generate(**given, **options, output_scores=True, return_dict_in_generate=True)
    return found.sequences, torch.stack(found.scores)


def same(found, expected):
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], atol=1e-4, rtol=1e-4)


def test_the_tiny_models_write_something(writer):
    """Several tokens, and not the same for every image: the tests below compare something."""
    tokens, _ = write(writer.compact, writer.prompted, max_new_tokens=8)
    assert tokens.shape[1] > 6 and len({tuple(row) for row in tokens.tolist()}) > 1


def test_nothing_pruned_writes_what_the_stock_model_writes(writer, way):
    same(write(on_own_kernels(writer.stock), writer.prompted, **way), write(writer.stock, writer.prompted, **way))


def test_captions_need_no_prompt(writer, way):
    if writer.dense.task.name != "caption":
        pytest.skip("a question is needed")
    images = {"pixel_values": writer.prompted["pixel_values"]}
    same(write(on_own_kernels(writer.stock), images, **way), write(writer.stock, images, **way))


def test_a_cache_changes_nothing(writer, way):
    same(write(writer.compact, writer.prompted, **way), write(writer.compact, writer.prompted, use_cache=False, **way))


def test_masked_writes_what_sliced_writes(writer, way):
    masked = tiny.masked(writer.dense, tiny.uneven(writer.dense.plan, writer.dense.family))
    same(write(writer.compact, writer.prompted, **way), write(masked, writer.prompted, **way))


def test_keys_of_what_is_read_across_are_made_once(writer):
    """One pass of the cross-attention's key matrix over the image or the question for each layer, whatever the length."""
    tower = writer.dense.family.towers[-1]
    layer = writer.compact.get_submodule(tower.encoder).layer[0]
    seen = []
    hook = layer.crossattention.self.key.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[1]))
    write(writer.compact, writer.prompted, max_new_tokens=8)
    hook.remove()
    assert len(seen) == 1


def test_a_pruned_checkpoint_writes_without_comp(writer, tmp_path):
    sizes = {"num_samples": 8, "stage_samples": 8, "eval_samples": 8, "text_tokens": 12, "stages": 4, "device": "cpu"}
    prune(Options(str(writer.dense.source.folder), 0.5, **sizes), tmp_path / "compact", QUIET)
    torch.save(writer.prompted, tmp_path / "inputs.pt")
    script = (
        "import sys, torch; sys.modules['comp_cli'] = None\n"
        "from transformers import AutoModel\n"
        f"model = AutoModel.from_pretrained({str(tmp_path / 'compact')!r}, trust_remote_code=True).eval()\n"
        f"inputs = torch.load({str(tmp_path / 'inputs.pt')!r})\n"
        f"torch.save(model.generate(**inputs, num_beams=3, max_new_tokens=8), {str(tmp_path / 'out.pt')!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    expected, _ = write(load_model(tmp_path / "compact"), writer.prompted, num_beams=3, max_new_tokens=8)
    assert torch.equal(torch.load(tmp_path / "out.pt"), expected)
