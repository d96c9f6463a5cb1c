"""Texts out of exported graphs: the stock `generate` of transformers, with ONNX Runtime where its weights would be."""

from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithCrossAttentions

from ..checkpoint.loading import quiet_libraries
from ..errors import RefusedError, UsageError
from ..families import find_family
from ..files.store import read_config, read_json
from ..runtime.modeling_comp import CACHES, cache_name, refuse_unknown, the_cache
from ..topology.caches import begin, go_on
from ..topology.graph_specs import ENCODER, HIDDEN, Values
from .checks import check_files, check_signature, writer_signatures
from .sessions import OnnxModel

# What this release of transformers calls keys and values in what a model hands out.
CACHE = cache_name(CausalLMOutputWithCrossAttentions) or CACHES[0]


def load_writer(folder: Path, device: str = "cpu") -> transformers.PreTrainedModel:
    """A model of the stock class with no weights: its parts run the graphs that `comp export` wrote into a folder.

    `generate` takes what it always takes: prompts, beams, sampling. Raises RefusedError for graphs that generate no texts, or a
    folder without."""
    config = read_config(folder)
    family, architecture, _ = find_family(config)
    names = list(family.topology.text_graphs)
    if not names or not all((folder / name).is_file() for name in names):
        needed = f"Needed: {', '.join(names)}." if names else f"A {architecture} generates no texts."
        raise RefusedError(f"{folder}: no graphs for text generation.", hint=needed)
    check_files(folder, ["config.json", *names])
    if (folder / "export.json").is_file() and read_json(folder / "export.json").get("with_preprocessing"):
        said = f"{folder}: its graphs prepare pictures themselves, and generate() hands over pixel values."
        raise RefusedError(said, hint="Export the model without it; README.md of the folder runs these graphs.")
    stock = getattr(transformers, architecture)
    described = stock.config_class.from_dict(config).to_dict()
    expected = writer_signatures(described, family)
    graphs = OnnxModel(folder, names, device)
    for name, session in graphs.sessions.items():
        check_signature(folder / name, session, expected[name])
    if family.topology.drops_in == "decoder":
        from .image_text import load_reader

        return load_reader(folder, stock, graphs, family.topology.decoder_graphs(family, described))
    with quiet_libraries(), torch.device("meta"):
        model = stock(stock.config_class.from_pretrained(folder)).eval()
    stand_ins = family.topology.stand_ins(model, OnnxEncoder(graphs), partial(stand_in_decoder, graphs))
    for path, module in stand_ins.items():
        model.set_submodule(path, module)
    return model


class OnnxEncoder(nn.Module):
    """The encoder graph, as the vision tower or as the text encoder that attends to images."""

    def __init__(self, graphs: OnnxModel):
        super().__init__()
        self.graphs = graphs

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,  # taken and not used, as in the stock layers
        **kwargs: Any,
    ) -> BaseModelOutput:
        refuse_unmade(self, kwargs)
        images = encoder_hidden_states if pixel_values is None else pixel_values
        if images is None:
            raise UsageError("the encoder graph reads images: give pixel_values.")
        given = {"pixel_values": images.float()}
        if input_ids is not None:
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            given |= {"input_ids": input_ids, "attention_mask": mask}
        made = self.graphs.step(ENCODER, {name: tensor.numpy() for name, tensor in given.items()})
        return BaseModelOutput(last_hidden_state=torch.from_numpy(made[HIDDEN]))


class OnnxDecoder:
    """The decoder graphs, with the cache of transformers between them. Mixed in before the stock class."""

    def __init__(self, config: transformers.PretrainedConfig, graphs: OnnxModel):
        transformers.PreTrainedModel.__init__(cast(Any, self), config)  # none of the layers of the stock class
        self.graphs = graphs
        self.place = nn.Parameter(torch.empty(0), requires_grad=False)  # where transformers looks for the device

    def forward(
        self,
        input_ids: Tensor,
        encoder_hidden_states: Tensor | None = None,
        cache: EncoderDecoderCache | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,  # all ones; generate() asks whether there is a place for it
        use_cache: bool | None = True,
        is_decoder: bool = True,
        **kwargs: Any,
    ) -> CausalLMOutputWithCrossAttentions:
        refuse_unmade(self, kwargs)
        known = the_cache(cache, past_key_values)
        if attention_mask is not None and not attention_mask.all():
            raise UsageError("the graphs take prompts of one length in a batch: no padding.")
        text = input_ids.numpy()
        if known is None or known.get_seq_length() == 0:
            if encoder_hidden_states is None:
                raise UsageError("a text begins with what the encoder graph made: give encoder_hidden_states.")
            made = begin(self.graphs.step, text, encoder_hidden_states.numpy())
            across = from_values(made, "encoder")
        else:
            parts = isinstance(known, EncoderDecoderCache) and (known.self_attention_cache, known.cross_attention_cache)
            if not parts or not all(isinstance(part, DynamicCache) for part in parts):
                raise UsageError("the graphs go on from an EncoderDecoderCache of two DynamicCaches only.")
            across = known.cross_attention_cache
            past = to_values(known.self_attention_cache, "decoder") | to_values(across, "encoder")
            made = go_on(self.graphs.step, text, past)
        grown: dict[str, Any] = {CACHE: EncoderDecoderCache(from_values(made, "decoder"), across)} if use_cache else {}
        return CausalLMOutputWithCrossAttentions(logits=torch.from_numpy(made["logits"]), **grown)


def stand_in_decoder(graphs: OnnxModel, stock: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """What generates texts with the decoder graphs, as the class of the stock decoder does."""
    stock_class = type(stock)
    made = type(f"Onnx{stock_class.__name__}", (OnnxDecoder, stock_class), {})
    return made(stock.config, graphs).eval()


def refuse_unmade(module: Any, given: dict[str, Any]) -> None:
    """Raise for what graphs cannot do, and for arguments that nobody knows."""
    if given.get("output_hidden_states"):
        raise UsageError("the graphs hand out no hidden states: leave output_hidden_states out.")
    refuse_unknown(module, given)


def from_values(made: Values, part: str) -> DynamicCache:
    """The keys and values of a part, "decoder" or "encoder", among what a graph made."""
    keys = [name for name in made if name.endswith(f".{part}.key")]
    pairs = ((made[key], made[key.removesuffix("key") + "value"]) for key in keys)
    return DynamicCache([(torch.from_numpy(key), torch.from_numpy(value)) for key, value in pairs])


def to_values(cache: DynamicCache, part: str) -> Values:
    """The same, as a graph hands it out."""
    named = ((f"present.{i}.{part}", layer) for i, layer in enumerate(cache.layers))
    return {f"{name}.{kind}": getattr(layer, f"{kind}s").numpy() for name, layer in named for kind in ("key", "value")}
