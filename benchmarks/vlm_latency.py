"""Latency, memory and the cost of choosing, of large vision-language models whose image tokens leave; weights are random.

    python benchmarks/vlm_latency.py --size small                              # on a CPU: the decoder, process time, one thread
    python benchmarks/vlm_latency.py --size 7b --device cuda --dtype bf16 --batches 1,8,32

576 image tokens are a LLaVA-1.5's; 2880 are a LLaVA-NeXT's, of five crops (with 48 newlines). The text is of 40 tokens. All
models share the dense one's weights. A line is added to OUTPUT.jsonl for every model, batch and number of image tokens as it is
done, and none is measured twice; OUTPUT.md is made of all lines.

Columns: `prefill` is the whole forward pass over the prompt with pictures, `decoder` the same behind encoded pictures, `first
token` is `generate` of one, `step` a token behind the prompt. Efficiency is the measured speed-up of a column over that of its
FLOPs (all pairs of tokens counted). `choosing` is the share of the prefill's time that the runtime spends on choosing tokens
and moving what is left; `stage I` what the choice before the decoder, [CLS] row and clusters included, costs as a share of the
vision tower's time.
"""

import argparse
import copy
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.modeling_outputs import BaseModelOutputWithPooling

from comp_cli.commands.bench import machine
from comp_cli.data.batches import random_inputs
from comp_cli.engine import flops
from comp_cli.engine.token_schedules import mean_tokens, stages
from comp_cli.errors import UsageError
from comp_cli.families import find_family
from comp_cli.measure import decoding, timing
from comp_cli.plan import Plan, dense_plan
from comp_cli.runtime import modeling_comp_vlm as runtime

CLIP_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
SMALL_TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TOWERS = {  # with the side of an image and of a patch: 24 x 24 patches in all
    "tiny": SMALL_TOWER | {"image_size": 96, "patch_size": 4},
    "small": SMALL_TOWER | {"image_size": 96, "patch_size": 4},
    "1b": CLIP_L | {"image_size": 336, "patch_size": 14},
    "7b": CLIP_L | {"image_size": 336, "patch_size": 14},
}
DECODERS = {  # width, feed-forward channels, layers, heads, key-value heads, vocabulary
    "tiny": (64, 160, 6, 4, 2, 512),
    "small": (768, 2048, 8, 12, 12, 512),
    "1b": (2048, 5632, 22, 32, 4, 32064),
    "7b": (4096, 11008, 32, 32, 32, 32064),
}
METHODS = ("dense", "vitcop-64", "vitcop-192", "divprune-64", "visionzip-64", "stride-64", "pyramiddrop-64")
TEXT = 35  # and what a template puts around it: 40
PARTS = ("comp_open", "drop", "payload", "comp_arranged", "layer_mask")  # of the runtime, timed apart
FIGURES = ("prefill", "decoder", "first_token", "step")


def build(size: str, images: int, device: str, dtype: torch.dtype, attention: str) -> Any:
    """A LLaVA of random weights, or for 2,880 image tokens a LLaVA-NeXT."""
    width, channels, layers, heads, groups, words = DECODERS[size]
    text = {"model_type": "llama", "hidden_size": width, "intermediate_size": channels, "num_hidden_layers": layers}
    text |= {"num_attention_heads": heads, "num_key_value_heads": groups, "vocab_size": words, "max_position_embeddings": 8192}
    vision = TOWERS[size] | {"model_type": "clip_vision_model"}
    kind, more = ("Llava", {}) if images == 576 else ("LlavaNext", {"image_grid_pinpoints": [[2 * vision["image_size"]] * 2]})
    config = getattr(transformers, f"{kind}Config")(
        vision_config=vision, text_config=text, image_token_index=words - 1, vision_feature_layer=-2, **more
    )
    config._attn_implementation = attention
    torch.manual_seed(0)
    with torch.device(device):
        found = getattr(transformers, f"{kind}ForConditionalGeneration")._from_config(config, dtype=dtype)
    found.config.architectures = [f"{kind}ForConditionalGeneration"]
    return found.eval().requires_grad_(False)


class Described:
    """A dense model as comp describes it: plans, FLOPs, inputs."""

    def __init__(self, dense: Any):
        self.dense, self.config = dense, dense.config.to_dict()
        self.family, self.architecture, _ = find_family(self.config)
        shapes = {name: tuple(tensor.shape) for name, tensor in dense.state_dict().items()}
        self.reference = flops.reference(self.config, self.family, shapes, TEXT)
        self.plan = dense_plan(self.config, self.family, self.architecture)

    @property
    def image_tokens(self) -> int:
        return self.reference.tokens["image"]

    def plan_of(self, method: str) -> Plan:
        """The plan of "vitcop-64" and its like, the number of 576 image tokens."""
        if method == "dense":
            return self.plan
        name, _, of_576 = method.rpartition("-")
        layers = len(self.plan.tower("language").layers)
        found = stages(
            name,
            tokens=round(int(of_576) * self.image_tokens / 576),
            share=None,
            image_tokens=self.image_tokens,
            layers=layers,
            class_token=True,
            fixed_size=True,
        )
        return Plan(self.plan.architecture, self.plan.towers, found)

    def can_be(self, method: str) -> bool:
        """Whether a method reaches its number of tokens here: some see all tokens in their first layers."""
        try:
            return bool(self.plan_of(method).stages) or method == "dense"
        except UsageError as error:
            print(error)
            return False

    def compact(self, plan: Plan) -> Any:
        """A model of a plan around the same weights."""
        if plan == self.plan:
            return self.dense
        shared = {id(tensor): tensor for tensor in chain(self.dense.parameters(), self.dense.buffers())}
        model = copy.deepcopy(self.dense, shared)
        runtime.make_compact(model, plan.comp_block(self.family, self.config))
        return model

    def prompt(self, batch: int) -> timing.Inputs:
        weight = decoding.weight_of(self.dense)
        made = random_inputs(self.dense.config, self.family, batch, TEXT)
        return decoding.placed(decoding.prompt_of(made), weight)

    def counts(self, plan: Plan) -> dict[str, float]:
        """FLOPs of a plan for one sample, and its mean image tokens."""
        whole, layers = flops.count(plan, self.reference), len(plan.tower("language").layers)
        return {
            "mean_tokens": mean_tokens(plan.stages, self.image_tokens, layers) if plan.stages else self.image_tokens,
            "prefill_flops": whole.total,
            "decoder_flops": whole.tower("language") + self.reference.step,
            "step_flops": flops.decode_step(plan, self.reference).total,
        }


def clock_of(device: str) -> Callable[[], float]:
    return time.perf_counter if device == "cuda" else time.process_time


def settled(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def pixels_of(prompt: timing.Inputs) -> timing.Inputs:
    return {name: prompt[name] for name in ("pixel_values", "image_sizes") if name in prompt}


def encoded(model: Any, prompt: timing.Inputs) -> dict[str, Any]:
    """The prompt with its pictures encoded, as `generate` hands them on."""
    pixels = pixels_of(prompt)
    with torch.inference_mode():
        features = model.model.get_image_features(**pixels, return_dict=True).pooler_output
    image = BaseModelOutputWithPooling(pooler_output=features)
    return {name: tensor for name, tensor in prompt.items() if name not in pixels} | {"mm_encoder_outputs": {"image": image}}


def runner(figure: str, model: Any, prompt: timing.Inputs, device: str) -> Callable[[], Any]:
    """What is timed for a figure: a call that returns when the work is done."""
    if figure == "prefill":
        whole = decoding.prefill_runner(model)
        return lambda: whole(prompt)
    if figure == "tower":
        pixels, inner = pixels_of(prompt), model.model
        return lambda: (torch.inference_mode()(inner.get_image_features)(**pixels), settled(device))
    if figure == "first_token":
        first = decoding.first_token_runner(model)
        return lambda: first(prompt)
    given = encoded(model, prompt)

    def decoder() -> None:
        fresh = given | {"mm_encoder_outputs": dict(given["mm_encoder_outputs"])}
        with torch.inference_mode():
            model(**fresh, use_cache=True, logits_to_keep=1)
        settled(device)

    return decoder


def taken(run: Callable[[], Any], rounds: int, clock: Callable[[], float], warm_up: int = 1) -> list[float]:
    """Milliseconds of each round, after those to warm up."""
    found = []
    for _ in range(rounds + warm_up):
        begin = clock()
        run()
        found.append(1000 * (clock() - begin))
    return found[warm_up:]


@contextmanager
def parts_clocked(device: str) -> Iterator[dict[str, list[float]]]:
    """Milliseconds of each call of the runtime's parts; on a GPU the work before and in each is waited for."""
    clock, spent = clock_of(device), {}
    owners = {
        "comp_open": runtime.DroppingDecoder,
        "drop": runtime.Selection,
        "payload": runtime.ClassAttention,
        "comp_arranged": runtime.ImageFeatures,
        "layer_mask": runtime,
    }
    stock = {name: getattr(owner, name) for name, owner in owners.items()}

    def clocked(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            settled(device)
            begin = clock()
            found = stock[name](*args, **kwargs)
            settled(device)
            spent.setdefault(name, []).append(1000 * (clock() - begin))
            return found

        return call

    for name, owner in owners.items():
        setattr(owner, name, clocked(name))
    try:
        yield spent
    finally:
        for name, owner in owners.items():
            setattr(owner, name, stock[name])


def choosing(model: Any, prompt: timing.Inputs, device: str, rounds: int) -> dict[str, float]:
    """Milliseconds of the runtime's parts in a prefill, medians over rounds; `stages` of each stage."""
    seen: list[dict[str, list[float]]] = []
    for _ in range(rounds + 1):
        with parts_clocked(device) as spent:
            decoding.read(model, prompt)
        seen.append(spent)
    seen = seen[1:]
    found = {name: statistics.median(sum(one.get(name, [0.0])) for one in seen) for name in PARTS}
    found["comp_arranged"] -= found["payload"]  # which is called in it
    of_stages = zip(*(one["drop"] for one in seen), strict=True)
    return found | {f"stage {place}": statistics.median(times) for place, times in enumerate(of_stages)}


def memory(model: Any, prompt: timing.Inputs, device: str) -> dict[str, float]:
    """MiB: the cache behind the prompt, and on a GPU the peak of prompt and one step."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    found = decoding.read(model, prompt)
    kv = decoding.cache_bytes(found.past_key_values) / 2**20
    peak = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else None
    return {"kv_mib": kv} | ({} if peak is None else {"peak_mib": peak})


def interleaved(figure: str, models: dict[str, Any], prompt: timing.Inputs, device: str, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every model, one of each round, after one to warm up; none of a model that runs out of memory."""
    found: dict[str, list[float]] = {}
    runners: dict[str, Callable[[], Any]] = {}
    for number in range(rounds + 1):
        for method in list(models) if number % 2 else list(models)[::-1]:
            try:
                if number == 0:
                    runners[method] = runner(figure, models[method], prompt, device)
                if method in runners:
                    spent = taken(runners[method], 1, clock_of(device), warm_up=0)
                    found.setdefault(method, []).extend(spent * (number > 0))
            except torch.OutOfMemoryError:
                print(f"{method}: out of memory in {figure}", flush=True)
                runners.pop(method, None)
                found.pop(method, None)
                torch.cuda.empty_cache()
    return found


def measure(described: Described, methods: list[str], batch: int, device: str, rounds: int) -> Iterator[dict[str, Any]]:
    """A line for each method: medians of interleaved rounds; decoding and memory one method after another."""
    prompt = described.prompt(batch)
    models = {method: described.compact(described.plan_of(method)) for method in methods}
    times = {figure: interleaved(figure, models, prompt, device, rounds) for figure in ("prefill", "decoder", "first_token")}
    tower = statistics.median(interleaved("tower", {"dense": described.dense}, prompt, device, rounds)["dense"])
    for method, model in models.items():
        plan = described.plan_of(method)
        line: dict[str, Any] = {"method": method, "tower_ms": tower} | described.counts(plan)
        line |= {"stages": [stage.to_json() for stage in plan.stages]}
        line |= {f"{figure}_ms": found[method] for figure, found in times.items() if method in found}
        try:
            line |= memory(model, prompt, device)
            steps = decoding.Steps(model, prompt)
            spent = taken(lambda steps=steps: steps({}), rounds, clock_of(device))
            line["step_ms"] = [ms / decoding.STEPS for ms in spent]
            del steps
            if method != "dense":
                line["choosing_ms"] = choosing(model, prompt, device, rounds)
        except torch.OutOfMemoryError:
            line["failed"] = "out of memory"
            torch.cuda.empty_cache()
        yield line


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def key(line: dict[str, Any]) -> tuple[Any, ...]:
    return line["size"], line["images"], line["batch"], line["method"]


def shown(number: float | None, digits: int) -> str:
    return "" if number is None else f"{number:.{digits}f}"


def efficiency(dense: dict[str, Any], line: dict[str, Any], figure: str) -> str:
    """Measured speed-up, that of the FLOPs, and their ratio."""
    if line["method"] == "dense" or f"{figure}_ms" not in dense or f"{figure}_ms" not in line:
        return ""
    faster = timing.speedup(dense[f"{figure}_ms"], line[f"{figure}_ms"]).value
    said = dense[f"{figure}_flops"] / line[f"{figure}_flops"]
    return f"{faster:.2f} of {said:.2f}x: {faster / said:.2f}"


def costs(line: dict[str, Any], prefill: float | None) -> list[str]:
    """What choosing costs, of the prefill, and stage I of the vision tower."""
    if "choosing_ms" not in line or prefill is None:
        return ["", ""]
    spent = line["choosing_ms"]
    whole, first = sum(spent[name] for name in PARTS), spent["payload"] + spent["comp_arranged"] + spent["stage 0"]
    early = f"{first:.2f} ms, {100 * first / line['tower_ms']:.1f} %" if line["stages"][0]["layer"] == 0 else ""
    return [f"{whole:.2f} ms, {100 * whole / prefill:.1f} %", early]


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown."""
    dense = {key(line)[:3]: line for line in lines if line["method"] == "dense"}
    head = ["size, image tokens, batch", "method", "mean tokens", "prefill ms", "efficiency", "decoder ms", "efficiency"]
    head += ["first token ms", "step ms", "KV MiB", "peak MiB", "choosing", "stage I"]
    out = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for line in lines:
        before = dense.get(key(line)[:3], {})
        median = {figure: statistics.median(line[f"{figure}_ms"]) for figure in FIGURES if f"{figure}_ms" in line}
        row = [f"{line['size']}, {line['images']}, {line['batch']}", line["method"], f"{line['mean_tokens']:.1f}"]
        for figure in ("prefill", "decoder"):
            row += [shown(median.get(figure), 1), efficiency(before, line, figure)]
        row += [shown(median.get("first_token"), 1), shown(median.get("step"), 2), shown(line.get("kv_mib"), 1)]
        row += [line.get("failed") or shown(line.get("peak_mib"), 0), *costs(line, median.get("prefill"))]
        out.append("| " + " | ".join(row) + " |")
    where = lines[-1]["machine"]
    rounds = min(len(line["prefill_ms"]) for line in lines if "prefill_ms" in line)
    clock = "wall clock" if where["device"].startswith("cuda") else "process time"
    out += ["", f"{where['name']}, threads: {where['threads']}, torch {where['torch']}, transformers {where['transformers']}, "]
    out[-1] += f"{lines[-1]['dtype']}, {lines[-1]['attention']} attention; medians of {clock}, {rounds} rounds or more."
    return "\n".join(out) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(DECODERS), default="small")
    parser.add_argument("--images", default="576,2880", help="image tokens, of 576 and 2880")
    parser.add_argument("--batches", default="1")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/vlm_latency"))
    given = parser.parse_args()
    torch.set_num_threads(1 if given.device == "cpu" else torch.get_num_threads())
    transformers.logging.set_verbosity_error()
    lines, file = given.output.with_suffix(".jsonl"), given.output.with_suffix(".md")
    where = asdict(machine(torch.device(given.device)))
    for images in map(int, given.images.split(",")):
        described = None
        gc.collect()  # models and their hooks hold each other
        for batch in map(int, given.batches.split(",")):
            done = {key(line) for line in read(lines)}
            methods = [m for m in given.methods.split(",") if (given.size, images, batch, m) not in done]
            if not methods:
                continue
            described = described or Described(
                build(given.size, images, given.device, getattr(torch, given.dtype), given.attention)
            )
            if not (methods := [method for method in methods if described.can_be(method)]):
                continue
            facts = {"size": given.size, "images": images, "batch": batch}
            for line in measure(described, methods, batch, given.device, given.rounds):
                made = facts | line | {"dtype": given.dtype, "attention": given.attention, "machine": where}
                with lines.open("a") as out:
                    print(json.dumps(made), file=out, flush=True)
            file.write_text(table(read(lines)))
            print(table(read(lines)), flush=True)


if __name__ == "__main__":
    main()
