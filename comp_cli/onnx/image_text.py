"""Texts about images out of exported graphs: `generate` of transformers, with ONNX Runtime where the model would be."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..errors import UsageError
from ..runtime.kept_cache import CACHES, KeptLayer, the_cache
from ..runtime.modeling_comp import cache_name, refuse_unknown
from ..topology.decoder_graphs import DecoderGraphs
from ..topology.decoder_names import BIAS, FEATURES, KEPT, LABELS, PRESENT, WEIGHTS
from ..topology.graph_specs import Values
from .sessions import OnnxModel

CACHE = cache_name(CausalLMOutputWithPast) or CACHES[0]
HINT = "The graphs hand out the logits of the last token alone."


class HeldLayer(KeptLayer):
    """A layer of the cache of which nobody knows where its tokens were: no token of it can be taken back."""

    def crop(self, tokens_to_remove: int) -> None:
        raise UsageError("a cache of graphs cannot be cropped: start again with an empty one.")


def cache_of(values: Values, seen: int) -> DynamicCache:
    """What graphs hand out, see `DecoderGraphs.caches`, as a cache of transformers that counts what it has seen: so many
    tokens."""
    cache, bias = DynamicCache(), values.get(f"{PRESENT}.{BIAS}")
    tensors = (value for value in values.values() if value is not bias)
    for keys, held in zip(tensors, tensors, strict=True):
        layer = HeldLayer.of(DynamicLayer())
        layer.lazy_initialization(torch.from_numpy(keys), torch.from_numpy(held))
        layer.keys, layer.values = torch.from_numpy(keys), torch.from_numpy(held)
        layer.gone = seen - keys.shape[2]
        layer.bias = None if bias is None else torch.from_numpy(bias)[:, 0, :, 0]
        cache.layers.append(layer)
    return cache


class OnnxReader(transformers.GenerationMixin, transformers.PreTrainedModel):
    """A model without weights, whose forward pass runs the graphs of a folder. `generate` takes prompts of one number of images
    in a batch, filled up at the left, beams and sampling."""

    main_input_name = "input_ids"

    def __init__(self, config: transformers.PretrainedConfig, graphs: OnnxModel, known: DecoderGraphs):
        super().__init__(config)
        self.graphs, self.known = graphs, known
        self.place = nn.Parameter(torch.empty(0), requires_grad=False)  # where transformers looks for the device

    @classmethod
    def can_generate(cls) -> bool:
        return True

    def generate(self, inputs: Tensor | None = None, *, pixel_values: Tensor | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """Images are encoded once, whatever becomes of their prompts."""
        ids = kwargs.get("input_ids") if inputs is None else inputs
        if pixel_values is not None and ids is not None:
            kwargs |= self.encoded(pixel_values, len(ids))
        parent: Any = super()
        return parent.generate(inputs, **kwargs)

    def encoded(self, pixel_values: Tensor, batch: int) -> dict[str, Tensor]:
        """What the vision encoder makes, (batch, image tokens, ...)."""
        with told():
            found = self.known.see(self.graphs.step, pixel_values.float().numpy(), batch)
        return {name: torch.from_numpy(value) for name, value in found.items()}

    def prepare_inputs_for_generation(
        self, *args: Any, is_first_iteration: bool | None = False, **kwargs: Any
    ) -> dict[str, Any]:
        """Images belong to the prompt."""
        parent: Any = super()
        made = parent.prepare_inputs_for_generation(*args, is_first_iteration=is_first_iteration, **kwargs)
        return {name: value for name, value in made.items() if is_first_iteration or not name.startswith("image_")}

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        cache: DynamicCache | None = None,
        pixel_values: Tensor | None = None,
        image_features: Tensor | None = None,
        image_kept: Tensor | None = None,
        image_labels: Tensor | None = None,
        image_weights: Tensor | None = None,
        use_cache: bool | None = True,
        logits_to_keep: int | Tensor = 1,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        refuse_unknown(self, kwargs)
        if use_cache is False:
            raise UsageError("the graphs write with their cache: leave use_cache out.")
        if not isinstance(logits_to_keep, int) or logits_to_keep > 1:
            raise UsageError("another model cannot guess ahead of the graphs.", hint=HINT)
        held = the_cache(cache, past_key_values)
        seen = 0 if held is None else int(held.get_seq_length())
        if seen and not all(isinstance(layer, HeldLayer) for layer in held.layers):
            raise UsageError("the graphs go on from a cache that they made, or from none.")
        batch, tokens = input_ids.shape
        if attention_mask is None:
            attention_mask = torch.ones(batch, seen + tokens, dtype=torch.long)
        check_mask(attention_mask, (batch, seen + tokens))
        images = {FEATURES: image_features, KEPT: image_kept, LABELS: image_labels, WEIGHTS: image_weights}
        if pixel_values is not None:
            images |= self.encoded(pixel_values, batch)
        given = {name: tensor.numpy() for name, tensor in images.items() if tensor is not None}
        layers = held.layers if seen else ()
        past = [tensor.numpy() for layer in layers for tensor in (layer.keys, layer.values)]
        if layers and self.known.weighted:
            past.append(layers[0].bias[:, None, :, None].numpy())
        ids, mask = input_ids.numpy(), attention_mask.long().numpy()
        positions = None if position_ids is None else position_ids.numpy()
        with told():
            made = self.known.read(self.graphs.step, ids, mask, given, past, positions)
        logits = torch.from_numpy(made.pop("logits"))
        grown: dict[str, Any] = {CACHE: cache_of(made, seen + tokens)}
        return CausalLMOutputWithPast(logits=logits, **grown)


@contextmanager
def told() -> Iterator[None]:
    """Images and prompts that do not fit together are the user's."""
    try:
        yield
    except ValueError as error:
        raise UsageError(str(error)) from error


def check_mask(mask: Tensor, shape: tuple[int, int]) -> None:
    """Raises UsageError for a mask that is not of all tokens, or has padding elsewhere than at the left."""
    if tuple(mask.shape) != shape:
        raise UsageError(f"attention_mask of {tuple(mask.shape)}: expected one of all tokens, {shape}.")
    if bool((mask[:, 1:] < mask[:, :-1]).any()) or not bool(mask[:, -1].all()):
        raise UsageError("attention_mask: the graphs take prompts that are filled up at the left.", hint='padding_side="left"')


def load_reader(folder: Path, stock: Any, graphs: OnnxModel, known: DecoderGraphs) -> OnnxReader:
    """What runs the graphs of a folder; how texts begin and end is read from it."""
    reader = OnnxReader(stock.config_class.from_pretrained(folder), graphs, known)
    reader.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return cast(OnnxReader, reader.train(False))
