"""Texts of models that image tokens leave, in every way in which `generate` writes them, against the masked reference."""

import functools

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import StaticLayer
from vlm_models import CASES, FAMILIES, STAGES, SUPPRESSED, batch, class_scores, compact, sample, stock
from vlm_reference import Reference, beams, best, greedy

STEPS = 5
PROMPTS = ("one", "three", "none", "two")  # in one batch: images of several sizes, several of them, none
KEY_NORM = [case for case in CASES if case[1] == "key-norm"]
LONG = [pytest.param(*case, marks=() if case[1] == "key-norm" or case[0] == "llava" else pytest.mark.slow) for case in CASES]
each = pytest.mark.parametrize(("name", "rule"), CASES)
each_family = pytest.mark.parametrize(("name", "rule"), KEY_NORM)
each_slowly = pytest.mark.parametrize(("name", "rule"), LONG)


@functools.cache
def pruned(name, rule):
    return compact(name, STAGES[rule])


def read(name, rule, prompt):
    """A reference that has read a prompt, and the logits behind it."""
    given = sample(name, prompt)
    reference = Reference(stock(name), FAMILIES[name].image_tokens["text"], STAGES[rule])
    tower = class_scores(name, stock(name), given) if rule == "cls-clusters" else ()
    return reference, reference.read(given, tower)[-1]


@functools.cache
def expected(name, rule, prompt, steps=STEPS):
    """Tokens and logits of the reference, greedily."""
    return greedy(*read(name, rule, prompt), steps, SUPPRESSED)


def write(model, inputs, **options):
    given = {key: value.clone() for key, value in inputs.items()}  # generate() writes into what it is given
    common = {"max_new_tokens": STEPS, "do_sample": False, "suppress_tokens": SUPPRESSED}
    return model.generate(**given, **common | options, output_logits=True, return_dict_in_generate=True)


def new(found, inputs):
    """The tokens behind the prompts."""
    return found.sequences[:, inputs["input_ids"].shape[1] :].tolist()


def same_logits(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


def same(found, inputs, name, rule, prompts=PROMPTS):
    for i, prompt in enumerate(prompts):
        tokens, logits = expected(name, rule, prompt)
        assert new(found, inputs)[i] == tokens, prompt
        same_logits(torch.stack([step[i] for step in found.logits]), logits)


@each
def test_a_batch_writes_what_its_samples_write_alone_with_every_token_masked(name, rule):
    inputs = batch(name, [sample(name, prompt) for prompt in PROMPTS])
    same(write(pruned(name, rule), inputs), inputs, name, rule)


@each_family
def test_one_sample_without_a_mask_writes_the_same(name, rule):
    inputs = sample(name, "two").inputs
    same(write(pruned(name, rule), inputs), inputs, name, rule, ["two"])


@each
def test_without_a_cache_the_same_is_written(name, rule):
    inputs = batch(name, [sample(name, prompt) for prompt in PROMPTS])
    same(write(pruned(name, rule), inputs, use_cache=False), inputs, name, rule)


@each_slowly
@pytest.mark.parametrize("prompts", [PROMPTS, ("three",)])
def test_a_static_cache_changes_nothing(name, rule, prompts):
    """Alone there is no padding, and no mask of it."""
    inputs = batch(name, [sample(name, prompt) for prompt in prompts])
    options = {"cache_implementation": "static", "disable_compile": True}
    for _ in range(2):  # the second time in the cache of the first, which is kept
        same(write(pruned(name, rule), inputs, **options), inputs, name, rule, prompts)


@each_slowly
def test_a_second_question_on_the_same_cache(name, rule):
    """The images are not given again."""
    inputs = batch(name, [sample(name, prompt) for prompt in PROMPTS])
    model, question = pruned(name, rule), [33, 34, 35]
    first = write(model, inputs)
    ids = torch.cat([first.sequences, torch.tensor([question] * len(PROMPTS))], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(len(PROMPTS), STEPS + len(question), dtype=torch.long)], 1)
    second = write(model, {"input_ids": ids, "attention_mask": mask}, past_key_values=first.past_key_values)
    for i, prompt in enumerate(PROMPTS):
        reference, logits = read(name, rule, prompt)
        tokens, _ = greedy(reference, logits, STEPS, SUPPRESSED)
        tokens, logits = greedy(reference, reference.write(question)[-1], STEPS, SUPPRESSED)
        assert second.sequences[i, ids.shape[1] :].tolist() == tokens, prompt
        same_logits(torch.stack([step[i] for step in second.logits]), logits)


@each_slowly
def test_beams_are_those_of_a_search_by_hand(name, rule):
    prompts = ("one", "two")
    inputs = batch(name, [sample(name, prompt) for prompt in prompts])
    found = new(write(pruned(name, rule), inputs, num_beams=3), inputs)
    assert found == [beams(*read(name, rule, prompt), STEPS, SUPPRESSED, 3) for prompt in prompts]


@each_slowly
def test_sampled_texts_come_from_the_logits_of_the_reference(name, rule):
    inputs = batch(name, [sample(name, prompt) for prompt in PROMPTS])
    torch.manual_seed(0)
    found = write(pruned(name, rule), inputs, do_sample=True, top_k=0, temperature=4.0, num_return_sequences=2)
    tokens = new(found, inputs)
    assert len({tuple(row) for row in tokens}) == 8
    for i, row in enumerate(tokens):
        reference, logits = read(name, rule, PROMPTS[i // 2])
        wanted = torch.cat([logits[None], reference.write(row[:-1])])
        same_logits(torch.stack([step[i] for step in found.logits]), wanted)


@each_family
def test_a_seed_samples_the_same_with_a_cache_and_without(name, rule):
    inputs = batch(name, [sample(name, prompt) for prompt in PROMPTS])
    found = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        found.append(new(write(pruned(name, rule), inputs, do_sample=True, top_k=0, use_cache=use_cache), inputs))
    assert found[0] == found[1]


@each_slowly
def test_prompt_lookup_writes_what_greedy_writes(name, rule):
    """Several tokens are read at once and some of them forgotten again."""
    inputs = sample(name, "three").inputs
    found = write(pruned(name, rule), inputs, prompt_lookup_num_tokens=3, max_matching_ngram_size=1, max_new_tokens=3 * STEPS)
    assert new(found, inputs)[0] == expected(name, rule, "three", 3 * STEPS)[0]


@each_slowly
@pytest.mark.parametrize("assistant", ["the dense model", "itself"])
def test_assisted_by_another_model_it_writes_what_greedy_writes(name, rule, assistant):
    inputs = sample(name, "two").inputs
    helper = stock(name) if assistant == "the dense model" else compact(name, STAGES[rule])
    found = write(pruned(name, rule), inputs, assistant_model=helper)
    assert new(found, inputs)[0] == expected(name, rule, "two")[0]


@each_family
def test_two_answers_of_one_prompt_do_not_share_a_cache(name, rule):
    """Rows of a cache are repeated, reordered and left out."""
    inputs = batch(name, [sample(name, prompt) for prompt in ("one", "two")])
    model = pruned(name, rule)
    given = {key: value.clone() for key, value in inputs.items()}
    with torch.no_grad():
        cache = model(**given, use_cache=True).past_key_values
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 1, 3]))
    mask = inputs["attention_mask"][[1, 1, 0]]
    references = [read(name, rule, prompt)[0] for prompt in ("two", "two", "one")]
    positions = {}  # of Qwen, which makes none for padded prompts in steps by hand
    if references[0].deltas is not None:
        behind = mask.sum(1, keepdim=True) + torch.arange(2) + torch.cat([reference.deltas for reference in references])
        positions = {"position_ids": behind.expand(3, -1, -1)}
    with torch.no_grad():
        logits = model(
            input_ids=torch.tensor([[40, 41], [42, 43], [44, 45]]),
            attention_mask=torch.cat([mask, mask.new_ones(3, 2)], 1),
            past_key_values=cache,
            **positions,
        ).logits
    for i, (reference, tokens) in enumerate(zip(references, ([40, 41], [42, 43], [44, 45]), strict=True)):
        same_logits(logits[i], reference.write(tokens))


@each_family
def test_steps_by_hand_write_what_generate_writes(name, rule):
    """Without positions, mask or a cache made before."""
    tokens, _ = expected(name, rule, "one")
    model = pruned(name, rule)
    with torch.no_grad():
        out = model(**sample(name, "one").inputs, use_cache=True)
        found = [best(out.logits[0, -1], SUPPRESSED)]
        while len(found) < STEPS:
            out = model(input_ids=torch.tensor([found[-1:]]), past_key_values=out.past_key_values, use_cache=True)
            found.append(best(out.logits[0, -1], SUPPRESSED))
    assert found == tokens


@each
def test_a_cache_holds_less_and_counts_what_it_has_seen(name, rule):
    given = sample(name, "two")
    reference, _ = read(name, rule, "two")
    with torch.no_grad():
        cache = pruned(name, rule)(**given.inputs, use_cache=True).past_key_values
    left = [int((~gone).sum()) for gone in reference.gone]
    assert left[-1] < left[0] <= len(given.ids)
    assert [layer.keys.shape for layer in cache.layers] == [(1, 2, count, 12) for count in left]
    assert [layer.values.untyped_storage().nbytes() for layer in cache.layers] == [2 * count * 12 * 4 for count in left]
    assert {int(cache.get_seq_length(i)) for i in range(len(left))} == {len(given.ids)}


@each_family
def test_a_cache_can_forget_the_last_words_of_a_prompt(name, rule):
    tokens = [50, 51, 52]
    reference, _ = read(name, rule, "one")
    model = pruned(name, rule)
    with torch.no_grad():
        cache = model(**sample(name, "one").inputs, use_cache=True).past_key_values
        for count in (2, 0, 1):
            cache.crop(-count)
            reference.forget(count)
            logits = model(input_ids=torch.tensor([tokens]), past_key_values=cache, use_cache=True).logits[0]
            same_logits(logits, reference.after(tokens))
            cache.crop(-len(tokens))
    assert int(cache.get_seq_length()) == len(sample(name, "one").ids) - 3


@pytest.mark.skipif(not StaticLayer.is_croppable, reason="static caches forget nothing before transformers 5.24")
@each_family
def test_a_static_cache_forgets_guesses_that_were_wrong(name, rule):
    inputs = sample(name, "three").inputs
    options = {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1, "max_new_tokens": 3 * STEPS}
    cache = StaticCache(config=pruned(name, rule).config, max_cache_len=400)
    found = write(pruned(name, rule), inputs, **options, past_key_values=cache, disable_compile=True)
    assert new(found, inputs)[0] == expected(name, rule, "three", 3 * STEPS)[0]


@each_family
def test_a_cache_cannot_forget_a_part_of_an_image(name, rule):
    with torch.no_grad():
        cache = pruned(name, rule)(**sample(name, "one").inputs, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="crop"):
        cache.crop(-9)


@pytest.mark.parametrize(("name", "rule"), [case for case in CASES if case[0] != "paligemma"])
def test_another_image_in_a_second_turn(name, rule):
    """Each turn's images are ranked by what was said by then. (PaliGemma has one turn.)"""
    first, second = sample(name, "one"), sample(name, "two")
    model, family = pruned(name, rule), FAMILIES[name]
    tower = class_scores(name, stock(name), second) if rule == "cls-clusters" else ()
    reference, _ = read(name, rule, "one")
    positions = {}
    if "image_grid_thw" in first.inputs:
        ids = torch.cat([first.inputs["input_ids"], second.inputs["input_ids"]], 1)
        grids = torch.cat([first.inputs["image_grid_thw"], second.inputs["image_grid_thw"]])
        types = family.types(ids, ids)["mm_token_type_ids"]
        places, _ = stock(name).model.get_rope_index(ids, mm_token_type_ids=types, image_grid_thw=grids)
        positions = {"position_ids": places[:, :, len(first.ids) :]}
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(**first.inputs, past_key_values=cache, use_cache=True)
        logits = model(**second.inputs, past_key_values=cache, use_cache=True, **positions).logits[0, -1]
    same_logits(logits, reference.read(second, tower, **positions)[-1])
    assert int(cache.get_seq_length()) == len(first.ids) + len(second.ids)


@pytest.mark.parametrize("name", ["llava", "llava_next", "llava_onevision", "internvl", "smolvlm"])
def test_generate_takes_another_image_in_a_second_turn(name):
    """Ranked by the question of that turn. Only the new image is given."""
    rule, second = "last-attention", sample(name, "two")
    model, inputs = pruned(name, rule), sample(name, "one").inputs
    first = write(model, inputs)
    reference, logits = read(name, rule, "one")
    tokens, _ = greedy(reference, logits, STEPS, SUPPRESSED)
    given = second.inputs | {"input_ids": torch.cat([first.sequences, second.inputs["input_ids"]], 1)}
    found = write(model, given, past_key_values=first.past_key_values)
    tokens, logits = greedy(reference, reference.read(second)[-1], STEPS, SUPPRESSED)
    assert new(found, given)[0] == tokens
    same_logits(torch.cat(found.logits), logits)
