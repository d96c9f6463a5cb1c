"""ONNX graphs as data: what goes in, what comes out, and what the model does between. `onnx/write.py` writes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor, nn

WHOLE, VISION, TEXT = "model.onnx", "vision_model.onnx", "text_model.onnx"
ENCODER, DECODER, PAST = "encoder_model.onnx", "decoder_model.onnx", "decoder_with_past_model.onnx"
IMAGE_EMBEDS, TEXT_EMBEDS = "image_embeds", "text_embeds"
HIDDEN, STATES = "last_hidden_state", "encoder_hidden_states"  # the same: what an encoder hands out, and a decoder reads

Axes = dict[int, str]  # axis of free size -> its name
Shape = tuple[int | None, ...]  # None: any number


def _itself(model: nn.Module) -> nn.Module:
    return model


@dataclass(frozen=True)
class GraphSpec:
    """One ONNX graph.

    name: of its file. forward: (model, inputs by name, floats in the precision of the model) -> tensors, in the order of
    `outputs`. dynamic: every input, in the order of the graph, with its axes of free size. example: model -> inputs to trace
    with; sizes of 0 and 1 would be baked into a graph, and so could the model's own: these are neither. module: what is traced
    for the model. shares_images: whether the states of one image may serve all texts of a batch. may_be_empty: whether parts of
    it see no rows in some of its calls. sizes: of outputs, where they are better said than found.
    """

    name: str
    forward: Callable[[nn.Module, dict[str, Tensor]], tuple[Tensor, ...]]
    outputs: tuple[str, ...]
    dynamic: dict[str, Axes]
    example: Callable[[nn.Module], dict[str, Tensor]]
    module: Callable[[nn.Module], nn.Module] = _itself
    shares_images: bool = False
    may_be_empty: bool = False
    sizes: Mapping[str, tuple[int | str, ...]] = field(default_factory=dict)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names, in the order of the graph."""
        return tuple(self.dynamic)


class Signature(NamedTuple):
    """What a graph takes and hands out: name -> shape."""

    inputs: dict[str, Shape]
    outputs: dict[str, Shape]


def matrix_dtype(model: nn.Module) -> torch.dtype:
    """Of the matrices; scalars may have another."""
    return next(p.dtype for p in model.parameters() if p.numel() > 1)


Values = dict[str, "np.ndarray"]
Step = Callable[[str, Values], Values]  # runs one graph, by its name, on those of the values that it takes
Run = Callable[[Step, Iterable[str], Values], Values]  # runs the named graphs on the inputs of the model


def in_turn(step: Step, names: Iterable[str], values: Values) -> Values:
    """Outputs of all graphs, run one after the other: what one hands out is an input of the next."""
    made: Values = {}
    for name in names:
        made |= step(name, values | made)
    return made
