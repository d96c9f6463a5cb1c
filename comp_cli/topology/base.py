"""What a shape of model can do: what it reads, how batches are made, which graphs are exported, how a folder is used.

A family holds one. Nothing here imports torch before it is needed: families are data, and light.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from .graph_specs import VISION, WHOLE, Axes, GraphSpec, Run, Signature, Step, Values, in_turn

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import GenerationConfig

    from ..data.batches import Collator
    from ..data.rows import Pair
    from ..families import Family
    from ..tasks import Task
    from .decoder_graphs import DecoderGraphs

PIXELS, IDS, MASK = INPUTS = ("pixel_values", "input_ids", "attention_mask")
IMAGE = "image"  # in the place of pixels, where a graph makes these itself: (images, height, width, 3) uint8
IMAGE_TOWER, TEXT_TOWER = "vision", "language"  # names of the towers whose tokens are those of an image, of a text

# Axes of free size of the inputs: one text for each image, or as many of both as one likes.
PAIRED: dict[str, Axes] = {PIXELS: {0: "batch"}, IDS: {0: "batch", 1: "tokens"}, MASK: {0: "batch", 1: "tokens"}}
APART: dict[str, Axes] = {PIXELS: {0: "images"}, IDS: {0: "texts", 1: "tokens"}, MASK: {0: "texts", 1: "tokens"}}

Config = Mapping[str, Any]  # a whole config.json, defaults filled in
Tensors = dict[str, "Tensor"]


class Written(NamedTuple):
    """Where the texts are that a model writes."""

    text: str  # the input that holds their tokens
    mask: str | None  # the one that says which of them are padding; None where `text` is -100 for all others
    head: str  # path of the module that makes logits of their states

    def predicted(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Which tokens of `text` are predicted from those before them, (batch, tokens - 1) booleans: the first one is not."""
        found = inputs[self.text] != -100 if self.mask is None else inputs[self.mask].bool()
        return found[:, 1:]


class Pixels(NamedTuple):
    """What a model takes of an image processor."""

    words: str  # its shape
    fit: Callable[[Mapping[str, Any]], bool]  # whether what is made of one picture has it


@dataclass(frozen=True)
class Halves:
    """The halves of a dual encoder in a class that is none by itself (see dual_interface.py): of images and of texts the paths
    of the module and of its projection, both read at the first token."""

    images: tuple[str, str]
    texts: tuple[str, str]
    temperature: float  # cosines are divided by it
    asked: str  # what the class itself is asked with, for the model card


@dataclass(frozen=True, kw_only=True)
class Topology(ABC):
    """One shape of model. Its fields say where a family has what; nothing outside asks for them, but calls the methods.

    inputs: what the model takes of what its processor makes. padding: of the texts of a batch, "longest" or, for models that
    were trained so, "max_length".
    """

    drops_in: ClassVar[str] = (
        "encoder"  # where image tokens leave: an encoder of images, or the "decoder" that writes about them
    )

    inputs: tuple[str, ...] = INPUTS
    padding: str = "longest"

    AXES: ClassVar[dict[str, Axes]] = PAIRED
    runtime: ClassVar[str] = "modeling_comp"  # module of comp_cli.runtime that makes and runs compact models
    pictures_apart: ClassVar[bool] = True  # whether a picture is made pixels of by itself, whatever the text
    exports: ClassVar[bool] = True  # whether it has graphs
    layouts: ClassVar[tuple[str, ...]] = ("optimum",)  # in which they can be written
    weight_only: ClassVar[tuple[str, ...]] = ()  # graphs whose matrices may be int4
    opset: ClassVar[int | None] = None  # of its graphs, where it has to be this one
    padded_by_tokenizer: ClassVar[bool] = True  # whether batches have the padding that the tokenizer makes

    # What it reads -----------------------------------------------------------------------------------------------------

    @property
    def reads_images(self) -> bool:
        return PIXELS in self.inputs

    @property
    def reads_texts(self) -> bool:
        return IDS in self.inputs

    @property
    def processor_class(self) -> str:
        """The class of transformers that reads the processor of a folder."""
        if self.reads_images and self.reads_texts:
            return "AutoProcessor"
        return "AutoImageProcessor" if self.reads_images else "AutoTokenizer"

    def parts_of(self, processor: Any) -> tuple[Any | None, Any | None]:
        """The image processor and the tokenizer in a processor; None for what the model does not read."""
        images = getattr(processor, "image_processor", processor) if self.reads_images else None
        return images, getattr(processor, "tokenizer", processor) if self.reads_texts else None

    def image_side(self, family: Family, config: Config) -> int:
        """Pixels of the side of an image, for a model of images."""
        return family.sections(config)[IMAGE_TOWER]["image_size"]

    def pixels_of(self, family: Family, config: Config) -> Pixels:
        """What an image processor has to make of a picture of any size."""
        shape = (3, self.image_side(family, config), self.image_side(family, config))
        return Pixels(f"{shape} of any", lambda made: tuple(made[PIXELS].shape) == (1, *shape))

    def text_section(self, family: Family, config: Config) -> Config:
        """The part of a config that says how long texts are and of which words, for a model of texts."""
        return family.sections(config)[TEXT_TOWER]

    def reads_the_end(self, family: Family) -> bool:
        """Whether texts are read at their end-of-text token."""
        return family.tower(TEXT_TOWER).text_end is not None

    def text_length(self, wanted: int, longest: int) -> int:
        """Tokens of a text: as many as wanted if the model takes so many, or all that it takes where texts are padded so."""
        return longest if self.padding == "max_length" else min(wanted, longest)

    def longest_text(self, family: Family, config: Config) -> int:
        """Tokens of the longest text that the model takes; 0 for a model of images."""
        return self.text_section(family, config)["max_position_embeddings"] if self.reads_texts else 0

    def text_tokens(self, tokens: Mapping[str, int]) -> int:
        """Tokens of a text among those of all streams (see `lengths`); 0 for a model of images."""
        return tokens.get(TEXT_TOWER, 0)

    def text_marks(self, family: Family, config: Config) -> dict[str, tuple[Any, int]]:
        """Tokens that begin and end the texts that the model writes: place in the config -> (token, size of the vocabulary)."""
        return {}

    @property
    def images_of_one_size(self) -> bool:
        """Whether every image becomes as many tokens as the reference image."""
        return True

    # The reference input -----------------------------------------------------------------------------------------------

    def lengths(self, family: Family, config: Config, text_tokens: int) -> dict[str, int]:
        """Tokens that enter each stream at the reference input, whose text has `text_tokens` where the model takes so many."""
        sections, patches, tokens = family.sections(config), 0, {}
        for tower in family.towers:
            own = sections[tower.name]
            for stream in tower.streams:
                if stream.source == "image":
                    patches = patches or (own["image_size"] // own["patch_size"]) ** 2  # of the tower that sees the image
                    tokens[stream.name] = patches + stream.skips_first
                elif stream.source == "text":
                    tokens[stream.name] = self.text_length(text_tokens, own["max_position_embeddings"])
        return tokens

    def uses(self, family: Family, config: Config, tokens: Mapping[str, int]) -> dict[str, int]:
        """How often a sample goes through a matrix outside the towers, by what `Family.fixed` says of it. tokens: see
        `lengths`."""
        images = ((name, stream) for name, (_, stream) in family.streams.items() if stream.source == "image")
        return {"once": 1, "patches": next((tokens[name] - stream.skips_first for name, stream in images), 0)}

    def pairs(self, family: Family, config: Config) -> dict[str, tuple[int, ...]]:
        """Pairs of a query and a key in the self-attention of each layer, of towers whose tokens do not all see each other."""
        return {}

    def fixed_flops(self, shapes: Mapping[str, tuple[int, ...]], uses: Mapping[str, int]) -> int:
        """FLOPs of a sample outside of all layers and of `Family.fixed`. shapes: of the weights; uses: see there."""
        return 0

    def step_flops(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """FLOPs outside the layers of a token that is written, and nothing before it computed again; 0 where none is."""
        return 0

    def image_tokens(self, config: Config) -> dict[str, Any]:
        """Where image tokens enter a decoder, for the runtime: comp.image_tokens of config.json. Nothing for others."""
        return {}

    def raster(self, config: Config, inputs: Mapping[str, Tensor], tokens: int) -> tuple[int, int] | None:
        """Rows and columns of the patches of one image, which has `tokens` of them, row by row; None where they are no raster.
        inputs: what was made of this image alone."""
        side = math.isqrt(tokens)
        return (side, side) if side * side == tokens else None

    # Batches -----------------------------------------------------------------------------------------------------------

    def first_token(self, family: Family, config: Config) -> int | None:
        """What the texts that the model writes begin with, in place of the tokenizer's; None where it writes none."""
        return None

    def collate(self, collator: Collator, pairs: Sequence[Pair]) -> tuple[dict[str, Any], list[bool]]:
        """Everything that the inputs are chosen of, by name, and which of the pairs have a text that is cut."""
        made: dict[str, Any] = {}
        cut = [False] * len(pairs)
        if self.reads_texts:
            texts = [collator.prompt.format(pair.text) for pair in pairs]
            made |= collator.processor(text=texts, padding=self.padding, **collator.limits)
            cut = collator.are_cut(texts, made[IDS].shape[1])
        if self.reads_images:
            made[PIXELS] = collator.pixels(pairs)
        return made, cut

    def count_tokens(self, inputs: Mapping[str, Tensor], processor: Any) -> dict[str, int]:
        """Tokens of all texts of a batch, by stream, as the model reads each text by itself: without padding, unless it was
        trained with padding to one length. processor: what made them."""
        if not self.reads_texts:
            return {}
        return {TEXT_TOWER: int(inputs[MASK].sum()) if self.padding == "longest" else inputs[IDS].numel()}

    def rows(self, inputs: Mapping[str, Tensor]) -> dict[str, list[int]]:
        """Of inputs of a batch that have not one row for each sample, how many rows each sample has."""
        return {}

    def random_inputs(
        self, family: Family, config: Config, batch: int, text_tokens: int, *, padded: int = 0, seed: int = 0
    ) -> Tensors:
        """Noise of the sizes that a model of this config takes: pixel_values (batch, 3, side, side), texts (batch, tokens). The
        last text ends with `padded` tokens of padding. Every text ends with the model's end-of-text token, where it is read
        there."""
        import torch

        generator = torch.Generator().manual_seed(seed)
        made = self._random_texts(family, config, batch, text_tokens, padded, generator)
        if self.reads_images:
            side = self.image_side(family, config)
            made[PIXELS] = torch.randn(batch, 3, side, side, generator=generator)
        return {name: made[name] for name in self.inputs}

    def _random_texts(self, family: Family, config: Config, batch: int, tokens: int, padded: int, generator: Any) -> Tensors:
        if not self.reads_texts:
            return {}
        import torch

        text = self.text_section(family, config)
        if self.padding == "max_length":
            tokens, padded = text["max_position_embeddings"], 0
        ids, mask = random_tokens(text["vocab_size"], batch, tokens, padded, generator)
        if self.reads_the_end(family):
            end = text["vocab_size"] - 1 if text["eos_token_id"] == 2 else text["eos_token_id"]
            ids = torch.where(ids == end, end - 1, ids).scatter(1, mask.sum(1, keepdim=True) - 1, end)
        return {IDS: ids * mask, MASK: mask}

    # The class of the model --------------------------------------------------------------------------------------------

    def interface(self, model_class: type) -> type:
        """The class that a model is loaded as: the given one, or a child of it that answers as this topology is described."""
        return model_class

    def facts(self, model: Any) -> dict[str, float]:
        """Numbers of a model that whoever runs its graphs needs besides."""
        return {}

    # Graphs ------------------------------------------------------------------------------------------------------------

    @property
    def why_none(self) -> str:
        """Why there are no graphs, as a sentence without its end, where there are none."""
        return ""

    def why_not(self, config: Config, layout: str) -> str | None:
        """Why there are none of a model of this config in a layout that others have, as a sentence; None where there are."""
        return None

    def splits(self, split: bool, layout: str) -> tuple[bool, ...]:
        """Which graphs a layout has: those that are whole, those of images and texts apart, or both; of each whether apart."""
        return (split,)

    def called(self, graph: str) -> str:
        """What transformers.js calls a graph."""
        return graph

    @property
    @abstractmethod
    def why_whole(self) -> str | None:
        """Why images and texts cannot be encoded by graphs of their own, as the end of a sentence; None where they can."""

    def axes(self) -> dict[str, Axes]:
        """Axes of free size of the inputs of the full graph."""
        return {name: self.AXES[name] for name in self.inputs}

    def full_graph(self, family: Family, config: Config, task: Task) -> GraphSpec:
        """The whole model: its inputs -> the outputs of the task."""
        example = partial(self.example, family, config)
        return GraphSpec(WHOLE, partial(run_model, task.outputs), task.outputs, self.axes(), example)

    def graphs(self, family: Family, config: Config, task: Task, split: bool) -> list[GraphSpec]:
        """The graphs of an export, in the order they run; split: images and texts apart."""
        return [self.full_graph(family, config, task)]

    def example(self, family: Family, config: Config, model: nn.Module) -> Tensors:
        """Inputs of the full graph to trace with: two texts; where images and texts are as many as one likes, three images."""
        apart = len({axes[0] for axes in self.axes().values()}) > 1
        texts, images = (self.random_inputs(family, config, batch, 7) for batch in (2, 3 if apart else 2))
        return {name: (images if name == PIXELS else texts)[name] for name in self.axes()}

    def one_for_all(self, split: bool) -> bool:
        """Whether the exported graphs take one image for any number of texts."""
        return False

    def expected(self, model: nn.Module, task: Task, inputs: Tensors, split: bool) -> Tensors:
        """What torch says, by the names of the outputs of the graphs: what an export is compared with."""
        return named_outputs(task.outputs, model, inputs)

    def case(self, family: Family, model: Any, task: Task, inputs: Tensors, split: bool) -> tuple[Tensors, Tensors]:
        """What an export is compared on, made of a batch: inputs of the graphs, and what torch says."""
        return inputs, self.expected(model, task, inputs, split)

    def run(self, step: Step, names: Iterable[str], values: Values) -> Values:
        """What the exported graphs make of the inputs of the model. step: runs one of them."""
        return in_turn(step, names, values)

    def runner(self, family: Family, config: Config) -> Run:
        """`run`, for a model of this config."""
        return self.run

    # Generated texts ---------------------------------------------------------------------------------------------------

    @property
    def written(self) -> Written | None:
        """Where the texts are that the model writes; None where it writes none."""
        return None

    @property
    def text_graphs(self) -> tuple[str, ...]:
        """Names of the graphs that generate texts; none where the model generates none."""
        return ()

    def decoder_graphs(self, family: Family, config: Config) -> DecoderGraphs:
        """What the graphs of a decoder that reads images are."""
        raise NotImplementedError(f"{type(self).__name__} reads no images into a decoder")

    def signatures(self, family: Family, config: Config) -> dict[str, Signature]:
        """What each of the `text_graphs` takes and hands out."""
        return {}

    def generation_config(self, family: Family, model: Any) -> GenerationConfig | None:
        """How texts begin and end, for `generate`; None where the model writes none."""
        return None

    def generate(self, family: Family, model: Any, inputs: Tensors, new_tokens: int) -> Tensor:
        """Tokens (batch, tokens) of texts that the model writes greedily, of so many new tokens at most."""
        raise NotImplementedError(f"{type(self).__name__} writes no texts")

    def stand_ins(self, model: nn.Module, encoder: nn.Module, decoder: Callable[[Any], nn.Module]) -> dict[str, nn.Module]:
        """What stands for all modules of a stock model when the `text_graphs` do their work, path -> module. encoder: runs the
        encoder graph; decoder: makes of the stock decoder what runs the others."""
        raise NotImplementedError(f"{type(self).__name__} writes no texts")

    # Code for the README of what is written ----------------------------------------------------------------------------

    @property
    def note(self) -> str | None:
        """A sentence for the card of a checkpoint, if there is more to say."""
        return None

    @abstractmethod
    def checkpoint_code(self, task: Task, longest: int, facts: Mapping[str, float]) -> str:
        """Code that asks `model` with what `processor` makes of the example, and prints the answer. longest: tokens that texts
        are padded to where all are of one length; facts: see `facts`."""

    @abstractmethod
    def graph_code(self, document: Mapping[str, Any], task: Task, generation: GenerationConfig | None, processor: Any) -> str:
        """The same for exported graphs, with `run`, `pixels` and `tokens` of report/card_code.py. document: export.json;
        processor: what makes pixels and tokens."""

    def tokens_code(self, code: str) -> str:
        """What is needed of the code that makes tokens of texts."""
        return code

    def client_code(
        self,
        document: Mapping[str, Any],
        task: Task,
        generation: GenerationConfig | None,
        processor: Any,
        hub_id: str | None,
    ) -> tuple[str, str] | None:
        """What to install for JavaScript, and code for it; None where there is none. hub_id: where it goes, if it does."""
        return None

    def graphs_note(self, document: Mapping[str, Any]) -> str | None:
        """A sentence for the card of graphs, if there is more to say."""
        if VISION not in document["graphs"]:
            return None
        return "Encode an image once, and match it against any number of texts: `images` is 1, or as many as texts."

    @property
    def generate_code(self) -> str | None:
        """Code that writes a text with `comp_cli.load_onnx`; None where the model writes none."""
        return None

    def padding_code(self, longest: int) -> str:
        """Arguments of a processor that pad and cut texts."""
        padded = f'padding="max_length", max_length={longest}' if self.padding == "max_length" else "padding=True"
        return f'{padded}, truncation=True, return_tensors="pt"'


def run_model(outputs: tuple[str, ...], model: nn.Module, inputs: Tensors) -> tuple[Tensor, ...]:
    """The named outputs of a model."""
    found = model(**inputs)
    return tuple(getattr(found, name) for name in outputs)


def named_outputs(outputs: tuple[str, ...], model: nn.Module, inputs: Tensors) -> Tensors:
    """The same by their names, as float32."""
    return {name: tensor.float() for name, tensor in zip(outputs, run_model(outputs, model, inputs), strict=True)}


class InputSizes(NamedTuple):
    """What model inputs hold."""

    images: int
    texts: int
    tokens: int  # of each text


def input_sizes(inputs: Mapping[str, Tensor]) -> InputSizes:
    """Numbers of images and texts in a batch, and the length of the texts, padding among it; 0 for what is not there."""
    texts, tokens = inputs[IDS].shape if IDS in inputs else (0, 0)
    return InputSizes(len(inputs.get(PIXELS, ())), texts, tokens)


def with_one_image(inputs: Tensors) -> Tensors:
    """The same texts, for the first image."""
    return inputs | {PIXELS: inputs[PIXELS][:1]}


def random_tokens(vocabulary: int, batch: int, tokens: int, padded: int, generator: Any) -> tuple[Tensor, Tensor]:
    """Token ids without special ones, as far as the vocabulary has others, and a mask whose last row ends with `padded` zeros;
    (batch, tokens) each."""
    import torch

    mask = torch.ones(batch, tokens, dtype=torch.long)
    mask[-1, tokens - padded :] = 0
    last = vocabulary - 1
    return torch.randint(min(5, last), last, (batch, tokens), generator=generator), mask
