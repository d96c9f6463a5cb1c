"""Parts and streams as data: today's families as ever, and a causal language model of grouped queries and gated channels."""

import hashlib
import json
import re
from copy import deepcopy
from dataclasses import replace

import pytest
import tiny
import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from comp_cli.checkpoint.loading import build_compact
from comp_cli.checkpoint.plan_check import check_block
from comp_cli.engine import flops, recover, schedule, scoring, stages, statistics, token_ranking
from comp_cli.engine.fading import fading
from comp_cli.engine.slicing import slice_state
from comp_cli.errors import RefusedError
from comp_cli.families import BLIP, CLIP, FAMILIES, SIGLIP, Family, Stream, Tower
from comp_cli.families.base import attention, feed_forward
from comp_cli.families.blip import BLIP_CAPTION, BLIP_VQA
from comp_cli.families.clip import CLIP_TEXT
from comp_cli.plan import Plan, dense_plan, width_of_head

# Of what version 0.1 made of weights that are numbered through, by the uneven plan.
SLICED = {
    "blip": "c5d8b35eea7e511aeb5cc181410c4c4b93db86fb02950b8465f6c60bdd463fd4",
    "blip-contrastive": "5c2c0c4fca8629723c4be46935f8c4a3092bdeacc766ffdaa085a18b36c14d02",
    "blip-caption": "fef34a39a9e5ce7cd01dc9128b04b25a796f6ae667db38a7e3a07e23e223ac1a",
    "blip-vqa": "24c4e6197aba5f5e7cd9931d6f81102e402a202835f73ffe0bbcfe13fe54256f",
    "clip": "fa558dc4f463eb931ad189dc4489e70029d3f1c0519355a5ce549f04cc5185b5",
    "clip-vision": "06916bb5f1a735e71fa0f2c27a5733070d529231c46f3b315a29fb4e8978b129",
    "clip-text": "4a6c254f9f8fa2c5e740007bc1fc97dda1e7a98175905540dcd770b7d23844de",
    "siglip": "10a3f9909b08b46653361eb1af5e19e2ae1f92452ec8e243b6d7a28ce4445db2",
}


def numbered(model):
    tensors = sorted(model.state_dict().items())
    return {
        name: torch.arange(t.numel(), dtype=torch.float32).view(t.shape) + 7 * place for place, (name, t) in enumerate(tensors)
    }


def digest(state) -> str:
    whole = hashlib.sha256()
    for name in sorted(state):
        whole.update(f"{name} {tuple(state[name].shape)}".encode() + state[name].numpy().tobytes())
    return whole.hexdigest()


@pytest.mark.parametrize("name", SLICED)
def test_slices_are_those_of_version_0_1(name):
    model, family = tiny.FAMILIES[name][0](), FAMILIES[name.replace("-", "_")]
    plan = tiny.uneven(dense_plan(model.config.to_dict(), family, type(model).__name__), family)
    assert digest(slice_state(numbered(model), family, plan)) == SLICED[name]
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_the_width_of_a_head_is_read_only_where_the_description_says_so():
    """Stock CLIP takes no head_dim: a stray one in its config.json changes nothing, as it does in transformers."""
    config = transformers.CLIPConfig().to_dict()
    stray = config | {tower: config[tower] | {"head_dim": 24} for tower in ("text_config", "vision_config")}
    assert dense_plan(stray, CLIP, "CLIPModel") == dense_plan(config, CLIP, "CLIPModel")
    named = replace(SELF, head_dim="head_dim")
    assert [width_of_head(SIZES | {"head_dim": said}, named) for said in (24, None)] == [24, 8]


def test_modes_follow_from_the_description():
    five = ["vision_params", "language_params", "cross_params", "vision_tokens", "language_tokens"]
    assert list(BLIP.modes) == five
    assert list(CLIP.modes) == list(SIGLIP.modes) == [mode for mode in five if mode != "cross_params"]
    assert list(CLIP_TEXT.modes) == ["language_params", "language_tokens"]
    assert list(BLIP_CAPTION.modes) == list(BLIP_VQA.modes) == five[:4]
    assert BLIP_VQA.modes["cross_params"].parts == (("language", "cross"), ("answer", "cross"))
    assert [mode.kind for mode in BLIP.modes.values()] == ["parameters"] * 3 + ["tokens"] * 2


# A language model: 8 query heads share 2 key-value heads, three matrices in a feed-forward part, no biases -----------------

SIZES = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 96}
LLAMA = transformers.LlamaConfig(**SIZES, num_hidden_layers=3, vocab_size=50, max_position_embeddings=40, initializer_range=0.2)
SELF = attention("self_attn", ("q_proj", "k_proj", "v_proj"), "self_attn.o_proj", units="num_key_value_heads")
GATED = feed_forward("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
TEXT = Stream("llm", "text", prunable=False, class_token=None, rule="even")
TOWER = Tower(
    "llm",
    config="",
    encoder="model",
    layers="layers",
    order="pre_norm",
    parts=(SELF, GATED),
    streams=(TEXT,),
    causal=True,
    norms=("input_layernorm", "post_attention_layernorm"),
)
DESCRIBED = replace(CLIP_TEXT, name="llama", model_type="llama", towers=(TOWER,), fixed={"lm_head": "llm"})
KEPT = [(1, range(0, 96, 2)), (0, range(48)), (1, range(40, 88))]  # of each layer the key-value head and the channels


def described(*parts, **changes) -> Family:
    return replace(DESCRIBED, towers=(replace(TOWER, parts=parts, **changes) if parts else replace(TOWER, **changes),))


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(LLAMA).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def plans():
    dense = dense_plan(LLAMA.to_dict(), DESCRIBED, "LlamaForCausalLM")
    tower = dense.tower("llm")
    layers = (
        layer.keeping("attention", (head,)).keeping("ffn", channels)
        for layer, (head, channels) in zip(tower.layers, KEPT, strict=True)
    )
    return dense, dense.with_tower(replace(tower, layers=tuple(layers)))


@pytest.fixture(scope="module")
def texts():
    """The second text is padded."""
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 7:] = 0
    return {"input_ids": torch.randint(3, 50, (2, 12), generator=torch.Generator().manual_seed(1)), "attention_mask": mask}


def shapes_of(model):
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def compact(state):
    """The stock class with the sizes of the plan."""
    config = transformers.LlamaConfig(
        **SIZES | {"num_attention_heads": 4, "num_key_value_heads": 1, "intermediate_size": 48},
        num_hidden_layers=3,
        vocab_size=50,
        max_position_embeddings=40,
    )
    model = transformers.LlamaForCausalLM(config).eval().to(state["lm_head.weight"].dtype)
    model.load_state_dict(state)
    return model


def logits(model, texts):
    with torch.inference_mode():
        return model(**texts).logits[texts["attention_mask"].bool()]


def test_grouped_queries_and_gated_channels_sliced_are_masked(llama, plans, texts):
    """Four query heads go with their key-value head. The slices load in the stock class."""
    _, plan = plans
    model = deepcopy(llama).double()  # where rounding is far below what a wrong slice would change
    for layer, (head, channels) in zip(model.model.layers, KEPT, strict=True):
        heads, gates = torch.zeros(64), torch.zeros(96)
        heads[32 * head : 32 * head + 32], gates[list(channels)] = 1, 1
        for linear, mask in ((layer.self_attn.o_proj, heads), (layer.mlp.down_proj, gates)):
            linear.register_forward_pre_hook(lambda module, args, mask=mask: (args[0] * mask,))
    found = logits(compact(slice_state(model.state_dict(), DESCRIBED, plan)), texts)
    torch.testing.assert_close(found, logits(model, texts), atol=1e-6, rtol=0)
    assert (found - logits(llama, texts)).abs().max() > 1e-2


def test_their_flops_are_those_that_torch_counts(llama, plans):
    ref = flops.reference(LLAMA.to_dict(), DESCRIBED, shapes_of(llama), 12)
    for plan, model in zip(plans, (llama, compact(slice_state(llama.state_dict(), DESCRIBED, plans[1]))), strict=True):
        with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(input_ids=torch.ones(1, 12, dtype=torch.long))
        assert flops.count(plan, ref).total == counter.get_total_flops()


def test_what_of_it_fades_is_gone(llama, plans, texts):
    dense, plan = plans
    before = logits(llama, texts)
    with fading(llama, DESCRIBED, dense, plan) as fade:
        fade(1.0)
        torch.testing.assert_close(logits(llama, texts), before)
        fade(0.0)
        faded = logits(llama, texts)
    torch.testing.assert_close(faded, logits(compact(slice_state(llama.state_dict(), DESCRIBED, plan)), texts))
    torch.testing.assert_close(logits(llama, texts), before)


def test_its_units_are_scored_without_token_scores(llama, plans, texts):
    """One head and one channel again by hand, without the padding; no rule needs a layer of comp's."""
    dense, _ = plans
    seen = {}
    layer = llama.model.layers[1]
    hooks = [
        linear.register_forward_pre_hook(lambda module, args, name=name: seen.__setitem__(name, args[0]))
        for name, linear in (("attention", layer.self_attn.o_proj), ("ffn", layer.mlp.down_proj))
    ]
    logits(llama, texts)
    for hook in hooks:
        hook.remove()
    found = scoring.collect(llama, DESCRIBED, dense, [texts], rule="wanda").units
    real = texts["attention_mask"].bool()
    heads = (layer.self_attn.o_proj.weight.abs().mean(0) * seen["attention"][real].norm(dim=0)).view(2, 32).mean(1)
    channels = layer.mlp.down_proj.weight.abs().mean(0) * seen["ffn"][real].norm(dim=0)
    torch.testing.assert_close(found["llm", 1, "attention"], heads / heads.mean())
    torch.testing.assert_close(found["llm", 1, "ffn"], channels / channels.mean())


@pytest.mark.parametrize("rule", scoring.PARAMETER_RULES)
def test_every_rule_scores_it(llama, plans, texts, rule):
    def loss(batch):
        return llama(**batch, labels=batch["input_ids"]).loss

    found = scoring.collect(llama, DESCRIBED, plans[0], [texts], rule=rule, run=loss)
    assert {(len(scores), key[2]) for key, scores in found.units.items()} == {(2, "attention"), (96, "ffn")}
    assert all(scores.isfinite().all() for scores in found.units.values())
    ref = flops.reference(LLAMA.to_dict(), DESCRIBED, shapes_of(llama), 12)
    total = flops.count(plans[0], ref).total
    plan, _ = schedule.prune_to(plans[0], found, ref, ["llm_params"], 0.7 * total, schedule.Floors())
    assert 0.62 * total < flops.count(plan, ref).total <= 0.7 * total  # a head is 6 % of it


def test_recovery_invents_no_bias_and_comes_nearer(llama, plans, texts):
    dense, plan = plans
    state = llama.state_dict()
    grams = statistics.collect(llama, DESCRIBED, dense, [texts], lambda batch: llama(**batch)).grams
    sliced = slice_state(state, DESCRIBED, plan)
    recovered = recover.recover(sliced, state, DESCRIBED, plan, grams, {})
    assert recovered.keys() == state.keys() and not any(name.endswith("bias") for name in recovered)
    expected = logits(llama, texts)
    plain, better = ((logits(compact(weights), texts) - expected).square().mean() for weights in (sliced, recovered))
    assert better < 0.7 * plain


def test_a_fit_without_bias_is_least_squares():
    """Against torch's solver, without the constant that a bias would need."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(1, 50, 6, generator=generator), torch.randn(3, 6, generator=generator)
    kept = torch.tensor([0, 2, 5])
    found, bias = recover.refit(weight, None, recover.gram(x, torch.ones(1, 50)), kept, ridge=1e-9)
    expected = torch.linalg.lstsq(x[0][:, kept], x[0] @ weight.T).solution.T
    assert bias is None
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_its_plan_and_its_sizes_in_json(plans):
    _, plan = plans
    found = json.loads(json.dumps(plan.to_json()))
    assert Plan.from_json(found) == plan
    first = found["towers"][0]["layers"][0]
    assert first["attention"] == {"heads": [1], "head_dim": 8, "scale": 8**-0.5, "group": 4} and first["keep"] is None
    sizes = plan.comp_block(DESCRIBED, LLAMA.to_dict())["towers"][0]
    assert sizes["layers"][0]["attention"] == {"num_heads": 4, "num_key_value_heads": 1, "head_dim": 8, "scale": 8**-0.5}
    assert sizes["layout"]["ffn"] == ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    assert sizes["layout"]["norms"] == ("input_layernorm", "post_attention_layernorm") and "mlp" not in sizes["layout"]


def test_zeros_beside_its_channels_change_nothing(llama, plans, texts):
    """What tells a compact model from a stock one: 8 more channels in each matrix of a gated part."""
    dense, _ = plans
    tower = dense.tower("llm")
    wider = dense.with_tower(replace(tower, layers=tuple(replace(layer, padding=8) for layer in tower.layers)))
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA.to_dict() | {"intermediate_size": 104})).eval()
    model.load_state_dict(slice_state(llama.state_dict(), DESCRIBED, wider))
    torch.testing.assert_close(logits(model, texts), logits(llama, texts))


# Descriptions that do not fit ------------------------------------------------------------------------------------------

PLAIN = attention("self_attn", ("q_proj", "k_proj", "v_proj"), "self_attn.o_proj")
MIXED = attention("self_attn", ("k_proj", "v_proj", "q_proj"), "self_attn.o_proj", units="num_key_value_heads")
WRONG = {
    "no up_proj": (
        (SELF, feed_forward("mlp.gate_proj", "mlp.down_proj")),
        r"layers\.0\) has the matrix mlp\.up_proj\.weight \(96, 64\), which none of its parts \(attention, ffn\) names",
    ),
    "no attention": ((GATED,), "the llm tower: none of its parts is a self-attention"),
    "plain heads": (
        (PLAIN, GATED),
        r"k_proj\.weight .* is \(16, 64\); the part attention expects 64 rows: num_attention_heads 8, 1 query head",
    ),
    "queries last": ((MIXED, GATED), r"k_proj\.weight .* is \(16, 64\); the part attention expects 64 rows"),
    "fused": (
        (attention("self_attn", ("qkv",), "self_attn.o_proj"), GATED),
        r"the description names self_attn\.qkv\.weight, the weights have none",
    ),
    "turned round": (
        (SELF, feed_forward("mlp.gate_proj", "mlp.down_proj", "mlp.up_proj")),
        r"down_proj\.weight .* is \(64, 96\); the part ffn expects 96 rows: intermediate_size 96",
    ),
}


@pytest.mark.parametrize(("parts", "said"), WRONG.values(), ids=WRONG)
def test_a_description_that_does_not_fit_is_refused(llama, parts, said):
    with pytest.raises(RefusedError, match=said) as refused:
        flops.reference(LLAMA.to_dict(), described(*parts), shapes_of(llama), 12)
    assert refused.value.hint


def stream(**changes) -> Family:
    return described(streams=(replace(TEXT, **changes),))


AGAIN = replace(GATED, name="again")
CONTRADICTIONS = {
    "part twice": (described(SELF, GATED, GATED), "the parts of the llm tower: ffn is there twice"),
    "matrix in two parts": (described(SELF, GATED, AGAIN), "the matrices of the llm tower: mlp.gate_proj is there twice"),
    "tower twice": (replace(DESCRIBED, towers=(TOWER, TOWER)), "the towers of llama: llm is there twice"),
    "stream twice": (described(streams=(TEXT, TEXT)), "the streams of llama: llm is there twice"),
    "no streams": (described(streams=()), "it has no streams"),
    "section": (described(config="text_config"), "config.json has no text_config"),
    "encoder": (described(encoder="modle"), "the weights have no layer modle.layers.0"),
    "order": (described(order="prenorm"), "order is 'prenorm', expected one of pre_norm, post_norm"),
    "norms": (described(norms=("norm", "post_attention_layernorm")), "it names norm, and nothing in model.layers.0"),
    "unused": (described(unused=("mlp.rooter",)), "it names mlp.rooter, and nothing"),
    "whole": (described(whole=("mlp",)), "mlp stays as it is, and yet a part names mlp.gate_proj"),
    "text end": (described(text_end="text_model"), "text_end is text_model, and the weights have nothing"),
    "units": (described(replace(SELF, units="kv_heads"), GATED), "kv_heads of its config is None, expected a number from 1"),
    "depth": (described(depth="depth"), "the llm tower: depth of its config is None, expected a number from 1"),
    "two projections": (
        described(attention("self_attn", ("q_proj", "k_proj"), "self_attn.o_proj"), GATED),
        "its queries, keys and values are 2 matrices of 1 each, expected three",
    ),
    "copies": (described(replace(SELF, copies=3), GATED), "are 3 matrices of 3 each, expected three"),
    "module": (described(replace(SELF, module="attn"), GATED), "self_attn.q_proj is not inside its module attn"),
    "reads": (
        described(SELF, attention("cross", ("q", "k", "v"), "cross.o", name="cross", reads="vison"), GATED),
        "the part cross reads the stream vison; of towers before it there are: none",
    ),
    "source": (stream(source="video"), "source is 'video', expected one of image, text, answer"),
    "protected": (stream(protected=("start",)), "'start' cannot be protected, only first, last, end"),
    "class token": (stream(class_token="cls"), "class_token is 'cls', expected first, last or None"),
    "rule": (stream(rule="atention"), "rule is 'atention', expected one of attention, "),
    "rule of [CLS]": (stream(rule="cls"), "the rule cls asks a token that it does not have"),
    "fixed": (replace(DESCRIBED, fixed={"lm_haed": "llm"}), "llama.fixed: the weights have no lm_haed.weight"),
    "times": (replace(DESCRIBED, fixed={"lm_head": "lm"}), "is used 'lm', expected one of features, llm, once, patches"),
    "patches": (replace(DESCRIBED, fixed={"lm_head": "patches"}), "used for patches, and no stream is of images"),
    "inside": (replace(DESCRIBED, fixed={"model.layers.0.mlp.up_proj": "llm"}), "is in a layer of the llm tower"),
    "pooling": (replace(DESCRIBED, pooling="head"), "head needs weights of that name and a stream of images"),
}


@pytest.mark.parametrize(("family", "said"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_a_description_that_contradicts_itself_is_refused(llama, family, said):
    flops.reference(LLAMA.to_dict(), DESCRIBED, shapes_of(llama), 12)
    with pytest.raises(RefusedError, match=re.escape(said)) as refused:
        flops.reference(LLAMA.to_dict(), family, shapes_of(llama), 12)
    assert refused.value.hint


def test_one_layer_of_another_shape_is_refused(llama):
    shapes = shapes_of(llama) | {"model.layers.2.mlp.up_proj.weight": (80, 64)}
    with pytest.raises(RefusedError, match=r"up_proj\.weight of model\.layers\.2 is \(80, 64\)"):
        flops.reference(LLAMA.to_dict(), DESCRIBED, shapes, 12)


def test_matrices_that_stay_are_named_and_counted(llama):
    """A router, through which every token goes that the attention hands on; and one that nobody uses."""
    shapes = shapes_of(llama) | {f"model.layers.{index}.mlp.router.weight": (4, 64) for index in range(3)}
    with pytest.raises(RefusedError, match="has the matrix mlp.router.weight"):
        flops.reference(LLAMA.to_dict(), DESCRIBED, shapes, 12)
    dense = dense_plan(LLAMA.to_dict(), DESCRIBED, "LlamaForCausalLM")

    def total(family, shapes):
        return flops.count(dense, flops.reference(LLAMA.to_dict(), family, shapes, 12)).total

    without = total(DESCRIBED, shapes_of(llama))
    counted, unused = (total(described(**{name: ("mlp.router",)}), shapes) for name in ("whole", "unused"))
    assert unused == without and counted == without + 3 * 12 * 2 * 4 * 64


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_todays_families_name_every_matrix(name):
    model, family = tiny.FAMILIES[name][0](), FAMILIES[name.replace("-", "_")]
    flops.reference(model.config.to_dict(), family, shapes_of(model), 12)
    tower = family.towers[0]
    forgetful = replace(family, towers=(replace(tower, parts=tower.parts[:-1]), *family.towers[1:]))
    with pytest.raises(RefusedError, match=f"of the {tower.name} tower .* has the matrix mlp.fc1.weight"):
        flops.reference(model.config.to_dict(), forgetful, shapes_of(model), 12)


def test_a_config_may_have_names_of_its_own(llama):
    """Qwen's vision tower counts its layers in `depth` and its heads in `num_heads`."""
    config = LLAMA.to_dict()
    config |= {"depth": config.pop("num_hidden_layers"), "num_heads": config.pop("num_attention_heads")}
    family = described(replace(SELF, queries="num_heads"), GATED, depth="depth")
    plan = dense_plan(config, family, "LlamaForCausalLM")
    assert plan == dense_plan(LLAMA.to_dict(), DESCRIBED, "LlamaForCausalLM")
    counted = [flops.reference(*given, shapes_of(llama), 12) for given in ((config, family), (LLAMA.to_dict(), DESCRIBED))]
    assert counted[0].sizes == counted[1].sizes
    assert attention("attn", ("qkv",), "attn.proj", queries="num_heads").units == "num_heads"


def test_what_the_runtime_does_not_run_it_refuses(plans):
    config = transformers.LlamaConfig(**LLAMA.to_dict())
    config.comp = plans[0].comp_block(DESCRIBED, LLAMA.to_dict())
    with pytest.raises(ValueError, match="shared key-value heads, are not run by this version"):
        build_compact(config, DESCRIBED, "LlamaForCausalLM", {})


# Two streams in one tower ----------------------------------------------------------------------------------------------

STREAMS = (
    Stream("image", "image", class_token=None),
    Stream("text", "text", protected=("last",), class_token=None, rule="even"),
)
TWO = described(streams=STREAMS)


@pytest.fixture(scope="module")
def two(llama):
    """A plan of 24 image tokens and 12 text tokens, and its reference input."""
    ref = flops.reference(LLAMA.to_dict(), DESCRIBED, shapes_of(llama), 12)
    tokens = {"image": 24, "text": 12}
    return dense_plan(LLAMA.to_dict(), TWO, "LlamaForCausalLM"), replace(ref, family=TWO, tokens=tokens)


def test_modes_of_two_streams_in_one_tower(two):
    plan, ref = two
    assert [(mode.name, mode.parts, mode.stream) for mode in TWO.modes.values()] == [
        ("llm_params", (("llm", "attention"), ("llm", "ffn")), None),
        ("image_tokens", (), "image"),
        ("text_tokens", (), "text"),
    ]
    shares = stages.mode_shares(flops.count(plan, ref), ref)
    assert shares["image_tokens"] == 2 * shares["text_tokens"] == pytest.approx(shares["llm_params"] * 2 / 3, abs=2)


def test_each_stream_says_how_many_tokens_stay(two):
    plan, ref = two
    tower = plan.tower("llm")
    first, second, third = tower.layers
    layers = (first.handing_on("image", 10), second.handing_on("image", 6).handing_on("text", 8), third)
    fewer = token_ranking.with_score_rows(plan.with_tower(replace(tower, layers=layers)), 4, TWO)
    found = json.loads(json.dumps(fewer.to_json()))
    assert Plan.from_json(found) == fewer
    assert [layer["keep"] for layer in found["towers"][0]["layers"]] == [{"image": 10}, {"image": 6, "text": 8}, None]
    assert found["towers"][0]["streams"]["image"] == {"score_rows": 4, "score_rule": "attention", "fuse": False}
    rows = flops.count(fewer, ref).layers
    assert [row.handed_on for row in rows] == [{"image": 10, "text": 12}, {"image": 6, "text": 8}, {"image": 6, "text": 8}]
    assert [row.tokens_in for row in rows] == [36, 22, 14]
    entering, leaving, scored = 36, 22, 4  # of the first layer: 4 query rows rank the image tokens, none the text tokens
    projections = entering * (2 * 64 * 64 + 2 * 16 * 64)
    assert rows[0].parts == {
        "attention": 2 * (projections + 2 * entering**2 * 64 + scored * entering * 64),
        "ffn": 2 * leaving * 3 * 96 * 64,
    }


def test_tokens_of_two_streams_that_nothing_ranks_are_not_pruned_in_silence(llama, two, texts):
    plan, ref = two
    with pytest.raises(
        RefusedError, match=r'tokens of image are ranked by "attention", and stock layers \(llm tower\) rank none'
    ):
        scoring.collect(llama, TWO, plan, [texts])
    even = plan.with_streams({"image": replace(plan.streams["image"], score_rule="even")})
    scores = scoring.collect(llama, TWO, even, [texts])
    assert not scores.tokens and len(scores.units) == 6
    with pytest.raises(RefusedError, match="image_tokens: the tokens of image have no scores"):
        schedule.prune_to(even, scores, ref, ["image_tokens"], 0.0, schedule.Floors())


def test_a_block_of_two_streams_is_checked(two, monkeypatch):
    plan, _ = two
    monkeypatch.setitem(FAMILIES, "llama", replace(TWO, architectures={"LlamaForCausalLM": ("caption",)}))
    tower = plan.tower("llm")
    first, *others = tower.layers
    fewer = plan.with_tower(replace(tower, layers=(first.handing_on("text", 8).keeping("attention", (1,)), *others)))
    config = LLAMA.to_dict()
    monkeypatch.setattr("comp_cli.checkpoint.plan_check._tokens", lambda stream, sizes: 36)
    block = json.loads(json.dumps(fewer.comp_block(FAMILIES["llama"], LLAMA.to_dict())))
    check_block(block, config, FAMILIES["llama"], "LlamaForCausalLM")
    for change, said in (
        (lambda layer: layer.update(keep={"image": 0}), r"keep\.image is 0; expected 1 to 36 tokens"),
        (lambda layer: layer.update(keep={"sound": 3}), "expected null, or numbers of tokens of image, text"),
        (lambda layer: layer.update(keep=8), "expected null, or numbers of tokens of image, text"),
        (lambda layer: layer["attention"].update(num_key_value_heads=2), "num_key_value_heads is 2; expected 1"),
        (lambda layer: layer["attention"].update(num_heads=3), r"num_heads is 3; expected 4 to 8, in groups of 4"),
    ):
        lying = json.loads(json.dumps(block))
        change(lying["towers"][0]["layers"][0])
        with pytest.raises(RefusedError, match=said):
            check_block(lying, config, FAMILIES["llama"], "LlamaForCausalLM")
