"""Layer by layer: FLOPs and parameters by part, and what is left of heads, channels and tokens."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ..numbers import short
from .charts import Column, columns
from .drawing import bar
from .figures import Document, Path
from .markup import Html, Piece, joined, tag
from .shell import beside, figure, folded, legend, section, table

UNITS = {"heads": "heads", "cross_heads": "cross heads", "ffn": "channels", "tokens": "tokens"}
PARTS = {"attention": "attention", "cross": "cross-attention", "ffn": "feed-forward"}
KINDS = {"attention": "attention", "cross": "cross", "ffn": "ffn"}  # classes of the style sheet


class Costs(NamedTuple):
    """Where FLOPs or parameters of a layer stand in the document. dense: of a model that was pruned."""

    tower: str
    name: str  # of the layer
    parts: dict[str, Path]  # part -> of what the model has
    dense: dict[str, Path]  # the same of the dense model, or of its whole layer; empty where there is no other


def towers(layers: Sequence[dict[str, Any]]) -> dict[str, list[int]]:
    """Tower -> where its layers are in the list."""
    found: dict[str, list[int]] = {}
    for index, layer in enumerate(layers):
        found.setdefault(layer["tower"], []).append(index)
    return found


def costs(document: Document, path: Path, name: str) -> list[Costs]:
    """Of every layer of a list. name: of its entry, part -> number, or part -> dense and compact."""
    found = []
    for index, layer in enumerate(document.at(*path)):
        parts = {part: (*path, index, name, part) for part in layer[name] if document.at(*path, index, name, part)}
        twice = any(isinstance(document.at(*where), dict) for where in parts.values())
        now = {part: (*where, "compact") if twice else where for part, where in parts.items()}
        dense = {part: (*where, "dense") for part, where in parts.items()} if twice else {}
        found.append(Costs(layer["tower"], str(layer["layer"]), now, dense))
    return found


def compared_costs(document: Document, name: str) -> list[Costs]:
    """Of every layer of a compact model that was analyzed, before the dense layers. name: "flops" or "params"."""
    found = costs(document, ("layers",), name)
    return [one._replace(dense={"all": ("compact", "layers", index, name, "dense")}) for index, one in enumerate(found)]


def layer_charts(document: Document, found: Sequence[Costs], unit: str) -> Iterator[Html]:
    """A chart for each tower, all of one scale: what the parts of its layers cost, before the dense model's layers."""
    highest = max(document.term(list((one.dense or one.parts).values())) for one in found)
    for tower in dict.fromkeys(one.tower for one in found):
        shown = [_column(document, one, unit) for one in found if one.tower == tower]
        yield figure(f"{tower}: {unit} of each layer", columns(f"{unit} of the layers of {tower}", shown, highest, short))


def _column(document: Document, one: Costs, unit: str) -> Column:
    parts = [(KINDS[part], document.at(*where)) for part, where in one.parts.items()]
    said = ", ".join(f"{PARTS[part]} {short(document.at(*where))}" for part, where in one.parts.items())
    behind = document.term(list(one.dense.values())) if one.dense else None
    was = "" if behind is None else f"; dense {short(behind)}"
    return Column(one.name, parts, f"{one.tower} {one.name}: {said} {unit}{was}", behind)


def part_legend(found: Sequence[Costs]) -> Html:
    """What the colours of layer charts stand for."""
    used = [part for part in PARTS if any(part in one.parts for one in found)]
    dense = [("dense", "dense model")] if any(one.dense for one in found) else []
    return legend(*((KINDS[part], PARTS[part]) for part in used), *dense)


def layer_table(document: Document, flops: Sequence[Costs], params: Sequence[Costs]) -> Html:
    """The numbers of the charts."""
    rows: list[list[Piece]] = []
    used = [part for part in PARTS if any(part in one.parts for one in flops)]
    for index, one in enumerate(flops):
        cells = [document.figure(one.parts[part], short) if part in one.parts else "-" for part in used]
        rows.append([f"{one.tower} {one.name}", *cells, *_sums(document, one)])
        rows[-1] += _sums(document, params[index]) if params else []
    both = ["dense", "compact"] if any(one.dense for one in flops) else ["all"]
    names = [f"{name} {side}" for name in ("FLOPs:", *(["params:"] if params else [])) for side in both]
    return folded("table: every layer", table(["layer", *(f"FLOPs: {PARTS[part]}" for part in used), *names], rows))


def _sums(document: Document, one: Costs) -> list[Html]:
    sides = [one.dense, one.parts] if one.dense else [one.parts]
    return [document.made("sum", [list(side.values())], short) for side in sides]


def cost_section(document: Document, counted: Sequence[Costs], held: Sequence[Costs]) -> Html:
    """Charts and table of FLOPs and, where they are known, of parameters of every layer."""
    charts = [part_legend(counted), beside(layer_charts(document, counted, "FLOPs"))]
    if held:
        charts.append(beside(layer_charts(document, held, "parameters")))
    lead = "Towers share one scale." + " Grey behind is the dense model." * any(one.dense for one in counted)
    return section("FLOPs and parameters by layer", charts, layer_table(document, counted, held), lead=lead)


def before_after(document: Document, path: Path, tokens: str = "tokens") -> Html:
    """A table for each tower: kept and dense units of every layer, with bars. path: of the list of layers, whose units are
    [compact, dense]; tokens: what the column of tokens is."""
    layers = document.at(*path)
    parts: list[Piece] = []
    for tower, indices in towers(layers).items():
        kinds = [kind for kind in UNITS if any(layers[index][kind] is not None for index in indices)]
        rows = [
            [
                str(layers[index]["layer"]),
                *(_kept(document, (*path, index, kind)) for kind in kinds),
                _flops(document, (*path, index)),
            ]
            for index in indices
        ]
        names = [tokens if kind == "tokens" else UNITS[kind] for kind in kinds]
        parts.append(tag("h3", tower))
        parts.append(tag("div", table(["layer", *names, "FLOPs"], rows), class_="layers"))
    return section("Before and after", parts, lead="What stays of what each layer had. A full bar is all of it.")


def _kept(document: Document, path: Path) -> Piece:
    """ "5 / 8" with a bar."""
    if document.at(*path) is None:
        return "-"
    kept, dense = document.at(*path)
    text = [document.figure((*path, 0), _plain), " / ", document.figure((*path, 1), _plain)]
    return joined([text, bar(1, kept / dense if dense else 0)])


def _flops(document: Document, layer: Path) -> Html:
    """Of a layer, beside those of the dense one."""
    found = document.at(*layer)
    if "flops_of" in found:
        now: Path = (*layer, "flops")
        dense = [(*layer, "flops_of", part, "dense") for part in found["flops_of"]]
    else:
        now, dense = (*layer, "flops", "compact"), [(*layer, "flops", "dense")]
    said = [document.figure(now, short), " / ", document.made("sum", [dense], short)]
    return joined([said, bar(1, document.at(*now) / (document.term(dense) or 1))])


def _plain(number: float) -> str:
    return f"{number:,}"
