"""`comp bench`: the dense and the compact model side by side, in one run, interleaved.

Dense means what a user would otherwise run: the stock transformers model in torch, and its plain ONNX export. A third side,
"own_dense", is the dense model on comp's kernels: dense over own dense is what the kernels bring, own dense over compact
what pruning brings.
"""

import json
import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import __version__, tasks
from ..checkpoint import hub
from ..checkpoint.loading import config_of, load_model, load_processor, pick_device
from ..data.batches import random_inputs
from ..engine.methods import DECODER
from ..errors import GateError, RefusedError, UsageError
from ..families import Family, find_architecture, find_family, tower_config
from ..files.outputs import atomic_file, check_replaced, check_room, resolve
from ..files.store import folder_size, read_config, read_json
from ..measure import decoding, gates, timing, variants
from ..measure.memory import peak_memory
from ..measure.variants import SIDES
from ..models.dense import longest_text
from ..models.described import dense_flops
from ..onnx import profiling
from ..onnx.write import write_graph
from ..options import HUB_DEFAULTS, BenchOptions, HubOptions
from ..progress import Progress
from ..report import bench_plot
from ..report.base import Sizes
from ..report.bench import BenchReport, Latency, Machine, Providers, ProviderShare, Speedup
from ..report.bench_tables import gate_sentence
from . import threads
from .bench_decoder import Case, bench_decoder, only_torch
from .environment import processor_name

Key = tuple[str, str]  # (backend, side)


def bench(
    folder: Path,
    baseline: str | None,
    options: BenchOptions,
    progress: Progress,
    *,
    hub_options: HubOptions = HUB_DEFAULTS,
    address: str | None = None,
) -> BenchReport:
    """Measure. address: of a compact model that came from the hub. Raises GateError where a gate was not met, after all was
    measured; the error carries the report."""
    config = read_config(folder)
    family, architecture, name = find_family(config)
    writes = family.topology.drops_in == DECODER
    options = only_torch(options, progress) if writes else options
    device = check(options)
    dtype = decoding.precision(device) if writes else torch.float32
    source, folders, models = open_models(folder, config, baseline, progress, hub_options, dtype, address)
    named = address or str(folder), source.name
    full = config_of(models["dense"])
    threads.fit(dense_flops(full, family, architecture, options.text_tokens) * max(options.batches))
    case = Case(folder, *named, family, architecture, tasks.TASKS[name], folders, models, machine(device))
    measure = bench_decoder if writes else bench_encoder
    report = measure(case, options, device, progress, hub_options.allow_pickle)
    factors = [factor for row in report.speedups for factor in (row.speedup, row.by_kernels, row.by_pruning) if factor]
    if said := timing.unsteady(factors, min(row.runs for row in report.timings)):
        progress.warn(said)
    report = replace(report, threads=threads.in_use())
    if options.plot:
        bench_plot.plot(report, options.plot)
    if missed := [outcome for outcome in report.gates if not outcome.passed]:
        raise GateError(" ".join(map(gate_sentence, missed)), report=report)
    return report


def bench_encoder(
    case: Case, options: BenchOptions, device: torch.device, progress: Progress, allow_pickle: bool
) -> BenchReport:
    """Measure models of pairs, on all backends that were asked for."""
    family, task, folders = case.family, case.task, case.folders
    models = case.models | {"own_dense": variants.on_own_kernels(case.models["dense"], family)}
    described = config_of(models["dense"])
    longest = longest_text(described.to_dict(), family, load_processor(case.folder))
    text_tokens = family.topology.text_length(options.text_tokens, longest)
    inputs = {batch: random_inputs(described, family, batch, text_tokens, seed=options.seed) for batch in options.batches}
    # Counted before anything is exported or moved.
    params = {side: sum(p.numel() for p in models[side].parameters()) for side in folders}
    flops = Sizes(**{side: count_flops(models[side], family, text_tokens) for side in folders})
    if "onnx" in options.backends:
        written = sum(p.numel() * p.element_size() for model in models.values() for p in model.parameters())
        check_room(Path(tempfile.gettempdir()), written, "exporting the models (TMPDIR names another folder)")
    with tempfile.TemporaryDirectory() as scratch:
        graphs = {}
        for side in SIDES if "onnx" in options.backends else ():
            progress.say(f"exporting the {side.replace('_', ' ')} model ...")
            graphs[side] = Path(scratch) / f"{side}.onnx"
            write_graph(models[side], task, family, graphs[side])
        ran_on = find_providers(graphs, inputs[min(inputs)], device, progress)
        runners = build_runners(models, graphs, task, device, options.backends)
        often = options.iterations, options.duration
        taken = {batch: timing.time_interleaved(runners, inputs[batch], batch, *often, progress) for batch in inputs}
        places = {("torch", side): path for side, path in folders.items()} if "torch" in options.backends else {}
        places |= {("onnx", side): path for side, path in graphs.items()}
        peaks = peak_memory(places, inputs[max(inputs)], family, device, allow_pickle, progress)
    reduction = flops.dense / flops.compact
    timings, speedups = figures(taken, reduction, options.seed)
    return BenchReport(
        comp_version=__version__,
        compact=case.compact,
        baseline=case.baseline,
        architecture=case.architecture,
        machine=case.machine,
        text_tokens=text_tokens,
        params=Sizes(**params),
        flops=flops,
        size_bytes=Sizes(**{side: folder_size(path) for side, path in folders.items()}),
        providers=ran_on,
        peak_memory_bytes=peaks,
        flops_reduction=reduction,
        timings=timings,
        speedups=speedups,
        gates=gates.outcomes(options.gates, speedups, timings, peaks),
    )


def check(options: BenchOptions) -> torch.device:
    """What would otherwise fail after minutes: device, provider, compiler, picture, gates. Raises UsageError or DeviceError."""
    if options.backends == ("onnx",) and re.fullmatch(r"cuda(:\d+)?", options.device):
        device = torch.device(options.device)  # torch only exports; it may be a build without CUDA
    else:
        device = pick_device(options.device)
    if device.type == "cuda" and "onnx" in options.backends:
        profiling.check_cuda()
    if "compile" in options.backends:
        variants.check_compiler(device)
    if options.plot:
        bench_plot.check_plot(options.plot)
    if options.save:
        check_save(options.save)
    measured = {"torch"} if device.type == "cuda" else {"torch", "onnx"}  # by peak_memory
    if options.gates.max_memory_mb is not None and not measured & set(options.backends):
        raise UsageError("--max-memory-mb: no backend whose memory is measured.", hint="Add torch to --backend.")
    return device


def check_save(path: Path) -> None:
    """Raises UsageError where the document could not be written in the end, or something else lies there."""
    check_replaced(path, "--save", "benchmark of comp", lambda there: not there.stat().st_size or is_benchmark(there))


def is_benchmark(path: Path) -> bool:
    """Whether a file holds a document of `comp bench`, also of one that failed."""
    try:
        document = read_json(path)
    except RefusedError:
        return False
    return "schema_version" in document and ("timings" in document or "error" in document)


def save(report: BenchReport, path: Path) -> None:
    """Write the document that `--json` prints; the file appears whole or not at all."""
    with atomic_file(resolve(path, "--save")) as partial:
        partial.write_text(json.dumps(report.to_json(), indent=1) + "\n", encoding="utf-8")


def made_of(folder: Path, comp: dict[str, Any], fetched: str | None = None) -> str:
    """The dense model that a compact folder was made of. fetched: the address of one that came from the hub, which names no
    folder of this machine. Raises UsageError where it does not say, or a folder is not where it was."""
    name, address = comp.get("base_model"), comp.get("base_address")
    if fetched and not (isinstance(address, str) and (address in hub.DEMOS or address.startswith("hf://"))):
        address = None
    if isinstance(address, str) and address.startswith(".."):  # the way to a folder
        there = (folder.resolve() / address).resolve()
        address = str(there) if there.is_dir() else None
    if not address:
        was = f"records the base model {name}, and no way to it" if name else "records no base model"
        raise UsageError(f"{fetched or folder} {was}.", hint="Name the dense model: --baseline MODEL")
    return address


def open_models(
    folder: Path,
    config: dict[str, Any],
    baseline: str | None,
    progress: Progress,
    hub_options: HubOptions,
    dtype: torch.dtype | None,
    address: str | None = None,
) -> tuple[hub.Source, dict[str, Path], dict[str, nn.Module]]:
    """The baseline's source, and the folders of the dense and the compact model and these. `config` is that of the compact one;
    dtype: None for that of each checkpoint; address: see `bench`."""
    family, architecture, _ = find_family(config)
    compact = load_model(folder, family=family, dtype=dtype)  # first: a block that is none names no baseline
    baseline = baseline or made_of(folder, config["comp"], address)
    source = hub.resolve(baseline, progress=progress, accepts=find_architecture, **vars(hub_options))
    dense_config = read_config(source.folder)
    if "comp" in dense_config:
        raise RefusedError(f"--baseline {baseline} is a compact model.", hint="Name the dense model.")
    if find_architecture(dense_config) != architecture:
        raise RefusedError(f"--baseline {baseline} is not a {architecture}.")
    progress.say(f"loading {source.name} ...")
    dense = load_model(source.folder, family=family, dtype=dtype, allow_pickle=hub_options.allow_pickle)
    parts = [[tower_config(config_of(model).to_dict(), tower) for tower in family.towers] for model in (dense, compact)]
    sizes = [[(part.get("image_size"), part.get("vocab_size")) for part in model] for model in parts]
    if sizes[0] != sizes[1]:
        raise RefusedError(f"--baseline {source.name} takes other inputs (image size, vocabulary) than the compact model.")
    return source, {"dense": source.folder, "compact": folder}, {"dense": dense, "compact": compact}


def count_flops(model: nn.Module, family: Family, text_tokens: int) -> int:
    """FLOPs of one pair, counted from what runs (the math attention kernel shows its matmuls to the counter)."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    inputs = random_inputs(config_of(model), family, 1, text_tokens)
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**inputs)
    return counter.get_total_flops()


def find_providers(
    graphs: dict[str, Path], inputs: timing.Inputs, device: torch.device, progress: Progress
) -> dict[str, Providers]:
    """Per side: the session's first provider, and what share of the nodes that ran, and of their time, each provider has."""
    found = {}
    with progress.track("looking where the graphs run", len(graphs)) as bar:
        for side, path in graphs.items():
            seen = profiling.profile(path, inputs, str(device))
            shares = {
                name: ProviderShare(int(share["nodes"]), share["node_share"], share["time_share"])
                for name, share in seen.shares().items()
            }
            found[side] = Providers(seen.first, seen.tf32, shares)
            bar.advance()
    return found


def build_runners(
    models: dict[str, nn.Module], graphs: dict[str, Path], task: tasks.Task, device: torch.device, backends: tuple[str, ...]
) -> dict[Key, timing.Runner]:
    """One callable for each backend and side."""
    runners: dict[Key, timing.Runner] = {}
    makers = {"torch": variants.torch_runner, "compile": variants.compiled_runner}
    for backend in backends:
        for side in SIDES:
            if backend == "onnx":
                runners[backend, side] = variants.onnx_runner(graphs[side], task, str(device))
            else:
                runners[backend, side] = makers[backend](models[side].to(device), device)
    return runners


def figures(
    taken: dict[int, dict[Key, list[float]]], reduction: float, seed: int = 0
) -> tuple[tuple[Latency, ...], tuple[Speedup, ...]]:
    """Latencies and speed-ups from the times: {batch: {(backend, side): ms per round}}; `reduction` is of the FLOPs."""
    timings, speedups = [], []
    for batch, times in taken.items():
        timings += [timing.summary(*key, batch, ms) for key, ms in times.items()]
        stock_torch = times.get(("torch", "dense"))
        for backend in dict.fromkeys(backend for backend, _ in times):
            dense, own, compact = (times[backend, side] for side in SIDES)
            pruning = timing.speedup(own, compact, seed)
            speedups.append(
                Speedup(
                    backend=backend,
                    batch=batch,
                    speedup=timing.speedup(dense, compact, seed),
                    by_kernels=timing.speedup(dense, own, seed),
                    by_pruning=pruning,
                    flops_efficiency=pruning.value / reduction,
                    against_stock_torch=None if stock_torch is None else timing.speedup(stock_torch, compact, seed),
                )
            )
    return tuple(timings), tuple(speedups)


def machine(device: torch.device) -> Machine:
    """Where the figures were taken."""
    import onnxruntime
    import transformers

    gpu = device.type == "cuda" and torch.cuda.is_available()
    return Machine(
        device=str(device),
        name=torch.cuda.get_device_name(device) if gpu else processor_name(),
        threads=torch.get_num_threads(),
        tf32=device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32,
        torch=torch.__version__,
        transformers=transformers.__version__,
        onnxruntime=onnxruntime.__version__,
    )
