"""Accuracy of the methods on the demo task, on equal terms: same model, same calibration pairs, same test pairs, same steps.

    python benchmarks/accuracy.py                # training-free
    python benchmarks/accuracy.py --steps 200    # inside fine-tuning, each method with as many steps

One JSON line a run; runs that are in the file already are skipped, so it can be stopped and started at will. A seed chooses
the calibration pairs, the order of the training pairs and everything random. Nothing is chosen by what it scores: every run
is evaluated once, at its end, on the test split. Ends with a table (mean and standard deviation over seeds) and a picture.
"""

import argparse
import json
import statistics
import time
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

from comp_cli import tasks
from comp_cli.engine import flops
from comp_cli.engine.methods import METHODS
from comp_cli.errors import CompError
from comp_cli.output import Output
from comp_cli.search import Options, find
from comp_cli.training import Training
from comp_cli.workbench import Dense, ScenePairs, batches_of, open_dense

SCENES = ScenePairs(labelled=True)
SAMPLES = 128  # calibration pairs, of which all judge every stage
RATIOS = (0.5, 0.7, 0.8, 0.85)
ABLATED_AT = 0.8  # where parts of a method are switched off
FREE = [*METHODS, "comp --no-cip", "comp --no-explore", "comp --no-history", "comp --no-recover", "wanda --no-recover"]
LR = 4e-4
TRAINED = ["comp", "sjp", "wanda", "token", "random"]


def options_of(name: str, ratio: float, seed: int, steps: int) -> Options:
    """The options of a run. name: a method, and what is switched off, as on the command line."""
    method, *off = name.split(" --no-")
    switches = dict.fromkeys(off, False)
    samples = {"num_samples": SAMPLES, "stage_samples": SAMPLES, "batch_size": 32, "stages": 20 if steps else 40}
    training = Training(steps=steps, lr=LR, mixed_precision="bf16")
    return Options("demo", ratio, method=method, seed=seed, training=training, **samples, **switches)


def measure(dense: Dense, name: str, ratio: float, seed: int, steps: int, pairs: list) -> dict:
    """One run: prune, then decide every test pair."""
    begin = time.perf_counter()
    key = {"name": name, "steps": steps, "ratio": ratio, "seed": seed}
    try:
        found = find(dense, SCENES, options_of(name, ratio, seed, steps), None, Output("quiet"))
    except CompError as error:
        return key | {"accuracy": None, "why": error.message}
    scored = tasks.evaluate(found.model, dense.task, pairs)
    reached = 1 - flops.count(found.plan, dense.reference).total / flops.count(dense.plan, dense.reference).total
    facts = {"accuracy": scored.accuracy, "loss": scored.loss, "reached": reached, "samples": scored.samples}
    return key | facts | {"seconds": round(time.perf_counter() - begin, 1), "stages": [asdict(s) for s in found.stages]}


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


def table(found: dict, dense_accuracy: float) -> str:
    """Markdown, best at the highest ratio first."""
    lines = [
        f"Dense: {100 * dense_accuracy:.1f} %. Mean ± standard deviation over seeds.",
        "",
        "| method | " + " | ".join(f"{ratio:g}" for ratio in RATIOS) + " |",
        "|---" * (1 + len(RATIOS)) + "|",
    ]
    for method, cells in sorted(
        found.items(), key=lambda item: -max((c[0] for r, c in item[1].items() if r == 0.8), default=0)
    ):
        shown = [f"{100 * cells[r][0]:.1f} ± {100 * cells[r][1]:.1f}" if r in cells else "-" for r in RATIOS]
        lines.append(f"| `{method}` | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def plot(found: dict, dense_accuracy: float, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2))
    for method, cells in found.items():
        ratios = sorted(cells)
        means, spread = [100 * cells[r][0] for r in ratios], [100 * cells[r][1] for r in ratios]
        style = {"linewidth": 2.5} if method == "comp" else {"linewidth": 1, "alpha": 0.8}
        axes.errorbar(
            [100 * (1 - r) for r in ratios], means, spread, marker="o", markersize=3, capsize=2, label=method, **style
        )
    axes.axhline(100 * dense_accuracy, color="grey", linestyle=":", label="dense")
    axes.axhline(50, color="grey", linestyle="--", linewidth=0.8, label="chance")
    axes.invert_xaxis()
    axes.set_xlabel("FLOPs left, %")
    axes.set_ylabel("accuracy on test pairs, %")
    axes.legend(fontsize=7, ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main(arguments: argparse.Namespace) -> None:
    dense = open_dense("demo", Output("quiet"))
    pairs = batches_of(dense, SCENES, "evaluation", arguments.pairs, 32)
    dense_accuracy = tasks.evaluate(dense.runtime(dense.plan), dense.task, pairs).accuracy
    name = f"accuracy_{arguments.steps}_steps" if arguments.steps else "accuracy"
    output = arguments.output or Path(__file__).parent / "results" / f"{name}.jsonl"
    output.parent.mkdir(parents=True, exist_ok=True)
    runs = read_runs(output)
    with output.open("a") as file:
        for seed in arguments.seeds:
            for ratio in arguments.ratios:
                for name in arguments.methods or (TRAINED if arguments.steps else FREE):
                    key = (name, arguments.steps, ratio, seed)
                    if (
                        "--no-" in name
                        and ratio != ABLATED_AT
                        or key in {(r["name"], r["steps"], r["ratio"], r["seed"]) for r in read_runs(output)}
                    ):
                        continue
                    run = measure(dense, *key[:1], ratio, seed, arguments.steps, pairs)
                    print(json.dumps(run), file=file, flush=True)
                    print(name, ratio, seed, run["accuracy"], run.get("seconds"), flush=True)
    runs = read_runs(output)
    found = summary(runs)
    text = table(found, dense_accuracy)
    output.with_suffix(".md").write_text(text)
    plot(found, dense_accuracy, output.with_suffix(".png"))
    print(text)


def read_runs(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="JSON lines; else in benchmarks/results")
    parser.add_argument("--steps", type=int, default=0, help="training steps of every run")
    parser.add_argument("--methods", nargs="+", help='names, with switches in one word: "comp --no-cip"')
    parser.add_argument("--ratios", nargs="+", type=float, default=RATIOS)
    parser.add_argument("--seeds", nargs="+", type=int, default=None)
    parser.add_argument("--pairs", type=int, default=1000, help="test pairs behind every figure")
    given = parser.parse_args()
    given.seeds = given.seeds or range(3 if given.steps else 5)
    main(given)
