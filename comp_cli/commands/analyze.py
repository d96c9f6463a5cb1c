"""`comp analyze`: where parameters and FLOPs are, how unequal heads, channels and tokens are, how their scores interfere."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from .. import __version__
from ..checkpoint.loading import pick_device
from ..engine import diagnostics, flops, importance, scoring
from ..engine.methods import DECODER
from ..errors import RefusedError, UsageError
from ..families import Family
from ..models.dense import Dense, Found, find_model, open_dense
from ..models.pairs import batches_of, choose_pairs, cut_texts, pair_counts, warn_cut_texts
from ..options import HUB_DEFAULTS, AnalyzeOptions, HubOptions
from ..progress import Progress
from ..report.analyze import (
    AnalyzeReport,
    Diagnostics,
    LayerDiagnosis,
    LayerInequality,
    LayerInfluence,
)
from ..report.base import Reference
from ..report.interference import conclusions
from ..report.samples import LayerImportance, TokenImportance
from ..report.token_picture import check_picture, heat_map, token_picture, write
from . import threads
from .analyze_compact import analyze_compact, origin_of
from .analyze_decoder import analyze_decoder
from .layer_costs import PARTS, costs

GROUPS = 32  # of channels, in the report


def analyze(options: AnalyzeOptions, progress: Progress, *, hub_options: HubOptions = HUB_DEFAULTS) -> AnalyzeReport:
    """Score a dense model on calibration pairs, or describe a decoder that reads images. Raises what `open_dense` and
    `choose_pairs` raise."""
    check(options)
    found = find_model(options.model, progress, options.task, lambda config, family, architecture: None, hub_options)
    source, config, _ = found
    if (origin := origin_of(source.folder, config)) is not None:
        report = analyze_compact(found, origin, options, progress, hub_options)
    else:
        report = analyze_dense(found, options, progress, hub_options)
    if options.png is not None:
        draw(report, options.png)
    return report


def check(options: AnalyzeOptions) -> None:
    """What would otherwise fail in the end. Raises UsageError, and RefusedError for a folder of graphs."""
    if options.png is not None:
        check_picture(options.png)
    folder = Path(options.model).expanduser()
    if (folder / "export.json").is_file():
        said = f"{options.model} holds ONNX graphs, and comp analyze reads weights."
        raise RefusedError(said, hint="Give the compact folder that comp export made them of.")


def draw(report: AnalyzeReport, path: Path) -> None:
    """Of a compact model which tokens of samples stay, of a dense one a heat map of importance. Raises UsageError where there
    is neither."""
    if report.kept_samples:
        image = token_picture(report.kept_samples, report.pictures)
    elif report.importance or report.token_importance:
        image = heat_map(report.importance, report.token_importance)
    else:
        why = "no token leaves it, or it was not run on samples" if report.compact else "nothing of it is scored"
        raise UsageError(f"--png {path}: of {report.model} there is no picture: {why}.")
    write(image, path)


def analyze_dense(found: Found, options: AnalyzeOptions, progress: Progress, hub_options: HubOptions) -> AnalyzeReport:
    """Score a dense model, or describe a decoder."""
    _, _, (family, _, _) = found
    if family.topology.drops_in == DECODER:
        return analyze_decoder(options, progress, hub_options)
    sizes: dict[str, Any] = {"text_tokens": options.text_tokens, "score_rows": options.score_rows}
    device = pick_device(options.device)
    dense = open_dense(options.model, progress, device=device, hub_options=hub_options, found=found, **sizes)
    threads.fit(flops.count(dense.plan, dense.reference).total * options.batch_size)
    pairs = choose_pairs(dense, options.data, progress, hub_options.cache_dir)
    batches = batches_of(dense, pairs, "calibration", options.num_samples, options.batch_size, options.seed)
    texts = cut_texts(batches, dense.text_tokens)
    warn_cut_texts("calibration", texts, progress, dense.longest)
    runtime = dense.runtime(dense.plan)
    with progress.track("scoring heads, channels and tokens", len(batches)) as bar:
        scores = scoring.collect(runtime, dense.family, dense.plan, dense.on_device(batches), advance=bar.advance)
    with progress.track("comparing parameter and token scores", len(batches)) as bar:
        interference = diagnostics.diagnose(runtime, dense.family, dense.plan, dense.on_device(batches), bar.advance)
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
        diagnostics=diagnosis(dense, interference),
        score_rows={name: stream.score_rows for name, stream in dense.plan.streams.items()},
        samples=sum(batch.samples for batch in batches),
        data=pairs.describe("calibration"),
        pairs=pair_counts(pairs),
        texts=texts,
        threads=threads.in_use(),
        importance=unit_importance(scores, dense.family),
        token_importance=token_importance(scores, dense),
    )


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


def unit_importance(scores: scoring.Scores, family: Family) -> tuple[LayerImportance, ...]:
    """How much heads and channels matter: the scores themselves, those of channels in groups."""
    rows = []
    for (tower, layer, part), found in scores.units.items():
        ranked = found if family.tower(tower).part(part).is_attention else found.sort(descending=True).values
        groups = ranked.tensor_split(min(GROUPS, len(ranked))) if ranked is not found else ranked.split(1)
        values = tuple(round(group.mean().item(), 4) for group in groups)
        rows.append(LayerImportance(tower, layer, part, len(found), values))
    return tuple(rows)


def token_importance(scores: scoring.Scores, dense: Dense) -> tuple[TokenImportance, ...]:
    """The mean token score of every patch, and of every place of a text that some sample has."""
    rows = []
    for (name, layer), found in scores.tokens.items():
        _, stream = dense.family.streams[name]
        if not stream.prunable:
            continue
        found = found[:, int(stream.skips_first) :]
        known = found.isfinite()
        found = found[:, known.any(0)].masked_fill(~known[:, known.any(0)], 0)
        means = found.sum(0) / known[:, known.any(0)].sum(0)
        image = stream.source == "image"
        grid = dense.family.topology.raster(dense.hf_config.to_dict(), {}, len(means)) if image else None
        rows.append(TokenImportance(name, layer, grid, tuple(round(value, 4) for value in means.tolist())))
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
    shares = (diagnostics.TOP, diagnostics.LEAST, diagnostics.KEPT, diagnostics.STRONG)
    return Diagnostics(*shares, tuple(layers), conclusions(layers, diagnostics.LEAST))
