"""The pages: of each report which sections, in which order. All are made of the report's document."""

from collections.abc import Sequence
from typing import Any

from ..numbers import percent
from . import decoder, headline, importance, interference, layers, parts, samples, search, sweep
from .figures import Document
from .markup import Html
from .shell import page


def prune_page(content: dict[str, Any], pictures: Sequence[Any] = ()) -> str:
    """Of what `comp prune` wrote. content: the document without what is of the run alone; pictures: of its samples."""
    document = Document(content)
    about = [
        headline.about(document),
        headline.cards(headline.pruned(document)),
        headline.cautions(document),
        headline.command(document),
        headline.options_table(document),
    ]
    counted = layers.costs(document, ("layers",), "flops_of")
    held = layers.costs(document, ("layers",), "params_of") if "params_of" in content["layers"][0] else []
    sections = [
        headline.quality(document),
        parts.part_section(
            document,
            parts.rows_of(counted, ("flops", "compact"), ("flops", "dense")),
            parts.rows_of(held, ("params", "compact"), ("params", "dense")) if held else [],
        ),
        decoder.stages(document),
        layers.before_after(document, ("layers",)),
        layers.cost_section(document, counted, held),
        samples.samples(document, pictures),
        search.stages(document),
        search.compared(document),
    ]
    kind = f"pruned by {content['options']['method']}: {percent(content['ratio'])} fewer FLOPs"
    return page(content["base_model"], kind, about, sections, content)


def sweep_page(content: dict[str, Any]) -> str:
    """Of `comp prune` with several ratios."""
    document = Document(content)
    about = [headline.plain_about(document), headline.options_table(document)]
    kind = f"{len(content['points'])} ratios by {content['options']['method']}"
    return page(content["base_model"], kind, about, [sweep.trade_off(document)], content)


def analyze_page(content: dict[str, Any], pictures: Sequence[Any] = ()) -> str:
    """Of what `comp analyze` found. pictures: of its samples."""
    document = Document(content)
    compact = content.get("compact")
    kind = "analyzed: where its cost is, and what matters"
    if compact:
        kind = f"analyzed: what {compact['method']} left of {compact['base_model']}"
    cards = headline.compared(document) if compact else headline.totals(document)
    about = [headline.about(document), headline.cards(cards), headline.cautions(document)]
    sections = [*_costs(document), importance.importance(document), importance.token_importance(document)]
    sections += [samples.samples(document, pictures), interference.interference(document)]
    return page(content["model"], kind, about, sections, content)


def _costs(document: Document) -> list[Html | None]:
    if document.get("decoder") is not None:
        return [decoder.costs(document), decoder.savings(document)]
    if document.get("compact") is not None:
        return _compared(document)
    counted, held = (layers.costs(document, ("layers",), name) for name in ("flops", "params"))
    both = parts.part_section(document, parts.rows_of(counted, ("flops", "total")), parts.rows_of(held, ("params", "total")))
    return [both, layers.cost_section(document, counted, held)]


def _compared(document: Document) -> list[Html | None]:
    """Of a compact model, beside the dense one."""
    counted, held = (layers.compared_costs(document, name) for name in ("flops", "params"))
    return [
        parts.part_section(document, parts.rows_compared(document, "flops"), parts.rows_compared(document, "params")),
        decoder.stages_compared(document),
        layers.before_after(document, ("compact", "layers")),
        layers.cost_section(document, counted, held),
    ]
