"""The multi-mode strategy and the closed-form recovery."""

import json
import random

import pytest
import torch

from comp_cli.cli.output import Output
from comp_cli.data.batches import Batch
from comp_cli.engine import flops, recover, schedule, scoring, stages, statistics
from comp_cli.errors import CompError
from comp_cli.search.calibration import Calibration, gather_statistics, halved, split

STRATEGY = stages.Strategy()
MODES = ("vision_params", "language_params", "cross_params", "vision_tokens", "language_tokens")


# Strategy ------------------------------------------------------------------------------------------------------------


def test_history_golden_values():
    found = [stages.history_weight(idle, STRATEGY) for idle in range(1, 7)]
    assert found == pytest.approx([0.40, 0.32, 0.24, 0.16, 0.08, 0.0])


def test_exploration_golden_values():
    assert stages.exploration((1, 2, 3, 4, 5), 5) == pytest.approx([0.129, 0.157, 0.192, 0.235, 0.287], abs=5e-4)


def test_a_first_visit_remembers_its_cost_and_later_ones_fade():
    memory = stages.Memory()
    assert memory.remember("vision_params", 1, 2.0, STRATEGY) == 2.0
    assert memory.remember("vision_params", 2, 1.0, STRATEGY) == pytest.approx(0.4 * 2 + 0.6 * 1)
    assert memory.remember("vision_params", 9, 5.0, STRATEGY) == 5.0  # seven stages later nothing is left of it


def test_what_was_not_looked_at_for_long_is_forgotten_where_looking_is_free():
    """Weight 0 after I_max stages without a look: then the remembered cost decides nothing any more."""
    memory, paper = stages.Memory(), stages.Strategy(measure_first=False)
    memory.remember("vision_params", 3, 2.0, STRATEGY)
    assert [memory.known("vision_params", stage, STRATEGY) for stage in (4, 8, 9)] == [2.0, 2.0, None]
    assert memory.known("vision_params", 9, paper) == 2.0 and memory.known("cross_params", 4, paper) is None
    shares = {mode: 1.0 for mode in MODES}
    for mode in MODES:
        memory.remember(mode, 9 if mode != "vision_params" else 3, 1.0, STRATEGY)
    assert stages.choose(memory, 10, MODES, shares, STRATEGY, random.Random(0)) == ("vision_params", "forgotten")


def test_modes_run_once_by_their_share_then_by_cost():
    shares = {mode: float(i) for i, mode in enumerate(MODES)}
    memory, rng = stages.Memory(), random.Random(0)
    greedy = stages.Strategy(explore=0)
    first = []
    for stage in range(1, 6):
        mode, why = stages.choose(memory, stage, MODES, shares, greedy, rng)
        memory.remember(mode, stage, cost=float(len(mode)), strategy=greedy)
        first.append((mode, why))
    assert first == [(mode, "first visit") for mode in reversed(MODES)]
    cheapest = min(MODES, key=len)
    assert stages.choose(memory, 6, MODES, shares, greedy, rng) == (cheapest, "lowest cost")


def test_exploration_happens_as_often_as_it_should_and_prefers_those_that_waited():
    memory = stages.Memory({m: float(i) for i, m in enumerate(MODES)}, {m: i for i, m in enumerate(MODES)})
    rng = random.Random(0)
    drawn = [stages.choose(memory, 5, MODES, {}, STRATEGY, rng) for _ in range(4000)]
    explored = [mode for mode, why in drawn if why == "exploration"]
    assert len(explored) / 4000 == pytest.approx(0.2, abs=0.02)
    assert explored.count(MODES[0]) > explored.count(MODES[-1])


# Search --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def batches(inputs):
    return [Batch(inputs, None)]


def searched(dense, batches, seed, stages_=10, **strategy):
    """The plan, and every stage with the plan after it."""
    journal = []
    progress = stages.SearchState.start(dense.plan, seed)
    plan = stages.search(
        dense.plan,
        dense.reference,
        0.5,
        Calibration(dense, batches, None, "cip").measure,
        stages.Strategy(stages=stages_, **strategy),
        schedule.Floors(),
        progress,
        tell=lambda stage: journal.append((stage, progress.plan)),
    )
    return plan, journal


@pytest.fixture(scope="module")
def found(dense, batches):
    return searched(dense, batches, seed=0)


def test_the_ratio_is_reached_in_stages(dense, found):
    plan, journal = found
    assert 1 - flops.count(plan, dense.reference).total / flops.count(dense.plan, dense.reference).total == pytest.approx(
        0.5, abs=0.01
    )
    ratios = [stage.ratio for stage, _ in journal]
    assert ratios == sorted(ratios) and max(b - a for a, b in zip([0, *ratios], ratios, strict=False)) < 0.15


def test_a_stage_touches_its_own_mode_only(dense, found):
    _, journal = found
    before = dense.plan
    for stage, plan in journal:
        for tower, old in zip(plan.towers, before.towers, strict=True):
            for layer, was in zip(tower.layers, old.layers, strict=True):
                mine = {"vision": "vision_params", "language": "language_params"}[tower.name]
                assert all(layer.parts[part] == was.parts[part] for part in ("attention", "ffn")) or stage.mode == mine
                assert layer.parts.get("cross") == was.parts.get("cross") or stage.mode == "cross_params"
                assert layer.keep == was.keep or stage.mode == f"{tower.name}_tokens"
        before = plan


def test_costs_are_loss_added_per_flops_removed(dense, found):
    _, journal = found
    total = flops.count(dense.plan, dense.reference).total
    loss, at = 0.0, total  # the divergence of the dense model from itself
    for stage, plan in journal:
        now = flops.count(plan, dense.reference).total
        assert stage.cost == pytest.approx((stage.loss - loss) / ((at - now) / total))
        loss, at = stage.loss, now


def test_a_stage_can_be_made_again_from_its_line(dense, batches, found):
    """Mode and threshold of the first line, on the scores of the dense model, give the first plan; its metric is true."""
    stage, plan = found[1][0]
    calibration = Calibration(dense, batches, None, "cip")
    scores = calibration.measure(dense.plan).scores
    found = schedule.prune_mode(dense.plan, scores, dense.reference, stage.mode, stage.threshold, schedule.Floors())
    assert found == plan != dense.plan
    with torch.inference_mode():
        before, after = (dense.runtime(p)(**batches[0].inputs).itm_score.argmax(-1) for p in (dense.plan, plan))
    assert stage.metric == (before == after).float().mean().item()


def test_search_is_deterministic_by_seed(dense, batches, found):
    assert searched(dense, batches, seed=0) == found
    assert searched(dense, batches, seed=3)[1] != found[1]


def test_progress_survives_json(dense, batches, found):
    """Stop after every stage in turn; the rest is the same as without the stop."""
    measure = Calibration(dense, batches, None, "cip").measure
    rest = stages.Strategy(stages=10), schedule.Floors()
    for stop in (1, 4, 7):
        progress = stages.SearchState.start(dense.plan, 0)

        class Stopped(Exception):
            pass

        def tell(stage, stop=stop):
            if stage.stage == stop:
                raise Stopped

        with pytest.raises(Stopped):
            stages.search(dense.plan, dense.reference, 0.5, measure, *rest, progress, tell)
        again = stages.SearchState.from_json(json.loads(json.dumps(progress.to_json())))
        assert stages.search(dense.plan, dense.reference, 0.5, measure, *rest, again) == found[0]
        assert again.stages == [stage for stage, _ in found[1]]


def test_exhausted_modes_give_way_and_the_end_is_said(dense, batches):
    with pytest.raises(CompError, match="cannot be reached"):
        searched(dense, batches, seed=0, modes=("language_tokens", "cross_params"))


def test_floors_hold_through_many_stages(dense, batches):
    measure = Calibration(dense, batches, None, "cip").measure
    progress = stages.SearchState.start(dense.plan, 0)
    rest = stages.Strategy(stages=20), schedule.Floors()
    plan = stages.search(dense.plan, dense.reference, 0.85, measure, *rest, progress)
    assert 1 - flops.count(plan, dense.reference).total / flops.count(dense.plan, dense.reference).total == pytest.approx(
        0.85, abs=0.01
    )
    assert min(len(layer.kept("ffn")) for tower in plan.towers for layer in tower.layers) >= 20


# Recovery ------------------------------------------------------------------------------------------------------------


def test_a_redundant_channel_is_recovered_exactly():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 50, 4, generator=generator)
    x[..., 3] = 2 * x[..., 0] - x[..., 1] + 0.5  # says nothing that the others do not say
    weight, bias = torch.randn(3, 4, generator=generator), torch.randn(3, generator=generator)
    kept = torch.tensor([0, 1, 2])
    found, shift = recover.refit(weight, bias, recover.gram(x, torch.ones(1, 50)), kept, ridge=1e-9)
    torch.testing.assert_close(x[..., kept] @ found.T + shift, x @ weight.T + bias, atol=1e-4, rtol=0)


def test_nothing_pruned_nothing_changed():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, 8, generator=generator)  # fewer samples than channels: only the ridge decides
    weight, bias = torch.randn(2, 8, generator=generator), torch.randn(2, generator=generator)
    found, shift = recover.refit(weight, bias, recover.gram(x, torch.ones(1, 3)), torch.arange(8))
    torch.testing.assert_close(found, weight, atol=1e-5, rtol=0)
    torch.testing.assert_close(shift, bias, atol=1e-5, rtol=0)


def test_padding_has_no_weight_in_the_gram_matrix():
    x = torch.randn(1, 5, 3, generator=torch.Generator().manual_seed(0))
    weights = torch.tensor([[1.0, 1, 1, 0, 0]])
    torch.testing.assert_close(recover.gram(x, weights), recover.gram(x[:, :3], torch.ones(1, 3)))


def test_recovery_brings_the_outputs_nearer(stock, dense, inputs, batches):
    """On the pairs that it was fitted on, against plain slicing, parameters pruned by half."""
    scores = scoring.collect(dense.runtime(dense.plan), dense.family, dense.plan, [inputs])
    plan = schedule.prune_mode(dense.plan, scores, dense.reference, "vision_params", 0.5, schedule.Floors())
    model = dense.runtime(dense.plan)
    grams = statistics.collect(model, dense.family, dense.plan, [inputs], lambda batch: model(**batch)).grams
    with torch.inference_mode():
        expected = stock(**inputs).last_hidden_state
        sliced, recovered = (
            (dense.runtime(plan, g)(**inputs).last_hidden_state - expected).square().mean() for g in (None, grams)
        )
    assert recovered < 0.5 * sliced


@pytest.mark.parametrize("rises", [False, True])
def test_activations_are_gathered_without_a_graph_unless_something_is_differentiated(dense, batches, rises, monkeypatch):
    """Else all that the layers hold would be in memory at once."""
    forward, graphs = type(dense.task).forward, []

    def watched(self, model, inputs):
        read = forward(self, model, inputs)
        graphs.append(any(part.requires_grad for part in read))
        return read

    monkeypatch.setattr(type(dense.task), "forward", watched)
    found = gather_statistics(dense, batches, Output("quiet"), rises=rises)
    assert graphs and set(graphs) == {rises} and bool(found.rises) == rises
    assert not any(gram.requires_grad for gram in found.grams.values())


@pytest.mark.parametrize("size", [1, 2, 3])
def test_plans_are_judged_on_pairs_that_recovery_has_not_seen_whatever_the_batch_size(inputs, size):
    whole = Batch({name: torch.cat([tensor, tensor]) for name, tensor in inputs.items()}, None)  # six pairs
    whole.inputs["pixel_values"] += torch.arange(6).view(6, 1, 1, 1)
    halves = halved(list(split(whole, size)))
    first, second = ({float(x) for batch in half for x in batch.inputs["pixel_values"][:, 0, 0, 0]} for half in halves)
    assert not first & second and len(first | second) == 6 and min(len(first), len(second)) >= 2
