"""The tables of `comp prune`."""

import shlex
from collections.abc import Callable, Mapping

from ..engine import flops
from ..families import find_family
from ..options import flag
from ..plan import LayerPlan, Plan
from ..tasks.base import is_share
from .base import Sizes
from .numbers import Printer, change, gflops, mib, millions, percent
from .prune import Estimate, ImageTokens, LayerKept, PruneReport, Quality, Reading

Params = Mapping[tuple[str, int, str], int]  # (tower, layer, part) -> parameters
KINDS = {"vision": "image", "language": "text"}  # of the streams that are named after their towers


def metric_value(name: str, value: float) -> str:
    """A share in percent; what is none, in points as papers have it."""
    return percent(value) if is_share(name) else f"{100 * value:.1f}"


def layer_rows(
    plan: Plan, dense: Plan, reference: flops.Reference, params: tuple[Params, Params] | None = None
) -> tuple[LayerKept, ...]:
    """One row per layer: what is left of heads, channels and tokens. params: of every part, dense and compact."""
    rows = []
    counted = {(row.tower, row.layer): row for row in flops.count(plan, reference).layers}
    before_it = {(row.tower, row.layer): row for row in flops.count(dense, reference).layers}
    for tower in plan.towers:
        full = dense.tower(tower.name).layers
        for index, (layer, before) in enumerate(zip(tower.layers, full, strict=True)):
            row = counted[tower.name, index]
            rows.append(
                LayerKept(
                    tower=tower.name,
                    layer=index,
                    heads=_of(layer, before, "attention"),
                    cross_heads=_of(layer, before, "cross"),
                    ffn=_of(layer, before, "ffn"),
                    tokens=[row.tokens_out, sum(reference.tokens[stream] for stream in tower.streams)],
                    flops=row.total,
                    flops_of=_of_parts(before_it[tower.name, index], row),
                    params_of=None if params is None else _params_of(params, tower.name, index),
                )
            )
    return tuple(rows)


def _of_parts(dense: flops.LayerFlops, compact: flops.LayerFlops) -> dict[str, Sizes]:
    """FLOPs of the parts of a layer; what no plan prunes of it counts with the last one."""
    last = list(dense.parts)[-1]
    return {part: Sizes(*(side.parts[part] + side.whole * (part == last) for side in (dense, compact))) for part in dense.parts}


def _params_of(params: tuple[Params, Params], tower: str, index: int) -> dict[str, Sizes]:
    dense, compact = params
    own = (key for key in dense if key[:2] == (tower, index))
    return {key[2]: Sizes(dense[key], compact[key]) for key in own}


def _of(layer: LayerPlan, dense: LayerPlan, part: str) -> list[int] | None:
    """Kept and dense units of a part, None where the layer has none of that name."""
    return [len(layer.kept(part)), len(dense.kept(part))] if part in layer.parts else None


def print_plan(report: PruneReport, out: Printer) -> None:
    """The plan layer by layer: kept / dense."""

    def cell(pair: list[int] | None) -> str:
        return "-" if pair is None else f"{pair[0]} / {pair[1]}"

    rows = [
        [f"{row.tower} {row.layer}", *map(cell, (row.heads, row.cross_heads, row.ffn, row.tokens)), gflops(row.flops)]
        for row in report.layers
    ]
    columns = ["layer", "heads", "cross heads", "FFN channels", "tokens kept", "FLOPs"]
    plan = "Plan" if report.estimate is None or report.estimate.assumed is None else "Assumed plan"
    out.table(f"{plan} for {report.base_model} at ratio {report.ratio:.3f} (kept / dense)", columns, rows)
    out.line(
        f"FLOPs {gflops(report.flops.dense)} -> {gflops(report.flops.compact)}, parameters {millions(report.params.dense)} -> "
        f"{millions(report.params.compact)}. On {report.threads}."
    )
    _print_target(report, out)
    _print_at_own_texts(report, out)
    if report.estimate is None and report.output is None:  # of a target
        out.line("Nothing was written (--dry-run).")
    elif report.estimate is None:
        out.line(
            f"Wrote the plan to {report.output}. Next: comp prune {report.base_model} --plan {shlex.quote(str(report.output))}"
        )
    else:
        print_estimate(report, report.estimate, out)


def print_estimate(report: PruneReport, found: Estimate, out: Printer) -> None:
    """What a run is expected to end with, and what of it was assumed."""

    def between(pair: tuple[int, int], shown: Callable[[int], str]) -> str:
        return shown(pair[0]) if pair[0] == pair[1] else f"{shown(pair[0])} to {shown(pair[1])}"

    rows = [[*row, ""] for row in comparison_rows(report)]
    for row in rows:
        if row[0] == "parameters":
            row[-1] = between(found.params, millions)
        if row[0] == "weights on disk":
            row[-1] = between(found.size_bytes, mib)
    if (ms := found.latency_ms) is not None:
        rows.append(
            [f"latency on {found.device}, ms", f"{ms.dense:.1f}", f"{ms.compact:.1f}", change(ms.dense, ms.compact), ""]
        )
    out.table("Estimate", ["", "dense", "compact", "change", "other plans"], rows)
    said = "The plan is that of the search" if found.assumed is None else f"Assumed: {found.assumed}"
    out.line(f"{said}. Weights take {mib(found.peak_weights_bytes)} of memory at most while pruning.")
    if found.latency_ms is None:
        out.line(f"No latency: {found.latency}.")
    told = "" if found.assumed is None else " --plan-only makes the real plan."
    out.line(f"Nothing was written (--dry-run), {report.seconds or 0:.0f} s.{told}")


def stage_rows(found: ImageTokens) -> list[list[str]]:
    """Before which layer, by which rule, how many of how many stay."""
    return [
        [f"before layer {stage.layer}", stage.rule, f"{stage.kept} / {stage.of}"]
        + [f"{100 * stage.kept / found.of:.1f} %" + " of any image" * (stage.share is not None)]
        for stage in found.stages
    ]


def writing_rows(found: ImageTokens) -> list[list[str]]:
    """Of a decoder that reads images, in the same columns as `comparison_rows`: tokens, and what is written behind them."""
    step, cache = found.step_flops, found.kv_cache_bytes
    return [
        ["image tokens, mean over layers", str(found.of), f"{found.mean:.2f}", change(found.of, found.mean)],
        ["FLOPs of a written token", gflops(step.dense), gflops(step.compact), change(step.dense, step.compact)],
        ["KV cache behind the prompt", mib(cache.dense), mib(cache.compact), change(cache.dense, cache.compact)],
    ]


def comparison_rows(report: PruneReport) -> list[list[str]]:
    """Measure, dense, compact, change: the table that ends `comp prune`."""
    flops, params, size, quality = report.flops, report.params, report.size_bytes, report.quality
    rows = [
        ["parameters", millions(params.dense), millions(params.compact), change(params.dense, params.compact)],
        ["FLOPs per pair", gflops(flops.dense), gflops(flops.compact), change(flops.dense, flops.compact)],
    ]
    if (own := report.at_own_texts) is not None:
        name = f"FLOPs per pair of {in_words(own.tokens, but=report.reference.tokens)}"
        rows.append([name, gflops(own.flops.dense), gflops(own.flops.compact), change(own.flops.dense, own.flops.compact)])
    if (found := report.image_tokens) is not None:
        rows += writing_rows(found)
    for tower in dict.fromkeys(row.tower for row in report.layers) if found is None else ():
        outs, (entering, *_) = zip(*(row.tokens for row in report.layers if row.tower == tower), strict=True)
        mean = sum(outs) / len(outs)
        rows.append([f"{tower} tokens, mean over layers", str(entering), f"{mean:.1f}", change(entering, mean)])
    if size is not None:
        rows.append(["weights on disk", mib(size.dense), mib(size.compact), change(size.dense, size.compact)])
    return rows + quality_rows(quality)


def quality_rows(quality: Quality | None) -> list[list[str]]:
    """What was measured, in the same columns; nothing where nothing was."""
    if quality is None:
        return []
    rows = []
    for name, found in (quality.metrics or {}).items():
        points = f"{100 * (found.compact - found.dense):+.1f} points"
        shown = [metric_value(name, value) for value in (found.dense, found.compact)]
        rows.append([f"{name} ({quality.samples} pairs)", *shown, points])
    return [*rows, [f"prediction agreement ({quality.samples} pairs)", "", percent(quality.agreement), ""]]


def in_words(tokens: Mapping[str, int], but: Mapping[str, int] | None = None) -> str:
    """ "577 image tokens, 35 text tokens". but: tokens of another input; what is as many in it is left out."""
    others = but or {}
    named = {KINDS.get(stream, stream): number for stream, number in tokens.items() if number != others.get(stream)}
    return ", ".join(f"{number} {kind} tokens" for kind, number in named.items())


def target_value(kind: str, found: Reading) -> str:
    """What was measured for a target, with its interval where it has one."""
    if kind == "target_size":
        return f"{found.value / 1e6:,.3f} MB"
    if kind == "max_drop":
        return f"{found.value:.2f} points"
    unit = "times" if kind == "target_speedup" else "ms"
    return f"{found.value:.2f} {unit} ({found.low:.2f} to {found.high:.2f})"


def _print_target(report: PruneReport, out: Printer) -> None:
    """What decided the ratio."""
    if (found := report.target) is None:
        return
    asked = f"{found.wanted / 1e6:g}MB" if found.kind == "target_size" else f"{found.wanted:g}"
    of_dense = "" if found.dense is None else f", of {target_value(found.kind, found.dense)} dense"
    measured = f"{target_value(found.kind, found.measured)}{of_dense}"
    out.line(f"{flag(found.kind)} {asked}: ratio {found.ratio:g} of {len(found.tried)} that were tried; {measured}.")
    if found.kind != "target_size":
        chosen = "The ratio was chosen on" if found.kind == "max_drop" else "Measured:"
        out.line(f"{chosen} {found.on}.")
    if found.missed:
        out.line(f"Made and measured, it was missed at ratio {', '.join(f'{ratio:g}' for ratio in found.missed)}.")


def _print_at_own_texts(report: PruneReport, out: Printer) -> None:
    if (own := report.at_own_texts) is not None:
        at = in_words(own.tokens, but=report.reference.tokens)
        out.line(f"At {at}, the mean of the {own.purpose} pairs, the ratio is {own.ratio:.3f}.")


def print_pruned(report: PruneReport, out: Printer) -> None:
    """Dense against compact, on what, and the next command; the plan of a dry run."""
    if report.quality is None:
        return print_plan(report, out)
    if report.image_tokens is not None and report.image_tokens.stages:
        out.table("Image tokens that stay", ["stage", "rule", "tokens", "of an image"], stage_rows(report.image_tokens))
    columns = ["", "dense", "compact", "change"]
    out.table(f"{report.base_model} at ratio {report.ratio:.3f}", columns, comparison_rows(report))
    out.line(
        f"Reference input: {in_words(report.reference.tokens)}; FLOPs are 2 x multiply-"
        f"accumulates. Quality on {report.quality.data}. {report.seconds or 0:.0f} s on {report.threads}."
    )
    _print_at_own_texts(report, out)
    _print_target(report, out)
    if report.cost is not None:
        out.line(f"The search took as long as {report.cost.dense_passes:.1f} dense passes over the calibration pairs.")
    print_streamed(report, out)
    out.line(f"Wrote {report.output}.")
    out.line(f"Next: {_next(report)}")


def print_streamed(report: PruneReport, out: Printer) -> None:
    """Of a model that was larger than memory."""
    if (found := report.streamed) is not None:
        of = "of dense and compact weights in fp32" if found.device is None else "that a run in memory takes there"
        held = f"{mib(found.needed_bytes)} {of} were never held at once"
        where = "resident" if found.device is None else f"taken on {found.device}"
        out.line(f"Layer by layer: {held}; {mib(found.peak_bytes or 0)} were {where} at most.")


def _next(report: PruneReport) -> str:
    """What to do with the folder."""
    place, (family, _, _) = shlex.quote(str(report.output)), find_family({"architectures": [report.architecture]})
    if family.topology.drops_in != "decoder":
        return f"comp export {place}"
    if report.options.uniform:
        return f'{report.architecture}.from_pretrained("{report.output}"), or what else reads this class'
    return f"comp bench {place}"
