"""Runs that one process or several do: `python tests/process_runs.py PLACE OUTPUT CASE...`, alone or by accelerate launch.

PLACE holds the dense models and a table, see `prepare`; every case writes OUTPUT/CASE, and OUTPUT/CASE.json with its report.
A case "slopes of CASE" writes the gradient of its first step of tuning. "shares of CASE" writes what each process holds while
it tunes, and the weights of a tuning beside those of one that went on from its second step.
"""

import json
import sys
from pathlib import Path
from typing import Any

import tiny

TRAINED = {"steps": 3, "train_batch_size": 5, "lr": 1e-3}  # of five pairs: no number of processes divides them
SIZES = {"num_samples": 7, "stage_samples": 7, "eval_samples": 4, "batch_size": 3, "text_tokens": 12, "device": "cpu"}
CASES: dict[str, tuple[str, dict[str, Any]]] = {  # a model and what is asked for
    "matching": ("blip", {"ratio": 0.5}),
    "matching, tuned": ("blip", {"ratio": 0.5, "label_column": "match", **TRAINED}),
    "two pairs, tuned": ("clip", {"ratio": 0.5, **TRAINED, "train_batch_size": 2}),  # one of three processes has none
    "paper": ("blip", {"ratio": 0.4, "method": "comp-paper", "stages": 4}),
    "paper, tuned in stages": ("blip", {"ratio": 0.4, "method": "comp-paper", "stages": 4, **TRAINED, "stage_share": 0.7}),
    "taylor": ("blip", {"ratio": 0.3, "method": "taylor"}),
    "retrieval, tuned": ("clip", {"ratio": 0.4, **TRAINED}),
    "zero-shot, tuned": ("clip", {"ratio": 0.4, "task": "zero-shot", **TRAINED}),
    "retrieval of blip, tuned": ("blip-contrastive", {"ratio": 0.4, "task": "retrieval", **TRAINED}),
    "siglip": ("siglip", {"ratio": 0.4, **TRAINED}),
    "images": ("clip-vision", {"ratio": 0.4, **TRAINED}),
    "texts": ("clip-text", {"ratio": 0.4, **TRAINED}),
    "caption, tuned": ("blip-caption", {"ratio": 0.4, **TRAINED}),
    "vqa, tuned": ("blip-vqa", {"ratio": 0.4, "answer_column": "answer", **TRAINED}),
    "llava": ("llava", {"ratio": 0.4, "answer_column": "answer"}),
    "llava, tuned": ("llava", {"ratio": 0.4, "answer_column": "answer", **TRAINED}),
    "llava-next, tuned": ("llava-next", {"ratio": 0.4, "answer_column": "answer", **TRAINED}),
    "qwen2-vl, tuned": ("qwen2-vl", {"ratio": 0.25, **TRAINED}),
    "uniform": ("llava", {"ratio": 0.3, "uniform": True}),
    "by number": ("llava", {"method": "vitcop", "tokens": 9}),
    "by number, measured": ("llava", {"method": "vitcop", "tokens": 9, "answer_column": "answer", "eval_samples": 5}),
    "by number, tuned": (
        "llava",
        {
            "tokens": 9,
            "answer_column": "answer",
            "eval_samples": 5,
            "refit": True,
            "num_samples": 7,
            "batch_size": 3,
            **TRAINED,
        },
    ),
}
SCENES = {"matching", "paper", "paper, tuned in stages", "taylor", "qwen2-vl, tuned", "uniform"}  # others: the table


def prepare(place: Path, *cases: str) -> None:
    """Write what the cases need: texts and answers are of several lengths, and two images have one text."""
    place.mkdir(exist_ok=True)
    words = ["a red circle", "a blue square left of a red circle", "two small circle", "a large square above two circle"]
    tiny.table(
        place,
        text=lambda n: words[n % 4] + " and a red square" * (n % 3),
        match=lambda n: n % 2,
        answer=lambda n: ["red", "two blue", "a large red circle"][n % 3],
    )
    for model in dict.fromkeys(CASES[case.removeprefix("slopes of ").removeprefix("shares of ")][0] for case in cases):
        tiny.write(model, place / model)


def given_of(place: Path, case: str) -> dict[str, Any]:
    """Arguments of `comp_cli.prune` for a case."""
    model, asked = CASES[case]
    given = {"task": tiny.TASKS[model]} if model in tiny.TASKS else {}
    given |= {} if case.startswith("by number") else SIZES
    if case not in SCENES and case != "by number":
        given |= {"data": str(place / "table.jsonl"), "label_column": "", "answer_column": ""}
    return given | asked


def run(place: Path, output: Path, case: str) -> None:
    import comp_cli
    from comp_cli.search.processes import is_main_process

    report = comp_cli.prune(place / CASES[case][0], output=output / case, **given_of(place, case))
    if is_main_process():
        (output / f"{case}.json").write_text(json.dumps(report.to_json()))


def trainer_of(place: Path, case: str, steps: int) -> Any:
    """A trainer of the dense model, whose weights were shaken: the features of an untouched one are at the minimum of their
    distance from the teacher's."""
    import torch

    from comp_cli.cli.output import Output
    from comp_cli.models.dense import open_dense
    from comp_cli.models.pairs import choose_pairs
    from comp_cli.options import DataOptions, ResolvedTraining
    from comp_cli.search.processes import join
    from comp_cli.search.trainer import Trainer, training_batches

    join(torch.device("cpu"))
    given, quiet = given_of(place, case), Output("quiet")
    dense = open_dense(str(place / CASES[case][0]), quiet, text_tokens=12, task=given.get("task"))
    training = ResolvedTraining(steps=steps, batch_size=5, lr=1e-3)
    columns = {name: given.get(name) for name in ("label_column", "answer_column")}
    pairs = choose_pairs(dense, DataOptions(str(place / "table.jsonl"), **columns), quiet)
    trainer = Trainer(dense, training, 0.5, lambda skip: training_batches(dense, pairs, training, 0, skip))
    random = torch.Generator().manual_seed(0)
    trainer.state = {name: w + 0.02 * torch.randn(w.shape, generator=random) for name, w in trainer.state.items()}
    return trainer


def write_slopes(place: Path, output: Path, case: str) -> None:
    """What the optimizer of a process is given in the first step of tuning the dense model."""
    from safetensors.torch import save_file
    from torch import Tensor

    from comp_cli.cli.output import Output
    from comp_cli.search.processes import is_main_process
    from comp_cli.search.sharding import whole

    trainer, found = trainer_of(place, case, 1), {}

    def remember(parameters: list[Tensor], limit: float) -> None:
        found.update({str(number): whole(p.grad).clone() for number, p in enumerate(parameters) if p.grad is not None})

    trainer.accelerator.clip_grad_norm_ = remember
    trainer.tune(Output("quiet"), lambda: None)
    if is_main_process():
        save_file(found, output / f"slopes of {case}.safetensors")


def write_shares(place: Path, output: Path, case: str) -> None:
    """Bytes of weights, slopes and moments that a process holds; weights of two tunings, one of which goes on."""
    from safetensors.torch import save_file

    from comp_cli.cli.output import Output
    from comp_cli.search.processes import is_main_process, rank

    quiet, held, saved = Output("quiet"), {}, {}

    def size(tensors: Any) -> int:
        own = (tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors)
        storages = {
            each.data_ptr(): each for each in (tensor.untyped_storage() for tensor in own)
        }  # slopes of a layer have one
        return sum(each.nbytes() for each in storages.values())

    first = trainer_of(place, case, 4)
    clip = first.accelerator.clip_grad_norm_

    def weigh(parameters: list[Any], limit: float) -> Any:
        held["weights"] = size(parameters)
        held["slopes"] = size(p.grad for p in parameters if p.grad is not None)
        return clip(parameters, limit)

    def save() -> None:
        held["moments"] = size(first.moments["exp_avg"].values())
        tensors = {name: tensor.clone() for name, tensor in first.to_tensors().items()}  # of the first process
        if first.done == 2:
            saved.update(tensors)

    first.accelerator.clip_grad_norm_ = weigh
    first.tune(quiet, save)
    second = trainer_of(place, case, 4)
    second.restore(second.plan, 2, saved)
    second.tune(quiet, lambda: None)
    (output / f"shares of {case} {rank()}.json").write_text(json.dumps(held))
    if is_main_process():
        for name, trainer in (("whole", first), ("gone on", second)):
            save_file(trainer.state, output / f"{name} {case}.safetensors")


WRITERS = {"slopes of ": write_slopes, "shares of ": write_shares}


def main(place: str, output: str, *cases: str) -> None:
    for case in cases:
        kind = next((begin for begin in WRITERS if case.startswith(begin)), "")
        WRITERS.get(kind, run)(Path(place), Path(output), case.removeprefix(kind))


if __name__ == "__main__":
    main(*sys.argv[1:])
