"""Decoders that read images: where the costs are, what schedules would save, where image tokens leave."""

from collections.abc import Callable
from typing import Any

from ..numbers import percent, short, short_bytes
from .charts import Bar, bars
from .figures import Document, Path, plain_number, signed_percent
from .markup import Html, Piece, joined
from .shell import beside, figure, folded, section, table

TITLE = "Where image tokens leave"
COSTS = {"flops": "FLOPs of the prompt", "step_flops": "FLOPs of a token behind it", "params": "parameters"}


def costs(document: Document) -> Html | None:
    """FLOPs of the prompt and of a written token, and parameters, by part."""
    found = document.get("decoder")
    if found is None:
        return None
    charts = [figure(name, bars(_parts(document, key))) for key, name in COSTS.items()]
    rows: list[list[Piece]] = []
    for index, one in enumerate(found["parts"]):
        cells: list[Piece] = []
        for key in COSTS:
            path: Path = ("decoder", "parts", index, key)
            cells += [document.figure(path, short), document.made("share", [path, _all(document, key)], percent)]
        rows.append([one["part"], *cells])
    columns = ["part", *(each for name in COSTS.values() for each in (name, "share"))]
    cls = "a" if found["class_token"] else "no"
    lead = [
        document.figure(("decoder", "image_tokens"), plain_number),
        " image tokens of the reference image go through ",
        document.figure(("decoder", "layers"), plain_number),
        f" layers of the language model. The vision tower has {cls} [CLS] that ranks image tokens.",
    ]
    return section(
        "Where FLOPs and parameters are", beside(charts), folded("table: every part", table(columns, rows)), lead=lead
    )


def _all(document: Document, key: str) -> list[Path]:
    return [("decoder", "parts", index, key) for index in range(len(document.at("decoder", "parts")))]


def _parts(document: Document, key: str) -> list[Bar]:
    whole = _all(document, key)
    longest = max(document.at(*path) for path in whole) or 1
    return [
        Bar(
            document.at(*path[:3], "part"),
            [document.figure(path, short), " (", document.made("share", [path, whole], percent), ")"],
            document.at(*path) / longest,
        )
        for path in whole
        if document.at(*path)
    ]


SAVED: dict[str, tuple[str, Callable[[float], str]]] = {
    "flops": ("FLOPs of the prompt", short),
    "step_flops": ("FLOPs of a token behind it", short),
    "kv_cache_bytes": ("KV cache behind the prompt", short_bytes),
}


def savings(document: Document) -> Html | None:
    """What it would save if image tokens left."""
    found = document.get("decoder")
    if not found or not found["savings"]:
        return None
    dense: dict[str, list[Path]] = {
        "flops": [("flops", "total")],
        "step_flops": _all(document, "step_flops"),
        "kv_cache_bytes": [("decoder", "kv_cache_bytes")],
    }
    charts = []
    for key, (name, spell) in SAVED.items():
        whole = document.term(dense[key]) or 1
        rows = [Bar("all image tokens", document.made("sum", [dense[key]], spell), 1, 1)]
        for index, one in enumerate(found["savings"]):
            path: Path = ("decoder", "savings", index, key)
            change = document.made("change", [dense[key], path], signed_percent)
            rows.append(Bar(_schedule(document, index), [document.figure(path, spell), " (", change, ")"], 1, one[key] / whole))
        charts.append(figure(name, bars(rows)))
    cells: list[list[Piece]] = []
    for index, one in enumerate(found["savings"]):
        path = ("decoder", "savings", index)
        numbers = [document.figure((*path, key), spell) for key, (_, spell) in SAVED.items()]
        times = document.figure((*path, "flops_reduction"), lambda value: f"{value:.2f} times less")
        cells.append([one["method"], one["stages"], document.figure((*path, "tokens"), plain_number), *numbers, times])
    columns = ["method", "stages (layer:tokens)", "image tokens, mean", *(name for name, _ in SAVED.values()), "FLOPs"]
    lead = "Schedules that leave a third, two ninths and a ninth of the image tokens, mean over layers. Nothing was run for it."
    return section(
        "What it would save if image tokens left", beside(charts), folded("table: schedules", table(columns, cells)), lead=lead
    )


def _schedule(document: Document, index: int) -> Html:
    path: Path = ("decoder", "savings", index)
    tokens = document.figure((*path, "tokens"), lambda value: f"{value:.1f}")
    return joined([f"{document.at(*path, 'method')}, ", tokens, " tokens"])


def stages(document: Document) -> Html | None:
    """Where image tokens leave, and what it saves behind the prompt."""
    found: dict[str, Any] | None = document.get("image_tokens")
    if not found:
        return None
    lead = [
        "Mean over the layers of the language model: ",
        document.figure(("image_tokens", "mean"), plain_number),
        " of ",
        document.figure(("image_tokens", "of"), plain_number),
        ". FLOPs of a written token: ",
        document.pair(("image_tokens", "step_flops"), short),
        ".",
    ]
    return section(TITLE, _stages(document, ("image_tokens", "stages")), lead=lead)


def stages_compared(document: Document) -> Html | None:
    """The same of a compact model that was analyzed."""
    found = document.at("compact").get("stages")
    return section(TITLE, _stages(document, ("compact", "stages"))) if found else None


def _stages(document: Document, path: Path) -> list[Html]:
    """A chart and a table of a list of stages."""
    found = document.at(*path)
    if not found:
        return []
    first: Path = (*path, 0, "of")
    rows: list[list[Piece]] = []
    entries = [Bar("as they come in", [document.figure(first, plain_number), " image tokens"], 1, 1)]
    for index, one in enumerate(found):
        kept = document.figure((*path, index, "kept"), plain_number)
        share = document.made("share", [(*path, index, "kept"), first], percent)
        before = document.figure((*path, index, "of"), plain_number)
        rows.append([f"before layer {one['layer']}", one["rule"], before, kept, share])
        length = one["kept"] / document.at(*first)
        entries.append(Bar(f"from layer {one['layer']} on, by {one['rule']}", [kept, " (", share, ")"], 1, length))
    columns = ["stage", "rule", "image tokens before", "that stay", "of the image"]
    return [figure("image tokens that layers see", bars(entries)), folded("table: stages", table(columns, rows))]
