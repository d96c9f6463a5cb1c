"""The tables of `comp prune` where image tokens leave a decoder."""

from ..checkpoint.hub import DEMOS
from ..engine import flops, token_schedules
from ..plan import Plan
from .base import Sizes
from .numbers import Printer, change, gflops, mib, millions
from .prune import ImageTokens, PruneReport, TokensLeft
from .prune_tables import in_words, print_streamed, quality_rows, stage_rows, writing_rows


def image_tokens(plan: Plan, dense: Plan, reference: flops.Reference, bytes_of_a_number: int) -> ImageTokens:
    """What becomes of the tokens of the reference image in a decoder, and what it saves behind it."""
    stream, tower = reference.family.decoder_of_images
    tokens, layers = reference.tokens[stream], len(plan.tower(tower.name).layers)
    left = [tokens, *(stage.left(tokens) for stage in plan.stages)]
    stages = (
        TokensLeft(stage.layer, stage.rule, kept, of, stage.share)
        for stage, kept, of in zip(plan.stages, left[1:], left, strict=False)
    )
    return ImageTokens(
        of=tokens,
        mean=round(token_schedules.mean_tokens(plan.stages, tokens, layers), 4),
        stages=tuple(stages),
        step_flops=Sizes(*(flops.decode_step(each, reference).total for each in (dense, plan))),
        kv_cache_bytes=Sizes(*(sum(flops.kv_bytes(each, reference, bytes_of_a_number)) for each in (dense, plan))),
    )


def token_rows(report: PruneReport, found: ImageTokens) -> list[list[str]]:
    """Measure, dense, compact, change."""
    prompt, params, size = report.flops, report.params, report.size_bytes
    mean, *behind = writing_rows(found)
    rows = [
        mean,
        ["FLOPs of the prompt", gflops(prompt.dense), gflops(prompt.compact), change(prompt.dense, prompt.compact)],
        *behind,
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
        out.line(f"Quality on {report.quality.data}, on {report.threads}.")
    elif report.options.data.data is not None or report.options.model in DEMOS:
        out.line("No quality was measured: the run without --dry-run does that.")
    else:
        out.line("No quality was measured: --data with pairs of yours does that.")
    print_streamed(report, out)
    if report.output is None:
        return out.line("Nothing was written (--dry-run).")
    ways = {"linked": "hard links to those of the dense model", "refitted": "refitted", "tuned": "fine-tuned"}
    how = ways.get(found.weights or "", "copies")
    out.line(f"Wrote {report.output} in {report.seconds or 0:.1f} s; its weights are {how}.")
    out.line(
        f'Next: AutoModelForImageTextToText.from_pretrained("{report.output}", trust_remote_code=True); README.md says more.'
    )
