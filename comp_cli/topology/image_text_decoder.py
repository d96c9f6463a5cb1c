"""Decoders that read images: a vision tower makes features of a picture, a projector makes them tokens, and a language model
reads them where a prompt has placeholders, and writes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from . import decoder_cards
from .base import IDS, MASK, Config, Pixels, Tensors, Topology, Written
from .caches import heads_of_groups
from .card_examples import LONGEST, QUESTION
from .decoder_graphs import DecoderGraphs, why_not
from .decoder_names import GRAPHS, MERGED
from .graph_specs import GraphSpec, Run, Signature
from .image_inputs import Pictures, Tile, has_class_token
from .prompts import IGNORED, as_asked, shortened, side_by_side, with_answer, without_answers

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import GenerationConfig

    from ..data.batches import Collator
    from ..data.rows import Pair
    from ..families import Family
    from ..runtime.token_selection import Stage
    from ..tasks import Task

LABELS = "labels"
IMAGE_STREAM, NEWLINE_STREAM = "image", "newline"
FRAME_TOKENS = 5  # that a chat template puts around a question, in the reference input
ANSWER_TOKENS = 4  # that are predicted in a random text
CHECKED_TOKENS = 8  # that are written to compare graphs with torch
DESCRIBE = "Describe the image."  # what is asked for a caption


@dataclass(frozen=True, kw_only=True)
class ImageTextDecoder(Topology):
    """processor: its class. pictures: how they go in. model: path of the module that joins images and text. text, features:
    of the language model and of the vision tower. attention: of a layer of a tower with [CLS], `{}` stands for its number;
    ranking: what of it makes the queries and keys that it ranks by. head: makes logits. newline: path of what stands between
    the rows of an image; None where nothing does. shuffle: attribute of the config by which patches that lie side by side
    become one token. plain: the prompt where the processor has no chat template; behind: what the processor adds to it by
    itself. chats: whether models of the family have a template. first_position: of
    a text. encode: image features as a graph makes them; None where there
    are no graphs, for the reason that `no_graphs` says, as the end of a sentence."""

    processor: str
    pictures: Pictures = Tile()
    model: str = "model"
    text: str = "model.language_model"
    features: str = "model.vision_tower"
    attention: str = "encoder.layers.{}.self_attn"
    ranking: tuple[str, str] = ("q_proj", "k_proj")
    head: str = "lm_head"
    newline: str | None = None
    shuffle: str | None = None
    plain: str = "USER: <image>\n{} ASSISTANT:"
    behind: str = ""
    chats: bool = True
    first_position: int = 0
    encode: Callable[[Any, Tensor], Tensor] | None = None
    no_graphs: str = "how its images become tokens is not known to comp as a graph"

    drops_in: ClassVar[str] = "decoder"
    runtime: ClassVar[str] = "modeling_comp_vlm"
    pictures_apart: ClassVar[bool] = False
    padded_by_tokenizer: ClassVar[bool] = False
    weight_only: ClassVar[tuple[str, ...]] = (MERGED,)
    opset: ClassVar[int] = 23  # the first with attention as one node

    @property
    def layouts(self) -> tuple[str, ...]:  # type: ignore[override]
        """transformers.js counts positions of most models from 0, and lets a token see those before it alone."""
        return ("optimum",) if self.first_position or self.pictures.prefix else ("optimum", "transformers.js")

    @property
    def exports(self) -> bool:  # type: ignore[override]
        return self.encode is not None

    @property
    def processor_class(self) -> str:
        return self.processor

    @property
    def written(self) -> Written:
        return Written(LABELS, None, self.head)

    @property
    def images_of_one_size(self) -> bool:
        return self.pictures.one_size

    def pixels_of(self, family: Family, config: Config) -> Pixels:
        return Pixels(f"{self.pictures.shape(config)} of any", lambda made: self.pictures.fit(config, made))

    # The runtime -------------------------------------------------------------------------------------------------------

    def image_tokens(self, config: Config) -> dict[str, Any]:
        shuffle = config[self.shuffle] if self.shuffle else None
        return {
            "model": self.model,
            "text": self.text,
            "class_attention": self._class_attention(config),
            "shuffle": shuffle,
            "newline": self.newline,
            "features": self.features,
            "square": self.pictures.square and self.shuffle is None,
        }

    def _class_attention(self, config: Config) -> dict[str, str] | None:
        """The attention in the layer of the tower that makes the features, if the tower has a [CLS]."""
        vision = config["vision_config"]
        if not has_class_token(vision):
            return None
        depth = vision["num_hidden_layers"]
        read = config["vision_feature_layer"]  # an index of hidden states, of which the first is none of a layer's
        deepest = max(index % (depth + 1) for index in (read if isinstance(read, list | tuple) else [read]))
        module = f"{self.features}.{self.attention.format(deepest - 1)}"
        return {"module": module, "query": self.ranking[0], "key": self.ranking[1]}

    def raster(self, config: Config, inputs: Mapping[str, Tensor], tokens: int) -> tuple[int, int] | None:
        return self.pictures.raster(config, inputs, tokens)

    # The reference input -----------------------------------------------------------------------------------------------

    def lengths(self, family: Family, config: Config, text_tokens: int) -> dict[str, int]:
        """Tokens of the reference image in the tower and in the decoder, and of the text with the template around it."""
        found = self.pictures.sizes(config)
        made = {"vision": sum(found.sequences), IMAGE_STREAM: found.tokens, "language": 0, NEWLINE_STREAM: found.newlines}
        made["language"] = self.text_length(text_tokens, self.longest_text(family, config)) + FRAME_TOKENS
        return {name: made[name] for name in family.streams}

    def longest_text(self, family: Family, config: Config) -> int:
        found = self.pictures.sizes(config)
        longest: int = self.text_section(family, config)["max_position_embeddings"]
        return longest - found.tokens - found.newlines - FRAME_TOKENS

    def text_tokens(self, tokens: Mapping[str, int]) -> int:
        return tokens["language"] - FRAME_TOKENS

    def uses(self, family: Family, config: Config, tokens: Mapping[str, int]) -> dict[str, int]:
        found = self.pictures.sizes(config)
        return {"once": 1, "patches": found.patches, "features": found.features}

    def pairs(self, family: Family, config: Config) -> dict[str, tuple[int, ...]]:
        depth = family.sections(config)["vision"][family.tower("vision").depth]
        return {"vision": tuple(sum(n * n for n in self.pictures.sequences(config, layer)) for layer in range(depth))}

    def fixed_flops(self, shapes: Mapping[str, tuple[int, ...]], uses: Mapping[str, int]) -> int:
        """Logits of the last token, which are all that writing needs of a prompt; and the pooling head that a SigLIP may have,
        which runs on every tile, for nothing."""
        head = f"{self.features}.head"
        if f"{head}.probe" not in shapes:
            return self.step_flops(shapes)
        tokens, width = shapes[f"{self.features}.embeddings.position_embedding.weight"]
        inner = shapes[f"{head}.mlp.fc1.weight"][0]
        pooled = 2 * width**2 + 2 * tokens * (width**2 + width) + 2 * width * inner  # one query, its way out, keys and values
        return self.step_flops(shapes) + 2 * pooled * uses["patches"] // tokens

    def step_flops(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        tied = f"{self.text}.embed_tokens.weight"  # where checkpoints hold the matrix once
        rows, columns = shapes.get(f"{self.head}.weight", shapes.get(tied, (0, 0)))
        return 2 * rows * columns

    # Batches -----------------------------------------------------------------------------------------------------------

    def collate(self, collator: Collator, pairs: Sequence[Pair]) -> tuple[dict[str, Any], list[bool]]:
        """One sequence for each pair: its image and what is asked, by the chat template, and the answer, which alone is
        predicted. Filled up at the right. Questions and answers are cut, not what the template puts around them."""
        processor, tokenizer = collator.processor, collator.processor.tokenizer
        asked = [(pair.text, pair.answer or "") if collator.answers else (DESCRIBE, pair.text) for pair in pairs]
        # Questions of some data hold the placeholder, which the template puts.
        plain = [[text.replace(processor.image_token, "").strip() for text in both] for both in asked]
        texts = [[shortened(tokenizer, text, collator.max_text) for text in both] for both in plain]
        prompts = [as_asked(processor, question, self.plain) for (question, _), _ in texts]
        images = [[pair.image.convert("RGB")] for pair in pairs]
        made = dict(processor(images=images, text=prompts, padding=True, return_tensors="pt"))
        rows = []
        for place, (prompt, (_, (answer, _))) in enumerate(zip(prompts, texts, strict=True)):
            there = made[MASK][place].bool()
            names = (IDS, *self.pictures.rows)
            row = {name: made[name][place][there].tolist() for name in names}
            change, said = with_answer(tokenizer, prompt + self.behind, answer)
            asks = len(row[IDS]) - change
            follows = {IDS: said} | {name: [value] * len(said) for name, value in self.pictures.rows.items()}
            row = {name: [*row[name][:asks], *follows[name]] for name in names}
            rows.append(row | {MASK: [1] * len(row[IDS]), LABELS: [IGNORED] * asks + said})
        fill = {IDS: tokenizer.pad_token_id or 0, MASK: 0, LABELS: IGNORED} | dict.fromkeys(self.pictures.rows, 0)
        return made | side_by_side(rows, fill), [any(cut for _, cut in both) for both in texts]

    def rows(self, inputs: Mapping[str, Tensor]) -> dict[str, list[int]]:
        return self.pictures.apart(inputs)

    def count_tokens(self, inputs: Mapping[str, Tensor], processor: Any) -> dict[str, int]:
        """Without placeholders."""
        text = inputs[MASK].bool() & (inputs[IDS] != processor.image_token_id)
        return {"language": int(text.sum())}

    def random_inputs(
        self,
        family: Family,
        config: Config,
        batch: int,
        text_tokens: int,
        *,
        padded: int = 0,
        seed: int = 0,
        images: int = 1,
    ) -> Tensors:
        """Noise in the place of `images` reference images in each prompt, with a token of text before each, and random tokens
        behind them; the last few are predicted. The last prompt ends with `padded` tokens of padding."""
        import torch

        generator = torch.Generator().manual_seed(seed)
        found, image = self.pictures.sizes(config), image_token(config)
        layout = ([0] + [1] * (found.tokens + found.newlines)) * images
        layout += [0] * (text_tokens + FRAME_TOKENS - images)
        holds = torch.tensor(layout, dtype=torch.bool).expand(batch, -1)
        usual = ordinary_tokens(config, self.text_section(family, config)["vocab_size"])
        ids = torch.tensor(usual)[torch.randint(len(usual), holds.shape, generator=generator)].masked_fill(holds, image)
        mask = torch.ones_like(ids)
        mask[-1, len(layout) - padded :] = 0
        end = mask.sum(1, keepdim=True)
        place = torch.arange(len(layout))
        predicted = (place >= end - ANSWER_TOKENS) & (place < end)
        made = {IDS: ids * mask, MASK: mask, LABELS: ids.masked_fill(~predicted, IGNORED)}
        made |= {"mm_token_type_ids": holds.long(), "token_type_ids": predicted.long()}
        made |= self.pictures.random(config, batch, images, generator)
        return {name: made[name] for name in self.inputs}

    # Generated texts ---------------------------------------------------------------------------------------------------

    def generate(self, family: Family, model: Any, inputs: Tensors, new_tokens: int) -> Tensor:
        """What the model answers: prompts are cut where answers begin, and filled up at the left."""
        prompts = without_answers(inputs, inputs[LABELS], (IDS, MASK, *self.pictures.rows))
        given = prompts | {name: inputs[name] for name in self.pictures.inputs}
        written: Tensor = model.generate(**given, num_beams=1, do_sample=False, max_new_tokens=new_tokens)
        return written[:, prompts[IDS].shape[1] :]

    # Graphs ------------------------------------------------------------------------------------------------------------

    @property
    def text_graphs(self) -> tuple[str, ...]:
        return GRAPHS

    def decoder_graphs(self, family: Family, config: Config) -> DecoderGraphs:
        """What the graphs of a model of this config are."""
        assert self.encode is not None  # checked before: see no_graphs
        text = self.text_section(family, config)
        return DecoderGraphs(
            layout=self.image_tokens(config),
            encode=self.encode,
            head=self.head,
            stages=stages_of(config),
            tokens=self.pictures.sizes(config).tokens,
            placeholder=image_token(config),
            side=family.sections(config)["vision"]["image_size"],
            width=text["hidden_size"],
            vocabulary=text["vocab_size"],
            heads=heads_of_groups(config, family.tower("language"), text),
            prefix=self.pictures.prefix,
            first_position=self.first_position,
        )

    def graphs(self, family: Family, config: Config, task: Task, split: bool) -> list[GraphSpec]:
        return self.decoder_graphs(family, config).specs()

    def signatures(self, family: Family, config: Config) -> dict[str, Signature]:
        return self.decoder_graphs(family, config).signatures()

    def case(self, family: Family, model: Any, task: Task, inputs: Tensors, split: bool) -> tuple[Tensors, Tensors]:
        """Prompts that are filled up at the left, with what torch writes behind them, greedily: the logits of every token."""
        import torch

        prompts = without_answers(inputs, inputs[LABELS], (IDS, MASK, *self.pictures.rows))
        given = prompts | {name: inputs[name] for name in self.pictures.inputs}
        found = model.generate(
            **given,
            num_beams=1,
            do_sample=False,
            min_new_tokens=CHECKED_TOKENS,
            max_new_tokens=CHECKED_TOKENS,
            output_logits=True,
            return_dict_in_generate=True,
        )
        written = found.sequences[:, prompts[IDS].shape[1] :]
        return given | {LABELS: written}, {"logits": torch.stack(found.logits, 1).float()}

    def generation_config(self, family: Family, model: Any) -> GenerationConfig:
        found: GenerationConfig = model.generation_config
        return found

    def runner(self, family: Family, config: Config) -> Run:
        graphs = self.decoder_graphs(family, config)
        return lambda step, names, values: graphs.logits(step, values)

    # Code for cards ----------------------------------------------------------------------------------------------------

    @property
    def why_none(self) -> str:
        return self.no_graphs

    def why_not(self, config: Config, layout: str) -> str | None:
        return why_not(stages_of(config), layout)

    @property
    def why_whole(self) -> str:
        return "reads images inside of a text"

    def checkpoint_code(self, task: Task, longest: int, facts: Mapping[str, float]) -> str:
        question = QUESTION if task.has_answers else DESCRIBE
        asked = f"text = {self.plain.format(question)!r}"
        if self.chats:
            content = f'[{{"type": "image"}}, {{"type": "text", "text": "{question}"}}]'
            asked = (
                f'chat = [{{"role": "user", "content": {content}}}]\n'
                "text = processor.apply_chat_template(chat, add_generation_prompt=True)"
            )
        return (
            f"{asked}\n"
            'inputs = processor(images=load_image(picture), text=text, return_tensors="pt")\n'
            f"written = model.generate(**inputs, max_new_tokens={LONGEST})\n"
            'print(processor.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))'
        )

    def graph_code(self, document: Mapping[str, Any], task: Task, generation: GenerationConfig | None, processor: Any) -> str:
        return decoder_cards.python_loop(document, generation, self._prompt(processor, task), processor, self.first_position)

    def tokens_code(self, code: str) -> str:
        return code.strip("\n").partition("  #")[0]

    def client_code(
        self,
        document: Mapping[str, Any],
        task: Task,
        generation: GenerationConfig | None,
        processor: Any,
        hub_id: str | None,
    ) -> tuple[str, str] | None:
        prompt = self._prompt(processor, task)
        if document["layout"] == "transformers.js":
            return "@huggingface/transformers", decoder_cards.client_loop(prompt, hub_id)
        return "onnxruntime-node", decoder_cards.node_loop(document, generation, processor, self.first_position)

    def graphs_note(self, document: Mapping[str, Any]) -> str:
        return decoder_cards.IN_CLIENT if document["layout"] == "transformers.js" else decoder_cards.CACHES

    def _prompt(self, processor: Any, task: Task) -> str:
        """What is asked in examples."""
        return as_asked(processor, QUESTION if task.has_answers else DESCRIBE, self.plain) + self.behind

    @property
    def generate_code(self) -> str:
        return (
            "writer, processor = comp_cli.load_onnx(folder), AutoProcessor.from_pretrained(folder)\n"
            f"text = {self.plain.format(QUESTION)!r}  # or what processor.apply_chat_template makes of a chat\n"
            'inputs = processor(images=load_image(picture), text=text, return_tensors="pt")\n'
            f"written = writer.generate(**inputs, max_new_tokens={LONGEST})\n"
            'print(processor.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))'
        )


def stages_of(config: Config) -> tuple[Stage, ...]:
    """At which image tokens leave."""
    from ..runtime.token_selection import Stage

    return tuple(Stage(**stage) for stage in config.get("comp", {}).get("token_stages", ()))


def image_token(config: Config) -> int:
    """The id of the placeholder, which configs call by two names."""
    found: int = config["image_token_id"] if "image_token_id" in config else config["image_token_index"]
    return found


def ordinary_tokens(config: Config, vocabulary: int) -> list[int]:
    """Ids of words: none that a config names."""
    parts = (config, *(part for part in config.values() if isinstance(part, dict)))
    marks = ("_token_id", "_token_index")
    named = (value for part in parts for name, value in part.items() if isinstance(name, str) and name.endswith(marks))
    special = {one for value in named for one in (value if isinstance(value, list) else [value])}
    return [token for token in range(min(5, vocabulary - 1), vocabulary) if token not in special]
