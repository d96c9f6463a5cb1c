"""What the search looked at and what it took: stages one behind the other, or whole plans beside each other."""

from typing import Any

from ..numbers import percent
from .charts import Series, scatter
from .drawing import every
from .figures import Document, plain_number
from .headline import metric_spell
from .markup import Html, Piece, joined
from .shell import figure, folded, legend, section, table


def stages(document: Document) -> Html | None:
    """Of a method that goes stage by stage: metric over ratio, and why each stage was what it was."""
    found = document.get("stages")
    if not found:
        return None
    name = (document.get("quality") or {}).get("metric", "metric")
    spell = metric_spell(name)
    furthest = max(one["ratio"] for one in found) or 1
    points = [
        (one["ratio"] / furthest, one["metric"], f"stage {one['stage']}: {_mode(one)}, {spell(one['metric'])}") for one in found
    ]
    values = [one["metric"] for one in found]
    places = [(0.0, "0 %"), (0.5, percent(furthest / 2)), (1.0, percent(furthest))]
    chart = scatter(
        f"{name} after each stage, over the FLOPs reduction",
        [Series("attention", "circle", points, "joined")],
        (min(values), max(values)),
        spell,
        places,
        "FLOPs reduction",
    )
    rows: list[list[Piece]] = []
    for index, one in enumerate(found):
        path = ("stages", index)
        rows.append(
            [
                f"{one['stage']}: {_mode(one)}",
                one["why"].replace("_", " "),
                document.figure((*path, "ratio"), percent),
                document.figure((*path, "metric"), spell),
                *(document.figure((*path, key), plain_number) for key in ("loss", "threshold", "cost", "remembered")),
            ]
        )
    columns = ["stage", "why", "FLOPs reduction", name, "loss", "threshold", "cost", "remembered"]
    lead = "What each stage removed, in their order, and what calibration pairs said of it."
    return section(
        "The search, stage by stage", figure(f"{name} on calibration pairs", chart), table(columns, rows, texts=[1]), lead=lead
    )


def _mode(stage: dict[str, Any]) -> str:
    return str(stage["mode"]).replace("_", " ")


def compared(document: Document) -> Html | None:
    """Of a method that compares whole plans: what each loses, and which was taken."""
    found = document.get("compared")
    if not found:
        return None
    losses = [one["loss"] for one in found if one["loss"] is not None]
    chosen = next((index for index, one in enumerate(found) if one["loss"] is not None and one["loss"] == min(losses)), None)
    room = 1 / len(found)
    points = [
        ((index + 0.5) * room, one["loss"], f"plan {index + 1}: {_tokens(one)}; loss {one['loss']:.4g}{_halves(one, found)}")
        for index, one in enumerate(found)
        if one["loss"] is not None
    ]
    series = [Series("attention", "circle", points)]
    if chosen is not None:
        series.append(Series("ring", "ring", [point for point in points if point[0] == (chosen + 0.5) * room]))
    places = [((index + 0.5) * room, str(index + 1)) for index in every(len(found))]
    chart = scatter(
        "loss of each plan", series, (0, max(losses, default=1)), plain_number, places, "plan, in the order of the search"
    )
    rows: list[list[Piece]] = []
    for index, one in enumerate(found):
        name = f"{index + 1}: taken" if index == chosen else str(index + 1)
        path = ("compared", index)
        loss = "no plan of the ratio" if one["loss"] is None else document.figure((*path, "loss"), plain_number)
        kept = _tokens(one) + _halves(one, found)
        rows.append([name, kept, document.figure((*path, "ratio"), percent), loss])
    shown = table(
        ["plan", "what it keeps", "FLOPs reduction", "loss"], rows, marked=[] if chosen is None else [chosen], texts=[1]
    )
    said = [
        f"{len(found)} plans of the ratio were compared. The loss is how far the features of each are from the dense "
        "model's, in units of their variance, on pairs that it was not refitted on. The plan of the lowest one was taken."
    ]
    if any(_halves(one, found) for one in found):
        said.append(
            " A plan that lost 30 % more than the best before it on one half of the pairs was not judged on the other: its "
            "loss is that of the best one, and the difference on that half."
        )
    lead = joined(said)
    key = legend(("compact", "a plan"), ("chosen", "the plan that was taken"))
    return section(
        "The search: plans that were compared",
        figure("loss on calibration pairs", chart, key),
        folded("table: every plan", shown),
        lead=lead,
    )


def _halves(one: dict[str, Any], found: list[dict[str, Any]]) -> str:
    """Whether a plan was judged on fewer pairs than others."""
    return " (on one half of the pairs)" if one.get("halves") == 1 and any(other.get("halves") == 2 for other in found) else ""


def _tokens(one: dict[str, Any]) -> str:
    """What a plan keeps, in words."""
    said = [f"{stream}: {kept} tokens behind layer {layer}" for stream, (layer, kept) in one["tokens"].items()]
    said += [f"{name}: {count} in each layer" for name, count in (one.get("units") or {}).items()]
    return "; ".join(said) or "all tokens"
