"""What a folder is that is no transformers checkpoint, by the names of its files, and what to do about it."""

import re
from collections.abc import Collection

ADAPTER = r"adapter_config\.json|adapter_model.*"
MERGE = "Merge it first: PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(FOLDER), and give FOLDER."
# Pattern of a file's whole name -> what the folder is, and the cure; the first that fits says it.
KINDS = {
    r"model_index\.json|diffusion_pytorch_model.*": (
        "a diffusers pipeline",
        "Give its CLIP alone, if it has one: the folder text_encoder inside it.",
    ),
    r"modules\.json|sentence_bert_config\.json|config_sentence_transformers\.json": (
        "a sentence-transformers model",
        "Give the transformers model inside it: the folder 0_CLIPModel or 0_Transformer.",
    ),
    r"open_clip_.*": (
        "an OpenCLIP model",
        "Convert it with transformers' convert_clip_original_pytorch_to_hf.py, or take the author's transformers version.",
    ),
    r".*\.gguf": ("a GGUF file of llama.cpp", "Give the transformers model that it was made from."),
    r".*\.onnx": ("an ONNX export", "Give the transformers model that it was made from: comp export writes ONNX."),
    r"zero_pp_rank.*|bf16_zero.*|mp_rank_.*|global_step.*|zero_to_fp32\.py": (
        "a DeepSpeed checkpoint in parts",
        "Join them: python zero_to_fp32.py . FOLDER --safe_serialization, and put config.json and processor files beside.",
    ),
    r".*\.distcp|pytorch_model_fsdp.*": (
        "an FSDP checkpoint in parts",
        "Join them: accelerate merge-weights, and put config.json and processor files beside.",
    ),
    r"consolidated.*|params\.json": (
        "weights in their author's own layout",
        "Give the version that transformers' save_pretrained wrote.",
    ),
    r"checkpoint-\d+": ("a folder of training checkpoints", "Give one of them: the folder checkpoint-N."),
    r"tf_model\.h5|flax_model.*|.*\.msgpack|saved_model\.pb": (
        "a TensorFlow or Flax checkpoint",
        "Load it with the transformers version that can (4.x, from_tf or from_flax), and save_pretrained it.",
    ),
    r"model\..+\.safetensors": (
        "a checkpoint in another precision only",
        "Give the repository's main weights, model.safetensors; or rename the file if it is what you want.",
    ),
    r".*\.(pt|pth|ckpt|tar)": (
        "a checkpoint that torch.save wrote",
        "Load it into the transformers class that it belongs to, and save_pretrained it.",
    ),
    r"model-\d+-of-\d+\.safetensors": (
        "shards without their index",
        "Fetch model.safetensors.index.json, which says what is where.",
    ),
}


def adapter_among(names: Collection[str]) -> str | None:
    """The file that says that a folder holds a PEFT adapter (LoRA and its kin), alone or beside its base."""
    return next((name for name in sorted(names) if re.fullmatch(ADAPTER, name)), None)


def other_kind(names: Collection[str]) -> tuple[str, str] | None:
    """What a folder is, and what to do: ("a diffusers pipeline", "Give its ..."); None where nothing tells."""
    for pattern, said in KINDS.items():
        if found := next((name for name in sorted(names) if re.fullmatch(pattern, name)), None):
            return f"{said[0]} ({found})", said[1]
    return None
