"""HTML and SVG as text. What is not made by `tag` is escaped."""

import html
from collections.abc import Iterable
from typing import Any

VOID = {"meta", "link", "br"}  # elements without an end


class Html(str):
    """Text that is markup already."""


Piece = str | Iterable["Piece"] | None  # what may stand inside an element; None stands for nothing


def tag(name: str, /, *inside: Piece, **attributes: Any) -> Html:
    """An element. Attributes: `class_` for class, `data_path` for data-path; None is left out, True has no value."""
    given = "".join(_attribute(key, value) for key, value in attributes.items() if value is not None and value is not False)
    return Html(f"<{name}{given}>" if name in VOID else f"<{name}{given}>{joined(inside)}</{name}>")


def joined(pieces: Iterable[Piece]) -> Html:
    """Pieces one behind the other, plain text escaped."""
    return Html("".join(_piece(piece) for piece in pieces if piece is not None))


def _piece(piece: Piece) -> str:
    if isinstance(piece, Html):
        return piece
    if isinstance(piece, str):
        return html.escape(piece, quote=False)
    return joined(piece or ())


def _attribute(key: str, value: Any) -> str:
    name = key.rstrip("_").replace("_", "-")
    return f" {name}" if value is True else f' {name}="{html.escape(str(value))}"'
