"""`comp analyze`: where parameters and FLOPs are, how unequal heads, channels and tokens are, how they pollute each other."""

import shlex
from dataclasses import asdict
from pathlib import PurePosixPath
from typing import Any

from .. import __version__
from ..checkpoint.loading import pick_device
from ..cli.output import Output
from ..engine import diagnostics, flops, importance, scoring
from ..models.dense import DataOptions, Dense, batches_of, choose_pairs, cut_texts, open_dense, warn_cut_texts
from ..report.tables import gflops, millions, percent, reference_input


def analyze(
    model: str,
    out: Output,
    *,
    num_samples: int,
    batch_size: int,
    text_tokens: int,
    score_rows: int,
    device: str,
    seed: int,
    data: DataOptions,
    task: str | None = None,
    **hub_options: Any,
) -> dict[str, Any]:
    """The report of `comp analyze`; prints its tables."""
    sizes = {"text_tokens": text_tokens, "score_rows": score_rows}
    dense = open_dense(model, out, device=pick_device(device), task=task, **sizes, **hub_options)
    pairs = choose_pairs(dense, data, out, hub_options.get("cache_dir"))
    batches = batches_of(dense, pairs, "calibration", num_samples, batch_size, seed)
    texts = cut_texts(batches, dense.text_tokens)
    warn_cut_texts("calibration", texts, out, dense.longest)
    runtime = dense.runtime(dense.plan)
    with out.track("scoring heads, channels and tokens", len(batches)) as bar:
        scores = scoring.collect(runtime, dense.family, dense.plan, dense.on_device(batches), advance=bar.advance)
    with out.track("comparing parameter and token scores", len(batches)) as bar:
        found = diagnostics.diagnose(runtime, dense.family, dense.plan, dense.on_device(batches), bar.advance)
    document = {
        "comp_version": __version__,
        "model": dense.source.name,
        "revision": dense.source.revision,
        "architecture": dense.architecture,
        "task": dense.task.name,
        "reference": {"tokens": dense.reference.tokens, "flops": "2 x multiply-accumulates, one sample"},
        **costs(dense),
        "inequality": inequality(dense, scores),
        "diagnostics": diagnosis(dense, found),
        "score_rows": {tower.name: tower.score_rows for tower in dense.plan.towers},
        "samples": sum(batch.samples for batch in batches),
        "data": pairs.describe("calibration"),
        "pairs": pairs.counts(),
        "texts": texts,
    }
    print_analysis(document, model, task, out)
    return document


def costs(dense: Dense) -> dict[str, Any]:
    """Parameters and FLOPs of every layer's attention, cross-attention and feed-forward part, and of what lies outside."""
    counted = flops.count(dense.plan, dense.reference)
    params = part_params(dense)
    layers = [
        {
            "tower": row.tower,
            "layer": row.layer,
            "flops": {part: getattr(row, part) for part in ("attention", "cross", "ffn")},
            "params": {part: params.get((row.tower, row.layer, part), 0) for part in ("attention", "cross", "ffn")},
        }
        for row in counted.layers
    ]
    total = dense.params(dense.plan)
    return {
        "params": {"total": total, "outside_layers": total - sum(params.values())},
        "flops": {"total": counted.total, "outside_layers": counted.fixed},
        "layers": layers,
    }


def part_params(dense: Dense) -> dict[scoring.Key, int]:
    """Parameters of each prunable part, norms counted with the part that they belong to."""
    found: dict[scoring.Key, int] = {}
    for tower in dense.family.towers:
        root = f"{tower.encoder}.{tower.layers}."
        heads = {"cross": _head(tower.cross.module)} if tower.cross else {}
        heads["attention"] = _head(tower.attention.module)
        for name, tensor in dense.state.items():
            if not name.startswith(root):
                continue
            index, _, path = name.removeprefix(root).partition(".")
            part = next((part for part, head in heads.items() if path.startswith(head + ".")), "ffn")
            key = (tower.name, int(index), part)
            found[key] = found.get(key, 0) + tensor.numel()
    return found


def _head(path: str) -> str:
    return PurePosixPath(path.replace(".", "/")).parts[0]


def inequality(dense: Dense, scores: scoring.Scores) -> list[dict[str, Any]]:
    """Gini coefficients per layer: 0 where all units matter alike (nothing to gain), towards 1 where few matter."""
    rows = []
    for tower in dense.family.towers:
        for index in range(len(dense.plan.tower(tower.name).layers)):
            tokens = scores.tokens[tower.name, index]
            per_sample = [importance.gini(row[row.isfinite()]) for row in tokens]
            row = {"tower": tower.name, "layer": index, "tokens": sum(per_sample) / len(per_sample) if tower.tokens else None}
            for part in ("attention", "cross", "ffn"):
                found = scores.units.get((tower.name, index, part))
                row[part] = None if found is None else importance.gini(found)
            rows.append(row)
    return rows


def diagnosis(dense: Dense, found: diagnostics.Diagnosis) -> dict[str, Any]:
    """CoMP's two findings per layer, with the shares that define them."""
    layers = []
    for tower in (tower for tower in dense.plan.towers if dense.family.tower(tower.name).tokens):
        for index in range(len(tower.layers)):
            parts = [part for part in ("attention", "cross", "ffn") if (tower.name, index, part) in found.overlap]
            influence = found.influence.get((tower.name, index))
            layers.append(
                {
                    "tower": tower.name,
                    "layer": index,
                    "overlap": {part: found.overlap[tower.name, index, part] for part in parts},
                    "chance": found.chance[tower.name, index, "ffn"],
                    "influence": influence and asdict(influence),
                }
            )
    return {
        "top_tokens": diagnostics.TOP,
        "least_heads": diagnostics.LEAST,
        "kept_tokens": diagnostics.KEPT,
        "strong": diagnostics.STRONG,
        "layers": layers,
    }


def print_analysis(document: dict[str, Any], model: str, task: str | None, out: Output) -> None:
    """Three tables: towers, layers with their inequality, diagnostics."""
    total_flops, total_params = document["flops"]["total"], document["params"]["total"]
    sums: dict[tuple[str, str], list[int]] = {}
    for layer in document["layers"]:
        for part in ("attention", "cross", "ffn"):
            entry = sums.setdefault((layer["tower"], part), [0, 0])
            entry[0] += layer["flops"][part]
            entry[1] += layer["params"][part]
    rows = [
        [f"{tower} {part}", gflops(f), percent(f / total_flops), millions(p), percent(p / total_params)]
        for (tower, part), (f, p) in sums.items()
        if f
    ]
    outside_f, outside_p = document["flops"]["outside_layers"], document["params"]["outside_layers"]
    outside = [gflops(outside_f), percent(outside_f / total_flops), millions(outside_p), percent(outside_p / total_params)]
    rows.append(["embeddings and heads", *outside])
    rows.append(["all", gflops(total_flops), "100 %", millions(total_params), "100 %"])
    title = f"{document['model']}: FLOPs per pair ({reference_input(document)}) and parameters"
    out.table(title, ["part", "FLOPs", "", "params", ""], rows)
    by_layer = {(row["tower"], row["layer"]): row for row in document["inequality"]}
    rows = []
    for layer in document["layers"]:
        uneven = by_layer[layer["tower"], layer["layer"]]
        cells = [uneven[part] for part in ("attention", "cross", "ffn", "tokens")]
        rows.append(
            [
                f"{layer['tower']} {layer['layer']}",
                gflops(sum(layer["flops"].values())),
                millions(sum(layer["params"].values())),
                *("-" if cell is None else f"{cell:.2f}" for cell in cells),
            ]
        )
    columns = ["layer", "FLOPs", "params", "heads", "cross heads", "channels", "tokens"]
    out.table("Inequality of importance (Gini: 0 all alike, 1 one has it all)", columns, rows)
    print_diagnosis(document["diagnostics"], out)
    again = f" --task {task}" if task else ""
    out.line(f"Next: comp prune {shlex.quote(model)} --ratio 0.5{again} -o compact")


def print_diagnosis(found: dict[str, Any], out: Output) -> None:
    """One row per layer, and what the columns mean."""
    rows = []
    for layer in found["layers"]:
        shares = [layer["overlap"].get(part) for part in ("attention", "cross", "ffn")] + [layer["chance"]]
        influence = layer["influence"] or {}
        shares += [influence.get(name) for name in ("changed_by_least", "changed_by_all", "strong")]
        rows.append([f"{layer['tower']} {layer['layer']}", *("-" if share is None else percent(share) for share in shares)])
    columns = ["layer", "overlap: heads", "cross heads", "channels", "by chance", "changed: least heads", "all heads", "strong"]
    out.table("How parameter and token scores pollute each other", columns, rows)
    top, least, kept, strong = (f"{100 * found[name]:g} %" for name in ("top_tokens", "least_heads", "kept_tokens", "strong"))
    out.line(
        f"overlap: the {top} of the tokens that drive a part's plain importance, with the {top} that score best. "
        f"changed: share of the best {kept} of the tokens that is another without one of the {least} least important heads "
        f"of the layer, and without any one; strong: how many of the least important change {strong} or more."
    )
