"""The command line. Options and wording only; heavy imports live inside the commands."""

import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import __version__
from ..engine.methods import METHODS
from ..errors import CompError, UsageError, explain
from . import signals, streams
from .exit_codes import FAILED
from .output import Output, Unprintable
from .parsing import Command, Commands
from .signals import Interrupted

app = typer.Typer(
    name="comp",
    cls=Commands,
    help="Make vision-language models smaller and faster: prune heads, channels and tokens together, export, measure.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)

MOST = 10**7  # of samples, steps, tokens and the like: more is a slip of the finger

Model = Annotated[str, typer.Argument(help="A hub id, hf:// URI, folder, or `demo` (shipped with comp).", show_default=False)]
Folder = Annotated[
    Path | None,
    typer.Argument(help="A folder that `comp prune` wrote; the last one below here if left out.", show_default=False),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")]
CacheDir = Annotated[Path | None, typer.Option(help="Where downloads are kept; else where HF_HOME says.")]
AllowPickle = Annotated[bool, typer.Option("--allow-pickle", help="Load pytorch_model.bin where there is no safetensors.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N. Never falls back.")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of everything random.")]
NumSamples = Annotated[int, typer.Option(min=1, max=MOST, help="Image-text pairs for calibration.")]
BatchSize = Annotated[int, typer.Option(min=1, max=MOST, help="Pairs in one forward pass.")]
TextTokens = Annotated[int, typer.Option(min=4, max=MOST, help="Text length of the reference input.")]
ScoreRows = Annotated[
    int, typer.Option(min=0, max=MOST, help="Query rows that score image tokens; 0 for all, CoMP's full form.")
]
Data = Annotated[
    str | None,
    typer.Option(help="Your image-text pairs: jsonl, csv, parquet, imagefolder, or a hub data set. Else generated scenes."),
]
Split = Annotated[str | None, typer.Option(help="Split of --data to calibrate on; never a test split.")]
ImageColumn = Annotated[str | None, typer.Option(help="Column of --data with images or their paths.")]
TextColumn = Annotated[str | None, typer.Option(help="Column of --data with texts.")]
TaskName = Annotated[str | None, typer.Option("--task", help="What the model is for; else what its architecture usually is.")]
LabelColumn = Annotated[str | None, typer.Option(help="Column of --data that says whether they match; '' for none.")]
AnswerColumn = Annotated[str | None, typer.Option(help="Column of --data with the answers to questions.")]
SplitColumn = Annotated[str | None, typer.Option(help="Column of --data that names each row's split; '' for none.")]
OutputDir = Annotated[Path | None, typer.Option("--output", "-o", help="Folder to write.", show_default=False)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a folder that comp wrote before.")]
Format = Annotated[str, typer.Option("--format", help="human, json or quiet.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only the path of the result.")]
NoProgress = Annotated[bool, typer.Option("--no-progress", help="No progress bars.")]


def _output(form: str, as_json: bool, quiet: bool, no_progress: bool) -> Output:
    mode = "json" if as_json else "quiet" if quiet else form
    first = os.environ.get("RANK", "0") == "0"  # of the processes that `accelerate launch` started
    return Output(mode if first else "mute", progress=not no_progress)


def _run(out: Output, work: Callable[[], tuple[dict[str, Any], Path | None]], *, resumes: bool = False) -> None:
    """Do the work and end with its result, or with one sentence and the right exit code. `resumes`: it has a journal."""
    try:
        with redirect_stdout(sys.stderr):
            _check_place()
            document, path = work()
        out.result(document, str(path) if path else None)
        return
    except CompError as found:
        error = found
        _trace()
    except (Interrupted, KeyboardInterrupt) as found:
        error = _interruption(found, resumes)
    except Exception as found:
        error = explain(found)
        _trace()
    out.error(error)
    raise typer.Exit(error.exit_code)


def _check_place() -> None:
    """Exit 2 where the current folder was deleted: torch would end the process."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UsageError("the current folder is gone.", hint="Change to another one.") from None


def _trace() -> None:
    if os.environ.get("COMP_DEBUG"):
        traceback.print_exc()


def _interruption(end: BaseException, resumes: bool) -> CompError:
    """With the command line that goes on."""
    end = end if isinstance(end, Interrupted) else Interrupted(signal.SIGINT)
    again = " ".join(word for word in Output.command.split(" ") if word != "--no-resume")
    hint = f"The same command goes on where it was: {again}" if resumes else f"Start it again: {again}"
    return CompError(f"{end.said}.", exit_code=end.code, hint=hint)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"comp {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    pass


@app.command(cls=Command)
def analyze(
    model: Model,
    task: TaskName = None,
    data: Data = None,
    split: Split = None,
    image_column: ImageColumn = None,
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    answer_column: AnswerColumn = None,
    split_column: SplitColumn = None,
    num_samples: NumSamples = 32,
    batch_size: BatchSize = 8,
    text_tokens: TextTokens = 35,
    score_rows: ScoreRows = 64,
    seed: Seed = 0,
    device: Device = "auto",
    revision: Revision = None,
    cache_dir: CacheDir = None,
    allow_pickle: AllowPickle = False,
    form: Format = "human",
    as_json: Json = False,
    quiet: Quiet = False,
    no_progress: NoProgress = False,
) -> None:
    """Show where FLOPs and parameters are, how unequal heads, channels and tokens are, and how their scores mislead.

    Examples:

    `comp analyze demo`

    `comp analyze Salesforce/blip-itm-base-coco --data pairs.jsonl --json`
    """
    out = _output(form, as_json, quiet, no_progress)

    def work():
        from ..commands import analyze as command

        options = {"num_samples": num_samples, "batch_size": batch_size, "text_tokens": text_tokens, "seed": seed}
        options |= {"score_rows": score_rows}
        where = {"revision": revision, "cache_dir": cache_dir, "allow_pickle": allow_pickle}
        pairs = command.DataOptions(data, split, image_column, text_column, label_column, answer_column, split_column)
        return command.analyze(model, out, device=device, data=pairs, task=task, **options, **where), None

    _run(out, work)


@app.command(
    cls=Command, epilog="Methods:\n\n" + "\n\n".join(f"* `{name}`: {method.description}" for name, method in METHODS.items())
)
def prune(
    model: Model,
    ratio: Annotated[float, typer.Option(help="Share of the FLOPs that goes, 0 to 1: 0.5 halves them.", show_default=False)],
    output: OutputDir = None,
    task: TaskName = None,
    data: Data = None,
    split: Split = None,
    image_column: ImageColumn = None,
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    answer_column: AnswerColumn = None,
    split_column: SplitColumn = None,
    method: Annotated[str, typer.Option(help=f"One of {', '.join(METHODS)}; see below.")] = "comp",
    recover: Annotated[bool, typer.Option(help="Refit the output projections in closed form.")] = True,
    steps: Annotated[int, typer.Option(min=0, max=MOST, help="Fine-tune what was pruned for so many steps.")] = 0,
    epochs: Annotated[float | None, typer.Option(min=0, max=MOST, help="The same in passes over --data.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate: 1e-4; large models 1e-5.", show_default=False)] = None,
    train_batch_size: Annotated[int, typer.Option(min=1, max=MOST, help="Pairs of one step, over all processes.")] = 32,
    stage_share: Annotated[
        float, typer.Option(help="Share of the steps that train inside the stages, while units fade (the paper: 0.5).")
    ] = 0.0,
    distill: Annotated[float, typer.Option(help="Weight of the dense model's decisions against the labels.")] = 0.5,
    mixed_precision: Annotated[
        str | None, typer.Option(help="no, fp16 or bf16; else what accelerate is configured for.")
    ] = None,
    cip: Annotated[bool, typer.Option(help="Weigh parameters by the tokens that stay (Eq. 4).")] = True,
    cit: Annotated[bool, typer.Option(help="Weigh tokens by the heads that stay (Eq. 7); while units fade.")] = True,
    explore: Annotated[bool, typer.Option(help="Look at other modes now and then (Eq. 9).")] = True,
    history: Annotated[bool, typer.Option(help="Remember what a mode cost before (Eq. 10).")] = True,
    stages: Annotated[int | None, typer.Option(min=1, max=MOST, help="Stages of the method comp: 40; large models 10.")] = None,
    stage_samples: Annotated[
        int | None, typer.Option(min=1, max=MOST, help="Pairs that judge a stage: 256; large models 8 (retrieval 32).")
    ] = None,
    num_samples: Annotated[
        int | None, typer.Option(min=1, max=MOST, help="Image-text pairs for calibration: 256; large models 64.")
    ] = None,
    eval_samples: Annotated[
        int | None,
        typer.Option(min=1, max=MOST, help="Pairs for the comparison at the end: 1000; large models 64 (retrieval 256)."),
    ] = None,
    batch_size: BatchSize = 8,
    text_tokens: TextTokens = 35,
    score_rows: ScoreRows = 64,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16 for the written weights; else as they are.")] = None,
    overwrite: Overwrite = False,
    resume: Annotated[bool, typer.Option(help="Go on where a run with the same settings was stopped.")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, write nothing.")] = False,
    max_drop: Annotated[
        float | None, typer.Option(help="Points that the metric may fall; else exit 3, and nothing is written.")
    ] = None,
    revision: Revision = None,
    cache_dir: CacheDir = None,
    allow_pickle: AllowPickle = False,
    form: Format = "human",
    as_json: Json = False,
    quiet: Quiet = False,
    no_progress: NoProgress = False,
) -> None:
    """Remove heads, feed-forward channels and tokens together, and write a compact checkpoint.

    Examples:

    `comp prune demo --ratio 0.5 -o compact`

    `comp prune Salesforce/blip-itm-base-coco --ratio 0.5 -o blip-compact`

    `comp prune ./my-blip --ratio 0.7 --data pairs/ --dry-run`

    `comp prune openai/clip-vit-base-patch32 --ratio 0.5 --data pairs.jsonl --max-drop 1.0`

    `comp prune demo --ratio 0.8 --steps 200 --mixed-precision bf16`

    `accelerate launch -m comp_cli prune ./my-blip --ratio 0.8 --data pairs/ --epochs 2`
    """
    out = _output(form, as_json, quiet, no_progress)

    def work():
        from ..commands import prune as command

        named = model.split("@")[0] if model.startswith("hf://") else model
        folder = output or Path(f"{Path(named).name or 'model'}-comp-{ratio:g}".lstrip("-@"))
        options = command.Options(
            model=model,
            ratio=ratio,
            method=method,
            recover=recover,
            stages=stages,
            stage_samples=stage_samples,
            seed=seed,
            num_samples=num_samples,
            eval_samples=eval_samples,
            batch_size=batch_size,
            text_tokens=text_tokens,
            score_rows=score_rows,
            device=device,
            dtype=dtype,
            data=command.DataOptions(data, split, image_column, text_column, label_column, answer_column, split_column),
            task=task,
            training=command.Training(
                steps=steps,
                epochs=epochs,
                lr=lr,
                batch_size=train_batch_size,
                stage_share=stage_share,
                distill=distill,
                mixed_precision=mixed_precision,
            ),
            cip=cip,
            cit=cit,
            explore=explore,
            history=history,
        )
        how = {"overwrite": overwrite, "dry_run": dry_run, "resume": resume, "max_drop": max_drop}
        where = {"revision": revision, "cache_dir": cache_dir, "allow_pickle": allow_pickle}
        document = command.prune(options, folder, out, **how, **where)
        return document | {"output": None if dry_run else str(folder)}, None if dry_run else folder

    _run(out, work, resumes=not dry_run)


@app.command(cls=Command)
def export(
    folder: Folder = None,
    onnx: Annotated[bool, typer.Option("--onnx", help="Write ONNX (the only format so far).")] = False,
    output: OutputDir = None,
    split: Annotated[
        bool,
        typer.Option("--split", help="vision_model.onnx and text_model.onnx instead of model.onnx: an image is encoded once."),
    ] = False,
    dtype: Annotated[str, typer.Option(help="fp32, fp16 or bf16 for the weights; inputs and outputs stay fp32.")] = "fp32",
    quantize: Annotated[
        str | None, typer.Option(help="int8: 8-bit matrices; those stay float that cost decisions.", show_default=False)
    ] = None,
    optimize: Annotated[
        bool, typer.Option("--optimize", help="ONNX Runtime's fusions, ahead of time; kept if they agree.")
    ] = False,
    atol: Annotated[
        float | None,
        typer.Option(min=0, help="Largest difference from torch: 1e-4; fp16 0.2, bf16 1, int8 2.", show_default=False),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Your image-text pairs to check the graphs on. Else generated scenes.")
    ] = None,
    image_column: ImageColumn = None,
    text_column: TextColumn = None,
    answer_column: AnswerColumn = None,
    split_column: SplitColumn = None,
    keep_failed: Annotated[bool, typer.Option("--keep-failed", help="Leave refused graphs in OUTPUT.failed.")] = False,
    device: Annotated[str, typer.Option(help="Where the graphs are checked: cpu, cuda or cuda:N.")] = "cpu",
    target: Annotated[
        str, typer.Option(help="onnxruntime (fused attention), or onnx (standard operators only).")
    ] = "onnxruntime",
    opset: Annotated[int, typer.Option(min=1, max=99, help="ONNX opset, 18 to 23.")] = 20,
    overwrite: Overwrite = False,
    form: Format = "human",
    as_json: Json = False,
    quiet: Quiet = False,
    no_progress: NoProgress = False,
) -> None:
    """Write an ONNX graph with the token pruning inside, checked against torch.

    Examples:

    `comp export compact --onnx`

    `comp export --onnx -o served` (takes the last compact model below the current folder)

    `comp export compact --onnx --split --quantize int8 --data pairs.jsonl -o served`
    """
    out = _output(form, as_json, quiet, no_progress)

    def work():
        if not onnx:
            raise UsageError("name a format.", hint="comp export FOLDER --onnx")
        from ..commands import export as command

        source = command.resolve_folder(folder, out)
        folder_out = output or source.with_name(source.name + "-onnx")
        options = command.Options(
            target=target,
            opset=opset,
            split=split,
            dtype=dtype,
            quantize=quantize,
            optimize=optimize,
            atol=atol,
            keep_failed=keep_failed,
            device=device,
            data=data,
            columns=command.Columns(image_column, text_column, answer=answer_column, split=split_column),
        )
        document = command.export(source, folder_out, out, options, overwrite=overwrite)
        return document | {"output": str(folder_out)}, folder_out

    _run(out, work)


@app.command(cls=Command)
def bench(
    folder: Folder = None,
    baseline: Annotated[str | None, typer.Option(help="Dense model to compare with; else the one it was made of.")] = None,
    device: Device = "auto",
    backend: Annotated[str, typer.Option(help="Some of torch, onnx and compile (torch.compile), with commas.")] = "torch,onnx",
    batch: Annotated[str, typer.Option(help="Batch sizes, with commas.")] = "1,8",
    iterations: Annotated[int, typer.Option(min=1, max=MOST, help="At least so many timed runs of each variant.")] = 10,
    duration: Annotated[
        float, typer.Option(min=0, max=MOST, help="And at least so many seconds of timed runs for each batch size.")
    ] = 5,
    threads: Annotated[int, typer.Option(min=0, max=1024, help="CPU threads; 0 for all cores.")] = 0,
    text_tokens: TextTokens = 35,
    min_speedup: Annotated[
        float | None, typer.Option(min=0, help="Exit 3 unless every row is so many times faster than stock on its backend.")
    ] = None,
    max_latency_ms: Annotated[
        float | None, typer.Option(min=0, help="Exit 3 if the median of a compact row (a whole batch) is longer.")
    ] = None,
    max_memory_mb: Annotated[
        float | None, typer.Option(min=0, help="Exit 3 if the compact model's peak at the largest batch is higher, in MiB.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Picture to write (.png, .svg, .pdf): latency, and speed-up against the FLOPs limit.")
    ] = None,
    seed: Seed = 0,
    revision: Revision = None,
    cache_dir: CacheDir = None,
    allow_pickle: AllowPickle = False,
    form: Format = "human",
    as_json: Json = False,
    quiet: Quiet = False,
    no_progress: NoProgress = False,
) -> None:
    """Time the dense against the compact model, interleaved; the rows include stock transformers and its plain ONNX export.

    Examples:

    `comp bench compact --baseline demo`

    `comp bench compact --device cuda --batch 1,8,32 --json`

    `comp bench compact --backend onnx --batch 1 --min-speedup 1.8` (a gate for CI: exit code 3)
    """
    out = _output(form, as_json, quiet, no_progress)

    def work():
        from ..commands import bench as command
        from ..commands.export import resolve_folder

        options = command.Options(
            device=device,
            backends=command.parse_backends(backend),
            batches=command.parse_batches(batch),
            iterations=iterations,
            duration=duration,
            threads=threads,
            text_tokens=text_tokens,
            seed=seed,
            gates=command.Gates(min_speedup, max_latency_ms, max_memory_mb),
            plot=plot,
        )
        where = {"revision": revision, "cache_dir": cache_dir, "allow_pickle": allow_pickle}
        return command.bench(resolve_folder(folder, out), baseline, options, out, **where), None

    _run(out, work)


@app.command(cls=Command)
def env(form: Format = "human", as_json: Json = False, quiet: Quiet = False) -> None:
    """Show versions, devices and providers, and what would fail here: for bug reports.

    Examples:

    `comp env`

    `comp env --json`
    """
    out = _output(form, as_json, quiet, no_progress=True)

    def work():
        from ..commands.environment import environment

        return environment(out), None

    _run(out, work)


@app.command(cls=Command)
def upgrade(
    folder: Annotated[Path, typer.Argument(help="A folder that `comp prune` wrote.", show_default=False)],
    form: Format = "human",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Put today's runtime beside the weights of a compact folder that an older comp wrote.

    `AutoModel.from_pretrained(FOLDER, trust_remote_code=True)` runs the modeling_comp.py of the folder, which may be older than
    the transformers that it meets. The weights stay as they are; the folder changes as a whole or not at all.

    Examples:

    `comp upgrade blip-compact`
    """
    out = _output(form, as_json, quiet, True)

    def work():
        from ..commands import upgrade as command

        return command.upgrade(folder, out), folder

    _run(out, work)


def run_command(has_stdout: bool = True) -> None:
    """The command of this process's arguments, in streams that are settled. Exit 1 where stdout takes nothing."""
    code: Any = 0
    try:
        if not has_stdout:
            hint = "Lead it somewhere, if only to /dev/null."
            raise Unprintable("stdout is closed: the result could not be told.", hint=hint)
        app(prog_name="comp")
    except SystemExit as end:
        code = end.code
    except Unprintable as error:
        code = error.exit_code
        Output().error(error)
    except OSError as error:  # of help texts; commands end well
        code = FAILED
        Output().error(CompError(f"stdout: {error.strerror}."))
    except Interrupted as end:
        end_early(end)
    _end(code)


def end_early(end: Interrupted) -> None:
    """A signal before a command began, or behind its end."""
    mode = "json" if streams.wants_json(sys.argv[1:]) and not Output.spoke else "human"
    Output.command = shlex.join(["comp", *sys.argv[1:]])
    error = _interruption(end, False)
    Output(mode).error(error)
    _end(error.exit_code)


def _end(code: Any) -> None:
    signals.ignore()
    if (failed := streams.close_stdout()) is not None and code in (0, None):
        code = FAILED
        Output().error(CompError(f"stdout: {failed.strerror}."))
    raise SystemExit(code)
