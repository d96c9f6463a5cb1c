"""ONNX graphs: the model as tensors in, tensors out, written by torch. `sessions` runs them."""

from ast import literal_eval
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..checkpoint.loading import quiet_libraries
from ..data.batches import random_inputs
from ..errors import UsageError
from ..families import Family
from ..families.base import ANSWER_INPUTS
from ..options import OPSET, TARGETS
from ..runtime.modeling_comp import CompactAttention, TokenPruning, TokenScores, cache_name, refuse_unknown
from ..tasks import Task

EXTERNAL_DATA_FROM = 1_900_000_000  # bytes; protobuf ends at 2 GiB
WHOLE, VISION, TEXT = "model.onnx", "vision_model.onnx", "text_model.onnx"
ENCODER, DECODER, PAST = "encoder_model.onnx", "decoder_model.onnx", "decoder_with_past_model.onnx"
IMAGE_EMBEDS, TEXT_EMBEDS = "image_embeds", "text_embeds"
HIDDEN, STATES = "last_hidden_state", "encoder_hidden_states"  # the same: what the encoder hands out, and the decoder reads
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
        images, texts = ("batch", "batch") if task.paired_inputs else ("images", "texts")
        dynamic = {"pixel_values": {0: images}, "input_ids": {0: texts, 1: "tokens"}, "attention_mask": {0: texts, 1: "tokens"}}
        self.dynamic = {name: dynamic[name] for name in family.inputs if name in dynamic}

    def forward(
        self, pixel_values: Tensor | None = None, input_ids: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        given = {"input_ids": input_ids, "attention_mask": attention_mask}
        if pixel_values is not None:
            given["pixel_values"] = pixel_values.to(self.dtype)
        outputs = self.model(**{name: tensor for name, tensor in given.items() if tensor is not None})
        return tuple(getattr(outputs, name).float() for name in self.outputs)

    @property
    def names(self) -> list[str]:
        """Of the inputs."""
        return list(self.dynamic)

    @property
    def dtype(self) -> torch.dtype:
        """Of the matrices; scalars may have another."""
        return next(p.dtype for p in self.model.parameters() if p.numel() > 1)

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


class WholeWriter(Graph):
    """The forward pass of a model that writes texts, over texts that are there: the inputs of the family -> logits (batch,
    tokens, vocabulary)."""

    def __init__(self, model: nn.Module, task: Task, family: Family):
        super().__init__(model, task, family)
        self.dynamic |= {name: {0: "batch", 1: "answer_tokens"} for name in ANSWER_INPUTS if name in family.inputs}

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        states = encode(self.model, self.family, pixel_values.to(self.dtype), input_ids, attention_mask)
        text = (input_ids, attention_mask) if labels is None else (labels, decoder_attention_mask)
        return (decode(self.model, self.family, states, *text).logits.float(),)


class EncoderGraph(Graph):
    """What is done once for a text that is written: pixel_values, and input_ids and attention_mask of a question ->
    last_hidden_state (batch, tokens, dim)."""

    def __init__(self, model: nn.Module, task: Task, family: Family):
        super().__init__(model, task, family)
        self.outputs = (HIDDEN,)
        asked = ("input_ids", "attention_mask") if family.decoder.question else ()
        self.dynamic = {name: dims for name, dims in self.dynamic.items() if name in ("pixel_values", *asked)}

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        return (encode(self.model, self.family, pixel_values.to(self.dtype), input_ids, attention_mask).float(),)


class DecoderGraph(Graph):
    """The beginning of a text: input_ids (batch, tokens), encoder_hidden_states -> logits (batch, tokens, vocabulary), and keys
    and values of every layer, (batch, heads, tokens, head_dim): `present.0.decoder.key`, ..., `present.0.encoder.value`."""

    def __init__(self, model: nn.Module, task: Task, family: Family, states: Tensor):
        super().__init__(model, task, family)
        self.states = states  # an example of what the encoder hands out
        tower = family.towers[-1]
        self.layers = len(getattr(model.get_submodule(tower.encoder), tower.layers))
        self.outputs = ("logits", *self.cached("present", "decoder", "encoder"))
        self.dynamic = {"input_ids": {0: "batch", 1: "tokens"}, STATES: self.attended(1)}

    def attended(self, axis: int) -> dict[int, str]:
        """Dimensions of what is attended to; its tokens vary where they are those of a question."""
        return {0: "batch", axis: "encoder_tokens"} if self.family.decoder.question else {0: "batch"}

    def cached(self, prefix: str, *parts: str) -> list[str]:
        return [f"{prefix}.{i}.{part}.{kind}" for i in range(self.layers) for part in parts for kind in ("key", "value")]

    def forward(self, input_ids: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor, ...]:
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        found = decode(self.model, self.family, encoder_hidden_states.to(self.dtype), input_ids, cache=cache)
        return (found.logits.float(), *kept(cache.self_attention_cache, cache.cross_attention_cache))

    def example(self) -> dict[str, Any]:
        batch = len(self.states)
        vocabulary = self.model.config.text_config.vocab_size
        return {"input_ids": torch.arange(7 * batch).view(batch, 7) % vocabulary, STATES: self.states}


class PastGraph(DecoderGraph):
    """The rest of a text: the tokens that come next, and keys and values as the decoder, or this graph, hands them out
    (`past_key_values.0.decoder.key`, ...) -> their logits, and the keys and values of the text with them. Those of what is
    attended to do not change, and are not handed out again."""

    def __init__(self, model: nn.Module, task: Task, family: Family, states: Tensor):
        super().__init__(model, task, family, states)
        self.outputs = ("logits", *self.cached("present", "decoder"))
        grows, stays = {0: "batch", 2: "past_tokens"}, self.attended(2)
        self.dynamic = {"input_ids": {0: "batch", 1: "tokens"}, "past": [grows, grows, stays, stays] * self.layers}

    @property
    def names(self) -> list[str]:
        return ["input_ids", *self.cached("past_key_values", "decoder", "encoder")]

    def forward(self, input_ids: Tensor, past: list[Tensor]) -> tuple[Tensor, ...]:
        past = [tensor.to(self.dtype) for tensor in past]
        own, across = (DynamicCache(list(zip(past[i::4], past[i + 1 :: 4], strict=True))) for i in (0, 2))
        # Layers want to be told that there is something to attend to; what they read of it is in the cache.
        found = decode(self.model, self.family, past[2], input_ids, cache=EncoderDecoderCache(own, across))
        return (found.logits.float(), *kept(own))

    def example(self) -> dict[str, Any]:
        begun = super().example()
        with torch.no_grad():
            _, *past = super().forward(**begun)
        return {"input_ids": begun["input_ids"][:, :3], "past": past}


def kept(*caches: DynamicCache) -> list[Tensor]:
    """Keys and values of caches, layer by layer."""
    layers = zip(*(cache.layers for cache in caches), strict=True)
    return [tensor.float() for parts in layers for layer in parts for tensor in (layer.keys, layer.values)]


class Encoded(nn.Module):
    """Stands for the vision tower where the images are encoded already."""

    def __init__(self, field: str):
        super().__init__()
        self.field = field

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        refuse_unknown(self, kwargs)
        return BaseModelOutputWithPooling(**{self.field: pixel_values})


def encode_images(model: nn.Module, family: Family, pixel_values: Tensor) -> Tensor:
    """What the rest of a model, or whoever compares embeddings, reads of images."""
    if family.encoders:
        return getattr(model, family.encoders[0])(pixel_values=pixel_values).pooler_output
    return getattr(getattr(model, family.vision)(pixel_values), family.image_embeds)


def encode(
    model: nn.Module,
    family: Family,
    pixel_values: Tensor,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """What a decoder attends to: the tokens of the image, or those of the question that is asked of it."""
    states = encode_images(model, family, pixel_values)
    if family.decoder.question is None:
        return states
    asked = {"input_ids": input_ids, "attention_mask": attention_mask}
    return model.get_submodule(family.decoder.question)(**asked, encoder_hidden_states=states).last_hidden_state


def decode(
    model: nn.Module,
    family: Family,
    states: Tensor,
    text: Tensor,
    attention_mask: Tensor | None = None,
    cache: EncoderDecoderCache | None = None,
) -> Any:
    """What the decoder says behind every token of a text, as transformers hands it out."""
    decoder = model.get_submodule(family.decoder.module)
    given = {"input_ids": text, "attention_mask": attention_mask, "encoder_hidden_states": states}
    if cache is not None:
        given |= {cache_name(decoder.forward): cache}
    return decoder(**given, use_cache=cache is not None)


def can_split(family: Family) -> bool:
    """Whether images can be encoded apart from texts, and are not so anyway."""
    return family.decoder is None and (family.encoders is not None or family.vision is not None)


def write_graphs(
    model: nn.Module, task: Task, family: Family, folder: Path, *, split: bool, opset: int, target: str
) -> list[str]:
    """Write model.onnx, or the pair of vision_model.onnx and text_model.onnx; encoder and decoders of a model that writes
    texts. Returns their names in the order they run."""
    how = {"opset": opset, "target": target}
    if family.decoder:
        encoder = EncoderGraph(model, task, family)
        with torch.no_grad():
            (states,) = encoder(**encoder.example())
        parts = {ENCODER: encoder}
        parts |= {name: kind(model, task, family, states) for name, kind in ((DECODER, DecoderGraph), (PAST, PastGraph))}
        for name, graph in parts.items():
            write(graph, folder / name, **how)
        return list(parts)
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
    graph = WholeWriter if family.decoder else Graph
    write(graph(model, task, family), path, opset=opset, target=target)


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
            input_names=graph.names,
            output_names=list(graph.outputs),
            dynamic_shapes=graph.dynamic,
            opset_version=opset,
            verbose=False,
        )
    tidy(program.model, {name for name, module in graph.named_modules() if isinstance(module, TokenScores | TokenPruning)})
    weights = sum(value.const_value.nbytes for value in program.model.graph.initializers.values())
    program.save(path, external_data=weights > EXTERNAL_DATA_FROM)


def tidy(model: Any, pruning: set[str]) -> None:
    """Name the nodes of an onnx_ir model after their modules; those of the modules in `pruning`, which score and drop tokens,
    after the module around them and TOKEN_PRUNING (which profiles show). Stack traces go: they hold paths of this machine."""
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
