"""BLIP: a ViT whose fused qkv is eager in transformers, and a BERT with cross-attention to the image tokens.

Without the cross-attention the two are a dual encoder. For captions the BERT is causal and generates. For answers there are
two: one encodes the question, the other generates and attends to the states of the question: to all of them, for transformers
(5.23) does not mask the question's padding. None of them may go, because the mask that the decoder is given would not follow.
"""

from dataclasses import replace

from ..topology import ANSWER_INPUTS, INPUTS, CrossEncoder, DualEncoder, EncoderDecoder, Halves
from .base import Family, Stream, Tower, attention, feed_forward

VISION = Tower(
    name="vision",
    config="vision_config",
    encoder="vision_model.encoder",
    layers="layers",
    order="pre_norm",
    parts=(attention("self_attn", qkv=("qkv",), out="self_attn.projection"), feed_forward("mlp.fc1", "mlp.fc2")),
    streams=(Stream("vision", "image", protected=("first",)),),  # [CLS]
)
SELF = attention("attention.self", qkv=("query", "key", "value"), out="attention.output.dense")
CROSS = attention(
    "crossattention.self",
    qkv=("query", "key", "value"),
    out="crossattention.output.dense",
    name="cross",
    group="cross",
    reads="vision",
)
FFN = feed_forward("intermediate.dense", "output.dense")
LANGUAGE = Tower(
    name="language",
    config="text_config",
    encoder="text_encoder.encoder",
    layers="layer",
    order="post_norm",
    parts=(SELF, CROSS, FFN),
    streams=(Stream("language", "text", protected=("first", "last")),),  # [CLS] ([ENC]) and [SEP]
)
PATCHES = {"vision_model.embeddings.patch_embedding": "patches"}
BLIP = Family(
    name="blip",
    model_type="blip",
    architectures={"BlipForImageTextRetrieval": ("itm",)},
    towers=(VISION, LANGUAGE),
    topology=CrossEncoder(vision="vision_model", image_embeds="last_hidden_state"),
    fixed=PATCHES | {"itm_head": "once"},
)
BLIP_CONTRASTIVE = replace(
    BLIP,
    name="blip_contrastive",
    architectures={"BlipForImageTextRetrieval": ("retrieval", "zero-shot")},
    towers=(VISION, replace(LANGUAGE, parts=(SELF, FFN), unused=("crossattention",))),
    topology=DualEncoder(
        text_embeds="text_proj",
        halves=Halves(
            images=("vision_model", "vision_proj"),
            texts=("text_encoder", "text_proj"),
            temperature=0.07,  # which BLIP began its training with; what it learned is not in transformers' checkpoints
            asked="use_itm_head=False",
        ),
    ),
    fixed=PATCHES | {"vision_proj": "once", "text_proj": "once"},
)

# Of the head that makes words: its large matrix is that of the word embeddings.
HEAD = ("text_decoder.cls.predictions.transform.dense", "text_decoder.bert.embeddings.word_embeddings")
WRITTEN = Stream("language", "text", prunable=False, class_token=None, rule="even")
DECODER = replace(LANGUAGE, encoder="text_decoder.bert.encoder", streams=(WRITTEN,), causal=True)
ANSWER = replace(
    DECODER,
    name="answer",
    parts=(SELF, replace(CROSS, reads="language"), FFN),
    streams=(replace(WRITTEN, name="answer", source="answer"),),
    group="language",
)
QUESTION = replace(LANGUAGE, streams=(replace(LANGUAGE.streams[0], prunable=False),))
WRITER = EncoderDecoder(
    vision="vision_model", image_embeds="last_hidden_state", decoder="text_decoder", head="text_decoder.cls"
)
BLIP_CAPTION = replace(
    BLIP,
    name="blip_caption",
    architectures={"BlipForConditionalGeneration": ("caption",)},
    towers=(VISION, DECODER),
    topology=WRITER,
    fixed=PATCHES | dict.fromkeys(HEAD, "language"),
)
BLIP_VQA = replace(
    BLIP,
    name="blip_vqa",
    architectures={"BlipForQuestionAnswering": ("vqa",)},
    towers=(VISION, QUESTION, ANSWER),
    topology=replace(WRITER, question="text_encoder", inputs=(*INPUTS, *ANSWER_INPUTS)),
    fixed=PATCHES | dict.fromkeys(HEAD, "answer"),
)
