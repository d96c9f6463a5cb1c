"""Encoder-decoders: a decoder generates texts, and attends to the tokens of an image, or to those of a question about it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .base import IDS, INPUTS, MASK, PIXELS, Config, Tensors, Topology, Written, random_tokens
from .caches import begin, cached, go_on, heads_of, keys_and_values
from .card_examples import LONGEST, QUESTION, picture_of
from .graph_specs import DECODER, ENCODER, HIDDEN, PAST, STATES, Axes, GraphSpec, Shape, Signature, Step, Values, matrix_dtype

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import GenerationConfig
    from transformers.cache_utils import EncoderDecoderCache

    from ..data.batches import Collator
    from ..data.rows import Pair
    from ..families import Family
    from ..tasks import Task

ANSWER_TOWER = "answer"  # what decodes where TEXT_TOWER encodes the question
ANSWER_TOKENS = 4  # of an answer in the reference input: start, two words, end
ANSWER_INPUTS = ("labels", "decoder_attention_mask")  # labels: what the decoder reads; so the loss is an output

WRITING = """
written = [{begin}]
made = run("decoder_model", {{"input_ids": np.array([written]), "encoder_hidden_states": states}})
while len(written) < {longest}:
    written.append(int(made["logits"][0, -1].argmax()))
    if written[-1] == {end}:
        break
    past = {{name.replace("present", "past_key_values"): value for name, value in made.items()}}
    made |= run("decoder_with_past_model", past | {{"input_ids": np.array([written[-1:]])}})
print(tokenizer.decode(written))
"""


@dataclass(frozen=True, kw_only=True)
class EncoderDecoder(Topology):
    """vision: path of the module that encodes images. image_embeds: what the rest of the model reads of its output. decoder:
    path of the language model, whose tower is the last one of the family. head: path of the module that makes logits of its
    states. question: path of the text encoder that it attends to; None where it attends to the image. begin, end: names of
    the first and the last token's id of a text, in the decoder's part of the config."""

    vision: str
    image_embeds: str
    decoder: str
    head: str
    question: str | None = None
    begin: str = "bos_token_id"
    end: str = "sep_token_id"

    @property
    def written(self) -> Written:
        return Written(*self._written, self.head)

    @property
    def _written(self) -> tuple[str, str]:
        """The inputs with the tokens of texts and their mask."""
        return (IDS, MASK) if self.question is None else ANSWER_INPUTS

    @property
    def prompt(self) -> tuple[str, ...]:
        """The inputs that a text is written from."""
        return (PIXELS,) if self.question is None else INPUTS

    @property
    def text_graphs(self) -> tuple[str, ...]:
        return ENCODER, DECODER, PAST

    # What it reads -----------------------------------------------------------------------------------------------------

    def text_marks(self, family: Family, config: Config) -> dict[str, tuple[Any, int]]:
        part = self._sizes(family, config)
        return {f"{family.towers[-1].config}.{name}": (part[name], part["vocab_size"]) for name in (self.begin, self.end)}

    def first_token(self, family: Family, config: Config) -> int:
        return self._sizes(family, config)[self.begin]

    def lengths(self, family: Family, config: Config, text_tokens: int) -> dict[str, int]:
        tokens = super().lengths(family, config, text_tokens)
        return tokens if self.question is None else tokens | {ANSWER_TOWER: ANSWER_TOKENS}

    def collate(self, collator: Collator, pairs: Sequence[Pair]) -> tuple[dict[str, Any], list[bool]]:
        made, cut = super().collate(collator, pairs)
        if self.question is not None:
            answers: list[Any] = [pair.answer for pair in pairs]  # which every pair has, see Task.accepts
            read = collator.processor.tokenizer(answers, padding=True, **collator.limits)
            made |= zip(ANSWER_INPUTS, (read[IDS], read[MASK]), strict=True)
            cut = list(map(or_, cut, collator.are_cut(answers, read[IDS].shape[1])))
        made[self.written.text][:, 0] = collator.first_token
        return made, cut

    def count_tokens(self, inputs: Mapping[str, Tensor], processor: Any) -> dict[str, int]:
        tokens = super().count_tokens(inputs, processor)
        return tokens if self.question is None else tokens | {ANSWER_TOWER: int(inputs[ANSWER_INPUTS[1]].sum())}

    def _random_texts(self, family: Family, config: Config, batch: int, tokens: int, padded: int, generator: Any) -> Tensors:
        """The last answer is a token shorter, if anything is padded."""
        made = super()._random_texts(family, config, batch, tokens, padded, generator)
        if self.question is None:
            return made
        vocabulary = self._sizes(family, config)["vocab_size"]
        ids, mask = random_tokens(vocabulary, batch, ANSWER_TOKENS, min(padded, 1), generator)
        return made | dict(zip(ANSWER_INPUTS, (ids * mask, mask), strict=True))

    def _sizes(self, family: Family, config: Config) -> Mapping[str, Any]:
        """Of the decoder."""
        return family.sections(config)[family.towers[-1].name]

    # Steps -------------------------------------------------------------------------------------------------------------

    def encode(self, model: nn.Module, inputs: Tensors) -> Tensor:
        """What the decoder attends to: the tokens of the image, or those of the question that is asked of it; (batch, tokens,
        dim)."""
        states = getattr(model.get_submodule(self.vision)(inputs[PIXELS]), self.image_embeds)
        if self.question is None:
            return states
        asked = {"input_ids": inputs[IDS], "attention_mask": inputs[MASK]}
        return model.get_submodule(self.question)(**asked, encoder_hidden_states=states).last_hidden_state

    def decode(
        self,
        model: nn.Module,
        states: Tensor,
        text: Tensor,
        attention_mask: Tensor | None = None,
        cache: EncoderDecoderCache | None = None,
    ) -> Tensor:
        """Logits (batch, tokens, vocabulary) behind every token of a text (batch, tokens). The cache grows."""
        from ..runtime.modeling_comp import CACHES, cache_name

        decoder = model.get_submodule(self.decoder)
        given: dict[str, Any] = {"input_ids": text, "attention_mask": attention_mask, "encoder_hidden_states": states}
        if cache is not None:
            given[cache_name(decoder.forward) or CACHES[0]] = cache
        return decoder(**given, use_cache=cache is not None).logits

    def generate(self, family: Family, model: Any, inputs: Tensors, new_tokens: int) -> Tensor:
        room = self._sizes(family, model.config.to_dict())["max_position_embeddings"] - 1
        given = {name: inputs[name] for name in self.prompt}
        return model.generate(**given, num_beams=1, do_sample=False, max_new_tokens=min(new_tokens, room))

    def generation_config(self, family: Family, model: Any) -> GenerationConfig:
        from transformers import GenerationConfig

        part = self._sizes(family, model.config.to_dict())
        begin, end = part[self.begin], part[self.end]
        return GenerationConfig(
            bos_token_id=begin, decoder_start_token_id=begin, eos_token_id=end, pad_token_id=part["pad_token_id"]
        )

    # Graphs ------------------------------------------------------------------------------------------------------------

    @property
    def why_whole(self) -> str:
        return "is written in parts anyway"

    def axes(self) -> dict[str, Axes]:
        return {name: self.AXES.get(name, {0: "batch", 1: "answer_tokens"}) for name in self.inputs}

    def full_graph(self, family: Family, config: Config, task: Task) -> GraphSpec:
        """The forward pass over texts that are there: the inputs of the family -> logits (batch, tokens, vocabulary)."""

        def forward(model: nn.Module, inputs: Tensors) -> tuple[Tensor]:
            states, (text, mask) = self.encode(model, inputs), self._written
            return (self.decode(model, states, inputs[text], inputs[mask]),)

        return replace(super().full_graph(family, config, task), forward=forward)

    def graphs(self, family: Family, config: Config, task: Task, split: bool) -> list[GraphSpec]:
        """As optimum lays them out.

        Encoder: what a text is written from -> last_hidden_state (batch, tokens, dim). Decoder: the beginning of a text,
        input_ids (batch, tokens), and encoder_hidden_states -> logits (batch, tokens, vocabulary), and keys and values of
        every layer, (batch, heads, tokens, head_dim): present.0.decoder.key ... present.0.encoder.value. Decoder with past: the
        tokens that come next, and keys and values as either decoder hands them out (past_key_values.0.decoder.key ...) ->
        their logits, and keys and values of the text with them; those of what is attended to do not change, and are not
        handed out again."""
        part = self._sizes(family, config)
        layers, vocabulary = part["num_hidden_layers"], part["vocab_size"]
        past = cached(layers, "past_key_values", "decoder", "encoder")

        def encoder(model: nn.Module, inputs: Tensors) -> tuple[Tensor]:
            return (self.encode(model, inputs),)

        def decoder(model: nn.Module, inputs: Tensors) -> tuple[Tensor, ...]:
            from transformers.cache_utils import DynamicCache, EncoderDecoderCache

            cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
            logits = self.decode(model, inputs[STATES], inputs[IDS], cache=cache)
            return (logits, *keys_and_values(cache.self_attention_cache, cache.cross_attention_cache))

        def decoder_with_past(model: nn.Module, inputs: Tensors) -> tuple[Tensor, ...]:
            from transformers.cache_utils import DynamicCache, EncoderDecoderCache

            known = [inputs[name] for name in past]
            own, across = (DynamicCache(list(zip(known[i::4], known[i + 1 :: 4], strict=True))) for i in (0, 2))
            # Layers want to be told that there is something to attend to; what they read of it is in the cache.
            logits = self.decode(model, known[2], inputs[IDS], cache=EncoderDecoderCache(own, across))
            return (logits, *keys_and_values(own))

        def from_images(model: nn.Module) -> Tensors:
            made = self.example(family, config, model)
            return {name: made[name] for name in self.prompt}

        def begun(model: nn.Module) -> Tensors:
            import torch

            (states,) = without_gradients(encoder, model, from_images(model))
            text = torch.arange(7 * len(states)).view(len(states), 7) % vocabulary
            return {IDS: text, STATES: states}

        def gone_on(model: nn.Module) -> Tensors:
            first = begun(model)
            _, *kept = without_gradients(decoder, model, first)
            return {IDS: first[IDS][:, :3]} | dict(zip(past, kept, strict=True))

        axes, text = self.axes(), {IDS: {0: "batch", 1: "tokens"}}
        grown = {name: {0: "batch", 2: "past_tokens"} if ".decoder." in name else self._attended(2) for name in past}
        present = partial(cached, layers, "present")
        return [
            GraphSpec(ENCODER, encoder, (HIDDEN,), {name: axes[name] for name in self.prompt}, from_images),
            GraphSpec(DECODER, decoder, ("logits", *present("decoder", "encoder")), text | {STATES: self._attended(1)}, begun),
            GraphSpec(PAST, decoder_with_past, ("logits", *present("decoder")), text | grown, gone_on),
        ]

    def _attended(self, axis: int) -> Axes:
        """Axes of what is attended to; its tokens vary where they are those of a question."""
        return {0: "batch"} if self.question is None else {0: "batch", axis: "encoder_tokens"}

    def expected(self, model: nn.Module, task: Task, inputs: Tensors, split: bool) -> Tensors:
        """Logits behind every token. Without the mask of the text, which the graphs have not."""
        return {"logits": self.decode(model, self.encode(model, inputs), inputs[self.written.text])}

    def run(self, step: Step, names: Iterable[str], values: Values) -> Values:
        """Logits for whole texts: their first halves at once, the rest token by token, as texts are written."""
        import numpy as np

        text = values[self.written.text]
        half = (text.shape[1] + 1) // 2
        made = begin(step, text[:, :half], step(ENCODER, values)[HIDDEN])
        logits = [made["logits"]]
        for place in range(half, text.shape[1]):
            made |= go_on(step, text[:, place : place + 1], made)
            logits.append(made["logits"])
        return {"logits": np.concatenate(logits, axis=1)}

    def signatures(self, family: Family, config: Config) -> dict[str, Signature]:
        tower, text = family.towers[-1], self._sizes(family, config)
        vision = family.sections(config)["vision"]
        side, dim = vision["image_size"], (vision if self.question is None else text)["hidden_size"]
        free: dict[str, Shape] = {PIXELS: (None, 3, side, side), IDS: (None, None), MASK: (None, None)}
        tokens: dict[str, Shape] = {IDS: (None, None)}
        states: dict[str, Shape] = {STATES: (None, None, dim)}
        logits: dict[str, Shape] = {"logits": (None, None, text["vocab_size"])}
        layers = heads_of(config, tower, text)

        def cache(prefix: str, *parts: str) -> dict[str, Shape]:
            sizes = (layer[part] for layer in layers for part in parts for _ in ("key", "value"))
            names = cached(len(layers), prefix, *parts)
            return {name: (None, heads, None, dim) for name, (heads, dim) in zip(names, sizes, strict=True)}

        return {
            ENCODER: Signature({name: free[name] for name in self.prompt}, {HIDDEN: (None, None, dim)}),
            DECODER: Signature(tokens | states, logits | cache("present", "decoder", "encoder")),
            PAST: Signature(tokens | cache("past_key_values", "decoder", "encoder"), logits | cache("present", "decoder")),
        }

    def stand_ins(self, model: nn.Module, encoder: nn.Module, decoder: Callable[[Any], nn.Module]) -> dict[str, nn.Module]:
        writes = {self.decoder: decoder(model.get_submodule(self.decoder))}
        if self.question is None:
            return {self.vision: encoder} | writes
        from .stand_ins import Encoded

        # The encoder graph does the work of the vision tower with that of the question.
        return {self.vision: Encoded(self.image_embeds), self.question: encoder} | writes

    # Code for cards ----------------------------------------------------------------------------------------------------

    def checkpoint_code(self, task: Task, longest: int, facts: Mapping[str, float]) -> str:
        return (
            f'inputs = processor(images=load_image(picture){self._asked}, return_tensors="pt")\n'
            f"written = model.generate(**inputs, max_new_tokens={LONGEST - 1})\n"
            "print(processor.decode(written[0], skip_special_tokens=True))"
        )

    def graph_code(self, document: Mapping[str, Any], task: Task, generation: GenerationConfig | None, processor: Any) -> str:
        """Greedy, with the cache."""
        begin, end = (getattr(generation, f"{name}_token_id") for name in ("decoder_start", "eos"))
        given = f"{{{picture_of(document)}}}"
        if self.question is not None:
            given = f'tokens(["{QUESTION}"]) | {given}'
        states = f'states = run("{Path(ENCODER).stem}", {given})["last_hidden_state"]'
        return states + WRITING.format(begin=begin, end=end, longest=LONGEST)

    def tokens_code(self, code: str) -> str:
        """Where nothing is asked, the tokenizer alone."""
        return code.strip("\n").partition("\n")[0] if self.question is None else code

    @property
    def generate_code(self) -> str:
        return (
            "writer, processor = comp_cli.load_onnx(folder), AutoProcessor.from_pretrained(folder)\n"
            f'inputs = processor(images=load_image(picture){self._asked}, return_tensors="pt")\n'
            f"written = writer.generate(**inputs, num_beams=3, max_new_tokens={LONGEST - 1})\n"
            "print(processor.decode(written[0], skip_special_tokens=True))"
        )

    @property
    def _asked(self) -> str:
        return "" if self.question is None else f', text="{QUESTION}"'


def without_gradients(
    forward: Callable[[nn.Module, Tensors], tuple[Tensor, ...]], model: nn.Module, inputs: Tensors
) -> tuple[Tensor, ...]:
    """What a graph makes, as it will hand it out: of and as float32."""
    import torch

    dtype = matrix_dtype(model)
    given = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
    with torch.no_grad():
        return tuple(tensor.float() for tensor in forward(model, given))
