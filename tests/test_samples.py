"""Which tokens of samples stay: what a run of the compact model says, against rankings and passes written out by hand."""

import json
from dataclasses import replace

import pytest
import reference
import tiny
import torch
from PIL import Image
from test_decoder_engine import QUIET
from torch.nn import functional as F
from typer.testing import CliRunner

import comp_cli
from comp_cli.cli.app import app
from comp_cli.data.rows import Pair
from comp_cli.engine import flops
from comp_cli.errors import RefusedError, UsageError
from comp_cli.models.dense import open_dense
from comp_cli.models.samples import Runs, kept_sample, kept_samples
from comp_cli.plan import Plan, TokenStage
from comp_cli.report.samples import KeptAt, SampleKept, StreamKept
from comp_cli.report.token_picture import DARK, dimmed, heat_map, token_picture, write_beside_weights

FEW = {"num_samples": 4, "batch_size": 4, "text_tokens": 12, "device": "cpu"}
KEEPS = {"vision": {1: 24, 3: 11}, "language": {0: 9, 2: 6}}
TEXT = "a red circle left of two large square"


def picture(side: int = 48, seed: int = 0) -> Image.Image:
    torch.manual_seed(seed)
    return Image.fromarray(torch.randint(0, 256, (side, side, 3), dtype=torch.uint8).numpy())


def keeping(plan, keeps=KEEPS):
    """The plan with other numbers of tokens: stream (and tower) -> layer -> tokens that it hands on."""
    for tower in plan.towers:
        for index, tokens in keeps.get(tower.name, {}).items():
            plan = plan.with_layer(tower.name, index, plan.tower(tower.name).layers[index].handing_on(tower.name, tokens))
    return plan


def opened(folder, name=None):
    return open_dense(str(folder), QUIET, text_tokens=12, score_rows=0, task=tiny.TASKS.get(name))


def runs_of(dense) -> Runs:
    return Runs(dense.family, dense.task, dense.collate_whole)


def sample_of(dense, plan, pair=None) -> SampleKept:
    return kept_sample(dense.runtime(plan), runs_of(dense), pair or Pair(picture(), TEXT))[0]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Dense models by the name of their family, each opened once."""
    place, found = tmp_path_factory.mktemp("samples"), {}

    def make(name: str):
        if name not in found:
            found[name] = opened(tiny.write(name, place / name), name)
        return found[name]

    return make


# Encoders ----------------------------------------------------------------------------------------------------------------


def test_patches_and_words_are_those_that_the_ranking_by_hand_keeps(stock, tiny_folder, monkeypatch):
    dense = opened(tiny_folder)
    plan, heard, drop = keeping(dense.plan), [], reference.drop
    monkeypatch.setattr(reference, "drop", lambda *args, **more: heard.append(drop(*args, **more)) or heard[-1])
    reference.masked_logits(stock, plan, dense.collate_whole([dense.collate_whole.seen(Pair(picture(), TEXT))]).inputs)
    vision, language = heard[: len(plan.towers[0].layers)], heard[len(plan.towers[0].layers) :]
    images, words = sample_of(dense, plan).streams
    assert (images.at, images.grid, images.tokens, images.words) == ("behind", (6, 6), 36, None)
    assert (words.kind, words.words, words.grid) == ("text", tuple(TEXT.split()), None)
    assert [kept.layer for kept in images.layers] == [1, 3] and [kept.layer for kept in words.layers] == [0, 2]
    for stream, alive in ((images, vision), (words, language)):
        for kept in stream.layers:
            there = alive[kept.layer][0].nonzero().flatten().tolist()
            last = [] if stream is images else [len(TEXT.split()) + 1]  # [SEP]
            assert [0, *(place + 1 for place in kept.kept), *last] == there


def test_dropping_these_patches_by_hand_makes_the_same_features(stock, tiny_folder):
    dense = opened(tiny_folder)
    plan = keeping(dense.plan)
    (images, _), pixels = sample_of(dense, plan).streams, dense.collate_whole.seen(Pair(picture(), TEXT)).image[None]
    stays = {kept.layer: kept.kept for kept in images.layers}
    with torch.inference_mode():
        wanted = dense.runtime(plan).vision_model(pixels).last_hidden_state
        x, there = stock.vision_model.embeddings(pixels), [-1, *range(36)]  # -1 is [CLS]
        for index, layer in enumerate(stock.vision_model.encoder.layers):
            x = x + layer.self_attn(layer.layer_norm1(x))[0]
            if index in stays:
                left = [-1, *stays[index]]
                x, there = x[:, [there.index(patch) for patch in left]], left
            x = x + layer.mlp(layer.layer_norm2(x))
        found = stock.vision_model.post_layernorm(x)
    assert found.shape == wanted.shape == (1, 11, 72)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_clip_keeps_one_token_for_all_that_left_and_its_words_leave_out_what_stands_around_them(made):
    images, words = sample_of(made("clip"), keeping(made("clip").plan, {"vision": {1: 24, 3: 11}, "language": {0: 6}})).streams
    assert [(len(kept.kept), kept.merged) for kept in images.layers] == [(22, 1), (9, 1)]  # and [CLS]
    assert set(images.layers[1].kept) < set(images.layers[0].kept)
    assert words.words == tuple(TEXT.split()) and all(kept.merged == 0 for kept in words.layers)


@pytest.mark.parametrize("name", ["siglip", "blip-contrastive", "blip-caption", "blip-vqa", "clip-vision", "clip-text"])
def test_every_shape_of_encoder_says_what_stays(name, made):
    dense = made(name)
    prunable = {stream for stream, (_, one) in dense.family.streams.items() if one.prunable}
    sample = sample_of(
        dense, keeping(dense.plan, {stream: {1: 6} for stream in prunable}), Pair(picture(), TEXT, answers=("red",))
    )
    assert {stream.stream for stream in sample.streams} == prunable
    for stream in sample.streams:
        (kept,) = stream.layers
        assert kept.layer == 1 and 0 < len(kept.kept) <= 6 and set(kept.kept) <= set(range(stream.tokens))
    assert (sample.said is None) == (name in ("clip-vision", "clip-text"))
    assert (sample.text == "") == (name in ("blip-caption", "clip-vision"))


def test_a_model_that_drops_nothing_shows_nothing(made):
    dense = made("siglip")
    assert kept_samples(dense.runtime(dense.plan), runs_of(dense), [Pair(picture(), TEXT)]) == ((), ())


def test_a_picture_is_what_the_model_sees(made):
    """CLIP's processor cuts the sides of a wide picture away."""
    dense = made("clip")
    broad = Image.new("RGB", (144, 48), (200, 0, 0))
    broad.paste(picture(), (48, 0))
    _, seen = kept_sample(dense.runtime(keeping(dense.plan)), runs_of(dense), Pair(broad, TEXT))
    assert seen.size == (48, 48) and seen.tobytes() == picture().tobytes()


# Decoders ----------------------------------------------------------------------------------------------------------------


def test_dropping_these_image_tokens_of_a_decoder_by_hand_makes_the_same_logits(made):
    """The stock language model, fed without the tokens that left before its first layer."""
    dense = made("llava")
    plan = replace(dense.plan, stages=(TokenStage(0, "cls-clusters", keep=11),))
    model, pair = dense.runtime(plan), Pair(picture(24), "red", answers=("blue",))
    (stream,) = kept_sample(model, runs_of(dense), pair)[0].streams
    assert (stream.at, stream.grid, stream.tokens, stream.tower) == ("before", (6, 6), 36, "language")
    (kept,) = stream.layers
    assert (kept.layer, len(kept.kept)) == (0, 11)
    inputs = {name: value for name, value in dense.collate_whole([pair]).inputs.items() if name != "labels"}
    inner = dense.runtime(dense.plan)
    with torch.inference_mode():
        ids = inputs["input_ids"][0]
        features = inner.model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output[0]
        states = inner.model.language_model.embed_tokens(ids).clone()
        states[ids == tiny.IMAGE] = features
        places = (ids == tiny.IMAGE).nonzero().flatten()
        gone = {int(places[index]) for index in range(36) if index not in kept.kept}
        left = [place for place in range(len(ids)) if place not in gone]
        run = inner.model.language_model(inputs_embeds=states[None, left], position_ids=torch.tensor([left]))
        wanted, found = model(**inputs).logits[0, -1], inner.lm_head(run.last_hidden_state)[0, -1]
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "grid", "tokens"),
    [("llava-next", None, 180), ("qwen2.5-vl", (4, 6), 24), ("internvl", (4, 4), 16), ("paligemma", (6, 6), 36)],
)
def test_the_raster_of_every_way_that_pictures_go_in(name, grid, tokens, made):
    dense = made(name)
    plan = replace(dense.plan, stages=(TokenStage(1, "random", share=0.5), TokenStage(3, "random", share=0.25)))
    pair = Pair(picture(48).resize((48, 32)) if name == "qwen2.5-vl" else picture(48), "red", answers=("blue",))
    (stream,) = kept_sample(dense.runtime(plan), runs_of(dense), pair)[0].streams
    assert (stream.grid, stream.tokens) == (grid, tokens)
    assert [(kept.layer, len(kept.kept)) for kept in stream.layers] == [(1, tokens // 2), (3, tokens // 4)]
    assert set(stream.layers[1].kept) < set(stream.layers[0].kept) < set(range(tokens))


def test_tokens_that_stand_for_several_say_for_how_many(made):
    dense = made("llava")
    plan = replace(dense.plan, stages=(TokenStage(0, "cover", keep=9),))
    (stream,) = kept_sample(dense.runtime(plan), runs_of(dense), Pair(picture(24), "red", answers=("blue",)))[0].streams
    assert len(stream.layers[0].stands_for) == 9 and sum(stream.layers[0].stands_for) == 36


# The folder --------------------------------------------------------------------------------------------------------------


def test_a_folder_holds_the_picture_and_another_run_draws_the_same_bytes(compact_folder, tmp_path):
    document = json.loads((compact_folder / "comp_report.json").read_text())
    assert "tokens.png" in document["files"] and len(document["kept_samples"]) == 4
    report = comp_cli.analyze(compact_folder)
    assert report.to_json()["kept_samples"] == document["kept_samples"]
    write_beside_weights(report.kept_samples, report.pictures, tmp_path)
    drawn = (tmp_path / "tokens.png").read_bytes()
    assert drawn == (compact_folder / "tokens.png").read_bytes() and len(drawn) < 100_000


def test_a_folder_never_shows_the_pictures_of_the_user(made, tmp_path):
    data = tiny.table(tmp_path, question=lambda n: "a red circle", answer=lambda n: "red")
    source = made("llava").source.folder
    report = comp_cli.prune(source, method="vitcop", tokens=9, output=tmp_path / "out", data=data, eval_samples=4, device="cpu")
    assert (tmp_path / "out" / "tokens.png").is_file() and len(report.kept_samples) == 4
    assert "a red circle" not in {sample.text for sample in report.kept_samples}
    own = comp_cli.analyze(tmp_path / "out", data=data, device="cpu")
    assert {sample.text for sample in own.kept_samples} == {"a red circle"} and own.samples == 4
    assert all(seen.getpixel((0, 0))[2] in range(95, 104) for seen in own.pictures)  # the table's pictures, each once
    assert len({seen.getpixel((0, 0))[0] for seen in own.pictures}) == 4


def test_where_no_weight_is_loaded_nothing_is_drawn(made, tmp_path):
    report = comp_cli.prune(made("llava").source.folder, method="vitcop", tokens=9, output=tmp_path / "out")
    assert report.kept_samples == () and not (tmp_path / "out" / "tokens.png").exists()


# comp analyze of a compact folder ----------------------------------------------------------------------------------------


def same_figures(folder, report):
    """What is read from config.json is what comp prune counted."""
    told, found = json.loads((folder / "comp_report.json").read_text()), report.compact
    assert (found.flops.dense, found.flops.compact) == (told["flops"]["dense"], told["flops"]["compact"])
    assert (found.params.dense, found.params.compact) == (told["params"]["dense"], told["params"]["compact"])
    assert found.ratio == told["ratio"] and found.method == told["options"]["method"]
    for row, wanted in zip(found.layers, told["layers"], strict=True):
        assert (row.heads, row.cross_heads, row.ffn) == (wanted["heads"], wanted["cross_heads"], wanted["ffn"])
        assert row.flops.compact == wanted["flops"]
    for side in ("dense", "compact"):
        for kind in ("flops", "params"):
            assert sum(getattr(getattr(part, kind), side) for part in found.parts) == getattr(getattr(found, kind), side)


def test_the_layers_of_a_compact_model_beside_the_dense_ones(compact_folder, clip):
    for folder in (compact_folder, clip[0]):
        report = comp_cli.analyze(folder)
        same_figures(folder, report)
        assert report.flops.total == report.compact.flops.compact
        told = json.loads((folder / "comp_report.json").read_text())
        assert [row.tokens for row in report.compact.layers] == [row["tokens"] for row in told["layers"]]


def test_the_layers_of_a_decoder_that_tokens_leave(made, tmp_path):
    comp_cli.prune(made("llava").source.folder, method="vitcop", tokens=9, output=tmp_path / "out")
    report = comp_cli.analyze(tmp_path / "out", device="cpu")
    same_figures(tmp_path / "out", report)
    stages = {stage.layer: stage.kept for stage in report.compact.stages}
    text = report.reference.tokens["language"]
    tokens, left = [], 36
    for layer in range(5):
        left = stages.get(layer, left)
        tokens.append([left + text, 36 + text])
    assert [row.tokens for row in report.compact.layers if row.tower == "language"] == tokens
    assert len(report.kept_samples) == 4


def test_a_folder_of_graphs_is_refused(clip):
    with pytest.raises(RefusedError, match="ONNX graphs"):
        comp_cli.analyze(clip[1])


def test_people_read_it_at_80_columns(compact_folder, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    said = CliRunner().invoke(app, ["analyze", str(compact_folder)]).stdout
    told = json.loads((compact_folder / "comp_report.json").read_text())["layers"]
    kept, dense = next(row["ffn"] for row in told if row["ffn"][0] != row["ffn"][1])
    assert f"{dense} -> {kept}" in said and "Layers of the vision tower" in said
    assert max(len(line) for line in said.splitlines() if line[:1] in "┏┃┡│└") <= 80


@pytest.mark.parametrize("name", ["blip", "clip", "llava", "qwen2.5-vl"])
def test_the_block_of_config_json_says_the_numbers_of_its_plan(name, made):
    dense = made(name)
    plan = dense.plan if dense.family.topology.drops_in == "decoder" else keeping(dense.plan)
    for tower in dense.plan.towers:
        units = {"attention": (0, 1), "ffn": range(3, 40)}
        for part in units.keys() & tower.layers[1].parts.keys():
            plan = plan.with_layer(tower.name, 1, plan.tower(tower.name).layers[1].keeping(part, tuple(units[part])))
    if dense.family.topology.drops_in == "decoder":
        stages = (TokenStage(1, "random", share=0.5, settings={"seed": 3}),)
        plan = replace(plan if name == "llava" else dense.plan, stages=stages)
    plan = plan.told_apart(dense.plan)  # which adds channels of zeros where tokens alone leave
    block = json.loads(json.dumps(plan.comp_block(dense.family, dense.hf_config.to_dict())))
    found = Plan.from_block(block, dense.plan)
    assert found.streams == plan.streams and found.stages == plan.stages
    for tower, wanted in zip(found.towers, plan.towers, strict=True):
        for layer, other in zip(tower.layers, wanted.layers, strict=True):
            assert {part: len(layer.kept(part)) for part in layer.parts} == {
                part: len(other.kept(part)) for part in other.parts
            }
            assert (layer.keep, layer.padding) == (other.keep, other.padding)
    counted = (flops.count(each, dense.reference).total for each in (found, plan))
    assert len(set(counted)) == 1


# Pictures ----------------------------------------------------------------------------------------------------------------


def test_what_left_is_dark_and_what_stayed_is_as_it_was():
    plain = Image.new("RGB", (96, 96), (10, 200, 90))
    stream = StreamKept("vision", "vision", "image", "behind", 2, 16, (4, 4), None, (kept := KeptAt(1, (0, 6, 15)),))
    cell = dimmed(plain, stream, kept)
    for patch in range(16):
        row, column = divmod(patch, 4)
        seen = cell.getpixel((column * 28 + 14, row * 28 + 14))
        assert (seen == (10, 200, 90)) == (patch in (0, 6, 15))
        assert patch in (0, 6, 15) or max(abs(a - b) for a, b in zip(seen, DARK, strict=True)) < 40


def test_texts_alone_are_drawn_as_well():
    words = ("a", "red", "circle")
    stream = StreamKept("language", "language", "text", "behind", 2, 3, None, words, (KeptAt(0, (1,)),))
    drawn = token_picture([SampleKept("a red circle", (stream,))], [None])
    assert drawn.width > 100 and len(drawn.getcolors(1 << 20)) > 2


def test_a_picture_is_written_where_it_may_be(compact_folder, tiny_folder, tmp_path):
    place = tmp_path / "seen.png"
    comp_cli.analyze(compact_folder, png=place)
    assert Image.open(place).size > (100, 100)
    comp_cli.analyze(tiny_folder, png=place, **FEW)  # which comp drew, and may replace
    assert Image.open(place).size > (100, 100)
    for name, text in (
        ("seen.jpg", "ends in .png"),
        ("no/seen.png", "no such folder"),
        ("mine.png", "no picture that comp drew"),
    ):
        (tmp_path / "mine.png").write_bytes(b"mine")
        with pytest.raises(UsageError, match=text):
            comp_cli.analyze(tiny_folder, png=tmp_path / name, **FEW)


# Importance --------------------------------------------------------------------------------------------------------------


def test_importance_is_what_the_inequality_is_made_of(tiny_folder):
    report = comp_cli.analyze(tiny_folder, **FEW)
    rows = {(row.tower, row.layer): row for row in report.inequality}
    for one in report.importance:
        values = torch.tensor(one.values, dtype=torch.double)
        assert one.units == {"ffn": 200}.get(one.part, 6) and len(values) == min(32, one.units)
        if one.part == "ffn":
            sizes = torch.tensor([7] * 8 + [6] * 24)  # 200 in 32 groups
            assert float((values * sizes).sum() / 200) == pytest.approx(1, abs=1e-3)
            assert torch.equal(values, values.sort(descending=True).values)
        else:
            assert float(values.mean()) == pytest.approx(1, abs=1e-3)
            uneven = float((values[:, None] - values).abs().mean() / 2 / values.mean())  # Gini, from pairs
            assert uneven == pytest.approx(getattr(rows[one.tower, one.layer], one.part), abs=1e-3)
    grids = {(one.stream, one.grid) for one in report.token_importance}
    assert grids == {("vision", (6, 6)), ("language", None)}
    images = [one for one in report.token_importance if one.stream == "vision"]
    assert len(images) == 5 and all(sum(one.values) / 36 == pytest.approx(1, abs=1e-3) for one in images)
    drawn = heat_map(report.importance, report.token_importance)
    assert drawn.width > 300 and drawn.height > 300


def test_mean_scores_of_patches_are_those_of_eager_attention(stock, tiny_folder):
    """Of the first layer, by hand: what each patch receives of all queries but [CLS], the maximum over heads."""
    dense = opened(tiny_folder)
    report = comp_cli.analyze(tiny_folder, score_rows=0, **FEW)
    from comp_cli.models.pairs import generated_pairs

    pairs = generated_pairs(dense.task, labelled=False).read("calibration", 4)
    pixels = torch.stack([dense.collate.seen(pair).image for pair in pairs])
    with torch.inference_mode():
        layer, x = stock.vision_model.encoder.layers[0], stock.vision_model.embeddings(pixels)
        q, k, _ = layer.self_attn.qkv(layer.layer_norm1(x)).unflatten(-1, (3, 6, 12)).permute(2, 0, 3, 1, 4)
        received = F.softmax(q @ k.transpose(-1, -2) / 12**0.5, -1).amax(1)[:, 1:].sum(1)[:, 1:]
    wanted = (36 * received / received.sum(1, keepdim=True)).mean(0)
    found = next(one for one in report.token_importance if (one.stream, one.layer) == ("vision", 0))
    torch.testing.assert_close(torch.tensor(found.values), wanted, atol=2e-4, rtol=1e-3)
