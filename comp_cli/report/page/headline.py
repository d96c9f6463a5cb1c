"""What stands above everything: what was lost and what was gained, warnings, the command."""

from collections.abc import Mapping
from typing import Any

from ...tasks.base import is_share
from ..numbers import percent, short, short_bytes
from ..prune_tables import in_words
from .figures import Document, Path, Spell, signed_points
from .markup import Html, Piece, tag
from .shell import folded, section, sentences, table

COSTS = {"flops": "FLOPs of a sample", "params": "parameters"}


def about(document: Document) -> Html:
    """What was worked on: class, task, versions, reference input."""
    found = document.content
    revision = found.get("base_revision") or found.get("revision")
    parts = [found["architecture"], f"task {found['task']}", *([f"revision {revision[:12]}"] if revision else [])]
    versions = [f"comp {found['comp_version']}", *([f"PyTorch {found['torch_version']}"] if "torch_version" in found else [])]
    return tag(
        "div",
        tag("p", " · ".join(parts + versions)),
        tag("p", f"Reference input: {in_words(found['reference']['tokens'])}. FLOPs are {found['reference']['flops']}."),
        class_="about",
    )


def plain_about(document: Document) -> Html:
    """The same of a document without a reference input."""
    found = document.content
    said = [
        found["architecture"],
        f"task {found['task']}",
        f"comp {found['comp_version']}",
        f"PyTorch {found['torch_version']}",
    ]
    return tag("p", " · ".join(said), class_="about")


def card(name: str, large: Piece, *small: Piece) -> Html:
    return tag("div", tag("dt", name), tag("dd", large), (tag("dd", line) for line in small))


def cards(found: list[Html]) -> Html:
    return tag("dl", found, class_="cards")


def size_card(document: Document, name: str, path: Path, spell: Spell) -> Html:
    """By how much a size fell; where it did not, what it is."""
    before, after = (document.at(*path, side) for side in ("dense", "compact"))
    if before == after:
        return card(name, document.figure((*path, "compact"), spell), "as in the dense model")
    return card(name, document.change(path), document.pair(path, spell))


def metric_spell(name: str) -> Spell:
    """As tables have it: a share in percent; what is none, in points as papers have it."""
    return percent if is_share(name) else lambda value: f"{100 * value:.1f}"


def metric_card(document: Document, name: str, path: Path, samples: Path) -> Html:
    """A metric, dense and compact, and what was lost."""
    return card(
        name,
        document.figure((*path, "compact"), metric_spell(name)),
        ["dense ", document.figure((*path, "dense"), metric_spell(name)), ": ", lost(document, path)],
        ["on ", document.figure(samples, lambda n: f"{n:,} pairs")],
    )


def lost(document: Document, path: Path) -> Html:
    """Compact less dense."""
    return document.made("difference", [(*path, "dense"), (*path, "compact")], signed_points)


def quality(document: Document) -> Html | None:
    """Every metric of both models, on which pairs."""
    found = document.get("quality")
    if found is None:
        return None
    rows: list[list[Piece]] = []
    for name in found["metrics"] or {}:
        path: Path = ("quality", "metrics", name)
        sides = [document.figure((*path, side), metric_spell(name)) for side in ("dense", "compact")]
        rows.append([name, *sides, lost(document, path)])
    rows.append(["prediction agreement with the dense model", "", document.figure(("quality", "agreement"), percent), ""])
    rows.append(["KL(dense, compact), nats", "", document.figure(("quality", "divergence"), lambda x: f"{x:.4f}"), ""])
    samples = document.figure(("quality", "samples"), lambda n: f"{n:,}")
    lead = ["Dense and compact on ", samples, f" pairs that pruning did not see ({found['data']})."]
    if found["metrics"]:
        lead.append(one_pair(found["metric"], found["samples"]))
    return section("What was lost", table(["", "dense", "compact", "difference"], rows), lead=lead)


def one_pair(metric: str, samples: int) -> str:
    """How fine a metric is, as a sentence; nothing for one that is no share of the samples."""
    return f" One pair is {100 / samples:.2g} points: differences of a few pairs may be chance." if is_share(metric) else ""


def command(document: Document) -> Html | None:
    """The command line that does the same."""
    said = document.get("command")
    return None if said is None else tag("pre", tag("code", said))


def cautions(document: Document) -> Html | None:
    """What a reader should know of the numbers, of what the document says; warnings of the run among them."""
    lines: list[Piece] = list(document.get("warnings") or [])
    measured = document.get("quality") or {}
    if "quality" in document.content or document.get("diagnostics"):
        data = measured.get("data") or document.get("data") or ""
        if data.startswith("generated scenes") and not _is_built_in(document):
            lines.append("Measured on generated scenes, not on pictures of yours: --data says what it is for them.")
    if (texts := measured.get("texts") or document.get("texts") or {}) and texts.get("cut"):
        lines.append(f"{texts['cut']} of {texts['of']} texts were truncated at {texts['at']} tokens.")
    if shared := measured.get("shared_texts"):
        lines.append(f"{shared} samples have a text of several images, each of which counts as right.")
    for purpose, rows in (document.get("pairs") or {}).items():
        if isinstance(rows, Mapping) and rows.get("bad_rows"):
            problems = ", ".join(f"{number} {problem}" for problem, number in rows["bad_rows"].items())
            lines.append(f"Rows of the data that could not be used for {purpose}: {problems}.")
    return sentences(lines) if lines else None


def _is_built_in(document: Document) -> bool:
    """Scenes are what the demos are made for."""
    return (document.get("base_model") or document.get("model")) in ("demo", "demo-vlm")


def options_table(document: Document) -> Html | None:
    """Every option of the run, folded away."""
    found: dict[str, Any] | None = document.get("options")
    if found is None:
        return None
    rows = [[name.replace("_", " "), _said(value)] for name, value in _flat(found) if value is not None]
    return folded("all options", table(["option", "value"], rows))


def _flat(found: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in found.items():
        rows += _flat(value, f"{prefix}{name}, ") if isinstance(value, Mapping) else [(f"{prefix}{name}", value)]
    return rows


def _said(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def sizes(document: Document) -> list[Html]:
    """Cards of what prune reports measure in bytes and FLOPs."""
    found = [size_card(document, name, (key,), short) for key, name in COSTS.items()]
    if own := document.get("at_own_texts"):
        mean = f"FLOPs at {in_words(own['tokens'], but=document.at('reference', 'tokens'))}, the mean of your texts"
        found.append(size_card(document, mean, ("at_own_texts", "flops"), short))
    if document.get("size_bytes"):
        found.append(size_card(document, "weights on disk", ("size_bytes",), short_bytes))
    if document.get("image_tokens"):
        found.append(size_card(document, "KV cache behind the prompt", ("image_tokens", "kv_cache_bytes"), short_bytes))
    return found


def pruned(document: Document) -> list[Html]:
    """Cards of a model that was pruned: what was lost, what was saved."""
    found, quality = sizes(document), document.get("quality")
    if quality and quality["metrics"]:
        name = quality["metric"]
        found.insert(0, metric_card(document, name, ("quality", "metrics", name), ("quality", "samples")))
    if quality:
        found.append(card("same prediction as the dense model", document.figure(("quality", "agreement"), percent)))
    return found


def totals(document: Document) -> list[Html]:
    """Cards of a model that nothing was removed from."""
    found = [card(name, document.figure((key, "total"), short)) for key, name in COSTS.items()]
    if document.get("decoder"):
        found.append(card("KV cache behind the prompt", document.figure(("decoder", "kv_cache_bytes"), short_bytes)))
        found.append(card("image tokens", document.figure(("decoder", "image_tokens"), lambda n: f"{n:,}")))
    return [*found, *_samples(document)]


def compared(document: Document) -> list[Html]:
    """Cards of a compact model that was analyzed."""
    found = [size_card(document, name, ("compact", key), short) for key, name in COSTS.items()]
    return [*found, *_samples(document)]


def _samples(document: Document) -> list[Html]:
    """What was looked at; nothing where nothing was."""
    shown = bool(document.get("samples"))
    return [card("samples", document.figure(("samples",), lambda n: f"{n:,}"), document.at("data"))] * shown
