"""Accuracy of the methods on the demo task, on equal terms: same model, same calibration pairs, same test pairs, same steps.

    python benchmarks/accuracy.py
    python benchmarks/accuracy.py --model CLIP      # recall@1 among all test pairs; made by scripts/train_clip.py
    python benchmarks/accuracy.py --model CLIP --data FOLDER      # the same on pairs of your own, such as real pictures

Every method prunes without training; the main ones are then fine-tuned, each for as many steps on the same pairs. One JSON
line a result, with the commit that made it; those that are in the file already are skipped, so it can be stopped and started at
will, and several can work on one file (--seeds). A seed chooses the calibration pairs, the order of the training pairs and
everything random. Nothing is chosen by what it scores here: every model is evaluated once, at its end, on pairs of the test
split that no decision about comp has seen. Ends with tables (mean and standard deviation over seeds) and a picture.
"""

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path

from torch import nn

from comp_cli.cli.output import Output
from comp_cli.data.pairset import PairSet
from comp_cli.data.scene_pairs import ScenePairs
from comp_cli.data.sources import open_pairs
from comp_cli.engine import flops
from comp_cli.engine.methods import ENCODER, methods_for
from comp_cli.errors import CompError
from comp_cli.models.dense import Dense, by_model_size, open_dense
from comp_cli.models.pairs import Pairs, batches_of
from comp_cli.options import PruneOptions, Training
from comp_cli.search.run import search
from comp_cli.search.trainer import Trainer, training_batches
from comp_cli.tasks import comparison

METHODS = methods_for(ENCODER)
SAMPLES = 128  # calibration pairs, of which all judge every stage
RATIOS = (0.5, 0.7, 0.8, 0.85)
ABLATED_AT = 0.8  # where parts of a method are switched off
ABLATIONS = [
    "comp --no-sequential",
    "comp --no-recover",
    "comp --no-cip",
    "comp-paper --no-sequential",
    "comp-paper --no-recover",
    "comp-paper --no-cip",
    "comp-paper --no-explore",
    "comp-paper --no-history",
    "sjp --no-sequential",
    "sjp --no-recover",
]
# Half of the steps inside the stages, while masks fade: there CIT has something to weigh.
FADING = ["comp-paper --stage-share", "comp-paper --stage-share --no-cit"]
TRAINED = ["comp", "comp-paper", "sjp", "taylor", *FADING]
STEPS, TRAINED_SEEDS = 100, 3  # of 32 pairs, at the default rate
TEST_SEED = 7  # of the scenes: seed 0 has been looked at while comp was made
SETTINGS: dict[str, int | float | str] = {
    "samples": SAMPLES,
    "stages": 40,
    "steps": STEPS,
    "batch": 32,
    "share": 0.5,
    "test seed": TEST_SEED,
    "recovery": "in sequence",
}
TEXT_TOKENS = 21  # of a text at most: a description of four things. One scene in a hundred has five, and its text is cut


@dataclass(frozen=True)
class Subject:
    """A model, the pairs that it is calibrated, tuned and judged on, and the settings that its results depend on."""

    dense: Dense
    pairs: Pairs
    settings: dict[str, int | float | str]

    @classmethod
    def open(cls, model: str, data: Path | None = None, split: str = "test") -> "Subject":
        """`demo`, which matches captions, or a folder with a dual encoder, which retrieves descriptions of scenes, or the texts
        of a folder with tables for the splits, judged on the one that is called `split`."""
        dense = open_dense(model, Output("quiet"), text_tokens=TEXT_TOKENS)
        if model == "demo":
            return cls(dense, ScenePairs(labelled=True), SETTINGS)
        weights = hashlib.sha256((Path(model) / "model.safetensors").read_bytes()).hexdigest()
        own = {"task": dense.task.name, "text tokens": TEXT_TOKENS, "weights": weights}
        if data is None:
            return cls(dense, ScenePairs(labelled=True, described=True), SETTINGS | own)
        own |= {"data": tables_of(data), "judged on": split}
        return cls(dense, judged_on(split, data), SETTINGS | own)

    @property
    def identity(self) -> dict[str, str]:
        """What a line was made with: a hash of the settings, by which finished runs are known, and the commit."""
        digest = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:8]
        return {"settings": digest, "commit": commit()}


def tables_of(data: Path) -> str:
    """A hash of the tables in a folder of pairs: of the texts, and of which pictures serve what."""
    digest = hashlib.sha256()
    for table in sorted(data.glob("*.jsonl")):
        digest.update(table.name.encode() + table.read_bytes())
    return digest.hexdigest()


def judged_on(split: str, data: Path) -> PairSet:
    """Pairs that calibrate and tune with the split train and are judged on another, though comp would take validation pairs."""
    pairs = open_pairs(str(data), progress=Output("quiet"))
    if missing := {"train", split} - pairs.splits.keys():
        raise SystemExit(f"{data}: expected train.jsonl and {split}.jsonl, found no split {' and '.join(sorted(missing))}.")
    return replace(pairs, splits={name: pairs.splits[name] for name in ("train", split)})


@cache
def commit() -> str:
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"


def options_of(name: str, ratio: float, seed: int, training: Training) -> PruneOptions:
    """The options of a run. name: a method, and what is switched off, as on the command line."""
    method, *switches = name.split(" --")
    pairs = SETTINGS["samples"]
    samples = {"num_samples": pairs, "stage_samples": pairs, "batch_size": 32, "stages": SETTINGS["stages"]}
    off = {switch.removeprefix("no-"): False for switch in switches if switch.startswith("no-")}
    return PruneOptions("demo", ratio, method=method, seed=seed, training=training, **samples, **off)


def measure(subject: Subject, name: str, ratio: float, seed: int, steps: int, pairs: list) -> Iterator[dict]:
    """Prune, then decide every test pair; the same again after fine-tuning for `steps`, if any."""
    begin, dense = time.perf_counter(), subject.dense
    share = SETTINGS["share"] if name in FADING else 0.0
    training = Training(
        steps=steps,
        lr=by_model_size(dense, 1e-4, 1e-5),
        stage_share=share,
        batch_size=SETTINGS["batch"],
        mixed_precision="bf16",
    )
    options = options_of(name, ratio, seed, training if share else Training())
    key = {"name": name, "ratio": ratio, "seed": seed, **subject.identity}

    def result(model: nn.Module, steps: int) -> dict:
        scored = comparison.evaluate(model, dense.task, pairs)
        reached = 1 - flops.count(found.plan, dense.reference).total / flops.count(dense.plan, dense.reference).total
        facts = {"accuracy": scored.metric(dense.task), "loss": scored.loss, "reached": reached, "samples": scored.samples}
        return key | {"steps": steps} | facts | {"seconds": round(time.perf_counter() - begin, 1)}

    reported = set()
    try:
        found = search(dense, subject.pairs, options, None, Output("quiet"))
        reported.add(steps if share else 0)
        compared = [look.to_json() for look in found.looks]
        yield result(found.model, max(reported)) | {"stages": [asdict(stage) for stage in found.stages], "compared": compared}
        if steps and not share:
            batches = partial(training_batches, dense, subject.pairs, training, seed)
            trainer = Trainer(dense, training, ratio, batches, seed=seed)
            trainer.take(found.plan, found.model)
            tuned = trainer.tune(Output("quiet"), lambda: None)
            yield result(tuned, steps)
    except CompError as error:
        for missing in wanted_steps(name, steps) - reported:
            yield {**key, "steps": missing, "accuracy": None, "why": error.message}


def wanted_steps(name: str, steps: int) -> set[int]:
    """Fine-tuning steps of the results that a run gives."""
    return {steps} if name in FADING else {0, steps}


def summary(runs: list[dict]) -> dict[str, dict[float, tuple[float, float, int]]]:
    """Per method and ratio: mean and standard deviation of the accuracy, and the number of seeds."""
    found = defaultdict(lambda: defaultdict(list))
    for run in runs:
        if run["accuracy"] is not None:
            found[run["name"]][run["ratio"]].append(run["accuracy"])
    return {
        method: {r: (statistics.mean(a), statistics.stdev(a) if len(a) > 1 else 0.0, len(a)) for r, a in by_ratio.items()}
        for method, by_ratio in found.items()
    }


def cell(mean: float, spread: float, seeds: int) -> str:
    """In percent; one seed has no spread."""
    return f"{100 * mean:.1f}" + (f" ± {100 * spread:.1f}" if seeds > 1 else "") + f" ({seeds})"


def table(found: dict) -> str:
    """Markdown, best at 0.8 first."""
    ratios = sorted({ratio for cells in found.values() for ratio in cells})
    lines = ["| method | " + " | ".join(f"{ratio:g}" for ratio in ratios) + " |", "|---" * (1 + len(ratios)) + "|"]
    for method, cells in sorted(found.items(), key=lambda item: -item[1].get(0.8, (0,))[0]):
        shown = [cell(*cells[r]) if r in cells else "-" for r in ratios]
        lines.append(f"| `{method}` | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def plot(runs: list[dict], subject: Subject, dense_accuracy: float, path: Path) -> None:
    """Accuracy over the FLOPs that are left, training-free and fine-tuned side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    colours = {name: f"C{index % 10}" for index, name in enumerate(METHODS)}
    for axes, steps in zip(panels, (0, STEPS), strict=True):
        found = summary([run for run in runs if run["steps"] == steps and run["name"] in METHODS])
        for method, cells in found.items():
            ratios = sorted(cells)
            means, spread = [100 * cells[r][0] for r in ratios], [100 * cells[r][1] for r in ratios]
            style = {"linewidth": 2.5, "zorder": 3} if method == "comp" else {"linewidth": 1, "alpha": 0.8}
            style |= {"color": colours[method], "linestyle": "-" if METHODS.index(method) < 10 else "--"}
            left = [100 * (1 - r) for r in ratios]
            axes.errorbar(left, means, spread, marker="o", markersize=3, capsize=2, label=method, **style)
        axes.axhline(100 * dense_accuracy, color="grey", linestyle=":", label="dense")
        if subject.dense.task.has_negatives:
            axes.axhline(50, color="grey", linestyle="--", linewidth=0.8, label="chance")
        axes.invert_xaxis()
        axes.set_xlabel("FLOPs left, %")
        axes.set_title(f"fine-tuned, {steps} steps" if steps else "training-free")
    panels[0].set_ylabel(f"{subject.dense.task.metric} on test pairs, %")
    panels[0].legend(fontsize=7, ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main(arguments: argparse.Namespace) -> None:
    SETTINGS["samples"] = arguments.samples
    subject = Subject.open(arguments.model, arguments.data, arguments.split)
    dense = subject.dense
    pairs = batches_of(dense, subject.pairs, "evaluation", arguments.pairs, 32, TEST_SEED)
    judged = comparison.evaluate(dense.runtime(dense.plan), dense.task, pairs)
    dense_accuracy = judged.metric(dense.task)
    named = arguments.data.resolve().name if arguments.data else dense.family.name
    usual = "accuracy" if arguments.model == "demo" else f"accuracy_{named}" + "_validation" * (arguments.split == "validation")
    output = arguments.output or Path(__file__).parent / "results" / f"{usual}.jsonl"
    output.parent.mkdir(parents=True, exist_ok=True)
    wanted = [
        (name, ratio, seed)
        for seed in arguments.seeds
        for ratio in arguments.ratios
        for name in arguments.methods
        if name in METHODS or (ratio == ABLATED_AT and seed < TRAINED_SEEDS)
    ]
    for name, ratio, seed in wanted:
        steps = STEPS if name in TRAINED and seed < TRAINED_SEEDS and not arguments.training_free else 0
        done = {(run["name"], run["ratio"], run["seed"], run["steps"]) for run in read_runs(output, subject)}
        if all((name, ratio, seed, s) in done for s in wanted_steps(name, steps)):
            continue
        for run in measure(subject, name, ratio, seed, steps, pairs):
            if (name, ratio, seed, run["steps"]) not in done:
                with output.open("a") as file:
                    file.write(json.dumps(run) + "\n")
            print(name, ratio, seed, run["steps"], run["accuracy"], run.get("seconds"), flush=True)
    runs = read_runs(output, subject)
    whole, at = [run for run in runs if run["name"] in METHODS], [run for run in runs if run["ratio"] == ABLATED_AT]
    switched = f"With one part switched off, at {ABLATED_AT:g}"
    parts = {
        "Training-free": [run for run in whole if run["steps"] == 0],
        f"Fine-tuned for {STEPS} steps of 32 pairs": [run for run in whole if run["steps"] == STEPS],
        f"{switched}, training-free": beside(ABLATIONS, [run for run in at if run["steps"] == 0]),
        f"{switched}, {STEPS} steps (`--stage-share`: half of them in the stages)": beside(
            FADING, [run for run in at if run["steps"] == STEPS]
        ),
    }
    tables = [f"{what}:\n\n{table(summary(part))}" for what, part in parts.items() if part]
    commits = ", ".join(sorted({run["commit"] for run in runs}))
    dense_says = f"Dense: {dense.task.metric} {100 * dense_accuracy:.1f} %, {judged.samples} {arguments.split} pairs."
    said = f"{dense_says} Mean ± standard deviation (seeds)."
    text = f"{said}\nMade by {commits}.\n\n" + "\n".join(tables)
    output.with_suffix(".md").write_text(text)
    plot(runs, subject, dense_accuracy, output.with_suffix(".png"))
    print(text)


def beside(names: list[str], runs: list[dict]) -> list[dict]:
    """The runs of these variants and, if there are any, of the methods that they are variants of."""
    variants = [run for run in runs if run["name"] in names]
    whole = {name.split(" ")[0] for name in names}
    return variants and variants + [run for run in runs if run["name"] in whole]


def read_runs(path: Path, subject: Subject) -> list[dict]:
    """The results with today's settings, one of each: two processes may make the same. A line that a kill has torn is none."""
    runs = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            run = json.loads(line)
        except ValueError:
            continue
        if run.get("settings") == subject.identity["settings"]:
            runs.setdefault(tuple(run[key] for key in ("name", "ratio", "seed", "steps")), run)
    return list(runs.values())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo", help="demo (the default), or the folder of scripts/train_clip.py")
    parser.add_argument("--data", type=Path, help="a folder with train.jsonl and test.jsonl, as of scripts/write_emoji.py")
    parser.add_argument("--split", choices=["test", "validation"], default="test", help="what --data is judged on")
    parser.add_argument(
        "--output", type=Path, help="default: accuracy.jsonl, accuracy_clip.jsonl, accuracy_DATA.jsonl in benchmarks/results"
    )
    parser.add_argument("--methods", nargs="+", default=[*METHODS, *ABLATIONS, *FADING], help='such as comp, "comp --no-cip"')
    parser.add_argument("--ratios", nargs="+", type=float, default=RATIOS)
    parser.add_argument("--seeds", nargs="+", type=int, default=range(5))
    parser.add_argument("--samples", type=int, default=SAMPLES, help="calibration pairs")
    parser.add_argument("--training-free", action="store_true", help="make no fine-tuned results")
    parser.add_argument("--pairs", type=int, help="test pairs behind every figure: 1000 scenes, or all of --data")
    parsed = parser.parse_args()
    if parsed.model != "demo" and not Path(parsed.model).is_dir():
        parser.error(f"no folder {parsed.model}: make it with python scripts/train_clip.py --output {parsed.model}")
    if parsed.data is None and parsed.split != "test":
        parser.error("--split needs --data: of the scenes, the test split judges.")
    if parsed.data is not None and parsed.model == "demo":
        parser.error("--data needs --model with the folder of a dual encoder: the demo knows scenes only.")
    parsed.pairs = parsed.pairs or (1000 if parsed.data is None else sys.maxsize)
    main(parsed)
