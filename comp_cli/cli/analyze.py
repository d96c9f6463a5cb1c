"""`comp analyze`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .. import api
from ..options import AnalyzeOptions, DataOptions, HubOptions, flag
from . import shared_options as given
from .output import Output
from .perform import perform
from .shared_options import MAIN, OUTPUT, option

COLUMNS = ("image_column", "text_column", "label_column", "answer_column", "split_column")
SAME = ("data", "task", "split", *COLUMNS, "text_tokens", "score_rows", "device", "revision", "cache_dir")  # for `comp prune`


def analyze(
    context: typer.Context,
    model: given.Model,
    data: given.Data = DataOptions.data,
    task: given.TaskName = AnalyzeOptions.task,
    num_samples: given.NumSamples = AnalyzeOptions.num_samples,
    split: given.Split = DataOptions.split,
    image_column: given.ImageColumn = DataOptions.image_column,
    text_column: given.TextColumn = DataOptions.text_column,
    label_column: given.LabelColumn = DataOptions.label_column,
    answer_column: given.AnswerColumn = DataOptions.answer_column,
    split_column: given.SplitColumn = DataOptions.split_column,
    batch_size: given.BatchSize = AnalyzeOptions.batch_size,
    text_tokens: given.TextTokens = AnalyzeOptions.text_tokens,
    score_rows: given.ScoreRows = AnalyzeOptions.score_rows,
    seed: given.Seed = AnalyzeOptions.seed,
    device: given.Device = AnalyzeOptions.device,
    threads: given.Threads = AnalyzeOptions.threads,
    png: given.Png = AnalyzeOptions.png,
    revision: given.Revision = HubOptions.revision,
    cache_dir: given.CacheDir = HubOptions.cache_dir,
    allow_pickle: given.AllowPickle = HubOptions.allow_pickle,
    html: Annotated[
        Path | None, option(MAIN, "Page to write: the report to look at, one file without network or script.")
    ] = AnalyzeOptions.html,
    overwrite: Annotated[bool, option(OUTPUT, "Replace a page that comp wrote before.", "--overwrite")] = False,
    recipe: given.Recipe = None,
    form: given.Format = "human",
    as_json: given.Json = False,
    quiet: given.Quiet = False,
    no_progress: given.NoProgress = False,
) -> None:
    """Show where FLOPs and parameters are, how unequal heads, channels and tokens are, and how their scores interfere; of a
    compact model what is left of every layer, and which tokens stay.

    Examples:

    `comp analyze demo`

    `comp analyze demo --html demo.html` (the same to look at)

    `comp analyze Salesforce/blip-itm-base-coco --data pairs.jsonl --json`

    `comp analyze compact --data pairs.jsonl --png tokens.png`
    """

    def show(report: Any, out: Output) -> None:
        from ..report.analyze_tables import print_analysis

        print_analysis(report, out, model, _again(context))
        if html:
            out.line(f"Wrote {html}.")

    perform(context, lambda options, out: api.analyze(**options, progress=out), show, lambda report: html)


def _again(context: typer.Context) -> list[str]:
    """What was typed or stands in a recipe about the model and its data, which `comp prune` has to be told as well."""
    sources = {name: context.get_parameter_source(name) for name in SAME}
    typed = [name for name, source in sources.items() if source is not None and source.name in ("COMMANDLINE", "DEFAULT_MAP")]
    words = [word for name in typed for word in (flag(name), str(context.params[name]))]
    return words + ["--allow-pickle"] * bool(context.params["allow_pickle"])
