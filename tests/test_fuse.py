"""Image tokens of CLIP that go and stay as one: the whole tower, written out with stock weights."""

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
