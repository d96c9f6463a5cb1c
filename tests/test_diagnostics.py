"""CoMP's two findings, against numbers worked out by hand and against the stock model."""

import pytest
import torch

from comp_cli.engine import diagnostics, importance, scoring


def test_contributions_golden_value():
    """X rows [CLS] (1, 2), (3, 0), (0, 1), then padding; mean |W| (1, 1): channel norms sqrt(10) and sqrt(5)."""
    activations = torch.tensor([[[1.0, 2.0], [3.0, 0.0], [0.0, 1.0], [7.0, 7.0]]])
    weight = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    found = diagnostics.contributions(activations, weight, torch.tensor([[1.0, 1, 1, 0]]))
    torch.testing.assert_close(found, torch.tensor([[2.1051, 2.8460, 0.4472, 0.0]]), atol=1e-4, rtol=0)


def test_contributions_sum_to_the_plain_importance():
    generator = torch.Generator().manual_seed(0)
    activations, weight = torch.randn(1, 9, 6, generator=generator), torch.randn(4, 6, generator=generator)
    whole = importance.channel_importance(weight, importance.energy(activations, torch.ones(1, 9))).sum()
    torch.testing.assert_close(diagnostics.contributions(activations, weight, torch.ones(1, 9)).sum(), whole)


def test_overlap_golden_values():
    """Ten tokens, [CLS] first; the best 2 of each row's ordinary tokens: {1, 2} and {2, 3}, then {1, 2} both times."""
    first = torch.tensor([[99.0, 9, 8, 1, 0, 0, 0, 0, 0, 0], [99, 9, 8, 1, 0, 0, 0, 0, 0, 0]])
    second = torch.tensor([[0.0, 1, 8, 9, 0, 0, 0, 0, 0, 0], [0, 8, 9, 99, 99, 99, 99, 99, 99, 99]])
    ordinary = torch.ones(2, 10, dtype=torch.bool)
    ordinary[:, 0] = False
    ordinary[1, 3:] = False  # padding
    assert diagnostics.overlap(first, second, ordinary, 0.25).tolist() == [0.5, 0.0]  # 2 of 9, then 1 of 2: {1} and {2}
    assert diagnostics.overlap(first, second, ordinary, 1.0).tolist() == [1.0, 1.0]
    assert diagnostics.top_count(ordinary, 0.25).tolist() == [2, 1]


def test_rank_correlation_golden_values():
    """1 - 6 sum d^2 / (n (n^2 - 1)) with n = 4: d = 0, then one exchange of neighbours, then the reverse."""
    first = torch.tensor([[5.0, 1, 2, 3, 4]] * 3)
    second = torch.tensor([[0.0, 10, 20, 30, 40], [9, 10, 20, 40, 30], [7, 40, 30, 20, 10]])
    ordinary = torch.tensor([[False, True, True, True, True]] * 3)
    assert diagnostics.rank_correlation(first, second, ordinary).tolist() == pytest.approx([1, 0.8, -1])


def test_head_influence_golden_value():
    """The maps of the CIT test: scores (0.5357, 0.4643), without the first head (0.4, 0.6), without the second (0.7, 0.3)."""
    maps = torch.tensor([[[0.9, 0.1], [0.5, 0.5]], [[0.2, 0.8], [0.6, 0.4]]])
    keys = torch.eye(2).expand(1, 2, 2, 2)
    changed, correlation = diagnostics.head_influence(maps.log().unsqueeze(0), keys, 1.0, skip_first=False)
    assert changed.tolist() == [[1.0, 0.0]] and correlation.tolist() == [[-1.0, 1.0]]


def test_a_copied_head_has_no_influence():
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 3, 4, 32, 8, generator=generator)
    query[:, 3], key[:, 3] = query[:, 2], key[:, 2]
    changed, correlation = diagnostics.head_influence(query, key, 1.0, skip_first=True)
    assert changed[:, 2:].max() == 0 and correlation[:, 2:].min() == 1
    assert changed[:, :2].max() > 0 and correlation[:, :2].max() < 1


def test_the_summary_of_a_layer():
    """Four heads, the least two of importance 1 and 2 change 10 % and 2 % of the kept tokens."""
    changed = torch.tensor([[0.5, 0.0, 0.2, 0.3], [0.5, 0.04, 0.0, 0.3]])
    found = diagnostics.summarise(torch.tensor([4.0, 2, 1, 3]), changed, torch.tensor([[1.0, 0.8, 0.6, 1.0]] * 2))
    assert found.least_heads == [2, 1] and found.strong == 0.5
    assert (found.changed_by_least, found.changed_by_all) == pytest.approx((0.06, 0.23))
    assert found.correlation_without_least == pytest.approx(0.7)


def test_the_diagnosis_of_a_layer_from_the_stock_model(stock, dense, inputs):
    """Overlap of a vision FFN, and the influence of the heads behind it, worked out again from eager attention maps."""
    layers, seen = stock.vision_model.encoder.layers, {}
    hooks = [
        layers[1].mlp.fc2.register_forward_pre_hook(lambda module, args: seen.__setitem__("x", args[0])),
        layers[2].layer_norm1.register_forward_hook(lambda module, args, output: seen.__setitem__("next", output)),
        layers[2].self_attn.projection.register_forward_pre_hook(lambda module, args: seen.__setitem__("heads", args[0])),
    ]
    with torch.inference_mode():
        stock(**inputs)
    for hook in hooks:
        hook.remove()
    attention = layers[2].self_attn
    query, key, _ = (part.unflatten(-1, (6, 12)).transpose(1, 2) for part in attention.qkv(seen["next"]).chunk(3, -1))
    maps = (query @ key.transpose(-1, -2) * 12**-0.5).softmax(-1)[:, :, 1:]  # (3, heads, 36, 37)
    full = maps.amax(1).sum(1)[:, 1:]
    drives = (seen["x"].square() / seen["x"].norm(dim=1, keepdim=True)) @ layers[1].mlp.fc2.weight.abs().mean(0)
    shared = [
        len(set(a.topk(11).indices.tolist()) & set(b.topk(11).indices.tolist()))
        for a, b in zip(drives[:, 1:], full, strict=True)
    ]
    channels = attention.projection.weight.abs().mean(0) * seen["heads"].flatten(0, 1).norm(dim=0)
    least = channels.unflatten(0, (6, 12)).mean(1).argsort()[:2]  # 30 % of 6, rounded up
    changed = torch.zeros(6)
    for head in range(6):
        without = maps[:, [h for h in range(6) if h != head]].amax(1).sum(1)[:, 1:]
        for a, b in zip(full, without, strict=True):
            changed[head] += len(set(a.topk(18).indices.tolist()) - set(b.topk(18).indices.tolist())) / 18 / 3

    found = diagnostics.diagnose(dense.runtime(dense.plan), dense.family, full_rows(dense), [inputs])
    assert found.overlap["vision", 1, "ffn"] == pytest.approx(sum(shared) / 3 / 11)
    assert found.chance["vision", 1, "ffn"] == pytest.approx(11 / 36)
    influence = found.influence["vision", 2]
    assert influence.least_heads == least.tolist()
    assert influence.changed_by_least == pytest.approx(changed[least].mean().item())
    assert influence.changed_by_all == pytest.approx(changed.mean().item())


def full_rows(dense):
    from comp_cli.engine.token_ranking import with_score_rows

    return with_score_rows(dense.plan, 0, dense.family)


def test_masking_is_cit(dense, inputs):
    """The same as running the layer with `head_mask` set, on text with padding."""
    model, plan = dense.runtime(dense.plan), full_rows(dense)
    attention = model.text_encoder.encoder.layer[1].attention.self
    with torch.inference_mode(), scoring.recording(model, dense.family, plan) as recorder:
        model(**inputs)
        scores = recorder.scores["language", 1]
        attention.head_mask = torch.tensor([1.0, 0, 1, 1, 1, 1])
        model(**inputs)
        without = recorder.scores["language", 1]
        attention.head_mask = None
        with diagnostics.influences(model, dense.family) as heard:
            model(**inputs)
    ordinary = scores >= 0
    ordinary[:, 0] = False
    assert ordinary.sum(1).tolist() == [11, 6, 11]
    (changed,), (correlation,) = heard["language", 1]
    torch.testing.assert_close(changed[:, 1], 1 - diagnostics.overlap(scores, without, ordinary, 0.5))
    torch.testing.assert_close(correlation[:, 1], diagnostics.rank_correlation(scores, without, ordinary))


def test_padding_changes_nothing(dense, inputs):
    short = {name: tensor[1:2] for name, tensor in inputs.items()}
    cut = short | {name: short[name][:, :7] for name in ("input_ids", "attention_mask")}
    model = dense.runtime(dense.plan)
    padded, plain = (diagnostics.diagnose(model, dense.family, dense.plan, [batch]) for batch in (short, cut))
    assert padded.overlap == pytest.approx(plain.overlap) and padded.chance == pytest.approx(plain.chance)
    for key, expected in plain.influence.items():
        assert padded.influence[key].changed_by_all == pytest.approx(expected.changed_by_all)
