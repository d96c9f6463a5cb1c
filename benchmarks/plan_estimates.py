"""Which estimate says best what a plan loses on other pairs: rank correlation over candidate plans of the demo model.

    python benchmarks/plan_estimates.py

Candidates of the method comp (no cut, and cuts at four layers, four shares each) are judged on 128 calibration pairs in several
ways. Each way's ranks are compared (Spearman) with those of the loss on 1,000 validation scenes after all of the recovery.
"""

import argparse
import json
from itertools import product
from pathlib import Path

import torch
from accuracy import TEXT_TOKENS
from torch import Tensor

from comp_cli.cli.output import Output
from comp_cli.data.scene_pairs import ScenePairs
from comp_cli.engine import allocation
from comp_cli.engine.statistics import prices
from comp_cli.models.dense import Dense, open_dense
from comp_cli.models.pairs import batches_of
from comp_cli.plan import Plan
from comp_cli.search.calibration import Calibration, HeldOut, gather_statistics, refit
from comp_cli.tasks import comparison

RATIOS, LAYERS, SHARES = (0.5, 0.8), (0, 1, 2, 3), (0.2, 0.35, 0.5, 0.65)


class ValidationScenes(ScenePairs):
    SPLITS = {"calibration": "train", "evaluation": "validation"}


def ranks(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.double).argsort().argsort().double()


def spearman(first: list[float], second: list[float]) -> float:
    """Rank correlation; no ties."""
    return float(torch.corrcoef(torch.stack([ranks(first), ranks(second)]))[0, 1])


def removed_prices(plan: Plan, priced: dict) -> float:
    """The price of all units that a plan removes."""
    return sum(
        float(price)
        for (tower, index, part), all_ in priced.items()
        for unit, price in enumerate(all_)
        if unit not in plan.tower(tower).layers[index].kept(part)
    )


def judged(dense: Dense, plan: Plan, batches: list, pairs: list, tools: tuple) -> dict[str, float]:
    """What each estimate says of a plan, and "loss": what it loses on other pairs."""
    found, priced, held_out, calibration = tools
    model = dense.runtime(plan, found.grams)
    refit(dense, model, plan, batches)
    same, other = (comparison.evaluate(model, dense.task, some) for some in (batches, pairs))
    known = comparison.evaluate(dense.whole, dense.task, batches)
    distance = comparison.feature_distance(*(dense.task.features(run.outputs) for run in (known, same))).item()
    return {
        "loss": other.loss,
        "prices of what goes": removed_prices(plan, priced),
        "loss and distance, recovered part by part": calibration.measure(plan).loss,
        "loss and distance, recovered in sequence": same.loss + distance,
        "distance, recovered in sequence": distance,
        "distance, recovered in sequence on the other half": held_out.loss(plan)[0],
    }


def main(arguments: argparse.Namespace) -> None:
    dense = open_dense("demo", Output("quiet"), text_tokens=TEXT_TOKENS)
    scenes = ValidationScenes(labelled=True)
    batches = batches_of(dense, scenes, "calibration", 128, 32, arguments.seed)
    pairs = batches_of(dense, scenes, "evaluation", 1000, 32)
    found = gather_statistics(dense, batches, Output("quiet"), rises=True, seed=arguments.seed)
    priced = prices(dense.whole, dense.family, dense.plan, found)
    calibration = Calibration(dense, batches, found.grams, None, arguments.seed, priced)
    calibration.measure(dense.plan)
    tools = (found, priced, HeldOut(dense, batches, found.grams, True), calibration)
    space = allocation.Space(dense.plan, dense.reference, priced)
    result: dict[str, dict[str, float]] = {}
    for ratio in RATIOS:
        cuts = [{}, *({"vision": allocation.Cut(*cut)} for cut in product(LAYERS, SHARES))]
        plans = [space.candidate(ratio, each) for each in cuts]
        rows = [judged(dense, plan, batches, pairs, tools) for plan in plans if plan is not None]
        losses = [row["loss"] for row in rows]
        result[f"{ratio:g}"] = {"plans": len(rows)} | {
            name: round(spearman([row[name] for row in rows], losses), 2) for name in rows[0] if name != "loss"
        }
        print(ratio, result[f"{ratio:g}"], flush=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "plan_estimates.json")
    main(parser.parse_args())
