"""`comp analyze`: where parameters and FLOPs are, how unequal heads, channels and tokens are, how their scores interfere."""

from dataclasses import asdict
from typing import Any

from .. import __version__
from ..checkpoint.loading import pick_device
from ..engine import diagnostics, flops, importance, scoring
from ..engine.methods import DECODER
from ..models.dense import Dense, find_dense, open_dense
from ..models.pairs import batches_of, choose_pairs, cut_texts, pair_counts, warn_cut_texts
from ..options import HUB_DEFAULTS, AnalyzeOptions, HubOptions
from ..progress import Progress
from ..report.analyze import (
    AnalyzeReport,
    Cost,
    Diagnostics,
    LayerCost,
    LayerDiagnosis,
    LayerInequality,
    LayerInfluence,
)
from ..report.base import Reference
from . import threads
from .analyze_decoder import analyze_decoder

PARTS = ("attention", "cross", "ffn")  # columns of the report: names of parts, in families' descriptions


def analyze(options: AnalyzeOptions, progress: Progress, *, hub_options: HubOptions = HUB_DEFAULTS) -> AnalyzeReport:
    """Score a dense model on calibration pairs, or describe a decoder that reads images. Raises what `open_dense` and
    `choose_pairs` raise."""
    _, _, (family, _, _) = find_dense(
        options.model, progress, options.task, lambda config, family, architecture: None, hub_options
    )
    if family.topology.drops_in == DECODER:
        return analyze_decoder(options, progress, hub_options)
    sizes: dict[str, Any] = {"text_tokens": options.text_tokens, "score_rows": options.score_rows}
    device = pick_device(options.device)
    dense = open_dense(options.model, progress, device=device, task=options.task, hub_options=hub_options, **sizes)
    threads.fit(flops.count(dense.plan, dense.reference).total * options.batch_size)
    pairs = choose_pairs(dense, options.data, progress, hub_options.cache_dir)
    batches = batches_of(dense, pairs, "calibration", options.num_samples, options.batch_size, options.seed)
    texts = cut_texts(batches, dense.text_tokens)
    warn_cut_texts("calibration", texts, progress, dense.longest)
    runtime = dense.runtime(dense.plan)
    with progress.track("scoring heads, channels and tokens", len(batches)) as bar:
        scores = scoring.collect(runtime, dense.family, dense.plan, dense.on_device(batches), advance=bar.advance)
    with progress.track("comparing parameter and token scores", len(batches)) as bar:
        found = diagnostics.diagnose(runtime, dense.family, dense.plan, dense.on_device(batches), bar.advance)
    params, counted, layers = costs(dense)
    return AnalyzeReport(
        comp_version=__version__,
        model=dense.source.name,
        revision=dense.source.revision,
        architecture=dense.architecture,
        task=dense.task.name,
        reference=Reference(dense.reference.tokens),
        params=params,
        flops=counted,
        layers=layers,
        inequality=inequality(dense, scores),
        diagnostics=diagnosis(dense, found),
        score_rows={name: stream.score_rows for name, stream in dense.plan.streams.items()},
        samples=sum(batch.samples for batch in batches),
        data=pairs.describe("calibration"),
        pairs=pair_counts(pairs),
        texts=texts,
        threads=threads.in_use(),
    )


def costs(dense: Dense) -> tuple[Cost, Cost, tuple[LayerCost, ...]]:
    """Parameters and FLOPs of the model and of what lies outside its layers, and those of every layer's attention,
    cross-attention and feed-forward part."""
    counted = flops.count(dense.plan, dense.reference)
    params = part_params(dense)
    layers = tuple(
        LayerCost(
            row.tower,
            row.layer,
            flops={part: row.parts.get(part, 0) for part in PARTS},
            params={part: params.get((row.tower, row.layer, part), 0) for part in PARTS},
        )
        for row in counted.layers
    )
    total = dense.params(dense.plan)
    return Cost(total, total - sum(params.values())), Cost(counted.total, counted.fixed), layers


def part_params(dense: Dense) -> dict[scoring.Key, int]:
    """Parameters of each prunable part, norms counted with the part that they belong to."""
    found: dict[scoring.Key, int] = {}
    for tower in dense.family.towers:
        root = f"{tower.encoder}.{tower.layers}."
        inside = {_first(part.column): part.name for part in tower.parts if part.is_attention}
        for name, tensor in dense.state.items():
            if not name.startswith(root):
                continue
            index, _, path = name.removeprefix(root).partition(".")
            key = (tower.name, int(index), inside.get(_first(path), tower.parts[-1].name))
            found[key] = found.get(key, 0) + tensor.numel()
    return found


def _first(path: str) -> str:
    """The module right inside a layer that a path goes through."""
    return path.partition(".")[0]


def inequality(dense: Dense, scores: scoring.Scores) -> tuple[LayerInequality, ...]:
    """Gini coefficients per layer: 0 where all units matter alike (nothing to gain), towards 1 where few matter."""
    rows = []
    for tower in dense.family.towers:
        for index in range(len(dense.plan.tower(tower.name).layers)):
            of_tokens, units = None, {}
            if any(stream.prunable for stream in tower.streams):
                (stream,) = tower.streams
                per_sample = [importance.gini(row[row.isfinite()]) for row in scores.tokens[stream.name, index]]
                of_tokens = sum(per_sample) / len(per_sample)
            for part in PARTS:
                found = scores.units.get((tower.name, index, part))
                units[part] = None if found is None else importance.gini(found)
            rows.append(LayerInequality(tower.name, index, of_tokens, **units))
    return tuple(rows)


def diagnosis(dense: Dense, found: diagnostics.Diagnosis) -> Diagnostics:
    """CoMP's two findings per layer, with the shares that define them."""
    layers = []
    for tower in (tower for tower in dense.plan.towers if diagnostics.ranks_tokens(dense.family.tower(tower.name))):
        for index in range(len(tower.layers)):
            parts = [part for part in PARTS if (tower.name, index, part) in found.overlap]
            influence = found.influence.get((tower.name, index))
            layers.append(
                LayerDiagnosis(
                    tower.name,
                    index,
                    overlap={part: found.overlap[tower.name, index, part] for part in parts},
                    chance=found.chance[tower.name, index, parts[-1]],
                    influence=None if influence is None else LayerInfluence(**asdict(influence)),
                )
            )
    return Diagnostics(diagnostics.TOP, diagnostics.LEAST, diagnostics.KEPT, diagnostics.STRONG, tuple(layers))
