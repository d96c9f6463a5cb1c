"""The gate of an export: what the graphs say against what torch says, on real and on random inputs."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .. import tasks
from ..data.batches import random_inputs
from ..data.preparation import Preparation
from ..data.rows import Pair
from ..families import Family
from ..models.dense import collator
from ..models.pairs import Pairs, generated_pairs
from ..report.export import ParityRow, jumped
from ..tasks import comparison
from ..topology import input_sizes, with_one_image
from ..topology.base import IMAGE, PIXELS
from ..topology.graph_specs import Run, Step, Values
from .sessions import OnnxModel

BATCH = 8  # of most cases
DECISIONS = 64  # real pairs more, where weights are rounded and decisions may change
LARGEST = 1024  # pixels of the longer side of a picture
LONG = 5  # captions in a row make a long text


@dataclass(frozen=True)
class Tolerance:
    """Largest difference of the task's output, and least share of equal decisions on the real pairs. jumps: share of the
    samples whose output may differ by more."""

    atol: float
    agreement: float
    jumps: float = 0.0


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

# Where rounding changes which token of a sample stays, its output jumps: the more samples, the larger the largest difference.
# So some may, never all of a case (what fails with padding fails in all of them), and decisions count as ever.
JUMPS = 0.1

GREY = 5e-3  # where pictures are resized in the graph, for some pixels are a grey level off: as measured on noise 1e-4 of them


def tolerance(
    task: tasks.Task, rounding: str, atol: float | None, *, pictures: bool = False, drops_tokens: bool = False
) -> Tolerance:
    """What is allowed to differ; `atol` instead of the usual, where it is given. pictures: whether graphs prepare them.
    drops_tokens: whether they choose which tokens of a sample stay."""
    usual = (RELATIVE if task.relative else TOLERANCES)[rounding]
    if drops_tokens and rounding != "fp32":
        usual = replace(usual, jumps=JUMPS)
    if pictures:
        usual = replace(usual, atol=max(usual.atol, GREY))
    return usual if atol is None else replace(usual, atol=atol)


@dataclass(frozen=True)
class Case:
    """Inputs, and what torch makes of them: name of the output -> values. graphs: those that should say the same."""

    name: str  # "real" or "random"
    inputs: dict[str, Tensor]
    expected: dict[str, Tensor]
    graphs: tuple[str, ...] = ()


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
    pictures: Preparation | None = None,
) -> list[Case]:
    """Batches 1 to 8, short and long texts, with and without padding; split: one image for eight texts as well. Eight pairs
    at least; more decide whether decisions agree. Texts that are made long have `longest` tokens, those of the pairs up to
    `whole`, if it is more. pictures: what the graphs do to pictures, where they take these: the pairs hold pictures then, and
    noise is as large as none of them."""
    mixed = [replace(pair, text=" ".join([pair.text] * LONG)) if i % 2 else pair for i, pair in enumerate(pairs[:BATCH])]
    # Where all samples of a batch are candidates, the decisions of many are asked for together.
    size = BATCH if task.paired_inputs else len(pairs)
    parts = [pairs[:1], pairs[1:3], mixed, *(pairs[i : i + size] for i in range(BATCH, len(pairs), size))]
    if pictures:
        parts = [of_one_size(part) for part in parts]
    made_long = collator(family, processor, longest, task, model.config)
    collate = replace(made_long, max_text=max(longest, whole or 0))
    batches = [(made_long if i == 2 else collate)(part).inputs for i, part in enumerate(parts)]
    given = [("real", inputs, stacked(part) if pictures else {}) for part, inputs in zip(parts, batches, strict=True)]
    if family.topology.one_for_all(split):
        _, inputs, images = given[2]
        given.append(("real", with_one_image(inputs), {name: tensor[:1] for name, tensor in images.items()}))
    for place, (batch, tokens, padded) in enumerate([(1, longest, 0), (3, longest, longest // 2), (2, min(4, longest), 1)]):
        inputs = random_inputs(model.config, family, batch, tokens, padded=padded)
        images = {}
        if pictures:
            noise = noise_of(pictures, place, len(inputs[PIXELS]))
            reads: Any = family.topology.parts_of(processor)[0]
            inputs = inputs | {PIXELS: reads(images=noise, return_tensors="pt")[PIXELS]}
            images = {IMAGE: as_tensor(noise)}
        given.append(("random", inputs, images))
    graphs = tuple(spec.name for spec in family.topology.graphs(family, model.config.to_dict(), task, split))
    cases = []
    with torch.inference_mode():
        for name, inputs, images in given:
            taken, expected = family.topology.case(family, model, task, inputs, split)
            cases.append(Case(name, taken | images, expected, graphs))
    return cases


def of_one_size(pairs: Sequence[Pair]) -> list[Pair]:
    """Pairs whose pictures are as large as the first one: graphs take a batch as one array."""
    size = pairs[0].image.size
    return [replace(pair, image=pair.image.resize(size)) for pair in pairs]


def stacked(pairs: Sequence[Pair]) -> dict[str, Tensor]:
    """The pictures of pairs, as graphs take them."""
    return {IMAGE: as_tensor([pair.image for pair in pairs])}


def as_tensor(pictures: Sequence[Image.Image]) -> Tensor:
    """(pictures, height, width, 3) uint8."""
    return torch.stack([torch.from_numpy(np.array(picture)) for picture in pictures])


def noise_of(preparation: Preparation, place: int, count: int) -> list[Image.Image]:
    """Noise that grows, shrinks, or grows one way and shrinks the other; by the place of a case."""
    height, width = preparation.shape
    rows, columns = [(2 * height + 3, 3 * width + 1), (height // 2 + 1, width // 3 + 2), (3 * height + 5, width - 1)][place]
    made = np.random.default_rng(place).integers(0, 256, (count, rows, columns, 3), dtype=np.uint8)
    return [Image.fromarray(one) for one in made]


def in_memory(pair: Pair) -> Pair:
    """A pair with its picture in RGB, made smaller where it is larger than any case needs."""
    picture = pair.image.convert("RGB")
    picture.thumbnail((LARGEST, LARGEST))
    return replace(pair, image=picture)


def with_pictures(run: Run) -> Run:
    """The same, for graphs of which some take pictures in the place of pixel values."""

    def running(step: Step, names: Iterable[str], values: Values) -> Values:
        return run(lambda name, given: step(name, given | {IMAGE: values[IMAGE]}), names, values)

    return running


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
        outputs = onnx_model.run(case.inputs, case.graphs)
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
    error = torch.where(torch.isfinite(error), error, torch.inf)
    samples = error.flatten(1).amax(1) if error.ndim > 1 else error
    images, texts, tokens = input_sizes(case.inputs)
    return ParityRow(
        output=output,
        inputs=case.name,
        images=images,
        batch=texts or images,
        text_tokens=tokens,
        max_error=error.max().item(),
        mean_error=error.mean().item(),
        judged=error.max().item() / size if size else None,
        samples=tuple((samples / size).tolist()) if size else (),
        same_decision=same_decision,
    )


def agreement(rows: list[ParityRow]) -> float:
    """Share of the real pairs on which graph and torch decide alike."""
    real = [(row.same_decision, row.batch) for row in rows if row.same_decision is not None and row.inputs == "real"]
    return sum(same * batch for same, batch in real) / sum(batch for _, batch in real)


def problem(rows: list[ParityRow], tolerance: Tolerance) -> str | None:
    """What is wrong, in a sentence; None where the graphs say what torch says."""
    error, worst = max(((row.judged, row) for row in rows if row.judged is not None), key=lambda judged: judged[0])
    beyond, samples = jumped(rows, tolerance.atol)
    whole_case = any(len(row.samples) > 1 and min(row.samples) > tolerance.atol for row in rows)
    if beyond > tolerance.jumps * samples or whole_case or not math.isfinite(error):
        counted = (
            f" {beyond} of {samples} samples differ by more, {int(tolerance.jumps * samples)} may, never all of a case."
            if tolerance.jumps
            else ""
        )
        return (
            f"the graph differs from PyTorch by {error:.2e} (batch {worst.batch}, {worst.text_tokens} text "
            f"tokens, {worst.inputs} inputs); allowed is {tolerance.atol:.0e}.{counted}"
        )
    if agreement(rows) < tolerance.agreement:
        return (
            f"prediction agreement with PyTorch is {100 * agreement(rows):.1f} % on the real pairs; "
            f"at least {100 * tolerance.agreement:.0f} % is needed."
        )
    return None
