"""BLIP without its matching head: the model of either task against what the stock class says with and without it."""

import json
from dataclasses import replace

import pytest
import torch
from tiny import WORDS, masked, table, uneven
from transformers import AutoModel, BlipForImageTextRetrieval

from comp_cli import load
from comp_cli.checkpoint.loading import load_model
from comp_cli.cli.output import Output
from comp_cli.commands.prune import prune
from comp_cli.families.blip import BLIP_CONTRASTIVE
from comp_cli.measure.variants import on_own_kernels
from comp_cli.models.dense import open_dense
from comp_cli.options import DataOptions, PruneOptions

QUIET = Output("quiet")


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


def scores(model, inputs, **asked):
    """What the stock forward says, also of a model that comp reads as a dual encoder."""
    with torch.inference_mode():
        return BlipForImageTextRetrieval.forward(model, **inputs, **asked).itm_score


@pytest.fixture(scope="module")
def contrastive(tiny_folder):
    return open_dense(str(tiny_folder), QUIET, text_tokens=12, task="retrieval")


@pytest.fixture(scope="module")
def retriever(tiny_folder, tmp_path_factory):
    """The tiny model, compact for retrieval."""
    place = tmp_path_factory.mktemp("retriever")
    data = DataOptions(table(place, caption=lambda number: " ".join(WORDS[number:])))
    sizes = {"num_samples": 8, "eval_samples": 8, "text_tokens": 12, "data": data}
    prune(
        PruneOptions(str(tiny_folder), 0.7, task="retrieval", method="joint", device="cpu", **sizes), place / "compact", QUIET
    )
    return place / "compact"


def test_the_halves_say_what_the_stock_class_says(tiny_folder, stock, inputs):
    model = load_model(tiny_folder, family=BLIP_CONTRASTIVE)
    cosines = scores(stock, inputs, use_itm_head=False)
    with torch.inference_mode():
        found = model(**inputs)
        one = model(**inputs | {"pixel_values": inputs["pixel_values"][:1]})
    same(found.logits_per_image, cosines / 0.07)
    same(found.logits_per_text, found.logits_per_image.T)
    same(found.image_embeds @ found.text_embeds.T * model.logit_scale.exp(), found.logits_per_image)
    same(one.logits_per_image, found.logits_per_image[:1])


def test_nothing_pruned_answers_both_ways(stock, inputs):
    for own in (on_own_kernels(stock), on_own_kernels(stock, BLIP_CONTRASTIVE)):
        for head in (True, False):
            same(scores(own, inputs, use_itm_head=head), scores(stock, inputs, use_itm_head=head))


@pytest.mark.parametrize("task", ["itm", "retrieval"])
def test_pruned_for_one_task_it_answers_the_other(task, dense, contrastive, inputs):
    """As does the dense model, masked, with the same tokens dropped."""
    described = dense if task == "itm" else contrastive
    plan = uneven(described.plan)
    model, expected = described.runtime(plan), masked(described, plan)
    for head in (True, False):
        same(scores(model, inputs, use_itm_head=head), scores(expected, inputs, use_itm_head=head))


def test_the_first_token_of_a_text_is_read_whatever_it_was_pruned_for(dense, stock, inputs):
    tower = dense.plan.tower("language")
    last = tower.layers[-1].handing_on("language", 2)
    model = dense.runtime(dense.plan.with_tower(replace(tower, layers=(*tower.layers[:-1], last))))
    same(scores(model, inputs, use_itm_head=False), scores(stock, inputs, use_itm_head=False))


def test_a_model_for_matching_loads_and_retrieves(compact_folder, inputs):
    outside = AutoModel.from_pretrained(compact_folder, trust_remote_code=True).eval()
    same(scores(load(compact_folder), inputs, use_itm_head=False), outside(**inputs, use_itm_head=False).itm_score)


def test_a_model_for_retrieval_loads_and_matches(retriever, inputs):
    """Through its own class, as people have it; comp's runtime reads the same folder as a dual encoder."""
    outside = AutoModel.from_pretrained(retriever, trust_remote_code=True).eval()
    with torch.inference_mode():
        same(
            outside(**inputs, use_itm_head=False).itm_score / 0.07, load_model(retriever, family=BLIP_CONTRASTIVE)(**inputs)[0]
        )
        matched = outside(**inputs).itm_score
    assert matched.shape == (3, 2) and torch.isfinite(matched).all()
    same(load(retriever)(**inputs).itm_score, matched)


def test_a_model_for_retrieval_is_saved_again(retriever, inputs, tmp_path):
    model = load(retriever)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.config.comp["task"] == "retrieval"
    for head in (True, False):
        same(scores(again, inputs, use_itm_head=head), scores(model, inputs, use_itm_head=head))


def test_what_retrieval_does_not_run_is_left_alone(retriever, stock):
    report, state = json.loads((retriever / "comp_report.json").read_text()), load(retriever).state_dict()
    assert {"recall@1", "image to text recall@10", "text to image recall@10"} <= report["quality"]["metrics"].keys()
    left = [name for name in state if "crossattention" in name or name.startswith("itm_head")]
    assert left and all(torch.equal(state[name], stock.state_dict()[name]) for name in left)
    card = (retriever / "README.md").read_text()
    assert "--task retrieval" in card and "use_itm_head=False" in card


def test_zero_shot(tiny_folder, tmp_path):
    data = DataOptions(table(tmp_path, label=lambda number: WORDS[number % 3]), text_column="label")
    sizes = {"num_samples": 8, "eval_samples": 8, "text_tokens": 12, "data": data}
    options = PruneOptions(str(tiny_folder), 0.5, task="zero-shot", method="joint", device="cpu", **sizes)
    report = prune(options, tmp_path / "compact", QUIET)
    assert report.task == "zero-shot" and "top-5 accuracy" in report.quality.metrics
