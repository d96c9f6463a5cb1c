"""Every family through the same tests: what is pruned, loaded, exported and counted is what the description says."""

import json
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import onnx
import pytest
import tiny
import torch
import transformers
from torch import nn

from comp_cli import load, tasks
from comp_cli.checkpoint.loading import load_model
from comp_cli.cli.exit_codes import USAGE
from comp_cli.cli.output import Output
from comp_cli.commands import bench, export
from comp_cli.commands.prune import prune
from comp_cli.engine import flops
from comp_cli.engine.token_ranking import with_score_rule
from comp_cli.errors import CompError
from comp_cli.families import find_family
from comp_cli.measure.variants import on_own_kernels
from comp_cli.models.dense import Dense, open_dense
from comp_cli.options import BenchOptions, ExportOptions, PruneOptions, Training
from comp_cli.plan import Plan
from comp_cli.topology import EncoderDecoder

QUIET = Output("quiet")
SIZES = {"num_samples": 8, "stage_samples": 8, "eval_samples": 8, "text_tokens": 12, "device": "cpu"}


@dataclass(frozen=True)
class Case:
    name: str
    folder: Path
    dense: Dense
    stock: nn.Module
    plan: Plan  # uneven

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """Three samples; the last text is padded, where the family pads to the longest."""
        return self.dense.random_inputs(3, 12, padded=5)

    @property
    def asked(self) -> dict[str, bool]:
        """What the class itself needs to be asked with."""
        return {"use_itm_head": False} if self.dense.family.name == "blip_contrastive" else {}

    def options(self, ratio: float, **changes) -> PruneOptions:
        return PruneOptions(str(self.folder), ratio, task=tiny.TASKS.get(self.name), **SIZES | changes)

    def read(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        task = self.dense.task
        with torch.inference_mode():
            return task.features(task.forward(model, inputs))

    def rows(self, inputs: dict[str, torch.Tensor]) -> list[int]:
        """How many rows of what is read belong to each sample."""
        task = self.dense.task
        if isinstance(task, tasks.TokenPrediction):
            return (inputs[task.place.mask].sum(1) - 1).tolist()
        return [1] * len(next(iter(inputs.values())))


@pytest.fixture(scope="session", params=list(tiny.FAMILIES))
def case(request, tmp_path_factory):
    folder = tiny.write(request.param, tmp_path_factory.mktemp(request.param) / "dense")
    dense = open_dense(str(folder), QUIET, text_tokens=12, task=tiny.TASKS.get(request.param))
    stock = load_model(folder, family=dense.family, dtype=torch.float32).requires_grad_(False)
    return Case(request.param, folder, dense, stock, tiny.uneven(dense.plan, dense.family))


@pytest.fixture(scope="session")
def compact_folder(case, tmp_path_factory):
    """Pruned by the method comp at 0.6."""
    folder = tmp_path_factory.mktemp(f"{case.name}-compact") / "compact"
    prune(case.options(0.6), folder, QUIET)
    return folder


@pytest.fixture(scope="session")
def dropping_folder(case, tmp_path_factory):
    """Pruned by the method comp-paper at 0.6: tokens go as well, which random weights give comp no reason for. Not refitted in
    sequence: token scores of tiny random models are near ties, which the rounding of another backend decides otherwise."""
    folder = tmp_path_factory.mktemp(f"{case.name}-dropping") / "compact"
    prune(case.options(0.6, method="comp-paper", sequential=False, stages=6), folder, QUIET)
    return folder


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


def test_nothing_pruned_says_what_the_stock_model_says(case):
    same(case.read(on_own_kernels(case.stock, case.dense.family), case.inputs), case.read(case.stock, case.inputs))


def test_masked_is_sliced(case):
    """Heads and channels that are multiplied with zero in the dense model, tokens pruned alike; padded text."""
    same(case.read(case.dense.runtime(case.plan), case.inputs), case.read(tiny.masked(case.dense, case.plan), case.inputs))


def test_results_do_not_depend_on_the_batch(case):
    model = case.dense.runtime(case.plan)
    together = case.read(model, case.inputs).split(case.rows(case.inputs))
    for row in range(3):
        same(case.read(model, {name: tensor[row : row + 1] for name, tensor in case.inputs.items()}), together[row])


def test_padding_changes_nothing(case):
    """The last text, alone and without its padding."""
    if case.name == "blip-vqa":
        pytest.skip("transformers does not mask the padding of questions, and comp says what it says")
    if "attention_mask" not in case.inputs:
        pytest.skip("texts of this family are always as long")
    short = {name: tensor[2:, :7] if tensor.ndim == 2 else tensor[2:] for name, tensor in case.inputs.items()}
    assert short["attention_mask"].all() and not case.inputs["attention_mask"][2].all()
    plan = replace(case.plan, towers=tuple(t if t.name == "vision" else shortened(t, 6) for t in case.plan.towers))
    model = case.dense.runtime(plan)
    same(case.read(model, short), case.read(model, case.inputs).split(case.rows(case.inputs))[2])


def test_what_is_read_at_its_place_is_still_there(case):
    """Tokens that the last layer of the text tower drops can change nothing that is read at a token that stays."""
    if not any(mode.stream == "language" for mode in case.dense.family.modes.values()):
        pytest.skip("no texts, or none that may lose tokens")
    tower = case.dense.plan.tower("language")
    last = tower.layers[-1].handing_on("language", 4)
    model = case.dense.runtime(case.dense.plan.with_tower(replace(tower, layers=(*tower.layers[:-1], last))))
    same(case.read(model, case.inputs), case.read(case.stock, case.inputs))


def test_the_first_checkpoints_of_clip(case):
    """Their configs say that the end of a text is token 2, where it is the highest id; some callers mask nothing."""
    if not case.name.startswith("clip") or "input_ids" not in case.inputs:
        pytest.skip("only CLIP's")
    tower = case.dense.plan.tower("language")
    last = tower.layers[-1].handing_on("language", 4)
    model = case.dense.runtime(case.dense.plan.with_tower(replace(tower, layers=(*tower.layers[:-1], last))))
    ids = case.inputs["input_ids"]
    inputs = case.inputs | {"input_ids": torch.where(ids == tiny.END, 4 + len(tiny.WORDS), ids)}
    inputs["attention_mask"] = torch.ones_like(ids)
    try:
        for one in (model, case.stock):
            one.text_model.eos_token_id = 2
        same(case.read(model, inputs), case.read(case.stock, inputs))
    finally:
        case.stock.text_model.eos_token_id = tiny.END


def shortened(tower, keep):
    """Keep counts that also bite in a text of seven tokens: what is kept of padding must not count."""
    return replace(tower, layers=tuple(layer.handing_on(tower.name, keep) if layer.keep else layer for layer in tower.layers))


def test_flops_are_those_that_run(case):
    for plan in (case.dense.plan, case.plan):
        inputs = case.dense.random_inputs(1, 12)
        model = case.dense.runtime(plan)
        assert flops.count(plan, case.dense.reference).total == count(model, inputs)


def test_flops_at_texts_of_another_length_are_those_that_run(case):
    """Kept numbers of tokens are constants, so fewer or none go; words that are written or padding cost what they cost."""
    for length in (5, 8, 17):
        inputs = case.dense.random_inputs(1, length)
        tokens = case.dense.family.topology.count_tokens(inputs, case.dense.processor)
        there = case.dense.reference.with_texts(tokens)
        for plan in (case.dense.plan, case.plan):
            assert flops.count(plan, there).total == count(case.dense.runtime(plan), inputs)


def count(model, inputs):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**inputs)
    return counter.get_total_flops()


def test_comp_prunes_it_and_it_loads_without_comp(case, compact_folder):
    report = json.loads((compact_folder / "comp_report.json").read_text())
    assert report["ratio"] == pytest.approx(0.6, abs=0.015) and report["params"]["compact"] < report["params"]["dense"]
    assert report["flops"]["compact"] < 0.42 * report["flops"]["dense"] and report["task"] == case.dense.task.name
    inputs = case.inputs | case.asked
    torch.save(inputs, compact_folder.parent / "inputs.pt")
    script = (
        "import sys, torch; sys.modules['comp_cli'] = None\n"
        "from transformers import AutoModel\n"
        f"model = AutoModel.from_pretrained({str(compact_folder)!r}, trust_remote_code=True).eval()\n"
        f"inputs = torch.load({str(compact_folder.parent / 'inputs.pt')!r})\n"
        "with torch.inference_mode(): out = model(**inputs)\n"
        f"torch.save({{k: v for k, v in out.items() if torch.is_tensor(v)}}, {str(compact_folder.parent / 'out.pt')!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = torch.load(compact_folder.parent / "out.pt")
    with torch.inference_mode():
        expected = load(compact_folder)(**inputs)
    assert found
    for name, tensor in found.items():
        same(tensor, getattr(expected, name))


def test_a_killed_search_goes_on_and_ends_alike(case, compact_folder, tmp_path, monkeypatch):
    from comp_cli.search import journal

    saved = journal.Journal.save

    def dies(self, *given):
        saved(self, *given)
        if len(given[0]["looks"]) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(journal.Journal, "save", dies)
    with pytest.raises(KeyboardInterrupt):
        prune(case.options(0.6), tmp_path / "compact", QUIET)
    monkeypatch.setattr(journal.Journal, "save", saved)
    prune(case.options(0.6), tmp_path / "compact", QUIET)
    assert (tmp_path / "compact" / "model.safetensors").read_bytes() == (compact_folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_it_can_be_trained(case, tmp_path, share):
    training = Training(steps=4, batch_size=4, lr=1e-3, stage_share=share)
    stages = {"stages": 3} if share else {}
    report = prune(case.options(0.4, method="joint", training=training, **stages), tmp_path / "compact", QUIET)
    assert report.ratio == pytest.approx(0.4, abs=0.015)
    norms = {name: tensor for name, tensor in load(tmp_path / "compact").state_dict().items() if "norm" in name.lower()}
    moved = [name for name, tensor in norms.items() if not torch.equal(tensor, case.dense.state[name])]
    assert len(moved) > len(norms) / 2  # pruning leaves norms alone, the steps did not


def test_an_export_says_what_torch_says(case, dropping_folder, tmp_path):
    report = export.export(dropping_folder, tmp_path / "onnx", ExportOptions(), QUIET)
    assert report.passed and report.agreement == 1.0
    check_profile(dropping_folder, [onnx.load(tmp_path / "onnx" / name).graph for name in report.graphs])
    if isinstance(case.dense.family.topology, EncoderDecoder):
        assert list(report.graphs) == ["encoder_model.onnx", "decoder_model.onnx", "decoder_with_past_model.onnx"]
        return
    (graph,) = report.graphs.values()
    assert tuple(graph.inputs) == case.dense.family.topology.inputs and tuple(graph.outputs) == case.dense.task.outputs


def check_profile(folder, written: list[onnx.GraphProto]) -> None:
    """A profile shows what token pruning costs: the layers that drop tokens, and no others, have nodes of that name. Each ranks
    (TopK, and once more to sort what stays), and its attention scores (Softmax; the attention's own is in its node)."""
    layers, attentions = [], []
    for tower in json.loads((folder / "config.json").read_text())["comp"]["towers"]:
        layout = tower["layout"]
        for index, layer in enumerate(tower["layers"]):
            if layer["keep"] is not None:
                layers.append(f"{layout['encoder']}.{layout['layers']}.{index}")
                attentions.append(f"{layers[-1]}.{layout['attention']['module']}")
    places = [(node.op_type, *node.name.split("/")[:2]) for graph in written for node in graph.node]
    expected = [("TopK", layer, "token_pruning") for layer in 2 * layers]
    assert layers and Counter(place for place in places if place[0] == "TopK") == Counter(expected)
    expected = [("Softmax", attention, "token_pruning") for attention in attentions]
    assert Counter(place for place in places if place[::2] == ("Softmax", "token_pruning")) == Counter(expected)


def test_images_and_texts_apart(case, compact_folder, tmp_path):
    options = ExportOptions(split=True)
    if case.dense.family.topology.why_whole:
        with pytest.raises(CompError, match=r"--split: .* (encodes only one|in parts anyway)"):
            export.export(compact_folder, tmp_path / "onnx", options, QUIET)
        return
    report = export.export(compact_folder, tmp_path / "onnx", options, QUIET)
    assert report.passed and list(report.graphs) == ["vision_model.onnx", "text_model.onnx"]
    assert list(report.graphs["vision_model.onnx"].outputs) == ["image_embeds"]


def test_standard_operators_only(compact_folder, tmp_path):
    report = export.export(compact_folder, tmp_path / "onnx", ExportOptions(target="onnx"), QUIET)
    assert report.passed
    for name in report.graphs:
        assert {node.domain for node in onnx.load(tmp_path / "onnx" / name).graph.node} <= {"", "ai.onnx"}


def test_it_is_benchmarked(case, compact_folder):
    with_graphs = case.name in ("clip", "blip-contrastive", "blip-vqa")  # blip's are in test_bench.py
    backends = ("torch", "onnx") if with_graphs else ("torch",)
    options = BenchOptions(device="cpu", backends=backends, batches=(2,), iterations=2, duration=0, text_tokens=12)
    benched = bench.bench(compact_folder, str(case.folder), options, QUIET)
    report = json.loads((compact_folder / "comp_report.json").read_text())
    assert benched.flops.compact == report["flops"]["compact"]
    assert {row.backend for row in benched.speedups} == set(backends)


def test_it_is_analysed(case):
    from comp_cli.commands.analyze import analyze
    from comp_cli.options import AnalyzeOptions

    how = {"num_samples": 4, "batch_size": 4, "text_tokens": 12, "score_rows": 64, "device": "cpu", "seed": 0}
    report = analyze(AnalyzeOptions(str(case.folder), task=tiny.TASKS.get(case.name), **how), QUIET)
    assert {row.tower for row in report.layers} == {tower.name for tower in case.dense.family.towers}
    assert report.params.total == sum(p.numel() for p in case.stock.parameters())


def test_the_usual_task_and_others():
    config = {"architectures": ["BlipForImageTextRetrieval"]}
    family, architecture, task = find_family(config)
    assert (family.name, architecture, task) == ("blip", "BlipForImageTextRetrieval", "itm")
    assert find_family(config, "zero-shot")[0].name == "blip_contrastive"
    assert find_family(config | {"comp": {"task": "retrieval"}})[0].name == "blip_contrastive"
    assert find_family({"architectures": ["CompactCLIPModel"]})[1:] == ("CLIPModel", "retrieval")
    with pytest.raises(CompError, match="--task caption: this model is for itm, retrieval, zero-shot.") as refused:
        find_family(config, "caption")
    assert refused.value.exit_code == USAGE


def test_supported_names_are_classes():
    from comp_cli.families import FAMILIES, supported

    assert all(hasattr(transformers, name) for name in supported())
    assert all(key == family.name for key, family in FAMILIES.items())


def test_checkpoints_of_older_transformers(case, tmp_path):
    """They hold position ids, which are no weights any more, and may be of half precision or in shards."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "old"
    transformers.AutoConfig.from_pretrained(case.folder).save_pretrained(folder)
    state = {name: tensor.half() for name, tensor in load_file(case.folder / "model.safetensors").items()}
    embeddings = [name.rpartition(".position_embedding")[0] for name in state if ".position_embedding" in name]
    half, rest = dict(list(state.items())[::2]), dict(list(state.items())[1::2])
    half |= {f"{name}.position_ids": torch.arange(24).unsqueeze(0) for name in embeddings}
    parts = {"model-00001-of-00002.safetensors": half, "model-00002-of-00002.safetensors": rest}
    for name, part in parts.items():
        save_file(part, folder / name, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {key: name for name, part in parts.items() for key in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copyfile(case.folder / "config.json", folder / "config.json")
    loaded = load_model(folder, family=case.dense.family, dtype=torch.float32)
    same(case.read(loaded, case.inputs), case.read(case.stock.half().float(), case.inputs))


def test_token_scores_that_a_family_does_not_have_are_refused(case):
    has_class = any(name == "vision" and stream.class_token for name, (_, stream) in case.dense.family.streams.items())
    if has_class:
        plan = with_score_rule(case.dense.plan, "cls", case.dense.family)
        assert plan.streams["vision"].score_rule == "cls"
        return
    with pytest.raises(CompError, match="token scores by cls") as refused:
        with_score_rule(case.dense.plan, "cls", case.dense.family)
    assert refused.value.exit_code == 2
