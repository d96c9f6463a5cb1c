"""The runtime against the stock model, and sliced models against masked ones."""

import copy

import pytest
import torch
from reference import masked_logits
from torch import nn

from comp_cli.runtime.modeling_comp import LAYOUT_DEFAULTS, TokenPruning, compact_layer


def run(model, inputs, **more):
    with torch.inference_mode():
        return model(**inputs, **more)


def test_the_dense_plan_is_the_stock_model(stock, dense, inputs):
    expected, found = run(stock, inputs), run(dense.runtime(dense.plan), inputs)
    assert type(found) is type(expected)
    torch.testing.assert_close(found.itm_score, expected.itm_score, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state, atol=2e-5, rtol=0)
    torch.testing.assert_close(found.question_embeds[0], expected.question_embeds[0], atol=2e-5, rtol=0)


def test_the_contrastive_head_works_as_in_the_stock_model(stock, dense, inputs):
    expected = run(stock, inputs, use_itm_head=False).itm_score
    found = run(dense.runtime(dense.plan), inputs, use_itm_head=False).itm_score
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_the_reference_with_nothing_pruned_is_the_stock_model(stock, dense, inputs):
    torch.testing.assert_close(masked_logits(stock, dense.plan, inputs), run(stock, inputs).itm_score, atol=1e-5, rtol=0)


def test_sliced_equals_masked(stock, dense, uneven_plan, inputs):
    found = run(dense.runtime(uneven_plan), inputs).itm_score
    expected = masked_logits(stock, uneven_plan, inputs)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert (found - run(stock, inputs).itm_score).abs().max() > 1e-3  # and pruning did change something


def test_tensors_are_really_smaller(dense, uneven_plan):
    model = dense.runtime(uneven_plan)
    layer, wanted = model.vision_model.encoder.layers[0], uneven_plan.tower("vision").layers[0]
    assert layer.self_attn.qkv.weight.shape == (3 * 12 * len(wanted.kept("attention")), 72)
    assert layer.mlp.fc2.weight.shape == (72, len(wanted.kept("ffn")))
    cross = model.text_encoder.encoder.layer[0].crossattention
    assert cross.output.dense.weight.shape == (72, 12 * len(uneven_plan.tower("language").layers[0].kept("cross")))
    assert sum(p.numel() for p in model.parameters()) < sum(t.numel() for t in dense.state.values())


def test_fewer_tokens_come_out(dense, uneven_plan, inputs):
    found = run(dense.runtime(uneven_plan), inputs, output_hidden_states=True)
    assert found.last_hidden_state.shape == (3, 11, 72)
    assert found.question_embeds.shape == (3, 6, 72)
    assert [state.shape[1] for state in found.hidden_states] == [37, 30, 30, 19, 11, 11]


def test_a_sample_does_not_depend_on_its_batch_mates_or_on_padding(dense, uneven_plan, inputs):
    model = dense.runtime(uneven_plan)
    together = run(model, inputs).itm_score
    for index in range(3):
        length = int(inputs["attention_mask"][index].sum())
        alone = {
            "input_ids": inputs["input_ids"][index : index + 1, :length],
            "pixel_values": inputs["pixel_values"][index : index + 1],
        }
        torch.testing.assert_close(run(model, alone).itm_score[0], together[index], atol=1e-5, rtol=0)


@pytest.mark.parametrize("tokens", [3, 6, 9, 24])
def test_any_text_length(stock, dense, uneven_plan, tokens):
    ids = torch.randint(5, 15, (2, tokens), generator=torch.Generator().manual_seed(tokens))
    mask = torch.ones_like(ids)
    pixels = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(3))
    given = {"input_ids": ids, "pixel_values": pixels, "attention_mask": mask}
    found = run(dense.runtime(uneven_plan), given).itm_score
    torch.testing.assert_close(found, masked_logits(stock, uneven_plan, given), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dense, uneven_plan, inputs, dtype):
    model = dense.runtime(uneven_plan)
    expected = run(model, inputs).itm_score
    half = {name: t.to(dtype) if t.is_floating_point() else t for name, t in inputs.items()}
    found = run(copy.deepcopy(model).to(dtype), half).itm_score
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, atol=0.15, rtol=0.1)


def test_training_reaches_every_weight_that_matters(dense, uneven_plan, inputs):
    model = copy.deepcopy(dense.runtime(uneven_plan)).train().requires_grad_(True)
    model(**inputs).itm_score.square().sum().backward()
    idle = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    expected = {"vision_proj.weight", "vision_proj.bias", "text_proj.weight", "text_proj.bias"}
    # keys' biases shift all logits of a query alike and get no gradient but rounding; the unused heads get none
    assert {name for name in idle if not name.endswith("key.bias")} <= expected


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cuda(dense, uneven_plan, inputs, dtype):
    model = dense.runtime(uneven_plan)
    expected = run(model, inputs).itm_score
    there = {name: t.cuda().to(dtype) if t.is_floating_point() else t.cuda() for name, t in inputs.items()}
    found = run(copy.deepcopy(model).cuda().to(dtype), there).itm_score
    torch.testing.assert_close(found.float().cpu(), expected, atol=1e-3 if dtype == torch.float32 else 0.15, rtol=0.1)


def test_norms_and_feed_forward_part_are_found_under_the_names_of_the_layout(stock):
    """Those of a Llama-like layer, around the weights of BLIP's."""
    layer = copy.deepcopy(stock.vision_model.encoder.layers[0])
    states = torch.randn(2, 7, 72, generator=torch.Generator().manual_seed(0))
    expected = layer(states)
    for old, new in (("layer_norm1", "input_layernorm"), ("layer_norm2", "post_attention_layernorm"), ("mlp", "ffn")):
        layer.add_module(new, layer._modules.pop(old))
    layout = LAYOUT_DEFAULTS | {
        "order": "pre_norm",
        "attention": {"module": "self_attn", "qkv": ["qkv"], "out": "self_attn.projection"},
        "cross": None,
        "norms": ["input_layernorm", "post_attention_layernorm"],
        "mlp": "ffn",
        "ffn": ["ffn.fc1", "ffn.fc2"],
    }
    sizes = {"attention": {"num_heads": 6, "head_dim": 12, "scale": 12**-0.5}, "ffn": 200, "keep": None}
    compact = compact_layer(layer, 0, layout, sizes, {})
    torch.testing.assert_close(compact(states), expected, atol=1e-5, rtol=0)


def merging(keep: int) -> TokenPruning:
    """Keeps some tokens and merges the others into one."""
    return TokenPruning(keep, protected=("first",), merge=True)


def attended(states, bias=None):
    """Self-attention of the states themselves, (batch, tokens, dim)."""
    heads = states.unsqueeze(1)
    return nn.functional.scaled_dot_product_attention(heads, heads, heads, bias).squeeze(1)


def test_a_token_that_stands_for_equal_ones_changes_nothing():
    """Twelve tokens, of which nine are alike: merged in two steps, attention says to the others what it said before."""
    states = torch.randn(2, 12, 8, generator=torch.Generator().manual_seed(0))
    states[:, 3:] = states[:, 3:4]
    scores = torch.arange(12, 0, -1.0).expand(2, -1)
    once, bias, kept = merging(6)(states, scores, None)
    assert kept.tolist() == [[0, 1, 2, 3, 4]] * 2 and once.shape == (2, 6, 8)
    torch.testing.assert_close(bias[0, 0].exp(), torch.tensor([1.0] * 5 + [7.0]).expand(6, 6))
    torch.testing.assert_close(attended(once, bias)[:, :5], attended(states)[:, :5])
    scores = torch.tensor([0.0, 2.0, 3.0, 1.0, 1.0, 9.0]).expand(2, -1)  # the merged token is never among the kept
    twice, bias, kept = merging(4)(once, scores, bias)
    assert kept.tolist() == [[0, 1, 2]] * 2 and bias[0, 0, 0].exp().tolist() == pytest.approx([1, 1, 1, 9])
    torch.testing.assert_close(attended(twice, bias)[:, :3], attended(states)[:, :3])


def test_the_merged_token_is_the_mean_of_all_that_went():
    states = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(1))
    scores = torch.rand(2, 9, generator=torch.Generator().manual_seed(2))
    once, bias, kept = merging(6)(states, scores, None)
    again, _, left = merging(4)(once, torch.rand(2, 6, generator=torch.Generator().manual_seed(3)), bias)
    for row in range(2):
        stayed = kept[row][left[row]].tolist()
        gone = [place for place in range(9) if place not in stayed]
        assert 0 in stayed and len(gone) == 6
        torch.testing.assert_close(again[row, -1], states[row, gone].mean(0))
