"""Models that image tokens leave, one forward pass at a time, against the masked reference; and what is refused."""

import copy
import importlib.util
import math

import pytest
import torch
from torch.nn import functional as F
from transformers import Cache, DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from vlm_models import (
    CASES,
    FAMILIES,
    LAYERS,
    PROMPTS,
    STAGES,
    SUPPRESSED,
    Sample,
    batch,
    class_scores,
    compact,
    film,
    randomised,
    sample,
    stock,
)
from vlm_reference import Reference, greedy, naive_llava, stay

each = pytest.mark.parametrize(("name", "rule"), CASES)
each_family = pytest.mark.parametrize("name", FAMILIES)
TAIL = [
    {"layer": 0, "rule": "tail", "keep": 6, "settings": {}},
    {"layer": 2, "rule": "doubled-tail", "keep": 2, "settings": {}},
]


def key_norm(*stages):
    """Stages of (layer, keep)."""
    return [{"layer": layer, "rule": "key-norm", "keep": keep, "settings": {}} for layer, keep in stages]


def read(name, stages, prompt):
    """A reference that has read a prompt, and its logits (n, vocabulary)."""
    given = sample(name, prompt)
    reference = Reference(stock(name), FAMILIES[name].image_tokens["text"], stages)
    tower = class_scores(name, stock(name), given) if any(stage["rule"] == "cls-clusters" for stage in stages) else ()
    return reference, reference.read(given, tower)


def same(found, expected, atol=1e-3):
    torch.testing.assert_close(found, expected, atol=atol, rtol=1e-3)


def same_rows(logits, mask, name, stages, prompts):
    """Of a batch, at every token that goes through the last layer."""
    for i, prompt in enumerate(prompts):
        reference, expected = read(name, stages, prompt)
        left = ~reference.gone[-1]
        same(logits[i][mask[i].bool()][left], expected[left])


@torch.no_grad()
def run(model, inputs, **options):
    return model(**{key: value.clone() for key, value in inputs.items()}, **options)


# The reference itself


@each_family
def test_the_reference_without_stages_is_the_stock_model_and_with_stages_another(name):
    for prompt in PROMPTS:
        dense = run(stock(name), sample(name, prompt).inputs).logits[0]
        assert torch.equal(read(name, [], prompt)[1], dense)
        for rule in STAGES:
            if (name, rule) in CASES:
                assert ((read(name, STAGES[rule], prompt)[1] - dense)[-1].abs().max() > 0.3) == (prompt != "none")


@pytest.mark.parametrize("rule", STAGES)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_reference_is_a_decoder_without_transformers(rule, prompt):
    given, stages = sample("llava", prompt), STAGES[rule]
    if rule == "cls-clusters":  # the naive decoder has one rule a run
        stages = stages[:1]
    reference, expected = read("llava", stages, prompt)
    naive = naive_llava(stock("llava"), given, stages, class_scores("llava", stock("llava"), given))
    left = ~reference.gone[-1]
    same(naive[left], expected[left])


# Forward passes


@each
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_is_its_samples_alone(name, rule, attention, side):
    """Images of several sizes, several of them in a sample, and none."""
    inputs = batch(name, [sample(name, prompt) for prompt in PROMPTS], side)
    logits = run(compact(name, STAGES[rule], attention), inputs).logits
    assert logits.shape == (*inputs["input_ids"].shape, 100)
    same_rows(logits, inputs["attention_mask"], name, STAGES[rule], PROMPTS)


@each
@pytest.mark.parametrize("use_cache", [True, False])
def test_one_sample_needs_no_attention_mask(name, rule, use_cache):
    """Positions have gaps then, which are not the ends of packed sequences."""
    logits = run(compact(name, STAGES[rule]), sample(name, "two").inputs, use_cache=use_cache).logits
    same_rows(logits, torch.ones(1, logits.shape[1]), name, STAGES[rule], ["two"])


@each
def test_text_without_an_image_is_the_dense_models_to_the_bit(name, rule):
    dense = copy.deepcopy(stock(name))
    dense.set_attn_implementation("sdpa")
    model = compact(name, STAGES[rule])
    texts = [sample(name, prompt) for prompt in ("none", (5, 6, 7))]
    for inputs in (texts[0].inputs, batch(name, texts), batch(name, texts, "right")):
        assert torch.equal(run(model, inputs).logits, run(dense, inputs).logits)


@each_family
def test_images_side_by_side_are_ranked_apart(name):
    prompt = (5, "b", "c", "a", 7, 8)
    logits = run(compact(name, STAGES["key-norm"]), sample(name, prompt).inputs).logits
    same_rows(logits, torch.ones(1, logits.shape[1]), name, STAGES["key-norm"], [prompt])


def test_images_that_are_not_cut_into_tiles():
    """LLaVA-OneVision takes each of several images of a sample whole, if it is told how many they are."""
    name, model = "llava_onevision", compact("llava_onevision", STAGES["key-norm"])
    generator = torch.Generator().manual_seed(3)
    ids = (5, *[90] * 17, 6, *[90] * 17, 7, 8)  # a newline is the last of each
    inputs = {
        "pixel_values": torch.randn(2, 1, 3, 16, 16, generator=generator),
        "image_sizes": torch.tensor([[32, 32], [16, 30]]),
    }
    inputs |= {"input_ids": torch.tensor([ids]), "batch_num_images": torch.tensor([2])}
    given = Sample(ids, (), inputs, (tuple(range(1, 17)), tuple(range(19, 35))), (17, 35))
    reference = Reference(stock(name), FAMILIES[name].image_tokens["text"], STAGES["key-norm"])
    expected, left = reference.read(given), ~reference.gone[-1]
    same(run(model, inputs).logits[0][left], expected[left])


@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("rule", ["key-norm", "last-attention"])
def test_a_video_is_ranked_as_one_image(name, rule):
    given = film(name)
    reference = Reference(stock(name), FAMILIES[name].image_tokens["text"], STAGES[rule])
    expected, left = reference.read(given), ~reference.gone[-1]
    model = compact(name, STAGES[rule])
    same(run(model, given.inputs).logits[0][left], expected[left])
    written = model.generate(**given.inputs, max_new_tokens=4, do_sample=False, suppress_tokens=SUPPRESSED)[0, len(given.ids) :]
    assert written.tolist() == greedy(reference, expected[-1], 4, SUPPRESSED)[0]


@each_family
def test_the_first_and_the_last_token_of_a_prompt_may_be_an_images(name):
    prompt = ("a", 5, 6, "b")
    logits = run(compact(name, key_norm((2, 7))), sample(name, prompt).inputs).logits
    same_rows(logits, torch.ones(1, logits.shape[1]), name, key_norm((2, 7)), [prompt])


@each_family
def test_every_layer_may_have_a_stage(name):
    stages = key_norm((1, 7), (2, 4), (3, 2), (4, 1))
    inputs = batch(name, [sample(name, prompt) for prompt in PROMPTS])
    logits = run(compact(name, stages), inputs).logits
    same_rows(logits, inputs["attention_mask"], name, stages, PROMPTS)


@each
def test_logits_of_the_last_token_alone(name, rule):
    inputs = batch(name, [sample(name, prompt) for prompt in PROMPTS])
    model = compact(name, STAGES[rule])
    same(run(model, inputs, logits_to_keep=1).logits, run(model, inputs).logits[:, -1:])


@pytest.mark.parametrize("name", ["llava", "llava_next", "internvl", "paligemma", "smolvlm"])
def test_embeddings_in_place_of_ids(name):
    """Image tokens are then those whose embedding is the placeholder's."""
    inputs = dict(sample(name, "two").inputs)
    model = compact(name, STAGES["key-norm"])
    inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
    logits = run(model, inputs).logits
    same_rows(logits, torch.ones(1, logits.shape[1]), name, STAGES["key-norm"], ["two"])


def test_a_mask_that_is_whole_already():
    """(batch, 1, queries, keys), as some callers make it themselves."""
    inputs = sample("llava", "two").inputs
    n = inputs["input_ids"].shape[1]
    mask = torch.zeros(1, 1, n, n).masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), torch.finfo(torch.float32).min)
    logits = run(compact("llava", STAGES["key-norm"]), inputs, attention_mask=mask).logits
    same_rows(logits, torch.ones(1, n), "llava", STAGES["key-norm"], ["two"])


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="flash-attn is not installed")
@pytest.mark.gpu
def test_flash_attention_is_the_same():
    inputs = {key: value.cuda() for key, value in sample("llava", "two").inputs.items()}
    found = [
        run(compact("llava", STAGES["key-norm"], kind).half().cuda(), inputs).logits for kind in ("flash_attention_2", "eager")
    ]
    same(found[0][:, -1], found[1][:, -1], atol=0.1)


# What a rule sees and says


def tail(view, keep):
    """The last tokens of each image."""
    from comp_cli.runtime.token_rules import Choice

    order = view.positions.masked_fill(~view.valid, -1).argsort(dim=1, descending=True)
    kept = torch.zeros_like(view.valid).scatter(1, order, torch.arange(order.shape[1]) < torch.tensor(keep)[:, None])
    return Choice(kept & view.valid)


def doubled_tail(view, keep):
    choice = tail(view, keep)
    choice.states = view.states * 2
    return choice


@pytest.fixture
def rules(monkeypatch):
    """The rules of a runtime, to which a test adds its own."""
    from comp_cli.runtime.token_rules import STAGE_RULES, StageRule

    def add(name, choose, *needs):
        monkeypatch.setitem(STAGE_RULES, name, StageRule(choose, frozenset(needs)))

    add("tail", tail)
    add("doubled-tail", doubled_tail)
    return add


@each_family
def test_tokens_leave_before_the_first_layer_and_states_are_replaced(name, rules):
    inputs = batch(name, [sample(name, prompt) for prompt in PROMPTS])
    logits = run(compact(name, TAIL), inputs).logits
    same_rows(logits, inputs["attention_mask"], name, TAIL, PROMPTS)


@each_family
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_rule_sees_what_the_reference_sees(name, side, rules):
    """Before layer 2, when all but the last five tokens of each image have gone before layer 1."""
    views = []

    def probe(view, keep):
        views.append(view)
        return tail(view, keep)

    rules("probe", probe, "keys", "text", "attention", "last")
    stages = [TAIL[0] | {"layer": 1, "keep": 5}, TAIL[0] | {"layer": 2, "keep": 2, "rule": "probe"}]
    run(compact(name, stages), batch(name, [sample(name, prompt) for prompt in PROMPTS], side))
    [view] = views
    row = 0
    for prompt in PROMPTS:
        given = sample(name, prompt)
        attention = stock(name).get_submodule(FAMILIES[name].image_tokens["text"]).layers[1].self_attn
        keys = []
        hook = getattr(attention, "k_norm", attention.k_proj).register_forward_hook(lambda _, args, output: keys.append(output))  # noqa: B023
        reference, _ = read(name, [stages[0], TAIL[0] | {"layer": 2, "keep": 2}], prompt)
        hook.remove()
        text = [i for i in range(len(given.ids)) if i not in given.newlines and not any(i in image for image in given.images)]
        for image in given.images:
            there, places = view.valid[row], list(image[-5:])
            assert int(there.sum()) == 5
            if not given.newlines:
                assert (view.positions[row][there] + image[0]).tolist() == places
            same(view.states[row][there], reference.entered[2][places])
            same(view.keys[row][there], keys[0][0].unflatten(-1, (2, 12))[places] if keys[0].dim() == 3 else keys[0][0][places])
            asked = view.text_valid[row]
            same(view.text_states[row][asked], reference.entered[2][text])
            same(view.text_attention[row][asked][:, there], reference.maps[1][text][:, places], atol=1e-5)
            same(view.last_attention[row][there], reference.maps[1][text[-1], places], atol=1e-5)
            assert {view.text_attention.dtype, view.last_attention.dtype} == {torch.float32}
            row += 1
    assert row == len(view.valid)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.has_class_token])
def test_a_rule_before_the_first_layer_sees_the_tower(name, rules):
    views = []

    def probe(view, keep):
        views.append(view)
        return tail(view, keep)

    rules("probe", probe, "class")
    run(compact(name, [TAIL[0] | {"rule": "probe"}]), batch(name, [sample(name, prompt) for prompt in PROMPTS]))
    [view] = views
    scores = [row for prompt in PROMPTS for row in class_scores(name, stock(name), sample(name, prompt))]
    assert view.class_attention.dtype == torch.float32 and len(scores) == len(view.valid)
    ratios = []
    for found, there, expected in zip(view.class_attention, view.valid, scores, strict=True):
        ratios.append(found[there] / expected)
    ratios = torch.cat(ratios)
    same(ratios, ratios[:1].expand(len(ratios)))  # InternVL's token is of four patches: their sum or their mean
    if name != "internvl":
        same(ratios, torch.ones(len(ratios)))
    if name == "llava":
        tower = stock(name).get_submodule(FAMILIES[name].image_tokens["class_attention"]["module"])
        keys = []
        hook = tower.k_proj.register_forward_hook(lambda _, args, output: keys.append(output[0, 1:]))
        for prompt in PROMPTS:
            for picture in sample(name, prompt).pictures:
                stock(name).model.get_image_features(**picture.inputs)
        hook.remove()
        same(view.tower_keys, torch.stack(keys))


def test_a_tower_that_norms_queries_and_keys(rules):
    """InternViT-6B: what its attention reads is then behind q_norm and k_norm, which are there in every InternVL."""
    views = []

    def probe(view, keep):
        views.append(view)
        return tail(view, keep)

    from comp_cli.runtime.modeling_comp_vlm import make_compact

    rules("probe", probe, "class")
    config = copy.deepcopy(stock("internvl").config)
    config.vision_config.use_qk_norm = True
    model = randomised(type(stock("internvl"))(config))
    model.set_attn_implementation("eager")
    given, tokens = sample("internvl", "two"), copy.deepcopy(FAMILIES["internvl"].image_tokens)
    scores = torch.stack(class_scores("internvl", model, given))
    tokens["class_attention"] |= {"query": "q_norm", "key": "k_norm"}
    make_compact(model, {"towers": [], "image_tokens": tokens, "token_stages": [TAIL[0] | {"rule": "probe"}]})
    run(model, given.inputs)
    same(views[0].class_attention * 4, scores)


def every_rule():
    from comp_cli.runtime.token_rules import STAGE_RULES

    return list(STAGE_RULES)


def stages_of(name, rule):
    """A rule of the runtime, behind clusters where it may not be the first. Skips a test of one that asks for [CLS] in vain."""
    from comp_cli.runtime.token_rules import may_be_first, needs_of

    tower = FAMILIES[name].has_class_token
    settings = {"relevance": "text"} if rule == "tops" and not tower else {}
    if "class" in needs_of(rule, settings) and not tower:
        pytest.skip("no [CLS]")
    first = {"layer": 0, "rule": "cls-clusters" if tower else "diverse-clusters", "keep": 7, "settings": {}}
    stage = {"layer": 2, "rule": rule, "keep": 4, "settings": settings}
    return [stage | {"layer": 0}] if may_be_first(rule, settings) else [first, stage]


@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen3_vl", "smolvlm", "paligemma"])
@pytest.mark.parametrize("rule", every_rule())
def test_no_rule_looks_at_the_samples_beside(name, rule):
    """Every rule of the runtime, behind clusters where it needs them: a batch is its samples alone."""
    stages = stages_of(name, rule)
    model = compact(name, stages)
    inputs = batch(name, [sample(name, prompt) for prompt in PROMPTS])
    logits = run(model, inputs).logits
    for i, prompt in enumerate(PROMPTS):
        alone = run(model, sample(name, prompt).inputs).logits[0]
        same(logits[i, -1], alone[-1])
        assert ((alone - run(stock(name), sample(name, prompt).inputs).logits[0])[-1].abs().max() > 0.05) == (prompt != "none")


@pytest.mark.parametrize("rule", every_rule())
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_no_text_in_a_mask_that_is_whole_already(rule, side):
    """(batch, 1, queries, keys), boolean and additive: what does not see itself is padding."""
    inputs = batch("llava", [sample("llava", prompt) for prompt in PROMPTS], side)
    real = inputs["attention_mask"].bool()
    n = real.shape[1]
    whole = torch.ones(n, n, dtype=torch.bool).tril() & real[:, None, None]
    model = compact("llava", stages_of("llava", rule))
    expected = run(model, inputs).logits[real]
    positions = {"position_ids": torch.arange(n).expand(len(real), -1)}  # which the stock model makes alike for all masks
    same(run(model, inputs | {"attention_mask": whole}, **positions).logits[real], expected)
    additive = torch.zeros(whole.shape).masked_fill(~whole, torch.finfo(torch.float32).min)
    same(run(model, inputs | {"attention_mask": additive}, **positions).logits[real], expected)


@pytest.mark.parametrize("name", ["llava_next", "qwen2_5_vl", "qwen3_vl", "paligemma"])
@pytest.mark.parametrize("rule", every_rule())
def test_a_static_cache_lets_the_same_tokens_leave_by_every_rule(name, rule):
    """`generate` makes the whole mask ahead for such a cache, and a rule that reads the text must not read padding."""
    model = compact(name, stages_of(name, rule))
    inputs = batch(name, [sample(name, prompt) for prompt in ("none", "three", "one")])
    options = {"max_new_tokens": 3, "do_sample": False, "suppress_tokens": SUPPRESSED, "disable_compile": True}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    expected = model.generate(**inputs, **options).logits
    found = model.generate(**inputs, **options, cache_implementation="static").logits
    same(torch.stack(found), torch.stack(expected))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_what_the_tower_says_is_not_rounded_on_its_way_through_generate(kind, rules):
    """`generate` encodes images first, and hands on nothing but features, in half precision here."""
    views = []

    def probe(view, keep):
        views.append(view)
        return tail(view, keep)

    rules("probe", probe, "class")
    model = compact("llava", [TAIL[0] | {"rule": "probe"}]).to(kind)
    inputs = {
        key: value.to(kind) if value.is_floating_point() else value for key, value in sample("llava", "two").inputs.items()
    }
    run(model, inputs)
    model.generate(**inputs, max_new_tokens=1)
    assert torch.equal(views[0].class_attention, views[1].class_attention)
    assert torch.equal(views[0].tower_keys, views[1].tower_keys)
    assert not torch.equal(views[0].class_attention.to(kind).float(), views[0].class_attention)


@pytest.mark.parametrize("name", ["llava_next", "qwen3_vl"])
def test_labels_go_with_their_tokens_to_later_stages(name, rules):
    views = []

    def label(view, keep):
        choice = tail(view, keep)
        choice.labels = view.positions * 10 + 3
        return choice

    def probe(view, keep):
        views.append(view)
        return tail(view, keep)

    rules("label", label)
    rules("probe", probe)
    stages = [
        TAIL[0] | {"layer": layer, "rule": rule, "keep": keep}
        for layer, rule, keep in ((1, "label", 6), (2, "tail", 4), (4, "probe", 1))
    ]
    model = compact(name, stages)
    model.generate(
        **batch(name, [sample(name, prompt) for prompt in PROMPTS]), max_new_tokens=2, num_beams=2, suppress_tokens=[90, 91]
    )
    assert views[0].labels[views[0].valid].tolist() == (views[0].positions * 10 + 3)[views[0].valid].tolist()


# Outputs, caches, state


@each_family
def test_calls_leave_nothing_behind(name):
    """Two conversations in turns, then a text without an image, then a call that fails halfway."""
    model = compact(name, STAGES["key-norm"])
    conversations = []
    for prompt in ("one", "two"):
        reference, _ = read(name, STAGES["key-norm"], prompt)
        conversations.append((reference, run(model, sample(name, prompt).inputs, use_cache=True).past_key_values))
    for reference, cache in conversations:
        if reference.deltas is not None:
            model.model.rope_deltas = reference.deltas
        same(run(model, {"input_ids": torch.tensor([[40, 41]])}, past_key_values=cache).logits[0], reference.write([40, 41]))
    text = sample(name, "none").inputs
    same(run(model, text).logits[0], read(name, [], "none")[1])
    hook = model.get_submodule(FAMILIES[name].image_tokens["text"]).layers[2].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(model, sample(name, "one").inputs)
    hook.remove()
    same(run(model, text).logits[0], read(name, [], "none")[1])


@each
def test_a_copy_is_a_model_of_its_own(name, rule):
    model = compact(name, STAGES[rule])
    twin = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.zero_()
    del model
    logits = run(twin, sample(name, "two").inputs).logits
    same_rows(logits, torch.ones(1, logits.shape[1]), name, STAGES[rule], ["two"])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_hidden_states_and_attentions_are_of_the_tokens_that_are_left(attention):
    """The last hidden states are where they were, zero where a token has gone."""
    name, stages = "llava", STAGES["key-norm"]
    reference, _ = read(name, stages, "two")
    options = {"output_hidden_states": True, "output_attentions": attention == "eager"}
    out = run(compact(name, stages, attention), sample(name, "two").inputs, **options)
    left = [~gone for gone in reference.gone]
    assert len(out.hidden_states) == LAYERS + 1
    for i in range(1, LAYERS):  # what a layer hands on
        same(out.hidden_states[i][0], reference.entered[i][left[i - 1]])
    if attention == "eager":
        for found, there, expected in zip(out.attentions, left, reference.maps, strict=True):
            same(found[0].mean(0), expected[there][:, there], atol=1e-5)
    last = run(compact(name, stages, attention).model, sample(name, "two").inputs).last_hidden_state[0]
    assert ((last != 0).any(-1) == left[-1]).all()


@each_family
def test_weights_keep_their_names(name):
    model = compact(name, STAGES["key-norm"])
    assert list(model.state_dict()) == list(stock(name).state_dict())
    assert isinstance(model, type(stock(name)))


@each_family
def test_a_batch_of_equals_holds_no_filler(name):
    given = sample(name, "two")
    inputs = batch(name, [given, given])
    reference, _ = read(name, STAGES["key-norm"], "two")
    cache = run(compact(name, STAGES["key-norm"]), inputs, use_cache=True).past_key_values
    assert [layer.keys.shape[-2] for layer in cache.layers] == [int((~gone).sum()) for gone in reference.gone]


@each_family
def test_a_mixed_batch_holds_no_more_than_its_longest_sample(name):
    inputs = batch(name, [sample(name, prompt) for prompt in PROMPTS])
    cache = run(compact(name, STAGES["key-norm"]), inputs, use_cache=True).past_key_values
    gone = [read(name, STAGES["key-norm"], prompt)[0].gone for prompt in PROMPTS]
    for i, layer in enumerate(cache.layers):
        most = max(int((~of[i]).sum()) for of in gone)
        assert layer.keys.shape[-2] == (most if i else inputs["input_ids"].shape[1])
        assert int(cache.get_seq_length(i)) == inputs["input_ids"].shape[1]


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_that_is_reset_is_as_new(kind):
    model, inputs = compact("llava", STAGES["key-norm"]), sample("llava", "two").inputs
    n = inputs["input_ids"].shape[1]
    cache = DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(config=model.config, max_cache_len=n)
    run(model, sample("llava", "one").inputs, past_key_values=cache)
    assert int(cache.get_seq_length(4)) == len(sample("llava", "one").ids)
    cache.reset()
    assert int(cache.get_seq_length(4)) == 0
    logits = run(model, inputs, past_key_values=cache).logits
    same_rows(logits, torch.ones(1, n), "llava", STAGES["key-norm"], ["two"])
    reference, _ = read("llava", STAGES["key-norm"], "two")
    assert [layer.keys.shape[-2] for layer in cache.layers] == [int((~gone).sum()) for gone in reference.gone]


# Training


def answers(name, side):
    """A batch with labels at the last words of each prompt."""
    inputs = batch(name, [sample(name, prompt) for prompt in PROMPTS], side)
    labels = torch.full_like(inputs["input_ids"], -100)
    for row, mask in zip(labels, inputs["attention_mask"], strict=True):
        last = mask.nonzero()[:, 0][-1:]  # one word behind another word in every prompt
        row[last] = 60
    return inputs | {"labels": labels}


@each_family
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_is_that_of_the_reference(name, side):
    loss = run(compact(name, STAGES["key-norm"]), answers(name, side)).loss
    rows = [read(name, STAGES["key-norm"], prompt)[1][-2] for prompt in PROMPTS]
    same(loss, F.cross_entropy(torch.stack(rows), torch.full((len(rows),), 60)))


@each_family
def test_an_answer_in_training_does_not_rank_the_images(name):
    """Which are ranked as if the answer were still to be written."""
    stages, inputs = STAGES["last-attention"], answers(name, "right")
    loss = run(compact(name, stages), inputs).loss
    rows = []
    for prompt in PROMPTS:
        given = sample(name, prompt)
        reference = Reference(stock(name), FAMILIES[name].image_tokens["text"], stages)
        rows.append(reference.read(given, asked=len(given.ids) - 1)[-2])
    same(loss, F.cross_entropy(torch.stack(rows), torch.full((len(rows),), 60)))


@each_family
def test_a_word_right_behind_an_image_is_not_learned(name):
    """The image's last token, which would predict it, may be gone."""
    inputs, model = answers(name, "right"), compact(name, STAGES["key-norm"])
    expected = run(model, inputs).loss
    for row, ids in zip(inputs["labels"], inputs["input_ids"], strict=True):
        behind = (ids[:-1] == 90) & (ids[1:] != 90)
        row[1:][behind] = 61
    same(run(model, inputs).loss, expected)


@each_family
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_the_vision_tower(name, checkpointing):
    found = []
    for way in {False, checkpointing}:
        model = compact(name, STAGES["key-norm"]).train().requires_grad_(True)
        if way:
            model.gradient_checkpointing_enable()
        loss = model(**answers(name, "right")).loss
        loss.backward()
        tower = model.get_submodule(FAMILIES[name].image_tokens["features"])
        first = next(parameter for parameter in tower.parameters() if parameter.dim() > 1)
        assert math.isfinite(loss.item()) and first.grad.abs().sum() > 0
        found.append(first.grad)
    same(found[0], found[-1])


# Precision


def test_ranks_are_those_of_fp32_in_a_half_precision_model():
    name = "qwen2_vl"
    model = copy.deepcopy(stock(name)).bfloat16()
    given = sample(name, (5, "large", 6, 7))
    inputs = {key: value.bfloat16() if value.is_floating_point() else value for key, value in given.inputs.items()}
    keys, entered = [], []
    layers = model.model.language_model.layers
    hooks = [
        layers[0].self_attn.k_proj.register_forward_hook(lambda _, args, output: keys.append(output[0].unflatten(-1, (2, 12))))
    ]
    hooks += [layers[1].register_forward_pre_hook(lambda _, args: entered.append(args[0][0]))]
    run(model, inputs)
    for hook in hooks:
        hook.remove()
    [whole] = entered
    fine, rough = -keys[0].float().mean(1).norm(dim=-1), -keys[0].mean(1).norm(dim=-1)
    gone = torch.zeros(len(given.ids), dtype=torch.bool)
    keeps = [
        keep
        for keep in range(1, 100, 9)
        if any(
            set(stay({"keep": keep}, image, fine, gone)) != set(stay({"keep": keep}, image, rough, gone))
            for image in given.images
        )
    ]
    assert keeps, "other sizes: here bf16 ranks as fp32 does"
    for keep in keeps:
        kept = [place for image in given.images for place in stay({"keep": keep}, image, fine, gone)]
        left = [place for place in range(len(given.ids)) if place in kept or not any(place in image for image in given.images)]
        pruned = compact(name, key_norm((1, keep)), "eager").bfloat16()
        entered.clear()
        pruned.model.language_model.layers[1].input_layernorm.register_forward_pre_hook(
            lambda _, args: entered.append(args[0][0])
        )
        run(pruned, inputs)
        assert torch.equal(entered[0], whole[left])


# Refusals


def refused(words, act):
    """It says what is wrong, with these words."""
    with pytest.raises((ValueError, NotImplementedError), match=f"(?is){words}") as raised:
        act()
    assert len(str(raised.value)) > 30


@each_family
def test_an_image_from_which_nothing_is_dropped(name):
    model = compact(name, key_norm((1, 500)))
    refused("drop|leave|stay|keep", lambda: run(model, sample(name, "one").inputs))
    same(run(model, sample(name, "none").inputs).logits[0], read(name, [], "none")[1])


@pytest.mark.parametrize("prompts", [["two"], ["one", "two"], ["two", "none"]])
def test_a_small_image_from_which_nothing_is_dropped_whatever_is_beside_it(prompts):
    """One of 8 tokens and one of 12, alone and beside one of 16."""
    inputs = batch("qwen2_5_vl", [sample("qwen2_5_vl", prompt) for prompt in prompts])
    refused("8 tokens", lambda: run(compact("qwen2_5_vl", key_norm((1, 10))), inputs))


def test_labels_everywhere_where_images_are_ranked_by_what_is_asked():
    """No word is left that asks."""
    inputs = batch("llava", [sample("llava", prompt) for prompt in ("one", "none")])
    labels = inputs["input_ids"].masked_fill((inputs["input_ids"] == 90) | (inputs["attention_mask"] == 0), -100)
    refused("-100", lambda: run(compact("llava", STAGES["last-attention"]), inputs, labels=labels))
    refused("word", lambda: run(compact("llava", STAGES["last-attention"]), sample("llava", ("a",)).inputs))
    assert run(compact("llava", STAGES["key-norm"]), inputs, labels=labels).loss.isfinite()


def test_a_later_stage_at_which_nothing_is_dropped():
    refused("drop|leave|stay|keep", lambda: run(compact("llava", key_norm((1, 4), (3, 4))), sample("llava", "one").inputs))
    more = [*key_norm((1, 4)), {"layer": 3, "rule": "key-norm", "share": 0.9, "settings": {}}]
    refused("4 tokens.*keeps 15", lambda: run(compact("llava", more), sample("llava", "one").inputs))


@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_a_prefill_in_chunks(name):
    """An image would be ranked in parts."""
    model = compact(name, STAGES["key-norm"])
    refused("chunk", lambda: model.generate(**sample(name, "two").inputs, max_new_tokens=3, prefill_chunk_size=8))


def test_sliding_windows():
    model = compact("llava", STAGES["key-norm"])
    cache = DynamicCache(config=model.config)
    cache.layers = [DynamicSlidingWindowLayer(sliding_window=8) for _ in range(LAYERS)]
    refused("sliding", lambda: run(model, sample("llava", "two").inputs, past_key_values=cache))


def test_a_decoder_with_sliding_windows():
    def act():
        model = FAMILIES["llava_next"].make()
        model.config.text_config.sliding_window = 8
        model = type(model)(model.config)
        from comp_cli.runtime.modeling_comp_vlm import make_compact

        tokens = FAMILIES["llava_next"].image_tokens
        make_compact(randomised(model), {"towers": [], "image_tokens": tokens, "token_stages": STAGES["key-norm"]})
        run(model, sample("llava_next", "two").inputs)

    refused("sliding", act)


class Rounded(DynamicLayer):
    """What quantised caches do: another layer of the cache than those that are known."""

    def update(self, key_states, value_states, *args, **kwargs):
        return super().update(key_states.round(), value_states.round(), *args, **kwargs)


def test_caches_of_an_unknown_kind():
    model = compact("llava", STAGES["key-norm"])
    cache = Cache(layers=[Rounded() for _ in range(LAYERS)])
    refused("Rounded", lambda: run(model, sample("llava", "two").inputs, past_key_values=cache))
    refused(
        "Rounded", lambda: run(model, sample("llava", "two").inputs, past_key_values=Cache(layer_class_to_replicate=Rounded))
    )


def test_a_cache_made_where_checkpointing_is_on_counts_what_it_has_seen_or_there_is_none():
    model, inputs = compact("llava", STAGES["key-norm"]).train(), sample("llava", "two").inputs
    model.gradient_checkpointing_enable()
    cache = run(model, inputs, use_cache=True).past_key_values
    assert cache is None or {int(cache.get_seq_length(i)) for i in range(LAYERS)} == {inputs["input_ids"].shape[1]}


def test_two_caches_and_a_class_that_takes_none():
    """transformers 5.24 has another name for the cache, and would leave out the one under the older name."""
    from comp_cli.runtime.kept_cache import cache_name

    decoder = compact("llava", STAGES["key-norm"]).model.language_model
    caches = {"cache": DynamicCache(), "past_key_values": DynamicCache()}
    with pytest.raises(TypeError, match="two caches"):
        decoder(input_ids=torch.tensor([[5, 6]]), **caches)
    refused("takes no cache", lambda: cache_name(torch.nn.Linear(1, 1).forward))


@pytest.mark.parametrize("before", ["ImageFeatures", "DroppingDecoder", "DroppingLayer"])
def test_a_stock_forward_pass_without_what_the_runtime_reads_is_refused(before):
    from comp_cli.runtime import modeling_comp_vlm as runtime

    class Newer(torch.nn.Module):
        def forward(
            self, hidden_states, position_ids=None, position_embeddings=None, mm_encoder_outputs=None, past_key_values=None
        ):
            return hidden_states

    refused("Newer.forward takes no attention_mask", lambda: runtime.mixed(getattr(runtime, before), Newer))


def test_quantised_caches():
    model = compact("llava", STAGES["key-norm"])
    with pytest.raises((ValueError, ImportError, NotImplementedError), match="(?i)quant"):
        model.generate(**sample("llava", "two").inputs, max_new_tokens=3, cache_implementation="quantized")


def test_flex_attention():
    """Its masks are no tensors."""
    model = compact("llava", STAGES["key-norm"])
    model.set_attn_implementation({"text_config": "flex_attention"})
    refused("BlockMask", lambda: run(model, sample("llava", "two").inputs))


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ([{"layer": 1, "rule": "no-such-rule", "keep": 3, "settings": {}}], "no-such-rule"),
        (key_norm((LAYERS, 3)), "layer"),
        (key_norm((-1, 3)), "layer"),
        (key_norm((3, 4), (1, 2)), "order|before|layer"),
        (key_norm((1, 4), (1, 2)), "layer"),
        (key_norm((0, 3)), "key-norm"),
        (key_norm((1, 0)), "keep"),
        ([{"layer": 1, "rule": "key-norm", "settings": {}}], "keep|share"),
        ([{"layer": 1, "rule": "key-norm", "keep": 3, "share": 0.5, "settings": {}}], "keep|share"),
        ([{"layer": 1, "rule": "key-norm", "share": 1.5, "settings": {}}], "share"),
    ],
)
def test_stages_that_cannot_be(stages, words):
    refused(words, lambda: compact("llava", stages))


def test_another_layer_of_the_tower_is_refused_and_nothing_lingers():
    """[CLS] is read in the layer of config.json; the next pass is as ever."""
    model, inputs = compact("llava", STAGES["cls-clusters"]), sample("llava", "one").inputs
    expected = run(model, inputs).logits
    refused("vision_feature_layer", lambda: run(model, inputs, vision_feature_layer=-1))
    assert torch.equal(run(model, inputs).logits, expected)


@pytest.mark.parametrize("name", ["qwen2_vl", "smolvlm", "paligemma", "llava_onevision"])
def test_class_attention_of_a_tower_without_a_class_token(name):
    refused("cls-clusters|class", lambda: run(compact(name, STAGES["cls-clusters"]), sample(name, "one").inputs))
