"""Image tokens of CLIP that go and stay as one: the whole tower, written out with stock weights."""

import copy
from dataclasses import replace

import pytest
import tiny
import torch
from torch.nn import functional as F

from comp_cli.checkpoint.loading import load_model
from comp_cli.cli.output import Output
from comp_cli.models.dense import open_dense

KEEPS = [30, None, 19, 11, None]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tiny.write("clip", tmp_path_factory.mktemp("clip") / "dense")
    return open_dense(str(folder), Output("quiet"), text_tokens=12), load_model(folder)


def by_hand(stock, pixels, weighted):
    """Image embeddings of one image, (1, dim). Every token is a state and the original tokens that it is the mean of."""
    tower = stock.vision_model
    states = tower.pre_layrnorm(tower.embeddings(pixels))[0]
    members = [{place} for place in range(len(states))]
    for layer, keep in zip(tower.encoder.layers, KEEPS, strict=True):
        attention, normed = layer.self_attn, layer.layer_norm1(states)
        query, key, value = (
            getattr(attention, name)(normed).unflatten(-1, (6, 12)).transpose(0, 1) for name in ("q_proj", "k_proj", "v_proj")
        )
        logits = query @ key.transpose(-1, -2) * 12**-0.5
        sizes = torch.tensor([float(len(group)) for group in members])
        shares = (logits + sizes.log() * weighted).softmax(-1)
        states = states + attention.out_proj((shares @ value).transpose(0, 1).flatten(1))
        if keep is not None:
            scores = logits[:, 0].softmax(-1).mean(0)
            ordinary = [i for i in range(1, len(states)) if len(members[i]) == 1]
            best = sorted(sorted(ordinary, key=lambda i: -scores[i])[: keep - 2])
            kept = [0, *best]
            gone = [i for i in range(len(states)) if i not in kept]
            mean = (states[gone] * sizes[gone, None]).sum(0) / sizes[gone].sum()
            states = torch.cat([states[kept], mean[None]])
            members = [members[i] for i in kept] + [set().union(*(members[i] for i in gone))]
        states = states + layer.mlp(layer.layer_norm2(states))
    assert sorted(map(len, members)) == [1] * 10 + [27]  # of 37
    return F.normalize(stock.visual_projection(tower.post_layernorm(states[:1])), dim=-1)


def test_a_tower_that_fuses_is_what_it_is_by_hand(clip):
    dense, stock = clip
    tower = dense.plan.tower("vision")
    layers = tuple(layer.handing_on("vision", keep) for layer, keep in zip(tower.layers, KEEPS, strict=True))
    model = dense.runtime(dense.plan.with_tower(replace(tower, layers=layers)))
    inputs = dense.random_inputs(3, 6)
    with torch.inference_mode():
        found = F.normalize(model(**inputs).image_embeds, dim=-1)
        expected = torch.cat([by_hand(stock, image[None], weighted=1.0) for image in inputs["pixel_values"]])
        unweighted = torch.cat([by_hand(stock, image[None], weighted=0.0) for image in inputs["pixel_values"]])
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    assert (found - unweighted).abs().max() > 1e-3  # the weight is not for nothing


def test_a_layer_that_runs_again_in_the_backward_pass_finds_the_same_tokens(clip):
    """Gradient checkpointing, in a tower where each layer reads what the one before it left; texts drop tokens as well."""
    dense, _ = clip
    plan = tiny.uneven(dense.plan, dense.family)
    model = copy.deepcopy(dense.runtime(plan)).train().requires_grad_(True)
    inputs, found = dense.random_inputs(3, 12, padded=5), []
    for activate in (lambda: None, model.gradient_checkpointing_enable):
        activate()
        model.zero_grad()
        model(**inputs).logits_per_image.square().sum().backward()
        found.append({name: weight.grad for name, weight in model.named_parameters()})
    assert found[0].keys() == found[1].keys() and model.vision_model.encoder.layers[0].gradient_checkpointing
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, atol=1e-6, rtol=1e-5)
