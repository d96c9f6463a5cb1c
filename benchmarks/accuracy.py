"""Accuracy of the methods on the demo task, on equal terms: same model, same calibration pairs, same test pairs, no training.

    python benchmarks/accuracy.py --output benchmarks/results/accuracy.jsonl

One JSON line a run; runs that are in the file already are skipped, so it can be stopped and started at will. A seed chooses
the calibration pairs and everything random. Ends with a table (mean and standard deviation over seeds) and a picture.
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
from comp_cli.prune import Options, find_plan
from comp_cli.workbench import Dense, ScenePairs, batches_of, open_dense

SCENES = ScenePairs(labelled=True)
SAMPLES = 256  # calibration pairs, of which all judge every stage
RATIOS = (0.5, 0.7, 0.8, 0.85)


def measure(dense: Dense, method: str, recover: bool, ratio: float, seed: int, pairs: list) -> dict:
    """One run: prune, then decide every test pair."""
    begin = time.perf_counter()
    samples = {"num_samples": SAMPLES, "stage_samples": SAMPLES, "batch_size": 32, "stages": 40}
    options = Options("demo", ratio, method=method, recover=recover, seed=seed, **samples)
    key = {"method": method, "recover": recover, "ratio": ratio, "seed": seed}
    try:
        plan, grams, stages = find_plan(dense, SCENES, options, None, Output("quiet"))
    except CompError as error:
        return key | {"accuracy": None, "why": error.message}
    found = tasks.evaluate(dense.runtime(plan, grams), dense.task, pairs)
    reached = 1 - flops.count(plan, dense.reference).total / flops.count(dense.plan, dense.reference).total
    facts = {"accuracy": found.accuracy, "loss": found.loss, "reached": reached, "samples": found.samples}
    return key | facts | {"seconds": round(time.perf_counter() - begin, 1), "stages": [asdict(s) for s in stages]}


def name_of(run: dict) -> str:
    return run["method"] + ("" if run["recover"] else " --no-recover")


def summary(runs: list[dict]) -> dict[str, dict[float, tuple[float, float, int]]]:
    """Per method and ratio: mean and standard deviation of the accuracy, and the number of seeds."""
    found = defaultdict(lambda: defaultdict(list))
    for run in runs:
        if run["accuracy"] is not None:
            found[name_of(run)][run["ratio"]].append(run["accuracy"])
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
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    runs = [json.loads(line) for line in arguments.output.read_text().splitlines()] if arguments.output.exists() else []
    done = {(r["method"], r["recover"], r["ratio"], r["seed"]) for r in runs}
    wanted = [(m, True) for m in arguments.methods] + [(m, False) for m in arguments.methods if m == "wanda"]
    with arguments.output.open("a") as file:
        for seed in range(arguments.seeds):
            for method, recover in wanted:
                for ratio in arguments.ratios:
                    if (method, recover, ratio, seed) in done:
                        continue
                    run = measure(dense, method, recover, ratio, seed, pairs)
                    runs.append(run)
                    print(json.dumps(run), file=file, flush=True)
                    print(name_of(run), ratio, seed, run["accuracy"], run.get("seconds"), flush=True)
    found = summary(runs)
    text = table(found, dense_accuracy)
    arguments.output.with_suffix(".md").write_text(text)
    plot(found, dense_accuracy, arguments.output.with_suffix(".png"))
    print(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/accuracy.jsonl"))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--ratios", nargs="+", type=float, default=RATIOS)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=2000, help="test pairs behind every figure")
    main(parser.parse_args())
