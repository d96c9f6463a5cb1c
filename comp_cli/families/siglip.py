"""SigLIP and SigLIP 2: no [CLS], images are read by an attention pooling head, texts at their last, padded, position."""

from dataclasses import replace

from ..topology import DualEncoder
from .base import Family, Stream
from .clip import LANGUAGE, VISION

SIGLIP = Family(
    name="siglip",
    model_type="siglip",
    architectures={"SiglipModel": ("retrieval", "zero-shot")},
    towers=(
        replace(VISION, streams=(Stream("vision", "image", class_token=None),)),
        replace(
            LANGUAGE,
            streams=(Stream("language", "text", protected=("end",), class_token="last"),),
            causal=False,
            text_end=None,
        ),
    ),
    topology=DualEncoder(text_embeds="text_model.head", inputs=("pixel_values", "input_ids"), padding="max_length"),
    fixed={"vision_model.embeddings.patch_embedding": "patches", "text_model.head": "once"},
    pooling="vision_model.head",
)
