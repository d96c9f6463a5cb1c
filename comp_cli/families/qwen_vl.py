"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: towers that take images of any size, four patches merged into an image token, M-RoPE.

Their towers have no [CLS], fused queries, keys and values, and no padding: images stand one behind the other. Most layers of
Qwen2.5-VL's see windows alone. Qwen3-VL hands features of earlier layers to the first layers of the decoder as well, through
mergers of their own (deepstack).
"""

from dataclasses import replace

from ..topology import AnySize, ImageTextDecoder
from .base import Family, Tower, attention, feed_forward
from .llava import LANGUAGE
from .llava import VISION as LLAVA_VISION

VISION = replace(
    LLAVA_VISION,
    encoder="model.visual",
    layers="blocks",
    depth="depth",
    parts=(attention("attn", qkv=("qkv",), out="attn.proj", queries="num_heads"), feed_forward("mlp.fc1", "mlp.fc2")),
)
PATCHES = {"model.visual.patch_embed.proj": "patches"}
MERGER = {"model.visual.merger.mlp.0": "features", "model.visual.merger.mlp.2": "features"}


def family(name: str, architecture: str, processor: str, vision: Tower, merger: dict[str, str]) -> Family:
    """One of the three, whose towers differ."""
    return Family(
        name=name,
        model_type=name,
        architectures={architecture: ("vqa", "caption")},
        towers=(vision, LANGUAGE),
        topology=ImageTextDecoder(
            processor=processor,
            pictures=AnySize(),
            features="model.visual",
            no_graphs="pictures of any size become any number of tokens, and the graphs are for images of one number of tokens",
            inputs=("input_ids", "attention_mask", "pixel_values", "image_grid_thw", "mm_token_type_ids", "labels"),
        ),
        fixed=PATCHES | merger,
        backbones={"vision_config": (f"{name}_vision",), "text_config": (f"{name}_text",)},
    )


QWEN2_VL = family(
    "qwen2_vl",
    "Qwen2VLForConditionalGeneration",
    "Qwen2VLProcessor",
    # hidden_size is that of the decoder there.
    replace(VISION, sizes=(("hidden_size", ("embed_dim",)), ("intermediate_size", ("embed_dim", "mlp_ratio")))),
    MERGER,
)
QWEN2_5_VL = family(
    "qwen2_5_vl",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen2_5_VLProcessor",
    replace(VISION, parts=(VISION.parts[0], feed_forward("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"))),
    MERGER,
)
QWEN3_VL = family(
    "qwen3_vl",
    "Qwen3VLForConditionalGeneration",
    "Qwen3VLProcessor",
    replace(VISION, parts=(VISION.parts[0], feed_forward("mlp.linear_fc1", "mlp.linear_fc2"))),
    {
        f"model.visual.{merger}.linear_fc{number}": "features"
        for merger in ("merger", "deepstack_merger_list.*")
        for number in (1, 2)
    },
)
