"""InternVL: a ViT with [CLS] whose patches are shuffled, four into an image token, and a Qwen2, Qwen3 or Llama."""

from dataclasses import replace

from ..topology import ImageTextDecoder, Tile
from .base import attention
from .llava import INPUTS, LANGUAGE, LLAVA, PROJECTOR, TILED
from .llava import VISION as LLAVA_VISION

VISION = replace(
    LLAVA_VISION,
    layers="layer",
    parts=(
        attention("attention", qkv=("q_proj", "k_proj", "v_proj"), out="attention.projection_layer"),
        LLAVA_VISION.part("ffn"),
    ),
)
INTERNVL = replace(
    LLAVA,
    name="internvl",
    model_type="internvl",
    architectures={"InternVLForConditionalGeneration": ("vqa", "caption")},
    towers=(VISION, LANGUAGE),
    topology=ImageTextDecoder(
        processor="InternVLProcessor",
        pictures=Tile(merged="downsample_ratio"),
        attention="encoder.layer.{}.attention",
        ranking=("q_norm", "k_norm"),  # which do nothing in most
        shuffle="downsample_ratio",
        no_graphs=TILED,
        inputs=INPUTS,
    ),
    fixed={"model.vision_tower.embeddings.patch_embeddings.projection": "patches"} | PROJECTOR,
    backbones={"vision_config": ("internvl_vision",), "text_config": ("qwen2", "qwen3", "llama")},
)
