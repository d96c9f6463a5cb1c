"""Which patches of sample images stay, drawn over them layer by layer, and which words."""

import base64
import io
from collections.abc import Sequence
from typing import Any

from .charts import squares
from .figures import Document, Path
from .markup import Html, Piece, joined, tag
from .shell import beside, section

SMALL = 60_000  # bytes up to which a picture is stored without loss


def samples(document: Document, pictures: Sequence[Any]) -> Html | None:
    """Every sample with its streams. pictures: PIL images of the samples, in their order; None where there is none."""
    found = document.get("kept_samples") or []
    if not found:
        return None
    stored = [_stored(index, picture) for index, picture in enumerate(pictures) if picture is not None]
    shown = [
        tag("div", _sample(document, index, pictures[index] is not None), class_="sample", id=f"sample-{index}")
        for index in range(len(found))
    ]
    lead = (
        "Samples as the compact model reads them. Patches under a dark veil are gone at the layer that is named; words that "
        "are struck out leave at the layer beside them."
    )
    store = tag("svg", stored, class_="store", aria_hidden="true", width=0, height=0)
    return section("Which patches and words stay", store, beside(shown), lead=lead)


def _stored(index: int, picture: Any) -> Html:
    """A picture, once, to be drawn as often as it is needed."""
    image = tag("image", href=data_uri(picture), width=1, height=1, preserveAspectRatio="none")
    return tag("symbol", image, id=f"picture-{index}", viewBox="0 0 1 1", preserveAspectRatio="none")


def data_uri(picture: Any) -> str:
    """A PIL image as text: PNG, or JPEG where that would be large."""
    for form, how in ("PNG", {"optimize": True}), ("JPEG", {"quality": 85}):
        buffer = io.BytesIO()
        picture.convert("RGB").save(buffer, form, **how)
        if form == "JPEG" or buffer.tell() <= SMALL:
            return f"data:image/{form.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    raise ValueError("no form of picture")


def _sample(document: Document, index: int, has_picture: bool) -> list[Piece]:
    found = document.at("kept_samples", index)
    parts: list[Piece] = [tag("h3", found["text"] or f"sample {index + 1}")]
    if found.get("said"):
        parts.append(tag("p", "The compact model says: ", tag("b", found["said"])))
    for place, stream in enumerate(found["streams"]):
        path: Path = ("kept_samples", index, "streams", place)
        if stream["kind"] == "text":
            parts.append(_words(stream))
        elif stream["grid"] and has_picture:
            parts.append(tag("div", _fields(document, path, index), class_="rasters"))
        else:
            parts.append(_counts(document, path))
    return parts


def _fields(document: Document, path: Path, picture: int) -> list[Html]:
    """The image as it enters, and once more for each layer where patches leave."""
    stream = document.at(*path)
    fields = [_field(stream, picture, None, "all patches", tag("span", "all ", document.figure((*path, "tokens"), _count)))]
    for place, layer in enumerate(stream["layers"]):
        kept = len(layer["kept"])
        where = f"{stream['at']} layer {layer['layer']}"
        counts = f"{kept} of {stream['tokens']} stay"
        merged = f", {layer['merged']} for the rest" if layer.get("merged") else ""
        said = [tag("b", where), ": ", document.count((*path, "layers", place, "kept")), f" of {stream['tokens']}{merged}"]
        fields.append(_field(stream, picture, layer["kept"], f"{where}: {counts}", joined(said)))
    return fields


def _field(stream: dict[str, Any], picture: int, kept: Sequence[int] | None, label: str, caption: Html) -> Html:
    rows, columns = stream["grid"]
    veil = None
    if kept is not None:
        gone = sorted(set(range(rows * columns)) - set(kept))
        veil = tag("path", class_="veil", d=squares(gone, columns))
    drawn = tag("use", href=f"#picture-{picture}", width=columns, height=rows)
    view = {"viewBox": f"0 0 {columns} {rows}", "role": "img", "aria_label": label}
    return tag("figure", tag("svg", drawn, veil, class_="raster", **view), tag("figcaption", caption))


def _counts(document: Document, path: Path) -> Html:
    """Of an image without a raster or picture: how many stay."""
    stream = document.at(*path)
    lines = [
        tag(
            "li",
            f"{stream['at']} layer {layer['layer']}: ",
            document.count((*path, "layers", place, "kept")),
            f" of {stream['tokens']}",
        )
        for place, layer in enumerate(stream["layers"])
    ]
    return tag("ul", lines)


def _words(stream: dict[str, Any]) -> Html:
    """The words in their order, those that leave struck out, with the layer where they do."""
    pieces: list[Piece] = []
    for index, word in enumerate(stream["words"] or []):
        left = next((layer["layer"] for layer in stream["layers"] if index not in layer["kept"]), None)
        if left is None:
            pieces.append([tag("span", word), " "])
        else:
            pieces.append([tag("s", word), tag("sub", f"layer {left}"), " "])
    stay = sum(all(index in layer["kept"] for layer in stream["layers"]) for index in range(stream["tokens"]))
    return tag("p", pieces, class_="words", aria_label=f"words, {stay} of {stream['tokens']} stay to the end")


def _count(number: int) -> str:
    return f"{number:,}"
