"""Tiny models of the real classes with their processors: 72 wide, 6 heads, FFN 200, towers of unequal depth."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import transformers
from PIL import Image

from comp_cli.checkpoint.loading import without_video

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
# Decoders that read images: 4 query heads in 2 groups, 12 wide, gated FFN 64, 5 layers; towers of 3 layers, 4 heads, FFN 64.
DECODER = {
    "vocab_size": 40,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "max_position_embeddings": 256,
    "bos_token_id": START,
    "eos_token_id": END,
    "pad_token_id": PAD,
    "tie_word_embeddings": False,
}
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
SQUARE = {"image_size": 24, "patch_size": 4, "initializer_range": 0.3}
SPECIAL = ["<image>", "<video>", "<start>", "<stop>"]  # of prompts: tokens 20 to 23
IMAGE, VIDEO, BEGIN, STOP = range(5 + len(WORDS), 5 + len(WORDS) + len(SPECIAL))
CHAT = (
    "{% for turn in messages %}user {% for part in turn['content'] %}"
    "{% if part['type'] == 'image' %}{{ placeholder }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %} a {% endif %}"
)
CLIP_TOWER = TOWER | SQUARE | {"model_type": "clip_vision_model"}
SIGLIP_TOWER = TOWER | SQUARE | {"model_type": "siglip_vision_model", "vision_use_head": False}
PINPOINTS = [[24, 48], [48, 24], [48, 48]]


def prompt_tokenizer(**special: str):
    """Whole words, `<s>` before a text, and the tokens of prompts."""
    from tokenizers import processors

    made = word_tokenizer()
    made._tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", START)])
    core = made._tokenizer
    core.add_special_tokens(SPECIAL)
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    found = transformers.PreTrainedTokenizerFast(tokenizer_object=core, **names, extra_special_tokens=special or {})
    found.add_special_tokens({"additional_special_tokens": SPECIAL}, replace_extra_special_tokens=False)
    return found


def chat(placeholder: str = "<image>") -> str:
    return CHAT.replace("{{ placeholder }}", placeholder)


def decoder(made, config):
    """A model of random weights whose logits are no near ties."""
    model = made(config)
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_(0, 1.0)
    return sharpened(model, 2)


def llava_config(tower=None, text=None, **changes):
    options = {"image_token_index": IMAGE, "vision_feature_layer": -2, "vision_feature_select_strategy": "default"}
    text = DECODER | {"model_type": "llama"} | (text or {})
    return transformers.LlavaConfig(vision_config=tower or CLIP_TOWER, text_config=text, **options | changes)


def llava(**changes):
    return decoder(transformers.LlavaForConditionalGeneration, llava_config(**changes))


def square_images():
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    size = {"height": 24, "width": 24}
    return CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size=size)


def llava_processor():
    options = {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return transformers.LlavaProcessor(square_images(), prompt_tokenizer(), chat_template=chat(), **options)


def llava_next():
    options = {"image_grid_pinpoints": PINPOINTS, "image_token_index": IMAGE, "vision_feature_layer": -2}
    text = DECODER | {"model_type": "mistral", "sliding_window": None}
    config = transformers.LlavaNextConfig(vision_config=CLIP_TOWER, text_config=text, **options)
    return decoder(transformers.LlavaNextForConditionalGeneration, config)


def llava_next_processor():
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    size = {"height": 24, "width": 24}
    images = LlavaNextImageProcessorPil(size={"shortest_edge": 24}, crop_size=size, image_grid_pinpoints=PINPOINTS)
    options = {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return transformers.LlavaNextProcessor(images, prompt_tokenizer(), chat_template=chat(), **options)


def llava_onevision(pinpoints=PINPOINTS):
    options = {"image_grid_pinpoints": pinpoints, "image_token_index": IMAGE, "video_token_index": VIDEO}
    text = DECODER | {"model_type": "qwen2"}
    config = transformers.LlavaOnevisionConfig(vision_config=SIGLIP_TOWER, text_config=text, vision_feature_layer=-1, **options)
    return decoder(transformers.LlavaOnevisionForConditionalGeneration, config)


def llava_onevision_processor():
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

    images = LlavaOnevisionImageProcessorPil(size={"height": 24, "width": 24}, image_grid_pinpoints=PINPOINTS)
    options = {"num_image_tokens": 36, "vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_9"}
    made = without_video(transformers.LlavaOnevisionProcessor)
    return made(images, prompt_tokenizer(), chat_template=chat(), **options)


def qwen(kind: str):
    """Qwen2VL, Qwen2_5_VL or Qwen3VL. 144 patches of the reference image are 36 image tokens."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]}
    vision = {"depth": 3, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
    text = DECODER | {"rope_parameters": rope, "max_position_embeddings": 96}
    if kind == "Qwen2VL":
        vision |= {"embed_dim": 32, "hidden_size": 48, "mlp_ratio": 2}
    else:
        vision |= {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 48}
    if kind == "Qwen2_5_VL":
        vision |= {"window_size": 16, "fullatt_block_indexes": [1]}
    if kind == "Qwen3VL":
        vision |= {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64}
        text |= {"head_dim": 12, "rope_parameters": rope | {"mrope_interleaved": True}}
    ids = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": BEGIN, "vision_end_token_id": STOP}
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=vision, **ids)
    return decoder(getattr(transformers, f"{kind}ForConditionalGeneration"), config)


def qwen_processor(kind: str):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    sizes = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2, "min_pixels": 256, "max_pixels": 2304}
    tokenizer = prompt_tokenizer(image_token="<image>", video_token="<video>")
    made = without_video(getattr(transformers, f"{kind}Processor"))
    return made(Qwen2VLImageProcessorPil(**sizes), tokenizer, chat_template=chat("<start><image><stop>"))


def internvl():
    vision = TOWER | {"image_size": [24, 24], "patch_size": [3, 3], "initializer_range": 0.3}
    ids = {"image_token_id": IMAGE, "image_seq_length": 16, "tie_word_embeddings": False}
    config = transformers.InternVLConfig(vision_config=vision, text_config=DECODER | {"model_type": "qwen2"}, **ids)
    return decoder(transformers.InternVLForConditionalGeneration, config)


def internvl_processor():
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    names = {"start_image_token": "<start>", "end_image_token": "<stop>", "context_image_token": "<image>"}
    images = GotOcr2ImageProcessorPil(size={"height": 24, "width": 24}, crop_to_patches=True, max_patches=2)
    tokenizer = prompt_tokenizer(**names, video_token="<video>")
    made = without_video(transformers.InternVLProcessor)
    return made(images, tokenizer, image_seq_length=16, chat_template=chat())


def smolvlm():
    vision = TOWER | SQUARE
    config = transformers.SmolVLMConfig(
        vision_config=vision,
        text_config=DECODER | {"model_type": "llama", "tie_word_embeddings": True},
        image_token_id=IMAGE,
        scale_factor=2,
        tie_word_embeddings=True,
    )
    return decoder(transformers.SmolVLMForConditionalGeneration, config)


def smolvlm_processor():
    """Needs torchvision and num2words, for videos."""
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    images = SmolVLMImageProcessorPil(size={"longest_edge": 24}, max_image_size={"longest_edge": 24}, do_image_splitting=False)
    return transformers.SmolVLMProcessor(
        images, prompt_tokenizer(), transformers.SmolVLMVideoProcessor(), image_seq_len=9, chat_template=chat()
    )


def paligemma():
    words = 1200  # the processor adds 1,152: of places and segments
    text = DECODER | {"model_type": "gemma", "head_dim": 12, "tie_word_embeddings": True, "vocab_size": words}
    options = {"image_token_index": IMAGE, "projection_dim": 48, "hidden_size": 48, "vocab_size": words}
    config = transformers.PaliGemmaConfig(vision_config=SIGLIP_TOWER, text_config=text, **options)
    return decoder(transformers.PaliGemmaForConditionalGeneration, config)


def paligemma_processor():
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    images = SiglipImageProcessorPil(size={"height": 24, "width": 24})
    images.image_seq_length = 36
    return transformers.PaliGemmaProcessor(images, prompt_tokenizer(image_token="<image>"))


DECODERS: dict[str, tuple[Callable, Callable]] = {
    "llava": (llava, llava_processor),
    "llava-next": (llava_next, llava_next_processor),
    "llava-onevision": (llava_onevision, llava_onevision_processor),
    "qwen2-vl": (partial(qwen, "Qwen2VL"), partial(qwen_processor, "Qwen2VL")),
    "qwen2.5-vl": (partial(qwen, "Qwen2_5_VL"), partial(qwen_processor, "Qwen2_5_VL")),
    "qwen3-vl": (partial(qwen, "Qwen3VL"), partial(qwen_processor, "Qwen3VL")),
    "internvl": (internvl, internvl_processor),
    "smolvlm": (smolvlm, smolvlm_processor),
    "paligemma": (paligemma, paligemma_processor),
}
TASKS = {"blip-contrastive": "retrieval"}  # where it is not the usual one of the architecture


def write(family: str, folder: Path) -> Path:
    """A checkpoint folder, as people have it."""
    torch.manual_seed(0)
    model, processor = (make() for make in (FAMILIES | DECODERS)[family])
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
