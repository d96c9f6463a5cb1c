"""Write a full-size BLIP checkpoint with random weights: what speed and memory are measured on.

    python benchmarks/full_size.py blip-itm-base-random
    python benchmarks/full_size.py blip-caption-large-random --task caption --large --image-size 480

The sizes of Salesforce/blip-itm-base-coco (ViT-B/16 at 384 px, 12 text layers with cross-attention, 224 M parameters) and of
the others like it. Its decisions mean nothing; its shapes, and so its cost, are real. Biases are noise as well: ones that are
all zero would be optimised away in ONNX graphs (and ONNX Runtime's patch convolution is three times slower without one).
"""

import argparse
from pathlib import Path

import torch
import transformers
from train_demo import build_processor
from transformers import BlipConfig

CLASSES = {"itm": "BlipForImageTextRetrieval", "caption": "BlipForConditionalGeneration", "vqa": "BlipForQuestionAnswering"}
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}  # ViT-L


def write(folder: Path, task: str = "itm", large: bool = False, image_size: int = 384, seed: int = 0) -> None:
    torch.manual_seed(seed)
    processor = build_processor()
    ids = {"bos_token_id": 30522, "sep_token_id": processor.tokenizer.sep_token_id}
    text = {"vocab_size": 30524, "num_attention_heads": 12} | ids
    vision = {"image_size": image_size, "patch_size": 16, "initializer_range": 0.02} | (LARGE if large else {})
    model = getattr(transformers, CLASSES[task])(BlipConfig(text_config=text, vision_config=vision))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(folder)
    processor.tokenizer.model_max_length = 512
    processor.image_processor.size = {"height": image_size, "width": image_size}
    processor.save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--task", choices=list(CLASSES), default="itm")
    parser.add_argument("--large", action="store_true", help="a ViT-L for images; texts stay as large")
    parser.add_argument("--image-size", type=int, default=384)
    arguments = parser.parse_args()
    if arguments.large and arguments.task == "vqa":
        parser.error("transformers' BLIP for questions takes images and texts of one width: there is no large one")
    write(arguments.folder, arguments.task, arguments.large, arguments.image_size)
