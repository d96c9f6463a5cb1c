"""The report of `comp prune`."""

from dataclasses import dataclass
from pathlib import Path

from ..options import PruneOptions
from ..plan import Plan
from .base import PairCounts, Reference, Report, Sizes, Streamed, Texts, Threads, Values, if_known, unwritten
from .samples import Picture, SampleKept


@dataclass(frozen=True)
class LayerKept:
    """What is left of a layer, each as [kept, dense].

    Attributes:
        tower: name of the tower.
        layer: index of the layer in it.
        heads: attention heads.
        cross_heads: heads of the cross-attention; null where there is none.
        ffn: feed-forward channels; null where there are none.
        tokens: tokens that the layer hands on, and those that enter the tower.
        flops: FLOPs of the compact layer at the reference input.
        flops_of: FLOPs of its parts, dense and compact: attention, cross (cross-attention), ffn (feed-forward). What no plan
            prunes of a layer counts with the last one.
        params_of: parameters of these parts; left out where no weights were read.
    """

    tower: str
    layer: int
    heads: list[int] | None
    cross_heads: list[int] | None
    ffn: list[int] | None
    tokens: list[int]
    flops: int
    flops_of: dict[str, Sizes]
    params_of: dict[str, Sizes] | None = if_known()


@dataclass(frozen=True)
class StageTaken:
    """One stage of the search.

    Attributes:
        stage: its number, from 1.
        mode: what it removed.
        why: why this mode.
        threshold: that the mode was raised to: a quantile of parameter scores, or a token score relative to uniform.
        ratio: FLOPs reduction after the stage.
        flops: FLOPs after the stage.
        loss: loss on the calibration pairs after the stage.
        metric: metric on the calibration pairs after the stage.
        cost: loss that the stage added per share of the dense FLOPs that it removed (CoMP, Eq. 8).
        remembered: remembered cost of the mode after the stage (CoMP, Eq. 10).
    """

    stage: int
    mode: str
    why: str
    threshold: float
    ratio: float
    flops: int
    loss: float
    metric: float
    cost: float
    remembered: float


@dataclass(frozen=True)
class PlanCompared:
    """A whole plan of the ratio that the method comp looked at.

    Attributes:
        tokens: stream -> the layer behind whose attention tokens go, and how many are kept; streams that keep all are left out.
        ratio: FLOPs reduction; 0 where no plan of the ratio keeps so many tokens.
        loss: distance of the features from the dense model's, in units of their variance, on pairs that recovery in sequence
            had not seen; null where no plan of the ratio keeps so many tokens.
        halves: of these pairs, on so many of which it was judged: 1 where it lost 30 % more than the best plan before it on
            the first (its loss is that of the best plan, and the difference on that half), and where plans are judged on one
            only; left out where there is no loss.
        units: of a uniform plan, tower and part -> units that every layer keeps; left out for others.
    """

    tokens: dict[str, tuple[int, int]]
    ratio: float
    loss: float | None
    halves: int | None = if_known()
    units: dict[str, int] | None = if_known()


@dataclass(frozen=True)
class Quality:
    """Dense against compact on pairs that calibration never saw.

    Attributes:
        samples: number of pairs.
        data: where they come from.
        metric: the metric that counts.
        metrics: the metrics of both models; null where nothing is labelled.
        agreement: share of the samples on which both predict the same.
        divergence: KL(dense, compact) of the predictions, nats.
        texts: texts that were truncated.
        shared_texts: samples whose text belongs to several images, each of which counts as right.
    """

    samples: int
    data: str
    metric: str
    metrics: dict[str, Values] | None
    agreement: float
    divergence: float
    texts: Texts
    shared_texts: int


@dataclass(frozen=True)
class AtOwnTexts:
    """FLOPs at the mean length of the texts in the user's data, each by itself, without padding.

    Attributes:
        purpose: pairs whose texts they are: "evaluation", or with --plan-only "calibration", whose texts are truncated.
        tokens: tokens that enter each tower, rounded.
        ratio: FLOPs reduction at this input.
        flops: FLOPs of one sample at this input.
    """

    purpose: str
    tokens: dict[str, int]
    ratio: float
    flops: Sizes


@dataclass(frozen=True)
class SearchCost:
    """What the search took.

    Attributes:
        search_seconds: seconds of the search.
        dense_pass_seconds: seconds of one pass of the dense model over the calibration pairs.
        dense_passes: the former in units of the latter.
    """

    search_seconds: float
    dense_pass_seconds: float
    dense_passes: float


@dataclass(frozen=True)
class TokensLeft:
    """A stage at which image tokens leave a decoder.

    Attributes:
        layer: before which layer of the language model.
        rule: what chooses those that stay.
        kept: tokens of the reference image that stay.
        of: tokens of the reference image that come to the stage.
        share: what stays of the tokens that an image has at first; null where it is a number, the same for all images.
    """

    layer: int
    rule: str
    kept: int
    of: int
    share: float | None


@dataclass(frozen=True)
class Estimate:
    """What `--dry-run` expects of the run. The plan is that of its search, where searching takes seconds; else no weights and
    no data were read, all numbers of the report are those of a plan that was assumed, and of `[least, most]` those of other
    plans of the ratio.

    Attributes:
        assumed: what was assumed of the plan; null where it is that of the search.
        params: parameters of the compact model, [least, most]; a run that finds a very uneven plan may end outside.
        size_bytes: bytes of its weights on the disk, [least, most].
        latency_ms: milliseconds of one sample, dense and compact; null where nothing was timed.
        latency: how it was timed, or why not.
        device: where it was timed.
        peak_weights_bytes: bytes of the weights that pruning holds in memory at most, dense and compact in fp32.
    """

    assumed: str | None
    params: tuple[int, int]
    size_bytes: tuple[int, int]
    latency_ms: Values | None
    latency: str
    device: str
    peak_weights_bytes: int


@dataclass(frozen=True)
class ImageTokens:
    """What becomes of the image tokens of a decoder, and what it saves behind the reference input.

    Attributes:
        of: tokens of the reference image.
        mean: image tokens that a layer of the language model sees, mean over its layers.
        stages: where they leave.
        step_flops: FLOPs of the first token that is written behind the reference input.
        kv_cache_bytes: keys and values behind the reference input, bytes, in the precision of the checkpoint.
        weights: how they lie in the folder: "copied", "linked" (hard links to the dense model's), "refitted" or "tuned"; left
            out by a dry run.
    """

    of: int
    mean: float
    stages: tuple[TokensLeft, ...]
    step_flops: Sizes
    kv_cache_bytes: Sizes
    weights: str | None = if_known()


@dataclass(frozen=True)
class Reading:
    """A measurement of a model.

    Attributes:
        value: in the unit of the target.
        low: lower end of its 95 % interval; the value itself where it is exact.
        high: upper end.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class RatioTried:
    """A ratio that was tried on the way to a target.

    Attributes:
        ratio: FLOPs reduction that was asked for.
        found: what was measured; null where no plan has the ratio.
        whole: whether the plan was searched for as `comp prune --ratio` does it; or else made of the last one that was.
    """

    ratio: float
    found: Reading | None
    whole: bool


@dataclass(frozen=True)
class TargetReached:
    """What decided the ratio in its place.

    Attributes:
        kind: "target_speedup" (times), "target_latency_ms" (ms), "target_size" (bytes), or "max_drop" (points).
        wanted: what was asked for.
        measured: of the model that was written, measured anew; after a dry run that of the plan.
        dense: the same of the dense model; null for speed-ups and losses, which are relative to it.
        ratio: the ratio that was found.
        on: what it was measured on.
        tried: the ratios that were tried, in their order; losses on pairs that the final figure does not count.
        missed: ratios whose model was made, and missed what was wanted when it was measured anew.
    """

    kind: str
    wanted: float
    measured: Reading
    dense: Reading | None
    ratio: float
    on: str
    tried: tuple[RatioTried, ...]
    missed: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class PruneReport(Report):
    """What was pruned, and what it costs in accuracy. With --plan-only it ends with the plan: what is measured on the compact
    model is None then, and so is what is written in a run that missed --max-drop. A dry run has an estimate of all of it.

    Attributes:
        comp_version: version of comp.
        torch_version: version of PyTorch.
        base_model: the dense model: Hub id, name of the folder, "demo" or "demo-vlm".
        base_revision: its commit, for a model from the Hub.
        base_address: where it is, as seen from the output; null for a folder that is far away.
        architecture: transformers class.
        task: evaluation task.
        options: what was asked for, with the defaults of the model's size filled in; local paths as names only.
        ratio: FLOPs reduction: 1 - FLOPs(compact) / FLOPs(dense).
        reference: the input that FLOPs are counted for.
        flops: FLOPs of one sample at the reference input.
        params: parameters; shared ones count once.
        layers: what is left of every layer.
        stages: the stages of the search; none where whole plans are compared.
        compared: the plans that were compared, in their order; the one of the lowest loss is taken.
        texts: texts that were truncated, by purpose.
        pairs: what became of the rows of the user's data, by purpose.
        image_tokens: of a decoder that reads images; left out for other models.
        at_own_texts: FLOPs at texts as long as the user's; left out where they are as long as those of the reference input.
        threads: CPU threads that it worked with.
        streamed: of a model that was larger than memory; left out for others.
        estimate: of a dry run; left out otherwise.
        command: the command line that does the same.
        quality: dense against compact on pairs that calibration never saw; left out where none were given for a decoder.
        size_bytes: size of the folders, bytes.
        seconds: duration of the whole run, s.
        cost: what the search took; left out after a resume.
        target: what decided the ratio in its place; left out where one was given, and in comp_report.json, which is that of the
            ratio.
        output: the folder that was written; null where none was.
        kept_samples: generated scenes, and which of their tokens stay; none where no tokens leave, or nothing was run.
        pushed: address of the commit on the Hub; left out where nothing was uploaded.
        plan: every kept head, channel and token count; comp_report.json holds it.
    """

    comp_version: str
    torch_version: str
    base_model: str
    base_revision: str | None
    base_address: str | None
    architecture: str
    task: str
    options: PruneOptions
    ratio: float
    reference: Reference
    flops: Sizes
    params: Sizes
    layers: tuple[LayerKept, ...]
    stages: tuple[StageTaken, ...]
    compared: tuple[PlanCompared, ...]
    texts: dict[str, Texts]
    pairs: dict[str, PairCounts]
    image_tokens: ImageTokens | None = if_known()
    at_own_texts: AtOwnTexts | None = if_known()
    threads: Threads | None = if_known()
    streamed: Streamed | None = if_known()
    estimate: Estimate | None = if_known()
    command: str | None = if_known()
    quality: Quality | None = if_known()
    size_bytes: Sizes | None = if_known()
    seconds: float | None = if_known()
    cost: SearchCost | None = if_known()
    target: TargetReached | None = if_known()
    output: Path | None = None
    kept_samples: tuple[SampleKept, ...] = ()
    pushed: str | None = if_known()
    plan: Plan | None = unwritten()
    pictures: tuple[Picture, ...] = unwritten(())  # of kept_samples, in their order
