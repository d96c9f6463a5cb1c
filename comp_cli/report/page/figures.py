"""Numbers of a document as a page shows them: each says where in the document it stands, so that it can be checked.

`data-path` is a JSON pointer (RFC 6901), `data-value` what stands there. A number made of several has `data-as`, one of `MADE`,
and `data-of`, a list of pointers, or of lists of pointers, whose sum is meant.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

from .markup import Html, tag

Path = tuple[str | int, ...]  # keys and indices, from the root of the document
Term = Path | list[Path]  # a number of the document, or the sum of several
Spell = Callable[[Any], str]

MADE: dict[str, Callable[..., float]] = {
    "change": lambda before, after: after / before - 1 if before else 0.0,
    "difference": lambda before, after: after - before,
    "share": lambda part, whole: part / whole if whole else 0.0,
    "rest": lambda part, whole: 1 - part / whole if whole else 0.0,
    "sum": lambda *parts: sum(parts),
    "mean": lambda *parts: sum(parts) / len(parts),
}


def pointer(path: Path) -> str:
    """("layers", 3, "a/b") as "/layers/3/a~1b"."""
    return "".join(f"/{str(step).replace('~', '~0').replace('/', '~1')}" for step in path)


class Document:
    """The JSON of a report."""

    def __init__(self, content: dict[str, Any]):
        self.content = content

    def at(self, *path: str | int) -> Any:
        """What stands at a path. Raises KeyError or IndexError where nothing does."""
        found: Any = self.content
        for step in path:
            found = found[step]
        return found

    def get(self, name: str) -> Any:
        """What the document has under a name; None where it has nothing."""
        return self.content.get(name)

    def figure(self, path: Path, spell: Spell = str, name: str = "span") -> Html:
        """A number of the document. name: the element, "tspan" in charts."""
        value = self.at(*path)
        return tag(name, spell(value), class_="figure", data_path=pointer(path), data_value=json.dumps(value))

    def count(self, path: Path) -> Html:
        """How many entries a list of the document has."""
        length = len(self.at(*path))
        return tag("span", f"{length:,}", class_="figure", data_as="length", data_of=pointer(path), data_value=length)

    def made(self, how: str, terms: Sequence[Term], spell: Spell, name: str = "span") -> Html:
        """A number made of several of the document. how: a name in `MADE`."""
        value = self.value(how, terms)
        of = [[pointer(path) for path in term] if isinstance(term, list) else pointer(term) for term in terms]
        said = {"data_as": how, "data_of": json.dumps(of), "data_value": json.dumps(value)}
        return tag(name, spell(value), class_="figure", **said)

    def value(self, how: str, terms: Sequence[Term]) -> float:
        return MADE[how](*map(self.term, terms))

    def term(self, term: Term) -> float:
        return sum(self.at(*path) for path in term) if isinstance(term, list) else self.at(*term)

    def pair(self, path: Path, spell: Spell, sides: tuple[str | int, str | int] = ("dense", "compact")) -> list[Html | str]:
        """ "473 M -> 237 M": two numbers beside each other in the document."""
        return [self.figure((*path, sides[0]), spell), " → ", self.figure((*path, sides[1]), spell)]

    def change(self, path: Path) -> Html:
        """By how much the second of dense and compact is more or less."""
        return self.made("change", [(*path, "dense"), (*path, "compact")], signed_percent)


def signed_percent(share: float) -> str:
    """With a true minus sign."""
    return f"{100 * share:+.1f} %".replace("-", "−")


def signed_points(share: float) -> str:
    """Of a metric between 0 and 1, in points."""
    return f"{100 * share:+.1f} points".replace("-", "−")


def plain_number(value: float) -> str:
    """Four digits at most."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
