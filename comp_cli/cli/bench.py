"""`comp bench`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .. import api
from ..errors import GateError
from ..options import BenchOptions, Gates, HubOptions
from ..report.bench import BenchReport
from . import choices
from . import shared_options as given
from .output import Output
from .perform import perform
from .shared_options import COMPUTING, GATES, MAIN, OUTPUT, option


def bench(
    context: typer.Context,
    folder: given.Folder = None,
    baseline: Annotated[
        str | None, option(MAIN, "Dense model to compare with (default: the one that FOLDER was made of).")
    ] = None,
    backend: Annotated[
        str,
        option(MAIN, "Some of torch, onnx and compile (torch.compile), with commas.", autocompletion=choices.backends),
    ] = ",".join(BenchOptions.backends),
    batch: Annotated[str, option(MAIN, "Batch sizes, with commas.")] = ",".join(map(str, BenchOptions.batches)),
    device: Annotated[
        str, option(MAIN, "auto, cpu, cuda or cuda:N. Never falls back.", autocompletion=choices.devices)
    ] = BenchOptions.device,
    min_speedup: Annotated[
        float | None, option(GATES, "Every row is so many times faster than stock on its backend.")
    ] = Gates.min_speedup,
    max_latency_ms: Annotated[
        float | None, option(GATES, "Median latency of every compact row, ms for a whole batch.")
    ] = Gates.max_latency_ms,
    max_memory_mb: Annotated[
        float | None, option(GATES, "Peak memory of a process with the compact model at the largest batch, MiB.")
    ] = Gates.max_memory_mb,
    iterations: Annotated[int, option(COMPUTING, "Least number of timed runs of each variant.")] = BenchOptions.iterations,
    duration: Annotated[float, option(COMPUTING, "Least seconds of timed runs for each batch size.")] = BenchOptions.duration,
    threads: given.Threads = BenchOptions.threads,
    text_tokens: given.TextTokens = BenchOptions.text_tokens,
    seed: given.Seed = BenchOptions.seed,
    revision: given.Revision = HubOptions.revision,
    cache_dir: given.CacheDir = HubOptions.cache_dir,
    allow_pickle: given.AllowPickle = HubOptions.allow_pickle,
    plot: Annotated[
        Path | None, option(OUTPUT, "Picture to write (.png, .svg, .pdf): latency, and speed-up against the FLOPs limit.")
    ] = BenchOptions.plot,
    save: Annotated[Path | None, option(OUTPUT, "JSON document to write, for comp compare.")] = BenchOptions.save,
    recipe: given.Recipe = None,
    form: given.Format = "human",
    as_json: given.Json = False,
    quiet: given.Quiet = False,
    no_progress: given.NoProgress = False,
) -> None:
    """Time the dense against the compact model, interleaved; the rows include stock transformers and its plain ONNX export.

    Examples:

    `comp bench compact --baseline demo`

    `comp bench hf://me/blip-compact@v1 --batch 1` (a compact model on the Hub, against the one that it was made of)

    `comp bench compact --device cuda --batch 1,8,32 --json`

    `comp bench compact --backend onnx --batch 1 --min-speedup 1.8` (a gate for CI: exit code 3)

    `comp bench compact --save bench.json` (for `comp compare`)
    """

    def show(report: Any, out: Output) -> None:
        from ..report.bench_tables import print_benchmark

        print_benchmark(report, out)
        for written in filter(None, (plot, save)):
            out.line(f"Wrote {written}.")

    def call(options: dict[str, Any], out: Output) -> BenchReport:
        try:
            return api.bench(**options, progress=out)
        except GateError as missed:
            show(missed.report, out)
            raise

    perform(context, call, show)
