"""`comp export`: ONNX graphs with the token pruning inside, written only if they say what torch says."""

import json
import shutil
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial as partial_of
from itertools import chain
from pathlib import Path
from time import perf_counter
from typing import Any

import onnx
import torch

from .. import __version__, tasks
from ..checkpoint.loading import (
    DTYPES,
    config_of,
    facts,
    load_model,
    load_processor,
    pick_device,
    pick_dtype,
    quiet_libraries,
    save_processor,
)
from ..checkpoint.places import copy_settings
from ..checkpoint.precision import cast
from ..data.batches import Collator
from ..data.pairset import PairSet
from ..data.preparation import NotKnownError, Preparation, preparation_of
from ..data.rows import Columns, Pair
from ..data.sources import open_pairs
from ..errors import DeviceError, GateError, RefusedError, UsageError
from ..families import Family, find_family
from ..files.outputs import atomic_folder, check_output, check_replaceable, check_room, reserve, resolve
from ..files.store import count_weights, folder_size, read_config, sha256
from ..models.dense import collator, longest_text
from ..models.described import dense_flops
from ..models.pairs import pair_counts, warn_cut_texts
from ..models.samples import drops_tokens
from ..onnx import parity, preprocessing, rewrite, transformers_js, wide_decoder
from ..onnx.checks import least_runtime, require_runtime
from ..onnx.sessions import OnnxModel
from ..onnx.write import check_target, write_graphs
from ..options import LAYOUTS, OPSET, TARGETS, TEXT_TOKENS, ExportOptions
from ..progress import Progress
from ..report.base import Texts
from ..report.card_pictures import save_example
from ..report.cards import graphs_card
from ..report.export import Allowed, ExportReport, ParityRow, Quantization, Signature, TensorSpec
from ..topology.graph_specs import Run, in_turn
from . import threads

LEFT_OUT = (0.0, 0.1, 0.25, 0.5)  # shares of the matrices that stay float, tried in turn until the decisions agree


@dataclass(frozen=True)
class Check:
    """How graphs are judged."""

    cases: list[parity.Case]
    task: tasks.Task
    device: str
    tolerance: parity.Tolerance
    run: Run = in_turn  # how the graphs are run

    def open(self, folder: Path, names: list[str]) -> OnnxModel:
        return OnnxModel(folder, names, self.device, self.run)

    def rows(self, graphs: OnnxModel, progress: Progress) -> list[ParityRow]:
        with progress.track("checking parity with PyTorch", len(self.cases)) as bar:
            return parity.check(graphs, self.cases, self.task, bar.advance)


def export(folder: Path, output: Path, options: ExportOptions, progress: Progress, *, overwrite: bool = False) -> ExportReport:
    """Export a compact (or dense) checkpoint folder.

    Raises GateError above the tolerance: then nothing is left behind, or with `keep_failed` the graphs in OUTPUT.failed.
    """
    check_options(options)
    typed, output = output, resolve(output)
    failed = output.with_name(f"{output.name}.failed")
    with reserve(output, source=folder):
        check_replaceable(output, overwrite)
        if options.keep_failed:
            check_output(failed, overwrite=True, source=folder)
        times = 1.25 if options.quantize else 2 if options.optimize else 1  # floats and int8, plain and fused graphs
        check_room(output, times * count_weights(folder) * DTYPES[options.dtype].itemsize, "the graphs")
        return replace(_export(folder, output, failed, progress, options, overwrite), output=typed)


def _export(
    folder: Path, output: Path, failed: Path, progress: Progress, options: ExportOptions, overwrite: bool
) -> ExportReport:
    """The work, with the output reserved."""
    started = perf_counter()
    config = read_config(folder)
    family, architecture, name = find_family(config)
    check_possible(folder, config, family, architecture, options)
    rounding, client = options.quantize or options.dtype, options.layout == LAYOUTS[1]
    task = tasks.TASKS[name]
    opset = opset_of(family, architecture, options.opset)
    source = open_source(options, progress)
    processor = load_processor(folder)
    if client:
        transformers_js.check_tokenizer(family.topology.parts_of(processor)[1], folder)
    pictures = prepared_in_graphs(folder, family, processor) if options.with_preprocessing else None
    model = load_model(folder, family=family, dtype=torch.float32)
    described = config_of(model)
    threads.fit(dense_flops(described, family, architecture, TEXT_TOKENS) * parity.BATCH)
    longest = longest_text(described.to_dict(), family, processor)
    checked = family.topology.text_length(TEXT_TOKENS, longest)
    with atomic_folder(output, overwrite=overwrite) as partial:
        progress.say("running the model in PyTorch ...")
        rounded = options.dtype != "fp32" or options.quantize is not None
        collate = collator(family, processor, longest, task, described)
        pairs = parity.real_pairs(source, task, rounded, parity.in_memory if pictures else collate.seen)
        texts = count_texts(pairs, collate)
        warn_cut_texts("parity", texts, progress, longest)
        splits = family.topology.splits(options.split, options.layout)
        made = (
            parity.make_cases(model, task, family, processor, checked, pairs, split=split, whole=longest, pictures=pictures)
            for split in splits
        )
        run = family.topology.runner(family, described.to_dict())
        allowed = partial_of(
            parity.tolerance, task, pictures=options.with_preprocessing, drops_tokens=drops_tokens(model, family)
        )
        tolerance = allowed(rounding, options.atol)
        check = Check(list(chain(*made)), task, options.device, tolerance, parity.with_pictures(run) if pictures else run)
        progress.say("exporting (this takes a minute for a full-size model) ...")
        rounded_model = cast(model, DTYPES[options.dtype])
        how: dict[str, Any] = {"opset": opset, "target": options.target}
        names = [name for split in splits for name in write_graphs(rounded_model, task, family, partial, split=split, **how)]
        if pictures:
            preprocessing.prepend_all(partial, names, pictures)
        of_floats = replace(check, tolerance=allowed(options.dtype, None))
        fused = optimize(partial, names, of_floats, progress) if options.optimize else {}
        chosen = {"int8": names, "int4": list(family.topology.weight_only)}
        left_out = quantize(partial, names, chosen[kind], kind, check, progress) if (kind := options.quantize) else []
        least = least_runtime(onnx.load(partial / name, load_external_data=False) for name in names)
        require_runtime(least, partial)
        save_cutting(processor, partial, family, longest)
        copy_settings(folder / "config.json", partial / "config.json")
        if client:
            kinds = {name: rounding if kind is None or name in chosen[kind] else "fp32" for name in names}
            places, check = for_client(partial, family, described.to_dict(), kinds, check)
            names = list(places.values())
        graphs = check.open(partial, names)
        rows = check.rows(graphs, progress)
        problem = parity.problem(rows, tolerance)
        generation = family.topology.generation_config(family, model)
        if generation:
            generation.save_pretrained(partial)
        numbers = family.topology.facts(model)
        report = ExportReport(
            comp_version=__version__,
            versions=_versions(),
            min_onnxruntime=least,
            source=facts(config),
            architecture=architecture,
            opset=opset,
            target=options.target,
            layout=options.layout,
            with_preprocessing=options.with_preprocessing,
            dtype=options.dtype,
            quantization=quantization(options.quantize, left_out),
            fused=fused,
            graphs={name: signature(found) for name, found in graphs.signature().items()},
            keep=_keeps(config),
            logit_scale=numbers.get("logit_scale"),
            logit_bias=numbers.get("logit_bias"),
            threads=threads.in_use(),
            checked_on=options.device,
            data=source.describe("evaluation") if source else "generated scenes",
            pairs=pair_counts(source) if source else {},
            texts=texts,
            passed=problem is None,
            allowed=Allowed(**asdict(tolerance)),
            agreement=parity.agreement(rows),
            parity=tuple(rows),
            size_bytes=folder_size((partial / names[0]).parent),
        )
        if family.topology.reads_images:
            save_example(partial)
        card = graphs_card(report.to_json(), generation, family, task, processor, partial, longest, folder, options.push_to_hub)
        (partial / "README.md").write_text(card, encoding="utf-8")
        paths = sorted(path for path in partial.rglob("*") if path.is_file())
        report = replace(report, files={path.relative_to(partial).as_posix(): sha256(path) for path in paths})
        (partial / "export.json").write_text(json.dumps(kept_with_folder(report), indent=1) + "\n")
        if problem:
            refuse(problem, partial, failed if options.keep_failed else None, report)
    return replace(report, seconds=round(perf_counter() - started, 1))


def check_possible(folder: Path, config: dict[str, Any], family: Family, architecture: str, options: ExportOptions) -> None:
    """Raises RefusedError for a model without graphs, UsageError for options that are not for its kind."""
    topology = family.topology
    if not topology.exports:
        said = f"{folder}: comp exports no graphs of a {architecture}: {topology.why_none}."
        raise RefusedError(said, hint="Load it with comp_cli.load or transformers, and run it in torch.")
    if options.layout == LAYOUTS[1]:
        transformers_js.check_family(family, options.quantize or options.dtype)
    if options.layout not in topology.layouts:
        said = f"--layout {options.layout}: graphs of a {architecture} are not written for that client yet."
        raise UsageError(said, hint=f"Use {' or '.join(topology.layouts)}.")
    if refused := topology.why_not(config, options.layout):
        raise RefusedError(f"{folder}: {refused}")
    if options.split and topology.why_whole:
        raise UsageError(f"--split: {architecture} {topology.why_whole}.")
    if options.quantize == "int4" and not topology.weight_only:
        raise UsageError("--quantize int4 is for the language model of a decoder that reads images.", hint="Use int8.")
    if options.with_preprocessing and not topology.reads_images:
        raise UsageError(f"--with-preprocessing: a {architecture} reads no images.")


def prepared_in_graphs(folder: Path, family: Family, processor: Any) -> Preparation:
    """What graphs do to pictures in the place of the processor. Raises RefusedError where they cannot."""
    images, _ = family.topology.parts_of(processor)
    try:
        found = preparation_of(images)
        preprocessing.check(found)
    except NotKnownError as error:
        said = f"{folder}: --with-preprocessing: its {type(images).__name__} {error}, which graphs do not."
        raise RefusedError(said, hint="Leave it out: the README.md of an export says how pictures are prepared.") from error
    return found


def for_client(
    folder: Path, family: Family, config: dict[str, Any], kinds: dict[str, str], check: Check
) -> tuple[dict[str, str], Check]:
    """Lay the graphs of a folder out for transformers.js. kinds: of each its precision, one of `transformers_js.DTYPES`. Where
    they lie then, and how they are judged there."""
    names = {name: family.topology.called(name) for name in kinds}
    decodes = family.topology.drops_in == "decoder"
    if decodes:
        decoder = family.topology.decoder_graphs(family, config)
        wide_decoder.widen(folder, decoder)
        check = replace(check, run=partial_of(wide_decoder.logits, decoder))
    places = transformers_js.lay_out(folder, names, kinds, more_layers=int(decodes))
    cases = [replace(case, graphs=tuple(places[name] for name in case.graphs)) for case in check.cases]
    return places, replace(check, cases=cases)


def opset_of(family: Family, architecture: str, wanted: int) -> int:
    """The opset of the graphs. Raises UsageError for one that these graphs cannot have."""
    needed = family.topology.opset
    if needed is not None and wanted not in (OPSET, needed):
        raise UsageError(f"--opset {wanted}: graphs of a {architecture} need opset {needed}.", hint="Leave --opset out.")
    return needed or wanted


def count_texts(pairs: Sequence[Pair], collate: Collator) -> Texts:
    """How many of the texts are cut, of how many, and at how many tokens. A few pairs come again and again, and count once."""
    known = list({id(pair): pair.text for pair in pairs}.values())
    return Texts(cut=sum(collate.are_cut(known)), of=len(known), at=collate.max_text)


def save_cutting(processor: Any, folder: Path, family: Family, longest: int) -> None:
    """Save a processor whose tokenizer, if it has one, cuts at `longest` tokens and pads as the model does: tokenizer.json asks
    for what was called last. Prompts of decoders are never cut, for images stand in them, and filled up at the left."""
    with quiet_libraries():
        if longest:
            tokenizer = getattr(processor, "tokenizer", processor)
            cut = {"truncation": True, "max_length": longest}
            if family.topology.drops_in == "decoder":
                tokenizer.padding_side, cut = "left", {"truncation": False}
            tokenizer(["a"], padding=family.topology.padding, **cut)
        save_processor(processor, folder)


def kept_with_folder(report: ExportReport) -> dict[str, Any]:
    """The report in export.json: nothing of the run itself, so that the same graphs have the same bytes."""
    return {name: value for name, value in report.to_json().items() if name not in ("output", "warnings", "threads")}


def open_source(options: ExportOptions, progress: Progress) -> PairSet | None:
    """The user's pairs to check graphs on, all of which match; None for generated scenes."""
    data = options.data
    if data.data is None:
        return None
    columns = Columns(data.image_column, data.text_column, label="", answer=data.answer_column, split=data.split_column)
    return open_pairs(data.data, progress=progress, columns=columns)


def signature(graph: dict[str, Any]) -> Signature:
    """Names, types and shapes of a graph's inputs and outputs."""
    sides = ({name: TensorSpec(**found) for name, found in graph[side].items()} for side in ("inputs", "outputs"))
    return Signature(*sides)


def check_options(options: ExportOptions) -> None:
    """Raises UsageError for options that make no sense, DeviceError for graphs that nothing here can run."""
    check_target(options.target, options.opset)
    if options.layout not in LAYOUTS:
        raise UsageError(f"--layout {options.layout}: unknown.", hint=f"Use {' or '.join(LAYOUTS)}.")
    if options.layout == LAYOUTS[1] and options.split:
        raise UsageError(f"--layout {options.layout} writes model, vision_model and text_model.", hint="Leave --split out.")
    if options.layout == LAYOUTS[1] and options.with_preprocessing:
        raise UsageError("--with-preprocessing: transformers.js prepares pictures itself.", hint="Leave --layout out.")
    dtype, device = pick_dtype(options.dtype), pick_device(options.device)
    if options.quantize not in (None, *rewrite.QUANTIZERS):
        raise UsageError(f"--quantize {options.quantize}: unknown.", hint=f"Use {' or '.join(rewrite.QUANTIZERS)}.")
    if options.quantize and dtype != torch.float32:
        raise UsageError("--quantize starts from fp32.", hint=f"Leave --dtype {options.dtype} out.")
    if options.optimize and options.target != TARGETS[0]:
        raise UsageError("--optimize writes nodes that only ONNX Runtime knows.", hint="Leave --target out.")
    if dtype == torch.bfloat16 and device.type == "cpu":
        raise DeviceError(
            "ONNX Runtime runs no bf16 graph on the CPU, so it could not be checked, and nothing is written unchecked.",
            hint="--device cuda checks it on a GPU; --dtype fp16 can be checked here.",
        )


def optimize(folder: Path, names: list[str], check: Check, progress: Progress) -> dict[str, int]:
    """Put the graphs with fused nodes in the place of the plain ones, if they still say what torch says, else say why not."""
    fused: Counter[str] = Counter()
    trial = folder / "fused"
    trial.mkdir()
    try:
        for name in names:
            fused.update(rewrite.optimize(folder / name, trial / name))
        problem = parity.problem(check.rows(check.open(trial, names), progress), check.tolerance)
    except Exception as error:  # whatever ONNX Runtime's tool or session stumbles over
        problem = str(error).strip().splitlines()[0]
    if problem:
        progress.warn(f"--optimize is skipped: {problem}")
        fused.clear()
    else:
        _move(trial, folder)
    shutil.rmtree(trial)
    return dict(fused)


def quantization(kind: str | None, left_out: list[str]) -> Quantization | None:
    """What the report says of it."""
    if kind is None:
        return None
    return Quantization(kind, True, left_out, rewrite.BLOCK if kind == "int4" else None)


def quantize(folder: Path, names: list[str], chosen: Collection[str], kind: str, check: Check, progress: Progress) -> list[str]:
    """Make the matrices of the chosen graphs int8 or int4; returns the nodes left out, which are those that lose most, as few
    as the decisions allow."""
    floats = folder / "float"
    floats.mkdir()
    _move(folder, floats)
    for path in floats.iterdir():
        if not any(path.name.startswith(name) for name in chosen):
            shutil.copyfile(path, folder / path.name)
    noise: dict[str, float] = {}
    left_out: list[str] = []
    for share in LEFT_OUT:
        if share and not noise:
            noise = noise_of(check, floats, names, chosen, kind)
        left_out = sorted(noise, key=noise.__getitem__, reverse=True)[: round(share * len(noise))]
        for name in chosen:
            rewrite.QUANTIZERS[kind](floats / name, folder / name, left_out)
        problem = parity.problem(check.rows(check.open(folder, names), progress), check.tolerance)
        if not problem:
            break
        progress.say(f"{kind} with {len(left_out)} matrices left out: {problem}")
    shutil.rmtree(floats)
    return left_out


def noise_of(check: Check, folder: Path, names: list[str], chosen: Collection[str], kind: str) -> dict[str, float]:
    """Of each matrix of the chosen graphs the noise that rounding it makes (`rewrite.noise`): the larger of that on real and on
    random inputs, for the gate judges both."""
    graphs, found = check.open(folder, names), dict[str, float]()
    real, random = ({case.graphs: case for case in cases} for cases in (reversed(check.cases), check.cases))  # first and last
    for case in (*real.values(), *random.values()):
        graphs.run(case.inputs, case.graphs)
        for name in chosen:
            if name in (case.graphs or names):
                of_case = rewrite.noise(folder / name, graphs.given[name], kind)
                found |= {node: max(share, found.get(node, 0.0)) for node, share in of_case.items()}
    return found


def refuse(problem: str, partial: Path, failed: Path | None, report: ExportReport) -> None:
    """Raises GateError, with the graphs moved to `failed` if it is given."""
    hint = "Nothing was written. --atol sets the tolerance, --keep-failed leaves the graphs for a look."
    if failed is not None:
        with atomic_folder(failed, overwrite=True) as kept:
            for path in partial.iterdir():
                path.replace(kept / path.name)
        hint = f"{failed} holds the graphs for a look; export.json says where they differ."
    raise GateError(problem, hint=hint, report=report)


def _move(source: Path, target: Path) -> None:
    """The files of a folder to another one on the same disk; what is there is replaced."""
    for path in source.iterdir():
        if path.is_file():
            path.replace(target / path.name)


def _keeps(config: dict[str, Any]) -> dict[str, list[int | None]]:
    """Tokens that each layer hands on, by the path of its tower."""
    towers = config.get("comp", {}).get("towers", [])
    return {tower["layout"]["encoder"]: [layer["keep"] for layer in tower["layers"]] for tower in towers}


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    found = {name: version(name) for name in ("torch", "transformers", "onnx", "onnxscript")}
    import onnxruntime

    return found | {"onnxruntime": onnxruntime.__version__}
