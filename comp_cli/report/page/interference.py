"""CoMP's two findings on a model, and what follows from them."""

from collections.abc import Sequence
from typing import Any

from ..numbers import percent, short_percent
from .charts import Series, level, scatter
from .drawing import every
from .figures import Document
from .layers import PARTS, towers
from .markup import Html, Piece, tag
from .shell import beside, figure, folded, legend, section, table

SHAPES = {"attention": "circle", "cross": "diamond", "ffn": "square"}
HEADS = {"changed_by_least": ("least", "circle", "least important heads"), "changed_by_all": ("any", "square", "any head")}
VERDICTS = {"interferes": "Prune together", "separate": "One after the other is fine", "unclear": "Unclear"}
FINDINGS = {"tokens": "tokens behind importance", "heads": "heads behind token ranking"}


def interference(document: Document) -> Html | None:
    """Conclusions, charts of both findings for each tower, and the numbers."""
    found = document.get("diagnostics")
    if not found or not found["layers"]:
        return None
    layers = found["layers"]
    charts = [_charts(found, tower, [layers[index] for index in indices]) for tower, indices in towers(layers).items()]
    parts = [part for part in SHAPES if any(part in layer["overlap"] for layer in layers)]
    lead = (
        "Heads and channels are scored on tokens, and tokens by heads. These two findings say whether one kind of pruning "
        f"would mislead the other in this model. Measured on {document.at('samples')} samples."
    )
    return section(
        "Do parameters and tokens interfere?",
        conclusions(document),
        tag("div", legend(*((part, PARTS[part]) for part in parts), ("level", "by chance")), class_="dots"),
        beside(chart[0] for chart in charts),
        tag(
            "div",
            legend(*((kind, name) for kind, _, name in HEADS.values()), ("level", f"strong: {short_percent(found['strong'])}")),
            class_="dots",
        ),
        beside(chart[1] for chart in charts if chart[1] is not None),
        folded("table: every layer", _table(document, parts)),
        lead=lead,
    )


def conclusions(document: Document) -> Html:
    """Verdict and sentence of each, with the limits that were applied."""
    items: list[Piece] = []
    for index, one in enumerate(document.at("diagnostics", "conclusions")):
        path = ("diagnostics", "conclusions", index)
        low, high = (document.figure((*path, key), short_percent) for key in ("low", "high"))
        judged = document.figure((*path, "judged"), percent)
        limits = ["Judged: ", judged, " (limits ", low, " and ", high, ")."]
        what = " of the way from chance to all" if one["finding"] == "tokens" else " of the least important heads"
        head = tag("b", f"{VERDICTS[one['verdict']]}: {one['tower']}, {FINDINGS[one['finding']]}")
        said = tag("p", one["sentence"].partition(": ")[2])
        items.append(tag("li", head, said, tag("small", [*limits[:2], what, *limits[2:]])))
    return tag("ul", items, class_="findings")


def _charts(found: dict[str, Any], tower: str, layers: Sequence[dict[str, Any]]) -> tuple[Html, Html | None]:
    """Overlap with the top tokens by layer, and how much the kept tokens change without a head."""
    room = 1 / len(layers)
    places = [((index + 0.5) * room, str(layers[index]["layer"])) for index in every(len(layers))]

    def points(shares: Sequence[float | None], name: str) -> list[tuple[float, float, str]]:
        return [
            ((index + 0.5) * room, share, f"{tower} {layers[index]['layer']}, {name}: {percent(share)}")
            for index, share in enumerate(shares)
            if share is not None
        ]

    overlaps = [
        Series(part, shape, points([layer["overlap"].get(part) for layer in layers], PARTS[part]))
        for part, shape in SHAPES.items()
    ]
    chance = sum(layer["chance"] for layer in layers) / len(layers)
    top = short_percent(found["top_tokens"])
    first = figure(
        f"{tower}: the {top} of tokens that drive importance, how many of them are top tokens",
        scatter(f"overlap in the layers of {tower}", overlaps, (0, 1), short_percent, places, "layer", level(chance)),
    )
    heads = [layer["influence"] for layer in layers]
    if not any(heads):
        return first, None
    changes = [
        Series(kind, shape, points([one and one[key] for one in heads], name)) for key, (kind, shape, name) in HEADS.items()
    ]
    highest = max(*(y for one in changes for _, y, _ in one.points), found["strong"] * 1.5)
    second = figure(
        f"{tower}: how many of the kept {short_percent(found['kept_tokens'])} of tokens change without a head",
        scatter(
            f"change of the kept tokens in the layers of {tower}",
            changes,
            (0, highest),
            short_percent,
            places,
            "layer",
            level(found["strong"]),
        ),
    )
    return first, second


def _table(document: Document, parts: Sequence[str]) -> Html:
    rows: list[list[Piece]] = []
    for index, layer in enumerate(document.at("diagnostics", "layers")):
        path = ("diagnostics", "layers", index)
        cells: list[Piece] = [
            document.figure((*path, "overlap", part), percent) if part in layer["overlap"] else "-" for part in parts
        ]
        cells.append(document.figure((*path, "chance"), percent))
        keys = (*HEADS, "strong")
        known = layer["influence"] is not None
        cells += [document.figure((*path, "influence", key), percent) if known else "-" for key in keys]
        rows.append([f"{layer['tower']} {layer['layer']}", *cells])
    columns = ["layer", *(f"overlap: {PARTS[part]}" for part in parts), "by chance"]
    return table([*columns, "change: least heads", "change: any head", "strong heads"], rows)
