"""The gate of an export: what the graphs say against what torch says, on real and on random inputs."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from . import data, tasks
from .families import Family
from .graphs import IMAGE_EMBEDS, OnnxModel

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


@dataclass(frozen=True)
class Case:
    """Inputs, and what torch makes of them: name of the output -> values."""

    name: str  # "real" or "random"
    inputs: dict[str, Tensor]
    expected: dict[str, Tensor]


@dataclass(frozen=True)
class Parity:
    """Largest and mean difference between torch and ONNX Runtime of one output on one case."""

    output: str
    inputs: str
    images: int
    batch: int
    text_tokens: int
    max_error: float
    mean_error: float
    same_decision: float | None  # share of the batch; None for outputs that decide nothing


def make_cases(
    model: nn.Module, task: tasks.Task, family: Family, processor, longest: int, *, split: bool, rounded: bool
) -> list[Case]:
    """Batches 1 to 8, short and long texts, with and without padding; split: one image for eight texts as well."""
    pairs = list(data.scene_pairs("train", 8 + DECISIONS * rounded, labelled=False))
    mixed = [replace(pair, text=" ".join([pair.text] * LONG)) if i % 2 else pair for i, pair in enumerate(pairs[:8])]
    parts = [pairs[:1], pairs[1:3], mixed, *(pairs[i : i + 8] for i in range(8, len(pairs), 8))]
    given = [("real", data.make_batch(part, processor, longest).inputs) for part in parts]
    if split:
        inputs = given[2][1]
        given.append(("real", inputs | {"pixel_values": inputs["pixel_values"][:1]}))
    for batch, tokens, padded in (1, longest, 0), (3, longest, longest // 2), (2, min(4, longest), 1):
        given.append(("random", data.random_inputs(model.config, batch, tokens, padded=padded)))
    return [Case(name, inputs, expected(model, task, family, inputs)) for name, inputs in given]


def expected(model: nn.Module, task: tasks.Task, family: Family, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What torch says; an image alone goes with every text."""
    taken = {}
    vision = getattr(model, family.vision)
    hook = vision.register_forward_hook(lambda _, __, out: taken.update({IMAGE_EMBEDS: getattr(out, family.image_embeds)}))
    images = inputs["pixel_values"]
    every = images.expand(len(inputs["input_ids"]), -1, -1, -1)
    try:
        with torch.inference_mode():
            decision = task.logits(model, inputs | {"pixel_values": every})
    finally:
        hook.remove()
    return {IMAGE_EMBEDS: taken[IMAGE_EMBEDS][: len(images)], task.output: decision}


def check(onnx_model: OnnxModel, cases: list[Case], decision: str, advance: Callable[[], None] = lambda: None) -> list[Parity]:
    """One row for each output of each case."""
    rows = []
    for case in cases:
        found = onnx_model.run(case.inputs)
        for output, values in case.expected.items():
            if output in found:
                rows.append(compare(case, output, values, torch.from_numpy(found[output]), output == decision))
        advance()
    return rows


def compare(case: Case, output: str, expected: Tensor, found: Tensor, decides: bool) -> Parity:
    error = (expected - found).abs()
    largest = error.max().item() if torch.isfinite(error).all() else float("inf")
    agreed = tasks.agreement(expected, found) if decides else None
    images, (batch, tokens) = len(case.inputs["pixel_values"]), case.inputs["input_ids"].shape
    return Parity(output, case.name, images, batch, tokens, largest, error.mean().item(), agreed)


def agreement(rows: list[Parity]) -> float:
    """Share of the real pairs on which graph and torch decide alike."""
    real = [row for row in rows if row.same_decision is not None and row.inputs == "real"]
    return sum(row.same_decision * row.batch for row in real) / sum(row.batch for row in real)


def problem(rows: list[Parity], tolerance: Tolerance) -> str | None:
    """What is wrong, in a sentence; None where the graphs say what torch says. Only what decides is judged."""
    worst = max((row for row in rows if row.same_decision is not None), key=lambda row: row.max_error)
    if not worst.max_error <= tolerance.atol:
        return (
            f"the graph differs from torch by {worst.max_error:.2e} (batch {worst.batch}, {worst.text_tokens} text "
            f"tokens, {worst.inputs} inputs); allowed is {tolerance.atol:.0e}."
        )
    if agreement(rows) < tolerance.agreement:
        return (
            f"the graph decides like torch on {100 * agreement(rows):.1f} % of the real pairs; "
            f"at least {100 * tolerance.agreement:.0f} % must be alike."
        )
    return None
