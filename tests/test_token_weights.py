"""Image tokens that stand for several: in attention a token of weight n is as if it were there n times. Against a stock decoder
in which it is."""

import pytest
import torch
from vlm_models import FAMILIES, PROMPTS, SUPPRESSED, batch, compact, sample, stock
from vlm_reference import best

from comp_cli.runtime.token_rules import STAGE_RULES, View

KEEP = 5
COVER = [{"layer": 0, "rule": "cover", "keep": KEEP, "settings": {}}]
TWICE = [*COVER, {"layer": 2, "rule": "cover", "keep": 2, "settings": {}}]


def covered(states, weights, keep):
    """Kept tokens, their states and weights, in loops: (k,), (k, dim), (k,)."""
    n = len(states)
    like = [[float(torch.cosine_similarity(a, b, dim=0)) for b in states] for a in states]
    chosen, cover = [], [-1.0] * n
    while len(chosen) < keep:
        gains = {i: sum(weights[j] * max(0.0, like[i][j] - cover[j]) for j in range(n)) for i in range(n) if i not in chosen}
        top = max(gains.values())
        pick = max(gains, key=lambda i: (round(2**8 * gains[i] / top), -i))  # two that are alike cover one another equally
        chosen.append(pick)
        cover = [max(have, like[pick][j]) for j, have in enumerate(cover)]
    chosen.sort()
    groups = {i: [] for i in chosen}
    for j in range(n):
        groups[j if j in groups else max(chosen, key=lambda i: (like[i][j], -i))].append(j)
    total = [sum(weights[j] for j in groups[i]) for i in chosen]
    means = [sum(weights[j] * states[j] for j in groups[i]) / w for i, w in zip(chosen, total, strict=True)]
    return chosen, torch.stack(means), total


@torch.no_grad()
def repeated(given, extra=()):
    """Logits of every token that is left of a LLaVA prompt, and of `extra` behind it, by a stock decoder that reads every image
    token as often as it counts, all at one position."""
    model = stock("llava")
    states = model.get_input_embeddings()(torch.tensor([*given.ids, *extra])).clone()
    copies, left = [1] * len(states), list(range(len(states)))
    for image, picture in zip(given.images, given.pictures, strict=True):
        features = model.model.get_image_features(**picture.inputs).pooler_output[0]
        chosen, means, total = covered(features, [1.0] * len(features), KEEP)
        for place in image:
            left.remove(place)
        for place, mean, weight in zip(chosen, means, total, strict=True):
            states[image[place]], copies[image[place]] = mean, int(weight)
            left.append(image[place])
    place = torch.tensor([token for token in sorted(left) for _ in range(copies[token])])
    sees = torch.zeros(1, 1, len(place), len(place)).masked_fill(place[None] > place[:, None], -torch.inf)
    text = model.model.language_model
    found = text(inputs_embeds=states[place][None], attention_mask=sees, position_ids=place[None], use_cache=False)
    logits = model.lm_head(found.last_hidden_state[0])
    return {int(token): logits[(place == token).nonzero()[0, 0]] for token in place}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_token_counts_as_often_as_it_stands_for(attention, side):
    inputs = batch("llava", [sample("llava", prompt) for prompt in PROMPTS], side)
    with torch.no_grad():
        logits = compact("llava", COVER, attention)(**inputs).logits
    for row, mask, prompt in zip(logits, inputs["attention_mask"], PROMPTS, strict=True):
        for token, expected in repeated(sample("llava", prompt)).items():
            torch.testing.assert_close(row[mask.bool()][token], expected, atol=1e-3, rtol=1e-3)


def test_weights_change_what_is_said():
    """The same tokens without their number say something else: it is the number that the tests above see."""
    given = sample("llava", "one")
    model, plain = compact("llava", COVER), compact("llava", COVER)
    rule = STAGE_RULES["cover"].choose

    def unweighted(view, keep):
        choice = rule(view, keep)
        choice.weights = None
        return choice

    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        with_weights = model(**given.inputs).logits[0, -1]
        patch.setitem(STAGE_RULES, "cover", type(STAGE_RULES["cover"])(unweighted))
        without = plain(**given.inputs).logits[0, -1]
    assert (with_weights - without).abs().max() > 0.05


@pytest.mark.parametrize("cache", [None, "static"])
def test_it_goes_on_counting_while_a_text_is_written(cache):
    """Tokens of a batch with padding, each against the whole prompt read again with all that was written."""
    prompts = [prompt for prompt in PROMPTS if prompt != "none"]
    inputs = batch("llava", [sample("llava", prompt) for prompt in prompts])
    written = compact("llava", COVER).generate(
        **inputs, max_new_tokens=6, do_sample=False, suppress_tokens=SUPPRESSED, cache_implementation=cache
    )
    for row, prompt in zip(written[:, inputs["input_ids"].shape[1] :].tolist(), prompts, strict=True):
        given = sample("llava", prompt)
        for count, token in enumerate(row):
            logits = repeated(given, row[:count])
            assert token == best(logits[len(given.ids) + count - 1], SUPPRESSED)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "paligemma"])
@pytest.mark.parametrize("stages", [COVER, TWICE])
def test_steps_samples_and_beams_agree(name, stages):
    """With and without a cache, alone and in a batch, with beams that change places."""
    prompts = [prompt for prompt in PROMPTS if prompt != "none"][:2]
    inputs = batch(name, [sample(name, prompt) for prompt in prompts])
    stages = [stage | {"keep": 3 - number} for number, stage in enumerate(stages)]
    model = compact(name, stages)
    how = {"max_new_tokens": 5, "do_sample": False, "suppress_tokens": SUPPRESSED}
    width = inputs["input_ids"].shape[1]
    cached = model.generate(**inputs, **how)
    assert torch.equal(cached, model.generate(**inputs, **how, use_cache=False))
    beams = model.generate(**inputs, **how, num_beams=3)
    for number, prompt in enumerate(prompts):
        alone = sample(name, prompt).inputs
        length = alone["input_ids"].shape[1]
        assert model.generate(**alone, **how)[0, length:].tolist() == cached[number, width:].tolist()
        assert model.generate(**alone, **how, num_beams=3)[0, length:].tolist() == beams[number, width:].tolist()


def test_flash_attention_is_refused_which_takes_no_weights(monkeypatch):
    from comp_cli.runtime.token_selection import Selection, layer_mask

    selection = Selection(4, left=[4], index=torch.arange(4)[None], bias=torch.tensor([[0.0, 1.0, 0.0, 0.0]]))
    with pytest.raises(ValueError, match="flash attention takes no weights"):
        layer_mask(torch.ones(1, 4), torch.zeros(1, 4, 2), selection, None)


# The rule


def test_weights_of_an_earlier_stage_count():
    """Three tokens at right angles or between: the heaviest is chosen, and the weights of the others become its own."""
    states = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.7, 0.7]]])
    seen = View(torch.ones(1, 3, dtype=torch.bool), states, torch.arange(3)[None])
    alone = STAGE_RULES["cover"].choose(seen, [1])
    assert alone.kept.tolist() == [[False, False, True]] and alone.weights[0, 2] == 3
    torch.testing.assert_close(alone.states[0, 2], states[0].mean(0))
    seen.weights = torch.tensor([[1.0, 10.0, 1.0]])
    heavy = STAGE_RULES["cover"].choose(seen, [1])
    assert heavy.kept.tolist() == [[False, True, False]] and heavy.weights[0, 1] == 12
    torch.testing.assert_close(heavy.states[0, 1], torch.tensor([1.7, 10.7]) / 12)


def test_it_covers_as_loops_say():
    generator = torch.Generator().manual_seed(0)
    for n, keep in ((9, 4), (16, 5), (12, 11)):
        states, weights = torch.randn(n, 6, generator=generator), torch.randint(1, 5, (n,), generator=generator).float()
        seen = View(torch.ones(1, n, dtype=torch.bool), states[None], torch.arange(n)[None], weights=weights[None])
        choice = STAGE_RULES["cover"].choose(seen, [keep])
        chosen, means, total = covered(states, weights.tolist(), keep)
        assert choice.kept[0].nonzero()[:, 0].tolist() == chosen
        torch.testing.assert_close(choice.states[0, chosen], means)
        assert choice.weights[0, chosen].tolist() == pytest.approx(total)
