"""The rules by which image tokens leave a decoder: each against numbers worked out by hand, and what holds for all of them."""

import math
import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from comp_cli.runtime.token_rules import (
    STAGE_RULES,
    Choice,
    View,
    divprune,
    grid_of,
    may_be_first,
    needs_of,
    peaks,
    quotas,
    ranked,
    vic,
)

RULES = [(name, {}) for name in STAGE_RULES if name != "tops"] + [
    *(("tops", {"relevance": kind}) for kind in ("class", "text", "last", "attention")),
    ("cluster-merge", {"compat": True}),
]


def view(states, **others):
    """One image; arguments as nested lists, without the first axis."""
    given = {name: torch.tensor(value)[None] for name, value in others.items()}
    states = torch.tensor(states, dtype=torch.float32)[None]
    tokens = states.shape[1]
    return View(torch.ones(1, tokens, dtype=torch.bool), states, torch.arange(tokens)[None], **given)


def by(rule, seen, keep, **settings) -> tuple[list[int], Choice]:
    """Indices of the kept tokens of the only image, and the choice."""
    choice = STAGE_RULES[rule].choose(seen, [keep], **settings)
    return choice.kept[0].nonzero()[:, 0].tolist(), choice


def at_angles(*degrees):
    return [[math.cos(math.radians(angle)), math.sin(math.radians(angle))] for angle in degrees]


def numbers(*values):
    """States that say which token is which: (value, 0)."""
    return [[float(value), 0.0] for value in values]


# Each rule by hand


def test_the_lower_index_stays_where_scores_tie():
    scores = torch.tensor([[1.0, 2, 1, 1, 2]])
    kept = ranked(scores, torch.ones(1, 5, dtype=torch.bool), [3])
    assert kept.tolist() == [[True, True, False, False, True]]
    many = ranked(torch.ones(2, 5000), torch.ones(2, 5000, dtype=torch.bool), [1000, 2])
    assert many.sum(-1).tolist() == [1000, 2] and many[0, :1000].all() and many[1, :2].all()


def test_scores_are_ranked_in_fp32():
    """fp32 tells 1 + 2^-20 from 1; bf16 and fp16 do not."""
    keys = torch.tensor([[[[1 + 2.0**-20]], [[1.0]]]])
    seen = replace(view(numbers(1, 2)), keys=keys)
    assert by("key-norm", seen, 1)[0] == [1]
    halves = replace(view(numbers(1, 2)), keys=torch.tensor([[[[256.0], [1.0]], [[256.0], [0.0]]]], dtype=torch.bfloat16))
    assert by("key-norm", halves, 1)[0] == [1]  # means 128.5 and 128: one number in bf16


VIC = torch.tensor([0.0, 4, 5, 20, 22, 27])[None, :, None]
PLACES = torch.tensor([(0, 0), (0, 0.1), (0, 0.2), (0.3, 0.3), (0.3, 0.4), (0.9, 0.9)])[None]


def test_vic_finds_the_peaks_that_were_worked_out_by_hand():
    every = torch.ones(1, 6, dtype=torch.bool)
    density, delta, parent, _ = peaks(VIC, PLACES, every)
    assert density[0].tolist() == pytest.approx([2.4579, 2.7882, 2.7023, 2.4544, 2.6338, 2.1425], abs=1e-4)
    assert delta[0].tolist() == pytest.approx([4, math.inf, 1, 2, 17, math.inf], abs=1e-4)
    assert parent[0, [0, 2, 3, 4]].tolist() == [1, 1, 4, 2]  # 1 and 5 have none: the densest, and one that is far from all
    assert vic(VIC, PLACES, every, [2]).tolist() == [[0, 0, 0, 0, 0, 1]]
    assert vic(VIC, PLACES, every, [3]).tolist() == [[0, 0, 0, 2, 2, 1]]  # token 4 is next: 2.6338 * 17


def test_vic_tells_small_distances_of_large_features():
    every = torch.ones(1, 6, dtype=torch.bool)
    assert torch.equal(peaks(VIC + 2.0**20, PLACES, every)[1], peaks(VIC, PLACES, every)[1])


def test_a_peak_that_is_no_centre_joins_the_nearest_centre():
    """One centre for two peaks without parents: the code would give token 5 the label of token 0."""
    every = torch.ones(1, 6, dtype=torch.bool)
    assert vic(VIC, PLACES, every, [1]).tolist() == [[0] * 6]


def test_equal_tokens_make_no_cycle():
    every = torch.ones(1, 4, dtype=torch.bool)
    assert vic(torch.ones(1, 4, 3), torch.zeros(1, 4, 2), every, [2]).tolist() == [[0, 1, 0, 0]]


def test_vic_may_take_its_cut_off_from_the_features():
    """Distances 1, 2, 3 of tokens 0, 1, 3: mean 2, cut-off 1. Density of token 1: 1 + exp(-1) + exp(-4)."""
    features, places, every = torch.tensor([[[0.0], [1], [3]]]), torch.zeros(1, 3, 2), torch.ones(1, 3, dtype=torch.bool)
    density = peaks(features, places, every, cutoff=None)[0]
    assert density[0, 1].item() == pytest.approx(1 + math.exp(-1) + math.exp(-4), rel=1e-5)
    assert torch.allclose(density, peaks(100 * features, places, every, cutoff=None)[0])


def test_cls_clusters_keep_what_cls_looks_at_and_cluster_only_that():
    """Token 2 of lowest attention goes; int(0.55 * 5) = 2 centres among the keys 0, 4, 20, 22, 27. Six tokens are no square:
    there is no gate. Densities 1.78, 1.80, 2.41, 2.62, 2.14: token 4 is the densest; of the others, times the distance to the
    nearest denser one, token 1 has the most (1.80 * 16)."""
    seen = view(numbers(*range(6)), class_attention=[0.5, 0.6, 0.1, 0.7, 0.8, 0.9], tower_keys=VIC[0].tolist())
    kept, choice = by("cls-clusters", seen, 5, centre_share=0.55)
    assert kept == [0, 1, 3, 4, 5]
    assert choice.labels[0, kept].tolist() == [1, 1, 0, 0, 0]
    assert choice.states is None


def test_the_gate_of_clusters_goes_by_the_grid():
    """Two rows of three: from token 0 to token 5 it is sqrt(1 + 4) / 3 = 0.75 of the longer side. Their keys are alike and far
    from all others, so without the gate they are one cluster."""
    keys = [[0.0], [50], [90], [140], [200], [0.1]]
    seen = view(numbers(*range(6)), class_attention=[1.0] * 6, tower_keys=keys)
    together = by("cls-clusters", seen, 6, centre_share=0.84)[1].labels[0]  # five centres
    assert together[0] == together[5] and len(together.unique()) == 5
    gated = by("cls-clusters", replace(seen, grid=torch.tensor([[2, 3]])), 6, centre_share=0.84)[1].labels[0]
    assert gated[0] != gated[5]
    row = view(numbers(*range(4)), class_attention=[1.0] * 4, tower_keys=[[0.0], [0.1], [90], [200]])
    labels = by("cls-clusters", replace(row, grid=torch.tensor([[1, 4]])), 4, centre_share=0.75)[1].labels[0]
    assert labels[0] == labels[1]  # neighbours, a quarter of the longer side apart


def test_only_a_whole_image_with_a_square_number_of_tokens_is_taken_for_a_square():
    seen = view(numbers(*range(4)))
    assert [value.item() for value in grid_of(seen)] == [2, 2, True]
    assert not grid_of(replace(seen, positions=torch.tensor([[0, 3, 5, 8]])))[2].item()  # four of nine
    assert not grid_of(view(numbers(*range(6))))[2].item()
    assert [value.item() for value in grid_of(replace(seen, grid=torch.tensor([[1, 4]])))] == [1, 4, True]


def test_diverse_clusters_need_no_cls():
    """As in divprune below, those at 200, 90 and 10 degrees stay. Their distances are 1.638, 1.286 and 1.992 times the length,
    the cut-off is half the mean, 0.819. Densities 1.021, 1.104, 1.088: token 1 is the first centre; then 1.088 * 1.286 = 1.40
    is less than 1.021 * 1.638 = 1.67, so token 0 is the second."""
    for length in (1, 1000):
        states = [[length * x, length * y] for x, y in at_angles(200, 90, 10, 0, 5)]
        kept, choice = by("diverse-clusters", view(states), 3, centre_share=0.7)
        assert kept == [0, 1, 2]
        assert choice.labels[0, kept].tolist() == [1, 0, 0]


@pytest.mark.parametrize(
    "sizes, costs, keep, expected",
    [
        ((5, 3, 2), (1, 2, 3), 6, (2, 1, 0)),  # 4, 2, 1 of 7 times 3: 1.71, 0.86, 0.43
        ((4, 4, 4), (3, 1, 2), 7, (1, 2, 1)),  # 1.33 each, one is missing: to the lowest cost
        ((4, 4, 4), (3, 1, 2), 8, (1, 2, 2)),  # 1.67 each, one too much: from the highest cost
        ((2, 2), (2, 1), 3, (0, 1)),  # 0.5 is even at 0
        ((4, 4), (2, 1), 5, (1, 2)),  # 1.5 is even at 2
        ((3, 1, 1), (1, 2, 3), 4, (1, 0, 0)),
        ((1, 1), (1, 1), 2, (0, 0)),
        ((3, 0, 2), (1, 0, 2), 5, (2, 0, 1)),  # no cluster in the middle
    ],
)
def test_quotas_by_hand(sizes, costs, keep, expected):
    found = quotas(torch.tensor([sizes]), torch.tensor([costs]).float(), torch.tensor([[keep]]))
    assert tuple(found[0].tolist()) == expected


def keys_of_norm(*norms):
    return [[[float(norm), 0.0]] for norm in norms]


def test_key_norm_averages_heads_before_the_norm():
    """Heads (3, 0) and (-3, 0) cancel; (0, 1) twice has norm 1; (2, 0) and (0, 2) have the mean (1, 1), norm 1.41."""
    keys = [[[2.0, 0], [0, 2]], [[0, 1], [0, 1]], [[3, 0], [-3, 0]]]
    assert by("key-norm", view(numbers(1, 2, 3), keys=keys), 1)[0] == [2]
    assert by("key-norm", view(numbers(1, 2, 3), keys=keys), 2)[0] == [1, 2]


def test_cluster_merge_keeps_small_norms_and_merges_the_others():
    """Clusters {0, 1, 2} and {3, 4}, three to keep, one beside the two merged tokens: 2/3 and 1/3 make quotas 1 and 0. Token 1
    (norm 1) stays; 0 and 2 become their mean at 0, the lower median; 3 and 4 at 3."""
    seen = view(numbers(1, 2, 5, 10, 20), labels=[0, 0, 0, 1, 1], keys=keys_of_norm(3, 1, 2, 5, 4))
    kept, choice = by("cluster-merge", seen, 3)
    assert kept == [0, 1, 3]
    assert choice.states[0, kept, 0].tolist() == [3, 2, 15]
    assert by("cluster-merge", seen, 3, compat=True)[1].states[0, kept, 0].tolist() == [1 + 3, 2, 10 + 15]


def test_a_merged_token_stands_at_its_median_member():
    seen = view(numbers(3, 6, 9, 1), labels=[1, 1, 1, 0], keys=keys_of_norm(1, 1, 1, 1))
    kept, choice = by("cluster-merge", seen, 2)
    assert kept == [1, 3] and choice.states[0, kept, 0].tolist() == [6, 1]


def test_cluster_merge_with_more_clusters_than_places():
    """Norm sums 1, 2, 1.1, two to keep: the lowest cluster, {0}, is one; all others are the second, at the median token 2."""
    seen = view(numbers(1, 3, 6, 9), labels=[0, 1, 2, 2], keys=keys_of_norm(1, 2, 0.5, 0.6))
    kept, choice = by("cluster-merge", seen, 2)
    assert kept == [0, 2] and choice.states[0, kept, 0].tolist() == [1, 6]
    kept, choice = by("cluster-merge", seen, 1)
    assert kept == [1] and choice.states[0, kept, 0].tolist() == [19 / 4]


def test_cluster_attention_prefers_what_the_last_token_looks_at():
    """As in cluster-merge, with the attention turned round: token 2 stays of its cluster, 0 and 1 become one."""
    seen = view(numbers(1, 2, 5, 10, 20), labels=[0, 0, 0, 1, 1], last_attention=[0.1, 0.2, 0.3, 0.2, 0.1])
    kept, choice = by("cluster-attention", seen, 3)
    assert kept == [0, 2, 3] and choice.states[0, kept, 0].tolist() == [1.5, 5, 15]


def test_last_attention_keeps_the_highest():
    assert by("last-attention", view(numbers(1, 2, 3, 4), last_attention=[0.1, 0.4, 0.3, 0.4]), 2)[0] == [1, 3]


def test_rater_attention_asks_only_texts_that_speak_of_the_image():
    """softmax over texts of (ln 3, 0) is (3/4, 1/4) for both image tokens: text 0 is above 1/2, and looks at token 1. Both
    together would look at token 0. The text before the image, which sees nothing of it, does not count, however relevant."""
    texts = [[9.0, 0.0], [math.log(3), 0.0], [0.0, 0.0]]
    attention = [[0.0, 0.0], [0.1, 0.2], [0.9, 0.0]]
    seen = view(numbers(1, 1), text_states=texts, text_valid=[True] * 3, text_attention=attention)
    assert by("rater-attention", seen, 1)[0] == [1]


def test_rater_attention_asks_all_texts_where_none_stands_out():
    seen = view(numbers(1, 1), text_states=[[1.0, 0]] * 2, text_valid=[True] * 2, text_attention=[[0.1, 0.3], [0.4, 0.1]])
    assert by("rater-attention", seen, 1)[0] == [0]  # 0.5 against 0.4


def test_visionzip_merges_the_rest_into_targets_at_a_stride():
    """13 of 16: 11 dominant, 2 contextual ((130 + 32) // 64). The rest is tokens 11 ... 15, stride 5 // 2: targets 11 and 13.
    Key 12 is that of 11; those of 14 and 15 are nearer to that of 13. 11 + 12 = 23; 13 + (14 + 15) / 2 = 27.5."""
    keys = at_angles(*[0] * 11, 0, 10, 90, 80, 100)
    seen = view(numbers(*range(16)), class_attention=[float(16 - token) for token in range(16)], tower_keys=keys)
    kept, choice = by("visionzip", seen, 13)
    assert kept == [*range(12), 13]
    assert choice.states[0, kept, 0].tolist() == [*range(11), 23, 27.5]


@pytest.mark.parametrize("keep, contextual", [(192, 30), (128, 20), (64, 10)])
def test_visionzip_has_the_published_budgets(keep, contextual):
    """With attention that falls from token to token the dominant ones are the first: 162, 108, 54."""
    seen = view(
        numbers(*range(576)), class_attention=[-float(token) for token in range(576)], tower_keys=numbers(*range(1, 577))
    )
    kept, _ = by("visionzip", seen, keep)
    dominant = keep - contextual
    stride = (576 - dominant) // contextual
    assert kept == [*range(dominant), *(dominant + stride * target for target in range(contextual))]


def test_divprune_takes_the_farthest_each_time():
    """Angles 0, 10, 90, 200. Nearest neighbours at 10, 10, 80, 110 degrees: 200 is first. From it 160, 170, 110: 10 is next.
    Then 0 is 10 from it, and 90 is 80: 90."""
    seen = view(at_angles(0, 10, 90, 200))
    assert [by("divprune", seen, keep)[0] for keep in (1, 2, 3)] == [[3], [1, 3], [1, 2, 3]]


def test_dart_keeps_pivots_and_what_is_least_like_them():
    """Two pivots, the keys of largest L1 norm, 5 and 4 (token 3 has 3.5, though a larger L2 norm than 2): 1 at 10 degrees, 2 at
    80. Farthest from 1 is token 3 at 150, from 2 token 0 at 0. The odd token goes to the first pivot."""
    keys = [[[0.5, -0.5]], [[-3.0, 2]], [[2, -2]], [[3.5, 0]], [[0, 1]]]
    seen = view(at_angles(0, 10, 80, 150, 100), keys=keys)
    kept = [by("dart", seen, keep, pivots=2)[0] for keep in (1, 2, 3, 4)]
    assert kept == [[1], [1, 2], [1, 2, 3], [0, 1, 2, 3]]


def test_cdpruner_takes_relevant_tokens_that_differ():
    """The mean text is (1, 0): relevance 1, 1, 0.6, 0. Squared gains 1, 1, 0.36, 0: token 0. Then its double has 0, and token 2
    0.36 * (1 - 0.6^2) = 0.23."""
    seen = view([[1.0, 0], [1, 0], [0.6, 0.8], [0, 1]], text_states=[[2.0, 1], [2, -1], [9, 9]], text_valid=[True, True, False])
    assert [by("cdpruner", seen, keep)[0] for keep in (1, 2)] == [[0], [0, 2]]


def test_tops_weighs_relevance_coverage_and_diversity():
    """Token 0 is most relevant. Its double 1 has relevance 0.9, covers nothing new and is at distance 0: 0.9. Token 2 has 0,
    covers itself (the most: 1 after normalising) and is at distance 1: 2 with weights of 1, 0.8 with 0.4."""
    seen = view([[1.0, 0], [1, 0], [0, 1]], class_attention=[10.0, 9, 0], last_attention=[0.0, 0.5, 1])
    assert by("tops", seen, 1)[0] == [0]
    assert by("tops", seen, 2)[0] == [0, 2]
    assert by("tops", seen, 2, coverage=0.4, diversity=0.4)[0] == [0, 1]
    assert by("tops", seen, 1, relevance="last")[0] == [2]


def test_tops_counts_what_a_token_covers_of_others():
    """Token 0 is chosen; the others differ from it alike. 1 covers itself and some of 3, as 3 does of it: 1.71. 2 covers itself
    only: 1, the least of those that are left, so 0 after normalising. Its relevance of 0.8 is less than 0.1 + 1 of token 1."""
    half = math.sqrt(0.5)
    states = [[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0, half, -half]]
    seen = view(states, class_attention=[1.0, 0.1, 0.8, 0])
    assert by("tops", seen, 2, diversity=0.0)[0] == [0, 1]
    assert by("tops", seen, 2, diversity=0.0, coverage=0.6)[0] == [0, 2]


def test_random_is_the_hash_of_the_position():
    def mixed(position, seed):
        x = (position + 0x9E3779B9 * (seed + 1)) % 2**32
        x = (x ^ x >> 16) * 0x7FEB352D % 2**32
        x = (x ^ x >> 15) * 0x846CA68B % 2**32
        return x ^ x >> 16

    seen = view(numbers(*range(100)))
    for seed in (0, 1):
        expected = sorted(sorted(range(100), key=lambda token: -mixed(token, seed))[:30])
        assert by("random", seen, 30, seed=seed)[0] == expected
    few = replace(view(numbers(*range(3))), positions=torch.tensor([[5, 50, 70]]))
    assert by("random", few, 1)[0] == [max(range(3), key=lambda token: mixed([5, 50, 70][token], 0))]


def test_stride_takes_the_middle_of_equal_runs():
    assert by("stride", view(numbers(*range(9))), 3)[0] == [1, 4, 7]
    assert by("stride", view(numbers(*range(10))), 4)[0] == [1, 3, 6, 8]  # runs of 3, 2, 3, 2


def test_pool_averages_blocks_of_a_square_and_runs_of_anything_else():
    """4 x 4 in 4: blocks of 2 x 2, {0, 1, 4, 5} at 1 with mean 2.5. 2 x 3 in 2: runs of three."""
    kept, choice = by("pool", view(numbers(*range(16))), 4)
    assert kept == [1, 3, 9, 11] and choice.states[0, kept, 0].tolist() == [2.5, 4.5, 10.5, 12.5]
    kept, choice = by("pool", view(numbers(*range(6))), 2)
    assert kept == [1, 4] and choice.states[0, kept, 0].tolist() == [1, 4]


# What holds for all rules


def images(counts, most, scattered=False, text=5):
    """Images of random tokens, padded to `most` with what is no number at all."""
    generator = torch.Generator().manual_seed(0)
    valid = torch.zeros(len(counts), most, dtype=torch.bool)
    for row, count in enumerate(counts):
        valid[row, torch.randperm(most, generator=generator)[:count] if scattered else torch.arange(count)] = True
    index = valid.cumsum(-1) - 1

    def random(salt, *shape):
        """The same numbers for the same image, wherever its tokens are."""
        padded = torch.full((len(counts), most, *shape), torch.nan)
        for row, count in enumerate(counts):
            padded[row, valid[row]] = torch.randn(count, *shape, generator=torch.Generator().manual_seed(100 * count + salt))
        return padded

    texts = torch.stack([torch.randn(text, 12, generator=torch.Generator().manual_seed(count)) for count in counts])
    padding = (torch.arange(text) == text - 1).expand(len(counts), -1)[:, :, None]
    return View(
        valid,
        random(0, 12),
        index.clamp(min=0),
        keys=random(1, 2, 6),
        class_attention=random(2).exp(),
        tower_keys=random(3, 20) * 9,
        labels=torch.where(valid, index * 7 % 5, 99),
        text_states=texts.masked_fill(padding, torch.nan),
        text_valid=~padding[:, :, 0],
        text_attention=random(4, text).exp().transpose(1, 2).masked_fill(padding, torch.nan),
        last_attention=random(5).exp(),
    )


def of_image(seen, choice, row):
    """What a choice says of the tokens of an image, without padding."""
    own = seen.valid[row]
    kept = choice.kept[row][own]
    states = (seen.states if choice.states is None else choice.states)[row][own][kept]
    return kept, states, None if choice.labels is None else choice.labels[row][own][kept]


@pytest.mark.parametrize("rule, settings", RULES)
@pytest.mark.parametrize("scattered", [False, True])
def test_neither_batch_mates_nor_padding_matter(rule, settings, scattered):
    counts, keep = [36, 20, 9, 4], [12, 7, 12, 3]
    seen = images(counts, 40, scattered)
    choice = STAGE_RULES[rule].choose(seen, keep, **settings)
    assert choice.kept.sum(-1).tolist() == [min(pair) for pair in zip(counts, keep, strict=True)]
    assert not (choice.kept & ~seen.valid).any()
    for row, (count, few) in enumerate(zip(counts, keep, strict=True)):
        alone = images([count], count)
        kept, states, labels = of_image(alone, STAGE_RULES[rule].choose(alone, [few], **settings), 0)
        found = of_image(seen, choice, row)
        assert torch.equal(found[0], kept)
        assert torch.allclose(found[1], states, atol=1e-6)
        assert labels is None or torch.equal(found[2], labels)


@pytest.mark.parametrize("rule, settings", RULES)
def test_an_image_with_no_more_tokens_than_stay_is_left_alone(rule, settings):
    seen = images([9], 9)
    choice = STAGE_RULES[rule].choose(seen, [9], **settings)
    assert choice.kept.all()
    assert choice.states is None or torch.equal(choice.states, seen.states)


@pytest.mark.parametrize("rule, settings", RULES)
def test_no_rule_asks_a_tensor_for_a_number(rule, settings):
    """Fake tensors have shapes and no values."""
    mode = FakeTensorMode()
    seen = images([9, 6], 9)
    fake = View(**{name: None if value is None else mode.from_tensor(value) for name, value in vars(seen).items()})
    with mode:
        choice = STAGE_RULES[rule].choose(fake, [4, 4], **settings)
    assert choice.kept.shape == (2, 9)


@pytest.mark.parametrize("rule, settings", RULES)
def test_states_keep_their_precision(rule, settings):
    seen = images([9, 6], 9)
    choice = STAGE_RULES[rule].choose(replace(seen, states=seen.states.bfloat16()), [4, 4], **settings)
    assert choice.states is None or choice.states.dtype == torch.bfloat16


@pytest.mark.parametrize("rule, settings", RULES)
def test_what_a_rule_needs_is_what_it_reads(rule, settings):
    """It runs on that alone, and misses every part of it in a sentence."""
    fields = {
        "keys": ["keys"],
        "class": ["class_attention", "tower_keys"],
        "text": ["text_states", "text_valid"],
        "attention": ["text_attention", "text_valid"],
        "last": ["last_attention"],
    }
    seen = images([9, 6], 9)
    needs = needs_of(rule, settings)
    clusters = {"labels"} if rule in ("cluster-merge", "cluster-attention") else set()
    given = {field for need in needs for field in fields[need]} | clusters
    bare = View(seen.valid, seen.states, seen.positions, **{field: getattr(seen, field) for field in given})
    STAGE_RULES[rule].choose(bare, [4, 4], **settings)
    for need in needs:
        with pytest.raises(ValueError, match="needs"):
            STAGE_RULES[rule].choose(replace(bare, **dict.fromkeys(fields[need])), [4, 4], **settings)


def test_a_setting_that_no_rule_knows_is_refused():
    with pytest.raises(TypeError):
        STAGE_RULES["stride"].choose(images([9], 9), [4], seed=1)
    with pytest.raises(ValueError, match="relevance"):
        STAGE_RULES["tops"].choose(images([9], 9), [4], relevance="norm")


def test_rules_that_read_the_layer_before_are_not_first():
    assert may_be_first("tops", {"relevance": "class"}) and may_be_first("cdpruner", {}) and may_be_first("visionzip", {})
    assert not may_be_first("tops", {"relevance": "last"}) and not may_be_first("key-norm", {})


# Properties


@st.composite
def clusters(draw):
    sizes = draw(st.lists(st.integers(1, 12), min_size=1, max_size=12))
    costs = draw(st.lists(st.integers(0, 5), min_size=len(sizes), max_size=len(sizes)))
    return sizes, costs, draw(st.integers(len(sizes), sum(sizes)))


def walked(sizes, costs, keep):
    """Quotas as they are described, one by one."""
    spare, others = keep - len(sizes), [size - 1 for size in sizes]
    found = [round(other * spare / max(sum(others), 1)) for other in others]
    left = spare - sum(found)
    order = sorted(range(len(sizes)), key=lambda cluster: costs[cluster])
    for cluster in order if left > 0 else reversed(order):
        if left > 0 and found[cluster] < others[cluster]:
            found[cluster], left = found[cluster] + 1, left - 1
        elif left < 0 and found[cluster] > 0:
            found[cluster], left = found[cluster] - 1, left + 1
    return found


@given(st.lists(clusters(), min_size=1, max_size=3))
def test_quotas_fill_the_places_and_leave_a_token_to_merge_in_every_cluster(batch):
    most = max(len(sizes) for sizes, _, _ in batch)
    padded = [[row + [0] * (most - len(row)) for row in rows] for rows in ([b[0] for b in batch], [b[1] for b in batch])]
    found = quotas(torch.tensor(padded[0]), torch.tensor(padded[1]).float(), torch.tensor([[b[2]] for b in batch]))
    for (sizes, costs, keep), row in zip(batch, found.tolist(), strict=True):
        own = row[: len(sizes)]
        assert sum(own) + len(sizes) == keep and not any(row[len(sizes) :])
        assert all(0 <= quota <= size - 1 for quota, size in zip(own, sizes, strict=True))
        assert own == walked(sizes, costs, keep)


@given(st.integers(1, 25), st.integers(1, 25), st.integers(0, 10_000))
def test_every_vic_label_is_that_of_a_centre(tokens, centres, seed):
    generator = torch.Generator().manual_seed(seed)
    features = 10 * torch.randn(1, tokens, 3, generator=generator)
    places, every = torch.rand(1, tokens, 2, generator=generator), torch.ones(1, tokens, dtype=torch.bool)
    centres = min(centres, tokens)
    labels = vic(features, places, every, [centres])[0].tolist()
    assert set(labels) == set(range(centres))  # every centre labels itself
    density, delta, parent, _ = (value[0] for value in peaks(features, places, every))
    product = (density * delta).tolist()
    chosen = sorted(range(tokens), key=lambda token: -product[token])[:centres]
    assert [labels[token] for token in chosen] == list(range(centres))
    for token in set(range(tokens)) - set(chosen):
        if math.isfinite(delta[token]):  # a child is less dense than its parent, and has its label
            assert density[parent[token]] >= density[token] and labels[token] == labels[parent[token]]


@given(st.integers(1, 64), st.integers(1, 64), st.sampled_from(["pool", "stride", "random"]))
def test_any_number_of_tokens_can_stay_of_any_number(tokens, keep, rule):
    choice = STAGE_RULES[rule].choose(view(numbers(*range(tokens))), [keep])
    assert choice.kept.sum() == min(tokens, keep)


@given(st.integers(2, 9), st.integers(1, 81))
def test_pooling_an_image_of_one_colour_changes_nothing(side, keep):
    seen = view([[3.0, 1.0]] * side**2)
    choice = STAGE_RULES["pool"].choose(seen, [keep])
    assert choice.kept.sum() == min(keep, side**2)
    assert torch.allclose(choice.states[choice.kept], torch.tensor([3.0, 1.0]))


def test_divprune_goes_on_where_all_tokens_are_alike():
    assert divprune(view([[1.0, 0.0]] * 6), [4]).kept.sum() == 4


@pytest.mark.slow
def test_clustering_costs_at_most_a_hundredth_of_the_tower():
    """VIC of 288 tokens against 24 layers of ViT-L/14-336, process time, one thread, the best of several rounds."""
    weights = [torch.randn(1024, 1024) for _ in range(4)] + [torch.randn(4096, 1024)]
    tokens, features, places = torch.randn(1, 577, 1024), 0.3 * torch.randn(1, 288, 1024), torch.rand(1, 288, 2)

    def layer():
        heads = (tokens @ weights[0].T).view(1, 577, 16, 64).transpose(1, 2)
        hidden = torch.nn.functional.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).reshape(1, 577, 1024)
        for weight in weights[1:4]:
            hidden = hidden @ weight.T
        return (hidden @ weights[4].T) @ weights[4]

    def best(work):
        times = []
        for _ in range(5):
            begin = time.process_time()
            work()
            times.append(time.process_time() - begin)
        return min(times)

    every = torch.ones(1, 288, dtype=torch.bool)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert best(lambda: vic(features, places, every, [51])) <= 0.01 * 24 * best(layer)
    finally:
        torch.set_num_threads(threads)
