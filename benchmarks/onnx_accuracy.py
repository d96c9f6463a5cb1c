"""What exports of the demo model say on unseen pairs, against torch: python benchmarks/onnx_accuracy.py COMPACT EXPORT..."""

import json
import sys
from pathlib import Path

import torch

from comp_cli import load, tasks
from comp_cli.cli.output import Output
from comp_cli.data.scene_pairs import ScenePairs
from comp_cli.files.store import folder_size
from comp_cli.models.dense import open_dense
from comp_cli.models.pairs import batches_of
from comp_cli.onnx.sessions import OnnxModel
from comp_cli.report.numbers import mib, percent
from comp_cli.tasks import comparison

PAIRS = 1000


def main(compact: Path, exports: list[Path]) -> None:
    out = Output()
    demo, task = open_dense("demo", out), tasks.TASKS["itm"]
    batches = batches_of(demo, ScenePairs(labelled=True), "evaluation", PAIRS, 8)
    labels = torch.cat([batch.labels for batch in batches])
    logits = {folder: comparison.evaluate(model, task, batches).outputs[0] for folder, model in models(demo, compact).items()}
    for folder in exports:
        names = list(json.loads((folder / "export.json").read_text())["graphs"])
        graphs = OnnxModel(folder, names)
        logits[folder] = torch.cat([torch.from_numpy(graphs.run(batch.inputs)[task.outputs[0]]) for batch in batches])
    rows = []
    for folder, found in logits.items():
        right = (found.argmax(-1) == labels).float().mean().item()
        error = (found - logits[compact]).abs()
        same = comparison.agreement(logits[compact], found)
        rows.append([str(folder), mib(folder_size(folder)), percent(right), percent(same), f"{error.max():.1e}"])
    columns = ["", "size", "accuracy", "prediction agreement with PyTorch", "max abs. error"]
    out.table(f"{PAIRS} pairs of the test split", columns, rows)


def models(demo, compact: Path) -> dict[Path, torch.nn.Module]:
    return {demo.source.folder: demo.runtime(demo.plan), compact: load(compact)}


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(argument) for argument in sys.argv[2:]])
