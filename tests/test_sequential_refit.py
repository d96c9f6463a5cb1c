"""Recovery in sequence: against least squares on what stock transformers says, and on every family."""

import copy

import pytest
import tiny
import torch
from torch import Tensor

from comp_cli.cli.output import Output
from comp_cli.engine import sequential_refit
from comp_cli.engine.allocation import Judged
from comp_cli.engine.sequential_refit import counterparts, refit_in_sequence
from comp_cli.models.dense import open_dense
from comp_cli.models.pairs import batches_of, generated_pairs
from comp_cli.search.calibration import HeldOut, refit
from comp_cli.tasks import comparison

FAMILIES = tuple(tiny.FAMILIES)


def run(model, inputs: dict[str, Tensor]):
    return model(**inputs)


def refitted(dense, plan, batches: list[dict[str, Tensor]]):
    compact = dense.runtime(plan)
    refit_in_sequence(compact, dense.runtime(dense.plan), dense.family, plan, dense.plan, batches, run)
    return compact


def without_channels(plan, tower: str, index: int, gone: set[int]):
    from dataclasses import replace

    own = plan.tower(tower)
    layers = list(own.layers)
    layers[index] = layers[index].keeping("ffn", [unit for unit in layers[index].kept("ffn") if unit not in gone])
    return plan.with_tower(replace(own, layers=tuple(layers)))


def test_nothing_pruned_nothing_changed(dense, inputs):
    compact, same = refitted(dense, dense.plan, [inputs]), dense.runtime(dense.plan)
    for (name, found), expected in zip(compact.named_parameters(), same.parameters(), strict=True):
        assert torch.equal(found, expected), name


def test_layers_before_the_first_change_stay(dense, inputs):
    plan = without_channels(dense.plan, "vision", 1, {0, 1, 2, 3})
    compact, before = refitted(dense, plan, [inputs]), dense.runtime(plan)
    changed = {
        name
        for (name, found), was in zip(compact.named_parameters(), before.parameters(), strict=True)
        if not torch.equal(found, was)
    }
    assert any(name.startswith("vision_model.encoder.layers.1.mlp.fc2") for name in changed)
    assert not any(name.startswith("vision_model.encoder.layers.0.") for name in changed)
    assert all(".projection." in name or ".fc2." in name or "output.dense." in name for name in changed)


def test_a_part_is_fitted_to_the_stream_of_the_stock_model(stock, dense, inputs, monkeypatch):
    """Least squares by hand: what the pruned feed-forward part reads, against the stock model's hidden states behind it."""
    monkeypatch.setattr(sequential_refit, "RIDGE", 1e-5)
    plan = without_channels(dense.plan, "vision", 0, set(range(170)))  # few are left: more tokens than channels
    compact = refitted(dense, plan, [inputs])
    layer = compact.vision_model.encoder.layers[0]
    seen = {}
    layer.mlp.fc2.register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))
    layer.layer_norm2.register_forward_pre_hook(lambda module, args: seen.update(h=args[0]))
    with torch.inference_mode():
        compact(**inputs)
        behind = stock.vision_model(inputs["pixel_values"], output_hidden_states=True).hidden_states[1]
    x = seen["x"].flatten(0, 1).double()
    rows, wanted = torch.cat([x, torch.ones_like(x[:, :1])], 1), (behind - seen["h"]).flatten(0, 1).double()
    best = torch.linalg.lstsq(rows, wanted).solution
    left = (rows @ best - wanted).square().sum()
    weights = torch.cat([layer.mlp.fc2.weight, layer.mlp.fc2.bias.unsqueeze(1)], 1).double()
    found = (rows @ weights.T - wanted).square().sum()
    assert float(found) == pytest.approx(float(left), rel=1e-3)


def test_channels_that_others_say_go_without_a_trace(tiny_folder, inputs, monkeypatch):
    monkeypatch.setattr(sequential_refit, "RIDGE", 1e-5)
    dense = open_dense(str(tiny_folder), Output("quiet"), text_tokens=12)
    dense.state = copy.deepcopy(dense.state)
    for name in ("weight", "bias"):  # channels 0 to 3 are those of 4 to 7 once more
        matrix = dense.state[f"vision_model.encoder.layers.0.mlp.fc1.{name}"]
        matrix[:4] = matrix[4:8]
    plan = without_channels(dense.plan, "vision", 0, {0, 1, 2, 3})
    whole, plain, found = dense.runtime(dense.plan), dense.runtime(plan), refitted(dense, plan, [inputs])
    with torch.inference_mode():
        expected, sliced, recovered = (model(**inputs).itm_score for model in (whole, plain, found))
    assert (recovered - expected).abs().max() < 2e-2 * (sliced - expected).abs().max()


def test_what_is_left_has_its_counterparts():
    stream = torch.arange(2 * 4, dtype=torch.float).reshape(1, 4, 2)
    kept = torch.tensor([[0, 2]])
    assert counterparts(stream, None, 4) is stream
    assert counterparts(stream, kept, 2).tolist() == [[[0, 1], [4, 5]]]
    # One token more than were kept stands for the mean of those that went: (2, 3) and (6, 7).
    assert counterparts(stream, kept, 3).tolist() == [[[0, 1], [4, 5], [4, 5]]]


def test_padding_has_no_say(dense, uneven_plan, inputs):
    one = {name: tensor[1:2] for name, tensor in inputs.items()}
    one["attention_mask"] = one["input_ids"].ne(0).long()
    other = one | {"input_ids": torch.where(one["attention_mask"] == 0, 7, one["input_ids"])}
    plain, padded = (refitted(dense, uneven_plan, [batch]).state_dict() for batch in (one, other))
    for name, tensor in plain.items():
        torch.testing.assert_close(padded[name], tensor, rtol=1e-4, atol=1e-5)


def test_batches_are_summed(dense, uneven_plan, inputs):
    """As one batch or as three: the fit is the same."""
    pieces = [{name: tensor[i : i + 1] for name, tensor in inputs.items()} for i in range(3)]
    whole, parts = (refitted(dense, uneven_plan, batches).state_dict() for batches in ([inputs], pieces))
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("room", [0, 32_000])  # for no batch, and in the widest layers for one of the two
def test_what_is_kept_of_a_layer_is_what_it_says_again(dense, uneven_plan, inputs, monkeypatch, room):
    batches = [inputs, {name: tensor[:2] for name, tensor in inputs.items()}]
    kept = refitted(dense, uneven_plan, batches)
    monkeypatch.setattr(sequential_refit, "HELD", room)
    again = refitted(dense, uneven_plan, batches)
    for (name, found), expected in zip(kept.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(found, expected), name


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_comes_nearer_to_its_dense_model(family, tmp_path):
    dense = open_dense(str(tiny.write(family, tmp_path / family)), Output("quiet"), text_tokens=12)
    plan = tiny.uneven(dense.plan, dense.family)
    batches = batches_of(dense, generated_pairs(dense.task, labelled=False), "calibration", 32, 8)
    whole, plain, compact = dense.runtime(dense.plan), dense.runtime(plan), dense.runtime(plan)
    refit(dense, compact, plan, batches)
    again = dense.runtime(plan)
    refit(dense, again, plan, batches)
    assert all(torch.equal(a, b) for a, b in zip(compact.parameters(), again.parameters(), strict=True))

    def features(model) -> Tensor:
        with torch.inference_mode():
            read = [dense.task.subsample(dense.task.forward(model, batch.inputs), batch.samples) for batch in batches]
        return torch.cat([dense.task.features(outputs) for outputs in read])

    expected = features(whole)
    before, after = ((features(model) - expected).square().mean() for model in (plain, compact))
    assert after < before


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_judge_knows_of_the_dense_model_is_what_it_says(family, tmp_path):
    """Its streams, put together from two halves, refit the same weights, and its features are those of the whole model."""
    dense = open_dense(str(tiny.write(family, tmp_path / family)), Output("quiet"), text_tokens=12)
    plan = tiny.uneven(dense.plan, dense.family)
    batches = batches_of(dense, generated_pairs(dense.task, labelled=False), "calibration", 16, 4)
    judge = HeldOut(dense, batches, None, sequential=True)
    judge.loss(plan)
    for number, half in enumerate((batches[::2], batches[1::2])):
        said = torch.cat([dense.task.features(part.outputs) for part in comparison.read(dense.whole, dense.task, half)])
        assert torch.equal(judge.expected[number], said)
    known = judge.known_streams()
    assert known.kept.keys() == {tower.name for tower in dense.family.towers if tower.order != "stock" or tower.norms}
    found, again = dense.runtime(plan), dense.runtime(plan)
    refit(dense, found, plan, batches, streams=known)
    refit(dense, again, plan, batches)
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), again.parameters(), strict=True))


def test_streams_of_halved_batches_are_not_those_of_the_batches(dense):
    batches = batches_of(dense, generated_pairs(dense.task, labelled=False), "calibration", 12, 4)
    plan = tiny.uneven(dense.plan, dense.family)
    judge = HeldOut(dense, batches, None, sequential=True)
    judge.loss(plan)
    assert judge.known_streams() is None


def test_a_plan_that_loses_far_more_than_the_leader_on_one_half_is_not_judged_on_the_other(dense, uneven_plan):
    batches = batches_of(dense, generated_pairs(dense.task, labelled=False), "calibration", 16, 4)
    judge = HeldOut(dense, batches, None, sequential=True)
    alone = HeldOut(dense, batches, None, sequential=True, folds=1)
    whole, half = judge.loss(uneven_plan), alone.loss(uneven_plan)
    first = whole.first
    assert half == (first, 1, first) and whole.halves == 2 and whole.loss != first
    near, far = first / 1.29, first / 1.31  # of the leader
    assert judge.loss(uneven_plan, Judged(0.5, 2, near)) == whole
    assert judge.loss(uneven_plan, Judged(0.5, 2, far)) == (0.5 + first - far, 1, first)
    assert alone.loss(uneven_plan, Judged(0.5, 1, far)) == half
