"""The library: what `import comp_cli` gives. The command line is a layer over these functions.

Keyword arguments have the names and the defaults of the options of the command line, and values that cannot be are refused with
the same sentences. The library is silent: see `Progress`. Light to import; what is heavy is imported when it is called.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from .errors import CompError
from .option_values import (
    checked,
    default_output,
    parse_backends,
    parse_batches,
    parse_bytes,
    parse_modes,
    parse_ratios,
)
from .options import (
    TOKEN_METHOD,
    AnalyzeOptions,
    BenchOptions,
    CompareOptions,
    DataOptions,
    ExportOptions,
    Gates,
    HubOptions,
    PruneOptions,
    TargetOptions,
    TokenOptions,
    Training,
)
from .progress import Progress, Recorder, Silent
from .report.analyze import AnalyzeReport
from .report.base import Report
from .report.bench import BenchReport
from .report.compare import CompareReport
from .report.environment import EnvironmentReport
from .report.export import ExportReport
from .report.prune import PruneReport
from .report.sweep import SweepReport
from .report.upgrade import UpgradeReport

if TYPE_CHECKING:
    from transformers import PreTrainedModel

StrPath = str | os.PathLike[str]
R = TypeVar("R", bound=Report)


@checked
def analyze(
    model: StrPath,
    *,
    data: StrPath | None = DataOptions.data,
    task: str | None = AnalyzeOptions.task,
    num_samples: int = AnalyzeOptions.num_samples,
    split: str | None = DataOptions.split,
    image_column: str | None = DataOptions.image_column,
    text_column: str | None = DataOptions.text_column,
    label_column: str | None = DataOptions.label_column,
    answer_column: str | None = DataOptions.answer_column,
    split_column: str | None = DataOptions.split_column,
    batch_size: int = AnalyzeOptions.batch_size,
    text_tokens: int = AnalyzeOptions.text_tokens,
    score_rows: int = AnalyzeOptions.score_rows,
    seed: int = AnalyzeOptions.seed,
    device: str = AnalyzeOptions.device,
    threads: int = AnalyzeOptions.threads,
    png: StrPath | None = AnalyzeOptions.png,
    revision: str | None = HubOptions.revision,
    cache_dir: StrPath | None = HubOptions.cache_dir,
    allow_pickle: bool = HubOptions.allow_pickle,
    html: StrPath | None = AnalyzeOptions.html,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> AnalyzeReport:
    """Show where FLOPs and parameters are, how unequal heads, channels and tokens are, and how their scores interfere; of a
    compact model what is left of every layer, and which tokens of sample images and texts stay.

    Args:
        model: Hub id, hf:// URI, folder (also one that `prune` wrote), "demo" or "demo-vlm".
        data: image-text pairs: jsonl, csv, parquet, image folder, or Hub data set (default: built-in synthetic scenes).
        task: evaluation task (default: inferred from the architecture).
        num_samples: image-text pairs for calibration.
        split: split of the data to calibrate on.
        image_column: column with images or their paths (default: found by its name, as for all columns).
        text_column: column with texts.
        label_column: column that says whether image and text match; "" for none.
        answer_column: column with the answers to questions; "" for none.
        split_column: column that names each row's split; "" for none.
        batch_size: pairs in one forward pass.
        text_tokens: text length of the reference input, tokens.
        score_rows: query rows that score image tokens; 0 for all.
        seed: random seed.
        device: "auto", "cpu", "cuda" or "cuda:N"; never falls back.
        threads: CPU threads (0: by the model's size and the cores that there are); PyTorch has its own number again afterwards.
        png: picture to write: which tokens stay in a compact model, a heat map of what matters in a dense one.
        revision: branch, tag or commit on the Hub.
        cache_dir: where downloads are kept (default: $HF_HOME).
        allow_pickle: load pytorch_model.bin where there is no safetensors.
        html: page to write: the report to look at, one file that needs nothing else.
        overwrite: replace a page that comp wrote before.
        progress: receives messages, warnings and progress (default: none; the library is silent).

    Returns:
        FLOPs (2 x multiply-accumulates, one sample), parameters, Gini coefficients and cross-mode interference per layer.

    Raises:
        UsageError: an argument that cannot be.
        RefusedError: a model or data that is unsafe, corrupt or unsupported.
        DeviceError: a device that is not there.

    Example:
        >>> report = comp_cli.analyze("demo", num_samples=16)
        >>> report.layers[0].flops["ffn"]
        >>> comp_cli.analyze("blip-compact", png="tokens.png").compact.layers[0].heads
    """
    columns = (image_column, text_column, label_column, answer_column, split_column)
    options = AnalyzeOptions(
        model=os.fspath(model),
        num_samples=num_samples,
        batch_size=batch_size,
        text_tokens=text_tokens,
        score_rows=score_rows,
        seed=seed,
        device=device,
        data=DataOptions(_text(data), split, *columns),
        task=task,
        threads=threads,
        png=_path(png),
        html=_path(html),
    )
    hub = HubOptions(revision, _path(cache_dir), allow_pickle)

    def work(told: Progress) -> AnalyzeReport:
        from .commands.analyze import analyze

        if options.html is not None:
            from .report.page.files import check_page

            check_page(options.html, overwrite=overwrite)
        return analyze(options, told, hub_options=hub)

    report = _reported(work, progress, threads)
    if options.html is not None:  # with what was warned of
        from .report.page.files import write_page
        from .report.page.pages import analyze_page

        write_page(options.html, analyze_page(report.to_json(), report.pictures))
    return report


@checked
def prune(
    model: StrPath,
    *,
    ratio: float | str | Sequence[float] | None = PruneOptions.ratio,
    tokens: int | None = TokenOptions.tokens,
    tokens_share: float | None = TokenOptions.tokens_share,
    token_stages: str | None = TokenOptions.token_stages,
    saliency: str | None = TokenOptions.saliency,
    compat: bool = TokenOptions.compat,
    refit: bool = TokenOptions.refit,
    link: bool = False,
    output: StrPath | None = None,
    data: StrPath | None = DataOptions.data,
    max_drop: float | None = None,
    target_speedup: float | None = TargetOptions.target_speedup,
    target_latency_ms: float | None = TargetOptions.target_latency_ms,
    target_size: str | int | None = TargetOptions.target_size,
    task: str | None = PruneOptions.task,
    method: str = PruneOptions.method,
    split: str | None = DataOptions.split,
    image_column: str | None = DataOptions.image_column,
    text_column: str | None = DataOptions.text_column,
    label_column: str | None = DataOptions.label_column,
    answer_column: str | None = DataOptions.answer_column,
    split_column: str | None = DataOptions.split_column,
    effort: str = PruneOptions.effort,
    num_samples: int | None = PruneOptions.num_samples,
    eval_samples: int | None = PruneOptions.eval_samples,
    text_tokens: int = PruneOptions.text_tokens,
    modes: str | Sequence[str] | None = PruneOptions.modes,
    tokens_method: str | None = PruneOptions.tokens_method,
    uniform: bool = PruneOptions.uniform,
    stages: int | None = PruneOptions.stages,
    stage_samples: int | None = PruneOptions.stage_samples,
    batch_size: int = PruneOptions.batch_size,
    score_rows: int = PruneOptions.score_rows,
    seed: int = PruneOptions.seed,
    device: str = PruneOptions.device,
    threads: int = PruneOptions.threads,
    steps: int = Training.steps,
    epochs: float | None = Training.epochs,
    lr: float | None = Training.lr,
    train_batch_size: int = Training.batch_size,
    stage_share: float = Training.stage_share,
    distill: float = Training.distill,
    mixed_precision: str | None = Training.mixed_precision,
    recover: bool = PruneOptions.recover,
    sequential: bool = PruneOptions.sequential,
    cip: bool = PruneOptions.cip,
    cit: bool = PruneOptions.cit,
    explore: bool = PruneOptions.explore,
    history: bool = PruneOptions.history,
    revision: str | None = HubOptions.revision,
    cache_dir: StrPath | None = HubOptions.cache_dir,
    allow_pickle: bool = HubOptions.allow_pickle,
    dtype: str | None = PruneOptions.dtype,
    overwrite: bool = False,
    resume: bool = True,
    dry_run: bool = False,
    plan_only: bool = False,
    plan: StrPath | None = None,
    looks: int | None = PruneOptions.looks,
    max_memory: str | int | None = PruneOptions.max_memory,
    push_to_hub: str | None = PruneOptions.push_to_hub,
    private: bool = PruneOptions.private,
    progress: Progress | None = None,
) -> PruneReport | SweepReport:
    """Remove attention heads, feed-forward channels and tokens together, and write a compact checkpoint.

    Args:
        model: Hub id, hf:// URI, folder, "demo" or "demo-vlm".
        ratio: FLOPs reduction, 0 to 1 (0.5 removes half), of the whole model at the reference input. Every method asks for it,
            or for one of the targets, but those of the image tokens of a decoder, which ask for exactly one of the next three.
            Several, as a list or as a text with commas, make a folder each, of one calibration.
        tokens: image tokens of an image: the mean over the layers of the language model, or what a one-shot rule keeps.
        tokens_share: the same as a share of an image's tokens, for images of any size.
        token_stages: the stages themselves, "LAYER:COUNT" or "LAYER:SHARE" with commas, such as "0:172,2:77,22:15".
        saliency: what the method vitcop ranks by inside the language model: "key-norm" or "attention" (default: by the model).
        compat: follow the authors' code where it departs from their formula.
        refit: where tokens go by their number, fit the language model's output projections anew on the pairs of `data`, to
            what the dense model says at the tokens that stay.
        link: hard links to the model's weights in place of copies; both must be on one disk.
        output: folder to write (default: MODEL-comp-RATIO, or MODEL-METHOD-TOKENS, in the current folder). Of several ratios it
            holds a folder each, such as ratio-0.5, and what each costs: comp_sweep.json, tradeoff.md, tradeoff.html.
        data: image-text pairs: jsonl, csv, parquet, image folder, or Hub data set (default: built-in synthetic scenes).
        max_drop: points that the metric may fall; more raises GateError, and nothing is written. Without a ratio and a target
            it decides: as much is removed as loses no more.
        target_speedup: in place of a ratio: times that the compact model is faster than the dense one, in torch at batch 1.
        target_latency_ms: in place of a ratio: ms that a forward pass of the compact model may take, in torch at batch 1.
        target_size: in place of a ratio: what model.safetensors may have, "100MB", "95MiB" or bytes.
        task: evaluation task (default: inferred from the architecture).
        method: what is scored and removed, and how; `comp prune --help` lists the methods.
        split: split of the data to calibrate on; never a test split.
        image_column: column with images or their paths (default: found by its name, as for all columns).
        text_column: column with texts.
        label_column: column that says whether image and text match; "" for none.
        answer_column: column with the answers to questions; "" for none.
        split_column: column that names each row's split; "" for none.
        effort: how much is looked at: "fast", "normal" or "best" (docs/methods.md says what each costs); num_samples,
            stage_samples, eval_samples, stages and looks win where they are given.
        num_samples: image-text pairs for calibration (default: by effort and the model's size, as for all samples and stages).
        eval_samples: pairs of the final comparison, none of which calibration saw.
        text_tokens: text length of the reference input, tokens.
        modes: kinds of what is removed, with commas: "language_params,image_tokens" (default: by the model).
        tokens_method: how image tokens leave a decoder where parameters go too: a method that goes by their number, or
            "attention" (CoMP's own, at three stages); default: cover where the model can.
        uniform: keep as many heads and channels in every layer of a decoder, and write a folder of the stock class.
        stages: stages of the method comp-paper.
        stage_samples: pairs that judge a plan or a stage.
        batch_size: pairs in one forward pass.
        score_rows: query rows that score image tokens; 0 for all (CoMP's full form).
        seed: random seed.
        device: "auto", "cpu", "cuda" or "cuda:N"; never falls back.
        threads: CPU threads (0: by the model's size and the cores that there are); PyTorch has its own number again afterwards.
        steps: fine-tuning steps (0: training-free).
        epochs: fine-tuning epochs over the data, in place of steps.
        lr: learning rate (default: by the model's size).
        train_batch_size: pairs of one step, over all processes.
        stage_share: share of the steps inside the stages, while units fade (CoMP: 0.5).
        distill: distillation weight w: loss = (1-w) task + w KL(dense, compact).
        mixed_precision: "no", "fp16" or "bf16" (default: accelerate's configuration).
        recover: refit output projections in closed form.
        sequential: refit them once more, layer after layer, towards the dense model's residual stream.
        cip: token-weighted activations (CIP, Eq. 4).
        cit: head-weighted token importance (CIT, Eq. 7), while units fade.
        explore: random exploration (RE, Eq. 9).
        history: history information (HI, Eq. 10).
        revision: branch, tag or commit on the Hub.
        cache_dir: where downloads are kept (default: $HF_HOME).
        allow_pickle: load pytorch_model.bin where there is no safetensors.
        dtype: "fp32", "bf16" or "fp16" for the written weights (default: checkpoint dtype).
        overwrite: replace a folder that comp wrote before.
        resume: go on where a run with the same settings was stopped.
        dry_run: estimate parameters, size, FLOPs, latency and memory within seconds, from config.json, headers and timed
            layers, or of small models by the search itself; write nothing. `report.estimate` says what was assumed.
        plan_only: search, and write the plan to a file, `output` (default: MODEL-comp-RATIO.plan.json); no model is made.
        plan: a file that plan_only wrote: the folder of its search is made without searching. Its options hold; what
            contradicts them is refused.
        looks: plans that are compared at most, 0 for the one that the descent begins with (default: as many as it takes; of a
            model larger than memory 2).
        max_memory: what the work may take of the device's memory, "1GiB" or bytes (default: what is there): an image-text
            decoder whose weights are more is worked on layer by layer from its files.
        push_to_hub: repository on the Hub, "org/name", that the folder is uploaded to when it is complete, and `max_drop` is
            met: as one commit, or not at all. One that holds something is refused unless `overwrite` is given.
        private: make the repository a private one.
        progress: receives messages, warnings and progress (default: none; the library is silent).

    Returns:
        What was pruned and what it costs in accuracy. `report.quality` is None with `dry_run` and `plan_only`. Of several
        ratios a `SweepReport`.

    Raises:
        UsageError: an argument that cannot be, an output that exists.
        RefusedError: a model or data that is unsafe, corrupt or unsupported.
        GateError: the metric falls by more than `max_drop`, or the model misses its target; `error.report` says by how much.
        DeviceError: a device that is not there.
        CompError: a ratio or a target out of reach, a full disk.

    Example:
        >>> report = comp_cli.prune("Salesforce/blip-itm-base-coco", ratio=0.5, data="pairs.jsonl", output="blip-compact")
        >>> report.flops.dense, report.flops.compact, report.quality.metrics["accuracy"].compact
        >>> report = comp_cli.prune("llava-hf/llava-1.5-7b-hf", method="vitcop", tokens=64, output="llava-64")
        >>> report.image_tokens.mean, report.image_tokens.kv_cache_bytes.compact
        >>> sweep = comp_cli.prune("demo", ratio=[0.3, 0.5, 0.7], output="demo-sweep")
        >>> small = comp_cli.prune("demo", target_size="1.5MB", output="demo-small")
        >>> small.target.ratio, small.target.measured.value
        >>> [(point.ratio, point.metric.compact, point.folder) for point in sweep.points]
    """
    columns = (image_column, text_column, label_column, answer_column, split_column)
    image_tokens = TokenOptions(tokens, tokens_share, token_stages, compat, saliency, refit)
    ratios = parse_ratios(ratio)
    if ratios is None and image_tokens.amounts and method == PruneOptions.method:
        method = TOKEN_METHOD
    options = PruneOptions(
        model=os.fspath(model),
        ratio=ratios[0] if isinstance(ratios, tuple) else ratios,
        method=method,
        recover=recover,
        sequential=sequential,
        seed=seed,
        stages=stages,
        num_samples=num_samples,
        stage_samples=stage_samples,
        eval_samples=eval_samples,
        batch_size=batch_size,
        text_tokens=text_tokens,
        score_rows=score_rows,
        device=device,
        dtype=dtype,
        data=DataOptions(_text(data), split, *columns),
        task=task,
        training=Training(steps, epochs, lr, train_batch_size, stage_share, distill, mixed_precision),
        modes=parse_modes(modes),
        tokens_method=tokens_method,
        uniform=uniform,
        cip=cip,
        cit=cit,
        explore=explore,
        history=history,
        threads=threads,
        image_tokens=None if image_tokens == TokenOptions() else image_tokens,
        looks=looks,
        max_memory=parse_bytes(max_memory),
        effort=effort,
        push_to_hub=push_to_hub,
        private=private,
    )
    hub = HubOptions(revision, _path(cache_dir), allow_pickle)
    targets = TargetOptions(target_speedup, target_latency_ms, parse_bytes(target_size, "target_size"))

    def work(told: Progress) -> PruneReport | SweepReport:
        from .checkpoint.publish import check_name
        from .commands.prune import prune
        from .commands.prune_estimate import estimate, estimate_several
        from .commands.prune_options import by_number, check_ways, choose_target
        from .commands.prune_streamed import prune_within_memory
        from .commands.prune_tokens import prune_tokens
        from .commands.publishing import and_push, check_single
        from .commands.sweep import sweep
        from .commands.targets import prune_to_target
        from .data.sources import check_place

        ways: dict[str, Any] = {"plan": plan, "plan_only": plan_only, "dry_run": dry_run}
        check_ways(options, targets, several=isinstance(ratios, tuple), link=link, **ways)
        if dry_run and options.data.data is not None:
            check_place(options.data.data)  # the run would read it
        how: dict[str, Any] = {"max_drop": max_drop, "hub_options": hub}
        pushed: dict[str, Any] = {"overwrite": overwrite, "dry_run": dry_run}
        if plan is not None:
            from .models.plan_file import read_plan, with_plan

            decided = read_plan(Path(plan))
            applied = with_plan(options, decided)
            place = default_output(applied.model, applied.ratio, applied.method, None) if output is None else Path(output)
            how |= {"decided": decided, "work": prune_within_memory, "overwrite": overwrite, "resume": resume}
            return and_push(lambda: prune(applied, place, told, **how), applied, told, **pushed)
        only = "--dry-run" if dry_run else "--plan-only" if plan_only else None
        target = choose_target(targets, options, max_drop, only, link)
        unnamed = default_output(options.model, ratios, method, options.image_tokens, target, plan_only)
        folder = unnamed if output is None else Path(output)
        if target is not None:
            aimed = how | pushed | {"resume": resume, "max_drop": max_drop if target.is_least else None}
            return and_push(lambda: prune_to_target(options, target, folder, told, **aimed), options, told, **pushed)
        if by_number(options, link):
            how |= {"link": link, "resume": resume}
            return and_push(lambda: prune_tokens(options, folder, told, **how, **pushed), options, told, **pushed)
        if dry_run:
            check_name(options.push_to_hub, options.private, dry_run)
            return (
                estimate_several(options, ratios, told, **how) if isinstance(ratios, tuple) else estimate(options, told, **how)
            )
        how |= {"overwrite": overwrite, "resume": resume}
        if isinstance(ratios, tuple):
            check_single(options)
            return sweep(options, ratios, folder, told, **how)
        how |= {"work": prune_within_memory, "plan_only": plan_only}
        return and_push(lambda: prune(options, folder, told, **how), options, told, **pushed)

    return _reported(work, progress, threads)


@checked
def export(
    folder: StrPath | None = None,
    *,
    output: StrPath | None = None,
    dtype: str = ExportOptions.dtype,
    quantize: str | None = ExportOptions.quantize,
    layout: str = ExportOptions.layout,
    split: bool = ExportOptions.split,
    with_preprocessing: bool = ExportOptions.with_preprocessing,
    data: StrPath | None = DataOptions.data,
    image_column: str | None = DataOptions.image_column,
    text_column: str | None = DataOptions.text_column,
    answer_column: str | None = DataOptions.answer_column,
    split_column: str | None = DataOptions.split_column,
    atol: float | None = ExportOptions.atol,
    device: str = ExportOptions.device,
    threads: int = ExportOptions.threads,
    optimize: bool = ExportOptions.optimize,
    target: str = ExportOptions.target,
    opset: int = ExportOptions.opset,
    revision: str | None = HubOptions.revision,
    cache_dir: StrPath | None = HubOptions.cache_dir,
    overwrite: bool = False,
    keep_failed: bool = ExportOptions.keep_failed,
    push_to_hub: str | None = ExportOptions.push_to_hub,
    private: bool = ExportOptions.private,
    progress: Progress | None = None,
) -> ExportReport:
    """Write ONNX graphs with the token pruning inside, checked against PyTorch.

    Args:
        folder: a folder that `prune` wrote, or a compact model on the Hub (default: the last one below the current folder).
        output: folder to write (default: FOLDER-onnx; of a model on the Hub NAME-onnx in the current folder).
        dtype: "fp32", "fp16" or "bf16" for the weights; inputs and outputs stay fp32.
        quantize: "int8": int8 dynamic quantization; "int4": int4 weights, of the language model of a decoder that reads images;
            layers that change predictions stay in float.
        layout: "optimum", or "transformers.js": files of a CLIP, a SigLIP or a LLaVA as that client reads them.
        split: write vision_model.onnx and text_model.onnx instead of model.onnx: an image is encoded once.
        with_preprocessing: graphs take pictures as they are, uint8 (images, height, width, 3) of any size, and resize, crop and
            normalise them; refused where a graph cannot do what the processor does.
        data: image-text pairs to check parity on (default: built-in synthetic scenes).
        image_column: column with images or their paths (default: found by its name, as for all columns).
        text_column: column with texts.
        answer_column: column with the answers to questions; "" for none.
        split_column: column that names each row's split; "" for none.
        atol: max. abs. error against PyTorch (default: by precision).
        device: where parity is checked: "cpu", "cuda" or "cuda:N".
        threads: CPU threads (0: by the model's size and the cores that there are); PyTorch has its own number again afterwards.
        optimize: apply ONNX Runtime's fusions ahead of time, if the graphs still agree.
        target: "onnxruntime" (fused attention) or "onnx" (standard operators only).
        opset: ONNX opset, 18 to 23; of decoders that read images always 23.
        revision: branch, tag or commit on the Hub.
        cache_dir: where downloads are kept (default: $HF_HOME).
        overwrite: replace a folder that comp wrote before.
        keep_failed: leave refused graphs in OUTPUT.failed.
        push_to_hub: repository on the Hub, "org/name", that the folder is uploaded to when it is complete: as one commit, or
            not at all. One that holds something is refused unless `overwrite` is given.
        private: make the repository a private one.
        progress: receives messages, warnings and progress (default: none; the library is silent).

    Returns:
        The graphs' inputs and outputs, and how well they agree with PyTorch.

    Raises:
        UsageError: an argument that cannot be, an output that exists.
        RefusedError: a folder that is no compact model, or is corrupt.
        GateError: the graphs differ from PyTorch by more than allowed, and nothing is written; `error.report` has the errors.
        DeviceError: a device or provider that is not there.

    Example:
        >>> report = comp_cli.export("blip-compact", output="blip-onnx", quantize="int8")
        >>> report.agreement, max(row.max_error for row in report.parity)
    """
    options = ExportOptions(
        target=target,
        opset=opset,
        split=split,
        dtype=dtype,
        quantize=quantize,
        layout=layout,
        with_preprocessing=with_preprocessing,
        optimize=optimize,
        atol=atol,
        keep_failed=keep_failed,
        device=device,
        data=DataOptions(_text(data), None, image_column, text_column, None, answer_column, split_column),
        threads=threads,
        push_to_hub=push_to_hub,
        private=private,
    )

    def work(told: Progress) -> ExportReport:
        from .checkpoint.compact_source import beside, find_compact
        from .commands.export import export
        from .commands.publishing import and_push

        source = find_compact(_text(folder), told, HubOptions(revision, _path(cache_dir)))
        place = beside(source, "-onnx") if output is None else Path(output)
        how = {"overwrite": overwrite}
        return and_push(lambda: export(source.folder, place, options, told, **how), options, told, **how)

    return _reported(work, progress, threads)


@checked
def bench(
    folder: StrPath | None = None,
    *,
    baseline: StrPath | None = None,
    device: str = BenchOptions.device,
    backend: str | Sequence[str] = BenchOptions.backends,
    batch: str | int | Sequence[int] = BenchOptions.batches,
    iterations: int = BenchOptions.iterations,
    duration: float = BenchOptions.duration,
    threads: int = BenchOptions.threads,
    text_tokens: int = BenchOptions.text_tokens,
    seed: int = BenchOptions.seed,
    min_speedup: float | None = Gates.min_speedup,
    max_latency_ms: float | None = Gates.max_latency_ms,
    max_memory_mb: float | None = Gates.max_memory_mb,
    plot: StrPath | None = BenchOptions.plot,
    save: StrPath | None = BenchOptions.save,
    revision: str | None = HubOptions.revision,
    cache_dir: StrPath | None = HubOptions.cache_dir,
    allow_pickle: bool = HubOptions.allow_pickle,
    progress: Progress | None = None,
) -> BenchReport:
    """Time the dense against the compact model, interleaved; the rows include stock transformers and its plain ONNX export.

    Args:
        folder: a folder that `prune` wrote, or a compact model on the Hub (default: the last one below the current folder).
        baseline: dense model to compare with (default: the one that the folder was made of).
        device: "auto", "cpu", "cuda" or "cuda:N"; never falls back.
        backend: some of "torch", "onnx" and "compile" (torch.compile); one text with commas, or several.
        batch: batch sizes; one number, one text with commas, or several numbers.
        iterations: least number of timed runs of each variant.
        duration: least seconds of timed runs for each batch size, s.
        threads: CPU threads (0: by the model's size and the cores that there are); PyTorch has its own number again afterwards.
        text_tokens: text length of the inputs, tokens.
        seed: random seed, of the inputs and of the bootstrap.
        min_speedup: gate: every row must be so many times faster than stock on its backend.
        max_latency_ms: gate: median latency of every compact row, ms for a whole batch.
        max_memory_mb: gate: peak memory of the compact model at the largest batch, MiB.
        plot: picture to write (.png, .svg, .pdf): latency, and speed-up against the FLOPs limit.
        save: JSON document to write, for `compare`; also where a gate is not met.
        revision: branch, tag or commit on the Hub, of the one of both models that is there and names none.
        cache_dir: where downloads are kept (default: $HF_HOME).
        allow_pickle: load pytorch_model.bin of the baseline where there is no safetensors.
        progress: receives messages, warnings and progress (default: none; the library is silent).

    Returns:
        Latencies (ms for a whole batch), speed-ups with 95 % intervals, FLOPs, parameters, peak memory (bytes).

    Raises:
        UsageError: an argument that cannot be.
        RefusedError: a folder or a baseline that does not fit.
        GateError: a gate is not met; `error.report` holds all that was measured.
        DeviceError: a device, provider or compiler that is not there.

    Example:
        >>> report = comp_cli.bench("blip-compact", batch=[1, 8], backend=("torch", "onnx"))
        >>> [(row.backend, row.batch, row.speedup.value) for row in report.speedups]
    """
    options = BenchOptions(
        device=device,
        backends=parse_backends(backend),
        batches=parse_batches(batch),
        iterations=iterations,
        duration=duration,
        threads=threads,
        text_tokens=text_tokens,
        seed=seed,
        gates=Gates(min_speedup, max_latency_ms, max_memory_mb),
        plot=_path(plot),
        save=_path(save),
    )
    hub = HubOptions(revision, _path(cache_dir), allow_pickle)

    def work(told: Progress) -> BenchReport:
        from .checkpoint.compact_source import find_compact, options_of_each
        from .commands.bench import bench

        of_compact, of_baseline = options_of_each(_text(folder), _text(baseline), hub)
        source = find_compact(_text(folder), told, of_compact)
        address = source.address if source.kind == "hub" else None
        return bench(source.folder, _text(baseline), options, told, hub_options=of_baseline, address=address)

    def keep(report: Report) -> None:
        from .commands.bench import save

        if options.save and isinstance(report, BenchReport):
            save(report, options.save)

    return _reported(work, progress, threads, keep)


@checked
def compare(
    before: StrPath,
    after: StrPath,
    *,
    max_regression: float | None = CompareOptions.max_regression,
    progress: Progress | None = None,
) -> CompareReport:
    """Compare two benchmarks: what became slower or faster beyond the noise, and by how much.

    Args:
        before: a file that `bench` wrote with `save`.
        after: a later one, of the same machine and dense model.
        max_regression: gate: percent that a row of the compact model may be slower, where that is beyond its intervals.
        progress: receives messages, warnings and progress (default: none; the library is silent).

    Returns:
        Ratios of times (after over before) with intervals, speed-ups and cost of the compact model before and after.

    Raises:
        UsageError: an argument that cannot be.
        RefusedError: a file that is no benchmark, or benchmarks of another machine, device, number of threads, dense model,
            batch or input.
        GateError: the gate is not met; `error.report` holds the comparison.

    Example:
        >>> report = comp_cli.compare("last.json", "new.json", max_regression=5)
        >>> [(row.backend, row.batch, row.ratio.value, row.verdict) for row in report.changes if row.side == "compact"]
    """
    options = CompareOptions(max_regression)

    def work(told: Progress) -> CompareReport:
        from .commands.compare import compare

        return compare(Path(before), Path(after), options, told)

    return _reported(work, progress)


@checked
def upgrade(folder: StrPath, *, progress: Progress | None = None) -> UpgradeReport:
    """Put today's runtime beside the weights of a compact folder that an older comp wrote. The weights stay as they are.

    Args:
        folder: a folder that `prune` wrote, on this machine. It changes as a whole or not at all.
        progress: receives messages, warnings and progress (default: none; the library is silent).

    Returns:
        What changed; nothing where all is as comp writes it today.

    Raises:
        UsageError: no such folder, or the current folder lies in it.
        RefusedError: a folder that is no compact model of comp, or whose files are not those that its report names.
    """

    def work(told: Progress) -> UpgradeReport:
        from .commands.upgrade import upgrade

        return upgrade(os.fspath(folder), told)

    return _reported(work, progress)


def environment() -> EnvironmentReport:
    """Versions, devices and providers, and what would fail here: for bug reports. It never fails itself."""
    from .commands.environment import environment

    return environment()


@checked
def load(
    folder: StrPath,
    *,
    dtype: str | None = None,
    device: str = "cpu",
    revision: str | None = HubOptions.revision,
    cache_dir: StrPath | None = HubOptions.cache_dir,
) -> "PreTrainedModel":
    """The model of a checkpoint, compact or dense, in eval mode. No code that lies beside the weights is run.

    Args:
        folder: a folder that `prune` wrote, or a dense checkpoint; or one on the Hub, as an id or an hf:// URI.
        dtype: "fp32", "bf16" or "fp16" (default: checkpoint dtype).
        device: "cpu", "cuda", "cuda:N" or "auto"; never falls back.
        revision: branch, tag or commit on the Hub.
        cache_dir: where downloads are kept (default: $HF_HOME).

    Returns:
        A transformers model. It takes what the stock class takes: `pixel_values` (batch, 3, height, width), `input_ids` and
        `attention_mask` (batch, tokens).

    Raises:
        UsageError: a dtype or device that is none.
        RefusedError: weights that are missing, left over, not finite, or of another size than config.json says.
        DeviceError: a device that is not there.

    Example:
        >>> model = comp_cli.load("blip-compact")
        >>> model(**inputs).itm_score
        >>> model = comp_cli.load("hf://me/blip-compact@v1")
    """
    from .checkpoint import hub, loading
    from .families import find_architecture

    wanted, place = loading.pick_dtype(dtype), loading.pick_device(device)
    options: dict[str, Any] = {"revision": revision, "cache_dir": _path(cache_dir), "accepts": find_architecture}
    source = hub.resolve(os.fspath(folder), **options, progress=Silent())
    return cast("PreTrainedModel", loading.load_model(source.folder, dtype=wanted).to(place))


@checked
def load_onnx(
    folder: StrPath,
    *,
    device: str = "cpu",
    revision: str | None = HubOptions.revision,
    cache_dir: StrPath | None = HubOptions.cache_dir,
) -> "PreTrainedModel":
    """A captioning or question-answering model whose `generate` runs the ONNX graphs that `export` wrote.

    Args:
        folder: a folder that `export` wrote; or one on the Hub, as an id or an hf:// URI.
        device: "cpu", "cuda", "cuda:N" or "auto"; never falls back.
        revision: branch, tag or commit on the Hub.
        cache_dir: where downloads are kept (default: $HF_HOME).

    Returns:
        A model that takes what the stock `generate` takes: prompts, beams, sampling.

    Raises:
        UsageError: a device that is none.
        RefusedError: graphs that generate no text, or are broken.
        DeviceError: a device that ONNX Runtime does not have.

    Example:
        >>> writer = comp_cli.load_onnx("caption-onnx")
        >>> writer.generate(**inputs, num_beams=3)
    """
    from .checkpoint import hub, loading
    from .onnx import generation

    place = str(loading.pick_device(device))
    source = hub.resolve_graphs(os.fspath(folder), revision=revision, cache_dir=_path(cache_dir), progress=Silent())
    return generation.load_writer(source.folder, place)


def _threads(asked: int) -> AbstractContextManager[None]:
    from .commands.threads import at_work

    return at_work(asked)


def _text(path: StrPath | None) -> str | None:
    return None if path is None else os.fspath(path)


def _path(path: StrPath | None) -> Path | None:
    return None if path is None else Path(path)


def _reported(
    work: Callable[[Progress], R],
    progress: Progress | None,
    threads: int | None = None,
    keep: Callable[[Report], None] = lambda report: None,
) -> R:
    """The report of some work, with its warnings; that of a missed gate as well. threads: that it works with, None where it
    calculates nothing. keep: what is done with either report."""
    told = Recorder(progress)
    try:
        with nullcontext() if threads is None else _threads(threads):
            report = replace(work(told), warnings=tuple(told.warnings))
    except CompError as error:
        if error.report is not None:
            error.report = replace(error.report, warnings=tuple(told.warnings))
            keep(error.report)
        raise
    keep(report)
    return report
