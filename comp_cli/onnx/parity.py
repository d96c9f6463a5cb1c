"""The gate of an export: what the graphs say against what torch says, on real and on random inputs."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor

from .. import tasks
from ..data.batches import random_inputs
from ..data.rows import Pair
from ..families import Family
from ..models.dense import collator
from ..models.pairs import Pairs, generated_pairs
from ..report.export import ParityRow
from ..tasks import comparison
from ..topology import input_sizes, with_one_image
from .sessions import OnnxModel

BATCH = 8  # of most cases
DECISIONS = 64  # real pairs more, where weights are rounded and decisions may change
LONG = 5  # captions in a row make a long text


@dataclass(frozen=True)
class Tolerance:
    """Largest difference of the task's output, and least share of equal decisions on the real pairs."""

    atol: float
    agreement: float


# For scores of size 1 to 10, as a matching head gives. On 1,000 pairs the compact demo model needs 6e-6, 0.06 and 1.1 (fp32,
# fp16, int8): where rounding changes which token is dropped, the difference jumps.
TOLERANCES = {
    "fp32": Tolerance(1e-4, 1.0),
    "fp16": Tolerance(0.2, 0.98),
    "bf16": Tolerance(1.0, 0.95),
    "int8": Tolerance(2.0, 0.95),
}
# For embeddings and logits of words, in units of their largest number.
RELATIVE = {
    "fp32": Tolerance(5e-4, 1.0),
    "fp16": Tolerance(0.02, 0.98),
    "bf16": Tolerance(0.1, 0.95),
    "int8": Tolerance(0.2, 0.95),
    "int4": Tolerance(0.4, 0.9),
}


def tolerance(task: tasks.Task, rounding: str, atol: float | None) -> Tolerance:
    """What is allowed to differ; `atol` instead of the usual, where it is given."""
    usual = (RELATIVE if task.relative else TOLERANCES)[rounding]
    return usual if atol is None else replace(usual, atol=atol)


@dataclass(frozen=True)
class Case:
    """Inputs, and what torch makes of them: name of the output -> values."""

    name: str  # "real" or "random"
    inputs: dict[str, Tensor]
    expected: dict[str, Tensor]


def make_cases(
    model: Any,
    task: tasks.Task,
    family: Family,
    processor: Any,
    longest: int,
    pairs: list[Pair],
    *,
    split: bool,
    whole: int | None = None,
) -> list[Case]:
    """Batches 1 to 8, short and long texts, with and without padding; split: one image for eight texts as well. Eight pairs
    at least; more decide whether decisions agree. Texts that are made long have `longest` tokens, those of the pairs up to
    `whole`, if it is more."""
    mixed = [replace(pair, text=" ".join([pair.text] * LONG)) if i % 2 else pair for i, pair in enumerate(pairs[:BATCH])]
    # Where all samples of a batch are candidates, the decisions of many are asked for together.
    size = BATCH if task.paired_inputs else len(pairs)
    parts = [pairs[:1], pairs[1:3], mixed, *(pairs[i : i + size] for i in range(BATCH, len(pairs), size))]
    made_long = collator(family, processor, longest, task, model.config)
    collate = replace(made_long, max_text=max(longest, whole or 0))
    given = [("real", (made_long if part is mixed else collate)(part).inputs) for part in parts]
    if family.topology.one_for_all(split):
        inputs = given[2][1]
        given.append(("real", with_one_image(inputs)))
    for batch, tokens, padded in (1, longest, 0), (3, longest, longest // 2), (2, min(4, longest), 1):
        given.append(("random", random_inputs(model.config, family, batch, tokens, padded=padded)))
    with torch.inference_mode():
        return [Case(name, *family.topology.case(family, model, task, inputs, split)) for name, inputs in given]


def real_pairs(
    source: Pairs | None, task: tasks.Task, rounded: bool, ready: Callable[[Pair], Pair] = lambda pair: pair
) -> list[Pair]:
    """Pairs for the cases, made `ready`, from a set of pairs or generated: more of them where weights are rounded."""
    count = BATCH + DECISIONS * rounded
    if source is None:
        return list(map(ready, generated_pairs(task, labelled=False).read("calibration", count)))
    found = list(map(ready, source.read("evaluation", count, accepts=task.accepts)))
    return list(islice(cycle(found), max(BATCH, len(found))))


def check(
    onnx_model: OnnxModel, cases: list[Case], task: tasks.Task, advance: Callable[[], None] = lambda: None
) -> list[ParityRow]:
    """One row for each output of each case."""
    rows = []
    for case in cases:
        outputs = onnx_model.run(case.inputs)
        found = {name: torch.from_numpy(outputs[name]) for name in case.expected}
        agreed = comparison.agreement(task.decisions(case.expected), task.decisions(found))
        judged = [name for name in found if name in task.judged]
        for name in found:
            same = agreed if name == judged[-1] else None
            size = None
            if name in judged:
                size = case.expected[name].abs().max().item() if task.relative else 1.0
            rows.append(compare(case, name, case.expected[name], found[name], size, same))
        advance()
    return rows


def compare(
    case: Case, output: str, expected: Tensor, found: Tensor, size: float | None, same_decision: float | None
) -> ParityRow:
    """`size`: what the error is divided by before it is judged; None where it is not."""
    error = (expected - found).abs()
    largest = error.max().item() if torch.isfinite(error).all() else float("inf")
    images, texts, tokens = input_sizes(case.inputs)
    judged = size and largest / size
    return ParityRow(output, case.name, images, texts or images, tokens, largest, error.mean().item(), judged, same_decision)


def agreement(rows: list[ParityRow]) -> float:
    """Share of the real pairs on which graph and torch decide alike."""
    real = [(row.same_decision, row.batch) for row in rows if row.same_decision is not None and row.inputs == "real"]
    return sum(same * batch for same, batch in real) / sum(batch for _, batch in real)


def problem(rows: list[ParityRow], tolerance: Tolerance) -> str | None:
    """What is wrong, in a sentence; None where the graphs say what torch says. Only what the task names is judged."""
    error, worst = max(((row.judged, row) for row in rows if row.judged is not None), key=lambda judged: judged[0])
    if not error <= tolerance.atol:
        return (
            f"the graph differs from PyTorch by {error:.2e} (batch {worst.batch}, {worst.text_tokens} text "
            f"tokens, {worst.inputs} inputs); allowed is {tolerance.atol:.0e}."
        )
    if agreement(rows) < tolerance.agreement:
        return (
            f"prediction agreement with PyTorch is {100 * agreement(rows):.1f} % on the real pairs; "
            f"at least {100 * tolerance.agreement:.0f} % is needed."
        )
    return None
