"""Tiny models of the real classes with their processors: 72 wide, 6 heads, FFN 200, towers of unequal depth."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from PIL import Image

WORDS = "a an red blue circle square and left right of above two three small large".split()
COMMON = {"hidden_size": 72, "num_attention_heads": 6, "intermediate_size": 200}
VISION = COMMON | {"num_hidden_layers": 5, "image_size": 48, "patch_size": 8}
TEXT = COMMON | {"num_hidden_layers": 4, "vocab_size": 5 + len(WORDS), "max_position_embeddings": 24}
PAD, UNKNOWN, START, END = range(4)


def blip_config(**changes):
    ids = {"bos_token_id": 2, "sep_token_id": 3, "eos_token_id": None, "initializer_range": 0.2}
    text = TEXT | ids | changes.pop("text", {})
    vision = VISION | {"initializer_range": 0.2} | changes.pop("vision", {})
    config = transformers.BlipConfig(text_config=text, vision_config=vision, image_text_hidden_size=16, **changes)
    config.architectures = ["BlipForImageTextRetrieval"]
    return config


def blip_processor(image_size: int = 48):
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    tokenizer = transformers.BertTokenizerFast(vocab={token: i for i, token in enumerate(tokens)}, model_max_length=24)
    size = {"height": image_size, "width": image_size}
    return transformers.BlipProcessor(BlipImageProcessorPil(size=size), tokenizer)


def word_tokenizer(ends: bool = True, **options):
    """Whole words; `<s> ... </s>` around a text, or only `</s>` behind it, as SigLIP has it."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    vocabulary = {token: i for i, token in enumerate(["<pad>", "<unk>", "<s>", "</s>", "<mask>", *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.normalizer, made.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    around = "<s> $A </s>" if ends else "$A </s>"
    made.post_processor = processors.TemplateProcessing(single=around, special_tokens=[("<s>", START), ("</s>", END)])
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "</s>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=24, **special, **options)


def clip_text(**changes):
    return TEXT | {"bos_token_id": START, "eos_token_id": END, "pad_token_id": PAD} | changes


def clip_images():
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    size = {"height": 48, "width": 48}
    return CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size=size)


def clip_model():
    config = transformers.CLIPConfig(text_config=clip_text(), vision_config=VISION, projection_dim=24)
    return sharpened(transformers.CLIPModel(config))


def clip_processor():
    return transformers.CLIPProcessor(clip_images(), word_tokenizer())


def clip_vision():
    return sharpened(transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**VISION, projection_dim=24)))


def clip_language():
    config = transformers.CLIPTextConfig(**clip_text(), projection_dim=24)
    return sharpened(transformers.CLIPTextModelWithProjection(config), 20)


def siglip_model():
    text = clip_text(projection_size=72)
    model = transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=VISION))
    model.logit_scale.data.fill_(2.0)
    return sharpened(model, 2)


def siglip_processor():
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    images = SiglipImageProcessorPil(size={"height": 48, "width": 48})
    return transformers.SiglipProcessor(images, word_tokenizer(ends=False, model_input_names=["input_ids"]))


def blip_model():
    return transformers.BlipForImageTextRetrieval(blip_config())


def blip_caption():
    return transformers.BlipForConditionalGeneration(blip_config(text={"eos_token_id": END}))


def blip_vqa():
    return transformers.BlipForQuestionAnswering(blip_config())


def sharpened(model, factor: float = 5):
    """Random weights make nearly even attention, whose ranking rounding would decide: queries and keys are made larger."""
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                tensor.mul_(factor)
    return model


FAMILIES: dict[str, tuple[Callable, Callable]] = {
    "blip": (blip_model, blip_processor),
    "blip-contrastive": (blip_model, blip_processor),
    "blip-caption": (blip_caption, blip_processor),
    "blip-vqa": (blip_vqa, blip_processor),
    "clip": (clip_model, clip_processor),
    "clip-vision": (clip_vision, clip_images),
    "clip-text": (clip_language, word_tokenizer),
    "siglip": (siglip_model, siglip_processor),
}
TASKS = {"blip-contrastive": "retrieval"}  # where it is not the usual one of the architecture


def write(family: str, folder: Path) -> Path:
    """A checkpoint folder, as people have it."""
    torch.manual_seed(0)
    model, processor = (make() for make in FAMILIES[family])
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def table(folder: Path, **columns: Callable) -> str:
    """A file with twelve pictures, and of each what the columns say: number of the row -> value."""
    for number in range(12):
        Image.new("RGB", (8, 8), (20 * number, 0, 99)).save(folder / f"{number}.png")
    rows = [{"image": f"{n}.png", **{name: value(n) for name, value in columns.items()}} for n in range(12)]
    (folder / "table.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder / "table.jsonl")


def uneven(plan, family=None):
    """Another number of heads, channels and tokens in every layer of a plan, but the tokens of towers that keep theirs."""
    from dataclasses import replace

    from comp_cli.plan import Channels

    generator = torch.Generator().manual_seed(2)

    def some(count: int, least: int) -> tuple[int, ...]:
        kept = int(torch.randint(least, count + 1, (1,), generator=generator))
        return tuple(sorted(torch.randperm(count, generator=generator)[:kept].tolist()))

    def cut(tower, layer, keep):
        for part, units in layer.parts.items():
            layer = layer.keeping(part, some(200, 8) if isinstance(units, Channels) else some(6, 1))
        return layer.handing_on(tower.name, keep)

    keeps = {"vision": [30, None, 19, 11, None], "language": [None, 9, None, 6]}
    keeps |= {tower.name: [None] * 4 for tower in (family.towers if family else ()) if not tower.streams[0].prunable}
    towers = tuple(
        replace(t, layers=tuple(cut(t, layer, keep) for layer, keep in zip(t.layers, keeps[t.name], strict=True)))
        for t in plan.towers
    )
    return replace(plan, towers=towers)


def masked(dense, plan):
    """The dense model with the tokens pruned as in a plan, and the heads and channels that it removes multiplied by zero."""
    from comp_cli.engine.scoring import tower_layers

    model = dense.build(dense.plan.with_keeps_of(plan), dense.state)
    for tower in dense.family.towers:
        for layer, wanted in zip(tower_layers(model, tower), plan.tower(tower.name).layers, strict=True):
            for part in tower.parts:
                linear, kept = layer.get_submodule(part.column), wanted.kept(part.name)
                units = 6 if part.is_attention else 200
                mask = torch.zeros(units).index_fill(0, torch.tensor(kept), 1).repeat_interleave(linear.in_features // units)
                linear.register_forward_pre_hook(lambda module, args, mask=mask: (args[0] * mask,))
                if part == tower.self_attention:
                    heads = torch.zeros(6).index_fill(0, torch.tensor(kept), 1)
                    layer.get_submodule(part.module).head_mask = heads
    return model
