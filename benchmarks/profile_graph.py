"""Where the time of the compact graph goes, and what remains between it and the limit that its FLOPs set.

    python benchmarks/profile_graph.py --work out/speed --ratio 0.85 --core 1

Times of nodes are from ONNX Runtime's profile, the fastest of many runs, so that other processes disturb little. The limit of
a group of nodes is its time in our own dense graph, divided by how far the FLOPs of the whole model fall.
"""

import argparse
import math
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import prepared
import torch

from comp_cli.data.batches import random_inputs
from comp_cli.onnx import profiling
from comp_cli.onnx.write import TOKEN_PRUNING
from comp_cli.runtime import modeling_comp as runtime

MATMULS = ("MatMul", "Gemm", "FusedMatMul")
GROUPS = {
    "Conv": "patch embedding",
    "ReorderOutput": "patch embedding",
    "MultiHeadAttention": "attention",
    "LayerNormalization": "norms with residuals",
    "SkipLayerNormalization": "norms with residuals",
}


def gflops(node: profiling.Node) -> float:
    """2 x multiply-accumulates of one node, in 1e9."""
    if node.op in MATMULS:
        return 2e-9 * math.prod(node.outputs[0]) * node.inputs[0][-1]
    if node.op == "Conv":
        return 2e-9 * math.prod(node.outputs[0]) * math.prod(node.inputs[1][1:])
    if node.op == "MultiHeadAttention":
        (batch, queries, inner), keys = node.inputs[0], node.inputs[1][1]
        return 4e-9 * batch * queries * keys * inner
    return 0.0


def group_of(node: profiling.Node) -> str:
    if f"/{TOKEN_PRUNING}/" in node.name:
        return "token scoring and dropping"
    if node.op in MATMULS:
        return "matmuls of the vision tower" if node.name.startswith("vision_model") else "matmuls of the text tower"
    return GROUPS.get(node.op, "biases, GELU, splits, embeddings")


def groups(path: Path, batch: int, config, runs: int) -> dict[str, list[float]]:
    """Per group of nodes: ms and GFLOPs."""
    found = defaultdict(lambda: [0.0, 0.0])
    for node in profiling.profile(path, random_inputs(config, prepared.FAMILY, batch, prepared.TEXT_TOKENS), runs=runs).nodes:
        row = found[group_of(node)]
        row[0] += node.ms
        row[1] += gflops(node)
    return found


def table(own: dict[str, list[float]], compact: dict[str, list[float]], ratio: str, batch: int) -> str:
    fall = sum(flops for _, flops in own.values()) / sum(flops for _, flops in compact.values())
    out = [f"Ratio {ratio}, batch {batch}: FLOPs fall {fall:.2f}x.", ""]
    columns = (
        "",
        "dense (comp runtime), ms",
        "GFLOP/s",
        "FLOPs bound, ms",
        "compact, ms",
        "GFLOP/s",
        "excess over FLOPs bound, ms",
    )
    out += [f"| {' | '.join(columns)} |".replace("|  |", "| |"), "|---" * len(columns) + "|"]
    names = sorted({*own, *compact}, key=lambda name: -compact.get(name, [0.0])[0])
    sums = [[sum(row[i] for row in part.values()) for i in (0, 1)] for part in (own, compact)]
    rows = [(name, own.get(name, [0.0, 0.0]), compact.get(name, [0.0, 0.0])) for name in names]
    for name, (before, flops_before), (after, flops_after) in [*rows, ("all", *sums)]:
        speeds = [
            f"{1000 * flops / ms:.0f}" if flops > 0.01 else "" for flops, ms in ((flops_before, before), (flops_after, after))
        ]
        limit = before / fall
        out.append(f"| {name} | {before:.1f} | {speeds[0]} | {limit:.1f} | {after:.1f} | {speeds[1]} | {after - limit:+.1f} |")
    out.append("")
    out.append(f"Speed-up {sums[0][0] / sums[1][0]:.2f}x, efficiency {sums[0][0] / sums[1][0] / fall:.2f}.")
    return "\n".join(out)


def cpu_ms(work: Callable[[], object], runs: int = 15) -> float:
    """Median CPU time of one call on one thread."""
    taken = []
    for _ in range(runs):
        begin = time.process_time()
        work()
        taken.append(1000 * (time.process_time() - begin))
    return statistics.median(taken)


def pruning_share(model: torch.nn.Module, batch: int, config) -> str:
    """What scoring and dropping cost in torch, in the layers of the vision tower that do, on the tensors of a real pass."""
    lines = []
    inputs = random_inputs(config, prepared.FAMILY, batch, prepared.TEXT_TOKENS)
    for index, layer in enumerate(model.vision_model.encoder.layers):
        seen = {}
        if layer.token_pruning is None:
            continue
        hook = layer.register_forward_pre_hook(lambda module, args, seen=seen: seen.update(states=args[0]))
        with torch.inference_mode():
            model(**inputs)
            hook.remove()
            states, attention = seen["states"], layer.self_attn
            if states.shape[1] <= layer.token_pruning.keep:
                continue
            query, key, _ = attention.project(layer.layer_norm1(states), None)

            def prune(attention=attention, layer=layer, states=states, query=query, key=key) -> torch.Tensor:
                scores = attention.token_scores(query, key, attention.head_dim, attention.scale)
                return layer.token_pruning(states, scores, None)[0]

            def run(layer=layer, states=states) -> torch.Tensor:
                return layer(states, token_state=runtime.TokenState())

            part, whole = cpu_ms(prune), cpu_ms(run)
        lines.append(
            f"Vision layer {index}, {states.shape[1]} -> {layer.token_pruning.keep} tokens, batch {batch}, torch: "
            f"scoring and dropping {part:.1f} of {whole:.1f} ms, {100 * part / whole:.1f} %."
        )
    return "\n".join(lines) or "No layer drops tokens."


def main(arguments: argparse.Namespace) -> None:
    if arguments.core is not None:
        os.sched_setaffinity(0, {arguments.core})
    torch.set_num_threads(1)
    model = prepared.model(arguments.work, arguments.ratio)
    own, compact = (
        groups(prepared.graph(arguments.work, name), arguments.batch, model.config, arguments.runs)
        for name in ("own", arguments.ratio)
    )
    text = table(own, compact, arguments.ratio, arguments.batch)
    text += "\n\n" + pruning_share(model, arguments.batch, model.config) + "\n"
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / f"profile-{arguments.ratio}-batch-{arguments.batch}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("out/speed"), help="models and graphs, shared with latency.py")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="folder of the table")
    parser.add_argument("--ratio", default="0.85")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--core", type=int, help="CPU core to stay on (Linux)")
    main(parser.parse_args())
