"""SmolVLM: a SigLIP tower without pooling head, whose patches are shuffled before one projection, and a Llama."""

from dataclasses import replace

from ..topology import ImageTextDecoder, TilesOfPrompts
from .llava import LANGUAGE, LLAVA, TILED, VISION

SMOLVLM = replace(
    LLAVA,
    name="smolvlm",
    model_type="smolvlm",
    architectures={"SmolVLMForConditionalGeneration": ("vqa", "caption")},
    towers=(replace(VISION, encoder="model.vision_model.encoder"), replace(LANGUAGE, encoder="model.text_model")),
    topology=ImageTextDecoder(
        processor="SmolVLMProcessor",
        pictures=TilesOfPrompts(merged="scale_factor"),
        text="model.text_model",
        features="model.vision_model",
        no_graphs=TILED,
        inputs=("input_ids", "attention_mask", "pixel_values", "pixel_attention_mask", "labels"),
    ),
    fixed={
        "model.vision_model.embeddings.patch_embedding": "patches",
        "model.connector.modality_projection.proj": "features",
    },
    backbones={"vision_config": ("smolvlm_vision",), "text_config": ("llama",)},
)
