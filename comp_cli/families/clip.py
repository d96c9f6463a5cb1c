"""CLIP: a ViT and a causal text tower that is read at its end-of-text token; one embedding of each."""

from dataclasses import replace

from ..topology import DualEncoder, SingleEncoder
from .base import Family, Stream, Tower, attention, feed_forward

VISION = Tower(
    name="vision",
    config="vision_config",
    encoder="vision_model.encoder",
    layers="layers",
    order="pre_norm",
    parts=(
        attention("self_attn", qkv=("q_proj", "k_proj", "v_proj"), out="self_attn.out_proj"),
        feed_forward("mlp.fc1", "mlp.fc2"),
    ),
    streams=(Stream("vision", "image", protected=("first",), rule="cls", fuse=True),),  # [CLS]
)
LANGUAGE = replace(
    VISION,
    name="language",
    config="text_config",
    encoder="text_model.encoder",
    streams=(Stream("language", "text", protected=("first", "last"), class_token="last", rule="last"),),  # start and end
    causal=True,
    text_end="text_model",
)
CLIP = Family(
    name="clip",
    model_type="clip",
    architectures={"CLIPModel": ("retrieval", "zero-shot")},
    towers=(VISION, LANGUAGE),
    topology=DualEncoder(text_embeds="text_projection"),
    fixed={"vision_model.embeddings.patch_embedding": "patches", "visual_projection": "once", "text_projection": "once"},
)
CLIP_VISION = replace(
    CLIP,
    name="clip_vision",
    model_type="clip_vision_model",
    architectures={"CLIPVisionModelWithProjection": ("image-embedding",)},
    towers=(replace(VISION, config=""),),
    topology=SingleEncoder(inputs=("pixel_values",)),
    fixed={"vision_model.embeddings.patch_embedding": "patches", "visual_projection": "once"},
)
CLIP_TEXT = replace(
    CLIP,
    name="clip_text",
    model_type="clip_text_model",
    architectures={"CLIPTextModelWithProjection": ("text-embedding",)},
    towers=(replace(LANGUAGE, config=""),),
    topology=SingleEncoder(inputs=("input_ids", "attention_mask")),
    fixed={"text_projection": "once"},
)
