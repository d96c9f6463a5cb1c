"""Graphs written by torch, as `topology/graph_specs.py` describes them. `sessions` runs them."""

from ast import literal_eval
from pathlib import Path
from typing import Any

import onnx_ir
import torch
from torch import Tensor, nn

from ..checkpoint.loading import quiet_libraries
from ..errors import UsageError
from ..families import Family
from ..options import OPSET, TARGETS
from ..runtime.modeling_comp import CompactAttention, TokenPruning, TokenScores
from ..tasks import Task
from ..topology.graph_specs import GraphSpec, matrix_dtype
from .translations import TRANSLATIONS, count_axes_from_the_front

EXTERNAL_DATA_FROM = 1_900_000_000  # bytes; protobuf ends at 2 GiB
TOKEN_PRUNING = "token_pruning"  # in the names of nodes that score and drop tokens


class Graph(nn.Module):
    """A model and what a graph makes with it: tensors in, tensors out, in the order of its description. Floats go in and come
    out as float32, whatever the weights are."""

    def __init__(self, model: nn.Module, spec: GraphSpec):
        super().__init__()
        self.model, self.spec = spec.module(model), spec

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        dtype = matrix_dtype(self.model)
        given = (tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in tensors)
        made = self.spec.forward(self.model, dict(zip(self.spec.inputs, given, strict=True)))
        return tuple(tensor.float() if tensor.is_floating_point() else tensor for tensor in made)


def write_graphs(model: Any, task: Task, family: Family, folder: Path, *, split: bool, opset: int, target: str) -> list[str]:
    """Write the graphs of a model into a folder; split: images and texts apart. Returns their names in the order they run."""
    specs = family.topology.graphs(family, model.config.to_dict(), task, split)
    for spec in specs:
        write(model, spec, folder / spec.name, opset=opset, target=target)
    return [spec.name for spec in specs]


def write_graph(model: Any, task: Task, family: Family, path: Path, *, opset: int = OPSET, target: str = TARGETS[0]) -> None:
    """Write the whole model as one graph."""
    write(model, family.topology.full_graph(family, model.config.to_dict(), task), path, opset=opset, target=target)


def write(model: nn.Module, spec: GraphSpec, path: Path, *, opset: int, target: str) -> None:
    """Write a graph with its free axes; attention of compact models as one node for "onnxruntime"."""
    for module in model.modules():
        if isinstance(module, CompactAttention):
            module.fused_node = target == TARGETS[0]
            module.share_images = spec.shares_images
    graph, example = Graph(model, spec).eval(), spec.example(model)
    with quiet_libraries(), torch.no_grad():
        program: Any = torch.onnx.export(
            graph,
            args=tuple(example[name] for name in spec.inputs),
            dynamo=True,
            input_names=list(spec.inputs),
            output_names=list(spec.outputs),
            dynamic_shapes={"tensors": tuple(spec.dynamic.values())},
            opset_version=opset,
            verbose=False,
            custom_translation_table=TRANSLATIONS if spec.may_be_empty else None,
        )
    if spec.may_be_empty:
        count_axes_from_the_front(program.model)
    tidy(program.model, graph)
    for value in program.model.graph.outputs:
        if (shape := spec.sizes.get(value.name)) is not None:
            value.shape = onnx_ir.Shape(shape)
    weights = sum(value.const_value.nbytes for value in program.model.graph.initializers.values())
    program.save(path, external_data=weights > EXTERNAL_DATA_FROM)


def tidy(model: Any, source: nn.Module) -> None:
    """Name the nodes of an onnx_ir model after the modules of its source; those of modules that score and drop tokens after the
    module around them and TOKEN_PRUNING (which profiles show). Stack traces go: they hold paths of this machine."""
    pruning = {name for name, module in source.named_modules() if isinstance(module, TokenScores | TokenPruning)}
    for node in model.graph:
        scopes = literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        module, label = scopes[-2] if len(scopes) > 1 else "", ""
        if module in pruning:
            module, label = module.rpartition(".")[0], TOKEN_PRUNING
        node.name = "/".join(filter(None, (module.removeprefix("model."), label, node.name)))
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.metadata_props.clear()


def check_target(target: str, opset: int) -> None:
    """Raises UsageError for a target or an opset that comp does not write."""
    if target not in TARGETS:
        raise UsageError(f"--target {target}: unknown.", hint=f"Use one of {', '.join(TARGETS)}.")
    if not 18 <= opset <= 23:
        raise UsageError(f"--opset {opset}: expected 18 to 23.")
