"""Plans, scores and recovery of image-text decoders: by hand, and against eager attention maps and stock forward passes."""

from dataclasses import replace
from importlib.util import find_spec

import pytest
import tiny
import torch
import transformers
from PIL import Image
from torch import Tensor

import comp_cli
from comp_cli.cli.output import Output
from comp_cli.commands.prune import prune
from comp_cli.data.rows import Pair
from comp_cli.engine import decoder_scores, flops, sequential_refit
from comp_cli.engine.allocation import Cut, Space
from comp_cli.engine.leaving import Leaving
from comp_cli.engine.recover import recover
from comp_cli.engine.schedule import TOLERANCE, Floors
from comp_cli.engine.scoring import recording, tower_layers
from comp_cli.engine.sequential_refit import entering_calls, refit_in_sequence
from comp_cli.engine.slicing import slice_state, unit_channels
from comp_cli.engine.token_schedules import stages
from comp_cli.errors import UsageError
from comp_cli.models.dense import open_dense
from comp_cli.models.pairs import batches_of, generated_pairs
from comp_cli.options import DataOptions, PruneOptions
from comp_cli.plan import PADDING, TokenStage
from comp_cli.search.calibration import gather_statistics
from comp_cli.search.run import leaving_of, space_of

QUIET = Output("quiet")
KINDS = ("llava", "qwen3-vl")
VIDEO = pytest.mark.skipif(not all(map(find_spec, ("torchvision", "num2words"))), reason="for the processor of SmolVLM")
ALL = [pytest.param(kind, marks=VIDEO if kind == "smolvlm" else ()) for kind in tiny.DECODERS]
THREE = (TokenStage(1, "last-attention", 20), TokenStage(2, "last-attention", 10), TokenStage(3, "last-attention", 5))
FEWER = tuple(replace(stage, keep=keep) for stage, keep in zip(THREE, (12, 8, 5), strict=True))


class Made(dict):
    """What is made of a kind, when it is asked for."""

    def __init__(self, make):
        super().__init__()
        self.make = make

    def __missing__(self, kind):
        self[kind] = self.make(kind)
        return self[kind]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("decoders")
    return Made(lambda kind: tiny.write(kind, place / kind))


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A LLaVA of so many heads and channels that parameters alone make any ratio."""
    folder = tmp_path_factory.mktemp("decoders") / "wide"
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 6, "intermediate_size": 256}
    tiny.llava(text=sizes).eval().save_pretrained(folder)
    tiny.llava_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def opened(folders):
    return Made(lambda kind: open_dense(str(folders[kind]), QUIET, text_tokens=8))


@pytest.fixture(scope="module")
def llava(opened):
    return opened["llava"]


def options(model="", **others) -> PruneOptions:
    sizes = {"num_samples": 4, "stage_samples": 4, "eval_samples": 2, "text_tokens": 8, "device": "cpu"}
    return PruneOptions(model=str(model), ratio=0.4, **sizes | others)


def smaller(plan, groups=((0,), (1,), (0, 1), (0, 1), (1,)), gone=slice(0, 24)):
    """Other key-value heads in every layer, and the same channels gone."""
    tower = plan.tower("language")
    layers = []
    for layer, kept in zip(tower.layers, groups, strict=True):
        left = [unit for unit in layer.kept("ffn") if unit not in range(64)[gone]]
        layers.append(layer.keeping("attention", kept).keeping("ffn", left))
    return plan.with_tower(replace(tower, layers=tuple(layers)))


def run(model, inputs: dict[str, Tensor]):
    return model(**inputs)


def padded_in_front(inputs: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """The last prompt with its padding at the left."""
    made = dict(inputs)
    for name in ("input_ids", "attention_mask", "labels", "mm_token_type_ids"):
        if name in made:
            made[name] = made[name].clone()
            made[name][-1] = made[name][-1].roll(count)
    return made


# Scores ------------------------------------------------------------------------------------------------------------------


def test_image_tokens_weigh_one_by_their_scores_and_words_one_alike():
    scores = torch.tensor([[0.2, 0.1, 0.05, 0.3, -1.0], [-1.0, 0.5, 0.25, 0.25, 0.1]])
    pictured = torch.tensor([[False, True, True, False, False]]).expand(2, -1)
    found = decoder_scores.weights(scores, pictured, weighted=True)
    expected = torch.tensor([[1 / 2, 2 / 3, 1 / 3, 1 / 2, 0.0], [0.0, 2 / 3, 1 / 3, 1 / 2, 1 / 2]])
    torch.testing.assert_close(found, expected)
    assert decoder_scores.weights(scores, pictured, weighted=False).tolist() == [[1, 1, 1, 1, 0], [0, 1, 1, 1, 1]]


def test_a_text_without_image_weighs_by_its_words():
    found = decoder_scores.weights(torch.tensor([[0.7, 0.3]]), torch.zeros(1, 2, dtype=torch.bool), weighted=True)
    assert found.tolist() == [[0.5, 0.5]]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_what_the_last_instruction_token_pays(kind, labelled, side, opened, folders):
    dense = opened[kind]
    inputs = dense.random_inputs(2, 8, padded=3)
    inputs = padded_in_front(inputs, 3) if side == "left" else inputs
    asked = inputs["attention_mask"].bool() & (inputs["labels"] == -100 if labelled else True)
    last = [max(place for place, there in enumerate(row) if there) for row in asked.tolist()]
    if not labelled:
        inputs.pop("labels")
    with torch.inference_mode(), recording(dense.whole, dense.family, dense.plan) as recorder:
        dense.whole(**inputs)
    stock = getattr(transformers, dense.architecture).from_pretrained(folders[kind], attn_implementation="eager").eval()
    with torch.inference_mode():
        maps = stock(**inputs, output_attentions=True).attentions
    for index, paid in enumerate(maps):
        expected = torch.stack([one.mean(0)[place] for one, place in zip(paid, last, strict=True)])
        expected = expected.masked_fill(inputs["attention_mask"] == 0, -1.0)
        torch.testing.assert_close(recorder.scores["language", index], expected, rtol=1e-3, atol=1e-5)


# How tokens leave --------------------------------------------------------------------------------------------------------


def places(found):
    return [(stage.layer, stage.keep if stage.share is None else stage.share) for stage in found]


def test_three_stages_from_a_layer_on_as_published():
    assert places(Leaving(None, 576, 32, True, True, True).stages(1, 288)) == [(2, 288), (8, 144), (16, 72)]
    assert places(Leaving(None, 36, 10, True, True, True).stages(5, 20)) == [(6, 20), (7, 10), (8, 5)]
    assert {stage.rule for stage in Leaving(None, 36, 5, True, True, True).stages(0, 20)} == {"last-attention"}


def test_the_deepest_place_has_room_for_all_stages():
    for layers in (4, 5, 7, 28, 32, 36):
        leaving = Leaving(None, 100, layers, False, True, True)
        for layer in range(leaving.depths):
            found = [stage.layer for stage in leaving.stages(layer, 40)]
            assert found == sorted(set(found)) and found[0] == layer + 1 and found[-1] < layers


def test_models_whose_images_vary_keep_shares_of_as_many_tokens():
    leaving = Leaving(None, 36, 5, False, True, False)
    for tokens in (5, 7, 20, 33):
        found = leaving.stages(0, tokens)
        assert [stage.keep for stage in found] == [None] * 3
        assert [stage.left(36) for stage in found] == [
            stage.left(36) for stage in replace(leaving, fixed_size=True).stages(0, tokens)
        ]


def test_possible_numbers_leave_some_and_drop_some_at_every_stage():
    assert Leaving(None, 36, 5, True, True, True).possible == frozenset(range(3, 36))
    for method in ("vitcop", "pyramiddrop", "visionzip", "tops"):
        leaving = Leaving(method, 36, 5, True, True, True)
        assert leaving.possible
        for tokens in leaving.possible:
            counts = [36, *(stage.keep for stage in leaving.stages(0, tokens)), 0]
            assert all(more > less for more, less in zip(counts, counts[1:], strict=False))


def test_random_tokens_follow_the_seed():
    (stage,) = Leaving("random-token", 36, 5, True, True, True, seed=3).stages(0, 9)
    assert stage == TokenStage(0, "random", 9, settings={"seed": 3})


# Whole plans -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def random_prices(llava):
    random = torch.Generator().manual_seed(0)
    return {
        (tower.name, index, part): torch.rand(len(units.units), generator=random, dtype=torch.double)
        for tower in llava.plan.towers
        for index, layer in enumerate(tower.layers)
        for part, units in layer.parts.items()
    }


@pytest.fixture(scope="module")
def space(llava, random_prices):
    return space_of(llava, options(tokens_method="attention"), random_prices)


def test_parts_of_modes_that_are_off_stay(llava, space):
    smallest = space.remove_cheapest(llava.plan, 0)
    assert smallest.tower("vision") == llava.plan.tower("vision")
    assert {len(layer.kept("attention")) for layer in smallest.tower("language").layers} == {1}


@pytest.mark.parametrize("cut", [Cut(0, 0.2), Cut(1, 0.5), Cut(0, 0.8)])
def test_candidates_have_the_ratio_and_keep_the_heads_that_rank(cut, space):
    plan = space.candidate(0.4, {"image": cut})
    assert plan is not None and len(plan.stages) == 3 and plan.stages[0].layer == cut.layer + 1
    assert abs(1 - flops.count(plan, space.ref).total / space.total - 0.4) <= TOLERANCE
    tower = plan.tower("language")
    assert all(tower.layers[stage.layer - 1].parts["attention"] == space.dense.tower("language").layers[0].parts["attention"]
               for stage in plan.stages)  # fmt: skip
    assert space.kept(plan, "image", cut.layer) == plan.stages[0].keep


def test_tokens_bring_the_share_that_they_should(space):
    plan = space.candidate(0.4, {"image": Cut(0, 0.9)})
    tokens_only = replace(space.dense, stages=plan.stages)
    brought = 1 - flops.count(tokens_only, space.ref).total / space.total
    one_more = replace(space.dense, stages=space.leaving.stages(0, plan.stages[0].keep + 1))
    possible = 1 - flops.count(replace(space.dense, stages=space.leaving.stages(0, 5)), space.ref).total / space.total
    wanted = 0.9 * min(0.4, possible)
    assert brought >= wanted > 1 - flops.count(one_more, space.ref).total / space.total


def test_all_may_go_where_a_method_says_when(llava, random_prices):
    space = space_of(llava, options(tokens_method="visionzip"), random_prices)
    plan = space.candidate(0.4, {"image": Cut(0, 0.5)})
    assert [(stage.layer, stage.rule) for stage in plan.stages] == [(0, "visionzip")]
    assert not space.ranking_parts(plan)


def test_a_plan_of_stages_alone_is_told_apart(llava):
    plan = replace(llava.plan, stages=THREE)
    widened = plan.told_apart(llava.plan)
    assert [layer.padding for layer in widened.tower("language").layers] == [PADDING, 0, 0, 0, 0]
    assert not any(layer.padding for layer in widened.tower("vision").layers)
    lost = replace(smaller(llava.plan), stages=THREE)
    assert lost.told_apart(llava.plan) == lost


# Recovery ----------------------------------------------------------------------------------------------------------------


def batches_for(dense, count=4, size=2):
    return batches_of(dense, generated_pairs(dense.task, labelled=False), "calibration", count, size)


@pytest.fixture(scope="module")
def statistics(opened):
    return Made(lambda kind: gather_statistics(opened[kind], batches_for(opened[kind]), QUIET, rises=True))


@pytest.mark.parametrize("kind", KINDS)
def test_every_part_has_its_gram_matrix_and_its_rise(kind, opened, statistics):
    dense, found = opened[kind], statistics[kind]
    for tower in dense.plan.towers:
        for index, layer in enumerate(tower.layers):
            for part, units in layer.parts.items():
                key, channels = (tower.name, index, part), len(units.units) * units.width
                assert found.grams[key].shape == (channels + 1, channels + 1)
                assert found.grams[key].isfinite().all() and found.energies[key] > 0
                assert (found.rises[key] > 0) == (key[:2] != ("vision", 2) or kind != "llava")  # whose last layer nobody reads


@pytest.mark.parametrize("kind", ALL)
def test_weights_of_a_gram_matrix_are_those_of_the_modalities(kind, statistics):
    """Its last entry is the sum of all weights: one for the image and one for the words of every prompt."""
    for index in range(5):
        for part in ("attention", "ffn"):
            assert float(statistics[kind].grams["language", index, part][-1, -1]) == pytest.approx(2 * 4, rel=1e-4)


def test_recovered_projections_have_no_bias(llava, statistics):
    plan = smaller(llava.plan)
    sliced = slice_state(llava.state, llava.family, plan)
    found = recover(sliced, llava.state, llava.family, plan, statistics["llava"].grams, {})
    assert found.keys() == sliced.keys()
    name = "model.language_model.layers.0.self_attn.{}"
    assert name.format("o_proj.bias") not in found
    assert not torch.equal(found[name.format("o_proj.weight")], sliced[name.format("o_proj.weight")])


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_removed_nothing_changed_though_every_layer_is_fitted(kind, opened, monkeypatch):
    dense = opened[kind]
    monkeypatch.setattr(sequential_refit, "first_changed", lambda tower, plan, dense: 0)
    inputs = [batch.inputs for batch in batches_for(dense)]
    compact = dense.runtime(dense.plan)
    refit_in_sequence(compact, dense.whole, dense.family, dense.plan, dense.plan, inputs, run)
    fitted = 0
    for (name, found), expected in zip(compact.named_parameters(), dense.whole.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4, msg=name)
        fitted += found.data_ptr() != expected.data_ptr()
    assert fitted == 2 * 5


@pytest.mark.parametrize("stages_of", [(), FEWER], ids=["all tokens", "fewer"])
@pytest.mark.parametrize("kind", ALL)
def test_layers_run_by_hand_say_what_the_model_says(kind, stages_of, opened):
    """Features of deeper layers of the tower (deepstack) go on to the tokens that are left."""
    dense = opened[kind]
    most = dense.reference.tokens["image"]
    stages_of = tuple(replace(stage, keep=min(stage.keep, most - 1 - place)) for place, stage in enumerate(stages_of))
    model = dense.runtime(replace(smaller(dense.plan, groups=((0, 1),) * 5), stages=stages_of))
    inputs, tower, seen = dense.random_inputs(2, 8, padded=3), dense.family.tower("language"), []
    with torch.inference_mode():
        (call,) = entering_calls(model, tower, [inputs], run)
        for index, layer in enumerate(tower_layers(model, tower)):
            call.step(layer, index)
        hook = model.get_submodule(tower.encoder).norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        model(**inputs)
        hook.remove()
    tokens = dense.reference.tokens
    gone = tokens["image"] + tokens.get("newline", 0) - 5 if stages_of else 0
    assert call.hidden.shape[1] == inputs["input_ids"].shape[1] - gone
    torch.testing.assert_close(call.hidden, seen[0])


@pytest.mark.parametrize("stages_of", [(), THREE], ids=["all tokens", "fewer"])
@pytest.mark.parametrize("kind", KINDS)
def test_recovery_in_sequence_comes_nearer_to_the_dense_stream(kind, stages_of, opened):
    dense = opened[kind]
    plan = replace(smaller(dense.plan), stages=stages_of)
    inputs = [batch.inputs for batch in batches_for(dense)]
    plain, compact = dense.runtime(plan), dense.runtime(plan)
    before = [layer.comp_stage for layer in tower_layers(compact, dense.family.tower("language"))] if stages_of else []
    refit_in_sequence(compact, dense.whole, dense.family, plan, dense.plan, inputs, run)

    def states(model) -> Tensor:
        with torch.inference_mode():
            return torch.cat([dense.task.features(dense.task.forward(model, batch)) for batch in inputs])

    expected = states(dense.whole)
    far, near = ((states(model) - expected).square().sum() for model in (plain, compact))
    assert near < far
    if stages_of:
        after = [layer.comp_stage for layer in tower_layers(compact, dense.family.tower("language"))]
        assert after == before and [stage is None for stage in after] == [True, False, False, False, True]


@pytest.mark.parametrize("kind", KINDS)
def test_a_piece_of_a_batch_is_a_batch_of_its_pairs(kind, opened):
    dense = opened[kind]
    sizes = [(24, 24), (48, 24), (32, 40)]
    pairs = [Pair(Image.effect_noise(size, 60).convert("RGB"), "a red", answers=("circle",)) for size in sizes]
    piece = dense.collate(pairs).piece(1, 3)
    expected = dense.collate(pairs[1:])
    assert piece.labels is None and piece.samples == 2
    for name, tensor in expected.inputs.items():
        assert torch.equal(piece.inputs[name], tensor), name
    assert torch.equal(piece.piece(1, 2).inputs["pixel_values"], dense.collate(pairs[2:]).inputs["pixel_values"])


# Masked and sliced -------------------------------------------------------------------------------------------------------


def masked(dense, plan):
    """The dense model with the stages of a plan, and the heads and channels that it removes multiplied by zero, keys of heads
    that go among them: key norms are ranked by those of the heads that stay (CoMP, Eq. 7)."""
    model = dense.build(replace(dense.plan, stages=plan.stages), dense.state)
    tower = dense.family.tower("language")
    for layer, wanted in zip(tower_layers(model, tower), plan.tower("language").layers, strict=True):
        for part in tower.parts:
            linear, units = layer.get_submodule(part.column), wanted.parts[part.name]
            mask = torch.zeros(linear.in_features).index_fill(0, unit_channels(units.units, units.width), 1.0)
            linear.register_forward_pre_hook(lambda module, args, mask=mask: (args[0] * mask,))
        heads, keys = wanted.parts["attention"], layer.self_attn.k_proj
        mask = torch.zeros(keys.out_features).index_fill(0, unit_channels(heads.units, heads.head_dim), 1.0)
        keys.register_forward_hook(lambda module, args, output, mask=mask: output * mask, prepend=True)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_masked_equals_sliced_with_stages_of_key_norms(kind, opened):
    dense = opened[kind]
    three = tuple(TokenStage(layer, "key-norm", keep) for layer, keep in ((1, 20), (2, 12), (4, 5)))
    plan = replace(smaller(dense.plan), stages=three)
    inputs = dense.random_inputs(3, 8, padded=3)
    with torch.inference_mode():
        found, expected = (
            model(**inputs).logits[inputs["labels"] != -100] for model in (dense.runtime(plan), masked(dense, plan))
        )
        whole = dense.runtime(smaller(dense.plan))(**inputs).logits[inputs["labels"] != -100]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, whole, atol=1e-2)  # tokens that left are missed


# Runs --------------------------------------------------------------------------------------------------------------------

WAYS = {
    "comp": {},
    "attention": {"tokens_method": "attention"},
    "vitcop": {"tokens_method": "vitcop"},
    "tops": {"tokens_method": "tops"},
    "parameters": {"modes": ("language_params",)},
    "vision too": {"modes": ("vision_params", "language_params", "image_tokens")},
    **{name: {"method": name} for name in ("obs", "wanda", "magnitude", "random", "taylor", "upop")},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_llava_is_pruned_by_ratio(way, wide, tmp_path):
    report = prune(options(wide, **WAYS[way]), tmp_path / "compact", QUIET)
    dense = open_dense(str(wide), QUIET, text_tokens=8)
    plan = report.plan
    assert report.ratio == pytest.approx(0.4, abs=TOLERANCE)
    assert 1 - flops.count(plan, dense.reference).total / flops.count(dense.plan, dense.reference).total == pytest.approx(
        report.ratio, abs=1e-5
    )
    assert (plan.tower("vision") == dense.plan.tower("vision")) == (way != "vision too")
    if way in ("parameters", "obs", "wanda", "magnitude", "random", "taylor", "upop"):
        assert not plan.stages
    else:
        assert any(look.tokens for look in report.compared)
    if way == "attention":
        assert not plan.stages or [stage.rule for stage in plan.stages] == 3 * ["last-attention"]
    elif way == "comp" or ("tokens_method" in WAYS[way] and plan.stages):
        known = stages(
            "cover" if way == "comp" else way,
            tokens=9,
            share=None,
            image_tokens=36,
            layers=5,
            class_token=True,
            fixed_size=True,
        )
        assert [stage.rule for stage in plan.stages] == [stage.rule for stage in known]
    model = comp_cli.load(tmp_path / "compact")
    inputs = dense.random_inputs(2, 8)
    with torch.inference_mode():
        assert model(**inputs).logits.isfinite().all()


def test_a_qwen_whose_images_vary_is_pruned_by_ratio(folders, tmp_path):
    report = prune(replace(options(folders["qwen3-vl"]), ratio=0.2), tmp_path / "compact", QUIET)
    assert report.ratio == pytest.approx(0.2, abs=TOLERANCE) and report.plan.stages
    assert all(stage.keep is None for stage in report.plan.stages)
    comp_cli.load(tmp_path / "compact")


def test_stages_alone_are_written_so_that_no_stock_class_loads_them(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(Space, "remove_cheapest", lambda self, plan, target: replace(plan, stages=THREE))
    prune(replace(options(folders["llava"]), ratio=0.368), tmp_path / "compact", QUIET)
    assert comp_cli.load(tmp_path / "compact").config.comp["towers"][1]["layers"][0]["ffn"] == 64 + PADDING
    with pytest.raises(RuntimeError, match="size mismatch|mismatched"):
        transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "compact")


@pytest.mark.parametrize("method", ["comp-paper", "joint", "sjp", "sjp-obs", "sjp-reversed", "token", "cls"])
def test_methods_of_encoders_are_refused_before_data_is_read(method, folders, tmp_path):
    asked = options(folders["llava"], method=method, data=DataOptions(str(tmp_path / "missing.jsonl")))
    with pytest.raises(UsageError, match=f"--method {method} is for models that encode") as error:
        prune(asked, tmp_path / "compact", QUIET)
    assert "wanda" in error.value.hint and "comp" in error.value.hint


REFUSED = {
    "unknown mode": ({"modes": ("answer_params",)}, "this model has no answer_params"),
    "tokens alone": ({"modes": ("image_tokens",)}, "no mode of them is on"),
    "no mode of the method": ({"method": "wanda", "modes": ("image_tokens",)}, "none of what it removes"),
    "unknown way": ({"tokens_method": "nearest"}, "nearest"),
    "a way for wanda": ({"method": "wanda", "tokens_method": "vitcop"}, "knows no such way"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case, folders, tmp_path):
    others, said = REFUSED[case]
    with pytest.raises(UsageError, match=said):
        prune(options(folders["llava"], **others), tmp_path / "compact", QUIET)


def test_floors_of_a_decoder_of_usual_size_are_widths_that_tensor_cores_like(llava):
    wide = llava.plan.tower("language").layers[0].keeping("ffn", range(2048))
    assert Floors.of(llava.family, llava.plan.with_layer("language", 0, wide)).ffn_multiple == 64
    assert Floors.of(llava.family, llava.plan).ffn_multiple == 8


def test_leaving_asks_the_tower_whether_it_has_a_class_token(opened):
    assert [leaving_of(opened[kind], options()).class_token for kind in KINDS] == [True, False]
    assert [leaving_of(opened[kind], options()).fixed_size for kind in KINDS] == [True, False]
