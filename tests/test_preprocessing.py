"""Pictures prepared inside of graphs, against what transformers' processors make of them with Pillow."""

import numpy as np
import onnx
import onnxruntime
import pytest
import tiny
import torch
from onnx import TensorProto, helper
from PIL import Image
from test_recipes import BARRED, blocks, draw_pictures, expected, run_blocks, write_compact
from transformers.image_utils import load_image
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

import comp_cli
from comp_cli.checkpoint.loading import load_processor
from comp_cli.cli.output import Output
from comp_cli.commands import export
from comp_cli.data.preparation import NotKnownError, Preparation, preparation_of
from comp_cli.errors import RefusedError, UsageError
from comp_cli.files.store import read_json
from comp_cli.onnx import parity, preprocessing
from comp_cli.onnx.sessions import open_session
from comp_cli.options import ExportOptions
from comp_cli.report import card_code

QUIET = Output("quiet")
SQUARE = {"height": 48, "width": 48}
SIZES = [(48, 48), (151, 53), (53, 151), (31, 23), (23, 31), (640, 480), (97, 48), (3, 300), (300, 3), (1, 1), (49, 47)]


def graph_of(preparation, folder):
    """A graph that hands out the pixels that it makes."""
    shape = ["images", 3, *preparation.shape]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("pixel_values", "made")]
    graph = helper.make_graph([helper.make_node("Identity", ["pixel_values"], ["made"])], "one", values[:1], values[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), folder / "one.onnx")
    preprocessing.prepend(folder / "one.onnx", preparation)
    onnx.checker.check_model(onnx.load(folder / "one.onnx"), full_check=True)
    return open_session(folder / "one.onnx")


def noise(size, count=1):
    """Pictures (count, height, width, 3): nothing is harder to resize than noise."""
    return np.random.default_rng(sum(size)).integers(0, 256, (count, size[1], size[0], 3), dtype=np.uint8)


def grey_levels(found, right, processor):
    """Differences of pixels, in steps of the 256 grey levels."""
    std = np.reshape(processor.image_std, (-1, 1, 1)) if processor.do_normalize else 1
    factor = processor.rescale_factor if processor.do_rescale else 1
    return np.abs(found - right) * std / factor


@pytest.mark.parametrize(
    "processor",
    [
        CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size=SQUARE),
        CLIPImageProcessorPil(size={"shortest_edge": 61}, crop_size={"height": 48, "width": 47}),
        CLIPImageProcessorPil(size={"shortest_edge": 40}, crop_size=SQUARE),  # too short: black around it
        CLIPImageProcessorPil(size={"shortest_edge": 41}, crop_size=SQUARE, resample=2),
        CLIPImageProcessorPil(size={"height": 60, "width": 30}, crop_size=SQUARE),
        CLIPImageProcessorPil(do_resize=False, crop_size=SQUARE),
        BlipImageProcessorPil(size=SQUARE),
        BlipImageProcessorPil(size=SQUARE, do_normalize=False),
        SiglipImageProcessorPil(size=SQUARE, resample=3),
        SiglipImageProcessorPil(size=SQUARE, resample=2),
        SiglipImageProcessorPil(size=SQUARE, resample=1),
        SiglipImageProcessorPil(size=SQUARE, do_rescale=False, image_mean=[9, 8, 7], image_std=[1, 2, 3]),
    ],
)
def test_pixels_are_those_of_the_processor(processor, tmp_path):
    """To a grey level in a few of them, on noise that grows, shrinks, or both. Two pictures at once."""
    session, wrong, seen = graph_of(preparation_of(processor), tmp_path), 0, 0
    for size in SIZES:
        pictures = noise(size, count=2)
        right = processor([Image.fromarray(one) for one in pictures], return_tensors="np")["pixel_values"]
        (found,) = session.run(None, {"image": pictures})
        assert found.shape == right.shape and found.dtype == np.float32
        levels = grey_levels(found, right, processor)
        assert levels.max() < 1.01, size
        wrong, seen = wrong + (levels > 0.5).sum(), seen + levels.size
    exact_halves = processor.resample == 2  # which bilinear makes many of; Pillow's weights of 22 bits decide them
    assert wrong / seen < (3e-2 if exact_halves else 5e-4)


def test_large_pictures_shrink_smoothly(tmp_path):
    processor = SiglipImageProcessorPil(size=SQUARE, resample=3)
    picture = noise((2000, 1501))
    right = processor(Image.fromarray(picture[0]), return_tensors="np")["pixel_values"]
    (found,) = graph_of(preparation_of(processor), tmp_path).run(None, {"image": picture})
    assert grey_levels(found, right, processor).max() < 1.01


def test_what_it_is_compared_with_can_tell():
    """The same pictures without smoothing are many grey levels off."""
    picture = Image.fromarray(noise((151, 53))[0])
    smooth, rough = (np.asarray(picture.resize((48, 48), how), float) for how in (Image.BICUBIC, Image.NEAREST))
    assert np.abs(smooth - rough).max() > 50


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"do_pad": True}, "pads pictures"),
        ({"size": {"shortest_edge": 48, "longest_edge": 60}}, "resizes to {.*'longest_edge': 60.*}"),
        ({"do_center_crop": False}, "resizes to {'shortest_edge': 224} and does not crop"),
        ({"do_resize": False, "do_center_crop": False}, "leaves pictures in their own sizes"),
        ({"resample": 0}, "resizes with the filter nearest"),
        ({"resample": 4}, "resizes with the filter box"),
        ({"resample": 5}, "resizes with the filter hamming"),
    ],
)
def test_what_graphs_cannot_do_is_named(settings, said):
    with pytest.raises(NotKnownError, match=said):
        preprocessing.check(preparation_of(CLIPImageProcessorPil(**settings)))


def test_a_filter_that_is_not_used_is_no_reason():
    preprocessing.check(preparation_of(CLIPImageProcessorPil(do_resize=False, crop_size=SQUARE, resample=0)))


def test_graphs_without_pixels_stay_as_they_are(tmp_path):
    values = [helper.make_tensor_value_info(name, TensorProto.INT64, ["texts"]) for name in ("input_ids", "made")]
    graph = helper.make_graph([helper.make_node("Identity", ["input_ids"], ["made"])], "one", values[:1], values[1:])
    onnx.save(helper.make_model(graph), tmp_path / "text.onnx")
    before = (tmp_path / "text.onnx").read_bytes()
    preprocessing.prepend(tmp_path / "text.onnx", Preparation((8, 8), None, Image.BICUBIC, None, None, None, None))
    assert (tmp_path / "text.onnx").read_bytes() == before


# Whole exports -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return draw_pictures(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def blip(tmp_path_factory):
    """A compact model, and its graphs that take pictures."""
    place = tmp_path_factory.mktemp("blip")
    written = write_compact("blip", place)
    report = export.export(written.folder, place / "onnx", ExportOptions(with_preprocessing=True), QUIET)
    return written, place / "onnx", report


def test_scores_of_pictures_are_those_of_processor_and_torch(blip):
    written, folder, report = blip
    assert report.passed and report.with_preprocessing and read_json(folder / "export.json")["with_preprocessing"]
    assert report.graphs["model.onnx"].inputs["image"].shape == ["batch", "height", "width", 3]
    session, processor = open_session(folder / "model.onnx"), load_processor(written.folder)
    text = processor.tokenizer(["a red circle"], return_tensors="np")
    for size in SIZES:
        picture = noise(size)
        given = {"image": picture} | {name: text[name] for name in ("input_ids", "attention_mask")}
        (found,) = session.run(["itm_score"], given)
        inputs = processor(images=Image.fromarray(picture[0]), text=["a red circle"], return_tensors="pt")
        with torch.no_grad():
            np.testing.assert_allclose(found, written.model(**inputs).itm_score.numpy(), atol=parity.GREY)


def test_a_graph_that_prepares_pictures_otherwise_is_refused(blip, tmp_path, monkeypatch):
    """The gate sees the whole way: with the pixels of another filter nothing is written."""
    written, _, _ = blip
    monkeypatch.setitem(preprocessing.FILTERS, Image.Resampling.BICUBIC, 1)  # the cubic is cut off
    with pytest.raises(comp_cli.CompError, match="differs from PyTorch"):
        export.export(written.folder, tmp_path / "onnx", ExportOptions(with_preprocessing=True), QUIET)
    assert not (tmp_path / "onnx").exists()


def test_what_cannot_be_is_refused_before_the_export(blip, tmp_path):
    written, _, _ = blip
    clip = tiny.write("clip-text", tmp_path / "text")
    for folder, options, error, said in (
        (written.folder, {"layout": "transformers.js"}, UsageError, "transformers.js prepares pictures itself"),
        (clip, {}, UsageError, "CLIPTextModelWithProjection reads no images"),
    ):
        with pytest.raises(error, match=said):
            export.export(folder, tmp_path / "x", ExportOptions(with_preprocessing=True, **options), QUIET)
    settings = written.folder / "processor_config.json"
    kept = settings.read_text()
    settings.write_text(kept.replace('"resample": 3', '"resample": 0'))
    try:
        with pytest.raises(RefusedError, match="its BlipImageProcessorPil resizes with the filter nearest, which"):
            export.export(written.folder, tmp_path / "x", ExportOptions(with_preprocessing=True), QUIET)
    finally:
        settings.write_text(kept)


def test_the_recipe_says_what_torch_says(blip, photos, tmp_path):
    """A turned photo, a wide picture, and one with alpha, with nothing but what the card promises."""
    written, folder, _ = blip
    (code,) = blocks(folder)
    for found, picture in zip(run_blocks([(folder, code)], photos, BARRED, tmp_path), photos, strict=True):
        np.testing.assert_allclose(found["scores"], expected(written, picture)["scores"], atol=parity.GREY)


def test_a_card_that_cannot_write_it_out_asks_the_processor(blip, photos, monkeypatch):
    """Pixels and tokens by transformers, in the same code."""
    written, folder, report = blip
    family, processor = written.dense.family, load_processor(written.folder)
    monkeypatch.setattr(card_code, "pixels_of", lambda images: None)
    monkeypatch.setattr(card_code, "tokens_of", lambda *given: None)
    document = report.to_json() | {"with_preprocessing": False}
    code = card_code.for_graphs(document, None, family, written.dense.task, processor, folder, 24)
    monkeypatch.chdir(folder)
    names = {}
    exec(code.removeprefix("```python\n").partition("\ntexts = ")[0], names)
    right = processor(images=load_image(str(photos[1])), text=["a red circle", "a"], padding=True, return_tensors="np")
    np.testing.assert_allclose(names["pixels"](photos[1]), right["pixel_values"], atol=1e-6)
    assert names["tokens"](["a red circle", "a"])["input_ids"].tolist() == right["input_ids"].tolist()


def test_captions_of_pictures_and_generate_which_hands_none_over(photos, tmp_path):
    written = write_compact("blip-caption", tmp_path)
    export.export(written.folder, tmp_path / "onnx", ExportOptions(with_preprocessing=True), QUIET)
    code = blocks(tmp_path / "onnx")[0]
    (found,) = run_blocks([(tmp_path / "onnx", code)], photos[:1], BARRED, tmp_path)
    assert found["said"] == expected(written, photos[0])["said"]
    with pytest.raises(RefusedError, match="its graphs prepare pictures themselves"):
        comp_cli.load_onnx(tmp_path / "onnx")
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "encoder_model.onnx")
    assert [value.name for value in session.get_inputs()] == ["image"]
