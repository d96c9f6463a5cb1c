"""The report of `comp bench`."""

from dataclasses import dataclass

from .base import Report, Sizes, Threads, if_known


@dataclass(frozen=True)
class Machine:
    """Where the figures were taken.

    Attributes:
        device: "cpu" or "cuda:N".
        name: name of the processor or GPU.
        threads: CPU threads.
        tf32: whether matrix products on the GPU may round to TF32.
        torch: version of PyTorch.
        transformers: version of transformers.
        onnxruntime: version of ONNX Runtime.
    """

    device: str
    name: str
    threads: int
    tf32: bool
    torch: str
    transformers: str
    onnxruntime: str


@dataclass(frozen=True)
class ProviderShare:
    """What an execution provider ran of a graph.

    Attributes:
        nodes: number of nodes.
        node_share: share of the nodes.
        time_share: share of their time.
    """

    nodes: int
    node_share: float
    time_share: float


@dataclass(frozen=True)
class Providers:
    """Where a graph ran.

    Attributes:
        first: the session's first execution provider.
        tf32: whether it may round matrix products to TF32.
        shares: what each provider ran.
    """

    first: str
    tf32: bool
    shares: dict[str, ProviderShare]


@dataclass(frozen=True)
class PeakMemory:
    """Peak memory of a process that loads and runs one model.

    Attributes:
        backend: "torch" or "onnx".
        side: "dense" (stock), "own_dense" (dense, comp runtime) or "compact".
        batch: batch size.
        bytes: resident memory; on CUDA allocated memory.
        baseline_bytes: resident memory of that process before the model was loaded: Python and its libraries; on CUDA 0.
    """

    backend: str
    side: str
    batch: int
    bytes: int
    baseline_bytes: int = 0


@dataclass(frozen=True)
class Latency:
    """Latency of one variant, ms for a whole batch.

    Attributes:
        backend: "torch", "onnx" or "compile".
        side: "dense" (stock), "own_dense" (dense, comp runtime) or "compact".
        batch: batch size.
        runs: number of timed runs.
        median: median, ms.
        p90: 90th percentile, ms.
        p99: 99th percentile, ms.
        pairs_per_second: throughput at the median.
        low: lower end of the median's 95 % interval, ms.
        high: upper end, ms.
    """

    backend: str
    side: str
    batch: int
    runs: int
    median: float
    p90: float
    p99: float
    pairs_per_second: float
    low: float
    high: float


@dataclass(frozen=True)
class Factor:
    """How many times faster.

    Attributes:
        value: ratio of the medians.
        low: lower end of its 95 % interval.
        high: upper end.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Speedup:
    """Speed-up of the compact model.

    Attributes:
        backend: "torch", "onnx" or "compile".
        batch: batch size.
        speedup: against the stock model on the same backend.
        by_kernels: what the comp runtime brings: stock over dense in the comp runtime; null for models that it runs on the
            stock kernels.
        by_pruning: what pruning brings: dense over compact, both in the comp runtime.
        flops_efficiency: speed-up from pruning over the fall of the FLOPs.
        against_stock_torch: against stock transformers in PyTorch, where that was timed.
    """

    backend: str
    batch: int
    speedup: Factor
    by_kernels: Factor | None
    by_pruning: Factor
    flops_efficiency: float
    against_stock_torch: Factor | None = if_known()


@dataclass(frozen=True)
class Generation:
    """What writing costs a decoder that reads images.

    Attributes:
        side: "dense" (stock) or "compact".
        batch: batch size.
        first_token_ms: median time of generating one token: images encoded, prompt read, token chosen; ms for the whole batch.
        token_ms: median time of one further token, ms for the whole batch.
        tokens_per_second: tokens written behind the prompt, of all samples together.
        kv_cache_bytes: keys and values held behind the prompt, of all samples together, bytes.
        first_token_low: lower end of the 95 % interval of `first_token_ms`.
        first_token_high: upper end.
        token_low: lower end of the 95 % interval of `token_ms`.
        token_high: upper end.
    """

    side: str
    batch: int
    first_token_ms: float
    token_ms: float
    tokens_per_second: float
    kv_cache_bytes: int
    first_token_low: float
    first_token_high: float
    token_low: float
    token_high: float


@dataclass(frozen=True)
class GenerationSpeedup:
    """Speed-up of the compact model in writing.

    Attributes:
        batch: batch size.
        first_token: of the first token.
        decoding: of tokens behind the prompt.
        decoding_flops_efficiency: speed-up of these over the fall of their FLOPs.
    """

    batch: int
    first_token: Factor
    decoding: Factor
    decoding_flops_efficiency: float


@dataclass(frozen=True)
class GateOutcome:
    """A gate, and the worst row.

    Attributes:
        gate: "min_speedup", "max_latency_ms" or "max_memory_mb".
        limit: what was asked for.
        passed: whether it is met.
        found: the worst value.
        backend: its backend.
        batch: its batch size.
    """

    gate: str
    limit: float
    passed: bool
    found: float
    backend: str
    batch: int


@dataclass(frozen=True, kw_only=True)
class BenchReport(Report):
    """The dense and the compact model side by side.

    Attributes:
        comp_version: version of comp.
        compact: the compact folder.
        baseline: the dense model.
        architecture: transformers class.
        machine: where the figures were taken.
        text_tokens: text length of the inputs.
        image_tokens: image tokens of an input, of a decoder that reads images; timings are then of its prompts.
        params: parameters.
        flops: FLOPs of one sample, counted from what runs; of a decoder, of its prompt.
        step_flops: FLOPs of one token behind the prompt, of a decoder.
        size_bytes: size of the folders, bytes.
        providers: where the graphs ran, by side.
        peak_memory_bytes: peak memory at the largest batch.
        flops_reduction: FLOPs(dense) / FLOPs(compact).
        step_flops_reduction: the same of one token behind the prompt.
        timings: latencies.
        speedups: speed-up of the compact model.
        threads: CPU threads that it worked with.
        generation: what writing costs, of a decoder.
        generation_speedups: speed-up of the compact model in writing.
        gates: outcomes of the gates that were asked for.
    """

    comp_version: str
    compact: str
    baseline: str
    architecture: str
    machine: Machine
    text_tokens: int
    params: Sizes
    flops: Sizes
    size_bytes: Sizes
    providers: dict[str, Providers]
    peak_memory_bytes: tuple[PeakMemory, ...]
    flops_reduction: float
    timings: tuple[Latency, ...]
    speedups: tuple[Speedup, ...]
    gates: tuple[GateOutcome, ...]
    image_tokens: int | None = if_known()
    step_flops: Sizes | None = if_known()
    step_flops_reduction: float | None = if_known()
    threads: Threads | None = if_known()
    generation: tuple[Generation, ...] | None = if_known()
    generation_speedups: tuple[GenerationSpeedup, ...] | None = if_known()
