"""What each effort of `comp prune` costs, and what it is worth: accuracy on the demo task, and seconds of one core.

    OMP_NUM_THREADS=1 python benchmarks/effort.py

Every model is pruned by the search of `comp prune demo --ratio R --effort E --seed S`, and judged once, on 1,000 scenes
that nothing else has seen (test seed 7). Seconds are CPU seconds of search and recovery. One JSON line a result; those that
are in the file already are skipped. Ends with a table.
"""

import argparse
import json
import resource
import statistics
from collections import defaultdict
from pathlib import Path

from accuracy import TEST_SEED, cell

from comp_cli.cli.output import Output
from comp_cli.commands.prune import resolve_defaults
from comp_cli.data.scene_pairs import ScenePairs
from comp_cli.models.dense import open_dense
from comp_cli.models.pairs import batches_of
from comp_cli.options import EFFORTS, PruneOptions
from comp_cli.search.run import search
from comp_cli.tasks import comparison

RATIOS, SEEDS, PAIRS = (0.3, 0.5, 0.7), (0, 1, 2), 1000
RESULTS = Path(__file__).parent / "results" / "effort.jsonl"


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def known(path: Path) -> dict[tuple[str, float, int], dict]:
    lines = path.read_text().splitlines() if path.exists() else []
    return {(run["effort"], run["ratio"], run["seed"]): run for run in map(json.loads, lines)}


def table(runs: list[dict], ratios: list[float]) -> str:
    """Accuracy, mean and standard deviation over the seeds, and CPU seconds, mean over all."""
    found, seconds = defaultdict(list), defaultdict(list)
    for run in runs:
        found[run["effort"], run["ratio"]].append(run["accuracy"])
        seconds[run["effort"]].append(run["seconds"])
    lines = [
        "| effort | " + " | ".join(f"{ratio:g}" for ratio in ratios) + " | search, CPU s |",
        "|---" * (2 + len(ratios)) + "|",
    ]
    for effort in (effort for effort in EFFORTS if effort in seconds):
        each = [found[effort, ratio] for ratio in ratios]
        cells = [cell(statistics.mean(a), statistics.stdev(a) if len(a) > 1 else 0.0, len(a)) if a else "-" for a in each]
        lines.append(f"| `{effort}` | {' | '.join(cells)} | {statistics.mean(seconds[effort]):.0f} |")
    return "\n".join(lines) + "\n"


def main(arguments: argparse.Namespace) -> None:
    dense, pairs = open_dense("demo", Output("quiet")), ScenePairs(labelled=True)
    judges = batches_of(dense, pairs, "evaluation", PAIRS, 32, TEST_SEED)
    whole = comparison.evaluate(dense.whole, dense.task, judges).metric(dense.task) or 0.0
    wanted = [(e, ratio, seed) for seed in arguments.seeds for e in arguments.efforts for ratio in arguments.ratios]
    for effort, ratio, seed in wanted:
        if (effort, ratio, seed) in known(arguments.output):
            continue
        options = resolve_defaults(dense, pairs, PruneOptions("demo", ratio, effort=effort, seed=seed), Output("quiet"))
        begin = cpu_seconds()
        found = search(dense, pairs, options, None, Output("quiet"))
        seconds = round(cpu_seconds() - begin, 1)
        accuracy = comparison.evaluate(found.model, dense.task, judges).metric(dense.task)
        line = {"effort": effort, "ratio": ratio, "seed": seed, "accuracy": accuracy, "seconds": seconds}
        with arguments.output.open("a") as file:
            file.write(json.dumps(line | {"looks": len(found.looks)}) + "\n")
        print(line, flush=True)
    print(f"Dense: {100 * whole:.1f} %.\n\n{table(list(known(arguments.output).values()), list(arguments.ratios))}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--efforts", nargs="+", choices=EFFORTS, default=list(EFFORTS))
    parser.add_argument("--ratios", nargs="+", type=float, default=RATIOS)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--output", type=Path, default=RESULTS)
    main(parser.parse_args())
