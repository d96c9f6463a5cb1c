"""What is gathered of a dense model: against explicit sums, and against what small errors really cost."""

import pytest
import torch

from comp_cli.cli.output import Output
from comp_cli.data.batches import Batch
from comp_cli.engine import scoring
from comp_cli.engine.statistics import per_flops, prices
from comp_cli.search.calibration import gather_statistics, halved, split
from comp_cli.tasks import comparison

KEY = ("vision", 1, "ffn")


def gathered(dense, inputs, **options):
    return gather_statistics(dense, [Batch(inputs, None)], Output("quiet"), **options)


def test_gram_matrices_are_sums_over_tokens(dense, inputs):
    found = gathered(dense, inputs, rises=False, weighted=False)
    model, seen = dense.runtime(dense.plan), {}
    reader = scoring.reader_of(model.vision_model.encoder.layers[1], dense.family.tower("vision").part("ffn"))
    reader.register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))
    with torch.inference_mode():
        model(**inputs)
    x = seen["x"].flatten(0, 1)
    x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
    torch.testing.assert_close(found.grams[KEY], x.T @ x, rtol=1e-4, atol=1e-3)
    assert not found.rises


def test_the_pass_back_changes_no_gram_matrix(dense, inputs):
    there, back = (gathered(dense, inputs, rises=rises) for rises in (False, True))
    assert there.grams.keys() == back.grams.keys() == back.rises.keys()
    for key, expected in there.grams.items():
        torch.testing.assert_close(back.grams[key], expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def mean_rises(dense, inputs):
    """Of many draws: each is a square of a normal number, for each of three pairs."""
    drawn = [gathered(dense, inputs, rises=True, weighted=False, seed=seed).rises for seed in range(200)]
    return {key: sum(rises[key] for rises in drawn) / len(drawn) for key in drawn[0]}


@pytest.mark.parametrize("key", [KEY, ("vision", 4, "attention"), ("language", 0, "cross"), ("language", 3, "ffn")])
def test_rises_are_what_a_small_error_costs(dense, inputs, mean_rises, key):
    """A part says a little less of what it says beside its mean: the loss, divided by the square of how much less."""
    tower = dense.family.tower(key[0])
    model = dense.runtime(dense.plan)
    little, valid = 1e-2, torch.ones(3, 37) if key[0] == "vision" else inputs["attention_mask"].float()

    def less(module, args, output):
        mean = torch.einsum("bnd,bn->d", output, valid) / valid.sum()
        return output - little * (output - mean) * valid.unsqueeze(-1)

    def read():
        with torch.inference_mode():
            return dense.task.forward(model, inputs)

    before = read()
    scoring.reader_of(scoring.tower_layers(model, tower)[key[1]], tower.part(key[2])).register_forward_hook(less)
    after = read()
    distance = comparison.feature_distance(*(dense.task.features(outputs) for outputs in (before, after)))
    lost = distance + comparison.divergence(*(dense.task.rankings(outputs, None) for outputs in (before, after)))
    assert mean_rises[key] == pytest.approx(float(lost) / little**2, rel=0.35)


def test_prices_are_those_of_all_units_and_scale_with_the_loss(dense, inputs):
    found = gathered(dense, inputs, rises=True)
    model = dense.runtime(dense.plan)
    plain = prices(model, dense.family, dense.plan, found)
    for tower in dense.plan.towers:
        for index, layer in enumerate(tower.layers):
            for part, units in layer.parts.items():
                assert plain[tower.name, index, part].shape == (len(units.units),)
    found.rises[KEY] *= 3
    dearer = prices(model, dense.family, dense.plan, found)
    torch.testing.assert_close(dearer[KEY], 3 * plain[KEY])


def test_prices_per_flops_are_of_the_units_that_stay(dense, uneven_plan, inputs):
    found = gathered(dense, inputs, rises=True)
    priced = prices(dense.runtime(dense.plan), dense.family, dense.plan, found)
    each = per_flops(priced, uneven_plan, dense.plan, dense.reference)[KEY]
    kept = uneven_plan.tower("vision").layers[1].kept("ffn")
    # A channel: 32 multiply-accumulates in and out for each of 37 tokens.
    width = dense.state["vision_model.encoder.layers.1.mlp.fc1.weight"].shape[1]
    torch.testing.assert_close(each, priced[KEY][list(kept)] / (37 * 2 * 2 * width))


def test_pieces_and_halves_hold_every_pair_once(inputs):
    batch = Batch({name: torch.cat([tensor, tensor]) for name, tensor in inputs.items()}, None)
    pieces = [piece.inputs["input_ids"] for piece in split(batch, 4)]
    assert [len(piece) for piece in pieces] == [4, 2] and torch.equal(torch.cat(pieces), batch.inputs["input_ids"])
    first, second = halved([batch, Batch(inputs, None)])
    assert [part.samples for part in first] == [3, 2] and [part.samples for part in second] == [3, 1]
    one = Batch({name: tensor[:1] for name, tensor in inputs.items()}, None)
    assert [half[0].samples for half in halved([one])] == [1, 1]


def test_halves_are_of_whole_batches_where_that_makes_halves(inputs):
    batches = [Batch({name: tensor + number for name, tensor in inputs.items()}, None) for number in range(4)]
    first, second = halved(batches)
    assert first == batches[::2] and second == batches[1::2]
    first, second = halved(batches[:3])  # which whole batches would share out as 6 and 3 pairs
    assert [part.samples for part in first] == [2, 2, 2] and [part.samples for part in second] == [1, 1, 1]
