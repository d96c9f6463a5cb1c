"""LLaVA, LLaVA-NeXT and LLaVA-OneVision: a CLIP or SigLIP tower, a projector of two matrices, and a Llama or one of its like.

The decoders differ in biases (Qwen2 has some in queries, keys and values) and in norms of queries and keys (Qwen3), which
stay as they are. The last layer of a LLaVA's tower runs for nothing, for the features are those of the one before it.
"""

from dataclasses import replace

from ..topology import AnyResolution, ImageTextDecoder
from ..topology.image_features import through_projector
from .base import Family, Stream, Tower, attention, feed_forward

VISION = Tower(
    name="vision",
    config="vision_config",
    encoder="model.vision_tower.encoder",
    layers="layers",
    order="stock",
    parts=(
        attention("self_attn", qkv=("q_proj", "k_proj", "v_proj"), out="self_attn.out_proj"),
        feed_forward("mlp.fc1", "mlp.fc2"),
    ),
    streams=(Stream("vision", "image", prunable=False, class_token=None, rule="even"),),
    unasked=False,
)
IMAGE = Stream("image", "image", class_token=None, rule="even")
TEXT = Stream("language", "text", prunable=False, class_token=None, rule="even")
NEWLINE = Stream("newline", "newline", prunable=False, class_token=None, rule="even")
LANGUAGE = Tower(
    name="language",
    config="text_config",
    encoder="model.language_model",
    layers="layers",
    order="stock",
    parts=(
        attention(
            "self_attn",
            qkv=("q_proj", "k_proj", "v_proj"),
            out="self_attn.o_proj",
            units="num_key_value_heads",
            head_dim="head_dim",
        ),
        feed_forward("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    ),
    streams=(IMAGE, TEXT),
    causal=True,
    norms=("input_layernorm", "post_attention_layernorm"),
)
PROJECTOR = {"model.multi_modal_projector.linear_1": "features", "model.multi_modal_projector.linear_2": "features"}
DECODERS = ("llama", "mistral", "qwen2", "qwen3", "gemma")
INPUTS = ("input_ids", "attention_mask", "pixel_values", "labels")

TILED = "pictures are read in several tiles, as many as fit them, and the graphs are for images of one number of tokens"

TILES = ImageTextDecoder(
    processor="LlavaNextProcessor",
    pictures=AnyResolution(),
    newline="model.image_newline",
    no_graphs=TILED,
    inputs=("input_ids", "attention_mask", "pixel_values", "image_sizes", "labels"),
)

LLAVA = Family(
    name="llava",
    model_type="llava",
    architectures={"LlavaForConditionalGeneration": ("vqa", "caption")},
    towers=(VISION, LANGUAGE),
    topology=ImageTextDecoder(processor="LlavaProcessor", inputs=INPUTS, encode=through_projector),
    fixed={"model.vision_tower.embeddings.patch_embedding": "patches"} | PROJECTOR,
    backbones={"vision_config": ("clip_vision_model", "siglip_vision_model"), "text_config": DECODERS},
)
LLAVA_NEXT = replace(
    LLAVA,
    name="llava_next",
    model_type="llava_next",
    architectures={"LlavaNextForConditionalGeneration": ("vqa", "caption")},
    towers=(VISION, replace(LANGUAGE, streams=(IMAGE, TEXT, NEWLINE))),
    topology=TILES,
)
LLAVA_ONEVISION = replace(
    LLAVA_NEXT,
    name="llava_onevision",
    model_type="llava_onevision",
    architectures={"LlavaOnevisionForConditionalGeneration": ("vqa", "caption")},
    topology=replace(TILES, processor="LlavaOnevisionProcessor"),
)
