"""`comp prune`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .. import api
from ..engine.methods import DECODER, ENCODER, METHODS, methods_for
from ..errors import CompError
from ..options import (
    LEARNING_RATE,
    USUAL,
    DataOptions,
    HubOptions,
    PruneOptions,
    TargetOptions,
    TokenOptions,
    Training,
)
from . import choices
from . import shared_options as given
from .output import Output
from .perform import perform
from .shared_options import ABLATIONS, DATA, MAIN, OUTPUT, SEARCH, TOKENS, TUNING, option

KINDS = {
    ENCODER: "Methods:",
    DECODER: "Methods for image-text decoders (LLaVA and its kin), which take a number of image tokens:",
}
EPILOG = "\n\n".join(
    "\n\n".join(
        [said, *(f"* `{name}`: {METHODS[name].description}" for name in methods_for(kind, only_tokens=kind == DECODER))]
    )
    for kind, said in KINDS.items()
)


def prune(
    context: typer.Context,
    model: given.Model,
    ratio: Annotated[
        str | None,
        option(
            MAIN,
            "FLOPs reduction, 0 to 1 (0.5 removes half); several (0.3,0.5,0.7) share the calibration; not for --tokens.",
            metavar="FLOAT[,FLOAT...]",
            show_default=False,
        ),
    ] = None,
    tokens: Annotated[
        int | None, option(TOKENS, "Of an image: the mean over the layers, or what a one-shot rule keeps.")
    ] = TokenOptions.tokens,
    tokens_share: Annotated[
        float | None, option(TOKENS, "The same as a share of an image's tokens, for images of any size.")
    ] = TokenOptions.tokens_share,
    token_stages: Annotated[
        str | None, option(TOKENS, "The stages themselves, LAYER:COUNT or LAYER:SHARE: 0:172,2:77,22:15.")
    ] = TokenOptions.token_stages,
    saliency: Annotated[
        choices.Saliency | None, option(TOKENS, "What vitcop ranks by in the LLM (default: by the model).")
    ] = TokenOptions.saliency,
    compat: Annotated[
        bool, option(TOKENS, "Follow the authors' code where it departs from their formula.", "--compat")
    ] = TokenOptions.compat,
    refit: Annotated[
        bool, option(TOKENS, "Refit the LLM's output projections on the pairs: tokens cost less accuracy.", "--refit")
    ] = TokenOptions.refit,
    link: Annotated[bool, option(TOKENS, "Hard links to the model's weights in place of copies.", "--link")] = False,
    output: Annotated[Path | None, given.output_dir("MODEL-comp-RATIO or MODEL-METHOD-TOKENS")] = None,
    data: given.Data = DataOptions.data,
    max_drop: Annotated[
        float | None,
        option(MAIN, "Points that the metric may fall, else exit code 3; alone: remove as much as loses no more."),
    ] = None,
    target_speedup: Annotated[
        float | None, option(MAIN, "In place of --ratio: times faster than the dense model, in torch at batch 1.")
    ] = TargetOptions.target_speedup,
    target_latency_ms: Annotated[
        float | None, option(MAIN, "In place of --ratio: ms of a forward pass here, in torch at batch 1.")
    ] = TargetOptions.target_latency_ms,
    target_size: Annotated[
        str | None, option(MAIN, "In place of --ratio: what model.safetensors may have, 100MB or 95MiB.")
    ] = None,
    task: given.TaskName = PruneOptions.task,
    effort: Annotated[
        choices.Effort, option(MAIN, "How much is looked at; options that say it themselves win.")
    ] = PruneOptions.effort,
    num_samples: Annotated[
        int | None, option(DATA, f"Image-text pairs for calibration (default: {USUAL.num_samples}).")
    ] = PruneOptions.num_samples,
    eval_samples: Annotated[
        int | None, option(DATA, f"Pairs of the final comparison (default: {USUAL.eval_samples}).")
    ] = PruneOptions.eval_samples,
    split: given.Split = DataOptions.split,
    image_column: given.ImageColumn = DataOptions.image_column,
    text_column: given.TextColumn = DataOptions.text_column,
    label_column: given.LabelColumn = DataOptions.label_column,
    answer_column: given.AnswerColumn = DataOptions.answer_column,
    split_column: given.SplitColumn = DataOptions.split_column,
    method: Annotated[
        choices.Method,
        option(SEARCH, "What is scored and removed, see Methods below; with --tokens cover.", metavar="METHOD"),
    ] = PruneOptions.method,
    stages: Annotated[int | None, option(SEARCH, f"Stages of comp-paper (default: {USUAL.stages}).")] = PruneOptions.stages,
    modes: Annotated[
        str | None, option(SEARCH, "What is removed, with commas: language_params,image_tokens (default: by the model).")
    ] = None,
    tokens_method: Annotated[
        choices.TokensMethod | None,
        option(SEARCH, "How image tokens leave a decoder where parameters go too (default: cover).", metavar="METHOD"),
    ] = PruneOptions.tokens_method,
    uniform: Annotated[
        bool,
        option(SEARCH, "As many heads and channels in every layer of a decoder: a folder of the stock class.", "--uniform"),
    ] = PruneOptions.uniform,
    looks: Annotated[
        int | None, option(SEARCH, "Plans that are compared at most; 0 for none (default: as many as it takes; from disk 2).")
    ] = PruneOptions.looks,
    stage_samples: Annotated[
        int | None, option(SEARCH, f"Pairs that judge a plan or a stage (default: {USUAL.stage_samples}).")
    ] = PruneOptions.stage_samples,
    steps: Annotated[int, option(TUNING, "Fine-tuning steps (0: training-free).")] = Training.steps,
    epochs: Annotated[float | None, option(TUNING, "Fine-tuning epochs over --data.")] = Training.epochs,
    lr: Annotated[float | None, option(TUNING, f"Learning rate (default: {LEARNING_RATE}).")] = Training.lr,
    train_batch_size: Annotated[int, option(TUNING, "Pairs of one step, over all processes.")] = Training.batch_size,
    stage_share: Annotated[
        float, option(TUNING, "Share of the steps inside the stages, while units fade (CoMP: 0.5).")
    ] = Training.stage_share,
    distill: Annotated[
        float, option(TUNING, "Distillation weight w: loss = (1-w) task + w KL(dense, compact).")
    ] = Training.distill,
    mixed_precision: Annotated[
        choices.Precision | None, option(TUNING, "Of the training (default: accelerate's configuration).")
    ] = Training.mixed_precision,
    recover: Annotated[bool, option(ABLATIONS, "Refit output projections in closed form.")] = PruneOptions.recover,
    sequential: Annotated[
        bool, option(ABLATIONS, "Refit once more in sequence, towards the dense residual stream.")
    ] = PruneOptions.sequential,
    cip: Annotated[bool, option(ABLATIONS, "Token-weighted activations (CIP, Eq. 4).")] = PruneOptions.cip,
    cit: Annotated[
        bool, option(ABLATIONS, "Head-weighted token importance (CIT, Eq. 7), while units fade.")
    ] = PruneOptions.cit,
    explore: Annotated[bool, option(ABLATIONS, "Random exploration (RE, Eq. 9).")] = PruneOptions.explore,
    history: Annotated[bool, option(ABLATIONS, "History information (HI, Eq. 10).")] = PruneOptions.history,
    batch_size: given.BatchSize = PruneOptions.batch_size,
    text_tokens: given.TextTokens = PruneOptions.text_tokens,
    score_rows: given.ScoreRows = PruneOptions.score_rows,
    seed: given.Seed = PruneOptions.seed,
    device: given.Device = PruneOptions.device,
    threads: given.Threads = PruneOptions.threads,
    revision: given.Revision = HubOptions.revision,
    cache_dir: given.CacheDir = HubOptions.cache_dir,
    allow_pickle: given.AllowPickle = HubOptions.allow_pickle,
    dtype: Annotated[
        choices.Dtype | None, option(OUTPUT, "Of the written weights (default: checkpoint dtype).")
    ] = PruneOptions.dtype,
    max_memory: Annotated[
        str | None, option(MAIN, "What it may take, 1GiB: a larger image-text decoder goes layer by layer.")
    ] = None,
    overwrite: given.Overwrite = False,
    resume: Annotated[bool, option(OUTPUT, "Go on where a run with the same settings was stopped.")] = True,
    dry_run: Annotated[
        bool, option(OUTPUT, "Estimate size, FLOPs and latency within seconds; write nothing.", "--dry-run")
    ] = False,
    plan_only: Annotated[bool, option(OUTPUT, "Search, and write the plan to -o FILE.json.", "--plan-only")] = False,
    plan: Annotated[
        Path | None, option(OUTPUT, "A file of --plan-only: make its model without searching.", metavar="FILE")
    ] = None,
    push_to_hub: given.PushToHub = PruneOptions.push_to_hub,
    private: given.Private = PruneOptions.private,
    recipe: given.Recipe = None,
    form: given.Format = "human",
    as_json: given.Json = False,
    quiet: given.Quiet = False,
    no_progress: given.NoProgress = False,
) -> None:
    """Remove heads, feed-forward channels and tokens together, and write a compact checkpoint.

    Of a model that writes about images with a language model (LLaVA and its kin), image tokens: without data, in seconds.

    Examples:

    `comp prune demo --ratio 0.5 -o compact`

    `comp prune Salesforce/blip-itm-base-coco --ratio 0.5 -o blip-compact`

    `comp prune ./my-blip --ratio 0.7 --dry-run` (an estimate, within seconds)

    `comp prune ./my-blip --ratio 0.7 --data pairs/ --plan-only -o plan.json`

    `comp prune ./my-blip --ratio 0.3,0.5,0.7 --data pairs/ -o sweep` (a folder each, and what each costs)

    `comp prune ./my-blip --target-speedup 2.5 --data pairs/` (finds the ratio, and measures)

    `comp prune ./my-blip --max-drop 1.0 --data pairs/` (as much as possible, at most a point lost)

    `comp prune llava-hf/llava-1.5-7b-hf --method vitcop --tokens 64 --link`

    `comp prune demo-vlm --tokens 22 --refit --steps 300 --mixed-precision bf16`

    `comp prune openai/clip-vit-base-patch32 --ratio 0.5 --data pairs.jsonl --max-drop 1.0`

    `comp prune demo --ratio 0.8 --steps 200 --mixed-precision bf16`

    `accelerate launch -m comp_cli prune ./my-blip --ratio 0.8 --data pairs/ --epochs 2`
    """

    def show(report: Any, out: Output) -> None:
        from ..report.prune_tables import print_pruned
        from ..report.sweep import SweepReport
        from ..report.sweep_tables import print_sweep
        from ..report.token_tables import print_tokens_pruned

        if isinstance(report, SweepReport):
            return print_sweep(report, out)
        if report.image_tokens is not None and report.options.ratio is None:
            return print_tokens_pruned(report, report.image_tokens, out)
        print_pruned(report, out)

    def call(options: dict[str, Any], out: Output) -> Any:
        try:
            return api.prune(**options, progress=out)
        except CompError as missed:
            if hasattr(missed.report, "points"):  # of a sweep: what did not fail is there
                show(missed.report, out)
            raise

    by_number = link or tokens or tokens_share or token_stages
    perform(
        context,
        call,
        show,
        lambda report: report.output,
        resumes=not (dry_run or plan_only) and bool(steps or epochs or not by_number),
    )
