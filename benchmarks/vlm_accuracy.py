"""Answers of `demo-vlm` by what was removed: image tokens by every method at the same mean number, and tokens and parameters
together by ratio.

    python benchmarks/vlm_accuracy.py                     # image tokens, on test questions
    python benchmarks/vlm_accuracy.py --split validation  # the same on others, which choices may look at
    python benchmarks/vlm_accuracy.py --part ratios       # CoMP, tokens only, parameters only; training-free and tuned

A question is right where the first token that the model writes is the answer, which all answers have one of. Colours ask for
something that every patch of a thing says; numbers need all things, small ones too. Runs that are in the output already are not
made again.
"""

import argparse
import json
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accuracy import commit
from torch import Tensor, nn

from comp_cli.cli.output import Output
from comp_cli.commands.prune_tokens import stages_of
from comp_cli.data import scenes
from comp_cli.data.scene_pairs import ScenePairs
from comp_cli.engine import flops
from comp_cli.engine.token_schedules import TOKEN_METHODS, mean_tokens
from comp_cli.errors import CompError, DeadEnd, UsageError
from comp_cli.models.dense import Dense, open_dense
from comp_cli.models.described import image_shape
from comp_cli.models.pairs import batches_of
from comp_cli.options import PruneOptions, TokenOptions, Training
from comp_cli.plan import Plan
from comp_cli.runtime.token_rules import STAGE_RULES, Choice, StageRule, View, cosines, needs_of, standing_for
from comp_cli.search.calibration import refit
from comp_cli.search.run import search
from comp_cli.search.trainer import Trainer, training_batches
from comp_cli.topology.prompts import as_asked

SHARES = {"1/3": 1 / 3, "2/9": 2 / 9, "1/9": 1 / 9, "1/18": 1 / 18}  # of the image tokens, mean over layers
RATIOS = (0.5, 0.7, 0.8)
QUESTIONS = 1000
SEED = 7  # of the test questions: `comp prune` judges by those of seed 0
BATCH = 50
# Methods that drop once inside the decoder, and the layer: of 32 layers the published one is 2, of six the first that can be.
INSIDE_ONCE = {"fastv": 1, "dart": 1}
SEEDED = ("random-token",)


def standing(rule: str) -> StageRule:
    """A rule whose tokens stand for those that go, as `cover`'s do."""

    def choose(view: View, keep: list[int], **settings: Any) -> Choice:
        chosen = STAGE_RULES[rule].choose(view, keep, **settings).kept
        return standing_for(view, chosen, cosines(view.states), keep)

    return StageRule(choose, needs_of(rule, {}))


def alone(rule: str) -> StageRule:
    """A rule whose tokens stand for themselves."""
    return StageRule(lambda view, keep: replace(STAGE_RULES[rule].choose(view, keep), weights=None))


# What weights are worth: the method, and the rule in place of its own.
WEIGHTS = {
    "cover without weights": ("cover", alone("cover")),
    "tops with weights": ("tops", standing("tops")),
    "divprune with weights": ("divprune", standing("divprune")),
}
# The same methods with output projections fitted anew behind their stages (--refit), on so many calibration pairs.
REFITTED = {f"{name}, refitted": name for name in ("cover", "vitcop", "pyramiddrop", "tops", "divprune", "random-token")}
PAIRS = 256
TUNED = {f"{name}, then tuned": method for name, method in REFITTED.items()}  # behind that; where they are asked for
STEPS = {"tokens": 900, "ratios": 100}  # of tuning, where somebody is tuned
KINDS = ("colour", "number")


@dataclass(frozen=True)
class Questions:
    """Prompts about pictures, a row of `pixels` for each; ids of the answers, and kinds."""

    pixels: Tensor
    prompts: list[str]
    answers: list[int]
    kinds: list[str]

    @classmethod
    def of(cls, dense: Dense, split: str, count: int, seed: int) -> "Questions":
        """`count` questions as `scenes.ask` asks them."""
        processor, chosen = dense.processor, list(scenes.images(split, count, seed))
        pictures = [scenes.render(*one) for one in chosen]
        pixels = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
        asked = [scenes.ask(random.Random(background), scene) for scene, background in chosen]
        prompts = [as_asked(processor, question, "{}") for question, _ in asked]
        answers = [processor.tokenizer.convert_tokens_to_ids(answer) for _, answer in asked]
        return cls(
            pixels, prompts, answers, [{"what": "colour", "how": "number"}[question.split()[0]] for question, _ in asked]
        )


@torch.inference_mode()
def right_answers(model: nn.Module, dense: Dense, questions: Questions) -> dict[str, float]:
    """Share of right answers by kind, and of all ("asked")."""
    model.eval()
    processor, image = dense.processor, dense.processor.image_token
    right: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    tokens = dense.reference.tokens["image"]
    for start in range(0, len(questions.prompts), BATCH):
        part = slice(start, start + BATCH)
        prompts = [prompt.replace(image, image * tokens) for prompt in questions.prompts[part]]
        text = processor.tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
        inputs = {name: text[name] for name in ("input_ids", "attention_mask")}
        said = model(**inputs, pixel_values=questions.pixels[part], logits_to_keep=1).logits[:, -1].argmax(-1)
        for kind, answer, one in zip(questions.kinds[part], questions.answers[part], said.tolist(), strict=True):
            right[kind].append(one == answer)
    every = [one for found in right.values() for one in found]
    return {kind: statistics.mean(found) for kind, found in right.items()} | {"asked": statistics.mean(every), "of": len(every)}


def saved(dense: Dense, plan: Plan) -> dict[str, float]:
    """FLOPs reduction of the whole model, and of the decoder's part of it, at the reference input."""
    before, after = (flops.count(each, dense.reference) for each in (dense.plan, plan))
    return {"ratio": round(1 - after.total / before.total, 4)}


def with_stages(dense: Dense, method: str, share: float, seed: int) -> Plan:
    """The plan of a method that keeps so many of the image tokens, mean over layers. Raises UsageError where it cannot."""
    images = image_shape(dense.hf_config.to_dict(), dense.family)
    if own := (REFITTED | TUNED).get(method):
        return with_stages(dense, own, share, seed)
    if method in WEIGHTS:
        own, rule = WEIGHTS[method]
        STAGE_RULES[method] = rule
        plan = with_stages(dense, own, share, seed)
        return replace(plan, stages=tuple(replace(stage, rule=method) for stage in plan.stages))
    if method in INSIDE_ONCE:
        layer = INSIDE_ONCE[method]
        kept = round((share * images.layers - layer) / (images.layers - layer) * images.image_tokens)
        wanted = TokenOptions(token_stages=f"{layer}:{kept}")
    else:
        wanted = TokenOptions(tokens=round(share * images.image_tokens))
    return replace(dense.plan, stages=stages_of(images, method, wanted, seed, True))


def token_runs(dense: Dense, arguments: argparse.Namespace) -> Iterator[tuple[dict[str, Any], Any]]:
    """Of every method and share the key of a run, and what makes its plan."""
    for method in arguments.methods:
        steps = arguments.steps if method in TUNED else 0
        for name in arguments.shares:
            for seed in arguments.seeds if method in (*SEEDED, *REFITTED, *TUNED) else [0]:
                make = partial(with_stages, dense, method, SHARES[name], seed)
                yield {"name": method, "at": name, "seed": seed, "steps": steps}, make


def model_of(dense: Dense, method: str, plan: Plan, seed: int, steps: int = 0) -> nn.Module:
    """The model of a plan; of a method that refits, fitted on pairs of that seed; tuned, if it is to be."""
    model, pairs = dense.runtime(plan), ScenePairs(labelled=True, asked=True)
    if method in REFITTED | TUNED:
        refit(dense, model, plan, batches_of(dense, pairs, "calibration", PAIRS, 16, seed))
    return tuned(dense, plan, model, steps, saved(dense, plan)["ratio"], seed) if steps else model


def tuned(dense: Dense, plan: Plan, model: nn.Module, steps: int, ratio: float, seed: int) -> nn.Module:
    """The model after so many steps."""
    training = Training(steps=steps, lr=1e-4, batch_size=32, mixed_precision="bf16")
    batches = partial(training_batches, dense, ScenePairs(labelled=True, asked=True), training, seed)
    trainer = Trainer(dense, training, ratio, batches, seed=seed)
    trainer.take(plan, model)
    return trainer.tune(Output("quiet"), lambda: None)


RATIO_METHODS = {  # name -> options of `comp prune`
    "comp": {},
    "comp, tokens by attention": {"tokens_method": "attention"},
    "comp, parameters only": {"modes": ("language_params", "vision_params")},
    "comp, all modes": {"modes": ("image_tokens", "language_params", "vision_params")},
    "wanda": {"method": "wanda"},
    "taylor": {"method": "taylor"},
}
TOKENS_ONLY = ("cover", "cover, refitted", "vitcop")  # as many of them leave as the ratio asks for


def with_tokens_of(dense: Dense, method: str, ratio: float, seed: int) -> Plan:
    """The plan of a method of tokens alone with which as many stay as the ratio of FLOPs allows. Raises DeadEnd where none."""
    tokens = dense.reference.tokens["image"]
    for kept in range(tokens - 1, 0, -1):
        with suppress(UsageError):  # a schedule of several stages knows a least and a most
            plan = with_stages(dense, method, kept / tokens, seed)
            if saved(dense, plan)["ratio"] >= ratio:
                return plan
    raise DeadEnd(f"ratio {ratio} cannot be reached by tokens alone.")


def found_by_ratio(dense: Dense, name: str, ratio: float, seed: int, steps: int) -> Iterator[tuple[int, Plan, nn.Module]]:
    """Steps, plan and model; of both, training-free and tuned."""
    pairs = ScenePairs(labelled=True, asked=True)
    if name in TOKENS_ONLY:
        plan = with_tokens_of(dense, name, ratio, seed)
        model = model_of(dense, name, plan, seed)
    else:
        samples = {"num_samples": 128, "stage_samples": 128, "batch_size": 32}
        options = PruneOptions("demo-vlm", ratio, seed=seed, **samples, **RATIO_METHODS[name])
        found = search(dense, pairs, options, None, Output("quiet"))
        plan, model = found.plan, found.model
    yield 0, plan, model
    if steps:
        yield steps, plan, tuned(dense, plan, model, steps, ratio, seed)


def table(runs: list[dict[str, Any]], columns: list[str], kinds: dict[str, str]) -> str:
    """Markdown: for each name and column the kinds of questions, percent, mean over seeds and their spread."""
    cells: dict[str, dict[str, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        cells[run["name"]][run["at"]].append(run)

    def cell(found: list[dict], kind: str) -> str:
        values = [100 * run[kind] for run in found if run.get(kind) is not None]
        if not values:
            return "-"
        return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")

    head = [f"{column} {title}" for column in columns for title in kinds.values()]
    lines = ["| | " + " | ".join(head) + " |", "|---" * (1 + len(head)) + "|"]
    place = columns[len(columns) // 2]

    def at_place(name: str) -> float:
        return statistics.mean([run.get("asked") or 0 for run in cells[name].get(place, [])] or [0])

    for name in sorted(cells, key=at_place, reverse=True):
        lines.append(f"| {name} | " + " | ".join(cell(cells[name].get(c, []), kind) for c in columns for kind in kinds) + " |")
    return "\n".join(lines) + "\n"


def read_runs(path: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    lines = path.read_text().splitlines() if path.exists() else []
    return [run for run in map(json.loads, lines) if run["settings"] == settings]


def main(arguments: argparse.Namespace) -> None:
    dense = open_dense(arguments.model, Output("quiet"))
    questions = Questions.of(dense, arguments.split, arguments.questions, SEED)
    settings = {"split": arguments.split, "questions": arguments.questions, "seed": SEED, "model": dense.source.name}
    where = {"tokens": "vlm_accuracy", "ratios": "vlm_accuracy_ratios"}[arguments.part]
    usual = Path(__file__).parent / "results" / f"{where}{'' if arguments.split == 'test' else '_' + arguments.split}.jsonl"
    output = arguments.output or usual
    done = {tuple(run[k] for k in ("name", "at", "seed", "steps")): run for run in read_runs(output, settings)}

    def write(run: dict[str, Any]) -> None:
        line = run | {"settings": settings, "commit": commit()}
        print(json.dumps(run), flush=True)
        with output.open("a") as file:
            file.write(json.dumps(line) + "\n")

    if ("dense", "1/1", 0, 0) not in done:
        write({"name": "dense", "at": "1/1", "seed": 0, "steps": 0} | right_answers(dense.whole, dense, questions))
    if arguments.part == "tokens":
        images = image_shape(dense.hf_config.to_dict(), dense.family)
        for key, make in token_runs(dense, arguments):
            if tuple(key.values()) in done:
                continue
            try:
                plan = make()
            except CompError as error:
                write(key | {"asked": None, "why": error.message})
                continue
            mean = mean_tokens(plan.stages, images.image_tokens, images.layers)
            facts = {"mean": round(mean, 2), "kept": [(stage.layer, stage.keep) for stage in plan.stages]} | saved(dense, plan)
            model = model_of(dense, key["name"], plan, key["seed"], key["steps"])
            write(key | right_answers(model, dense, questions) | facts)
    else:
        for name in arguments.methods:
            for ratio in RATIOS:
                for seed in arguments.seeds:
                    key = {"name": name, "at": f"{ratio:g}", "seed": seed}
                    if all((*key.values(), steps) in done for steps in (0, arguments.steps)):
                        continue
                    begin = time.perf_counter()
                    try:
                        for steps, plan, model in found_by_ratio(dense, name, ratio, seed, arguments.steps):
                            facts = saved(dense, plan) | {"seconds": round(time.perf_counter() - begin, 1)}
                            if (*key.values(), steps) not in done:
                                write(key | {"steps": steps} | right_answers(model, dense, questions) | facts)
                    except CompError as error:
                        write(key | {"steps": 0, "asked": None, "why": error.message})
                        if arguments.steps:
                            write(key | {"steps": arguments.steps, "asked": None, "why": error.message})
    output.with_suffix(".md").write_text(report(read_runs(output, settings), settings))


def report(runs: list[dict[str, Any]], settings: dict[str, Any]) -> str:
    """The tables of one file of runs."""
    dense = next(run for run in runs if run["name"] == "dense")
    rest = [run for run in runs if run["name"] != "dense"]
    columns = [at for at in (*SHARES, *(f"{ratio:g}" for ratio in RATIOS)) if any(run["at"] == at for run in rest)]
    shown = ", ".join(f"{kind} {100 * dense[kind]:.1f} %" for kind in ("asked", *KINDS))
    text = f"demo-vlm, {settings['questions']} {settings['split']} questions; dense: {shown}.\n"
    for steps in sorted({run["steps"] for run in rest}):
        part = [run for run in rest if run["steps"] == steps]
        text += f"\n{f'Tuned for {steps} steps' if steps else 'Training-free'}: colours and numbers together, %\n\n"
        text += table(part, columns, {"asked": ""})
        text += "\nColours and numbers apart, %\n\n"
        text += table(part, columns, {"colour": "colour", "number": "number"})
    return text + f"\nMade by {', '.join(sorted({run['commit'] for run in runs}))}.\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo-vlm")
    parser.add_argument("--part", choices=["tokens", "ratios"], default="tokens")
    parser.add_argument("--split", choices=["test", "validation"], default="test")
    parser.add_argument("--methods", nargs="+", help="default: all of the part")
    parser.add_argument("--shares", nargs="+", choices=SHARES, default=list(SHARES), help="of the part tokens")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--questions", type=int, default=QUESTIONS)
    parser.add_argument("--steps", type=int, help=f"of tuning; default: {STEPS}; in the part ratios 0 for none")
    parser.add_argument("--output", type=Path)
    parsed = parser.parse_args()
    every = {"tokens": (*TOKEN_METHODS, *WEIGHTS, *REFITTED), "ratios": (*RATIO_METHODS, *TOKENS_ONLY)}
    parsed.methods = parsed.methods or list(every[parsed.part])
    parsed.steps = STEPS[parsed.part] if parsed.steps is None else parsed.steps
    main(parsed)
