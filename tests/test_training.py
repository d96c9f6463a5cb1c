"""Fine-tuning after and inside the search."""

import itertools
import json
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from typer.testing import CliRunner

from comp_cli.cli.app import app
from comp_cli.cli.output import Output
from comp_cli.data.batches import Batch
from comp_cli.data.scene_pairs import ScenePairs
from comp_cli.engine import flops, scoring
from comp_cli.engine.fading import fade_at, fading, forget_head_masks
from comp_cli.engine.slicing import slice_state
from comp_cli.errors import CompError
from comp_cli.models.dense import open_dense
from comp_cli.models.pairs import batches_of
from comp_cli.options import PruneOptions, Training
from comp_cli.search.calibration import Calibration
from comp_cli.search.run import search
from comp_cli.search.trainer import Trainer, training_batches
from comp_cli.tasks import comparison

QUIET = Output("quiet")
SCENES = ScenePairs(labelled=False)
SIZES = ["--num-samples", "8", "--stage-samples", "8", "--eval-samples", "8", "--batch-size", "4", "--text-tokens", "12"]
TRAIN = ["--steps", "12", "--train-batch-size", "4", "--lr", "1e-3", "--device", "cpu"]
IN_STAGES = ["--method", "comp-paper", "--stages", "6", "--stage-share", "0.5"]


def run(*given):
    return CliRunner().invoke(app, list(map(str, given)))


def test_the_clock_of_a_fade_has_upops_golden_values():
    found = [1 - fade_at(step, 20) for step in (2, 5, 10, 15, 18)]
    assert found == pytest.approx([0.1564, 0.3827, 0.7071, 0.9239, 0.9877], abs=1e-4)
    assert fade_at(20, 20) == 0


def test_a_plan_within_a_plan(dense, uneven_plan):
    """Slicing twice is slicing once."""
    vision = uneven_plan.tower("vision")
    layers = tuple(layer.keeping("ffn", layer.kept("ffn")[1::2]) for layer in vision.layers)
    smaller = uneven_plan.with_tower(replace(vision, layers=layers))
    once = slice_state(dense.state, dense.family, smaller)
    twice = slice_state(slice_state(dense.state, dense.family, uneven_plan), dense.family, smaller.within(uneven_plan))
    for name, tensor in once.items():
        assert torch.equal(tensor, twice[name]), name


def test_what_has_faded_is_gone(dense, uneven_plan, inputs):
    """At alpha 0 the fading model says what the sliced one says, tokens included (CIT); at 1 what it said before."""
    keeps = dense.plan.with_keeps_of(uneven_plan)
    model = dense.build(keeps, dense.state)
    with torch.inference_mode():
        before = model(**inputs).itm_score
        with fading(model, dense.family, keeps, uneven_plan) as fade:
            fade(1.0)
            torch.testing.assert_close(model(**inputs).itm_score, before)
            fade(0.0)
            faded = model(**inputs).itm_score
            fade(0.5)
            assert not torch.allclose(model(**inputs).itm_score, faded)
        torch.testing.assert_close(model(**inputs).itm_score, before)
        uneven = uneven_plan.with_streams(keeps.streams)
        torch.testing.assert_close(faded, dense.runtime(uneven)(**inputs).itm_score, atol=1e-5, rtol=1e-4)


def test_without_cit_faded_heads_vote_on(dense, uneven_plan, inputs):
    """The ablation is one: the kept tokens differ from those of the sliced model."""
    model = dense.build(dense.plan, dense.state)
    with fading(model, dense.family, dense.plan, uneven_plan) as fade:
        fade(0.0)
        with torch.inference_mode(), scoring.recording(model, dense.family, dense.plan) as recorder:
            model(**inputs)
            masked = dict(recorder.scores)
            forget_head_masks(model)
            model(**inputs)
        changed = [key for key in masked if not torch.allclose(masked[key], recorder.scores[key])]
    assert ("vision", 0) in changed or ("vision", 1) in changed


def test_batches_go_on_after_what_was_skipped(dense):
    training = Training(steps=4, batch_size=6)
    whole = list(itertools.islice(training_batches(dense, SCENES, training, 0, 0), 4))
    rest = list(itertools.islice(training_batches(dense, SCENES, training, 0, 2), 2))
    for a, b in zip(whole[2:], rest, strict=True):
        assert torch.equal(a.inputs["pixel_values"], b.inputs["pixel_values"])


class Few:
    """A set of five pairs."""

    def read(self, purpose, limit=None, seed=0, accepts=None):
        return SCENES.read(purpose, 5, seed)


@pytest.mark.parametrize(("batch", "sizes"), [(2, [2, 2, 2, 2]), (8, [5, 5, 5]), (5, [5, 5])])
def test_a_small_set_is_read_again_and_again(dense, batch, sizes):
    """Epoch after epoch; the rest of an epoch that makes no whole batch is left out, but never all of it."""
    found = itertools.islice(training_batches(dense, Few(), Training(batch_size=batch), 0, 0), len(sizes))
    assert [len(one.inputs["input_ids"]) for one in found] == sizes


def options(**changes):
    training = Training(steps=20, batch_size=8, lr=1e-3)
    training = replace(training, **changes.pop("training", {}))
    samples = {"num_samples": 8, "stage_samples": 8, "batch_size": 8, "stages": 6}
    return PruneOptions("tiny", 0.5, "comp-paper", training=training, **samples, **changes)


@pytest.mark.parametrize("share", [0.0, pytest.param(0.5, marks=pytest.mark.slow)])
def test_training_brings_accuracy_back(share):
    """The demo model at 0.7 of its FLOPs gone: a few seconds of training, judged on pairs that nothing was fitted on."""
    dense = open_dense("demo", QUIET)
    scenes = ScenePairs(labelled=True)
    pairs = batches_of(dense, scenes, "evaluation", 128, 32)
    losses = []
    for steps in (0, 40):
        training = Training(steps=steps, batch_size=16, lr=3e-4, stage_share=share, mixed_precision="no")
        samples = {"num_samples": 32, "stage_samples": 32, "batch_size": 32, "stages": 8}
        found = search(dense, scenes, PruneOptions("demo", 0.7, method="joint", training=training, **samples), None, QUIET)
        left = flops.count(found.plan, dense.reference).total / flops.count(dense.plan, dense.reference).total
        assert left == pytest.approx(0.3, abs=0.01)
        losses.append(comparison.evaluate(found.model, dense.task, pairs).loss)
    assert losses[1] < 0.85 * losses[0]


def test_every_step_is_taken_and_the_dense_model_stays_as_it_is(dense):
    before = {name: tensor.clone() for name, tensor in dense.state.items()}
    chosen = options(training={"stage_share": 0.5})
    taken = []

    def read(skip):
        for batch in training_batches(dense, SCENES, chosen.training, 0, skip):
            taken.append(batch)
            yield batch

    trainer = Trainer(dense, chosen.training, 0.5, read)
    calibration = Calibration(dense, [Batch(taken_inputs(dense), None)], None, "cip")
    from comp_cli.search.run import run_stages, stages

    progress = stages.SearchState.start(dense.plan, 0)
    run_stages(dense, chosen, partial(trainer.measure, calibration), progress, lambda: None, QUIET)
    assert trainer.done == 10 and trainer.plan == progress.plan
    for kind in ("exp_avg", "exp_avg_sq"):
        assert {n: t.shape for n, t in trainer.moments[kind].items()}.items() <= {
            n: t.shape for n, t in trainer.state.items()
        }.items()
    trainer.tune(QUIET, lambda: None)
    assert trainer.done == len(taken) == 20
    assert all(torch.equal(before[name], tensor) for name, tensor in dense.state.items())


def taken_inputs(dense):
    return next(training_batches(dense, SCENES, Training(batch_size=4), 5, 0)).inputs


@pytest.mark.parametrize(("steps", "share", "done"), [(1, 0.0, 0), (3, 1.0, 2), (25, 0.5, 12)])
def test_tuning_takes_the_steps_that_are_left(dense, steps, share, done):
    """Also one step, and also where the stages ended a step early; none of them at rate zero."""
    training = Training(steps=steps, batch_size=2, lr=1e-3, stage_share=share)
    trainer = Trainer(dense, training, 0.5, partial(training_batches, dense, SCENES, training, 0))
    trainer.done = done
    tuned = trainer.tune(QUIET, lambda: None)
    assert trainer.done == steps
    assert not torch.equal(tuned.state_dict()["itm_head.weight"], dense.state["itm_head.weight"])


def test_a_loss_that_is_no_number_is_an_error(dense):
    training = Training(steps=10, batch_size=4, lr=1e30)
    trainer = Trainer(dense, training, 0.5, partial(training_batches, dense, SCENES, training, 0))
    with pytest.raises(CompError, match="the loss is") as caught:
        trainer.tune(QUIET, lambda: None)
    assert "smaller --lr" in caught.value.hint


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--epochs", 1], "--epochs needs --data"),
        (["--epochs", 1, "--steps", 1], "give one of them"),
        (["--steps", 1, "--stage-share", 2], "from 0 to 1"),
        (["--steps", 1, "--lr", 3], "--lr 3.0"),
        (["--steps", 1, "--mixed-precision", "int3"], "int3"),
        (["--no-cit"], "--no-cit changes nothing"),
        (["--stage-share", 0.5], "are for training"),
        (["--lr", 0.1], "are for training"),
        (["--epochs", 0], "--epochs 0"),
        (["--num-samples", 4, "--stage-samples", 8], "not more"),
        (["--no-history", "--method", "wanda"], "for --method comp-paper"),
        (["--no-explore"], "for --method comp-paper"),
        (["--stages", 4], "--method comp has none"),
        (["--stages", 4, "--method", "joint"], "--method joint has none"),
        (["--steps", 4, "--stage-share", 0.5], "--method comp has no stages"),
        (["--no-cip", "--method", "wanda"], "--no-cip changes nothing"),
        (["--no-sequential", "--no-recover"], "--no-sequential changes nothing"),
    ],
)
def test_settings_that_make_no_sense(tiny_folder, tmp_path, wrong, said):
    result = run("prune", tiny_folder, "--ratio", 0.5, "-o", tmp_path / "c", *wrong)
    assert result.exit_code == 2 and said in result.stderr and not (tmp_path / "c").exists()


def test_epochs_are_steps(tiny_folder, tmp_path):
    """Two passes over nine pairs, some of which evaluation keeps for itself, in batches of two."""
    from PIL import Image

    rows = []
    for number in range(9):
        Image.new("RGB", (48, 48), (20 * number, 80, 10)).save(tmp_path / f"{number}.png")
        rows.append(json.dumps({"image": f"{number}.png", "text": "a red circle", "match": number % 2}))
    (tmp_path / "pairs.jsonl").write_text("\n".join(rows))
    train = ["--epochs", "2", "--train-batch-size", "2", "--lr", "1e-3", "--data", tmp_path / "pairs.jsonl", "--device", "cpu"]
    given = ["prune", tiny_folder, "--ratio", 0.4, "--method", "joint", "-o", tmp_path / "compact", *SIZES, *train, "--json"]
    result = run(*given)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    counted = document["quality"]["samples"]
    assert 1 <= counted <= 8 and document["options"]["training"]["steps"] == math.ceil(2 * (9 - counted) / 2)


def test_cit_changes_what_is_learnt_while_heads_fade(dense, uneven_plan, inputs):
    """The ablation reaches the training: where a layer loses heads and tokens, other tokens stay, so other weights come out."""
    training = Training(steps=4, batch_size=4, lr=1e-3, stage_share=1.0)
    calibration = Calibration(dense, [Batch(inputs, None)], None, "cip")
    calibration.measure(dense.plan)
    states = []
    for cit in (True, False):
        trainer = Trainer(dense, training, 0.5, partial(training_batches, dense, SCENES, training, 0), cit=cit)
        trainer.measure(calibration, uneven_plan)
        states.append(trainer.state)
    assert any(not torch.equal(states[0][name], states[1][name]) for name in states[0])
