"""Decoders that read images: descriptions against stock models, FLOPs against torch's counter, prompts and what they say."""

import json
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import tiny
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.initialization import no_init_weights
from transformers.models.smolvlm import processing_smolvlm
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from comp_cli import tasks
from comp_cli.checkpoint.loading import (
    build_compact,
    describe,
    load_model,
    load_processor,
    save_processor,
    untied_state_dict,
)
from comp_cli.checkpoint.plan_check import check_block
from comp_cli.cli.output import Output
from comp_cli.commands import export
from comp_cli.data.rows import Pair
from comp_cli.engine import flops
from comp_cli.engine.slicing import slice_state
from comp_cli.errors import RefusedError
from comp_cli.families import FAMILIES, Family, check_supported, find_family
from comp_cli.models.dense import collator, open_dense
from comp_cli.options import ExportOptions
from comp_cli.plan import Plan, TokenStage, dense_plan
from comp_cli.topology.prompts import with_answer, without_answers

QUIET = Output("quiet")
NAMES = list(tiny.DECODERS)
OPENED = [name for name in NAMES if name != "smolvlm"]  # whose processor needs torchvision and num2words
RED, BLUE = Image.new("RGB", (40, 30), (200, 0, 0)), Image.new("RGB", (30, 60), (0, 0, 99))
PAIRS = [
    Pair(RED, "a red circle", answers=("circle",)),
    Pair(BLUE, "two small blue square and", answers=("square large",)),
]


@dataclass(frozen=True)
class Made:
    """A tiny stock model, and what is known of it."""

    stock: nn.Module
    config: dict
    family: Family
    plan: Plan
    reference: flops.Reference
    state: dict

    def compact(self, plan: Plan) -> nn.Module:
        config = type(self.stock.config).from_dict(self.stock.config.to_dict())
        config.comp = plan.comp_block(self.family, self.config)
        model = build_compact(config, self.family, plan.architecture, slice_state(self.state, self.family, plan))
        model.set_attn_implementation("eager")
        return model

    def inputs(self, batch: int = 1, text_tokens: int = 12, **options) -> dict[str, torch.Tensor]:
        made = self.family.topology.random_inputs(self.family, self.config, batch, text_tokens, **options)
        return {name: value for name, value in made.items() if name != "labels"}


@cache
def made(name: str) -> Made:
    torch.manual_seed(0)
    return known(tiny.DECODERS[name][0]())


def known(stock: nn.Module) -> Made:
    stock.eval().requires_grad_(False)
    stock.set_attn_implementation("eager")
    stock.config.architectures = [type(stock).__name__]
    config = stock.config.to_dict()
    family, architecture, _ = find_family(config)
    state = untied_state_dict(stock)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    plan = dense_plan(config, family, architecture)
    return Made(stock, config, family, plan, flops.reference(config, family, shapes, 12), state)


@pytest.fixture(params=NAMES)
def model(request) -> Made:
    return made(request.param)


def uneven(plan: Plan) -> Plan:
    """Other heads, key-value groups and channels in every layer of every tower."""
    generator = torch.Generator().manual_seed(3)

    def some(units: int) -> list[int]:
        kept = int(torch.randint(1, units + 1, (1,), generator=generator))
        return sorted(torch.randperm(units, generator=generator)[:kept].tolist())

    for tower in plan.towers:
        for index, layer in enumerate(tower.layers):
            for part in layer.parts:
                layer = layer.keeping(part, some(len(layer.kept(part))))
            plan = plan.with_layer(tower.name, index, layer)
    return plan


def counted(model: nn.Module, inputs: dict, **options) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**inputs, **options)
    return counter.get_total_flops()


def logits(model: nn.Module, inputs: dict) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


# Descriptions ----------------------------------------------------------------------------------------------------------


def test_masked_is_sliced(model):
    """The columns that read what goes are zero in the stock model; vision heads, key-value groups and channels. In double
    precision, for rounding is all that may differ."""
    plan, whole = uneven(model.plan), {name: tensor.double() for name, tensor in model.state.items()}
    masked = dict(whole)
    for tower in model.family.towers:
        for index, layer in enumerate(plan.tower(tower.name).layers):
            for part in tower.parts:
                path = f"{tower.encoder}.{tower.layers}.{index}.{part.column}.weight"
                units = layer.parts[part.name]
                every = masked[path].shape[1] // units.width
                stays = torch.zeros(every).index_fill(0, torch.tensor(units.units), 1).repeat_interleave(units.width)
                masked[path] = masked[path] * stays
    double = replace(model, state=whole)
    inputs = {name: value.double() if value.is_floating_point() else value for name, value in model.inputs(2, padded=3).items()}
    real = inputs["attention_mask"].bool()
    sliced, zeroed, dense = (
        logits(each, inputs)[real]
        for each in (double.compact(plan), replace(model, state=masked).compact(model.plan), double.compact(model.plan))
    )
    torch.testing.assert_close(sliced, zeroed, atol=1e-6, rtol=1e-6)
    assert (zeroed - dense).abs().max() > 0.1
    size = {
        name: sum(tensor.numel() for tensor in slice_state(model.state, model.family, each).values())
        for name, each in (("sliced", plan), ("dense", model.plan))
    }
    assert size["sliced"] < 0.95 * size["dense"]


@pytest.mark.parametrize("kind", FAMILIES["llava"].backbones["text_config"])
def test_every_language_model_that_a_llava_may_have(kind):
    """Biases in queries, keys and values, norms of queries and keys, another width of heads: one description."""
    torch.manual_seed(0)
    text = {"model_type": kind, "sliding_window": None} | ({"head_dim": 16} if kind in ("qwen3", "gemma") else {})
    model = known(tiny.llava(text=text))
    check_supported(model.config, model.family)
    assert flops.count(model.plan, model.reference).total == counted(model.stock, model.inputs(), logits_to_keep=1)
    test_masked_is_sliced(model)


def test_nothing_pruned_says_what_the_stock_model_says(model):
    inputs = model.inputs(2, padded=3)
    torch.testing.assert_close(logits(model.compact(model.plan), inputs), logits(model.stock, inputs))


def test_several_images_in_a_prompt(model):
    one, two = (model.inputs(2, 14, images=images) for images in (1, 2))
    tokens = model.family.topology.pictures.sizes(model.config)
    assert two["input_ids"].shape[1] - one["input_ids"].shape[1] == tokens.tokens + tokens.newlines
    assert logits(model.stock, two).isfinite().all()


def test_modes_and_which_of_them_are_on_unasked(model):
    modes = model.family.every_mode
    assert model.family.modes == {name: mode for name, mode in modes.items() if mode.unasked}
    assert {name: mode.unasked for name, mode in modes.items()} == {
        "vision_params": False,
        "language_params": True,
        "image_tokens": True,
    }
    assert all(mode.unasked for name in ("blip", "clip", "siglip") for mode in FAMILIES[name].modes.values())


CLASS_ATTENTION = {
    "llava": "model.vision_tower.encoder.layers.1.self_attn",  # hidden_states[-2] are those behind layers[1] of 3
    "llava-next": "model.vision_tower.encoder.layers.1.self_attn",
    "internvl": "model.vision_tower.encoder.layer.2.attention",
}


@pytest.mark.parametrize("name", NAMES)
def test_where_image_tokens_enter_is_there_in_the_model(name):
    found, model = made(name).family.topology.image_tokens(made(name).config), made(name).stock
    assert all(isinstance(model.get_submodule(found[part]), nn.Module) for part in ("model", "text", "features"))
    assert hasattr(model.get_submodule(found["text"]), "layers")
    read = found["class_attention"]
    assert (read and read["module"]) == CLASS_ATTENTION.get(name)
    if read:
        attention = model.get_submodule(read["module"])
        assert all(isinstance(attention.get_submodule(read[part]), nn.Linear) for part in ("query", "key"))
    assert found["shuffle"] == (0.5 if name == "internvl" else None)
    newline = "model.image_newline" if name in ("llava-next", "llava-onevision") else None
    assert found["newline"] == newline and (newline is None or model.get_parameter(newline).shape == (48,))


def test_features_of_an_earlier_layer_are_read_there():
    topology, config = FAMILIES["llava"].topology, made("llava").config
    for layer, place in ((-1, 2), (-3, 0), (1, 0), (3, 2), ([-3, -2], 1)):
        found = topology.image_tokens(config | {"vision_feature_layer": layer})["class_attention"]["module"]
        assert found == f"model.vision_tower.encoder.layers.{place}.self_attn"


# FLOPs -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [False, True], ids=["dense", "sliced"])
def test_flops_of_a_prompt_are_those_that_run(model, cut):
    plan = uneven(model.plan) if cut else model.plan
    runs = model.compact(plan) if cut else model.stock
    expected = counted(runs, model.inputs(), logits_to_keep=1)
    assert flops.count(plan, model.reference).total == expected


STAGES = (TokenStage(0, "stride", keep=8), TokenStage(2, "stride", keep=5), TokenStage(4, "stride", keep=2))


@pytest.mark.parametrize("stages", [(), STAGES, STAGES[1:]], ids=["all stay", "from the first layer", "from the third"])
def test_flops_and_cache_of_a_written_token(model, stages):
    """The prompt, a step behind it, and the bytes that are held: per layer, of unequal key-value heads."""
    plan = replace(uneven(model.plan), stages=stages)
    runs, inputs = model.compact(plan), model.inputs()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        held = runs(**inputs, logits_to_keep=1, use_cache=True).past_key_values
    assert counter.get_total_flops() == flops.count(plan, model.reference).total
    found = [layer.keys.nbytes + layer.values.nbytes for layer in held.layers]
    assert flops.kv_bytes(plan, model.reference, 4) == tuple(found)
    assert sum(flops.kv_bytes(plan, model.reference, 2)) == sum(found) / 2
    expected = counted(runs, {"input_ids": torch.tensor([[5]])}, past_key_values=held, use_cache=True)
    assert flops.decode_step(plan, model.reference).total == expected


def test_a_pooling_head_that_runs_for_nothing_is_counted():
    tower = tiny.SIGLIP_TOWER | {"vision_use_head": True}
    torch.manual_seed(0)
    stock = tiny.llava(tower=tower, vision_feature_layer=-1, vision_feature_select_strategy="full").eval()
    stock.set_attn_implementation("eager")
    config = stock.config.to_dict() | {"architectures": [type(stock).__name__]}
    family, architecture, _ = find_family(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in stock.state_dict().items()}
    reference, inputs = (
        flops.reference(config, family, shapes, 12),
        family.topology.random_inputs(family, config, 1, 12),
    )
    inputs.pop("labels")
    with FlopCounterMode(display=False) as counter:  # with gradients: torch counts another kernel not
        stock(**inputs, logits_to_keep=1)
    assert flops.count(dense_plan(config, family, architecture), reference).total == counter.get_total_flops()


def on_meta(config) -> tuple[dict, Family, Plan, dict]:
    with torch.device("meta"), no_init_weights():
        stock = getattr(transformers, config.architectures[0])(config)
    full = config.to_dict()
    family, architecture, _ = find_family(full)
    shapes = {name: tuple(tensor.shape) for name, tensor in stock.state_dict().items()}
    return full, family, dense_plan(full, family, architecture), shapes


def test_flops_and_cache_of_llava_1_5_are_those_that_are_known():
    """The language model at 576 + 64 tokens: ViTCoP's schedule for 64 tokens on average, and 64 from the first layer on."""
    config = transformers.LlavaConfig(architectures=["LlavaForConditionalGeneration"])
    full, family, plan, shapes = on_meta(config)
    reference = flops.reference(full, family, shapes, 64 - 5)
    assert reference.tokens == {"vision": 577, "image": 576, "language": 64}
    pruned = replace(plan, stages=tuple(TokenStage(layer, "stride", keep) for layer, keep in ((0, 172), (2, 77), (22, 15))))
    once = replace(plan, stages=(TokenStage(0, "stride", keep=64),))

    def macs(plan: Plan) -> float:
        return round(flops.count(plan, reference).tower("language") / 2e12, 3)

    assert [macs(each) for each in (plan, pruned, once)] == [4.252, 0.831, 0.833]
    held = [round(sum(flops.kv_bytes(each, reference, 2)) / 1e6, 1) for each in (plan, pruned)]
    assert held == [335.5, 66.9]
    share = replace(plan, stages=(TokenStage(0, "stride", share=1 / 9),))
    assert flops.count(share, reference) == flops.count(once, reference)


NEXT_POINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
CLIP_L = {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14}
SO400M = {"model_type": "siglip_vision_model", "image_size": 384, "patch_size": 14}
REFERENCES = {  # config of a published model, as far as it matters -> tokens of the tower, of the decoder, newlines
    "llava": ({"vision_config": CLIP_L}, (577, 576, 0)),
    "llava_next": ({"vision_config": CLIP_L, "image_grid_pinpoints": NEXT_POINTS}, (5 * 577, 2880, 48)),
    "llava_onevision": (
        {"vision_config": SO400M, "image_grid_pinpoints": [[384, 384], [768, 768], [2304, 2304]]}
        | {"vision_aspect_ratio": "anyres_max_9"},
        (5 * 729, 729 + 54 * 54, 54),
    ),
    "qwen2_vl": ({"vision_config": {"patch_size": 14, "spatial_merge_size": 2}}, (5184, 1296, 0)),
    "qwen2_5_vl": ({"vision_config": {"patch_size": 14, "spatial_merge_size": 2}}, (5184, 1296, 0)),
    "qwen3_vl": ({"vision_config": {"patch_size": 16, "spatial_merge_size": 2}}, (4096, 1024, 0)),
    "internvl": (
        {"vision_config": {"model_type": "internvl_vision", "image_size": [448, 448], "patch_size": [14, 14]}}
        | {"downsample_ratio": 0.5},
        (1025, 256, 0),
    ),
    "smolvlm": (
        {"vision_config": {"model_type": "smolvlm_vision", "image_size": 512, "patch_size": 16}, "scale_factor": 4},
        (1024, 64, 0),
    ),
    "paligemma": (
        {"vision_config": {"model_type": "siglip_vision_model", "image_size": 224, "patch_size": 14}},
        (256, 256, 0),
    ),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_the_reference_image_of_published_models(name):
    config, (vision, image, newlines) = REFERENCES[name]
    family = FAMILIES[name]
    config = {**config, "text_config": {"max_position_embeddings": 32768}}
    config["vision_config"] = {"embed_dim": 1280, "mlp_ratio": 4} | config["vision_config"]
    found = family.topology.lengths(family, config, 35)
    expected = {"vision": vision, "image": image, "language": 40} | ({"newline": newlines} if newlines else {})
    assert found == expected


def test_many_tiles_are_read_as_fewer_patches():
    """LLaVA-OneVision makes at most those of nine tiles of them: of 4 x 4 tiles of 36, 24 rows and columns become 18."""
    stock = tiny.llava_onevision(pinpoints=[[96, 96]]).eval()
    config = stock.config.to_dict() | {"architectures": [type(stock).__name__]}
    config["text_config"]["max_position_embeddings"] = 512
    family, _, _ = find_family(config)
    found = family.topology.lengths(family, config, 12)
    assert found == {"vision": 17 * 36, "image": 36 + 18 * 18, "language": 17, "newline": 18}
    inputs = family.topology.random_inputs(family, config, 1, 12)
    assert logits(stock, inputs).isfinite().all()  # which compares placeholders with features


def test_windows_of_a_tower_at_the_reference_image():
    """Of 36 x 36 image tokens, windows of 4 x 4: 81 of 64 patches; full layers see all."""
    pictures = FAMILIES["qwen2_5_vl"].topology.pictures
    vision = {"patch_size": 14, "spatial_merge_size": 2, "window_size": 112, "fullatt_block_indexes": [7]}
    config = {"vision_config": vision, "text_config": {"max_position_embeddings": 32768}}
    assert pictures.sequences(config, 0) == (64,) * 81 and pictures.sequences(config, 7) == (5184,)
    uneven_windows = pictures.sequences(config | {"text_config": {"max_position_embeddings": 72}}, 0)  # 6 x 6 tokens
    assert uneven_windows == (64, 32, 32, 16)


def test_models_that_write_nothing_have_no_cache():
    config = transformers.CLIPConfig(text_config=tiny.clip_text(), vision_config=tiny.VISION, architectures=["CLIPModel"])
    full, family, plan, shapes = on_meta(config)
    with pytest.raises(ValueError, match="clip: no tower that reads a prompt"):
        flops.kv_bytes(plan, flops.reference(full, family, shapes, 12), 2)


# Opened with processors ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session", params=OPENED)
def opened(request, tmp_path_factory):
    folder = tiny.write(request.param, tmp_path_factory.mktemp(request.param) / "dense")
    return open_dense(str(folder), QUIET)


def test_a_folder_opens_and_its_default_reference_has_forty_tokens_of_text(opened):
    assert opened.task.name == "vqa" and opened.reference.tokens["language"] == 40 and opened.text_tokens == 35
    assert opened.longest > 35
    weights = untied_state_dict(load_model(opened.source.folder, family=opened.family, dtype=torch.float32))
    assert opened.params(opened.plan) == sum(tensor.numel() for tensor in weights.values())


def test_answers_alone_are_predicted(opened):
    batch = opened.collate(PAIRS)
    ids, labels, mask = (batch.inputs[name] for name in ("input_ids", "labels", "attention_mask"))
    words = opened.processor.tokenizer.convert_tokens_to_ids
    expected = [words(["circle", "</s>"]), words(["square", "large", "</s>"])]
    assert [row[row != -100].tolist() for row in labels] == expected
    assert batch.labels.tolist() == sum(expected, [])
    for row, label, real, answer in zip(ids, labels, mask, expected, strict=True):
        assert row[real.bool()][-len(answer) :].tolist() == answer and (row[label != -100] == label[label != -100]).all()
        assert "</s>" not in opened.processor.tokenizer.decode(row[(label == -100) & real.bool()])
    asked = [opened.processor.tokenizer.decode(row[row != tiny.IMAGE]) for row in ids]
    assert "a red circle" in asked[0] and "two small blue square and" in asked[1]
    text = ((ids != tiny.IMAGE) & mask.bool()).sum()
    assert batch.text_tokens == {"language": int(text)} and batch.cut == 0
    with torch.no_grad():
        rows = opened.task.forward(opened.whole, batch.inputs)
    assert [len(part) for part in rows] == [5, 5]
    assert opened.task.metrics(opened.task.rankings(rows, batch.labels)).keys() == {"token accuracy"}


def test_batch_mates_and_padding_change_no_prediction(opened):
    both = opened.task.forward(opened.whole, opened.collate(PAIRS).inputs)[0]
    alone = [opened.task.forward(opened.whole, opened.collate([pair]).inputs)[0] for pair in PAIRS]
    torch.testing.assert_close(both, torch.cat(alone), atol=1e-4, rtol=1e-4)


def test_captions_are_asked_for(opened, tmp_path):
    caption = open_dense(str(opened.source.folder), QUIET, task="caption")
    batch = caption.collate([Pair(RED, "a red circle", answers=("square",))])
    (labels,) = batch.inputs["labels"]
    words = ["a", "red", "circle", "</s>"]
    assert labels[labels != -100].tolist() == caption.processor.tokenizer.convert_tokens_to_ids(words)


def test_long_questions_and_answers_are_cut_and_counted(opened):
    short = replace(opened.collate, max_text=4)
    batch = short([PAIRS[0], Pair(RED, "a red a red a blue", answers=("a a a a circle circle",))])
    asked = opened.processor.tokenizer.decode(batch.inputs["input_ids"][1])
    assert batch.cut == 1 and "a red a red" in asked and "blue" not in asked
    (labels,) = batch.inputs["labels"][1:]
    assert (labels != -100).sum() == 5  # four and the end


def test_texts_are_written_as_one_by_one_and_as_by_hand(opened):
    """Left padding for prompts of different length, against a loop without a cache."""
    topology, model = opened.family.topology, opened.whole
    quiet = model.generation_config
    quiet.suppress_tokens, quiet.eos_token_id = [tiny.IMAGE, tiny.VIDEO], None
    found = topology.generate(opened.family, model, opened.collate(PAIRS).inputs, 4)
    for pair, expected in zip(PAIRS, found, strict=True):
        inputs = opened.collate([pair]).inputs
        rows = ("input_ids", "attention_mask", *topology.pictures.rows)
        given = {name: inputs[name] for name in topology.pictures.inputs} | without_answers(inputs, inputs["labels"], rows)
        for token in expected:
            with torch.no_grad():
                scores = model(**given).logits[0, -1].index_fill(0, torch.tensor([tiny.IMAGE, tiny.VIDEO]), -torch.inf)
            assert scores.argmax() == token
            given |= {name: nn.functional.pad(given[name], (0, 1), value=name == "attention_mask") for name in rows}
            given["input_ids"][0, -1] = token


def test_a_placeholder_in_the_data_is_not_a_second_image(opened):
    token = opened.processor.image_token
    expected, found = (opened.collate([replace(PAIRS[0], text=text)]).inputs for text in ("a red", f"{token}\na red"))
    assert torch.equal(found["input_ids"], expected["input_ids"])


@pytest.mark.parametrize("place", ["a file of its own", "the processor's file"])
def test_what_is_said_of_videos_is_handed_on(place, tmp_path):
    folder = tiny.write("qwen2-vl", tmp_path / "dense")
    said, path = {"video_processor_type": "Qwen2VLVideoProcessor", "fps": 3}, folder / "processor_config.json"
    if place == "a file of its own":
        (folder / "video_preprocessor_config.json").write_text(json.dumps(said))
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | {"video_processor": said}))
    save_processor(load_processor(folder), tmp_path / "compact", folder)
    name = "video_preprocessor_config.json" if place == "a file of its own" else "processor_config.json"
    found = json.loads((tmp_path / "compact" / name).read_text())
    assert found.get("video_processor", found) == said


class Still(transformers.SmolVLMProcessor):
    """SmolVLM's processor without what needs torchvision and num2words, for videos."""

    video_processor = SimpleNamespace(num_frames=1, fps=1)

    @classmethod
    def get_attributes(cls):
        return ["image_processor", "tokenizer"]


def test_prompts_of_smolvlm(monkeypatch):
    monkeypatch.setattr(processing_smolvlm, "num2words", str)
    sizes = {"size": {"longest_edge": 48}, "max_image_size": {"longest_edge": 24}}  # two by two tiles, and the whole
    images, tokenizer = SmolVLMImageProcessorPil(**sizes), tiny.prompt_tokenizer()
    processor = Still(images, tokenizer, None, image_seq_len=9, chat_template=tiny.chat())
    model = made("smolvlm")
    task = tasks.TASKS["vqa"].of(model.family.topology)
    batch = collator(model.family, processor, 20, task, model.stock.config)(PAIRS)
    assert batch.inputs["pixel_values"].shape[1:] == (5, 3, 24, 24)
    assert (batch.inputs["input_ids"] == tiny.IMAGE).sum(1).tolist() == [5 * 9, 3 * 9]  # the other is narrow
    with torch.no_grad():
        read = task.forward(model.stock, batch.inputs)
    assert len(read[0]) == len(batch.labels) == 5


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is here")
def test_a_processor_that_cannot_do_without_videos_says_what_it_needs(tmp_path):
    made("smolvlm").stock.save_pretrained(tmp_path)
    for part in (tiny.prompt_tokenizer(), SmolVLMImageProcessorPil(size={"longest_edge": 24})):
        part.save_pretrained(tmp_path)
    with pytest.raises(RefusedError, match="needs a package that is missing: SmolVLMVideoProcessor requires the Torchvision"):
        open_dense(str(tmp_path), QUIET)


def test_a_block_of_sizes_is_checked(opened):
    config = opened.hf_config.to_dict()
    plan = uneven(opened.plan)
    block = json.loads(json.dumps(plan.comp_block(opened.family, config)))
    check_block(block, config, opened.family, opened.architecture)
    for change, said in (
        (lambda block: block["towers"][1]["layers"][0].update(keep={"image": 4}), "null: the image tower keeps its tokens"),
        (lambda block: block["towers"][0]["layers"][0].update(keep=4), "null: the vision tower keeps its tokens"),
        (lambda block: block["towers"][1]["layers"][1]["attention"].update(num_heads=3), "num_heads is 3; expected 2 to 4"),
        (lambda block: block["towers"][1]["layout"].update(order="pre_norm"), "order is 'pre_norm'; expected 'stock'"),
    ):
        lying = json.loads(json.dumps(block))
        change(lying)
        with pytest.raises(RefusedError, match=said):
            check_block(lying, config, opened.family, opened.architecture)


def test_no_graphs_are_exported(tmp_path):
    folder = tiny.write("llava", tmp_path / "llava")
    with pytest.raises(RefusedError, match="reads images inside of a text; comp exports no graphs"):
        export.export(folder, tmp_path / "onnx", ExportOptions(), QUIET)


def test_names_of_older_releases_are_understood(tmp_path):
    """transformers writes LLaVA's weights under the names that they had in its release 4."""
    folder = tiny.write("llava", tmp_path / "llava")
    (path,) = folder.glob("*.safetensors")
    weights = load_file(path)
    assert any(name.startswith("language_model.model.layers.") for name in weights)
    stock = load_model(folder)
    older = {name.replace("vision_tower.", "vision_tower.vision_model."): tensor for name, tensor in weights.items()}
    save_file(older, path, metadata={"format": "pt"})  # as people have LLaVA 1.5
    again = load_model(folder).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in stock.state_dict().items())
    config = json.loads((folder / "config.json").read_text())
    for changes, said in (
        ({"num_hidden_layers": 4}, "text_config.num_hidden_layers 4, the weights hold 5 layers"),
        ({"intermediate_size": 72}, r"model\.language_model\.layers\.0\.mlp\.gate_proj\.weight is mismatched|mismatched"),
        ({"num_hidden_layers": 10**9}, "text_config.num_hidden_layers 1000000000|vision_config"),
    ):
        (folder / "config.json").write_text(json.dumps(config | {"text_config": config["text_config"] | changes}))
        with pytest.raises(RefusedError, match=said):
            load_model(folder)


def test_an_image_processor_of_another_size_is_refused(tmp_path):
    folder = tiny.write("llava", tmp_path / "llava")
    path = next(path for path in folder.glob("*processor*.json") if "crop_size" in path.read_text())
    path.write_text(path.read_text().replace("24", "32"))
    with pytest.raises(RefusedError, match=r"makes \(3, 32, 32\) of 48 x 32 pixels, the model takes tiles of \(3, 24, 24\)"):
        open_dense(str(folder), QUIET)


# Prompts ---------------------------------------------------------------------------------------------------------------


def test_an_answer_follows_its_prompt_as_the_tokenizer_writes_it():
    plain, ending = tiny.prompt_tokenizer(), tiny.word_tokenizer()
    circle, end = plain.convert_tokens_to_ids(["circle", "</s>"])
    assert with_answer(plain, "a red", "circle") == (0, [circle, end])
    assert with_answer(ending, "a red", "circle") == (1, [circle, end])  # which ends the prompt and the whole by itself


def test_prompts_without_answers_end_where_answers_began():
    ids = torch.tensor([[1, 2, 3, 4, 0], [1, 5, 6, 7, 8]])
    labels = torch.tensor([[-100, -100, 3, 4, -100], [-100, -100, -100, 7, 8]])
    made = without_answers({"input_ids": ids, "attention_mask": (ids > 0).long()}, labels, ("input_ids", "attention_mask"))
    assert made["input_ids"].tolist() == [[0, 1, 2], [1, 5, 6]]
    assert made["attention_mask"].tolist() == [[0, 1, 1], [1, 1, 1]]


# What cannot work ------------------------------------------------------------------------------------------------------


def text(**changes):
    return lambda config: config["text_config"].update(changes)


def vision(**changes):
    return lambda config: config["vision_config"].update(changes)


REFUSED = {
    "fused": ("llava", text(model_type="phi3"), "text_config is of the kind 'phi3'.*one matrix, of parts that differ"),
    "experts": ("llava", text(model_type="qwen3_moe"), "'qwen3_moe'; those of a llava model.*experts"),
    "gemma 2": ("paligemma", text(model_type="gemma2"), "'gemma2'.*every other layer sees a window"),
    "hybrid": ("qwen3-vl", text(layer_types=["linear_attention"]), "linear_attention: its state is made of all tokens"),
    "unknown kind": ("llava", text(model_type="mamba"), "of the kind 'mamba'"),
    "window": ("llava", text(model_type="mistral", sliding_window=4096), "text_config.sliding_window is 4096"),
    "layers with a window": ("qwen2.5-vl", text(layer_types=["sliding_attention"] * 5), "layer_types has sliding_attention"),
    "chunks": ("llava", text(layer_types=["chunked_attention"]), "chunked_attention: its chunks are counted"),
    "chunk size": ("llava", text(attention_chunk_size=512), "attention_chunk_size is 512"),
    "tower": ("llava", vision(model_type="pixtral"), "vision_config is of the kind 'pixtral'.*packed into one sequence"),
    "not square": ("internvl", vision(image_size=[24, 48]), r"image_size is \[24, 48\]; expected a square"),
    "[CLS] among the features": (
        "llava",
        lambda config: config.update(vision_feature_select_strategy="full"),
        r"keeps \[CLS\] among the image tokens",
    ),
    "a patch lost": (
        "llava-onevision",
        lambda config: config.update(vision_feature_select_strategy="default"),
        "drops the first patch",
    ),
    "too short": (
        "llava",
        text(max_position_embeddings=40),
        "max_position_embeddings is 40, 5 too few for one image and 4 tokens of text",
    ),
    "no such layer": ("llava", lambda config: config.update(vision_feature_layer=-9), "vision_feature_layer is -9"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_description_holds_is_refused_by_name(case):
    name, change, said = REFUSED[case]
    config = json.loads(json.dumps(made(name).config))
    check_supported(config, made(name).family)
    change(config)
    with pytest.raises(RefusedError, match=said) as refused:
        check_supported(config, made(name).family)
    assert refused.value.hint


def test_a_window_that_is_off_is_none():
    config = json.loads(json.dumps(made("llava").config))
    config["text_config"].update(model_type="qwen2", sliding_window=4096, use_sliding_window=False)
    check_supported(config, made("llava").family)


def test_a_model_is_refused_when_it_is_opened(tmp_path):
    folder = tiny.write("llava", tmp_path / "llava")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= {"model_type": "mistral", "sliding_window": 16}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(RefusedError, match="sliding_window is 16"):
        describe(folder)


def test_an_architecture_of_the_same_kind_is_named():
    with pytest.raises(RefusedError, match="does not know the architecture Idefics3ForConditionalGeneration"):
        find_family({"architectures": ["Idefics3ForConditionalGeneration"], "model_type": "idefics3"})


def test_heads_that_are_normalised_together_stay():
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    vision = tower | {"image_size": [24, 24], "patch_size": [3, 3], "use_qk_norm": True}
    text = tiny.DECODER | {"model_type": "qwen3", "head_dim": 12}  # which normalises each head by itself
    config = transformers.InternVLConfig(vision_config=vision, text_config=text, image_token_id=tiny.IMAGE)
    stock = transformers.InternVLForConditionalGeneration(config)
    config.architectures = [type(stock).__name__]
    family, architecture, _ = find_family(config.to_dict())
    plan, state = dense_plan(config.to_dict(), family, architecture), untied_state_dict(stock)
    first = plan.tower("language").layers[0].keeping("attention", (1,))
    slice_state(state, family, plan.with_layer("language", 0, first))
    first = plan.tower("vision").layers[0].keeping("attention", (0, 1))
    with pytest.raises(RefusedError, match=r"layers?\.0\.attention normalises its heads together"):
        slice_state(state, family, plan.with_layer("vision", 0, first))
