"""Tiny models that read images into a decoder, one of each family: random weights, five decoder layers, a vocabulary of 100.

A sample is a prompt with the inputs that it needs when it stands alone; `batch` puts several side by side, padded.
"""

import copy
import functools
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

LAYERS, EOS, IMAGE, VIDEO, START, END = 5, 2, 90, 91, 92, 93
SUPPRESSED = [
    EOS,
    IMAGE,
    VIDEO,
    START,
    END,
]  # a random model writes the ids of image tokens, and then there is no image for them
TEXT: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": EOS,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "patch_size": 4}
STAGES = {  # by the rule that a test is about
    "key-norm": [
        {"layer": 1, "rule": "key-norm", "keep": 5, "settings": {}},
        {"layer": 3, "rule": "key-norm", "keep": 2, "settings": {}},
    ],
    "last-attention": [
        {"layer": 1, "rule": "last-attention", "share": 0.5, "settings": {}},
        {"layer": 4, "rule": "last-attention", "share": 0.2, "settings": {}},
    ],
    "cls-clusters": [
        {"layer": 0, "rule": "cls-clusters", "keep": 6, "settings": {"centre_share": 0.4}},
        {"layer": 2, "rule": "last-attention", "keep": 4, "settings": {}},
        {"layer": 3, "rule": "key-norm", "keep": 1, "settings": {}},
    ],
}
PINPOINTS = [[16, 32], [32, 16], [32, 32]]
PROMPTS: dict[str, Sequence[int | str]] = {  # numbers are words, letters are images of three sizes
    "one": [5, 6, "a", 7, 8, 9],
    "two": [5, "b", 14, "c", 10, 11, 12, 13],
    "three": [1, 5, 6, 7, "c", 14, "a", 15, 16, "b", 20, 21],
    "none": [5, 6, 20, 21, 22],
}


@dataclass(frozen=True)
class Picture:
    inputs: dict[str, Tensor]
    patches: Tensor  # (tokens,) bool: which of its placeholders are patches; the others are newlines


@dataclass(frozen=True)
class Sample:
    ids: tuple[int, ...]
    pictures: tuple[Picture, ...]
    inputs: dict[str, Tensor]  # with input_ids (1, n)
    images: tuple[tuple[int, ...], ...]  # where the patches of each image are in ids
    newlines: tuple[int, ...]


@dataclass(frozen=True)
class Family:
    """make: the stock model. picture: of a size "a", "b" or "c". join: inputs of the images of several samples.
    image_tokens: what a compact model of it has in config.json. around: ids before and behind each image.
    arrange: values of the tower's patches, (tiles, patches, 1), to those of image tokens, (tokens, 1) each image.
    joins: whether images side by side are tiles of one."""

    make: Callable[[], Any]
    picture: Callable[[Any, str, torch.Generator], Picture]
    join: Callable[[Sequence[Sequence[Picture]]], dict[str, Tensor]]
    image_tokens: dict[str, Any]
    around: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    types: Callable[[Tensor, Tensor], dict[str, Tensor]] = lambda ids, mask: {}
    arrange: Callable[[Any, Tensor, dict[str, Tensor]], Tensor] = field(default=lambda model, values, inputs: values[0])

    joins: bool = False

    @property
    def has_class_token(self) -> bool:
        return self.image_tokens["class_attention"] is not None


def tokens_of(
    features: str,
    text: str = "language_model",
    attention: str | None = None,
    shuffle: float | None = None,
    newline: str | None = None,
) -> dict[str, Any]:
    """The block comp.image_tokens of config.json."""
    read = attention and {"module": f"model.{attention}", "query": "q_proj", "key": "k_proj"}
    return {
        "model": "model",
        "text": f"model.{text}",
        "class_attention": read or None,
        "shuffle": shuffle,
        "newline": newline and f"model.{newline}",
        "features": f"model.{features}",
    }


def randomised(model: Any, seed: int = 0) -> Any:
    """Weights at which every part matters: biases and norms are not those of a fresh model either."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() < 2:
                parameter.add_(0.1 * noise)
            elif "embed_tokens" in name or "lm_head" in name:
                parameter.copy_(noise / (7 if "gemma" in model.config.get_text_config().model_type and "embed" in name else 1))
            else:
                parameter.copy_(noise * 1.2 / parameter[0].numel() ** 0.5)
    return model.eval().requires_grad_(False)


# Images


def square(side: int, tokens: int) -> Callable[[Any, str, torch.Generator], Picture]:
    """Images of one size."""

    def picture(model: Any, size: str, generator: torch.Generator) -> Picture:
        pixels = torch.randn(1, 3, side, side, generator=generator)
        return Picture({"pixel_values": pixels}, torch.ones(tokens, dtype=torch.bool))

    return picture


def stacked(rows: Sequence[Sequence[Picture]]) -> dict[str, Tensor]:
    """Inputs that have one row an image, whatever its sample."""
    pictures = [picture for row in rows for picture in row]
    return {
        name: torch.cat([picture.inputs[name] for picture in pictures]) for name in (pictures[0].inputs if pictures else ())
    }


def tiles(model: Any, size: str, generator: torch.Generator) -> Picture:
    """An image cut into tiles, with the whole one in front: (1, tiles, 3, 16, 16). Two of the sizes need padding cut off."""
    sizes = torch.tensor([{"a": [32, 32], "b": [16, 30], "c": [30, 12]}[size]])
    count = image_size_to_num_patches(sizes[0], PINPOINTS, 16)
    inputs = {"pixel_values": torch.randn(1, count, 3, 16, 16, generator=generator), "image_sizes": sizes}
    packed = arrange_tiles(model, torch.ones(count, 16, 1), inputs)
    return Picture(inputs, ~packed[:, 0].isnan())


def arrange_tiles(model: Any, values: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """Stock packing, with nan where a newline is."""
    strategy = {"vision_feature_select_strategy": "default"} if model.config.model_type == "llava_next" else {}
    newline = torch.tensor([torch.nan])
    return model.model.pack_image_features([values], inputs["image_sizes"], image_newline=newline, **strategy)[0][0]


def padded_tiles(rows: Sequence[Sequence[Picture]]) -> dict[str, Tensor]:
    pictures = [picture for row in rows for picture in row]
    if not pictures:
        return {}
    pixels = [picture.inputs["pixel_values"] for picture in pictures]
    most = max(part.shape[1] for part in pixels)
    pixels = [torch.cat([part, part.new_zeros(1, most - part.shape[1], *part.shape[2:])], 1) for part in pixels]
    return {
        "pixel_values": torch.cat(pixels),
        "image_sizes": torch.cat([picture.inputs["image_sizes"] for picture in pictures]),
    }


def frames(rows: Sequence[Sequence[Picture]]) -> dict[str, Tensor]:
    """SmolVLM: one row a sample, filled up with images of zeros."""
    most = max(len(row) for row in rows)
    if most == 0:
        return {}
    pixels = torch.zeros(len(rows), most, 3, 24, 24)
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            pixels[i, j] = picture.inputs["pixel_values"][0]
    return {"pixel_values": pixels}


def grid(model: Any, size: str, generator: torch.Generator) -> Picture:
    """Qwen: patches as rows, two by two of them an image token."""
    height, width = {"a": (8, 8), "b": (8, 4), "c": (4, 12), "large": (32, 32)}[size]
    pixels = torch.randn(height * width, 3 * 2 * 4 * 4, generator=generator)
    inputs = {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, height, width]])}
    return Picture(inputs, torch.ones(height * width // 4, dtype=torch.bool))


def shuffled(model: Any, values: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """InternVL: an image token is made of a square of patches."""
    side = round(values.shape[1] ** 0.5)
    return model.model.pixel_shuffle(values.unflatten(1, (side, side)), scale_factor=0.5).flatten(1, 2).sum(-1, keepdim=True)[0]


# Families


def llava() -> Any:
    vision = TOWER | {"model_type": "clip_vision_model", "image_size": 16}
    text = TEXT | {"model_type": "llama"}
    options = {"vision_feature_layer": -2, "vision_feature_select_strategy": "default", "image_token_id": IMAGE}
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(vision_config=vision, text_config=text, **options)
    )


def llava_next() -> Any:
    vision = TOWER | {"model_type": "clip_vision_model", "image_size": 16}
    text = TEXT | {"model_type": "mistral", "sliding_window": None}
    options = {"vision_feature_layer": -2, "vision_feature_select_strategy": "default", "image_token_id": IMAGE}
    config = transformers.LlavaNextConfig(vision_config=vision, text_config=text, image_grid_pinpoints=PINPOINTS, **options)
    return transformers.LlavaNextForConditionalGeneration(config)


def llava_onevision() -> Any:
    vision = TOWER | {"model_type": "siglip_vision_model", "image_size": 16, "vision_use_head": False}
    options = {
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
    }
    text = TEXT | {"model_type": "qwen2"}
    config = transformers.LlavaOnevisionConfig(
        vision_config=vision, text_config=text, image_grid_pinpoints=PINPOINTS, **options
    )
    return transformers.LlavaOnevisionForConditionalGeneration(config)


def qwen(kind: str) -> Any:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]}
    vision = {"depth": 2, "hidden_size": 32, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
    own = {
        "Qwen2VL": {"embed_dim": 32, "hidden_size": 48, "mlp_ratio": 2},
        "Qwen2_5_VL": {"intermediate_size": 64, "window_size": 16, "out_hidden_size": 48, "fullatt_block_indexes": [1]},
        "Qwen3VL": {
            "depth": 3, "intermediate_size": 64, "out_hidden_size": 48, "deepstack_visual_indexes": [0, 1],
            "num_position_embeddings": 64,
        },
    }[kind]  # fmt: skip
    text = TEXT | {"rope_parameters": rope | ({"mrope_interleaved": True} if kind == "Qwen3VL" else {})}
    ids = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=vision | own, **ids)
    return getattr(transformers, f"{kind}ForConditionalGeneration")(config)


def internvl() -> Any:
    vision = TOWER | {"image_size": [24, 24], "patch_size": [4, 4]}
    options = {"image_token_id": IMAGE, "image_seq_length": 9, "downsample_ratio": 0.5}
    config = transformers.InternVLConfig(vision_config=vision, text_config=TEXT | {"model_type": "qwen2"}, **options)
    return transformers.InternVLForConditionalGeneration(config)


def smolvlm() -> Any:
    text = TEXT | {"model_type": "llama"}
    vision = TOWER | {"image_size": 24}
    config = transformers.SmolVLMConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, scale_factor=2)
    return transformers.SmolVLMForConditionalGeneration(config)


def paligemma() -> Any:
    vision = TOWER | {"model_type": "siglip_vision_model", "image_size": 16, "vision_use_head": False, "projection_dim": 48}
    text = TEXT | {"model_type": "gemma", "num_image_tokens": 16}
    config = transformers.PaliGemmaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, projection_dim=48)
    return transformers.PaliGemmaForConditionalGeneration(config)


def _qwen(kind: str) -> Family:
    types = lambda ids, mask: {"mm_token_type_ids": (ids == IMAGE).long()}  # noqa: E731
    return Family(lambda: qwen(kind), grid, stacked, tokens_of("visual"), ((START,), (END,)), types)


CLIP_LAYER, INTERN_LAYER = "vision_tower.encoder.layers.1.self_attn", "vision_tower.encoder.layer.2.attention"
FAMILIES = {
    "llava": Family(llava, square(16, 16), stacked, tokens_of("vision_tower", attention=CLIP_LAYER)),
    "llava_next": Family(
        llava_next,
        tiles,
        padded_tiles,
        tokens_of("vision_tower", attention=CLIP_LAYER, newline="image_newline"),
        arrange=arrange_tiles,
    ),
    "llava_onevision": Family(llava_onevision, tiles, padded_tiles, tokens_of("vision_tower", newline="image_newline")),
    "qwen2_vl": _qwen("Qwen2VL"),
    "qwen2_5_vl": _qwen("Qwen2_5_VL"),
    "qwen3_vl": _qwen("Qwen3VL"),
    "internvl": Family(
        internvl,
        square(24, 9),
        stacked,
        tokens_of("vision_tower", attention=INTERN_LAYER, shuffle=0.5),
        arrange=shuffled,
        joins=True,
    ),
    "smolvlm": Family(smolvlm, square(24, 9), frames, tokens_of("vision_model", text="text_model"), joins=True),
    # The prompt is seen in both directions: its tokens are of type 0.
    "paligemma": Family(
        paligemma,
        square(16, 16),
        stacked,
        tokens_of("vision_tower"),
        types=lambda ids, mask: {"token_type_ids": torch.zeros_like(ids)},
    ),
}


@functools.cache
def stock(name: str) -> Any:
    """The stock model, eager: shared, so nobody may change it."""
    model = randomised(FAMILIES[name].make())
    model.generation_config.eos_token_id = EOS
    model.generation_config.pad_token_id = 0
    model.set_attn_implementation("eager")
    return model


def compact(name: str, stages: Sequence[dict[str, Any]], attention: str = "sdpa") -> Any:
    """A copy of the stock model from which image tokens leave."""
    from comp_cli.runtime.modeling_comp_vlm import make_compact

    model = copy.deepcopy(stock(name))
    model.set_attn_implementation(attention)
    make_compact(
        model, {"towers": [], "image_tokens": FAMILIES[name].image_tokens, "token_stages": copy.deepcopy(list(stages))}
    )
    return model


@functools.cache
def sample(name: str, prompt: str | tuple[int | str, ...]) -> Sample:
    """A sample of a family: one of PROMPTS, or words and images in the same way."""
    family, model = FAMILIES[name], stock(name)
    parts = PROMPTS[prompt] if isinstance(prompt, str) else prompt
    generator = torch.Generator().manual_seed(zlib.crc32(repr(parts).encode()))
    ids: list[int] = []
    pictures, images, newlines = [], [], []
    for part in parts:
        if isinstance(part, int):
            ids.append(part)
            continue
        picture = family.picture(model, part, generator)
        first = len(ids) + len(family.around[0])
        own = tuple((picture.patches.nonzero()[:, 0] + first).tolist())
        if family.joins and images and images[-1][-1] + 1 == own[0]:
            images[-1] += own
        else:
            images.append(own)
        newlines += ((~picture.patches).nonzero()[:, 0] + first).tolist()
        ids += [*family.around[0], *[IMAGE] * len(picture.patches), *family.around[1]]
        pictures.append(picture)
    inputs = {"input_ids": torch.tensor([ids])} | family.join([pictures])
    inputs |= family.types(inputs["input_ids"], torch.ones(1, len(ids), dtype=torch.long))
    return Sample(tuple(ids), tuple(pictures), inputs, tuple(images), tuple(newlines))


@functools.cache
def film(name: str) -> Sample:
    """A prompt with a video of two frames, or three, and for Qwen an image before it. Qwen3's frames have words between."""
    generator = torch.Generator().manual_seed(7)
    if name == "llava_onevision":
        ids = [5, 6, *[VIDEO] * 13, 7, 8]  # of each of three frames four tokens, and a newline behind them
        inputs = {"pixel_values_videos": torch.randn(1, 3, 3, 16, 16, generator=generator)}
        return Sample(tuple(ids), (), {"input_ids": torch.tensor([ids])} | inputs, (tuple(range(2, 14)),), (14,))
    image = sample(name, ("b",))
    between = [END, 40, 41, START] if name == "qwen3_vl" else []
    ids = [5, *image.ids, 6, START, *[VIDEO] * 6, *between, *[VIDEO] * 6, END, 7, 8]
    inputs = {name: image.inputs[name] for name in ("pixel_values", "image_grid_thw")}
    inputs |= {"pixel_values_videos": torch.randn(48, 96, generator=generator), "video_grid_thw": torch.tensor([[2, 4, 6]])}
    kinds = torch.tensor([[{IMAGE: 1, VIDEO: 2}.get(token, 0) for token in ids]])
    inputs |= {"input_ids": torch.tensor([ids]), "mm_token_type_ids": kinds}
    shown = tuple(tuple(i for i, token in enumerate(ids) if token == kind) for kind in (IMAGE, VIDEO))
    return Sample(tuple(ids), (), inputs, shown, ())


def batch(name: str, samples: Sequence[Sample], side: str = "left") -> dict[str, Tensor]:
    """Inputs of several samples, padded, with attention_mask."""
    longest = max(len(each.ids) for each in samples)
    ids = torch.zeros(len(samples), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, each in enumerate(samples):
        place = slice(longest - len(each.ids), None) if side == "left" else slice(0, len(each.ids))
        ids[i, place], mask[i, place] = torch.tensor(each.ids), 1
    family = FAMILIES[name]
    return (
        {"input_ids": ids, "attention_mask": mask} | family.join([each.pictures for each in samples]) | family.types(ids, mask)
    )


def class_scores(name: str, model: Any, each: Sample) -> list[Tensor]:
    """What [CLS] of an eager tower pays to each patch of each image, summed over heads: (patches of the image,) fp32 each."""
    family = FAMILIES[name]
    found: list[Tensor] = []
    attention = model.get_submodule(family.image_tokens["class_attention"]["module"])
    handle = attention.register_forward_hook(lambda module, args, output: found.append(output[1]))
    scores = []
    for picture in each.pictures:
        found.clear()
        with torch.no_grad():
            model.model.get_image_features(**picture.inputs)
        row = found[0].float().sum(1)[:, 0, 1:, None]  # (tiles, patches, 1)
        scores.append(family.arrange(model, row, picture.inputs)[picture.patches, 0])
    handle.remove()
    return scores


CASES = [
    (name, rule) for name, family in FAMILIES.items() for rule in STAGES if rule != "cls-clusters" or family.has_class_token
]
