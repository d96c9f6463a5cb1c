"""An estimate of `comp prune --dry-run` beside the folder that a run wrote: sizes, FLOPs, and latency of one sample.

    OMP_NUM_THREADS=1 comp prune MODEL --ratio 0.5 --effort fast -o COMPACT
    OMP_NUM_THREADS=1 python benchmarks/estimates.py MODEL COMPACT

MODEL is demo, or what `python scripts/full_size.py MODEL` wrote. Latencies are medians of CPU time on one thread, in rounds in
which both models take turns.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
import transformers

import comp_cli
from comp_cli.data.batches import random_inputs
from comp_cli.models.described import describe_dense
from comp_cli.progress import Silent


def latencies(models: list, inputs: dict[str, torch.Tensor], rounds: int) -> list[float]:
    """Milliseconds of each; the first round warms up."""
    taken: list[list[float]] = [[] for _ in models]
    with torch.inference_mode():
        for _ in range(rounds + 1):
            for model, times in zip(models, taken, strict=True):
                begin = time.process_time()
                model(**inputs)
                times.append(1000 * (time.process_time() - begin))
    return [statistics.median(times[1:]) for times in taken]


def main(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    found = json.loads((arguments.compact / "comp_report.json").read_text())
    expected = comp_cli.prune(arguments.model, ratio=found["options"]["ratio"], method=found["options"]["method"], dry_run=True)
    model = describe_dense(arguments.model, Silent())
    stock = getattr(transformers, model.architecture).from_pretrained(model.source.folder).eval()
    inputs = random_inputs(model.hf_config, model.family, 1, model.text_tokens)
    real = latencies([stock, comp_cli.load(arguments.compact)], inputs, arguments.rounds)
    rows = {
        "parameters": (expected.params.compact, found["params"]["compact"]),
        "weights, bytes": (expected.size_bytes.compact, found["size_bytes"]["compact"]),
        "FLOPs": (expected.flops.compact, found["flops"]["compact"]),
    }
    if (ms := expected.estimate.latency_ms) is not None:
        rows |= {"dense, ms": (ms.dense, real[0]), "compact, ms": (ms.compact, real[1])}
    print(f"estimated in {expected.seconds} s\n\n| | estimate | real | off |\n|---|---|---|---|")
    for name, (one, other) in rows.items():
        print(f"| {name} | {one:,.6g} | {other:,.6g} | {100 * (one / other - 1):+.1f} % |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("compact", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    main(parser.parse_args())
