"""ONNX graphs: the model as tensors in, decision out, written by torch and run by ONNX Runtime."""

from ast import literal_eval
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .errors import DEVICE, USAGE, CompError
from .families import Family
from .loading import quiet_libraries
from .modeling_comp import CompactAttention
from .tasks import Task

OPSET = 20
TARGETS = ("onnxruntime", "onnx")  # with ONNX Runtime's fused attention node, or with standard operators only
EXTERNAL_DATA_FROM = 1_900_000_000  # bytes; protobuf ends at 2 GiB
WHOLE, VISION, TEXT = "model.onnx", "vision_model.onnx", "text_model.onnx"
IMAGE_EMBEDS = "image_embeds"
TOKEN_PRUNING = "token_pruning"  # in the names of nodes that score and drop tokens


class Graph(nn.Module):
    """The whole model. Floats go in and come out as float32, whatever the weights are.

    pixel_values (batch, 3, side, side), input_ids and attention_mask (batch, tokens) -> decision (batch, classes).
    """

    dynamic = {
        "pixel_values": {0: "batch"},
        "input_ids": {0: "batch", 1: "tokens"},
        "attention_mask": {0: "batch", 1: "tokens"},
    }

    def __init__(self, model: nn.Module, task: Task):
        super().__init__()
        self.model, self.output = model, task.output

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        images = pixel_values.to(_dtype(self))
        outputs = self.model(pixel_values=images, input_ids=input_ids, attention_mask=attention_mask)
        return getattr(outputs, self.output).float()

    def example(self) -> tuple[Tensor, ...]:
        config = self.model.config
        return (example_images(config.vision_config), *example_texts(config.text_config))


class VisionGraph(nn.Module):
    """What is done once for an image: pixel_values (images, 3, side, side) -> image_embeds (images, kept tokens, dim)."""

    dynamic = {"pixel_values": {0: "images"}}

    def __init__(self, model: nn.Module, family: Family):
        super().__init__()
        self.model, self.family, self.output = getattr(model, family.vision), family, IMAGE_EMBEDS

    def forward(self, pixel_values: Tensor) -> Tensor:
        return getattr(self.model(pixel_values.to(_dtype(self))), self.family.image_embeds).float()

    def example(self) -> tuple[Tensor, ...]:
        return (example_images(self.model.config),)


class TextGraph(Graph):
    """What is done for every text: image_embeds (1 or batch, kept tokens, dim), input_ids, attention_mask -> decision.

    It is the model's own forward with a vision tower that hands out what it is given.
    """

    dynamic = {IMAGE_EMBEDS: {0: "images"}, **{name: Graph.dynamic[name] for name in ("input_ids", "attention_mask")}}

    def __init__(self, model: nn.Module, task: Task, family: Family, embeds: tuple[int, int]):
        rest = model.__class__.__new__(model.__class__)
        rest.__dict__.update(model.__dict__)
        rest._modules = model._modules | {family.vision: Encoded(family.image_embeds)}
        super().__init__(rest, task)
        self.embeds = embeds  # (kept tokens, dim)

    def forward(self, image_embeds: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return super().forward(image_embeds, input_ids, attention_mask)

    def example(self) -> tuple[Tensor, ...]:
        return (torch.zeros(3, *self.embeds), *example_texts(self.model.config.text_config))  # not as many as texts


class Encoded(nn.Module):
    """Stands for the vision tower where the images are encoded already."""

    def __init__(self, field: str):
        super().__init__()
        self.field = field

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(**{self.field: pixel_values})


# Sizes of 0 and 1 would be baked into a graph, and so could a model's own; these are neither.
def example_images(vision_config: Any) -> Tensor:
    return torch.zeros(2, 3, vision_config.image_size, vision_config.image_size)


def example_texts(text_config: Any) -> tuple[Tensor, Tensor]:
    tokens = min(7, text_config.max_position_embeddings)
    return torch.full((2, tokens), 1), torch.ones(2, tokens, dtype=torch.long)


def _dtype(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


def write_graphs(
    model: nn.Module, task: Task, family: Family, folder: Path, *, split: bool, opset: int, target: str
) -> list[str]:
    """Write model.onnx, or the pair of vision_model.onnx and text_model.onnx; returns their names in the order they run."""
    how = {"opset": opset, "target": target}
    if not split:
        write_graph(model, task, folder / WHOLE, **how)
        return [WHOLE]
    vision = VisionGraph(model, family)
    with torch.no_grad():
        embeds = vision(*vision.example()).shape[1:]
    write(vision, folder / VISION, **how)
    write(TextGraph(model, task, family, tuple(embeds)), folder / TEXT, **how)
    return [VISION, TEXT]


def write_graph(model: nn.Module, task: Task, path: Path, *, opset: int = OPSET, target: str = TARGETS[0]) -> None:
    """Write the whole model as one graph."""
    write(Graph(model, task), path, opset=opset, target=target)


def write(graph: Graph | VisionGraph, path: Path, *, opset: int, target: str) -> None:
    """Write a graph with dynamic batch and text length; attention of compact models as one node for "onnxruntime"."""
    for module in graph.modules():
        if isinstance(module, CompactAttention):
            module.fused_node = target == TARGETS[0]
            module.share_images = IMAGE_EMBEDS in graph.dynamic
    with quiet_libraries(), torch.no_grad():
        program = torch.onnx.export(
            graph.eval(),
            graph.example(),
            dynamo=True,
            input_names=list(graph.dynamic),
            output_names=[graph.output],
            dynamic_shapes=graph.dynamic,
            opset_version=opset,
            verbose=False,
        )
    tidy(program.model)
    weights = sum(p.numel() * p.element_size() for p in graph.parameters())
    program.save(path, external_data=weights > EXTERNAL_DATA_FROM)


def tidy(model: Any) -> None:
    """Name the nodes of an onnx_ir model after their modules, those that score and drop tokens after that as well (which
    profiles show); drop the stack traces, which hold paths of this machine."""
    for node in model.graph:
        scopes = literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        module = scopes[-2].removeprefix("model.") if len(scopes) > 1 else ""
        line = node.metadata_props.get("pkg.torch.onnx.stack_trace", "").rpartition("\n")[2]
        prunes = "TOKEN_RULES[" in line or ("self.hand_on(" in line and node.op_type != "Add")  # Add: the residual
        node.name = "/".join(filter(None, (module, prunes and TOKEN_PRUNING, node.name)))
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.metadata_props.clear()


def check_target(target: str, opset: int) -> None:
    """Exit 2 for a target or an opset that comp does not write."""
    if target not in TARGETS:
        raise CompError(f"--target {target}: unknown.", code=USAGE, hint=f"Use one of {', '.join(TARGETS)}.")
    if not 18 <= opset <= 23:
        raise CompError(f"--opset {opset}: expected 18 to 23.", code=USAGE)


def open_session(path: Path, device: str = "cpu", threads: int = 0, tf32: bool = True, profile: Path | None = None):
    """An ONNX Runtime session whose first provider is the one that was asked for. Exit 5 where it is another, or none.

    With `profile` the session times its nodes into a file that begins so.
    """
    import onnxruntime

    onnxruntime.set_default_logger_severity(4)
    wanted = "CUDAExecutionProvider" if device.startswith("cuda") else "CPUExecutionProvider"
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    # Idle threads that spin take the cores from what runs next: in `comp bench` that is torch.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if profile:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    if wanted.startswith("CUDA"):
        preload_cuda()
    cuda = {"device_id": int(device.partition(":")[2] or 0), "use_tf32": int(tf32)}
    providers = [wanted] if wanted.startswith("CPU") else [(wanted, cuda), "CPUExecutionProvider"]
    try:
        with quiet_libraries():
            session = onnxruntime.InferenceSession(path, options, providers=providers)
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise CompError(f"ONNX Runtime cannot run {path.name} on {device}: {reason}", code=DEVICE) from error
    first = session.get_providers()[0]
    if first != wanted:
        raise CompError(
            f"ONNX Runtime runs on {first}, not on {wanted}.",
            code=DEVICE,
            hint="Install onnxruntime-gpu and the CUDA and cuDNN libraries it asks for, or use --device cpu.",
        )
    return session


def preload_cuda() -> None:
    """Let ONNX Runtime find the CUDA libraries that pip installed. It prints what it misses on stdout: not ours to say."""
    import onnxruntime

    if hasattr(onnxruntime, "preload_dlls"):
        with redirect_stdout(StringIO()):
            onnxruntime.preload_dlls()


def feeds(inputs: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in inputs.items()}


class OnnxModel:
    """The graphs of a folder, run one after the other: what one hands out is an input of the next."""

    def __init__(self, folder: Path, names: list[str], device: str = "cpu"):
        self.sessions = {name: open_session(folder / name, device, tf32=False) for name in names}

    def run(self, inputs: dict[str, Tensor]) -> dict[str, np.ndarray]:
        """Inputs and outputs of all graphs by name."""
        values = feeds(inputs)
        for session in self.sessions.values():
            needed = {value.name: values[value.name] for value in session.get_inputs()}
            values |= zip((value.name for value in session.get_outputs()), session.run(None, needed), strict=True)
        return values

    def signature(self) -> dict[str, Any]:
        """Names, types and shapes of what goes in and comes out, for each file."""

        def shapes(values) -> dict[str, Any]:
            return {v.name: {"type": v.type.removeprefix("tensor(").removesuffix(")"), "shape": v.shape} for v in values}

        return {
            name: {"inputs": shapes(session.get_inputs()), "outputs": shapes(session.get_outputs())}
            for name, session in self.sessions.items()
        }
