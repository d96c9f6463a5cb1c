"""The tables of `comp analyze`."""

import shlex
from collections.abc import Sequence

from .analyze import AnalyzeReport, Compared, DecoderCost, Diagnostics, LayerCompared
from .base import Sizes
from .numbers import Printer, gflops, mib, millions, percent
from .prune_tables import in_words
from .samples import SampleKept


def print_analysis(report: AnalyzeReport, out: Printer, model: str, again: Sequence[str]) -> None:
    """Towers, layers with their inequality, diagnostics, and the next command.

    model: as it was typed. again: options that the next command repeats.
    """
    if report.compact is not None:
        return print_compact(report, report.compact, out, model)
    if report.decoder is not None:
        return print_decoder(report, report.decoder, out, model, again)
    total_flops, total_params = report.flops.total, report.params.total
    sums: dict[tuple[str, str], list[int]] = {}
    for layer in report.layers:
        for part in layer.flops:
            entry = sums.setdefault((layer.tower, part), [0, 0])
            entry[0] += layer.flops[part]
            entry[1] += layer.params[part]
    rows = [
        [f"{tower} {part}", gflops(f), percent(f / total_flops), millions(p), percent(p / total_params)]
        for (tower, part), (f, p) in sums.items()
        if f
    ]
    outside_f, outside_p = report.flops.outside_layers, report.params.outside_layers
    outside = [gflops(outside_f), percent(outside_f / total_flops), millions(outside_p), percent(outside_p / total_params)]
    rows.append(["embeddings and heads", *outside])
    rows.append(["all", gflops(total_flops), "100 %", millions(total_params), "100 %"])
    title = f"{report.model}: FLOPs per pair ({in_words(report.reference.tokens)}) and parameters"
    out.table(title, ["part", "FLOPs", "", "params", ""], rows)
    rows = []
    for layer, uneven in zip(report.layers, report.inequality, strict=True):
        cells = [uneven.attention, uneven.cross, uneven.ffn, uneven.tokens]
        rows.append(
            [
                f"{layer.tower} {layer.layer}",
                gflops(sum(layer.flops.values())),
                millions(sum(layer.params.values())),
                *("-" if cell is None else f"{cell:.2f}" for cell in cells),
            ]
        )
    columns = ["layer", "FLOPs", "params", "heads", "cross heads", "channels", "tokens"]
    out.table("Inequality of importance (Gini: 0 all alike, 1 one has it all)", columns, rows)
    if report.diagnostics is not None:
        print_diagnosis(report.diagnostics, out)
    out.line(f"On {report.threads}.")
    out.line(f"Next: {shlex.join(['comp', 'prune', model, '--ratio', '0.5', *again, '-o', 'compact'])}")


def print_decoder(report: AnalyzeReport, found: DecoderCost, out: Printer, model: str, again: Sequence[str]) -> None:
    """Parts of a decoder that reads images, what schedules of token stages would save, and the next command."""
    rows = [
        [one.part, gflops(one.flops), percent(one.flops / report.flops.total), gflops(one.step_flops)]
        + [millions(one.params), percent(one.params / report.params.total)]
        for one in found.parts
    ]
    step = sum(one.step_flops for one in found.parts)
    rows.append(["all", gflops(report.flops.total), "100 %", gflops(step), millions(report.params.total), "100 %"])
    title = f"{report.model}: a prompt ({in_words(report.reference.tokens)}), a token behind it, parameters"
    out.table(title, ["part", "FLOPs", "", "FLOPs of a token", "params", ""], rows)
    rows = [
        ["all of them", f"{found.image_tokens:,}", gflops(report.flops.total), "1.00x", gflops(step), mib(found.kv_cache_bytes)]
    ]
    for one in found.savings:
        costs = [gflops(one.flops), f"{one.flops_reduction:.2f}x", gflops(one.step_flops), mib(one.kv_cache_bytes)]
        rows.append([f"{one.method} {one.stages}", f"{one.tokens:.2f}", *costs])
    columns = ["image tokens that stay", "mean", "FLOPs of the prompt", "less", "FLOPs of a token", "keys and values"]
    out.table("What it would save if image tokens left", columns, rows)
    out.line(f"The vision tower has {'a' if found.class_token else 'no'} [CLS] that ranks image tokens.")
    if found.savings:
        method, tokens = found.savings[-1].method, str(round(found.savings[-1].tokens))
        words = ["comp", "prune", model, "--method", method, "--tokens", tokens, *again, "-o", "compact"]
        out.line(f"Next: {shlex.join(words)}")


def print_compact(report: AnalyzeReport, found: Compared, out: Printer, model: str) -> None:
    """A compact model beside its dense one, by part and by layer, and which tokens of samples stay."""
    rows = [
        [f"{one.tower} {one.part}".strip(), gflops(one.flops.dense), gflops(one.flops.compact), _change(one.flops)]
        + [millions(one.params.dense), millions(one.params.compact), _change(one.params)]
        for one in found.parts
        if one.flops.dense or one.params.dense
    ]
    rows.append(
        ["all", gflops(found.flops.dense), gflops(found.flops.compact), _change(found.flops)]
        + [millions(found.params.dense), millions(found.params.compact), _change(found.params)]
    )
    title = f"{report.model}: {found.base_model} pruned by {found.method}, ratio {found.ratio:.3f}"
    out.table(title, ["part", "FLOPs", "are now", "", "params", "are now", ""], rows)
    for tower in dict.fromkeys(one.tower for one in found.layers):
        print_layers(tower, [one for one in found.layers if one.tower == tower], out)
    if found.stages:
        rows = [[f"before layer {one.layer}", one.rule, f"{one.of} -> {one.kept}"] for one in found.stages]
        out.table("Image tokens that stay", ["stage", "rule", "tokens"], rows)
    out.line(f"Reference input: {in_words(report.reference.tokens)}; FLOPs are 2 x multiply-accumulates.")
    for sample in report.kept_samples:
        print_sample(sample, out)
    if report.kept_samples:
        words = ["comp", "analyze", model, "--png", "tokens.png"]
        out.line(f"Samples: {report.data}. As a picture: {shlex.join(words)}")


def print_layers(tower: str, layers: Sequence[LayerCompared], out: Printer) -> None:
    """The layers of a tower, a column for each kind of units that it has."""
    kinds = {"heads": "heads", "cross heads": "cross_heads", "FFN": "ffn", "tokens": "tokens"}
    shown = {title: name for title, name in kinds.items() if any(getattr(one, name) for one in layers)}
    rows = [
        [str(one.layer), *(_from_to(getattr(one, name)) for name in shown.values()), _change(one.flops), _change(one.params)]
        for one in layers
    ]
    out.table(f"Layers of the {tower} tower: dense -> compact", ["layer", *shown, "FLOPs", "params"], rows)


def print_sample(sample: SampleKept, out: Printer) -> None:
    """How many patches stay where, and the words that do: those that leave in brackets."""
    out.line(" ".join(filter(None, [sample.text and f'"{sample.text}"', sample.said and f"-> {sample.said}"])) or "An image:")
    for stream in sample.streams:
        if stream.words is None:
            steps = ", ".join(f"{len(kept.kept)} {stream.at} layer {kept.layer}" for kept in stream.layers)
            out.line(f"  {stream.tokens} patches{': ' if steps else ' stay'}{steps}")
            continue
        for kept in stream.layers:
            words = (word if index in kept.kept else f"({word})" for index, word in enumerate(stream.words))
            out.line(f"  {stream.at} layer {kept.layer}: {' '.join(words)}")


def _from_to(pair: list[int] | None) -> str:
    """Of [compact, dense]."""
    return "-" if pair is None else f"{pair[1]}" if pair[0] == pair[1] else f"{pair[1]} -> {pair[0]}"


def _change(sizes: Sizes) -> str:
    """In whole percents."""
    return f"{100 * (sizes.compact / sizes.dense - 1):+.0f} %" if sizes.dense else "-"


def print_diagnosis(found: Diagnostics, out: Printer) -> None:
    """One row per layer, and what the columns mean."""
    rows = []
    for layer in found.layers:
        shares = [layer.overlap.get(part) for part in ("attention", "cross", "ffn")] + [layer.chance]
        heads = layer.influence
        shares += [heads.changed_by_least, heads.changed_by_all, heads.strong] if heads else [None] * 3
        rows.append([f"{layer.tower} {layer.layer}", *("-" if share is None else percent(share) for share in shares)])
    columns = [
        "layer",
        "overlap: heads",
        "cross heads",
        "channels",
        "chance",
        "kept-set change: least heads",
        "any head",
        "strong",
    ]
    out.table("Cross-mode interference", columns, rows)
    top, least, kept, strong = (
        f"{100 * share:g} %" for share in (found.top_tokens, found.least_heads, found.kept_tokens, found.strong)
    )
    out.line(
        f"overlap: the {top} of the tokens that drive a part's plain importance, with the {top} that score best. "
        f"kept-set change: share of the best {kept} of the tokens that changes without one of the {least} least important "
        f"heads of the layer, and without any one; strong: how many of the least important change {strong} or more."
    )
    for one in found.conclusions:
        out.line(one.sentence)
