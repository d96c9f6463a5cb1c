"""People's pictures: as transformers' `load_image` shows them, or a counted bad row; never white, never memory without end.

What is right comes from Pillow and from transformers.
"""

import io
import json
import os
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, features
from transformers.image_utils import load_image

from comp_cli.data.cells import BadRow
from comp_cli.data.pictures import FORMATS, MOST_PIXELS, decode, formats
from comp_cli.data.rows import Pair

SIZE = (12, 8)


def colourful(mode: str = "RGB", size: tuple[int, int] = SIZE) -> Image.Image:
    """A picture whose four corners differ."""
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[..., 0] = np.linspace(0, 250, size[0])
    pixels[..., 1] = np.linspace(0, 200, size[1])[:, None]
    pixels[0, 0] = 255
    return Image.fromarray(pixels).convert(mode)


def saved(image: Image.Image, form: str, **options) -> bytes:
    image.save(content := io.BytesIO(), form, **options)
    return content.getvalue()


def with_alpha(mode: str = "RGBA") -> Image.Image:
    image = colourful("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(SIZE))
    return image.convert(mode)


def oriented(number: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = number
    return saved(colourful(), "JPEG", exif=exif)


def animated(form: str) -> bytes:
    frames = [colourful(), colourful().rotate(180)]
    return saved(frames[0], form, save_all=True, append_images=frames[1:])


def grey_alpha_palette() -> bytes:
    return saved(colourful("P"), "PNG", transparency=0)


def rgb16() -> bytes:
    """A PNG with 16 bits for each of three channels, which Pillow reads the upper 8 of and does not write."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")

    header = SIZE[0].to_bytes(4, "big") + SIZE[1].to_bytes(4, "big") + bytes([16, 2, 0, 0, 0])
    row = b"\0" + b"\x80\x11\x20\x22\xff\xff" * SIZE[0]
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row * SIZE[1])) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


SHOWN = {
    "png": lambda: saved(colourful(), "PNG"),
    "jpeg": lambda: saved(colourful(), "JPEG"),
    "grey": lambda: saved(colourful("L"), "PNG"),
    "black and white": lambda: saved(colourful("1"), "PNG"),
    "palette": lambda: saved(colourful("P"), "PNG"),
    "palette with a transparent colour": grey_alpha_palette,
    "alpha": lambda: saved(with_alpha(), "PNG"),
    "grey with alpha": lambda: saved(with_alpha("LA"), "PNG"),
    "cmyk": lambda: saved(colourful("CMYK"), "JPEG"),
    "cmyk tiff": lambda: saved(colourful("CMYK"), "TIFF"),
    "ycbcr tiff": lambda: saved(colourful("YCbCr"), "TIFF"),
    "16 bits of each colour": rgb16,
    "gif": lambda: animated("GIF"),
    "apng": lambda: animated("PNG"),
    "webp": lambda: animated("WEBP"),
    "tiff of pages": lambda: animated("TIFF"),
    "bmp": lambda: saved(colourful(), "BMP"),
    "ppm": lambda: saved(colourful(), "PPM"),
    "colour profile": lambda: saved(colourful(), "PNG", icc_profile=b"none"),
    **{f"orientation {number}": (lambda number=number: oriented(number)) for number in range(1, 9)},
}


@pytest.mark.parametrize("name", SHOWN)
def test_pictures_are_shown_as_transformers_shows_them(name, tmp_path):
    content = SHOWN[name]()
    (tmp_path / "picture").write_bytes(content)
    expected = load_image(str(tmp_path / "picture"))
    found = decode(content)
    assert found.mode == "RGB" and found.size == expected.size and found.tobytes() == expected.tobytes()


def test_a_picture_is_upright_and_the_first_of_several():
    """By hand: orientation 6 is a quarter turn, and the first frame has its white pixel in the upper left corner."""
    assert decode(oriented(6)).size == SIZE[::-1]
    assert decode(animated("PNG")).getpixel((0, 0)) == (255, 255, 255)


def numbers(dtype, mode=None) -> Image.Image:
    return Image.fromarray((np.asarray(colourful("L")).astype(dtype) * (257 if dtype != np.float32 else 1 / 255)).astype(dtype))


DEEP = {
    "16 bits": lambda: saved(numbers(np.uint16), "PNG"),
    "16 bits, tiff": lambda: saved(numbers(np.uint16), "TIFF"),
    "16 bits, the other way round": lambda: saved(Image.frombytes("I;16B", (2, 1), b"\1\2\3\4"), "TIFF"),
    "32 bits": lambda: saved(numbers(np.int32), "TIFF"),
    "float": lambda: saved(numbers(np.float32), "TIFF"),
    "16 bits, pgm": lambda: b"P5 2 1 65535\n\x80\x00\xff\xff",
}


@pytest.mark.parametrize("name", DEEP)
def test_grey_pictures_of_more_than_8_bits_are_bad_rows(name):
    """Pillow clips them at 255, to white (or black), and what else they mean only their owner knows."""
    with pytest.raises(BadRow, match="grey image of more than 8 bits: name.png"):
        decode(DEEP[name](), "name.png")


def png_of(width: int, height: int) -> bytes:
    return saved(Image.new("1", (width, height)), "PNG")


@pytest.mark.parametrize(
    ("size", "problem"),
    [
        ((20_000, 1), "100 times as long as wide"),
        ((1, 101), "100 times as long as wide"),
        ((13_000, 13_000), "50 million pixels"),
        ((20_000, 20_000), "50 million pixels"),  # which Pillow refuses as well
        ((7_072, 7_072), "50 million pixels"),
    ],
)
def test_absurd_sizes_are_bad_rows_before_they_are_decoded(size, problem, monkeypatch):
    content = png_of(*size)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(BadRow, match=problem):
        decode(content)


def test_large_and_long_pictures_that_are_taken():
    assert 8160 * 6120 <= MOST_PIXELS  # of a telephone
    assert decode(png_of(100, 1)).size == (100, 1)


JPEG = saved(colourful(size=(64, 64)), "JPEG")
BROKEN = {
    "nothing": b"",
    "page": b"<html><body>Not found</body></html>",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
    "pdf": b"%PDF-1.4\n1 0 obj\n",
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(a) run\n%%EOF\n",
    "cut": JPEG[: len(JPEG) // 2],
    "only a header": JPEG[:20],
    "noise": bytes(range(256)) * 4,
    "icon": saved(colourful(size=(16, 16)), "ICO"),
    "cut png": saved(colourful(), "PNG")[:60],
    "bomb of text": saved(colourful(), "PNG")[:33] + b"\0\0\0\0zTXt" + b"\0" * 9,
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_picture_is_a_bad_row(name):
    with pytest.raises(BadRow, match="image that cannot be read"):
        decode(BROKEN[name])


def test_no_other_program_is_asked_to_open_a_picture():
    """Pillow would give PostScript to Ghostscript."""
    assert set(formats()) <= set(FORMATS) and not {"EPS", "WMF", "ICNS", "PSD", "MPEG"} & set(formats())
    assert {"PNG", "JPEG", "GIF", "TIFF", "BMP"} <= set(formats()) and ("WEBP" in formats()) == features.check("webp")


def test_a_batch_is_what_the_processor_makes_of_all_at_once(dense):
    """Pictures are processed one by one, so that one at a time is in memory: the same numbers."""
    images = [colourful(size=size) for size in ((48, 48), (300, 200), (31, 77))]
    pairs = [Pair(image, "a red circle") for image in images]
    expected = dense.processor(images=images, text=["a red circle"] * 3, return_tensors="pt", padding=True)
    (batch,) = dense.collate.batches(pairs, 8)
    assert torch.equal(batch.inputs["pixel_values"], expected["pixel_values"])
    assert torch.equal(batch.inputs["input_ids"], expected["input_ids"])
    assert torch.equal(dense.collate(pairs).inputs["pixel_values"], expected["pixel_values"])


PEAK = """
import resource, sys
from comp_cli.data.sources import open_pairs
from comp_cli.cli.output import Output
from comp_cli.models.dense import open_dense

dense = open_dense(sys.argv[1], Output("quiet"))
pairs = open_pairs(sys.argv[2], progress=Output("quiet"))
list(dense.collate.batches(pairs.read("calibration", 2), 32))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = sum(batch.samples for batch in dense.collate.batches(pairs.read("calibration"), 32))
print(found, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_of_large_photos_one_at_a_time_is_in_memory(tiny_folder, tmp_path):
    """Twelve of 12 million pixels, 36 MB each when decoded, in one batch: less than four more than for the first two."""
    rows = []
    for number in range(12):
        Image.new("RGB", (4000, 3000), (20 * number, 0, 0)).save(tmp_path / f"{number}.jpg", quality=50)
        rows.append(json.dumps({"image": f"{number}.jpg", "text": "a red circle"}))
    (tmp_path / "pairs.jsonl").write_text("\n".join(rows))
    command = [sys.executable, "-c", PEAK, tiny_folder, tmp_path / "pairs.jsonl"]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found, more = map(int, done.stdout.split())
    assert found > 6 and more < 4 * 36
