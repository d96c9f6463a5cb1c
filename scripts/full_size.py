"""Write a full-size BLIP or CLIP checkpoint with random weights: what speed and memory are measured on.

    python scripts/full_size.py blip-itm-base-random
    python scripts/full_size.py blip-caption-large-random --task caption --large --image-size 480
    python scripts/full_size.py clip-random --task retrieval                                # ViT-B/16 at 224 px

The sizes of Salesforce/blip-itm-base-coco (ViT-B/16 at 384 px, 12 text layers with cross-attention, 224 M parameters) and of
the others like it. Its decisions mean nothing; its shapes, and so its cost, are real. Biases are noise as well: ones that are
all zero would be optimised away in ONNX graphs (and ONNX Runtime's patch convolution is three times slower without one).
"""

import argparse
from pathlib import Path

import torch
import train_clip
import train_demo
import transformers
from transformers import BlipConfig, CLIPConfig, PreTrainedModel, ProcessorMixin

CLASSES = {"itm": "BlipForImageTextRetrieval", "caption": "BlipForConditionalGeneration", "vqa": "BlipForQuestionAnswering"}
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}  # ViT-L


def write(folder: Path, task: str = "itm", large: bool = False, image_size: int | None = None, seed: int = 0) -> None:
    torch.manual_seed(seed)
    model, processor = clip(large, image_size) if task == "retrieval" else blip(CLASSES[task], large, image_size or 384)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def blip(kind: str, large: bool, side: int) -> tuple[PreTrainedModel, ProcessorMixin]:
    processor = train_demo.build_processor()
    ids = {"bos_token_id": 30522, "sep_token_id": processor.tokenizer.sep_token_id}
    text = {"vocab_size": 30524, "num_attention_heads": 12} | ids
    vision = {"image_size": side, "patch_size": 16, "initializer_range": 0.02} | (LARGE if large else {})
    processor.tokenizer.model_max_length = 512
    processor.image_processor.size = {"height": side, "width": side}
    return getattr(transformers, kind)(BlipConfig(text_config=text, vision_config=vision)), processor


def clip(large: bool, side: int | None) -> tuple[PreTrainedModel, ProcessorMixin]:
    """ViT-B/16 at 224 px, or ViT-L/14 at 336 px."""
    side = side or (336 if large else 224)
    processor = train_clip.build_processor()
    text = {"bos_token_id": 2, "eos_token_id": train_clip.END, "pad_token_id": 0}
    vision = {"image_size": side, "patch_size": 16}
    if large:
        text |= {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}
        vision |= LARGE | {"patch_size": 14}
    processor.tokenizer.model_max_length = 77
    processor.image_processor.size = {"shortest_edge": side}
    processor.image_processor.crop_size = {"height": side, "width": side}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=768 if large else 512)
    return transformers.CLIPModel(config), processor


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--task", choices=[*CLASSES, "retrieval"], default="itm")
    parser.add_argument("--large", action="store_true", help="a ViT-L for images; texts stay as large")
    parser.add_argument("--image-size", type=int, help="default: 384; CLIP 224, large 336")
    arguments = parser.parse_args()
    if arguments.large and arguments.task == "vqa":
        parser.error("transformers' BLIP for questions takes images and texts of one width: there is no large one")
    write(arguments.folder, arguments.task, arguments.large, arguments.image_size)
