"""The tables of `comp analyze`."""

import shlex
from collections.abc import Sequence

from .analyze import AnalyzeReport, DecoderCost, Diagnostics
from .numbers import Printer, gflops, mib, millions, percent
from .prune_tables import in_words


def print_analysis(report: AnalyzeReport, out: Printer, model: str, again: Sequence[str]) -> None:
    """Towers, layers with their inequality, diagnostics, and the next command.

    model: as it was typed. again: options that the next command repeats.
    """
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
