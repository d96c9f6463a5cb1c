"""ONNX graphs: the model as tensors in, tensors out, written by torch and run by ONNX Runtime."""

from ast import literal_eval
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .data import random_inputs
from .errors import DEVICE, USAGE, CompError
from .families import Family
from .loading import quiet_libraries
from .modeling_comp import CompactAttention
from .tasks import Task

OPSET = 20
TARGETS = ("onnxruntime", "onnx")  # with ONNX Runtime's fused attention node, or with standard operators only
EXTERNAL_DATA_FROM = 1_900_000_000  # bytes; protobuf ends at 2 GiB
WHOLE, VISION, TEXT = "model.onnx", "vision_model.onnx", "text_model.onnx"
IMAGE_EMBEDS, TEXT_EMBEDS = "image_embeds", "text_embeds"
TOKEN_PRUNING = "token_pruning"  # in the names of nodes that score and drop tokens


class Graph(nn.Module):
    """The whole model. Floats go in and come out as float32, whatever the weights are.

    Of pixel_values (images, 3, side, side), input_ids and attention_mask (texts, tokens) what the model takes -> the outputs
    of the task. A task of pairs has one text for each image; others take any number of both.
    """

    def __init__(self, model: nn.Module, task: Task, family: Family):
        super().__init__()
        self.model, self.family = model, family
        self.outputs = task.outputs
        images, texts = ("batch", "batch") if task.paired else ("images", "texts")
        dynamic = {"pixel_values": {0: images}, "input_ids": {0: texts, 1: "tokens"}, "attention_mask": {0: texts, 1: "tokens"}}
        self.dynamic = {name: dynamic[name] for name in family.inputs}

    def forward(
        self, pixel_values: Tensor | None = None, input_ids: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        given = {"input_ids": input_ids, "attention_mask": attention_mask}
        if pixel_values is not None:
            given["pixel_values"] = pixel_values.to(self.dtype)
        outputs = self.model(**{name: tensor for name, tensor in given.items() if tensor is not None})
        return tuple(getattr(outputs, name).float() for name in self.outputs)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def example(self) -> dict[str, Tensor]:
        """Sizes of 0 and 1 would be baked into a graph, and so could a model's own; these are neither."""
        texts = random_inputs(self.model.config, self.family, 2, 7)
        images = random_inputs(self.model.config, self.family, 2 if self.dynamic_together else 3, 7)
        return {name: (images if name == "pixel_values" else texts)[name] for name in self.dynamic}

    @property
    def dynamic_together(self) -> bool:
        """Whether there are as many images as texts."""
        return len({dims[0] for dims in self.dynamic.values()}) == 1


class ImageGraph(Graph):
    """What is done once for an image: pixel_values -> image_embeds (images, kept tokens, dim), or (images, dim) of a dual
    encoder."""

    def __init__(self, model: nn.Module, task: Task, family: Family):
        super().__init__(model, task, family)
        self.outputs, self.dynamic = (IMAGE_EMBEDS,), {"pixel_values": {0: "images"}}

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        return (encode_images(self.model, self.family, pixel_values.to(self.dtype)).float(),)


class TextGraph(Graph):
    """What a dual encoder does for every text: input_ids, attention_mask -> text_embeds (texts, dim)."""

    def __init__(self, model: nn.Module, task: Task, family: Family):
        super().__init__(model, task, family)
        self.outputs = (TEXT_EMBEDS,)
        self.dynamic = {name: dims for name, dims in self.dynamic.items() if name != "pixel_values"}

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, ...]:
        given = {} if attention_mask is None else {"attention_mask": attention_mask}
        return (getattr(self.model, self.family.encoders[1])(input_ids=input_ids, **given).pooler_output.float(),)


class CrossGraph(Graph):
    """What is done for every text by a model with cross-attention: image_embeds (1 or batch, kept tokens, dim), input_ids,
    attention_mask -> the outputs of the task.

    It is the model's own forward with a vision tower that hands out what it is given.
    """

    def __init__(self, model: nn.Module, task: Task, family: Family, embeds: tuple[int, int]):
        rest = model.__class__.__new__(model.__class__)
        rest.__dict__.update(model.__dict__)
        rest._modules = model._modules | {family.vision: Encoded(family.image_embeds)}
        super().__init__(rest, task, family)
        self.embeds = embeds  # (kept tokens, dim)
        self.dynamic = {IMAGE_EMBEDS: {0: "images"}} | {n: dims for n, dims in self.dynamic.items() if n != "pixel_values"}

    def forward(self, image_embeds: Tensor, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        return super().forward(image_embeds, input_ids, attention_mask)

    def example(self) -> dict[str, Tensor]:
        texts = random_inputs(self.model.config, self.family, 2, 7)
        made = texts | {IMAGE_EMBEDS: torch.zeros(3, *self.embeds)}  # not as many as texts
        return {name: made[name] for name in self.dynamic}


class Encoded(nn.Module):
    """Stands for the vision tower where the images are encoded already."""

    def __init__(self, field: str):
        super().__init__()
        self.field = field

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(**{self.field: pixel_values})


def encode_images(model: nn.Module, family: Family, pixel_values: Tensor) -> Tensor:
    """What the rest of a model, or whoever compares embeddings, reads of images."""
    if family.encoders:
        return getattr(model, family.encoders[0])(pixel_values=pixel_values).pooler_output
    return getattr(getattr(model, family.vision)(pixel_values), family.image_embeds)


def can_split(family: Family) -> bool:
    """Whether images can be encoded apart from texts."""
    return family.encoders is not None or family.vision is not None


def write_graphs(
    model: nn.Module, task: Task, family: Family, folder: Path, *, split: bool, opset: int, target: str
) -> list[str]:
    """Write model.onnx, or the pair of vision_model.onnx and text_model.onnx; returns their names in the order they run."""
    how = {"opset": opset, "target": target}
    if not split:
        write_graph(model, task, family, folder / WHOLE, **how)
        return [WHOLE]
    images = ImageGraph(model, task, family)
    write(images, folder / VISION, **how)
    if family.encoders:
        texts = TextGraph(model, task, family)
    else:
        with torch.no_grad():
            (embeds,) = images(**images.example())
        texts = CrossGraph(model, task, family, tuple(embeds.shape[1:]))
    write(texts, folder / TEXT, **how)
    return [VISION, TEXT]


def write_graph(
    model: nn.Module, task: Task, family: Family, path: Path, *, opset: int = OPSET, target: str = TARGETS[0]
) -> None:
    """Write the whole model as one graph."""
    write(Graph(model, task, family), path, opset=opset, target=target)


def write(graph: Graph, path: Path, *, opset: int, target: str) -> None:
    """Write a graph with dynamic batch and text length; attention of compact models as one node for "onnxruntime"."""
    for module in graph.modules():
        if isinstance(module, CompactAttention):
            module.fused_node = target == TARGETS[0]
            module.share_images = IMAGE_EMBEDS in graph.dynamic
    with quiet_libraries(), torch.no_grad():
        program = torch.onnx.export(
            graph.eval(),
            kwargs=graph.example(),
            dynamo=True,
            input_names=list(graph.dynamic),
            output_names=list(graph.outputs),
            dynamic_shapes=graph.dynamic,
            opset_version=opset,
            verbose=False,
        )
    tidy(program.model)
    weights = sum(value.const_value.nbytes for value in program.model.graph.initializers.values())
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
