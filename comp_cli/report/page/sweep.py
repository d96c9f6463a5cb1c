"""The page of several ratios: the trade-off, with its knee."""

from collections.abc import Sequence

from ...tasks.base import is_share
from ..numbers import percent, short, short_bytes, short_percent
from .charts import Series, scatter
from .drawing import Frame, line, nice_ticks
from .figures import Document, Path, Spell, plain_number
from .headline import lost, metric_spell, one_pair
from .markup import Html, Piece, joined, tag
from .shell import figure, section, table

SIZES: list[tuple[str, str, Spell]] = [
    ("flops", "FLOPs of a sample", short),
    ("params", "parameters", short),
    ("size_bytes", "weights on disk", short_bytes),
]
KNEE = (
    "the knee, where more begins to cost more: the ratio that is farthest above the straight line from the dense model to the "
    "largest ratio"
)


def trade_off(document: Document) -> Html:
    """Metric (agreement, where nothing is labelled) over what is saved."""
    points = document.at("points")
    key = "metric" if any(point["metric"] for point in points) else "agreement"
    name = document.get("metric") if key == "metric" else "agreement with the dense model"
    measured = [index for index, point in enumerate(points) if point[key] is not None and point["reached"] is not None]
    chart = _curve(document, key, name or key, measured) if measured else tag("p", "Nothing was measured.")
    said = None
    if document.get("samples"):
        said = f"On {document.at('samples'):,} pairs that pruning did not see ({document.at('data')})."
        said += one_pair(name or "", document.at("samples")) if key == "metric" else ""
    return section(
        "What each ratio costs",
        figure(f"{name} over FLOPs reduction", chart),
        _knee(document, measured),
        _table(document),
        _failed(document),
        lead=said,
    )


def _curve(document: Document, key: str, name: str, measured: list[int]) -> Html:
    points = document.at("points")
    spell = metric_spell(name) if key == "metric" else percent
    found = [
        (points[i]["reached"], points[i][key]["compact"] if key == "metric" else points[i][key], points[i]["ratio"])
        for i in measured
    ]
    dense = points[measured[0]]["metric"]["dense"] if key == "metric" else 1.0
    ticks = nice_ticks(0, max(x for x, _, _ in found))
    furthest = ticks[-1]
    path = sorted([(0.0, dense), *((x / furthest, y) for x, y, _ in found)])
    marks = [(x / furthest, y, f"ratio {ratio:g}: {spell(y)}") for x, y, ratio in found]
    series = [
        Series("joined", None, [(x, y, "") for x, y in path], "joined"),
        Series("dense", "square", [(0.0, dense, f"dense: {spell(dense)}")]),
        Series("attention", "circle", marks),
    ]
    knee = document.get("knee")
    at_knee = [mark for mark, (_, _, ratio) in zip(marks, found, strict=True) if ratio == knee]
    series += [Series("ring", "ring", at_knee)]

    def more(frame: Frame) -> Piece:
        named = [(0.0, dense, "dense"), *((x, y, f"{ratio:g}") for (x, y, _), (_, _, ratio) in zip(marks, found, strict=True))]
        chord = line(frame, [path[0], path[-1]], "chord") if knee is not None else None
        return [chord, [_above(frame, *each) for each in named]]

    values = [y for _, y in path]
    places = [(tick / furthest, short_percent(tick)) for tick in ticks]
    label = f"{name} over the FLOPs reduction of each ratio"
    marked = short_percent if key == "agreement" or is_share(name) else spell
    return scatter(label, series, (min(values), max(values)), marked, places, "FLOPs reduction", more)


def _above(frame: Frame, x: float, y: float, text: str) -> Html:
    """A text above a point, at the left edge beside it."""
    anchor = "middle" if x else "start"
    return tag("text", text, class_="value", x=frame.x(x), y=frame.y(y) - 13, text_anchor=anchor)


def _knee(document: Document, measured: list[int]) -> Html:
    if document.get("knee") is not None:
        said = joined(["Ringed: ratio ", document.figure(("knee",), plain_number), f", {KNEE}."])
    elif len(measured) < 3:
        said = joined(["No knee is marked: it takes three ratios that were measured."])
    else:
        said = joined(["No knee is marked: no ratio lies above the straight line from the dense model to the last ratio."])
    return tag("p", said)


def _table(document: Document) -> Html:
    """What each ratio is and costs, the dense model first."""
    points = document.at("points")
    used = [(key, name, spell) for key, name, spell in SIZES if any(point[key] for point in points)]
    metric = document.get("metric")
    rows: list[list[Piece]] = [_dense(document, used, metric)]
    for index, point in enumerate(points):
        path: Path = ("points", index)
        cells: list[Piece] = [_known(document, (*path, "reached"), percent)]
        if metric:
            known = point["metric"] is not None
            value = document.figure((*path, "metric", "compact"), metric_spell(metric)) if known else None
            cells.append([value, " (", lost(document, (*path, "metric")), ")"] if known else "-")
        cells.append(_known(document, (*path, "agreement"), percent))
        for key, _, spell in used:
            known = point[key] is not None
            size = document.figure((*path, key, "compact"), spell) if known else None
            cells.append([size, " (", document.change((*path, key)), ")"] if known else "-")
        name = f"{point['ratio']:g}" + (", the knee" if point["ratio"] == document.get("knee") else "")
        rows.append([name, *cells, _folder(point["folder"])])
    measured = [*([metric] if metric else []), "agreement"]
    columns = ["ratio", "FLOPs reduction", *measured, *(name for _, name, _ in used), "folder"]
    knee = [index for index, point in enumerate(points, start=1) if point["ratio"] == document.get("knee")]
    return table(columns, rows, marked=knee)


def _dense(document: Document, sizes: Sequence[tuple[str, str, Spell]], metric: str | None) -> list[Piece]:
    """The row of the dense model, of the first ratio that tells each number."""

    def first(key: str, spell: Spell) -> Piece:
        known = next((index for index, point in enumerate(document.at("points")) if point[key]), None)
        return "-" if known is None else document.figure(("points", known, key, "dense"), spell)

    measured = [first("metric", metric_spell(metric))] if metric else []
    return ["dense", "-", *measured, "-", *(first(key, spell) for key, _, spell in sizes), "-"]


def _known(document: Document, path: Path, spell: Spell) -> Piece:
    return "-" if document.at(*path) is None else document.figure(path, spell)


def _folder(folder: str | None) -> Piece:
    """With a link to its own page, which lies there."""
    return "-" if folder is None else tag("a", folder, href=f"{folder}/report.html")


def _failed(document: Document) -> Html | None:
    lines = [f"Ratio {point['ratio']:g}: {point['failed']}" for point in document.at("points") if point["failed"]]
    return tag("ul", (tag("li", said) for said in lines), class_="notes") if lines else None
