"""The tables of `comp prune` where image tokens leave a decoder."""

from .numbers import Printer, change, gflops, mib, millions
from .prune import ImageTokens, PruneReport
from .prune_tables import in_words, quality_rows


def stage_rows(found: ImageTokens) -> list[list[str]]:
    """Before which layer, by which rule, how many of how many stay."""
    return [
        [f"before layer {stage.layer}", stage.rule, f"{stage.kept} / {stage.of}"]
        + [f"{100 * stage.kept / found.of:.1f} %" + " of any image" * (stage.share is not None)]
        for stage in found.stages
    ]


def token_rows(report: PruneReport, found: ImageTokens) -> list[list[str]]:
    """Measure, dense, compact, change."""
    flops, params, size = report.flops, report.params, report.size_bytes
    step, cache = found.step_flops, found.kv_cache_bytes
    rows = [
        ["image tokens, mean over layers", str(found.of), f"{found.mean:.2f}", change(found.of, found.mean)],
        ["FLOPs of the prompt", gflops(flops.dense), gflops(flops.compact), change(flops.dense, flops.compact)],
        ["FLOPs of a written token", gflops(step.dense), gflops(step.compact), change(step.dense, step.compact)],
        ["KV cache behind the prompt", mib(cache.dense), mib(cache.compact), change(cache.dense, cache.compact)],
        ["parameters", millions(params.dense), millions(params.compact), change(params.dense, params.compact)],
    ]
    if size is not None:
        rows.append(["weights on disk", mib(size.dense), mib(size.compact), change(size.dense, size.compact)])
    return rows + quality_rows(report.quality)


def print_tokens_pruned(report: PruneReport, found: ImageTokens, out: Printer) -> None:
    """Where tokens leave, what it saves, what was measured, and where it was written."""
    title = f"{report.base_model} by {report.options.method}: image tokens that stay"
    out.table(title, ["stage", "rule", "tokens", "of an image"], stage_rows(found))
    out.table("Dense against compact", ["", "dense", "compact", "change"], token_rows(report, found))
    out.line(f"Reference input: {in_words(report.reference.tokens)}; FLOPs are 2 x multiply-accumulates.")
    if report.quality is not None:
        out.line(f"Quality on {report.quality.data}.")
    else:
        out.line("No quality was measured: --data with pairs of yours does that.")
    if report.output is None:
        return out.line("Nothing was written (--dry-run).")
    how = "hard links to those of the dense model" if found.weights == "linked" else "copies"
    out.line(f"Wrote {report.output} in {report.seconds or 0:.1f} s; its weights are {how}.")
    out.line(
        f'Next: AutoModelForImageTextToText.from_pretrained("{report.output}", trust_remote_code=True); README.md says more.'
    )
