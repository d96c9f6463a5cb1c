"""Train the `demo-vlm` model that ships inside the package: a small LLaVA that answers questions about generated scenes.

    python scripts/train_vlm.py --output comp_cli/demo_vlm --log benchmarks/results/demo_vlm_training.jsonl

A CLIP tower of 14 x 14 patches and a Llama. Questions alone teach little within an hour; three things teach the rest. (1) The
tower, begun with the weights of the demo BLIP's, learns to say what covers each patch, where the middles of things are, and (at
[CLS]) how many things of each kind there are; then it is frozen. (2) The decoder learns to describe scenes, and then to answer
questions, of numbers more than of the rest. (3) In one layer, two heads of the words that name things are taught to look at
these, and two to divide their attention between the middles of things and the first token, by how many there are. All questions
about an image go through as one sequence, whose turns do not see each other.
"""

import argparse
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from torch.nn import functional as F
from train_clip import attention_in_fp32
from train_demo import KINDS
from training import cosine, in_parts, save, take_step
from transformers import (
    AttentionInterface,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from comp_cli.data import scenes

PATCH, GRID = 8, 14
SIDE = PATCH * GRID  # px; scenes are enlarged a little, so that there is more than one patch for what is small
SPECIAL = ("<pad>", "<unk>", "<s>", "</s>", "<image>")
PAD, UNKNOWN, START, END, IMAGE = range(5)
ASK, ANSWER = "USER: <image>\n{}", " ASSISTANT:"  # LLaVA's
DESCRIBE = "Describe the image."
CHAT = (
    "{% for message in messages %}{% if message['role'] == 'user' %}USER: {% else %}ASSISTANT: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{% if message['role'] == 'user' %} {% else %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def words() -> list[str]:
    nouns = [word for noun in (*scenes.SHAPES, "shape") for word in (noun, scenes.plural(noun))]
    relations = sorted({word for relation in scenes.RELATIONS for word in relation.split()})
    asked = "what colour is the how many are there yes no describe image a and user assistant : , . ?".split()
    return list(dict.fromkeys([*SPECIAL, *asked, *scenes.COLOURS, *scenes.SIZES, *scenes.NUMBERS, *nouns, *relations]))


def build_processor() -> LlavaProcessor:
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words())}, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(Regex(r"\bcolor\b"), "colour")])
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", START)])
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made,
        model_max_length=512,
        padding_side="left",
        extra_special_tokens={"image_token": "<image>"},
        **special,
    )
    size = {"height": SIDE, "width": SIDE}
    return LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=size),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=CHAT,
        num_additional_image_tokens=1,
    )


def build_model(tokenizer) -> LlavaForConditionalGeneration:
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=8,
        image_size=SIDE,
        patch_size=PATCH,
        hidden_act="gelu",
        projection_dim=128,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=START,
        eos_token_id=END,
        pad_token_id=PAD,
        initializer_range=0.04,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=GRID * GRID,
    )
    return LlavaForConditionalGeneration(config)


def start_from_demo(tower: nn.Module, demo: Path, pixels: torch.Tensor) -> None:
    """The weights of the demo BLIP's tower in a CLIP tower: queries, keys and values apart, the bias of the patches in the
    position embeddings, which are stretched; CLIP's norm before the layers, which BLIP has not, at the mean of `pixels`."""
    found, made, at = load_file(demo / "model.safetensors"), {}, "vision_model.embeddings."
    places = found[at + "position_embedding"][0]
    side = math.isqrt(len(places) - 1)
    grid = places[1:].T.unflatten(1, (side, side))[None]
    stretched = F.interpolate(grid, size=(GRID, GRID), mode="bicubic")[0].flatten(1).T + found[at + "patch_embedding.bias"]
    made["embeddings.position_embedding.weight"] = torch.cat((places[:1], stretched))
    made["embeddings.class_embedding"] = found[at + "class_embedding"].flatten()
    made["embeddings.patch_embedding.weight"] = found[at + "patch_embedding.weight"]
    for layer in range(tower.config.num_hidden_layers):
        old, new = f"vision_model.encoder.layers.{layer}.", f"encoder.layers.{layer}."
        for kind in ("weight", "bias"):
            for name, part in zip("qkv", found[f"{old}self_attn.qkv.{kind}"].chunk(3), strict=True):
                made[f"{new}self_attn.{name}_proj.{kind}"] = part
            made[f"{new}self_attn.out_proj.{kind}"] = found[f"{old}self_attn.projection.{kind}"]
            for name in ("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"):
                made[f"{new}{name}.{kind}"] = found[f"{old}{name}.{kind}"]
    for kind in ("weight", "bias"):
        made[f"post_layernorm.{kind}"] = found[f"vision_model.post_layernorm.{kind}"]
    tower.load_state_dict(made, strict=False)
    with torch.no_grad():
        embedded = tower.embeddings(pixels)
        tower.pre_layrnorm.weight.fill_(embedded.std(-1, unbiased=False).mean().item())
        tower.pre_layrnorm.bias.fill_(embedded.mean().item())


class Helpers(nn.Module):
    """Heads that exist while the tower is trained only."""

    def __init__(self, width: int):
        super().__init__()
        self.patch = nn.ModuleDict({kind: nn.Linear(width, 1 + len(names)) for kind, names in KINDS.items()})
        self.middle = nn.Linear(width, 2)
        self.number = nn.ModuleDict({kind: nn.Linear(width, len(names) * len(scenes.NUMBERS)) for kind, names in KINDS.items()})

    def loss(self, patches: torch.Tensor, whole: torch.Tensor, scene_list: list[scenes.Scene]) -> torch.Tensor:
        """What covers each patch (images, patches, width), which holds the middle of a thing, and how many things of each kind
        the whole (images, width) has."""
        loss = F.cross_entropy(self.middle(patches).flatten(0, 1).float(), middles(scene_list).flatten())
        for kind, names in KINDS.items():
            of_patch = self.patch[kind](patches).flatten(0, 1).float()
            loss = loss + F.cross_entropy(of_patch, patch_labels(scene_list, kind).flatten())
            numbers = [[sum(getattr(t, kind) == name for t in scene) for name in names] for scene in scene_list]
            of_whole = self.number[kind](whole).unflatten(1, (len(names), -1)).flatten(0, 1).float()
            loss = loss + 0.5 * F.cross_entropy(of_whole, torch.tensor(numbers).flatten())
        return loss


class Guided:
    """The attention of the words that name things, in one layer, and where it should go."""

    LAYER, LOOKING, COUNTING = 2, (0, 3), (1, 4)  # of six heads, three of each key-value head
    MOST = len(scenes.NUMBERS)  # shares of the attention: one for each thing that may be there, and one

    def __init__(self) -> None:
        self.rows: torch.Tensor | None = None  # (images, words) positions; None: nothing is guided
        self.logs = torch.empty(0)  # (images, heads, words, tokens) log of the attention

    def __call__(self, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask, **options):
        if self.rows is not None and module.layer_idx == self.LAYER:
            asked = self.rows[:, None, :, None]
            rows = query.gather(2, asked.expand(-1, query.shape[1], -1, query.shape[-1])).float()
            keys = key.float().repeat_interleave(query.shape[1] // key.shape[1], 1)
            with torch.autocast("cpu", enabled=False):
                scores = rows @ keys.transpose(2, 3) * module.scaling
            sees = mask.gather(2, asked.expand(-1, -1, -1, mask.shape[-1]))
            self.logs = scores.masked_fill(~sees, -1e9).log_softmax(-1)
        return attention_in_fp32(module, query, key, value, mask, **options)

    def loss(self, things: torch.Tensor, middles: torch.Tensor, image: slice) -> torch.Tensor:
        """How far attention is from where it should be. things, middles (images, words, patches): patches of the things that
        a word names, and the middles of those that are counted."""
        there = things.any(-1)
        seen = self.logs[:, self.LOOKING, :, image].masked_fill(~things[:, None], -torch.inf).logsumexp(-1)
        looking = -seen.transpose(1, 2)[there].mean()
        counted = self.logs[:, self.COUNTING]
        shares, number = middles[:, None] / self.MOST, middles.sum(-1)
        counting = -(shares * counted[..., image]).sum(-1) - (1 - number / self.MOST)[:, None] * counted[..., 0]
        return looking + counting.transpose(1, 2)[number > 0].mean()


GUIDED = Guided()
AttentionInterface.register("guided", GUIDED)


def named(scene: scenes.Scene, question: str) -> list[tuple[int, list[scenes.Thing], bool]]:
    """The words of a question that name things: which word, which things, and whether these are counted."""
    words = question.rstrip("?").split()
    found = []
    for place, word in enumerate(words):
        for shape in scenes.SHAPES:
            if word in (shape, scenes.plural(shape)):
                colour = words[place - 1] if words[place - 1] in scenes.COLOURS else None
                found.append((place, scenes.Caption.matching(scene, (None, colour, shape)), words[0] == "how"))
        if words[0] == "how" and word in scenes.COLOURS:
            found.append((place, scenes.Caption.matching(scene, (None, word, None)), True))
    return found


def places(thing: scenes.Thing) -> tuple[float, float, float]:
    """(x, y, radius) of a thing in patches."""
    return tuple(value * GRID / scenes.IMAGE_SIZE for value in (thing.x, thing.y, scenes.SIZES[thing.size]))


def patch_labels(scene_list: list[scenes.Scene], kind: str) -> torch.Tensor:
    """(images, patches) class of the thing that covers each patch, 0 for background."""
    labels = torch.zeros(len(scene_list), GRID, GRID, dtype=torch.long)
    for image, scene in enumerate(scene_list):
        for thing in scene:
            labels[image][covered(thing)] = 1 + KINDS[kind].index(getattr(thing, kind))
    return labels.flatten(1)


def covered(thing: scenes.Thing) -> torch.Tensor:
    """(GRID, GRID), True for the patches that a thing covers."""
    x, y, r = places(thing)
    centres = torch.arange(GRID) + 0.5
    return ((centres - y).abs() < r + 0.1)[:, None] & ((centres - x).abs() < r + 0.1)[None, :]


def middles(scene_list: list[scenes.Scene]) -> torch.Tensor:
    """(images, patches) 1 for the patch in which the middle of a thing is."""
    labels = torch.zeros(len(scene_list), GRID, GRID, dtype=torch.long)
    for image, scene in enumerate(scene_list):
        for thing in scene:
            x, y, _ = places(thing)
            labels[image, int(y), int(x)] = 1
    return labels.flatten(1)


Kinds = dict[str, tuple[float, float]]


@dataclass(frozen=True)
class Part:
    """One part of the training. The rate is a cosine from `lr` that would reach zero after `horizon` steps, with a warm-up.

    kinds: how often a question is asked, and how much it counts in the loss, by its first word; none train the tower."""

    name: str
    steps: int
    images: int
    lr: float
    horizon: int
    kinds: Kinds

    @property
    def guided(self) -> bool:
        return "how" in self.kinds

    def rate(self, step: int) -> float:
        return cosine(self.lr, step, self.horizon)


QUESTIONS: Kinds = {"describe": (0.3, 0.3), "what": (1.0, 0.7), "how": (1.0, 1.5), "is": (1.0, 0.7)}
PARTS = (
    Part("tower", 1500, 16, 6e-4, 1600, {}),
    Part("descriptions", 500, 16, 1.5e-3, 5000, {"describe": (1.0, 1.0), "what": (1.0, 1.0)}),
    Part("first questions", 400, 16, 1.2e-3, 3400, QUESTIONS),
    Part("questions", 2400, 16, 1.2e-3, 2550, QUESTIONS),
)


def scenes_of(rng: random.Random, count: int) -> list[tuple[scenes.Scene, int]]:
    """So many scenes of the training split, and the seeds of their backgrounds."""
    return list(scenes.images("train", count, seed=rng.randrange(10**9)))


def turns_of(rng: random.Random, scene: scenes.Scene, kinds: Kinds) -> Iterator[tuple[str, str, float]]:
    """(question, answer, weight) of every turn about a scene. Tokens of descriptions share their weight."""
    for question, answer in [*scenes.ask_everything(rng, scene, relations=1), (DESCRIBE, scenes.describe(scene))]:
        share, weight = kinds.get(question.split()[0].lower(), (0.0, 0.0))
        if rng.random() < share:
            yield question, answer, weight


def sequence(tokenizer, scene: scenes.Scene, turns: list[tuple[str, str, float]]) -> dict[str, list]:
    """Prompt with the image, then turns that do not see each other: ids, which turn each is of (0: all see it), positions,
    labels and weights; and of the words that name things the place, the things, and those that are counted."""
    ids = [START, *tokenizer(ASK.format("").replace("<image>", "<image>" * GRID**2), add_special_tokens=False)["input_ids"]]
    prompt = len(ids)
    made = {"ids": ids, "turn": [0] * prompt, "place": list(range(prompt)), "label": [-100] * prompt, "weight": [0.0] * prompt}
    made |= {"words": [], "things": [], "middles": []}
    for number, (question, answer, weight) in enumerate(turns, 1):
        asked = tokenizer(question + ANSWER, add_special_tokens=False)["input_ids"]
        said = [*tokenizer(answer, add_special_tokens=False)["input_ids"], END]
        together = asked + said[:-1]
        for word, things, counted in named(scene, question):
            made["words"].append(len(ids) + word)
            made["things"].append(sum((covered(thing).flatten() for thing in things), torch.zeros(GRID**2)) > 0)
            made["middles"].append(middles([tuple(things)] if counted else [()])[0].float())
        made["ids"] += together
        made["turn"] += [number] * len(together)
        made["place"] += range(prompt, prompt + len(together))
        made["label"] += [-100] * (len(asked) - 1) + said  # of the next token
        made["weight"] += [weight] * len(together)
    return made


def draw_batch(rng: random.Random, processor, part: Part) -> dict:
    chosen = scenes_of(rng, part.images)
    pixels = pixels_of(processor, chosen)
    if not part.kinds:
        return {"scenes": [scene for scene, _ in chosen], "pixel_values": pixels}
    rows = [sequence(processor.tokenizer, scene, list(turns_of(rng, scene, part.kinds))) for scene, _ in chosen]
    longest = max(len(row["ids"]) for row in rows)
    fill = {"ids": PAD, "turn": -1, "place": 0, "label": -100, "weight": 0.0}
    made = {
        name: torch.tensor([row[name] + [value] * (longest - len(row[name])) for row in rows]) for name, value in fill.items()
    }
    most, nothing = max(len(row["words"]) for row in rows), torch.zeros(GRID**2)
    made["words"] = torch.tensor([row["words"] + [0] * (most - len(row["words"])) for row in rows])
    for name, kind in (("things", torch.bool), ("middles", torch.float)):
        made[name] = torch.stack([torch.stack([*row[name], *[nothing] * (most - len(row[name]))]).to(kind) for row in rows])
    return {"pixel_values": pixels, **made}


def pixels_of(processor, chosen: list[tuple[scenes.Scene, int]]) -> torch.Tensor:
    return processor.image_processor([scenes.render(*one) for one in chosen], return_tensors="pt")["pixel_values"]


def tower_loss(model, helpers: Helpers, batch: dict) -> torch.Tensor:
    seen = model.model.vision_tower(batch["pixel_values"], output_hidden_states=True)
    return helpers.loss(seen.hidden_states[-2][:, 1:], seen.pooler_output, batch["scenes"])


def answer_loss(model, batch: dict, guided: bool) -> torch.Tensor:
    """Cross-entropy of the answers' tokens, weighted, and of the guided heads."""
    with torch.no_grad():
        seen = model.model.vision_tower(batch["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
    embedded = model.get_input_embeddings()(batch["ids"])
    features = model.model.multi_modal_projector(seen).to(embedded.dtype)
    embedded = embedded.masked_scatter((batch["ids"] == IMAGE)[..., None], features)
    turn = batch["turn"]
    sees = ((turn[:, None] == 0) | (turn[:, :, None] == turn[:, None])).tril()[:, None]
    GUIDED.rows = batch["words"] if guided else None
    states = model.model.language_model(
        inputs_embeds=embedded, attention_mask=sees, position_ids=batch["place"], use_cache=False
    ).last_hidden_state
    told = batch["label"] != -100
    losses = F.cross_entropy(model.lm_head(states[told]).float(), batch["label"][told], reduction="none")
    weight = batch["weight"][told]
    loss = (losses * weight).sum() / weight.sum()
    if not guided:
        return loss
    GUIDED.rows = None
    first = int((batch["ids"][0] == IMAGE).nonzero()[0])
    return loss + 0.3 * GUIDED.loss(batch["things"], batch["middles"], slice(first, first + GRID**2))


@torch.no_grad()
def accuracy(model, processor, split: str, count: int) -> dict[str, float]:
    """Share of right answers by kind of question, and of all that `ask` asks, in fp32."""
    model.eval()
    tokenizer, expanded = processor.tokenizer, "<image>" * GRID**2
    right: dict[str, list[bool]] = {"colour": [], "number": [], "relation": []}
    chosen = list(scenes.images(split, count))
    for start in range(0, count, 50):
        part = chosen[start : start + 50]
        pixels = pixels_of(processor, part)
        for related in (False, True):
            asked = []
            for row, (scene, background) in enumerate(part):
                rng = random.Random(background)
                found = scenes.ask_relation(rng, scene) if related else scenes.ask(rng, scene)
                asked += [(row, *found)] if found else []
            prompts = [(ASK.format(question) + ANSWER).replace("<image>", expanded) for _, question, _ in asked]
            text = tokenizer(prompts, padding=True, return_tensors="pt")
            inputs = {"input_ids": text["input_ids"], "attention_mask": text["attention_mask"]}
            logits = model(**inputs, pixel_values=pixels[[row for row, *_ in asked]], logits_to_keep=1).logits[:, -1]
            written = tokenizer.convert_ids_to_tokens(logits.argmax(-1))
            for (_, question, answer), said in zip(asked, written, strict=True):
                kind = {"what": "colour", "how": "number", "is": "relation"}[question.split()[0]]
                right[kind].append(said == answer)
    model.train()
    asked_kinds = right["colour"] + right["number"]
    return {k: round(sum(r) / len(r), 4) for k, r in right.items()} | {"asked": round(sum(asked_kinds) / len(asked_kinds), 4)}


def train_part(
    part: Part, model, processor, rng: random.Random, args: argparse.Namespace, tell: Callable[[dict], None]
) -> None:
    """Train the tower with helper heads, or all but the tower, with an optimiser of the part's own."""
    model.model.language_model.set_attn_implementation("guided" if part.guided else "sdpa")
    tower = model.model.vision_tower
    helpers = Helpers(tower.config.hidden_size) if not part.kinds else None
    decoder = (model.model.multi_modal_projector, model.model.language_model, model.lm_head)
    weights = [weight for module in ((tower, helpers) if helpers else decoder) for weight in module.parameters()]
    optimiser = torch.optim.AdamW(weights, lr=part.lr, weight_decay=0.02, betas=(0.9, 0.98))
    running = 0.0
    for step in range(1, part.steps + 1):
        batch = draw_batch(rng, processor, part)
        with torch.autocast("cpu", torch.bfloat16):
            loss = tower_loss(model, helpers, batch) if helpers else answer_loss(model, batch, part.guided)
        take_step(loss, weights, optimiser, part.rate(step))
        running += loss.item()
        if step % args.every == 0 or step == part.steps:
            line = {"part": part.name, "step": step, "loss": round(running / ((step - 1) % args.every + 1), 4)}
            tell(line | ({} if helpers else {"validation": accuracy(model, processor, "validation", 400)}))
            running = 0.0
            save(model, processor, args.output)


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    processor = build_processor()
    model = build_model(processor.tokenizer)
    if args.go_on_after:
        model = LlavaForConditionalGeneration.from_pretrained(args.output)
    else:
        start_from_demo(model.model.vision_tower, args.demo, pixels_of(processor, scenes_of(random.Random(args.seed), 16)))
    in_parts(args, PARTS, model, processor, train_part, accuracy)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--demo", type=Path, default=Path("comp_cli/demo"), help="the demo BLIP, whose tower is begun with")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--go-on-after", choices=[part.name for part in PARTS[:-1]], help="start from what --output holds")
    parser.add_argument("--every", type=int, default=100)
    train(parser.parse_args())
