"""comp against its peers: same model, same FLOPs, same inputs, one thread; latency at full size, accuracy on the demo task.

    pip install -c constraints.txt -r benchmarks/requirements-peers.txt
    python benchmarks/peers.py --work out/speed --core 1

A peer that does not install is a row with the reason. Everything is training-free. Latency: one JSON line a round, as in
latency.py; accuracy: one line a peer. Lines that are there are not measured again.
"""

import argparse
import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import latency
import numpy as np
import prepared
import tome
import torch
from accuracy import TEST_SEED
from torch import nn
from torch.nn import functional as F

from comp_cli import tasks
from comp_cli.checkpoint import hub, loading
from comp_cli.cli.output import Output
from comp_cli.commands import bench
from comp_cli.commands.prune import prune
from comp_cli.data.batches import random_inputs
from comp_cli.data.scene_pairs import ScenePairs
from comp_cli.engine import flops
from comp_cli.measure import timing, variants
from comp_cli.models.dense import Dense, open_dense
from comp_cli.models.pairs import batches_of
from comp_cli.onnx import sessions, write
from comp_cli.options import PruneOptions
from comp_cli.plan import Channels

SCENES = ScenePairs(labelled=True)
DEMO = hub.DEMOS["demo"]
ROUNDS = {1: 7, 8: 3}


class Skipped(Exception):
    """Why a peer has no figures."""


@dataclass(frozen=True)
class Peer:
    """`make` gets the work folder of a base model and the ratio, and returns a torch model or the path of a graph."""

    label: str
    make: Callable[[Path, float], nn.Module | Path]
    timed: bool = True  # False where another row has the same sizes, and so the same latency


# Torch-Pruning -----------------------------------------------------------------------------------------------------------


class SplitAttention(nn.Module):
    """BLIP's vision attention with three matrices for one and any number of heads, eager as in stock: what somebody who
    uses Torch-Pruning has to write, because it cannot trace the fused matrix and stock cannot run fewer heads."""

    def __init__(self, stock: nn.Module):
        super().__init__()
        self.num_heads, self.head_dim, self.scale = stock.num_heads, stock.head_dim, stock.scale
        self.projection = stock.projection
        weights, biases = stock.qkv.weight.chunk(3), stock.qkv.bias.chunk(3)
        for name, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
            linear = nn.Linear(weight.shape[1], weight.shape[0])
            linear.load_state_dict({"weight": weight, "bias": bias})
            self.add_module(name, linear)

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        parts = (getattr(self, name)(hidden_states) for name in ("query", "key", "value"))
        query, key, value = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in parts)
        weights = (query @ key.transpose(-1, -2) * self.scale).softmax(-1)
        return self.projection((weights @ value).transpose(1, 2).flatten(2)), weights


def uniform_sizes(dense: Dense, ratio: float) -> tuple[float, float]:
    """Shares of heads and of feed-forward channels to remove, the same in every layer, that cut the FLOPs by `ratio`."""
    before = flops.count(dense.plan, dense.reference).total

    def left(heads: int, channels: int) -> float:
        def cut(layer):
            for part, units in layer.parts.items():
                layer = layer.keeping(part, units.units[: channels if isinstance(units, Channels) else heads])
            return layer

        towers = (replace(tower, layers=tuple(map(cut, tower.layers))) for tower in dense.plan.towers)
        return flops.count(replace(dense.plan, towers=tuple(towers)), dense.reference).total / before

    layer = dense.plan.towers[0].layers[0]
    most, wide = len(layer.kept("attention")), len(layer.kept("ffn"))
    heads = max(1, round((1 - ratio) * most))
    least, full = left(heads, 0), left(heads, wide)
    channels = 8 * round(wide * (1 - ratio - least) / (full - least) / 8)
    return 1 - (heads + 0.5) / most, 1 - (channels + 0.5) / wide  # halves: it rounds what is left down


def torch_pruning(importance: str) -> Callable[[Path, float], nn.Module]:
    """Whole heads and feed-forward channels, the same number in every layer; by weights, or by Taylor scores on labels."""

    def make(work: Path, ratio: float) -> nn.Module:
        try:
            import torch_pruning as tp
        except ImportError as error:
            raise Skipped(f"Torch-Pruning is not installed ({error})") from None
        dense = open_dense(str(work / "dense"), Output("quiet"))
        model = copy.deepcopy(prepared.model(work, "stock")).requires_grad_(True)
        layers = model.text_encoder.encoder.layer
        for layer in model.vision_model.encoder.layers:
            layer.self_attn = SplitAttention(layer.self_attn)
        attentions = [layer.self_attn for layer in model.vision_model.encoder.layers]
        texts = [attention for layer in layers for attention in (layer.attention.self, layer.crossattention.self)]
        parts = ("query", "key", "value")
        heads = {getattr(a, part): a.num_heads for a in attentions for part in parts}
        heads |= {getattr(a, part): a.num_attention_heads for a in texts for part in parts}
        inner = [layer.mlp.fc1 for layer in model.vision_model.encoder.layers] + [layer.intermediate.dense for layer in layers]
        kinds = (nn.Linear, nn.Conv2d)
        ignored = [m for m in model.modules() if isinstance(m, kinds) and m not in heads and m not in inner]
        head_share, channel_share = uniform_sizes(dense, ratio)
        score = tp.importance.GroupMagnitudeImportance(p=2)
        if importance == "taylor":
            score = tp.importance.GroupTaylorImportance()
            demo = open_dense("demo", Output("quiet"))
            for batch in batches_of(demo, SCENES, "calibration", 256, 32):
                F.cross_entropy(model(**batch.inputs).itm_score, batch.labels).backward()
        with loading.quiet_libraries():
            pruner = tp.pruner.BasePruner(
                model,
                random_inputs(model.config, prepared.FAMILY, 1, 12),
                importance=score,
                pruning_ratio=channel_share,
                head_pruning_ratio=head_share,
                num_heads=heads,
                prune_num_heads=True,
                prune_head_dims=False,
                ignored_layers=ignored,
                round_to=8,
                forward_fn=lambda model, inputs: model(**inputs),
                output_transform=lambda outputs: outputs.itm_score,
            )
            pruner.step()
        for attention in texts:
            attention.all_head_size = attention.query.out_features
        return model.eval().requires_grad_(False)

    return make


def flops_of(model: nn.Module) -> int:
    """FLOPs of one pair, at 35 text tokens or as many as the model has places for."""
    return bench.count_flops(
        model, prepared.FAMILY, min(prepared.TEXT_TOKENS, model.config.text_config.max_position_embeddings)
    )


# The others --------------------------------------------------------------------------------------------------------------


def token_merging(work: Path, ratio: float) -> nn.Module:
    """The smallest number of merges per layer that cuts the FLOPs by `ratio`."""
    stock = prepared.model(work, "stock")
    target = (1 - ratio) * flops_of(stock)
    vision = stock.config.vision_config
    low, high = 0, (vision.image_size // vision.patch_size) ** 2 // vision.num_hidden_layers
    while high - low > 1:
        r = (low + high) // 2
        merged = tome.apply(copy.deepcopy(stock), r)
        low, high = (low, r) if flops_of(merged) <= target else (r, high)
    return tome.apply(copy.deepcopy(stock), high)


def exported_by_transformers(fusions: str | None) -> Callable[[Path, float], Path]:
    def make(work: Path, ratio: float) -> Path:
        try:
            from transformers.exporters import OnnxConfig, OnnxExporter
        except ImportError as error:
            raise Skipped(f"this transformers has no exporter ({error})") from None
        path = work / f"transformers-{fusions or 'plain'}.onnx"
        if not path.exists():
            model = prepared.model(work, "stock")
            with loading.quiet_libraries():
                config = OnnxConfig(dynamic=True, ort_fusions=fusions)
                done = OnnxExporter().export(model, random_inputs(model.config, prepared.FAMILY, 2, 7), config=config)
                OnnxExporter.save_program(done.program, path)
        return path

    return make


def exported_by_optimum(work: Path, ratio: float) -> Path:
    try:
        from optimum.exporters.onnx import main_export
    except Exception as error:  # with transformers 5 it installs, but raises on import
        raise Skipped(f"optimum-onnx 0.1.0 wants transformers < 4.58 ({type(error).__name__} on import)") from None
    path = work / "optimum"
    main_export(str(work / "dense"), path, task="feature-extraction")
    return path / "model.onnx"


def exported_peer(name: str) -> Callable[[Path, float], Path]:
    """Another torch peer as a graph, through the same exporter as the plain export."""

    def make(work: Path, ratio: float) -> Path:
        path = work / f"{name}-{ratio:g}.onnx"
        if not path.exists():
            write.write_graph(PEERS[name].make(work, ratio), prepared.TASK, prepared.FAMILY, path)
        return path

    return make


def unrecovered(work: Path, ratio: float) -> nn.Module:
    """comp without its closed-form refit, on the demo: what the choice of units alone is worth."""
    folder = work / f"unrecovered-{ratio:g}"
    if not folder.exists():
        options = PruneOptions("demo", ratio, recover=False, device="cpu", batch_size=32)
        prune(options, folder, Output("quiet"))
    return loading.load_model(folder, dtype=torch.float32)


PEERS = {
    "stock": Peer("stock transformers, torch", lambda work, ratio: prepared.model(work, "stock")),
    "comp": Peer("comp, torch", lambda work, ratio: prepared.model(work, f"{ratio:g}")),
    "comp-unrecovered": Peer("comp --no-recover, torch", unrecovered, timed=False),
    "torch-pruning": Peer("Torch-Pruning (magnitude), torch", torch_pruning("magnitude")),
    "torch-pruning-taylor": Peer("Torch-Pruning (Taylor), torch", torch_pruning("taylor"), timed=False),
    "merging": Peer("token merging as in ToMe, torch", token_merging),
    "plain": Peer("dense, plain export, ONNX Runtime", lambda work, ratio: prepared.graph(work, "stock")),
    "transformers": Peer("dense, transformers' exporter", exported_by_transformers(None)),
    "transformers-fused": Peer("dense, transformers' exporter with ORT fusions", exported_by_transformers("cpu")),
    "optimum": Peer("dense, optimum's exporter", exported_by_optimum),
    "int8": Peer("dense, dynamic int8, ONNX Runtime", lambda work, ratio: prepared.graph(work, "int8 stock")),
    "torch-pruning-onnx": Peer("Torch-Pruning (magnitude), ONNX Runtime", exported_peer("torch-pruning")),
    "merging-onnx": Peer("token merging as in ToMe, ONNX Runtime", exported_peer("merging")),
    "comp-onnx": Peer("comp, ONNX Runtime", lambda work, ratio: prepared.graph(work, f"{ratio:g}")),
    "comp-int8": Peer("comp, dynamic int8, ONNX Runtime", lambda work, ratio: prepared.graph(work, f"int8 {ratio:g}")),
}


def logits_of(made: nn.Module | Path) -> Callable[[timing.Inputs], torch.Tensor]:
    if isinstance(made, nn.Module):
        return lambda inputs: made(**inputs).itm_score
    session = sessions.open_session(made)
    return lambda inputs: torch.from_numpy(session.run(["itm_score"], sessions.feeds(inputs))[0])


def accuracy(made: nn.Module | Path, batches: list) -> float:
    """Share of right decisions."""
    logits = logits_of(made)
    with torch.inference_mode():
        right = [logits(batch.inputs).argmax(-1) == batch.labels for batch in batches]
    return torch.cat(right).float().mean().item()


def demo_work(work: Path, ratio: float) -> Path:
    """The demo model in a work folder of its own, and comp on it with its own defaults."""
    folder = work / "demo"
    if not (folder / "dense").exists():
        shutil.copytree(DEMO, folder / "dense")
    if not (folder / f"compact-{ratio:g}").exists():
        options = PruneOptions("demo", ratio, device="cpu", batch_size=32)
        prune(options, folder / f"compact-{ratio:g}", Output("quiet"))
    return folder


def measure_accuracy(work: Path, path: Path, ratio: float, pairs: int) -> None:
    done = {line["peer"] for line in latency.read(path) if "accuracy" in line}
    missing = [name for name in PEERS if name not in done]
    if not missing:
        return
    folder = demo_work(work, ratio)
    batches = batches_of(open_dense("demo", Output("quiet")), SCENES, "evaluation", pairs, 32, TEST_SEED)
    with path.open("a") as file:
        for name in missing:
            line = {"peer": name, "ratio": ratio, "pairs": pairs, "accuracy": None}
            try:
                made = PEERS[name].make(folder, ratio)
                line["accuracy"] = accuracy(made, batches)
                if isinstance(made, nn.Module):
                    line["flops_left"] = flops_of(made) / flops_of(prepared.model(folder, "stock"))
            except Skipped as why:
                line["skipped"] = str(why)
            except Exception as error:  # a peer that breaks is a row with the reason, not the end of the others
                line["skipped"] = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
            print(json.dumps(line), file=file, flush=True)
            print(line, flush=True)


def build(work: Path, ratio: float) -> dict[str, timing.Runner]:
    """Runners of all peers that can be made at full size."""
    runners = {}
    for name, peer in PEERS.items():
        if not peer.timed:
            continue
        try:
            made = peer.make(work, ratio)
        except Exception as why:
            print(f"{name}: skipped, {str(why).splitlines()[0][:200]}", flush=True)
            continue
        if isinstance(made, nn.Module):
            runners[name] = variants.torch_runner(made, torch.device("cpu"))
        else:
            runners[name] = variants.onnx_runner(made, tasks.TASKS["itm"], "cpu")
    return runners


def table(lines: list[dict], ratio: float, clock: str) -> str:
    """Markdown: latency against the stock model, and accuracy."""
    decided = {line["peer"]: line for line in lines if "accuracy" in line}
    batches = sorted({line["batch"] for line in lines if "batch" in line})
    times = {batch: latency.series([line for line in lines if "batch" in line], batch, clock) for batch in batches}
    out = ["| | " + "".join(f"batch {b}, ms | vs stock | " for b in batches) + "demo: FLOPs left | demo: accuracy |"]
    out.append("|---" * (3 + 2 * len(batches)) + "|")
    for name, peer in PEERS.items():
        cells = []
        for batch in batches:
            found = times[batch].get(name)
            faster = found and timing.speedup(times[batch]["stock"], found)
            cells.append(f"{np.median(found):.0f} | {faster.value:.2f}x" if found else "- | -")
        line = decided.get(name, {})
        told = f"{100 * line['accuracy']:.1f} %" if line.get("accuracy") is not None else line.get("skipped", "-")
        left = f"{100 * line['flops_left']:.1f} %" if "flops_left" in line else "-"
        out.append(f"| {peer.label} | " + "".join(f"{cell} | " for cell in cells) + f"{left} | {told} |")
    pairs = next((line["pairs"] for line in decided.values()), 0)
    out += ["", f"Ratio {ratio:g} for all that prune; medians of {clock} time, one thread; accuracy on {pairs} test pairs."]
    return "\n".join(out) + "\n"


def main(arguments: argparse.Namespace) -> None:
    latency.settle(arguments)
    measure_accuracy(arguments.work, arguments.output, arguments.ratio, arguments.pairs)
    latency.complete(arguments, lambda: build(arguments.work, arguments.ratio), ROUNDS)
    text = table(latency.read(arguments.output), arguments.ratio, arguments.clock)
    arguments.output.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("out/speed"), help="models and graphs, shared with latency.py")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/peers.jsonl"))
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--pairs", type=int, default=1000, help="test pairs of the demo task behind every accuracy")
    parser.add_argument("--batches", nargs="*", type=int, default=list(ROUNDS))
    parser.add_argument("--rounds", type=int, help="per batch; else 7 at batch 1, 3 at batch 8")
    parser.add_argument("--core", type=int, help="CPU core to stay on (Linux)")
    parser.add_argument("--clock", choices=latency.CLOCKS, default="cpu")
    main(parser.parse_args())
