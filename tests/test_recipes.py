"""The README.md of what comp writes, as somebody follows it: every block of code runs as it stands, and says what torch says.

Blocks that promise to need no torch, transformers or comp run where these cannot be imported.
"""

import json
import re
import subprocess
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tiny
import torch
import transformers
import yaml
from huggingface_hub import ModelCard
from packaging.version import Version
from PIL import Image
from transformers.image_utils import load_image

from comp_cli.checkpoint.loading import load_model, load_processor, untied_state_dict
from comp_cli.cli.output import Output
from comp_cli.commands import export, prune
from comp_cli.models.compact import write_checkpoint
from comp_cli.models.dense import Dense, open_dense
from comp_cli.onnx.checks import LEAST, SHARED_BIAS
from comp_cli.options import OPSET, DataOptions, ExportOptions, PruneOptions, TokenOptions, Training
from comp_cli.plan import Channels, Plan
from comp_cli.report import card_code, card_head, cards
from comp_cli.report.base import Sizes
from comp_cli.report.card_pictures import show_pictures
from comp_cli.topology import DualEncoder, EncoderDecoder, card_examples

QUIET = Output("quiet")
LAYOUTS = {"blip": (False, True), "siglip": (False, True), "clip": (True,)}  # whether split; others are written whole
BARRED = "torch transformers comp_cli huggingface_hub safetensors onnx scipy pandas datasets".split()

RUNNER = """
import builtins, importlib.abc, io, json, os, shutil, sys
from contextlib import redirect_stdout

class Bar(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in barred:
            raise ImportError(f"{name} was not promised")

barred, jobs, pictures = json.load(sys.stdin)
sys.meta_path.insert(0, Bar())
import numpy as np
found = []
for folder, code in jobs:
    os.chdir(folder)
    for picture in pictures:
        shutil.copyfile(picture, "scene.png")
        names, said = {}, io.StringIO()
        with redirect_stdout(said):
            exec(code, names)
        values = {name: np.asarray(names[name]).tolist() for name in ("scores", "logits", "cosine", "written") if name in names}
        if "pixels" in names:
            values["pixels"] = names["pixels"]("scene.png").tolist()
        found.append(values | {"said": said.getvalue()})
    os.remove("scene.png")
json.dump(found, sys.stdout)
"""


def run_blocks(jobs: list[tuple[Path, str]], pictures: list[Path], barred: list[str], home: Path) -> list[dict[str, Any]]:
    """Run each code in its folder, once with each picture as scene.png: what it printed, and values that it made."""
    given = json.dumps([barred, [[str(folder), code] for folder, code in jobs], list(map(str, pictures))])
    where = {"HF_HOME": str(home), "PATH": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ORT_DISABLE_TELEMETRY": "1"}
    done = subprocess.run([sys.executable, "-I", "-c", RUNNER], input=given, env=where, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def blocks(folder: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[Path]:
    return draw_pictures(tmp_path_factory.mktemp("pictures"))


def draw_pictures(folder: Path) -> list[Path]:
    """A photo stored on its side, a wide picture, and one with alpha; what is on them is not symmetric."""
    generator = np.random.default_rng(0)

    def noise(width: int, height: int, channels: int) -> Image.Image:
        small = generator.integers(0, 256, (6, 8, channels), dtype=np.uint8)
        return Image.fromarray(small).resize((width, height), Image.Resampling.BILINEAR)

    turned = Image.Exif()
    turned[0x0112] = 6
    noise(90, 60, 3).save(folder / "phone.jpg", exif=turned)
    noise(151, 53, 3).save(folder / "wide.png")
    noise(60, 70, 4).save(folder / "alpha.png")
    return [folder / name for name in ("phone.jpg", "wide.png", "alpha.png")]


@dataclass(frozen=True)
class Written:
    """A tiny compact model of a family, with heads, channels and tokens gone, as comp writes it."""

    dense: Dense
    folder: Path

    @property
    def model(self):
        return load_model(self.folder, family=self.dense.family, dtype=torch.float32)


def sizes(dense: Dense, plan: Plan) -> Sizes:
    return Sizes(dense.params(dense.plan), dense.params(plan))


def smaller(dense: Dense) -> Plan:
    """Two heads of six and half of the channels gone, and image tokens. Those of texts stay: random weights rank them nearly
    alike, and rounding would decide."""

    def cut(layer, name):
        for part, units in layer.parts.items():
            layer = layer.keeping(part, units.units[::2] if isinstance(units, Channels) else (0, 1, 3, 5))
        return layer.handing_on(name, 20 if name == "vision" else None)

    towers = (replace(t, layers=tuple(cut(layer, t.name) for layer in t.layers)) for t in dense.plan.towers)
    return replace(dense.plan, towers=tuple(towers))


def write_compact(family: str, place: Path) -> Written:
    """Two layers, which export fast, and no search for what should go."""
    with pytest.MonkeyPatch.context() as patch:
        for tower in ("VISION", "TEXT"):
            patch.setattr(tiny, tower, getattr(tiny, tower) | {"num_hidden_layers": 2})
        tiny.write(family, place / "dense")
    dense = open_dense(str(place / "dense"), QUIET, text_tokens=12, task=tiny.TASKS.get(family))
    for name, weight in dense.state.items():
        if name.endswith(("predictions.bias", "predictions.decoder.bias")):
            weight[tiny.END] = -20.0  # so that several words are written
    plan = smaller(dense)
    folder = place / "compact"
    folder.mkdir()
    options = PruneOptions(str(place / "dense"), 0.4, method="joint")
    quality = {"samples": 8, "data": "table", "metric": "accuracy", "metrics": None, "agreement": 0.9}
    document = prune.describe(dense, plan, options, sizes(dense, plan)).to_json() | {
        "quality": quality,
        "command": cards.prune_command(options),
    }
    document["base_address"] = dense.source.address_from(folder)
    compact = dense.runtime(plan)
    write_checkpoint(folder, dense, compact, plan, document, dict.fromkeys(untied_state_dict(compact), torch.float32))
    return Written(dense, folder)


@pytest.fixture(scope="module")
def every(tmp_path_factory) -> dict[str, Written]:
    return {family: write_compact(family, tmp_path_factory.mktemp(family)) for family in tiny.FAMILIES}


def expected(written: Written, picture: Path) -> dict[str, np.ndarray]:
    """What transformers' processor and torch say of a picture and of the texts of the recipes."""
    topology, task, model = written.dense.family.topology, written.dense.task, written.model
    processor, image = load_processor(written.folder), load_image(str(picture))
    padding = "max_length" if topology.padding == "max_length" else True
    texts = [task.prompt.format(label) for label in card_examples.LABELS] if task.prompt != "{}" else card_examples.TEXTS
    read = {"padding": padding, "return_tensors": "pt"}
    found = {}
    if topology.reads_images:
        found["pixels"] = getattr(processor, "image_processor", processor)(image, return_tensors="pt")["pixel_values"].numpy()
    with torch.no_grad():
        if isinstance(topology, EncoderDecoder):
            asked = {"text": card_examples.QUESTION} if topology.question else {}
            inputs = processor(images=image, **asked, return_tensors="pt")
            tokens = model.generate(**inputs, num_beams=1, do_sample=False, max_new_tokens=card_examples.LONGEST - 1)[0]
            return found | {"written": tokens.numpy(), "said": processor.decode(tokens, skip_special_tokens=True) + "\n"}
        if task.paired_inputs:
            inputs = processor(images=[image] * len(texts), text=texts, **read)
            return found | {"scores": model(**inputs).itm_score.numpy()}
        if isinstance(topology, DualEncoder):
            inputs = processor(images=image, text=texts, **read)
            inputs = {name: inputs[name] for name in topology.inputs if name in inputs}
            return found | {"logits": model(**inputs).logits_per_image[0].numpy()}
        if topology.reads_images:
            values = torch.from_numpy(found["pixels"])
            first, second = model(pixel_values=torch.cat([values, values.flip(-1)])).image_embeds
        else:
            first, second = model(**processor(texts, **read)).text_embeds
        return found | {"cosine": torch.cosine_similarity(first, second, dim=0).numpy()}


def agrees(found: dict[str, Any], right: dict[str, Any]) -> None:
    assert right.keys() <= found.keys() and found["said"].strip()
    for name, value in right.items():
        if name == "said":
            assert found[name] == value
        else:  # pixels: of NumPy in another order; the largest is 2.7
            np.testing.assert_allclose(found[name], value, atol=1e-6 if name == "pixels" else 2e-4, rtol=1e-6, err_msg=name)


# blip-caption writes texts as blip-vqa does.
FAMILIES = [pytest.param(name, marks=pytest.mark.slow if name == "blip-vqa" else ()) for name in tiny.FAMILIES]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_recipe_of_graphs_says_what_torch_says(family, every, pictures, tmp_path):
    """With ONNX Runtime, NumPy, Pillow and tokenizers alone, on a turned photo, a wide picture and one with alpha."""
    written, jobs = every[family], []
    for split in LAYOUTS.get(family, (False,)):
        folder = tmp_path / f"split-{split}"
        export.export(written.folder, folder, ExportOptions(split=split), QUIET)
        assert 'pip install "onnxruntime>=1.' in (folder / "README.md").read_text()
        jobs.append((folder, blocks(folder)[0]))
    found = run_blocks(jobs, pictures, BARRED, tmp_path)
    right = [expected(written, picture) for picture in pictures]
    assert len(found) == len(jobs) * len(pictures)
    for values, wanted in zip(found, right * len(jobs), strict=True):
        agrees(values, wanted)
    writes = isinstance(written.dense.family.topology, EncoderDecoder)
    if written.dense.family.topology.reads_images and not writes:
        assert len({values["said"] for values in found}) > 1  # it matters which picture it is
    if writes:
        assert run_blocks([(jobs[0][0], blocks(jobs[0][0])[1])], pictures[:1], [], tmp_path)[0]["said"].strip()


def test_the_recipe_of_every_checkpoint_says_what_comp_says(every, pictures, tmp_path):
    """In a process where comp cannot be imported."""
    jobs = [(written.folder, code) for written in every.values() for code in blocks(written.folder)]
    found = run_blocks(jobs, pictures[:1], ["comp_cli"], tmp_path)
    assert len(found) == len(every) == len(tiny.FAMILIES)
    for values, (name, written) in zip(found, every.items(), strict=True):
        right = expected(written, pictures[0])
        if "logits" in right:
            agrees(values, {"logits": right["logits"]})
        elif "written" in right:
            assert values["said"] == right["said"]
        else:  # a chance or a likeness, with one digit behind the point
            chance = 1 / (1 + np.exp(right["scores"][0, 0] - right["scores"][0, 1])) if "scores" in right else right["cosine"]
            shown = float(re.search(r"-?[\d.]+", values["said"])[0]) / (100 if "scores" in right else 1)
            assert shown == pytest.approx(float(chance), abs=2e-3), name


# Parts ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"size": {"shortest_edge": 40}, "crop_size": {"height": 48, "width": 48}},  # pads
        {"size": {"shortest_edge": 61}, "crop_size": {"height": 48, "width": 47}},
        {"size": {"height": 48, "width": 48}, "do_center_crop": False, "resample": 2},
        {"size": {"height": 60, "width": 30}, "crop_size": {"height": 48, "width": 48}, "resample": 0},
        {"do_resize": False, "crop_size": {"height": 48, "width": 48}},
        {"size": {"height": 48, "width": 48}, "do_center_crop": False, "do_normalize": False},
        {"size": {"height": 48, "width": 48}, "do_center_crop": False, "do_rescale": False, "image_mean": [9, 8, 7]},
        {"size": {"height": 48, "width": 48}, "do_center_crop": False, "rescale_factor": 1 / 127.5, "image_std": [1, 1, 1]},
        {"size": {"height": 48, "width": 48}, "do_center_crop": False, "image_mean": 0.5, "image_std": 0.25},
    ],
)
def test_pictures_are_prepared_as_the_processor_does(settings, pictures):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(**settings)
    names: dict[str, Any] = {}
    exec(f"import numpy as np\nfrom PIL import Image, ImageOps\n{card_code.pixels_of(processor)}", names)
    for picture in pictures:
        right = processor(load_image(str(picture)), return_tensors="np")["pixel_values"]
        np.testing.assert_allclose(names["pixels"](picture), right, atol=1e-6, rtol=1e-6)


UNKNOWN = [{"size": {"shortest_edge": 48, "longest_edge": 60}}, {"do_center_crop": False}, {"do_pad": True}]


@pytest.mark.parametrize("settings", UNKNOWN)
def test_what_is_not_written_out_is_not_guessed(settings):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    assert card_code.pixels_of(CLIPImageProcessorPil(**settings)) is None


def test_other_tokenizers_are_not_guessed(tmp_path):
    (tmp_path / "spiece.model").touch()
    assert card_code.tokens_of(tiny.word_tokenizer(), tmp_path, 12) is None


def test_a_tokenizer_of_sentencepiece_is_written_out(tmp_path):
    """SigLIP's is of this kind in transformers, which writes no tokenizer.json for it."""
    lines = [" ".join(tiny.WORDS[i:] + tiny.WORDS[:i]) for i in range(len(tiny.WORDS))]
    sizes = {"vocab_size": 50, "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "hard_vocab_limit": False}
    model = tmp_path / "made"
    trained = {"model_type": "unigram", "minloglevel": 2} | sizes
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines * 20), model_prefix=str(model), **trained)
    tokenizer = transformers.SiglipTokenizer(f"{model}.model", model_max_length=64)
    tokenizer.save_pretrained(tmp_path / "folder")
    imports, code = card_code.tokens_of(tokenizer, tmp_path / "folder", 12)
    names: dict[str, Any] = {"folder": str(tmp_path / "folder")}
    exec("\n".join([*imports, "import numpy as np", code]), names)
    texts = ["a small red circle", "Two BLUE, squares!", "  it's \n far ", "", "red " * 30, "zürich — 42"]
    right = tokenizer(texts, padding="max_length", truncation=True, max_length=12)["input_ids"]
    assert names["tokens"](texts)["input_ids"].tolist() == right


def test_the_card_holds_the_command_that_was_typed(tmp_path):
    data = DataOptions(str(tmp_path), text_column="what is said")
    training = Training(steps=7, batch_size=16)
    options = PruneOptions(
        f"{tmp_path}/../{tmp_path.name}", 0.3, recover=False, data=data, training=training, cip=False, seed=3
    )
    assert cards.prune_command(options, max_drop=1.5, revision=None, allow_pickle=True) == (
        f"comp prune {tmp_path.name} --ratio 0.3 --no-recover --seed 3 --data {tmp_path.name} --text-column 'what is said' "
        "--steps 7 --train-batch-size 16 --no-cip --max-drop 1.5 --allow-pickle"
    )
    assert cards.prune_command(PruneOptions("org/name", 0.5)) == "comp prune org/name --ratio 0.5"


def test_every_option_of_the_command_in_a_card_exists():
    from typer.main import get_command

    from comp_cli.cli.app import app

    known = {flag for option in get_command(app).commands["prune"].params for flag in (*option.opts, *option.secondary_opts)}
    apart = ("model", "ratio", "data", "training", "image_tokens")
    for name in (field.name for field in fields(PruneOptions) if field.name not in apart):
        assert f"--{name.replace('_', '-')}" in known, name
    nested = [cards.FLAGS.get(field.name, field.name) for field in fields(Training)]
    for name in (*nested, *(field.name for kind in (DataOptions, TokenOptions) for field in fields(kind))):
        assert f"--{name.replace('_', '-')}" in known, name


def head(folder: Path) -> dict[str, Any]:
    return yaml.safe_load((folder / "README.md").read_text().split("---")[1])


def test_license_and_pipeline_are_those_of_the_dense_model(every, tmp_path):
    dense = every["blip"].dense
    said = "---\nlicense: bsd-3-clause\npipeline_tag: image-to-text\nwidget: x\n---\n# BLIP"
    (tmp_path / "README.md").write_text(said)
    quality = {"samples": 64, "data": "mine.jsonl", "agreement": 0.95, "metric": "accuracy"}
    quality |= {"metrics": {"accuracy": {"dense": 0.9, "compact": 0.85}}}
    plan = smaller(dense)
    document = prune.describe(dense, plan, PruneOptions("org/blip", 0.4), sizes(dense, plan)).to_json()
    document |= {"quality": quality, "command": "comp prune org/blip --ratio 0.4", "base_model": "org/blip"}
    card = cards.model_card(document, dense.family, dense.task, tmp_path, longest=0, facts={})
    (tmp_path / "README.md").write_text(card)
    told = head(tmp_path)
    assert (told["license"], told["pipeline_tag"], told["base_model"]) == ("bsd-3-clause", "image-to-text", "org/blip")
    assert told["metrics"] == ["accuracy"] and "widget" not in told
    of_compact, of_dense = sorted(ModelCard.load(tmp_path / "README.md").data.eval_results, key=lambda one: one.metric_value)
    assert (of_dense.metric_value, of_dense.metric_name) == (0.9, "accuracy of the dense model")
    assert (of_compact.metric_value, of_compact.metric_type, of_compact.task_type) == (0.85, "accuracy", "image-to-text")
    assert of_compact.dataset_type == card_head.SYNTHETIC and of_compact.dataset_name == "mine.jsonl"
    assert "| accuracy | 90.0 % | 85.0 % |" in card and "On 64 samples" in card and "mine.jsonl" in card
    assert "\ncomp prune org/blip --ratio 0.4\n" in card


@pytest.mark.parametrize(
    "said", ["", "no head", "---\n[broken: yaml: {\n---\n", "---\n- a list\n---\n", "---\nlicense: {a: 1}\n---\n"]
)
def test_a_readme_that_says_nothing_of_use_does_no_harm(said, tmp_path):
    (tmp_path / "README.md").write_text(said)
    document = {"base_model": "dense", "quality": {"metrics": None}}
    assert card_head.metadata(document, tmp_path).to_yaml().startswith("library_name: transformers")


@pytest.mark.parametrize("named, kind", [(None, "synthetic"), ("pairs.jsonl", "own"), ("org/pairs", "org/pairs")])
def test_results_are_of_the_data_that_they_are_of(named, kind):
    quality = {"metrics": {"accuracy": {"dense": 0.9, "compact": 0.8}}, "data": "said"}
    document = {"quality": quality, "task": "itm", "options": {"data": {"data": named}}}
    assert {one.dataset_type for one in card_head.results(document, None)} == {kind}
    assert card_head.results(document | {"quality": {"metrics": None}}, None) is None


def test_the_kind_of_pipeline_is_one_that_takes_the_class():
    kinds = {
        "CLIPModel": "zero-shot-image-classification",
        "SiglipModel": "zero-shot-image-classification",
        "BlipForConditionalGeneration": "image-text-to-text",
        "LlavaForConditionalGeneration": "image-text-to-text",
        "BlipForQuestionAnswering": "visual-question-answering",
        "BlipForImageTextRetrieval": None,  # its pipeline would run another class, with random weights
    }
    assert {name: card_head.pipeline_of(name, "retrieval") for name in kinds} == kinds
    assert card_head.pipeline_of("CLIPTextModelWithProjection", "text-embedding") == "feature-extraction"


def test_pictures_in_the_folder_are_shown_in_its_card(tmp_path):
    (tmp_path / "README.md").write_text("# Model\n\n## Use\n\ncode\n")
    show_pictures(tmp_path)
    assert (tmp_path / "README.md").read_text() == "# Model\n\n## Use\n\ncode\n"
    (tmp_path / "tokens.png").touch()
    (tmp_path / "report.html").touch()
    show_pictures(tmp_path)
    before, _, after = (tmp_path / "README.md").read_text().partition("\n## Use\n")
    assert "(tokens.png)" in before and "[report.html](report.html)" in before and after == "\ncode\n"


def test_nothing_written_names_the_place_where_it_was_made(every):
    """Paths of this machine, and what a tokenizer remembers of them."""
    for written in every.values():
        place = str(written.folder.parent).encode()
        for path in written.folder.iterdir():
            assert place not in path.read_bytes(), path
        settings = written.folder / "tokenizer_config.json"
        if settings.exists():
            assert not {"is_local", "local_files_only", "name_or_path"} & json.loads(settings.read_text()).keys()


def test_cards_and_the_page_on_deployment_name_the_least_versions():
    root = Path(__file__).parent.parent
    assert f'"transformers>={cards.LEAST_TRANSFORMERS},' in (root / "pyproject.toml").read_text()
    newest = max(LEAST[OPSET], SHARED_BIAS, key=Version)
    assert f"onnxruntime {newest} or newer, numpy, pillow and tokenizers" in (root / "docs" / "export.md").read_text()
