"""FLOPs and caches of decoders that read images against torch's counter, real caches, and figures that are known."""

from dataclasses import replace

import pytest
import tiny
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode
from transformers.initialization import no_init_weights
from vlm_made import NAMES, Made, counted, logits, made, uneven

from comp_cli.engine import flops
from comp_cli.families import FAMILIES, Family, find_family
from comp_cli.plan import Plan, TokenStage, dense_plan


@pytest.fixture(params=NAMES)
def model(request) -> Made:
    return made(request.param)


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
