"""`comp bench` of a decoder that reads images: the stock model and the compact one, in torch, interleaved.

Both run transformers' own kernels, so all of a speed-up is what pruning brings. What is timed: the prompt (prefill), the first
token of `generate` with the image's encoding in it, and tokens behind the prompt.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from .. import __version__
from ..checkpoint.loading import config_of, load_processor
from ..data.batches import random_inputs
from ..errors import UsageError
from ..families import Family
from ..files.store import folder_size
from ..measure import decoding, gates, timing
from ..measure.memory import peak_memory
from ..models.dense import longest_text
from ..options import BenchOptions
from ..progress import Progress
from ..report.base import Sizes
from ..report.bench import BenchReport, Generation, GenerationSpeedup, Latency, Machine, Speedup
from ..tasks import Task

SIDES = ("dense", "compact")
FIGURES = ("prefill", "first_token", "step")
Key = tuple[str, str]  # (figure, side)
NO_GRAPHS = "ONNX Runtime was left out: comp bench runs no graphs of decoders that read images. All rows are of torch."


def only_torch(options: BenchOptions, progress: Progress) -> BenchOptions:
    """The options with the backend that there is; a warning says that graphs, which are asked for by default, are left out.
    Raises UsageError where nothing is left, and for torch.compile."""
    if "compile" in options.backends:
        said = "--backend compile: torch.compile is not for decoders that read images: their caches grow with every token."
        raise UsageError(said, hint="Leave compile out of --backend.")
    if "torch" not in options.backends:
        said = "--backend onnx: comp bench runs no graphs of decoders that read images."
        raise UsageError(said, hint="Use --backend torch.")
    if "onnx" in options.backends:
        progress.warn(NO_GRAPHS)
    return replace(options, backends=("torch",))


@dataclass(frozen=True)
class Case:
    """What is measured: the models of SIDES and their folders."""

    folder: Path  # of the compact model
    compact: str  # what it is called: the folder, or an address on the hub
    baseline: str
    family: Family
    architecture: str
    task: Task
    folders: dict[str, Path]
    models: dict[str, nn.Module]
    machine: Machine


def bench_decoder(
    case: Case, options: BenchOptions, device: torch.device, progress: Progress, allow_pickle: bool
) -> BenchReport:
    """Measure prompts, first tokens and tokens behind them, in torch."""
    family, models = case.family, case.models
    described = config_of(models["dense"])
    longest = longest_text(described.to_dict(), family, load_processor(case.folder))
    text_tokens = family.topology.text_length(options.text_tokens, longest)

    def prompt(batch: int) -> timing.Inputs:
        return decoding.prompt_of(random_inputs(described, family, batch, text_tokens, seed=options.seed))

    prompts = {batch: prompt(batch) for batch in options.batches}
    params = Sizes(**{side: sum(p.numel() for p in models[side].parameters()) for side in SIDES})
    one = prompt(1)
    for model in models.values():
        model.to(device)
    counted = {side: decoding.count_flops(models[side], one) for side in SIDES}
    flops, step_flops = (Sizes(**{side: found[place] for side, found in counted.items()}) for place in (0, 1))
    fall, fall_of_step = flops.dense / flops.compact, step_flops.dense / step_flops.compact
    timings: list[Latency] = []
    speedups: list[Speedup] = []
    generation: list[Generation] = []
    faster: list[GenerationSpeedup] = []
    for batch, given in prompts.items():
        runners, held = runners_of(models, given)
        taken = timing.time_interleaved(runners, given, batch, options.iterations, options.duration, progress)
        del runners
        for side in SIDES:
            timings.append(timing.summary("torch", side, batch, taken["prefill", side]))
            generation.append(generation_of(side, batch, taken, held[side]))
        found = {figure: timing.speedup(taken[figure, "dense"], taken[figure, "compact"], options.seed) for figure in FIGURES}
        whole = found["prefill"]
        speedups.append(Speedup("torch", batch, whole, None, whole, whole.value / fall, whole))
        step = found["step"]
        faster.append(GenerationSpeedup(batch, found["first_token"], step, step.value / fall_of_step))
    places = {("torch", side): path for side, path in case.folders.items()}
    peaks = peak_memory(places, prompts[max(prompts)], family, device, allow_pickle, progress)
    return BenchReport(
        comp_version=__version__,
        compact=case.compact,
        baseline=case.baseline,
        architecture=case.architecture,
        machine=case.machine,
        text_tokens=text_tokens,
        image_tokens=family.topology.lengths(family, described.to_dict(), text_tokens)[family.decoder_of_images[0]],
        params=params,
        flops=flops,
        step_flops=step_flops,
        size_bytes=Sizes(**{side: folder_size(path) for side, path in case.folders.items()}),
        providers={},
        peak_memory_bytes=peaks,
        flops_reduction=fall,
        step_flops_reduction=fall_of_step,
        timings=tuple(timings),
        speedups=tuple(speedups),
        generation=tuple(generation),
        generation_speedups=tuple(faster),
        gates=gates.outcomes(options.gates, speedups, timings, peaks),
    )


def runners_of(models: dict[str, nn.Module], prompt: timing.Inputs) -> tuple[dict[Key, timing.Runner], dict[str, int]]:
    """What is timed, and bytes of keys and values that each side holds behind the prompt."""
    runners: dict[Key, timing.Runner] = {}
    held = {}
    for side, model in models.items():
        steps = decoding.Steps(model, prompt)
        held[side] = decoding.cache_bytes(steps.cache)
        runners |= {
            ("prefill", side): decoding.prefill_runner(model),
            ("first_token", side): decoding.first_token_runner(model),
            ("step", side): steps,
        }
    return runners, held


def generation_of(side: str, batch: int, taken: dict[Key, list[float]], held: int) -> Generation:
    first, steps = (timing.summary("torch", side, batch, taken[figure, side]) for figure in ("first_token", "step"))
    of_one = steps.median / decoding.STEPS
    return Generation(
        side=side,
        batch=batch,
        first_token_ms=first.median,
        token_ms=of_one,
        tokens_per_second=1000 * batch / of_one,
        kv_cache_bytes=held,
        first_token_low=first.low,
        first_token_high=first.high,
        token_low=steps.low / decoding.STEPS,
        token_high=steps.high / decoding.STEPS,
    )
