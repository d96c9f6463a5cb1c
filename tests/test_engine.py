"""Importance, FLOPs, slicing and schedule, against numbers worked out by hand and against what torch counts."""

import pytest
import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from comp_cli.cli.output import Output
from comp_cli.data.batches import Batch
from comp_cli.data.scene_pairs import ScenePairs
from comp_cli.engine import allocation, flops, importance, methods, schedule, scoring, stages
from comp_cli.engine.allocation import Judged
from comp_cli.engine.slicing import copied_channels, unit_channels
from comp_cli.engine.token_ranking import with_score_rule
from comp_cli.errors import CompError
from comp_cli.models.dense import open_dense
from comp_cli.models.pairs import batches_of
from comp_cli.options import PruneOptions
from comp_cli.runtime.modeling_comp import kept_tokens, select_mask, select_tokens, token_scores
from comp_cli.search.run import compare_plans
from comp_cli.search.training_free import TrainingFree


def counted(model, inputs) -> int:
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**inputs)
    return counter.get_total_flops()


def one_pair(inputs):
    return {name: tensor[:1] for name, tensor in inputs.items()}


# Importance ------------------------------------------------------------------------------------------------------------


def test_cip_golden_value():
    """X rows [CLS] (1, 2), (3, 0), (0, 1); token scores (3, 1); mean |W| (1, 1)."""
    activations = torch.tensor([[[1.0, 2.0], [3.0, 0.0], [0.0, 1.0]]])
    weight = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    first = torch.tensor([[True, False, False]])
    weights = importance.token_weights(torch.tensor([[9.0, 3.0, 1.0]]), first, first)
    torch.testing.assert_close(weights, torch.tensor([[1.0, 0.75, 0.25]]))
    found = importance.channel_importance(weight, importance.energy(activations, weights))
    torch.testing.assert_close(found, torch.tensor([2.7839, 2.0616]), atol=1e-4, rtol=0)
    plain = importance.channel_importance(weight, importance.energy(activations, torch.ones(1, 3)))
    torch.testing.assert_close(plain, torch.tensor([3.1623, 2.2361]), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("mask", "expected"), [((1, 1), (0.5357, 0.4643)), ((0.5, 1), (0.4667, 0.5333)), ((0, 1), (0.4, 0.6))])
def test_cit_golden_values(mask, expected):
    """Two heads with the maps [[.9, .1], [.5, .5]] and [[.2, .8], [.6, .4]], made by queries that are their logarithms."""
    maps = torch.tensor([[[0.9, 0.1], [0.5, 0.5]], [[0.2, 0.8], [0.6, 0.4]]])
    keys = torch.eye(2).expand(1, 2, 2, 2)
    found = token_scores(maps.log().unsqueeze(0), keys, 1.0, skip_first=False, head_mask=torch.tensor(mask).float())
    torch.testing.assert_close(importance.normalised(found)[0], torch.tensor(expected), atol=1e-4, rtol=0)


def test_fading_a_head_by_its_logits_scrambles_the_ranking_and_by_its_mask_does_not():
    """The trap that CIT avoids: a redundant head with small q and k attends everywhere, and wins the maximum over heads."""
    generator = torch.Generator().manual_seed(0)
    scrambled, steady = 0, 0
    for _ in range(20):
        query, key = torch.randn(2, 1, 4, 32, 8, generator=generator)
        query = query * 2
        without = importance.normalised(token_scores(query[:, 1:], key[:, 1:], 1.0)).argsort()
        masked = token_scores(query, key, 1.0, head_mask=torch.tensor([0.0, 1, 1, 1])).argsort()
        faded = query.clone()
        faded[:, 0] *= 1e-3
        by_logits = token_scores(faded, key, 1.0).argsort()
        steady += int(torch.equal(masked, without))
        scrambled += int(not torch.equal(by_logits, without))
    assert steady == 20
    assert scrambled >= 18


@pytest.mark.parametrize("fade", [0.5, 0.1, 0.0])
def test_a_redundant_head_fades_by_its_mask_and_no_score_moves(fade):
    """A copy of another head adds nothing to the maximum: CIT leaves every score as it is, smaller q and k do not."""
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 20, 4, 32, 8, generator=generator)
    query[:, 3], key[:, 3] = query[:, 2], key[:, 2]
    full = token_scores(query, key, 1.0)
    torch.testing.assert_close(token_scores(query, key, 1.0, head_mask=torch.tensor([1, 1, 1, fade])), full)
    faded = torch.stack([query[:, 0], query[:, 1], query[:, 2], fade * query[:, 3]], 1)
    assert (token_scores(faded, key, 1.0).argsort() != full.argsort()).any(1).sum() >= 18  # of 20 rankings


def test_token_scores_ignore_padding():
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 2, 6, 4, generator=generator)
    mask = torch.zeros(1, 1, 6, 6)
    mask[..., 4:] = torch.finfo(torch.float32).min
    found = token_scores(query, key, 0.5, attention_mask=mask)
    torch.testing.assert_close(found[:, :4], token_scores(query[:, :, :4], key[:, :, :4], 0.5))
    assert (found[:, 4:] < 0).all()
    torch.testing.assert_close(token_scores(query, key, 0.5, attention_mask=mask == 0), found)


def test_a_bounded_number_of_query_rows():
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 2, 9, 4, generator=generator)
    rows = [1, 3, 6, 8]  # evenly spaced from 1 to 8, [CLS] left out
    attention = (query[:, :, rows] @ key.transpose(-1, -2)).softmax(-1)
    torch.testing.assert_close(token_scores(query, key, 1.0, rows=4), attention.amax(1).sum(1))
    torch.testing.assert_close(token_scores(query, key, 1.0, rows=100), token_scores(query, key, 1.0))


def test_kept_tokens_stay_in_order_and_protected_ones_stay():
    scores = torch.tensor([[0.0, 0.9, 0.1, 0.8, 0.2, -1.0], [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]])
    assert kept_tokens(scores, 3, ()).tolist() == [[1, 3, 4], [3, 4, 5]]
    assert kept_tokens(scores, 3, ("first",)).tolist() == [[0, 1, 3], [0, 4, 5]]
    assert kept_tokens(scores, 3, ("first", "last")).tolist() == [[0, 1, 4], [0, 4, 5]]
    hidden = torch.arange(12.0).view(2, 6, 1)
    kept = kept_tokens(scores, 2, ())
    assert select_tokens(hidden, kept).flatten().tolist() == [1, 3, 10, 11]
    mask = torch.arange(36.0).view(1, 1, 6, 6)
    assert select_mask(mask, kept)[0, 0].tolist() == [[7, 9], [19, 21]]


def test_gini():
    assert importance.gini(torch.ones(10)) == pytest.approx(0)
    assert importance.gini(torch.tensor([0.0, 0, 0, 1])) == pytest.approx(0.75)
    assert importance.gini(torch.tensor([1.0, 3])) == pytest.approx(0.25)


# Slicing ---------------------------------------------------------------------------------------------------------------


def test_channels_of_heads():
    assert unit_channels((2, 0), 2).tolist() == [4, 5, 0, 1]
    assert copied_channels((1,), 2, dense_units=3, copies=3).tolist() == [2, 3, 8, 9, 14, 15]


# FLOPs -----------------------------------------------------------------------------------------------------------------


def test_flops_of_the_dense_model(stock, dense, inputs):
    assert flops.count(dense.plan, dense.reference).total == counted(stock, one_pair(inputs))


def test_flops_of_an_uneven_plan(dense, uneven_plan, inputs):
    model = dense.runtime(uneven_plan)
    assert flops.count(uneven_plan, dense.reference).total == counted(model, one_pair(inputs))


def test_flops_of_scoring_with_few_rows(dense, uneven_plan, inputs):
    from dataclasses import replace

    plan = uneven_plan.with_streams({"vision": replace(uneven_plan.streams["vision"], score_rows=7)})
    assert flops.count(plan, dense.reference).total == counted(dense.runtime(plan), one_pair(inputs))


@pytest.mark.parametrize(("size", "giga_macs"), [(384, 55.484), (480, 92.020)])
def test_published_macs_of_the_vision_tower(size, giga_macs):
    from tiny import blip_config

    from comp_cli.families import BLIP
    from comp_cli.plan import dense_plan

    config = blip_config(
        vision={"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "num_hidden_layers": 12}
        | {"image_size": size, "patch_size": 16}
    ).to_dict()
    with torch.device("meta"):
        model = transformers.BlipForImageTextRetrieval(transformers.BlipConfig(**config))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} | {"itm_head.weight": (2, 0)}
    ref = flops.reference(config, BLIP, shapes, 12)
    found = flops.count(dense_plan(config, BLIP, "BlipForImageTextRetrieval"), ref)
    assert (found.tower("vision") + found.fixed) / 2e9 == pytest.approx(giga_macs, abs=0.001)


# Scoring and schedule --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scores(dense, inputs):
    return scoring.collect(dense.runtime(dense.plan), dense.family, dense.plan, [inputs])


def test_scores_come_from_the_activations(stock, dense, inputs):
    """One channel score worked out again from the stock model: mean |W| times the norm of the activations."""
    seen = {}
    layer = stock.vision_model.encoder.layers[2]
    hook = layer.mlp.fc2.register_forward_pre_hook(lambda module, args: seen.__setitem__("x", args[0]))
    with torch.inference_mode():
        stock(**inputs)
    hook.remove()
    found = scoring.collect(dense.runtime(dense.plan), dense.family, dense.plan, [inputs], rule="wanda")
    expected = layer.mlp.fc2.weight.abs().mean(0) * seen["x"].flatten(0, 1).norm(dim=0)
    torch.testing.assert_close(found.units["vision", 2, "ffn"], expected / expected.mean(), rtol=1e-4, atol=1e-4)


def test_padding_does_not_change_scores(dense, inputs):
    short = {name: tensor[1:2] for name, tensor in inputs.items()}
    cut = short | {name: short[name][:, :7] for name in ("input_ids", "attention_mask")}
    runtime = dense.runtime(dense.plan)
    padded, plain = (scoring.collect(runtime, dense.family, dense.plan, [batch]) for batch in (short, cut))
    for key, expected in plain.units.items():
        torch.testing.assert_close(padded.units[key], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(padded.tokens["language", 1][:, :7], plain.tokens["language", 1], rtol=1e-4, atol=1e-5)


def prune_in_phases(dense, inputs, name, ratio, each=1):
    """The training-free plan of a method with phases."""
    method = methods.METHODS[name]
    progress = stages.SearchState.start(with_score_rule(dense.plan, method.tokens, dense.family), 0)
    pairs, options = [Batch(inputs, None)], PruneOptions("", ratio, method=name, recover=False)
    measure = TrainingFree(dense, options, pairs, pairs, None, Output("quiet")).measure
    return stages.prune_in_phases(dense.plan, dense.reference, ratio, measure, method.phases, each, schedule.Floors(), progress)


@pytest.fixture(scope="module")
def demo():
    """The demo model and four pairs: 145 image tokens, fine enough for any ratio by tokens alone."""
    dense = open_dense("demo", Output("quiet"))
    return dense, batches_of(dense, ScenePairs(labelled=True), "calibration", 4, 4)[0].inputs


@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.7])
def test_the_ratio_is_reached(dense, inputs, ratio):
    plan = prune_in_phases(dense, inputs, "joint", ratio)
    before, after = (counted(dense.runtime(p), one_pair(inputs)) for p in (dense.plan, plan))
    assert 1 - after / before == pytest.approx(ratio, abs=0.01)


@pytest.mark.parametrize("name", [name for name in methods.methods_for(methods.ENCODER) if methods.METHODS[name].phases])
def test_every_method_reaches_its_ratio_and_touches_only_its_modes(demo, name):
    """What the compact model really computes, counted."""
    dense, inputs = demo
    plan = prune_in_phases(dense, inputs, name, 0.4)
    reference = dense.random_inputs(1, dense.reference.tokens["language"])
    before, after = (counted(dense.runtime(p), reference) for p in (dense.plan, plan))
    assert 1 - after / before == pytest.approx(0.4, abs=0.01)
    allowed = {"parameters": {"attention", "cross", "ffn"}, "tokens": {"keep"}}
    touched = {
        part
        for tower, full in zip(plan.towers, dense.plan.towers, strict=True)
        for layer, was in zip(tower.layers, full.layers, strict=True)
        for part in ("attention", "cross", "ffn", "keep")
        if (layer.keep != was.keep if part == "keep" else layer.parts.get(part) != was.parts.get(part))
    }
    assert touched and touched <= set().union(*(allowed[kind] for kind in methods.METHODS[name].phases))


def test_the_order_of_phases_matters(demo):
    assert prune_in_phases(*demo, "sjp", 0.5) != prune_in_phases(*demo, "sjp-reversed", 0.5)


def test_many_small_steps_end_where_one_does(dense, inputs):
    plan = prune_in_phases(dense, inputs, "joint", 0.5, each=4)
    left = flops.count(plan, dense.reference).total / flops.count(dense.plan, dense.reference).total
    assert left == pytest.approx(0.5, abs=0.01) and plan != prune_in_phases(dense, inputs, "joint", 0.5)


def test_gradients_say_what_a_gate_does_to_the_loss(dense, inputs):
    """The slope behind taylor and upop, against the difference quotient of the loss as one channel is scaled."""
    from torch.nn import functional as F

    labels = torch.tensor([1, 0, 1])
    model = dense.runtime(dense.plan)

    def loss(outputs):
        return F.cross_entropy(outputs.itm_score.float(), labels)

    def run(batch):
        return loss(model(**batch))

    found = scoring.collect(model, dense.family, dense.plan, [inputs], rule="taylor", run=run).units["vision", 2, "ffn"]
    linear = model.vision_model.encoder.layers[2].mlp.fc2
    slopes = []
    for channel in range(3):
        losses = []
        for step in (1e-2, -1e-2):
            hook = linear.register_forward_pre_hook(
                lambda m, args, s=step, c=channel: (args[0] * (1 + s * (torch.arange(args[0].shape[-1]) == c)),)
            )
            with torch.inference_mode():
                losses.append(loss(model(**inputs)).item())
            hook.remove()
        slopes.append(abs(losses[0] - losses[1]) / 2e-2)
    expected = torch.tensor(slopes) / slopes[0]
    torch.testing.assert_close(found[:3] / found[0], expected, rtol=0.05, atol=0.02)
    signed = scoring.collect(model, dense.family, dense.plan, [inputs], rule="upop", run=run).units
    whole = torch.cat([scores for key, scores in signed.items() if key[2] == "ffn"])
    assert whole.mean().abs() < 1e-5 and whole.std() == pytest.approx(1.0, abs=1e-4)


def test_everything_shrinks_and_unevenly(dense, inputs):
    plan = prune_in_phases(dense, inputs, "joint", 0.6)
    vision, language = plan.towers
    assert len({(len(layer.kept("ffn")), len(layer.kept("attention"))) for layer in (*vision.layers, *language.layers)}) > 2
    assert any(len(layer.kept("attention")) < 6 for layer in vision.layers)
    assert any(len(layer.kept("cross")) < 6 for layer in language.layers)
    assert any(layer.keep for layer in vision.layers)
    assert all(len(layer.kept("ffn")) % 8 == 0 for tower in plan.towers for layer in tower.layers)
    keeps = [layer.keep["vision"] for layer in vision.layers if layer.keep]
    assert keeps == sorted(keeps, reverse=True)


def test_the_best_units_stay(dense, scores):
    plan = schedule.prune_mode(dense.plan, scores, dense.reference, "vision_params", 0.4, schedule.Floors())
    for index, layer in enumerate(plan.tower("vision").layers):
        found = scores.units["vision", index, "ffn"]
        gone = [i for i in range(200) if i not in layer.kept("ffn")]
        if gone:
            assert found[gone].max() <= found[list(layer.kept("ffn"))].min()


def test_texts_shorter_than_the_reference_say_nothing_about_language_tokens(dense, scores):
    from dataclasses import replace

    longer = replace(dense.reference, tokens=dense.reference.tokens | {"language": 20})
    assert schedule.prune_tokens(dense.plan, scores, longer, "language", 9.0, schedule.Floors()) == dense.plan
    same = schedule.prune_tokens(dense.plan, scores, dense.reference, "language", 9.0, schedule.Floors())
    assert same != dense.plan


def test_a_ratio_out_of_reach_says_what_is_in_reach(dense, inputs):
    with pytest.raises(CompError, match="cannot be reached.*has 0.9") as caught:
        prune_in_phases(dense, inputs, "joint", 0.999)
    assert caught.value.hint.startswith("Try --ratio 0.9")


def test_floors_hold(dense, scores):
    smallest, _ = schedule.prune_to(dense.plan, scores, dense.reference, tuple(dense.family.modes), 0, schedule.Floors())
    for tower in smallest.towers:
        for layer in tower.layers:
            assert len(layer.kept("attention")) >= 1 and len(layer.kept("ffn")) >= 20 and layer.keep.get(tower.name, 5) >= 5


class Priced:
    """A search that prices units at random, and in which no plan loses more than another."""

    thorough = True

    def __init__(self, dense):
        random = torch.Generator().manual_seed(0)
        layers = [(tower.name, index, layer) for tower in dense.plan.towers for index, layer in enumerate(tower.layers)]
        parts = [(name, index, part, units) for name, index, layer in layers for part, units in layer.parts.items()]
        self.prices = {
            (name, index, part): torch.rand(len(units.units), generator=random, dtype=torch.double)
            for name, index, part, units in parts
        }

    def held_out_loss(self, plan, leader):
        return Judged(1.0, 2, 1.0)

    def save(self, state):
        pass


def compared(dense, inputs, ratio):
    """The plan that is taken, and what was looked at."""
    state = allocation.AllocationState(dense.plan)
    compare_plans(dense, PruneOptions("", ratio), Priced(dense), state, [Batch(inputs, None)], Output("quiet"))
    return state


def test_every_plan_is_judged_beside_the_best_before(dense, inputs):
    told, losses = [], iter([0.5, 0.7, 0.4, 0.9, 0.6])

    class Losing(Priced):
        def held_out_loss(self, plan, leader):
            told.append(leader and leader.loss)
            loss = next(losses, 1.0)
            return Judged(loss, 1 if loss > 0.8 else 2, loss)

    state = allocation.AllocationState(dense.plan)
    compare_plans(dense, PruneOptions("", 0.5), Losing(dense), state, [Batch(inputs, None)], Output("quiet"))
    assert told[:6] == [None, 0.5, 0.5, 0.4, 0.4, 0.4]
    judged = [look.judged for look in state.looks if look.judged is not None]
    assert {(one.loss > 0.8, one.halves) for one in judged} == {(True, 1), (False, 2)}


def test_what_parameters_alone_cannot_reach_is_reached_with_tokens(dense, inputs):
    state = compared(dense, inputs, 0.845)
    assert state.looks[0].loss is None and state.looks[0].cuts == {}
    before, after = (counted(dense.runtime(p), one_pair(inputs)) for p in (dense.plan, state.plan))
    assert 1 - after / before == pytest.approx(0.845, abs=0.01)


def test_a_ratio_that_no_plan_has_is_told_the_nearest_which_can_be_had(dense, inputs):
    with pytest.raises(CompError, match="cannot be reached: the nearest plan has 0.8") as caught:
        compared(dense, inputs, 0.99)
    nearest = float(caught.value.hint.removeprefix("Try --ratio ").removesuffix("."))
    plan = compared(dense, inputs, nearest).plan
    left = flops.count(plan, dense.reference).total / flops.count(dense.plan, dense.reference).total
    assert 1 - left == pytest.approx(nearest, abs=0.01)
