"""Generated texts: what compact models write, with caches and without, greedily and in beams."""

import json
import random
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace

import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from comp_cli import tasks
from comp_cli.data import asked_scenes, described_scenes
from comp_cli.errors import REFUSED, CompError
from comp_cli.loading import load_model
from comp_cli.output import Output
from comp_cli.prune import Options, prune
from comp_cli.scenes import NUMBERS, ask, images, plural
from comp_cli.store import read_tensors_header
from comp_cli.training import Training
from comp_cli.variants import on_own_kernels
from comp_cli.workbench import DataOptions, Dense, choose_pairs, open_dense

QUIET = Output("quiet")
SIZES = {"num_samples": 8, "stage_samples": 8, "eval_samples": 8, "text_tokens": 12, "stages": 6, "device": "cpu"}
HEAD = "text_decoder.cls.predictions.decoder.weight"
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


def scenes(task, count):
    """Pairs for a task."""
    return (asked_scenes if task.answered else described_scenes)("train", count)


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


@pytest.fixture(scope="module")
def pruned(writer, tmp_path_factory):
    """Folder and report of the method comp."""
    folder = tmp_path_factory.mktemp("pruned") / "compact"
    return folder, prune(Options(str(writer.dense.source.folder), 0.6, **SIZES), folder, QUIET)


def test_a_pruned_checkpoint_writes_without_comp(writer, pruned, tmp_path):
    torch.save(writer.prompted, tmp_path / "inputs.pt")
    script = (
        "import sys, torch; sys.modules['comp_cli'] = None\n"
        "from transformers import AutoModel\n"
        f"model = AutoModel.from_pretrained({str(pruned[0])!r}, trust_remote_code=True).eval()\n"
        f"inputs = torch.load({str(tmp_path / 'inputs.pt')!r})\n"
        f"torch.save(model.generate(**inputs, num_beams=3, max_new_tokens=8), {str(tmp_path / 'out.pt')!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    expected, _ = write(load_model(pruned[0]), writer.prompted, num_beams=3, max_new_tokens=8)
    assert torch.equal(torch.load(tmp_path / "out.pt"), expected)


def test_texts_lose_heads_and_channels_but_no_tokens(writer, pruned):
    _, report = pruned
    assert "language_tokens" not in {stage["mode"] for stage in report["stages"]}
    texts = [row for row in report["layers"] if row["tower"] != "vision"]
    assert all(row["tokens"][0] == row["tokens"][1] for row in texts)
    for tower in {row["tower"] for row in texts}:
        rows = [row for row in texts if row["tower"] == tower]
        assert any(row[part][0] < row[part][1] for row in rows for part in ("heads", "cross_heads", "ffn"))
    assert any(row["tokens"][0] < row["tokens"][1] for row in report["layers"] if row["tower"] == "vision")


def test_embeddings_and_head_stay_one_matrix(writer, pruned, tmp_path):
    training = Training(steps=2, batch_size=4, lr=1e-2)
    prune(
        Options(str(writer.dense.source.folder), 0.4, method="joint", training=training, **SIZES), tmp_path / "trained", QUIET
    )
    for folder in (pruned[0], tmp_path / "trained"):
        assert HEAD not in read_tensors_header(folder / "model.safetensors")
        decoder = load_model(folder).text_decoder
        assert decoder.cls.predictions.decoder.weight is decoder.bert.embeddings.word_embeddings.weight
    before = writer.dense.state["text_decoder.bert.embeddings.word_embeddings.weight"]
    assert not torch.equal(decoder.cls.predictions.decoder.weight, before)


def test_a_head_of_its_own_stays_one(writer, tmp_path):
    """A checkpoint whose head is not the word embeddings, whatever its config says."""
    source = writer.dense.source.folder
    shutil.copytree(source, tmp_path / "dense")
    tensors = load_file(source / "model.safetensors")
    own = torch.randn_like(tensors["text_decoder.bert.embeddings.word_embeddings.weight"])
    save_file(tensors | {HEAD: own}, tmp_path / "dense" / "model.safetensors", metadata={"format": "pt"})
    prune(Options(str(tmp_path / "dense"), 0.4, method="joint", **SIZES), tmp_path / "compact", QUIET)
    model = load_model(tmp_path / "compact")
    assert torch.equal(model.text_decoder.cls.predictions.decoder.weight, own)
    assert not torch.equal(model.text_decoder.bert.embeddings.word_embeddings.weight, own)


def test_the_loss_is_that_of_the_stock_model(writer):
    """What it says of labels whose padding it ignores."""
    dense, task = writer.dense, writer.dense.task
    first, *others = scenes(task, 3)
    batch = dense.collate([replace(first, text="two red", answer="two red"), *others])
    text, mask = batch.inputs[task.text], batch.inputs[task.mask]
    assert (text[:, 0] == tiny.START).all() and not mask.all()
    given = batch.inputs | {"labels": text.masked_fill(mask == 0, -100)}
    if task.name == "vqa":
        given["decoder_input_ids"] = text
    with torch.inference_mode():
        expected = writer.stock(**given).loss.item()
        (question,) = task.questions(task.read(writer.stock, batch.inputs), batch.labels)
    assert question.loss().item() == pytest.approx(expected, rel=1e-4)
    assert len(question.logits) == mask.sum() - 3
    found = tasks.evaluate(writer.stock, task, [batch, batch])
    assert found.samples == 6 and len(found.labels) == len(found.read[0]) <= 4 * 6
    assert 0 <= found.metrics["token accuracy"] <= 1


def test_of_long_texts_some_tokens_are_remembered():
    """As many rows of what was read as of the labels, and the same ones."""
    rows, labels = torch.arange(90).float(), torch.arange(90)
    kept, known = tasks.TASKS["caption"].remembered((rows, labels), 3)
    assert len(kept) == 4 * 3 and torch.equal(kept.long(), known) and len(set(known.tolist())) == 12
    assert len(tasks.TASKS["caption"].remembered((rows,), 30)[0]) == 90


def test_a_causal_mask_behind_a_cache(writer):
    tower = writer.dense.family.towers[-1]
    attention = writer.compact.get_submodule(tower.encoder).layer[0].attention.self
    assert attention.complete(None, torch.zeros(1, 2, 72), 3).int().tolist() == [[[[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]]]


def test_answers_hold():
    """Asked of the scenes that were drawn: counted anew."""
    kinds = set()
    for scene, background in images("train", 200):
        question, answer = ask(random.Random(background), scene)
        words = question.removesuffix("?").split()
        kinds.add(words[0])
        if words[0] == "what":
            assert [thing.colour for thing in scene if thing.shape == words[-1]] == [answer]
        else:
            named = [t for t in scene if t.colour == words[2] or plural(t.shape) == words[2]]
            assert NUMBERS[len(named)] == answer
    assert kinds == {"what", "how"}


def test_questions_of_ones_own(writer, tmp_path):
    if writer.dense.task.name != "vqa":
        pytest.skip("captions have no answers")
    for number in range(12):
        Image.new("RGB", (8, 8), (20 * number, 0, 99)).save(tmp_path / f"{number}.png")
    rows = [{"image": f"{n}.png", "question": "two circle", "answer": "red" if n % 4 else ""} for n in range(12)]
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "plain.jsonl").write_text("\n".join(json.dumps({k: v for k, v in r.items() if k != "answer"}) for r in rows))
    takes = writer.dense.task.takes
    pairs = choose_pairs(writer.dense, DataOptions(str(tmp_path / "asked.jsonl")), QUIET).read("calibration", takes=takes)
    assert {pair.answer for pair in pairs} == {"red"}
    with pytest.raises(CompError, match="no pairs that match") as refused:
        list(choose_pairs(writer.dense, DataOptions(str(tmp_path / "plain.jsonl")), QUIET).read("calibration", takes=takes))
    assert refused.value.code == REFUSED and "answers" in refused.value.hint
