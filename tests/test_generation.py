"""Generated texts: what compact models write, with caches and without, greedily and in beams."""

import random
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import onnx
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GenerationConfig
from transformers.image_utils import load_image

from comp_cli import load_onnx, tasks
from comp_cli.checkpoint.loading import load_model
from comp_cli.cli.exit_codes import REFUSED
from comp_cli.cli.output import Output
from comp_cli.commands import export
from comp_cli.commands.prune import prune
from comp_cli.data.cells import read_answers
from comp_cli.data.rows import Pair
from comp_cli.data.scene_pairs import caption_scenes, vqa_scenes
from comp_cli.data.scenes import NUMBERS, ask, images, plural
from comp_cli.errors import CompError
from comp_cli.files.store import read_tensors_header
from comp_cli.measure.variants import on_own_kernels
from comp_cli.models import generated_texts
from comp_cli.models.dense import Dense, open_dense
from comp_cli.models.pairs import choose_pairs
from comp_cli.options import DataOptions, ExportOptions, PruneOptions, Training
from comp_cli.tasks import comparison, text_metrics

QUIET = Output("quiet")
SIZES = {"num_samples": 8, "stage_samples": 8, "eval_samples": 8, "text_tokens": 12, "device": "cpu"}
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
    return (vqa_scenes if task.has_answers else caption_scenes)("train", count)


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
    """Folder and report of the method comp. Not refitted in sequence: beams of tiny random models are near ties, which the
    rounding of another backend decides otherwise."""
    folder = tmp_path_factory.mktemp("pruned") / "compact"
    options = PruneOptions(str(writer.dense.source.folder), 0.6, sequential=False, **SIZES)
    return folder, prune(options, folder, QUIET).to_json()


@pytest.fixture(scope="module")
def served(pruned):
    """The graphs, exported."""
    folder = pruned[0].with_name("served")
    export.export(pruned[0], folder, ExportOptions(), QUIET)
    return folder


def test_graphs_write_what_torch_writes(pruned, served, writer, way):
    same(write(load_onnx(served), writer.prompted, **way), write(load_model(pruned[0]), writer.prompted, **way))


def test_graphs_caption_without_a_prompt_and_without_a_cache(pruned, served, writer, way):
    """Questions stay, for without them there is no answer."""
    inputs = {name: writer.prompted[name] for name in ("pixel_values", "input_ids")}
    if writer.dense.task.name == "caption":
        del inputs["input_ids"]
    same(write(load_onnx(served), inputs, **way), write(load_model(pruned[0]), inputs, **way))
    same(write(load_onnx(served), inputs, use_cache=False, **way), write(load_model(pruned[0]), inputs, **way))


def test_graphs_are_laid_out_as_optimum_has_them(writer, served):
    inputs, outputs = {}, {}
    for name in ("encoder_model", "decoder_model", "decoder_with_past_model"):
        graph = onnx.load(served / f"{name}.onnx").graph
        inputs[name], outputs[name] = ([value.name for value in values] for values in (graph.input, graph.output))
        if name != "encoder_model":  # attention is one node, also behind a cache
            assert sum(node.op_type == "MultiHeadAttention" for node in graph.node) == 2 * 4
    asked = ["input_ids", "attention_mask"] if writer.dense.task.name == "vqa" else []
    assert inputs["encoder_model"] == ["pixel_values", *asked] and outputs["encoder_model"] == ["last_hidden_state"]
    assert inputs["decoder_model"] == ["input_ids", "encoder_hidden_states"]
    cache = [f"{i}.{part}.{kind}" for i in range(4) for part in ("decoder", "encoder") for kind in ("key", "value")]
    assert outputs["decoder_model"] == ["logits", *(f"present.{name}" for name in cache)]
    assert inputs["decoder_with_past_model"] == ["input_ids", *(f"past_key_values.{name}" for name in cache)]
    own = [f"present.{name}" for name in cache if "decoder" in name]
    assert outputs["decoder_with_past_model"] == ["logits", *own]


def test_how_texts_begin_and_end_lies_beside_the_graphs(served):
    config = GenerationConfig.from_pretrained(served)
    assert (config.decoder_start_token_id, config.eos_token_id, config.pad_token_id) == (tiny.START, tiny.END, tiny.PAD)


def test_the_page_on_deployment_writes_a_text(writer, pruned, served, tmp_path, monkeypatch, capsys):
    """The code of docs/export.md as it stands, in a folder where its names are."""
    if writer.dense.task.has_answers:
        pytest.skip("the page captions")
    page = (Path(__file__).parent.parent / "docs" / "export.md").read_text()
    code = page.split("## Text generation")[1].split("```python")[1].split("```")[0]
    (tmp_path / "captions-onnx").symlink_to(served)
    turned = Image.Exif()
    turned[0x0112] = 6  # a photo that is stored on its side
    Image.linear_gradient("L").convert("RGB").save(tmp_path / "scene.png", format="JPEG", exif=turned)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    inputs = names["processor"](load_image("scene.png"), return_tensors="pt")
    expected = load_model(pruned[0]).generate(**inputs, num_beams=3)
    assert names["tokens"].tolist() == expected.tolist()
    assert capsys.readouterr().out == names["processor"].decode(expected[0], skip_special_tokens=True) + "\n"


def test_prompts_of_several_lengths_are_refused(writer, served):
    """The graphs have no mask for them. Questions may be padded."""
    inputs = writer.prompted | {"attention_mask": writer.prompted["attention_mask"].clone()}
    inputs["attention_mask"][0, -2:] = 0
    if writer.dense.task.has_answers:
        assert len(load_onnx(served).generate(**inputs, max_new_tokens=3)) == 3
        return
    with pytest.raises(CompError, match="prompts of one length"):
        load_onnx(served).generate(**inputs, max_new_tokens=3)


def test_folders_without_such_graphs_are_refused(writer, pruned, tmp_path):
    with pytest.raises(CompError, match="no graphs for text generation") as refused:
        load_onnx(pruned[0])
    assert refused.value.exit_code == REFUSED and "decoder_with_past_model.onnx" in refused.value.hint


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
    assert {stream for compared in report["compared"] for stream in compared["tokens"]} == {"vision"}
    texts = [row for row in report["layers"] if row["tower"] != "vision"]
    assert all(row["tokens"][0] == row["tokens"][1] for row in texts)
    for tower in {row["tower"] for row in texts}:
        rows = [row for row in texts if row["tower"] == tower]
        assert any(row[part][0] < row[part][1] for row in rows for part in ("heads", "cross_heads", "ffn"))
    assert any(row["tokens"][0] < row["tokens"][1] for row in report["layers"] if row["tower"] == "vision")


def test_embeddings_and_head_stay_one_matrix(writer, pruned, tmp_path):
    training = Training(steps=2, batch_size=4, lr=1e-2)
    prune(
        PruneOptions(str(writer.dense.source.folder), 0.4, method="joint", training=training, **SIZES),
        tmp_path / "trained",
        QUIET,
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
    prune(PruneOptions(str(tmp_path / "dense"), 0.4, method="joint", **SIZES), tmp_path / "compact", QUIET)
    model = load_model(tmp_path / "compact")
    assert torch.equal(model.text_decoder.cls.predictions.decoder.weight, own)
    assert not torch.equal(model.text_decoder.bert.embeddings.word_embeddings.weight, own)


def test_the_loss_is_that_of_the_stock_model(writer):
    """What it says of labels whose padding it ignores."""
    dense, task = writer.dense, writer.dense.task
    first, *others = scenes(task, 3)
    batch = dense.collate([replace(first, text="two red", answers=("two red",)), *others])
    text, mask = batch.inputs[task.place.text], batch.inputs[task.place.mask]
    assert (text[:, 0] == tiny.START).all() and not mask.all()
    given = batch.inputs | {"labels": text.masked_fill(mask == 0, -100)}
    if task.name == "vqa":
        given["decoder_input_ids"] = text
    with torch.inference_mode():
        expected = writer.stock(**given).loss.item()
        (question,) = task.rankings(task.forward(writer.stock, batch.inputs), batch.labels)
    assert question.loss().item() == pytest.approx(expected, rel=1e-4)
    assert len(question.logits) == mask.sum() - 3
    found = comparison.evaluate(writer.stock, task, [batch, batch])
    assert found.samples == 6 and len(found.labels) == len(found.outputs[0]) <= 4 * 6
    assert 0 <= found.metrics["token accuracy"] <= 1


def test_of_long_texts_some_tokens_are_remembered():
    """As many rows of what was read as of the labels, and the same ones."""
    rows, labels = torch.arange(90).float(), torch.arange(90)
    kept, known = tasks.TASKS["caption"].subsample((rows, labels), 3)
    assert len(kept) == 4 * 3 and torch.equal(kept.long(), known) and len(set(known.tolist())) == 12
    assert len(tasks.TASKS["caption"].subsample((rows,), 30)[0]) == 90


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
    asked = {"question": lambda n: "two circle", "answer": lambda n: "red" if n % 4 else ""}
    (tmp_path / "plain").mkdir()
    tables = tiny.table(tmp_path, **asked), tiny.table(tmp_path / "plain", question=asked["question"])
    takes = writer.dense.task.accepts
    pairs = choose_pairs(writer.dense, DataOptions(tables[0]), QUIET).read("calibration", accepts=takes)
    assert {pair.answer for pair in pairs} == {"red"}
    with pytest.raises(CompError, match="no pairs that match") as refused:
        list(choose_pairs(writer.dense, DataOptions(tables[1]), QUIET).read("calibration", accepts=takes))
    assert refused.value.exit_code == REFUSED and "answers" in refused.value.hint


def test_texts_that_are_written_are_scored(writer, tmp_path):
    """On the user's pairs: what the dense and the compact model write at the end, first the metric that counts."""
    asked = {"question": lambda n: "two circle", "answers": lambda n: ["red", "red", f"blue {n}"]}
    told = {"caption": lambda n: "a large red circle and two small squares" if n % 2 else "three blue circle above a square"}
    data = DataOptions(tiny.table(tmp_path, **(asked if writer.dense.task.has_answers else told)))
    source = str(writer.dense.source.folder)
    report = prune(PruneOptions(source, 0.5, method="joint", data=data, **SIZES), tmp_path / "compact", QUIET).to_json()
    metric = "soft accuracy" if writer.dense.task.has_answers else "CIDEr"
    assert report["quality"]["metric"] == metric == next(iter(report["quality"]["metrics"]))
    pairs = list(choose_pairs(writer.dense, data, QUIET).read("evaluation", 8, accepts=writer.dense.task.accepts))
    found = generated_texts.judge(
        load_model(tmp_path / "compact"), writer.dense, *text_metrics.references(writer.dense.task, pairs), 3
    )
    assert found[metric] == report["quality"]["metrics"][metric]["compact"]


def test_what_is_written_does_not_depend_on_the_batch(writer):
    """Questions of several lengths among them."""
    pairs = list(scenes(writer.dense.task, 9))
    together = generated_texts.generate(writer.stock, writer.dense, pairs, 4, lambda done: None)
    assert together == [generated_texts.generate(writer.stock, writer.dense, [pair], 1, lambda done: None)[0] for pair in pairs]
    assert len(set(together)) > 1


def test_pairs_that_a_model_was_not_made_for_hold_no_labels(writer, pruned):
    _, report = pruned
    assert report["quality"]["metrics"] is None and 0 <= report["quality"]["agreement"] <= 1


def test_captions_of_one_image_are_its_references():
    task = tasks.TASKS["caption"]
    picture = Image.new("RGB", (8, 8))
    pairs = [Pair(picture, text, image_id=n) for n, text in ((1, "a red circle"), (2, "two blue squares"), (1, "one circle"))]
    about, known = text_metrics.references(task, pairs)
    assert [pair.image_id for pair in about] == [1, 2] and known == [("a red circle", "one circle"), ("two blue squares",)]
    right, wrong = ["a red circle", "Two blue squares."], ["two blue squares", "a red circle"]
    assert text_metrics.score(task, right, known)["CIDEr"] > 1 > 0.1 > text_metrics.score(task, wrong, known)["CIDEr"]


def test_answers_are_scored_as_the_challenge_does():
    """Ten people: right in full if three others said so; of the two who said cat each sees one other."""
    answers = ["dog"] * 8 + ["cat"] * 2
    assert text_metrics.vqa_accuracy("dog", answers) == 1.0 and text_metrics.vqa_accuracy("bird", answers) == 0.0
    assert text_metrics.vqa_accuracy("cat", answers) == pytest.approx((8 * 2 / 3 + 2 * 1 / 3) / 10)
    assert text_metrics.vqa_accuracy("dog", ["dog"]) == text_metrics.vqa_accuracy("dog", ["dog", "cat"]) == 1.0
    assert (
        text_metrics.normalize_answer("The two dogs, on 1,000 mats.") == "2 dogs on 1000 mats"
        and text_metrics.normalize_answer("It’s 3.5") == "its 3.5"
    )
    assert text_metrics.normalize_answer("A") == "a" != text_metrics.normalize_answer("")
    known = [tuple(answers), ("two",)]
    assert text_metrics.score(tasks.TASKS["vqa"], ["a Cat", "2"], known) == {
        "soft accuracy": pytest.approx((0.6 + 1) / 2),
        "accuracy": 0.5,
    }


@pytest.mark.parametrize(("installed", "images", "reason"), [(False, 2, "pycocoevalcap"), (True, 1, "two images")])
def test_what_cannot_be_scored_is_not_written(writer, tmp_path, monkeypatch, installed, images, reason):
    """Then the tokens count, and a warning says so."""
    if writer.dense.task.has_answers:
        pytest.skip("answers need no library")
    if not installed:
        monkeypatch.setattr(text_metrics, "find_spec", lambda name: None)
    monkeypatch.setattr(generated_texts, "generate", None)
    out = Output("quiet")
    told = tiny.table(tmp_path, caption=lambda n: "two red circle")
    options = PruneOptions(
        str(writer.dense.source.folder), 0.3, method="joint", data=DataOptions(told), **SIZES | {"eval_samples": images}
    )
    report = prune(options, tmp_path / "compact", out)
    assert report.quality.metric == "token accuracy" and any(reason in told for told in out.warnings)


@pytest.mark.parametrize(
    "value", [["red", "blue"], [{"answer": "red"}, {"answer": "blue", "answer_id": 2}], {"answer": ["red", "blue"]}, "red"]
)
def test_answers_as_data_sets_hold_them(value):
    assert read_answers(value) == (("red",) if value == "red" else ("red", "blue"))
    assert read_answers(None) == read_answers([""]) == read_answers(float("nan")) == ()
    assert read_answers(3) == read_answers(3.0) == ("3",)
