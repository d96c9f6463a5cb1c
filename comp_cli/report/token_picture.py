"""Pictures of what stays: sample images with the patches that left dimmed, and the words of their texts; and heat maps of
importance. Drawn by Pillow alone; the same report makes the same bytes."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from ..errors import UsageError
from ..files.outputs import atomic_file, check_replaced
from .samples import KeptAt, LayerImportance, Picture, SampleKept, StreamKept, TokenImportance

PICTURE = "tokens.png"  # beside weights, which tokens of samples stay
MARK = b"drawn by comp"  # in pictures that comp drew, which it may replace
CELL, GAP, LINE, LEFT = 112, 8, 15, 8  # pixels: a picture, between two, a line of text, the margin
MOST = 6  # layers that are drawn of a sample; of more these, evenly
PAPER, INK, FAINT, DARK = (255, 255, 255), (20, 20, 20), (170, 170, 170), (24, 24, 32)
COLD, WARM = (238, 243, 250), (178, 24, 43)
DIMMED = 0.82  # how far a patch that left goes towards DARK

Colour = tuple[int, int, int]


def check_picture(path: Path, option: str = "--png") -> None:
    """Raises UsageError where a picture could not be written in the end."""
    if path.suffix.lower() != ".png":
        raise UsageError(f"{option} {path}: expected a name that ends in .png.")
    check_replaced(path, option, "picture that comp drew", lambda there: MARK in there.read_bytes())


def write(image: Image.Image, path: Path, colours: int = 256) -> None:
    """A PNG of so many colours: some tens of kilobytes."""
    note = PngInfo()
    note.add_text("Software", MARK.decode())
    with atomic_file(path) as partial:
        image.quantize(colours).save(partial, "PNG", optimize=True, pnginfo=note)


def write_beside_weights(samples: Sequence[SampleKept], pictures: Sequence[Picture], folder: Path) -> None:
    """The picture of a compact folder, where tokens leave."""
    if samples:
        write(token_picture(samples, pictures), folder / PICTURE, colours=64)


# Tokens ------------------------------------------------------------------------------------------------------------------


def token_picture(samples: Sequence[SampleKept], pictures: Sequence[Picture]) -> Image.Image:
    """Samples one below the other: the image, beside it what is left of it at layers where tokens leave, below it the words."""
    blocks = [Block(sample, picture) for sample, picture in zip(samples, pictures, strict=True)]
    width = max(block.width for block in blocks) + 2 * LEFT
    sheet = Image.new("RGB", (width, sum(block.height + GAP for block in blocks) + LEFT + LINE + GAP), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((LEFT, LEFT), "Dimmed patches and struck-out words have left.", INK, _font())
    top = LEFT + LINE + GAP
    for block in blocks:
        block.draw(sheet, pen, top)
        top += block.height + GAP
    return sheet


class Block:
    """A sample in the picture."""

    def __init__(self, sample: SampleKept, picture: Picture):
        self.sample, self.picture = sample, picture
        self.images = [stream for stream in sample.streams if stream.kind == "image"]
        self.shown = [(stream, kept) for stream in self.images for kept in evenly(stream.layers)]
        self.lines = [(stream, kept) for stream in sample.streams if stream.words for kept in evenly(stream.layers)]
        columns = 1 + len(self.shown) if picture is not None else 0
        self.width = max(columns * (CELL + GAP), 4 * (CELL + GAP))
        self.captions = [text for text in (sample.text and f'"{sample.text}"', sample.said and f"-> {sample.said}") if text]
        self.height = (CELL + 2 * LINE if columns else 0) + LINE * (len(self.captions) + len(self.lines))

    def draw(self, sheet: Image.Image, pen: Any, top: int) -> None:
        if self.picture is not None:
            total = self.images[0].tokens if self.images else 0
            cells = [("as the model sees it", f"{total} patches" if total else "", fitted(self.picture))]
            for stream, kept in self.shown:
                many = f" + {kept.merged} for the others" if kept.merged else ""
                cells.append(
                    (place(stream, kept), f"{len(kept.kept)} of {stream.tokens}{many}", dimmed(self.picture, stream, kept))
                )
            for index, (above, below, image) in enumerate(cells):
                left = LEFT + index * (CELL + GAP)
                pen.text((left, top), above, INK, _font())
                sheet.paste(image, (left, top + LINE))
                pen.text((left, top + LINE + CELL), below, INK, _font())
            top += CELL + 2 * LINE
        for text in self.captions:
            pen.text((LEFT, top), shortened(text, self.width), INK, _font())
            top += LINE
        for stream, kept in self.lines:
            write_words(pen, top, self.width, stream, kept)
            top += LINE


def evenly(layers: Sequence[KeptAt]) -> list[KeptAt]:
    """At most MOST of them, the first and the last among them."""
    if len(layers) <= MOST:
        return list(layers)
    return [layers[round(index * (len(layers) - 1) / (MOST - 1))] for index in range(MOST)]


def place(stream: StreamKept, kept: KeptAt) -> str:
    return f"{stream.at} layer {kept.layer}"


def fitted(picture: Image.Image) -> Image.Image:
    """The picture in a cell, its sides as they are."""
    cell = Image.new("RGB", (CELL, CELL), PAPER)
    scale = CELL / max(picture.size)
    size = [max(1, round(side * scale)) for side in picture.size]
    cell.paste(picture.convert("RGB").resize(size, Image.Resampling.BICUBIC), (0, 0))
    return cell


def dimmed(picture: Image.Image, stream: StreamKept, kept: KeptAt) -> Image.Image:
    """The picture in a cell, dark where a patch has left. Where its tokens are no raster, as it is, with a word of that."""
    cell = fitted(picture)
    if stream.grid is None:
        ImageDraw.Draw(cell).text((4, 4), "tiles: no raster", INK, _font(), stroke_width=2, stroke_fill=PAPER)
        return cell
    rows, columns = stream.grid
    scale = CELL / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    mask, staying = Image.new("L", (CELL, CELL), 0), set(kept.kept)
    pen = ImageDraw.Draw(mask)
    for patch in range(rows * columns):
        if patch not in staying:
            row, column = divmod(patch, columns)
            box = [column * width // columns, row * height // rows]
            box += [(column + 1) * width // columns - 1, (row + 1) * height // rows - 1]
            if box[2] >= box[0] and box[3] >= box[1]:
                pen.rectangle(box, round(255 * DIMMED))
    return Image.composite(Image.new("RGB", (CELL, CELL), DARK), cell, mask)


def write_words(pen: Any, top: int, width: int, stream: StreamKept, kept: KeptAt) -> None:
    """A line with the words of a text, those that left struck out."""
    font, staying = _font(), set(kept.kept)
    left = LEFT + CELL - 3 * GAP
    pen.text((LEFT, top), place(stream, kept), INK, font)
    for index, word in enumerate(stream.words or ()):
        long = pen.textlength(word, font)
        if left + long > width:
            pen.text((left, top), "...", FAINT, font)
            return
        pen.text((left, top), word, INK if index in staying else FAINT, font)
        if index not in staying:
            pen.line((left, top + LINE // 2, left + long, top + LINE // 2), FAINT)
        left += round(long) + 5


def shortened(text: str, width: int) -> str:
    """The text on one line, as much of it as fits."""
    text, font = " ".join(text.split()), _font()
    if font.getlength(text) <= width - LEFT:
        return text
    while text and font.getlength(text + " ...") > width - LEFT:
        text = text[:-1]
    return text + " ..."


def _font() -> Any:
    return ImageFont.load_default(11)


# Importance --------------------------------------------------------------------------------------------------------------


def heat_map(units: Sequence[LayerImportance], tokens: Sequence[TokenImportance]) -> Image.Image:
    """A row for each layer: heads in their order, groups of channels from the most important down, patches or places of a
    text. Pale is 0, red three times the mean and more."""
    tables = list(unit_tables(units))
    streams = list(dict.fromkeys(one.stream for one in tokens))
    boxes = [_bars(title, rows) for title, rows in tables] + [
        _maps(name, [one for one in tokens if one.stream == name]) for name in streams
    ]
    width = max(box.width for box in boxes) + 2 * LEFT
    sheet = Image.new("RGB", (width, sum(box.height + GAP for box in boxes) + 2 * LEFT + LINE), PAPER)
    ImageDraw.Draw(sheet).text((LEFT, LEFT), "Importance: pale 0, full red 3 times the mean and more.", INK, _font())
    top = LEFT + LINE
    for box in boxes:
        sheet.paste(box, (LEFT, top))
        top += box.height + GAP
    return sheet


def unit_tables(units: Sequence[LayerImportance]) -> Iterator[tuple[str, list[LayerImportance]]]:
    names = {"attention": "heads", "cross": "heads of the cross-attention", "ffn": "channels, most important first"}
    for tower, part in dict.fromkeys((one.tower, one.part) for one in units):
        yield f"{tower}: {names.get(part, part)}", [one for one in units if (one.tower, one.part) == (tower, part)]


def _bars(title: str, rows: Sequence[LayerImportance]) -> Image.Image:
    """A table of squares, a layer a row."""
    high, wide, most = 12, 14, max(len(row.values) for row in rows)
    box = Image.new("RGB", (max(60 + wide * most, 300), LINE + high * len(rows)), PAPER)
    pen = ImageDraw.Draw(box)
    pen.text((0, 0), title, INK, _font())
    for place, row in enumerate(rows):
        top = LINE + place * high
        pen.text((0, top - 1), f"layer {row.layer}", INK, _font())
        for index, value in enumerate(row.values):
            pen.rectangle((60 + index * wide, top, 60 + (index + 1) * wide - 2, top + high - 2), heat(value))
    return box


def _maps(name: str, layers: Sequence[TokenImportance]) -> Image.Image:
    """The patches of each layer as the image has them, or a row of places of a text."""
    grid = layers[0].grid
    if grid is None:
        return _bars(
            f"{name}: places of a text", [LayerImportance(name, one.layer, "", len(one.values), one.values) for one in layers]
        )
    rows, columns = grid
    side, across = max(2, 96 // max(rows, columns)), 6
    wide, high = side * columns + GAP, side * rows + LINE + 4
    box = Image.new("RGB", (max(wide * min(across, len(layers)), 300), LINE + high * -(-len(layers) // across)), PAPER)
    pen = ImageDraw.Draw(box)
    pen.text((0, 0), f"{name}: patches", INK, _font())
    for index, one in enumerate(layers):
        left, top = index % across * wide, LINE + index // across * high
        pen.text((left, top), f"layer {one.layer}", INK, _font())
        for patch, value in enumerate(one.values):
            y, x = divmod(patch, columns)
            corner = (left + x * side, top + LINE + y * side)
            pen.rectangle((*corner, corner[0] + side - 1, corner[1] + side - 1), heat(value))
    return box


def heat(value: float) -> Colour:
    """From pale at 0 to red at 3 and above; below 0 as 0."""
    share = min(max(value / 3, 0.0), 1.0)
    low, high = COLD, WARM
    return tuple(round(a + share * (b - a)) for a, b in zip(low, high, strict=True))  # type: ignore[return-value]
