"""What each command can be asked for, and the defaults: the only place where they stand, for the library and the command line.
Light to import.

Numbers that cannot be are refused when options are made, by the name that the command line has for them.
"""

import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from .errors import UsageError

TEXT_TOKENS = 35  # of the reference input
SCORE_ROWS = 64  # query rows that score image tokens; ranks nearly as all rows do: benchmarks/score_rows.py
LARGE_FLOPS = 10e9  # for one pair: models from here on are large
OPSET = 20
THREADS = 0  # chosen by the size of the model, and by the cores that the process has
LAYOUTS = ("optimum", "transformers.js")  # names of files in a folder, and what the graphs of decoders that read images take
TARGETS = ("onnxruntime", "onnx")  # with ONNX Runtime's fused attention node, or with standard operators only
BACKENDS = ("torch", "onnx", "compile")
DTYPES = ("fp32", "bf16", "fp16")
QUANTIZATIONS = ("int8", "int4")
MIXED_PRECISIONS = ("no", "fp16", "bf16")
BUILT_IN = ("demo", "demo-vlm")  # models inside the package
SALIENCIES = ("key-norm", "attention")  # what ranks image tokens inside the language model, for the method vitcop
MOST = 10**7  # of samples, steps, tokens and the like: more is a slip of the finger

WHOLE = {  # numbers that are whole: the least and the most
    "num_samples": (1, MOST),
    "stage_samples": (1, MOST),
    "eval_samples": (1, MOST),
    "batch_size": (1, MOST),
    "stages": (1, MOST),
    "text_tokens": (4, MOST),
    "score_rows": (0, MOST),
    "seed": (0, 2**32 - 1),
    "steps": (0, MOST),
    "opset": (1, 99),
    "iterations": (1, MOST),
    "threads": (0, 1024),
    "tokens": (1, MOST),
    "looks": (0, MOST),
    "max_memory": (1, 2**60),
    "target_size": (1, 2**60),
}
REAL = {
    "ratio": (-math.inf, math.inf),  # what it has to be, a sentence of its own says
    "lr": (-math.inf, math.inf),
    "stage_share": (-math.inf, math.inf),
    "distill": (-math.inf, math.inf),
    "epochs": (0, MOST),
    "atol": (0, math.inf),
    "duration": (0, MOST),
    "min_speedup": (0, math.inf),
    "max_latency_ms": (0, math.inf),
    "max_memory_mb": (0, math.inf),
    "max_regression": (0, math.inf),
    "tokens_share": (-math.inf, math.inf),
    "target_speedup": (-math.inf, math.inf),
    "target_latency_ms": (0, math.inf),
}


def flag(name: str) -> str:
    """The option of a field: "--num-samples"."""
    return "--" + name.replace("_", "-")


class Checked:
    """Options whose numbers are numbers, and within their bounds.

    Raises UsageError where one is not.
    """

    NAMES: ClassVar[dict[str, str]] = {}  # field -> keyword, where they differ

    def __post_init__(self) -> None:
        for one in fields(self):  # type: ignore[arg-type]  # those that inherit from this are dataclasses
            value = getattr(self, one.name)
            if value is not None:
                check_number(self.NAMES.get(one.name, one.name), value, WHOLE.get(one.name), REAL.get(one.name))


def check_number(name: str, value: Any, whole: tuple[int, int] | None, real: tuple[float, float] | None) -> None:
    """Raises UsageError where a value is no number of the kind, or out of bounds."""
    bounds = whole or real
    if bounds is None:
        return
    kind, what = (int, "a whole number") if whole else ((int, float), "a number")
    least, most = bounds
    if isinstance(value, kind) and not isinstance(value, bool) and least <= value <= most and abs(value) < math.inf:
        return
    limits = f" from {least}" * (least > -math.inf) + f" to {most}" * (most < math.inf)
    raise UsageError(f"{flag(name)} {value!r}: expected {what}{limits}.")


@dataclass(frozen=True)
class BySize:
    """A default that depends on the model: for small ones and large ones (see LARGE_FLOPS), and for large ones where every
    sample is a candidate for every other (retrieval), so that few are no question."""

    small: float
    large: float
    retrieval: float | None = None

    def __str__(self) -> str:
        several = f", retrieval {brief(self.retrieval)}" if self.retrieval is not None else ""
        return f"{brief(self.small)}; large models {brief(self.large)}{several}"


def brief(number: float) -> str:
    """ "256" or "1e-4"."""
    return f"{number:g}" if number >= 0.01 else f"{number:.0e}".replace("e-0", "e-")


@dataclass(frozen=True)
class Effort:
    """How much a run looks at where nobody says it; the fields are those of PruneOptions.

    Attributes:
        looks: None for as many as the descent takes; 0 for none: the plan that it begins with is taken.
        thorough: whether plans are compared at length: both halves of the pairs judge, the descent begins at every place that
            it knows and ends in short steps. None for small models only.
    """

    num_samples: BySize
    stage_samples: BySize
    eval_samples: BySize
    stages: BySize
    looks: BySize | None = None
    thorough: bool | None = None
    double_prices: bool = True  # whether units are priced in fp64

    def is_thorough(self, is_large: bool) -> bool:
        """Of a model that is large or not."""
        return not is_large if self.thorough is None else self.thorough


EFFORTS = {
    "fast": Effort(
        num_samples=BySize(64, 4, 16),
        stage_samples=BySize(64, 4, 16),
        eval_samples=BySize(256, 8, 32),
        stages=BySize(10, 4),
        looks=BySize(4, 0),
        thorough=False,
        double_prices=False,
    ),
    "normal": Effort(
        num_samples=BySize(256, 32),
        stage_samples=BySize(256, 8, 32),
        eval_samples=BySize(1000, 64, 256),
        stages=BySize(40, 10),
    ),
    "best": Effort(
        num_samples=BySize(512, 64),
        stage_samples=BySize(512, 32, 64),
        eval_samples=BySize(1000, 64, 256),
        stages=BySize(40, 20),
        thorough=True,
    ),
}
USUAL = EFFORTS["normal"]
LEARNING_RATE = BySize(1e-4, 1e-5)
STREAMED_LOOKS = 2  # plans that are compared where every one of them takes the weights from disk


@dataclass(frozen=True)
class HubOptions:
    """How models are looked up and loaded.

    Attributes:
        revision: branch, tag or commit on the Hub.
        cache_dir: where downloads are kept; None for $HF_HOME.
        allow_pickle: whether pytorch_model.bin may be loaded where there is no safetensors.
    """

    revision: str | None = None
    cache_dir: Path | None = None
    allow_pickle: bool = False


HUB_DEFAULTS = HubOptions()


@dataclass(frozen=True)
class DataOptions:
    """Where image-text pairs come from.

    Attributes:
        data: jsonl, csv, parquet, image folder or Hub data set; None for built-in synthetic scenes.
        split: its split to calibrate on.
        image_column: column with images or their paths; None to find it by its name, as for all columns.
        text_column: column with texts.
        label_column: column that says whether image and text match; "" for none.
        answer_column: column with the answers to questions; "" for none.
        split_column: column that names each row's split; "" for none.

    Raises UsageError where anything is said of data that nobody names.
    """

    data: str | None = None
    split: str | None = None
    image_column: str | None = None
    text_column: str | None = None
    label_column: str | None = None
    answer_column: str | None = None
    split_column: str | None = None

    def __post_init__(self) -> None:
        if self.data is not None:
            return
        if said := [f"{flag(name)} {value!r}" for name, value in vars(self).items() if value is not None]:
            hint = "Name your pairs with --data, or leave this out: the built-in scenes have no splits and no columns."
            raise UsageError(f"{', '.join(said)} without --data.", hint=hint)


@dataclass(frozen=True)
class Training(Checked):
    """Fine-tuning of what is pruned.

    Attributes:
        steps: optimizer steps; 0 for none (training-free).
        epochs: fine-tuning epochs over the data, in place of steps.
        lr: learning rate; None for the default of the model's size.
        batch_size: pairs of one step, over all processes.
        stage_share: share of the steps that train inside the stages, while units fade; the others tune the final plan.
        distill: weight w of the distillation: loss = (1-w) task + w KL(dense, compact).
        mixed_precision: "no", "fp16" or "bf16"; None for what accelerate is configured for.
    """

    NAMES: ClassVar[dict[str, str]] = {"batch_size": "train_batch_size"}

    steps: int = 0
    epochs: float | None = None
    lr: float | None = None
    batch_size: int = 32
    stage_share: float = 0.0
    distill: float = 0.5
    mixed_precision: str | None = None

    @property
    def tunes(self) -> bool:
        """Whether weights are trained."""
        return bool(self.steps) or self.epochs is not None

    @property
    def stage_steps(self) -> int:
        return round(self.stage_share * self.steps)


@dataclass(frozen=True)
class ResolvedTraining(Training):
    """With the numbers that the size of the model decides, and epochs as steps."""

    lr: float = LEARNING_RATE.small


@dataclass(frozen=True)
class AnalyzeOptions(Checked):
    """What `comp analyze` is asked for.

    Attributes:
        model: Hub id, hf:// URI, folder, "demo" or "demo-vlm".
        num_samples: image-text pairs for calibration.
        batch_size: pairs in one forward pass.
        text_tokens: text length of the reference input.
        score_rows: query rows that score image tokens; 0 for all.
        seed: random seed.
        device: "auto", "cpu", "cuda" or "cuda:N".
        data: where the pairs come from.
        task: evaluation task; None for that of the architecture.
        threads: CPU threads; 0 for as many as pay.
        png: picture to write: which tokens stay in a compact model, what matters in a dense one.
        html: page to write.
    """

    model: str
    num_samples: int = 32
    batch_size: int = 8
    text_tokens: int = TEXT_TOKENS
    score_rows: int = SCORE_ROWS
    seed: int = 0
    device: str = "auto"
    data: DataOptions = DataOptions()
    task: str | None = None
    threads: int = THREADS
    png: Path | None = None
    html: Path | None = None


@dataclass(frozen=True)
class TokenOptions(Checked):
    """How many image tokens of a decoder stay, by exactly one of the first three, and what a method ranks them by.

    Attributes:
        tokens: of an image: the mean over the layers of the language model, or of a rule that prunes once those kept.
        tokens_share: the same as a share of the tokens that an image has.
        token_stages: the stages themselves, layer:count or layer:share with commas.
        compat: whether the authors' code is followed where it departs from their formula.
        saliency: what ranks tokens inside the language model: "key-norm" or "attention"; None for the model's usual one.
        refit: whether the language model's output projections are fitted anew, on calibration pairs, to what the dense model's
            residual stream holds at the tokens that stay.
    """

    tokens: int | None = None
    tokens_share: float | None = None
    token_stages: str | None = None
    compat: bool = False
    saliency: str | None = None
    refit: bool = False

    @property
    def amounts(self) -> list[str]:
        """The options that say how many tokens stay, of those that were given."""
        given = (name for name in ("tokens", "tokens_share", "token_stages") if getattr(self, name) is not None)
        return list(map(flag, given))


@dataclass(frozen=True)
class TargetOptions(Checked):
    """What decides the ratio in its place, one of them at most.

    Attributes:
        target_speedup: times that the compact model is faster than the stock dense one, at batch 1 in torch.
        target_latency_ms: what a forward pass of the compact model may take, ms, at batch 1 in torch.
        target_size: bytes that model.safetensors of the compact model may have.
    """

    target_speedup: float | None = None
    target_latency_ms: float | None = None
    target_size: int | None = None

    @property
    def given(self) -> dict[str, float]:
        """Those that were given, with their values."""
        return {one.name: getattr(self, one.name) for one in fields(self) if getattr(self, one.name) is not None}


@dataclass(frozen=True)
class Target:
    """What a search over the ratio looks for. kind: "target_speedup", "target_latency_ms" or "target_size": the smallest ratio
    that has it; "max_drop": the largest that loses no more."""

    kind: str
    wanted: float

    @property
    def is_least(self) -> bool:
        """Whether the smallest ratio is looked for."""
        return self.kind != "max_drop"

    @property
    def option(self) -> str:
        """ "--target-speedup 2.5"."""
        return f"{flag(self.kind)} {self.amount}"

    @property
    def amount(self) -> str:
        """As it is typed: "2.5", "100MB"."""
        return f"{self.wanted / 1e6:g}MB" if self.kind == "target_size" else f"{self.wanted:g}"


TOKEN_METHOD = "cover"  # how image tokens leave a decoder where nobody says it
ATTENTION = "attention"  # CoMP's own way for them to leave where parameters go too, see Leaving


@dataclass(frozen=True)
class PruneOptions(Checked):
    """What `comp prune` is asked for; goes into the report as it is.

    Attributes:
        model: Hub id, hf:// URI, folder, "demo" or "demo-vlm".
        ratio: FLOPs reduction, 0 to 1 (0.5 removes half); null where the number of image tokens is asked for.
        method: what is scored and removed, and how.
        recover: whether output projections are refitted in closed form.
        sequential: whether they are refitted once more in the end, in sequence, towards the dense model's residual stream.
        seed: random seed.
        stages: stages of the method comp-paper.
        num_samples: image-text pairs for calibration.
        stage_samples: pairs that judge a plan or a stage.
        eval_samples: pairs of the final comparison.
        batch_size: pairs in one forward pass.
        text_tokens: text length of the reference input.
        score_rows: query rows that score image tokens; 0 for all.
        device: "auto", "cpu", "cuda" or "cuda:N".
        dtype: of the written weights; None for the checkpoint's.
        data: where the pairs come from.
        task: evaluation task; None for that of the architecture.
        training: fine-tuning of what is pruned.
        modes: kinds of what is removed, for example language_params, image_tokens; None for the usual ones of the model.
        tokens_method: how image tokens leave a decoder, beside the parameters that go; None for the usual way of the model.
        uniform: whether every layer of a tower keeps as many units, so that the folder is one of a stock class.
        cip: token-weighted statistics of activations (CoMP, CIP, Eq. 4).
        cit: head-weighted token importance (CoMP, Eq. 7), while units fade.
        explore: random exploration of modes (CoMP, RE, Eq. 9).
        history: history information on modes (CoMP, HI, Eq. 10).
        threads: CPU threads; 0 for as many as pay.
        image_tokens: how many image tokens of a decoder stay; left out for other models.
        looks: plans that are compared at most; left out for as many as the descent takes; 0 for the plan that it begins with.
        max_memory: bytes that the work may take of the memory of the device; left out for what is there.
        effort: how much is looked at where nothing else is said: "fast", "normal" or "best".
        push_to_hub: repository that the folder is uploaded to; left out where it is not.
        private: whether that is made for its owners only.
    """

    model: str
    ratio: float | None = None
    method: str = "comp"
    recover: bool = True
    sequential: bool = True
    seed: int = 0
    stages: int | None = None  # these four None: by the size of the model
    num_samples: int | None = None
    stage_samples: int | None = None
    eval_samples: int | None = None
    batch_size: int = 8
    text_tokens: int = TEXT_TOKENS
    score_rows: int = SCORE_ROWS
    device: str = "auto"
    dtype: str | None = None
    data: DataOptions = DataOptions()
    task: str | None = None
    training: Training = Training()
    modes: tuple[str, ...] | None = None
    tokens_method: str | None = None
    uniform: bool = False
    cip: bool = True
    cit: bool = True
    explore: bool = True
    history: bool = True
    threads: int = THREADS
    # These are left out of reports where they are None, as report.base.if_known says it.
    image_tokens: TokenOptions | None = field(default=None, metadata={"if_known": True})
    looks: int | None = field(default=None, metadata={"if_known": True})
    max_memory: int | None = field(default=None, metadata={"if_known": True})
    effort: str = "normal"
    push_to_hub: str | None = field(default=None, metadata={"if_known": True})
    private: bool = field(default=False, metadata={"unwritten": True})

    @property
    def refits(self) -> bool:
        """Whether weights are refitted where image tokens go by their number."""
        return self.image_tokens is not None and self.image_tokens.refit


@dataclass(frozen=True)
class ResolvedOptions(PruneOptions):
    """With the numbers that the size of the model decides, for a model whose parameters or tokens go by a ratio."""

    ratio: float = 0.0
    stages: int = int(USUAL.stages.small)
    num_samples: int = int(USUAL.num_samples.small)
    stage_samples: int = int(USUAL.stage_samples.small)
    eval_samples: int = int(USUAL.eval_samples.small)
    training: ResolvedTraining = ResolvedTraining()


@dataclass(frozen=True)
class ExportOptions(Checked):
    """What `comp export` is asked for.

    Attributes:
        target: "onnxruntime" (fused attention) or "onnx" (standard operators only).
        opset: ONNX opset.
        split: whether images and texts get a graph each.
        dtype: of the weights; inputs and outputs stay fp32.
        quantize: "int8" for int8 dynamic quantization, "int4" for int4 weights of a decoder that reads images.
        layout: "optimum", or "transformers.js": files of a CLIP, a SigLIP or a LLaVA as that client reads them.
        with_preprocessing: whether graphs take pictures as they are, uint8 of any size, and make pixel values themselves.
        optimize: whether ONNX Runtime's fusions are applied ahead of time.
        atol: max. abs. error against PyTorch; None for that of the dtype or quantization.
        keep_failed: whether refused graphs are left in OUTPUT.failed.
        device: where the graphs are checked: "cpu", "cuda" or "cuda:N".
        data: the real pairs that they are checked on.
        threads: CPU threads; 0 for as many as pay.
        push_to_hub: repository that the folder is uploaded to.
        private: whether that is made for its owners only.
    """

    target: str = TARGETS[0]
    opset: int = OPSET
    split: bool = False
    dtype: str = DTYPES[0]
    quantize: str | None = None
    layout: str = LAYOUTS[0]
    with_preprocessing: bool = False
    optimize: bool = False
    atol: float | None = None
    keep_failed: bool = False
    device: str = "cpu"
    data: DataOptions = DataOptions()
    threads: int = THREADS
    push_to_hub: str | None = None
    private: bool = False


@dataclass(frozen=True)
class Gates(Checked):
    """What a benchmark must show. None asks for nothing.

    Attributes:
        min_speedup: median latency of the stock model over that of the compact one, on the same backend at the same batch.
        max_latency_ms: median latency of the compact model, ms for a whole batch.
        max_memory_mb: peak memory of the compact model at the largest batch, MiB.
    """

    min_speedup: float | None = None
    max_latency_ms: float | None = None
    max_memory_mb: float | None = None


@dataclass(frozen=True)
class BenchOptions(Checked):
    """What `comp bench` is asked for.

    Attributes:
        device: "auto", "cpu", "cuda" or "cuda:N".
        backends: some of "torch", "onnx" and "compile".
        batches: batch sizes.
        iterations: least number of timed runs of each variant.
        duration: least seconds of timed runs for each batch size.
        threads: CPU threads; 0 for as many as pay.
        text_tokens: text length of the inputs.
        seed: random seed, of the inputs and of the bootstrap.
        gates: what must be shown.
        plot: picture to write.
        save: JSON document to write, for comp compare.
    """

    device: str = "auto"
    backends: tuple[str, ...] = BACKENDS[:2]
    batches: tuple[int, ...] = (1, 8)
    iterations: int = 10
    duration: float = 5.0
    threads: int = THREADS
    text_tokens: int = TEXT_TOKENS
    seed: int = 0
    gates: Gates = Gates()
    plot: Path | None = None
    save: Path | None = None


@dataclass(frozen=True)
class CompareOptions(Checked):
    """What `comp compare` is asked for.

    Attributes:
        max_regression: percent that a row of the compact model may be slower, where that is beyond its intervals.
    """

    max_regression: float | None = None
