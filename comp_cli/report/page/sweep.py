"""The page of several ratios: the trade-off, with its knee."""

from ..numbers import percent, short, short_bytes
from .charts import Series, scatter
from .drawing import Frame, line, nice_ticks
from .figures import Document, Path, Spell, plain_number
from .headline import lost, metric_spell
from .markup import Html, Piece, joined, tag
from .shell import figure, section, table

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
    said = (
        f"On {document.at('samples'):,} pairs that pruning did not see ({document.at('data')})."
        if document.get("samples")
        else None
    )
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
        names = [(x, y, f"{ratio:g}: {spell(y)}") for (x, y, _), (_, _, ratio) in zip(marks, found, strict=True)]
        texts = [_beside(frame, x, y, text) for x, y, text in [(0.0, dense, f"dense: {spell(dense)}"), *names]]
        return [texts, line(frame, [path[0], path[-1]], "chord") if knee is not None else None]

    values = [y for _, y in path]
    places = [(tick / furthest, percent(tick)) for tick in ticks]
    label = f"{name} over the FLOPs reduction of each ratio"
    return scatter(label, series, (min(values), max(values)), spell, places, "FLOPs reduction", more)


def _beside(frame: Frame, x: float, y: float, text: str) -> Html:
    """A text beside a point, on the side where there is room."""
    anchor, off = ("end", -10) if x > 0.5 else ("start", 10)
    return tag("text", text, class_="value", x=frame.x(x), dx=off, y=frame.y(y) + 14, text_anchor=anchor)


def _knee(document: Document, measured: list[int]) -> Html:
    if document.get("knee") is not None:
        said = joined(["Ringed: ratio ", document.figure(("knee",), plain_number), f", {KNEE}."])
    elif len(measured) < 3:
        said = joined(["No knee is marked: it takes three ratios that were measured."])
    else:
        said = joined(["No knee is marked: no ratio lies above the straight line from the dense model to the last ratio."])
    return tag("p", said)


def _table(document: Document) -> Html:
    points = document.at("points")
    kinds: list[tuple[str, str, Spell]] = [
        ("flops", "FLOPs of a sample", short),
        ("params", "parameters", short),
        ("size_bytes", "weights on disk", short_bytes),
    ]
    used = [kind for kind in kinds if any(point[kind[0]] for point in points)]
    metric = document.get("metric")
    rows: list[list[Piece]] = []
    for index, point in enumerate(points):
        path: Path = ("points", index)
        cells: list[Piece] = [document.figure((*path, "reached"), percent) if point["reached"] is not None else "-"]
        for key, _, spell in used:
            known = point[key] is not None
            cells.append(
                [document.figure((*path, key, "compact"), spell), " (", document.change((*path, key)), ")"] if known else "-"
            )
        if metric:
            known = point["metric"] is not None
            figure_ = (
                [
                    document.figure((*path, "metric", "compact"), metric_spell(metric)),
                    " (",
                    lost(document, (*path, "metric")),
                    ")",
                ]
                if known
                else "-"
            )
            cells.append(figure_)
        cells.append(document.figure((*path, "agreement"), percent) if point["agreement"] is not None else "-")
        cells.append(_folder(point["folder"]))
        name = f"{point['ratio']:g}" + (", the knee" if point["ratio"] == document.get("knee") else "")
        rows.append([name, *cells])
    columns = ["ratio", "FLOPs reduction", *(name for _, name, _ in used), *([metric] if metric else []), "agreement", "folder"]
    knee = [index for index, point in enumerate(points) if point["ratio"] == document.get("knee")]
    return table(columns, rows, marked=knee)


def _folder(folder: str | None) -> Piece:
    """With a link to its own page, which lies there."""
    return "-" if folder is None else tag("a", folder, href=f"{folder}/report.html")


def _failed(document: Document) -> Html | None:
    lines = [f"Ratio {point['ratio']:g}: {point['failed']}" for point in document.at("points") if point["failed"]]
    return tag("ul", (tag("li", said) for said in lines), class_="notes") if lines else None
