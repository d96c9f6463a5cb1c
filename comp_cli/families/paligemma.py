"""PaliGemma: a SigLIP tower, one projection, and a Gemma that reads image and question in both directions.

PaliGemma 2 has a Gemma 2, whose every other layer sees a window, and is refused.
"""

from dataclasses import replace

from ..topology import ImageTextDecoder, TileOfPrefix
from ..topology.image_features import of_the_last_layer
from .llava import LANGUAGE, LLAVA, VISION

PALIGEMMA = replace(
    LLAVA,
    name="paligemma",
    model_type="paligemma",
    architectures={"PaliGemmaForConditionalGeneration": ("vqa", "caption")},
    towers=(VISION, LANGUAGE),
    topology=ImageTextDecoder(
        processor="PaliGemmaProcessor",
        pictures=TileOfPrefix(),
        plain="<image>{}",
        behind="\n",
        chats=False,
        first_position=1,
        encode=of_the_last_layer,
        inputs=("input_ids", "attention_mask", "pixel_values", "token_type_ids", "labels"),
    ),
    fixed={
        "model.vision_tower.embeddings.patch_embedding": "patches",
        "model.multi_modal_projector.linear": "features",
    },
    backbones={"vision_config": ("siglip_vision_model",), "text_config": ("gemma",)},
)
