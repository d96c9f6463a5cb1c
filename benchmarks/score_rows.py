"""How many query rows do token scores need? Rows are what scoring costs; the full form of CoMP (Eq. 6) sums over all.

    python benchmarks/score_rows.py

On the demo model's vision tower (144 image tokens and [CLS]), for evenly spaced rows, with and without the row of [CLS], and
for the row of [CLS] alone: how alike the rankings are (Spearman), how much of the kept sets is the same, what scoring costs,
and the accuracy with that share of tokens kept at the second layer. Writes JSON and prints the table of docs/methods.md.
"""

import argparse
import json
import statistics
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from comp_cli.cli.output import Output
from comp_cli.data.scene_pairs import ScenePairs
from comp_cli.engine import diagnostics, scoring
from comp_cli.engine.token_ranking import with_score_rows
from comp_cli.models.dense import Dense, open_dense
from comp_cli.models.pairs import batches_of
from comp_cli.runtime.modeling_comp import CompactAttention, token_scores
from comp_cli.tasks import comparison

SCENES = ScenePairs(labelled=True)
ROWS = (4, 8, 16, 32, 64, 0)  # 0: all
KEPT = (0.5, 0.75)
PRUNED_LAYER = 1


def variants() -> dict[str, tuple[int | None, bool]]:
    """Name -> (evenly spaced rows, None for none; whether the row of [CLS] counts as well)."""
    found = {"[CLS] alone": (None, True)}
    for rows in ROWS:
        found |= {f"{rows or 'all'}": (rows, False), f"[CLS] + {rows or 'all'}": (rows, True)}
    return found


def score(query: Tensor, key: Tensor, scale: float, rows: int | None, with_class: bool) -> Tensor:
    """Token scores of one layer, (batch, tokens). query, key: (batch, heads, tokens, head_dim)."""
    found = 0 if rows is None else token_scores(query, key, scale, rows=rows)
    return found + token_scores(query[:, :, :1], key, scale, skip_first=False) if with_class else found


@contextmanager
def queries_and_keys(model: nn.Module, dense: Dense):
    """While open, a list of (module, query, key) grows with every layer of the vision tower that runs."""
    heard = []

    def hook(module: CompactAttention, args, output) -> None:
        query, key, _ = map(module.split, module.project(args[0], None))
        heard.append((module, query, key))

    layers = scoring.tower_layers(model, dense.family.tower("vision"))
    path = dense.family.tower("vision").self_attention.module
    hooks = [layer.get_submodule(path).register_forward_hook(hook) for layer in layers]
    try:
        yield heard
    finally:
        for hook in hooks:
            hook.remove()


def agreement(dense: Dense, batches: list) -> tuple[dict[str, dict], float]:
    """Per variant: lists over layers of the means over samples, and ms of scoring per batch; ms of a forward pass per batch."""
    model = dense.runtime(dense.plan)
    layers = len(dense.plan.tower("vision").layers)
    measures = ("spearman", *(f"kept {share:g}" for share in KEPT))
    sums = {name: {measure: [0.0] * layers for measure in measures} | {"ms": []} for name in variants()}
    forward, samples = [], 0
    with torch.inference_mode():
        for inputs in dense.on_device(batches):
            begin = time.perf_counter()
            model(**inputs)
            forward.append(1000 * (time.perf_counter() - begin))
            with queries_and_keys(model, dense) as heard:
                model(**inputs)
            full = [token_scores(query, key, module.scale) for module, query, key in heard]
            ordinary = torch.ones_like(full[0], dtype=torch.bool)
            ordinary[:, 0] = False
            samples += len(ordinary)
            for name, (rows, with_class) in variants().items():
                begin = time.perf_counter()
                found = [score(query, key, module.scale, rows, with_class) for module, query, key in heard]
                sums[name]["ms"].append(1000 * (time.perf_counter() - begin))
                for layer, pair in enumerate(zip(full, found, strict=True)):
                    sums[name]["spearman"][layer] += diagnostics.rank_correlation(*pair, ordinary).sum().item()
                    for share in KEPT:
                        sums[name][f"kept {share:g}"][layer] += diagnostics.overlap(*pair, ordinary, share).sum().item()
    for found in sums.values():
        found["ms"] = round(statistics.median(found["ms"]), 3)
        found |= {measure: [round(total / samples, 5) for total in found[measure]] for measure in measures}
    return sums, round(statistics.median(forward), 3)


def accuracy(dense: Dense, rows: int, share: float, batches: list) -> float:
    """With that share of the image tokens (and [CLS]) handed on by one early layer, chosen with so many rows."""
    plan = with_score_rows(dense.plan, rows, dense.family)
    tower = plan.tower("vision")
    keep = 1 + round(share * (dense.reference.tokens["vision"] - 1))
    layers = tuple(layer.handing_on("vision", keep) if i == PRUNED_LAYER else layer for i, layer in enumerate(tower.layers))
    model = dense.runtime(plan.with_tower(replace(tower, layers=layers)))
    return comparison.evaluate(model, dense.task, batches).metric(dense.task)


def table(document: dict) -> str:
    lines = [
        "| query rows | rank correlation | worst layer | same kept set, 50 % | 75 % | time of scoring | accuracy, 50 % kept |",
        "|---" * 7 + "|",
    ]
    for name, found in document["variants"].items():
        correct = f"{100 * found['accuracy']['0.5']:.1f} %" if "accuracy" in found else "-"
        shares = " | ".join(f"{100 * statistics.mean(found[f'kept {share:g}']):.1f} %" for share in KEPT)
        lines.append(
            f"| {name} | {statistics.mean(found['spearman']):.3f} | {min(found['spearman']):.3f} | {shares} | "
            f"{100 * found['ms'] / document['forward_ms']:.1f} % | {correct} |"
        )
    return "\n".join(lines)


def main(arguments: argparse.Namespace) -> None:
    dense = open_dense("demo", Output("quiet"))
    found, forward = agreement(dense, batches_of(dense, SCENES, "calibration", arguments.pairs, 8))
    judges = batches_of(dense, SCENES, "evaluation", arguments.judges, 32)
    for rows in ROWS:
        found[f"{rows or 'all'}"]["accuracy"] = {f"{share:g}": accuracy(dense, rows, share, judges) for share in KEPT}
    document = {
        "model": "demo",
        "pairs": arguments.pairs,
        "judges": arguments.judges,
        "batch_size": 8,
        "forward_ms": forward,
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "variants": found,
    }
    arguments.output.write_text(json.dumps(document, indent=1) + "\n")
    print(table(document))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/score_rows.json"))
    parser.add_argument("--pairs", type=int, default=256, help="pairs behind the agreement")
    parser.add_argument("--judges", type=int, default=1000, help="test pairs behind the accuracy")
    main(parser.parse_args())
