"""What a description cannot hold of a model is refused when the model is opened, by name and with the reason."""

from collections.abc import Mapping
from typing import Any

from ..errors import RefusedError
from .base import Family

LAYER_TYPES = {  # of transformers' layer_types, beside "full_attention"
    "linear_attention": "its state is made of all tokens before, so none may leave",
    "sliding_attention": "its cache holds a window of tokens that are counted where they are, and tokens leave",
    "chunked_attention": "its chunks are counted by the tokens that are there, and tokens leave",
}
KINDS = {  # model_type of a decoder or a vision tower -> why no description here holds
    "phi3": "queries, keys and values are one matrix, of parts that differ in size",
    "glm4v_text": "gate and up are one matrix",
    "gemma2": "every other layer sees a window, " + LAYER_TYPES["sliding_attention"],
    "gemma3_text": "most layers see a window, " + LAYER_TYPES["sliding_attention"],
    "gemma4_text": "most layers see a window, " + LAYER_TYPES["sliding_attention"],
    "mixtral": "experts are chosen token by token, and held in one tensor",
    "qwen2_moe": "experts are chosen token by token, and held in one tensor",
    "qwen3_moe": "experts are chosen token by token, and held in one tensor",
    "qwen3_next": LAYER_TYPES["linear_attention"],
    "qwen3_5_text": LAYER_TYPES["linear_attention"],
    "pixtral": "images of any size are packed into one sequence",
}
SHORTEST_TEXT = 4  # tokens
HINT = "docs/families.md lists the kinds that comp prunes."


def check_supported(config: Mapping[str, Any], family: Family) -> None:
    """Raises RefusedError for a model whose class fits a family, and which is built of what the family does not describe.
    config: the whole config.json, defaults filled in."""
    for name, kinds in family.backbones.items():
        kind = config[name].get("model_type")
        if kind not in kinds:
            why = f": {KINDS[kind]}" if kind in KINDS else ""
            known = f"those of a {family.name} model that comp prunes are {', '.join(kinds)}"
            said = f"config.json: {name} is of the kind {kind!r}; {known}"
            raise RefusedError(f"{said}{why}.", hint=HINT)
        _check_layers(name, config[name])
    if family.backbones:
        _check_features(config)
        room = family.topology.longest_text(family, config)
        if room < SHORTEST_TEXT:
            longest = config["text_config"]["max_position_embeddings"]
            said = (
                f"config.json: text_config.max_position_embeddings is {longest}, {SHORTEST_TEXT - room} too few for one image"
            )
            raise RefusedError(f"{said} and {SHORTEST_TEXT} tokens of text.", hint="Give it the length of the language model.")


def _check_layers(place: str, part: Mapping[str, Any]) -> None:
    """Every layer sees all tokens before it."""
    for kind in part.get("layer_types") or ():
        if kind != "full_attention":
            why = LAYER_TYPES.get(kind, "comp does not know it")
            raise RefusedError(f"config.json: {place}.layer_types has {kind}: {why}.", hint=HINT)
    window = part.get("sliding_window")
    if window is not None and part.get("use_sliding_window", True):
        said = f"config.json: {place}.sliding_window is {window}: {LAYER_TYPES['sliding_attention']}"
        cure = f"If no prompt is longer than {window} tokens, set sliding_window to null: nothing else changes."
        raise RefusedError(f"{said}.", hint=cure)
    if part.get("attention_chunk_size") is not None:
        said = f"config.json: {place}.attention_chunk_size is {part['attention_chunk_size']}"
        raise RefusedError(f"{said}: {LAYER_TYPES['chunked_attention']}.", hint=HINT)


def _check_features(config: Mapping[str, Any]) -> None:
    """Every image token is made of patches, and of no [CLS]."""
    vision, how = config["vision_config"], config.get("vision_feature_select_strategy")
    for name in ("image_size", "patch_size"):
        sides = vision.get(name)
        if isinstance(sides, list | tuple) and len(set(sides)) > 1:
            raise RefusedError(f"config.json: vision_config.{name} is {sides}; expected a square.", hint=HINT)
    wanted = {"clip_vision_model": "default", "siglip_vision_model": "full", "internvl_vision": "default"}
    if how is not None and how != wanted[vision["model_type"]]:
        lost = "keeps [CLS] among the image tokens" if how == "full" else "drops the first patch, for there is no [CLS]"
        said = f"config.json: vision_feature_select_strategy is {how!r}, which {lost} of a {vision['model_type']}"
        raise RefusedError(f"{said}; expected {wanted[vision['model_type']]!r}.", hint=HINT)
    layers = config.get("vision_feature_layer")
    if layers is None:
        return
    depth = vision["num_hidden_layers"]
    for layer in layers if isinstance(layers, list | tuple) else [layers]:
        if not (type(layer) is int and -depth - 1 < layer <= depth and layer != 0):
            raise RefusedError(f"config.json: vision_feature_layer is {layer}; the tower has {depth} layers.", hint=HINT)
