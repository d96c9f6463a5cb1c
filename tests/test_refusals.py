"""What the runtime and the graphs do not know is refused: no argument, mask or cache is ignored without a word."""

import warnings

import pytest
import tiny
import torch
import transformers
from transformers.cache_utils import DynamicCache, EncoderDecoderCache, StaticCache

from comp_cli.checkpoint.loading import load_model
from comp_cli.cli.exit_codes import USAGE
from comp_cli.cli.output import Output
from comp_cli.errors import CompError
from comp_cli.measure.variants import on_own_kernels
from comp_cli.models.dense import open_dense
from comp_cli.onnx import generation
from comp_cli.runtime import modeling_comp
from comp_cli.runtime.modeling_comp import CompactAttention, PostNormLayer, PreNormLayer, TokenState, add_token_state
from comp_cli.topology.stand_ins import Encoded

FAMILIES = ("blip", "blip-caption", "blip-vqa", "clip", "siglip")
UNKNOWN = ("kv_cache", "mask", "encoder_mask", "position_ids", "head_mask", "cu_seq_lens_q", "kept_tokens")


@pytest.fixture(scope="module", params=FAMILIES)
def compact(request, tmp_path_factory):
    """A model whose heads, channels and tokens are gone, of another number in every layer."""
    folder = tiny.write(request.param, tmp_path_factory.mktemp(request.param) / "dense")
    dense = open_dense(str(folder), Output("quiet"), text_tokens=12)
    return dense.runtime(tiny.uneven(dense.plan, dense.family))


@pytest.fixture(scope="module")
def caption(tmp_path_factory):
    folder = tiny.write("blip-caption", tmp_path_factory.mktemp("caption") / "dense")
    return open_dense(str(folder), Output("quiet"), text_tokens=12)


def parts(model):
    """One module of each kind that the runtime puts into a model, and a stock one that runs layers which drop tokens."""
    kinds = (PreNormLayer, PostNormLayer, CompactAttention)
    found = {next(kind for kind in kinds if isinstance(m, kind)): m for m in model.modules() if isinstance(m, kinds)}
    return found | {"loop": next(m for m in model.modules() if add_token_state in m._forward_pre_hooks.values())}


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_argument_is_refused_by_every_layer_and_encoder(compact, name):
    found = parts(compact)
    assert len(found) > 2
    for module in found.values():
        with pytest.raises(TypeError, match=f"does not know, {name}="):
            module(torch.zeros(1, 3, 72), **{name: torch.ones(1, 3)})


def test_what_stock_models_hand_down_is_taken(compact):
    """Also what asks for nothing."""
    taken = {"output_hidden_states": True, "use_cache": True, "return_dict": True, "num_items_in_batch": torch.tensor(3)}
    for module in parts(compact).values():
        module(torch.zeros(1, 3, 72), **taken, output_attentions=False, head_mask=None, kv_cache=None)


def test_attention_maps_are_refused_however_they_are_asked_for(compact, monkeypatch):
    for module in parts(compact).values():
        with pytest.raises(ValueError, match="make no attention maps"):
            module(torch.zeros(1, 3, 72), output_attentions=True)
    attention = parts(compact)[CompactAttention]
    monkeypatch.setattr(attention.config, "_output_attentions", True)  # behind a check of how attention is implemented
    assert attention.config.output_attentions
    with pytest.raises(ValueError, match="make no attention maps"):
        attention(torch.zeros(1, 3, 72))


@pytest.mark.parametrize("mask", [torch.ones(3, 3), torch.ones(1, 1, 3, 3, dtype=torch.long), object()])
def test_masks_of_other_kernels_are_refused(compact, mask):
    """Two dimensions (flash attention), 0 and 1 where something is added, a BlockMask (flex attention)."""
    for module in parts(compact).values():
        with pytest.raises(ValueError, match="attention_mask: compact layers take"):
            module(torch.zeros(1, 3, 72), attention_mask=mask)


def test_a_causal_flag_that_the_plan_contradicts_is_refused(compact):
    for module in compact.modules():
        if isinstance(module, PreNormLayer):
            module(torch.zeros(1, 3, 72), is_causal=module.self_attn.causal)
            with pytest.raises(ValueError, match="is_causal"):
                module(torch.zeros(1, 3, 72), is_causal=not module.self_attn.causal)


def test_caches_where_there_is_no_place_for_them_are_refused(compact):
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    for name in modeling_comp.CACHES:
        for kind, module in parts(compact).items():
            if kind in (PreNormLayer, "loop"):
                with pytest.raises((TypeError, ValueError), match="no cache|does not know"):
                    module(torch.zeros(1, 40, 72), **{name: cache})


def test_a_layer_that_drops_tokens_is_refused_outside_of_its_loop(compact):
    """Nobody would know which tokens are left, nor how many one of them stands for."""
    layer = next(m for m in compact.modules() if isinstance(m, PreNormLayer) and m.token_pruning is not None)
    with pytest.raises(TypeError, match="nowhere to say which"):
        layer(torch.zeros(1, 37, 72))
    assert layer(torch.zeros(1, 37, 72), token_state=TokenState()).shape == (1, layer.token_pruning.keep, 72)
    assert layer(torch.zeros(1, 9, 72)).shape == (1, 9, 72)  # which it keeps


def test_an_end_of_text_needs_a_mask_of_tokens(compact):
    if not isinstance(compact, transformers.CLIPModel):
        pytest.skip("texts are read elsewhere")
    with pytest.raises(ValueError, match=r"\(batch, tokens\)"):
        compact.get_text_features(input_ids=torch.tensor([[2, 5, 3]]), attention_mask=torch.ones(1, 1, 3, 3))


def test_the_cache_is_taken_under_both_names(caption):
    """A step behind a cache says what the whole text says, whatever this transformers calls it."""
    model = on_own_kernels(load_model(caption.source.folder, dtype=torch.float32))
    layer = next(m for m in model.text_decoder.modules() if isinstance(m, PostNormLayer))
    states, seen = torch.randn(1, 4, 72, generator=torch.Generator().manual_seed(0)), torch.randn(1, 9, 72)
    with torch.no_grad():
        expected = layer(states, seen)
        for name in modeling_comp.CACHES:
            cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
            layer(states[:, :3], seen, **{name: cache})
            found = layer(states[:, 3:], seen, **{name: cache})
            torch.testing.assert_close(found, expected[:, 3:], atol=1e-5, rtol=0)
    with pytest.raises(TypeError, match="two caches"):
        layer(states, seen, cache=cache, past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache()))
    with pytest.raises(TypeError, match="EncoderDecoderCache, not a DynamicCache"):
        layer(states, seen, cache=DynamicCache())


def test_a_cache_of_fixed_length_is_refused(caption):
    """The stock model of 5.20 to 5.24 fails with one, too."""
    model = on_own_kernels(load_model(caption.source.folder, dtype=torch.float32))
    images = {"pixel_values": caption.random_inputs(2, 5)["pixel_values"]}
    with pytest.raises(TypeError, match="EncoderDecoderCache, not a StaticCache"):
        model.generate(**images, max_new_tokens=6, cache_implementation="static")
    text = model.config.text_config
    fixed = EncoderDecoderCache(StaticCache(config=text, max_cache_len=8), DynamicCache())
    layer = next(m for m in model.text_decoder.modules() if isinstance(m, PostNormLayer))
    layer.attention.self.layer_idx = 0
    fixed.self_attention_cache.update(torch.zeros(1, 6, 1, 12), torch.zeros(1, 6, 1, 12), 0)
    with pytest.raises(ValueError, match="fixed length needs an attention_mask"):
        layer(torch.zeros(1, 1, 72), torch.zeros(1, 2, 72), cache=fixed)


def test_nothing_that_comp_calls_is_deprecated(caption):
    """Captions and logits with a cache: a call under an old name would warn."""
    model = on_own_kernels(load_model(caption.source.folder, dtype=torch.float32))
    images = {"pixel_values": caption.random_inputs(2, 5)["pixel_values"]}
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        model.generate(**images, max_new_tokens=4)
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        for dense in (model, load_model(caption.source.folder, dtype=torch.float32)):
            caption.family.topology.decode(dense, torch.zeros(1, 5, 72), torch.tensor([[2, 5]]), cache=cache)


def test_gradients_are_checkpointed_as_in_the_stock_model(caption):
    """Without the cache, which would be filled twice."""
    batch = caption.random_inputs(2, 5)
    found = []
    for own in (False, True):
        model = load_model(caption.source.folder, dtype=torch.float32)
        model = on_own_kernels(model) if own else model
        model.requires_grad_(True).train()
        model.gradient_checkpointing_enable()
        model(
            **{n: batch[n] for n in ("pixel_values", "input_ids", "attention_mask")}, labels=batch["input_ids"]
        ).loss.backward()
        found.append(model.text_decoder.bert.embeddings.word_embeddings.weight.grad)
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-4)


class Graphs:
    """Stands for the exported decoder: it must not be reached."""


def test_the_graphs_refuse_what_they_do_not_know():
    encoder = generation.OnnxEncoder(Graphs())
    decoder = type("Decoder", (generation.OnnxDecoder, torch.nn.Module), {"__init__": torch.nn.Module.__init__})()
    for module, first in ((encoder, torch.zeros(1, 3, 48, 48)), (decoder, torch.tensor([[2]])), (Encoded("x"), torch.zeros(1))):
        for name in UNKNOWN:
            with pytest.raises(TypeError, match=f"does not know, {name}="):
                module(first, **{name: torch.ones(1)})
        with pytest.raises(ValueError, match="make no attention maps"):
            module(first, output_attentions=True)
    with pytest.raises(CompError, match="no hidden states") as refused:
        decoder(torch.tensor([[2]]), output_hidden_states=True)
    assert refused.value.exit_code == USAGE
    cache = DynamicCache([(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1))])
    with pytest.raises(CompError, match="EncoderDecoderCache of two DynamicCaches"):
        decoder(torch.tensor([[2]]), cache=cache)


@pytest.mark.parametrize(("version", "known"), [("5.20.0", True), ("5.24.3", True), ("5.25.0.dev0", False), ("5.19.1", False)])
def test_an_untested_transformers_is_said_once(monkeypatch, version, known):
    monkeypatch.setattr(modeling_comp.transformers, "__version__", version)
    modeling_comp.warn_if_untested.cache_clear()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        modeling_comp.warn_if_untested()
        modeling_comp.warn_if_untested()
    modeling_comp.warn_if_untested.cache_clear()
    assert [f"transformers {version} is not one" in str(w.message) for w in told] == ([] if known else [True])


def test_an_untested_transformers_is_said_when_a_folder_is_loaded(monkeypatch, compact_folder):
    """Behind the curtain that keeps libraries quiet."""
    monkeypatch.setattr(modeling_comp, "TESTED", ("4.0", "4.1"))
    for cached in (modeling_comp.warn_if_untested, modeling_comp.compact_class):
        cached.cache_clear()
    with pytest.warns(UserWarning, match=r"tested with \(4.0 to 4.1\)"):
        load_model(compact_folder)
