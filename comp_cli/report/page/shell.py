"""The page around the sections of a report."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .markup import Html, Piece, tag

STYLE = Path(__file__).with_name("style.css")
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"  # nothing is loaded, nothing runs
MARK = "comp report page"  # in the pages that comp wrote, which it may replace


def page(title: str, kind: str, about: Sequence[Piece], sections: Sequence[Html | None], document: dict[str, Any]) -> str:
    """A whole page. kind: what it is, above the title; about: below it; document: the JSON that it was made of."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="generator", content=f"{MARK}, comp {document['comp_version']}"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("link", rel="icon", href="data:,"),
        tag("title", f"{title}: {kind}"),
        tag("style", Html(STYLE.read_text(encoding="utf-8"))),
    )
    shown = [section for section in sections if section is not None]
    header = tag("header", tag("p", kind, class_="kind"), tag("h1", title), about)
    footer = tag(
        "footer",
        tag(
            "p",
            f"Made by comp {document['comp_version']}. This file loads nothing from anywhere. Its numbers are those of the "
            "JSON that it holds, ",
            tag("code", '<script id="report">'),
            ".",
        ),
    )
    body = tag("body", tag("main", header, shown, footer), embedded(document))
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def embedded(document: dict[str, Any]) -> Html:
    """The document, for programs. No text in it can end the element."""
    text = json.dumps(document)
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return tag("script", Html(text), type="application/json", id="report")


def section(title: str, *inside: Piece, lead: Piece = None) -> Html:
    """A part of the page under a heading. lead: what to see, in a sentence or two."""
    return tag("section", tag("h2", title), None if lead is None else tag("p", lead, class_="lead"), inside)


def table(
    columns: Sequence[Piece], rows: Sequence[Sequence[Piece]], *, marked: Sequence[int] = (), texts: Sequence[int] = ()
) -> Html:
    """The first column is text, the others are numbers, but for `texts`. marked: rows that stand out."""

    def cell(index: int, inside: Piece, name: str = "td", **more: str) -> Html:
        return tag(name, inside, class_="text" if index in texts else None, **more)

    def row(index: int, cells: Sequence[Piece]) -> Html:
        first, *others = cells
        shown = (cell(place, inside) for place, inside in enumerate(others, start=1))
        return tag("tr", tag("th", first, scope="row"), shown, class_="marked" if index in marked else None)

    head = tag("tr", (cell(place, name, "th", scope="col") for place, name in enumerate(columns)))
    body = tag("tbody", (row(*numbered) for numbered in enumerate(rows)))
    return tag("div", tag("table", tag("thead", head), body), class_="wide")


def folded(summary: str, *inside: Piece) -> Html:
    """What is shown when it is asked for."""
    return tag("details", tag("summary", summary), inside)


def figure(caption: Piece, *inside: Piece) -> Html:
    """A chart with what it is."""
    return tag("figure", tag("figcaption", caption), inside)


def beside(*inside: Piece) -> Html:
    """Charts beside each other, where there is room."""
    return tag("div", inside, class_="beside")


def legend(*names: tuple[str, str]) -> Html:
    """What colours and shapes stand for: pairs of class and name."""
    entries = (tag("li", tag("i", class_=f"key {kind}", aria_hidden="true"), name) for kind, name in names)
    return tag("ul", entries, class_="legend")


def sentences(lines: Sequence[Piece]) -> Html:
    return tag("ul", (tag("li", line) for line in lines), class_="notes")
