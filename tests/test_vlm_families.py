"""Decoders that read images: descriptions against stock models, and what no description holds."""

import json
from dataclasses import replace

import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from vlm_made import NAMES, Made, counted, known, logits, made, uneven

from comp_cli.checkpoint.loading import describe, load_model, untied_state_dict
from comp_cli.checkpoint.plan_check import check_block
from comp_cli.cli.output import Output
from comp_cli.engine import flops
from comp_cli.engine.slicing import slice_state
from comp_cli.errors import RefusedError
from comp_cli.families import FAMILIES, check_supported, find_family
from comp_cli.models.dense import open_dense
from comp_cli.plan import dense_plan

QUIET = Output("quiet")


@pytest.fixture(params=NAMES)
def model(request) -> Made:
    return made(request.param)


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
        assert all(isinstance(attention.get_submodule(read[part]), nn.Linear | nn.Identity) for part in ("query", "key"))
    assert found["shuffle"] == (0.5 if name == "internvl" else None)
    newline = "model.image_newline" if name in ("llava-next", "llava-onevision") else None
    assert found["newline"] == newline and (newline is None or model.get_parameter(newline).shape == (48,))


def test_features_of_an_earlier_layer_are_read_there():
    topology, config = FAMILIES["llava"].topology, made("llava").config
    for layer, place in ((-1, 2), (-3, 0), (1, 0), (3, 2), ([-3, -2], 1)):
        found = topology.image_tokens(config | {"vision_feature_layer": layer})["class_attention"]["module"]
        assert found == f"model.vision_tower.encoder.layers.{place}.self_attn"


def test_a_block_of_sizes_is_checked(model):
    config, family, architecture = model.config, model.family, model.plan.architecture
    plan = uneven(model.plan)
    block = json.loads(json.dumps(plan.comp_block(family, config)))
    check_block(block, config, family, architecture)
    for change, said in (
        (lambda block: block["towers"][1]["layers"][0].update(keep={"image": 4}), "null: the image tower keeps its tokens"),
        (lambda block: block["towers"][0]["layers"][0].update(keep=4), "null: the vision tower keeps its tokens"),
        (lambda block: block["towers"][1]["layers"][1]["attention"].update(num_heads=3), "num_heads is 3; expected 2 to 4"),
        (lambda block: block["towers"][1]["layout"].update(order="pre_norm"), "order is 'pre_norm'; expected 'stock'"),
    ):
        lying = json.loads(json.dumps(block))
        change(lying)
        with pytest.raises(RefusedError, match=said):
            check_block(lying, config, family, architecture)


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
