"""Reports: what people read at the end of a command, and the model card."""

import shlex
from pathlib import Path
from typing import Any

from ..cli.output import Output
from ..engine import flops
from ..plan import AttentionPlan
from ..tasks.base import is_share


def millions(number: float) -> str:
    return f"{number / 1e6:,.1f} M"


def gflops(number: float) -> str:
    return f"{number / 1e9:,.2f} G"


def mib(number: float) -> str:
    return f"{number / 2**20:,.1f} MiB"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def metric_value(name: str, value: float) -> str:
    """A share in percent; what is none, in points as papers have it."""
    return percent(value) if is_share(name) else f"{100 * value:.1f}"


def change(before: float, after: float) -> str:
    return f"{100 * (after / before - 1):+.1f} %" if before else "-"


def layer_rows(dense, plan) -> list[dict[str, Any]]:
    """One row per layer: what is left of heads, channels and tokens. `dense` is a workbench.Dense."""
    rows = []
    counted = {(row.tower, row.layer): row for row in flops.count(plan, dense.reference).layers}
    for tower in plan.towers:
        full = dense.plan.tower(tower.name).layers
        for index, (layer, before) in enumerate(zip(tower.layers, full, strict=True)):
            row = counted[tower.name, index]
            rows.append(
                {
                    "tower": tower.name,
                    "layer": index,
                    "heads": _of(layer.attention, before.attention),
                    "cross_heads": _of(layer.cross, before.cross),
                    "ffn": [len(layer.ffn), len(before.ffn)],
                    "tokens": [row.tokens_out, dense.reference.tokens[tower.name]],
                    "flops": row.total,
                }
            )
    return rows


def _of(kept: AttentionPlan | None, dense: AttentionPlan | None) -> list[int] | None:
    return [len(kept.heads), len(dense.heads)] if kept and dense else None


def print_plan(document: dict[str, Any], out: Output) -> None:
    """The plan layer by layer: kept / dense."""

    def cell(pair: list[int] | None) -> str:
        return "-" if pair is None else f"{pair[0]} / {pair[1]}"

    rows = [
        [
            f"{row['tower']} {row['layer']}",
            *(cell(row[part]) for part in ("heads", "cross_heads", "ffn", "tokens")),
            gflops(row["flops"]),
        ]
        for row in document["layers"]
    ]
    columns = ["layer", "heads", "cross heads", "FFN channels", "tokens handed on", "FLOPs"]
    out.table(f"Plan for {document['base_model']} at ratio {document['ratio']:.3f} (kept / dense)", columns, rows)
    before, after = document["flops"]["dense"], document["flops"]["compact"]
    params = document["params"]
    out.line(
        f"FLOPs {gflops(before)} -> {gflops(after)}, parameters {millions(params['dense'])} -> "
        f"{millions(params['compact'])}. Nothing was written (--dry-run)."
    )


def comparison_rows(document: dict[str, Any]) -> list[list[str]]:
    """Measure, dense, compact, change: the table that ends `comp prune` and opens the model card."""
    before, after = document["flops"]["dense"], document["flops"]["compact"]
    params, size = document["params"], document["size_bytes"]
    rows = [
        ["parameters", millions(params["dense"]), millions(params["compact"]), change(params["dense"], params["compact"])],
        ["FLOPs per pair", gflops(before), gflops(after), change(before, after)],
    ]
    for tower, entering in document["reference"]["tokens"].items():
        outs = [row["tokens"][0] for row in document["layers"] if row["tower"] == tower]
        mean = sum(outs) / len(outs)
        rows.append([f"{tower} tokens, mean over layers", str(entering), f"{mean:.1f}", change(entering, mean)])
    rows.append(["weights on disk", mib(size["dense"]), mib(size["compact"]), change(size["dense"], size["compact"])])
    quality = document["quality"]
    for name, found in (quality["metrics"] or {}).items():
        points = f"{100 * (found['compact'] - found['dense']):+.1f} points"
        shown = [metric_value(name, found[side]) for side in ("dense", "compact")]
        rows.append([f"{name} ({quality['samples']} pairs)", *shown, points])
    rows.append([f"same decision ({quality['samples']} pairs)", "", percent(quality["agreement"]), ""])
    return rows


def reference_input(document: dict[str, Any]) -> str:
    """ "577 image tokens, 35 text tokens"."""
    kinds = {"vision": "image", "language": "text", "answer": "answer"}
    return ", ".join(f"{number} {kinds[tower]} tokens" for tower, number in document["reference"]["tokens"].items())


def print_pruned(document: dict[str, Any], output: Path, out: Output) -> None:
    columns = ["", "dense", "compact", "change"]
    out.table(f"{document['base_model']} at ratio {document['ratio']:.3f}", columns, comparison_rows(document))
    out.line(
        f"Reference input: {reference_input(document)}; FLOPs are 2 x multiply-"
        f"accumulates. Quality on {document['quality']['data']}. {document['seconds']:.0f} s."
    )
    if "cost" in document:
        passes = document["cost"]["dense_passes"]
        out.line(f"The search took as long as {passes:.1f} dense passes over the calibration pairs.")
    name = shlex.quote(str(output))
    out.line(f"Wrote {output}. Next: comp export {name} --onnx")
