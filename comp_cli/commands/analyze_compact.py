"""`comp analyze` of a compact model: its layers beside those of the dense one, from config.json and the headers of the weights;
and which tokens of samples stay, from a run."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from .. import __version__, tasks
from ..checkpoint.header_check import as_named_now, check_shapes, on_meta, read_headers
from ..checkpoint.loading import (
    check_sizes,
    cut_at,
    describe,
    load_model,
    load_processor,
    pick_device,
    quiet_libraries,
    sentences,
)
from ..checkpoint.runtimes import runtime_of
from ..checkpoint.weight_files import check_checkpoint
from ..data.rows import Pair
from ..engine import flops
from ..engine.scoring import Key
from ..errors import RefusedError
from ..families import Family, compact_block
from ..files.memory import allowed, allowed_on
from ..files.store import departs, read_json
from ..models.dense import Found, collator, longest_text
from ..models.described import own_parameters
from ..models.pairs import Pairs, own_pairs, pair_counts
from ..models.part_params import part_params
from ..models.samples import SAMPLES, Runs, kept_samples, of_scenes
from ..models.stock import changed_config
from ..options import AnalyzeOptions, HubOptions
from ..plan import Plan, dense_plan
from ..progress import Progress
from ..report.analyze import AnalyzeReport, Compared, Cost, LayerCompared, PartCompared
from ..report.base import Reference, Sizes, Texts
from ..report.prune_tables import layer_rows
from ..report.samples import Picture, SampleKept
from ..report.token_tables import image_tokens
from . import threads
from .layer_costs import layer_costs

REPORT = "comp_report.json"
LARGE = 2**30  # bytes of fp32 weights of a decoder above which it is run only where --data asks for it
Parameters = Mapping[Key, int]


@dataclass(frozen=True)
class Side:
    """The dense or the compact model: its plan, and its parameters: all of them, and those of each part."""

    plan: Plan
    total: int
    parts: Parameters


def origin_of(folder: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a compact folder says about where it comes from: the block `comp` of config.json, or the report of a uniform plan,
    which is of a stock class; None for a dense model. Raises RefusedError for a block that is none."""
    if (block := compact_block(dict(config))) is not None:
        return block
    if not (folder / REPORT).is_file():
        return None
    report = read_json(folder / REPORT)
    asked = report.get("options")
    if not isinstance(asked, dict) or not asked.get("uniform") or not isinstance(report.get("plan"), dict):
        return None
    known = (report.get("files") or {}).get("config.json")
    if not isinstance(known, dict) or (how := departs(folder / "config.json", known)):
        said = f"{folder / REPORT} is not about the config.json beside it"
        raise RefusedError(
            f"{said}{f' ({how})' if isinstance(known, dict) else ''}.", hint=f"Remove {REPORT}: the model is dense then."
        )
    return report | {"method": asked.get("method")}


def analyze_compact(
    found: Found, origin: Mapping[str, Any], options: AnalyzeOptions, progress: Progress, hub_options: HubOptions
) -> AnalyzeReport:
    """Describe a compact model. Raises RefusedError for a folder that `load_model` refuses, as far as headers tell."""
    source, config, (family, architecture, name) = found
    folder, stock, task = source.folder, "comp" not in config, tasks.TASKS[name].of(family.topology)
    progress.say(f"reading the headers of {source.name} ({architecture}) ...")
    described, _ = describe(folder)
    stock_class: Any = getattr(transformers, architecture)
    compact_class = stock_class if stock else runtime_of(family).compact_class(architecture)
    check_headers(folder, described, family, compact_class)
    processor = load_processor(folder)
    whole = described.to_dict()
    full = of_uniform(whole, origin, family) if stock else of_block(whole, origin)
    with sentences(folder), quiet_libraries():
        skeleton = on_meta(stock_class, type(described).from_dict(full))
        built = on_meta(compact_class, described)
    shapes = {path: tuple(tensor.shape) for path, tensor in skeleton.state_dict().items()}
    reference = flops.reference(full, family, shapes, cut_at(processor, text_tokens(folder, options)))
    before = dense_plan(full, family, architecture)
    plan = Plan.from_json(origin["plan"]) if stock else Plan.from_block(origin, before)
    dense, compact = (side_of(*pair, family) for pair in ((before, skeleton), (plan, built)))
    counted = flops.count(plan, reference)
    threads.fit(counted.total * options.batch_size)
    runs = Runs(family, task, collator(family, processor, longest_text(full, family, processor), task, described))
    samples, pictures, used, pairs = shown(folder, runs, compact, options, progress, hub_options)
    return AnalyzeReport(
        comp_version=__version__,
        model=source.name,
        revision=source.revision,
        architecture=architecture,
        task=task.name,
        reference=Reference(reference.tokens),
        params=Cost(compact.total, compact.total - sum(compact.parts.values())),
        flops=Cost(counted.total, counted.fixed),
        layers=layer_costs(counted, compact.parts),
        inequality=(),
        diagnostics=None,
        score_rows={stream: one.score_rows for stream, one in plan.streams.items()},
        samples=len(samples),
        data=used,
        pairs={} if pairs is None else pair_counts(pairs),
        texts=Texts(0, 0, family.topology.text_tokens(reference.tokens)),
        compact=compared(origin, dense, compact, reference),
        threads=threads.in_use(),
        kept_samples=samples,
        pictures=pictures,
    )


def text_tokens(folder: Path, options: AnalyzeOptions) -> int:
    """Of the reference input: what was asked for, or where nothing was, what the report of the folder is about."""
    if options.text_tokens != AnalyzeOptions.text_tokens or not (folder / REPORT).is_file():
        return options.text_tokens
    asked = read_json(folder / REPORT).get("options", {}).get("text_tokens")
    return asked if type(asked) is int and asked > 0 else options.text_tokens


def check_headers(folder: Path, config: transformers.PretrainedConfig, family: Family, compact_class: type) -> None:
    """Raises RefusedError where weights and config.json do not fit, as `load_model` does, from headers alone."""
    files = check_checkpoint(folder, allow_pickle=False)
    with sentences(folder), quiet_libraries():
        headers = as_named_now(read_headers(folder, files), config, family, compact_class)
        check_sizes(config.to_dict(), family, headers, folder)
        check_shapes(headers, on_meta(compact_class, config), folder)


def of_block(config: dict[str, Any], block: Mapping[str, Any]) -> dict[str, Any]:
    """The whole config.json of the dense model: that of the compact one has its sizes, but for one that tells the folder
    apart."""
    made, told = {name: value for name, value in config.items() if name != "comp"}, block.get("told_apart")
    return made if told is None else changed_config(made, {told["section"]: {told["name"]: told["dense"]}})


def of_uniform(config: dict[str, Any], report: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """The same of a stock class, whose config.json has the compact sizes, by the report of its pruning."""
    first = {row["tower"]: row for row in reversed(report["layers"])}
    names = {"attention": "heads", "cross": "cross_heads", "ffn": "ffn"}
    sizes: dict[str, dict[str, int]] = {}
    for tower in family.towers:
        layer = Plan.from_json(report["plan"]).tower(tower.name).layers[0]
        for part in tower.parts:
            dense = first[tower.name][names[part.name]][1]
            if dense == len(layer.kept(part.name)):
                continue
            own = sizes.setdefault(tower.config, {})
            own[part.units] = dense
            if part.is_attention:
                own[part.queries] = dense * getattr(layer.parts[part.name], "group", 1)
    return changed_config(config, sizes)


def side_of(plan: Plan, skeleton: nn.Module, family: Family) -> Side:
    """skeleton: the model without memory for its weights."""
    own: dict[str, Tensor] = dict(own_parameters(skeleton))
    return Side(plan, sum(tensor.numel() for tensor in own.values()), part_params(own.items(), family))


def compared(origin: Mapping[str, Any], dense: Side, compact: Side, reference: flops.Reference) -> Compared:
    """The compact model beside the dense one."""
    before, after = (flops.count(side.plan, reference) for side in (dense, compact))
    decodes = bool(compact.plan.stages)
    return Compared(
        base_model=str(origin.get("base_model") or "a dense model"),
        method=str(origin.get("method") or "comp"),
        ratio=round(1 - after.total / before.total, 5),
        flops=Sizes(before.total, after.total),
        params=Sizes(dense.total, compact.total),
        parts=tuple(parts_compared(dense, compact, before, after, reference.family)),
        layers=tuple(layers_compared(dense, compact, before, after, reference)),
        stages=image_tokens(compact.plan, dense.plan, reference, 1).stages if decodes else None,
    )


def layers_compared(
    dense: Side, compact: Side, before: flops.Flops, after: flops.Flops, reference: flops.Reference
) -> Iterable[LayerCompared]:
    def params(side: Side, tower: str, layer: int) -> int:
        return sum(number for (name, index, _), number in side.parts.items() if (name, index) == (tower, layer))

    rows = layer_rows(compact.plan, dense.plan, reference)
    for row, own, full in zip(rows, after.layers, before.layers, strict=True):
        seen = reference.family.tower(row.tower).writes  # image tokens leave before a layer
        yield LayerCompared(
            tower=row.tower,
            layer=row.layer,
            heads=row.heads,
            cross_heads=row.cross_heads,
            ffn=row.ffn,
            tokens=[one.tokens_in if seen else one.tokens_out for one in (own, full)],
            flops=Sizes(full.total, own.total),
            params=Sizes(*(params(side, row.tower, row.layer) for side in (dense, compact))),
        )


def parts_compared(
    dense: Side, compact: Side, before: flops.Flops, after: flops.Flops, family: Family
) -> Iterable[PartCompared]:
    """By tower and part, and last what lies outside of all layers. What no plan prunes of a layer counts with its last part."""

    def cost(counted: flops.Flops, tower: str, part: str, last: bool) -> int:
        return sum(layer.parts[part] + last * layer.whole for layer in counted.layers if layer.tower == tower)

    def params(side: Side, tower: str, part: str) -> int:
        return sum(number for (name, _, kind), number in side.parts.items() if (name, kind) == (tower, part))

    for tower in family.towers:
        for part in tower.parts:
            last = part == tower.parts[-1]
            costs = Sizes(*(cost(counted, tower.name, part.name, last) for counted in (before, after)))
            sizes = Sizes(*(params(side, tower.name, part.name) for side in (dense, compact)))
            yield PartCompared(tower.name, part.name, costs, sizes)
    outside = Sizes(*(side.total - sum(side.parts.values()) for side in (dense, compact)))
    yield PartCompared("outside", "", Sizes(before.fixed, after.fixed), outside)


# Samples -----------------------------------------------------------------------------------------------------------------


def shown(
    folder: Path, runs: Runs, compact: Side, options: AnalyzeOptions, progress: Progress, hub_options: HubOptions
) -> tuple[tuple[SampleKept, ...], tuple[Picture, ...], str, Pairs | None]:
    """Samples and their pictures, what they are, and the pairs that they are of: the user's own where --data names some.
    Nothing where no tokens leave, or where the model is too large to be run just for this."""
    given = options.data.data is not None
    if not given and not leaves(compact.plan):
        return (), (), "no pairs", None
    device = pick_device(options.device)
    if why := too_large(compact, runs.family, given, device):
        progress.warn(f"no sample shows which tokens stay: {why}")
        return (), (), "no pairs", None
    progress.say("running the model on samples ...")
    model = load_model(folder, family=runs.family, dtype=torch.float32).to(device)
    if not given:
        samples, pictures = of_scenes(model, runs, progress)
        return samples, pictures, "generated scenes, split test", None
    pairs = own_pairs(options.data, progress, hub_options.cache_dir)
    samples, pictures = kept_samples(model, runs, some(pairs, runs, min(SAMPLES, options.num_samples), options.seed))
    return samples, pictures, pairs.name, pairs


def leaves(plan: Plan) -> bool:
    """Whether tokens leave anywhere."""
    return bool(plan.stages) or any(layer.keep for tower in plan.towers for layer in tower.layers)


def too_large(compact: Side, family: Family, given: bool, device: torch.device) -> str | None:
    """Why a model is not run for pictures, as a sentence; None where it is. What goes to a GPU comes through memory."""
    needed, room = 4 * compact.total, min(allowed(), allowed_on(device))
    if needed > room:
        return f"its weights take {needed >> 20:,} MiB in fp32, and {room >> 20:,} MiB may be used."
    if family.topology.drops_in == "decoder" and needed > LARGE and not given:
        return f"its weights take {needed >> 20:,} MiB in fp32, so it is run where --data names pairs of yours."
    return None


def some(pairs: Pairs, runs: Runs, count: int, seed: int) -> list[Pair]:
    """Pairs of different images, rather those that calibration would not read."""
    found: dict[int, Pair] = {}
    for place, purpose in enumerate(("evaluation", "calibration")):
        try:
            for pair in pairs.read(purpose, seed=seed, accepts=runs.task.accepts):  # type: ignore[arg-type]
                found.setdefault(pair.image_id, pair)
                if len(found) >= count:
                    return list(found.values())
        except RefusedError:
            if place and not found:
                raise
    return list(found.values())
