"""How much heads, channels and tokens matter: heat maps."""

from collections.abc import Callable, Sequence
from typing import Any

from .charts import Cell, heat_map, raster
from .figures import Document
from .layers import PARTS
from .markup import Html, Piece, tag
from .shell import beside, figure, folded, section, table

WRITTEN = 12  # cells of a row up to which their numbers are written into them
UNEQUAL = {"attention": "heads", "cross": "cross heads", "ffn": "channels", "tokens": "tokens"}


def importance(document: Document) -> Html | None:
    """Heat maps of heads and channels, and how unequal they are."""
    found = document.get("importance") or []
    if not found and not document.get("inequality"):
        return None
    maps = []
    for tower, part in dict.fromkeys((one["tower"], one["part"]) for one in found):
        maps.append(_units(tower, part, [one for one in found if (one["tower"], one["part"]) == (tower, part)]))
    lead = (
        "In units of the mean of the layer: 1 is a head or channel like the others, much less one that can go. Of channels the "
        "means of groups of equally many, the most important first."
    )
    return section("How much heads and channels matter", beside(maps), _tables(document), lead=lead if maps else None)


def _units(tower: str, part: str, layers: Sequence[dict[str, Any]]) -> Html:
    strongest = max((value for layer in layers for value in layer["values"]), default=1) or 1
    name = "heads" if part != "ffn" else "channels"
    rows = []
    for layer in layers:
        few = len(layer["values"]) <= WRITTEN
        cells = [
            Cell(value / strongest, f"{tower} {layer['layer']}, {name} {place}: {value:.2f}", f"{value:.1f}" if few else None)
            for place, value in enumerate(layer["values"])
        ]
        rows.append((str(layer["layer"]), cells))
    what = f"{tower}: {PARTS[part]}, " + (
        "a row of heads for each layer" if name == "heads" else "channels of each layer, sorted"
    )
    return figure(what, heat_map(f"importance of {name}, {tower} {PARTS[part]}, by layer; numbers in the table", rows))


def _tables(document: Document) -> list[Html]:
    """How unequal units are, and the numbers of the heat maps."""
    found = []
    if rows := document.get("inequality"):
        kinds = [kind for kind in UNEQUAL if any(row[kind] is not None for row in rows)]
        cells: list[list[Piece]] = [
            [f"{row['tower']} {row['layer']}", *(_known(document, ("inequality", index, kind)) for kind in kinds)]
            for index, row in enumerate(rows)
        ]
        note = tag("p", "Gini coefficients: 0 where all matter alike, towards 1 where few do and the others can go.")
        found.append(folded("table: how unequal they are", note, table(["layer", *(UNEQUAL[kind] for kind in kinds)], cells)))
    if rows := document.get("importance"):
        cells = [
            [
                f"{row['tower']} {row['layer']}, {PARTS[row['part']]}",
                str(row["units"]),
                _values(document, ("importance", index)),
            ]
            for index, row in enumerate(rows)
        ]
        found.append(folded("table: numbers of the heat maps", table(["layer", "units", "importance"], cells)))
    return found


def _known(document: Document, path: tuple[str | int, ...]) -> Piece:
    return "-" if document.at(*path) is None else document.figure(path, _two)


def _values(document: Document, path: tuple[str | int, ...]) -> list[Piece]:
    spell: Callable[[float], str] = _two
    return [[document.figure((*path, "values", index), spell), " "] for index in range(len(document.at(*path, "values")))]


def _two(value: float) -> str:
    return f"{value:.2f}"


def token_importance(document: Document) -> Html | None:
    """Which places of the image, and of the text, matter to each layer."""
    found = document.get("token_importance") or []
    if not found:
        return None
    shown: list[Piece] = []
    for stream in dict.fromkeys(one["stream"] for one in found):
        layers = [one for one in found if one["stream"] == stream]
        strongest = max((value for layer in layers for value in layer["values"]), default=1) or 1
        if all(layer["grid"] for layer in layers):
            fields = [
                tag("figure", _field(stream, layer, strongest), tag("figcaption", f"layer {layer['layer']}"))
                for layer in layers
            ]
            shown += [tag("h3", f"{stream}: where in the image"), tag("div", fields, class_="rasters")]
        else:
            shown.append(
                figure(
                    f"{stream}: places of the text, from the first word on, a row for each layer", _places(layers, strongest)
                )
            )
    lead = (
        "The score that ranks tokens in each layer, in units of a sample's mean: strong places stay, pale ones leave first. "
        f"The strongest place of all layers has the full colour. Mean over {document.at('samples')} samples."
    )
    numbers = [
        folded("table: strongest and weakest place of each layer", _extremes(document)),
        folded("table: places of the text", _all_places(document)) if any(not one["grid"] for one in found) else None,
    ]
    return section("How much tokens matter", shown, numbers, lead=lead)


def _extremes(document: Document) -> Html:
    """Of every layer; all numbers of all patches are in the JSON of the page."""
    rows: list[list[Piece]] = []
    for index, one in enumerate(document.at("token_importance")):
        values: Sequence[float] = one["values"]
        cells: list[Piece] = []
        for place in (max, min):
            where = values.index(place(values))
            cells += [_place(one, where), document.figure(("token_importance", index, "values", where), _two)]
        rows.append([f"{one['stream']} {one['layer']}", *cells])
    return table(["layer", "strongest place", "importance", "weakest place", "importance"], rows, texts=[1, 3])


def _place(layer: dict[str, Any], where: int) -> str:
    if not layer["grid"]:
        return f"word {where + 1}"
    row, column = divmod(where, layer["grid"][1])
    return f"row {row + 1}, column {column + 1}"


def _all_places(document: Document) -> Html:
    rows: list[list[Piece]] = [
        [f"{one['stream']} {one['layer']}", _values(document, ("token_importance", index))]
        for index, one in enumerate(document.at("token_importance"))
        if not one["grid"]
    ]
    return table(["layer", "importance, place by place"], rows)


def _field(stream: str, layer: dict[str, Any], strongest: float) -> Html:
    _, columns = layer["grid"]
    label = f"importance of the patches of {stream} in layer {layer['layer']}"
    return raster(label, [value / strongest for value in layer["values"]], columns)


def _places(layers: Sequence[dict[str, Any]], strongest: float) -> Html:
    rows = []
    for layer in layers:
        cells = [
            Cell(value / strongest, f"layer {layer['layer']}, word {place + 1}: {value:.2f}")
            for place, value in enumerate(layer["values"])
        ]
        rows.append((str(layer["layer"]), cells))
    return heat_map("importance of the places of a text, by layer; numbers in the table", rows)
